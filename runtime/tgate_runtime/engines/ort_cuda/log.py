"""What ONNX Runtime has to say beside its exceptions: its log, and how both become one line."""

from __future__ import annotations

import contextlib
import os
import re
import sys
import tempfile
from collections.abc import Iterator, Sequence

from tgate_engine.errors import EngineError
from tgate_runtime.engines.ort import first_line

_LOGGED, _WARNING = ":onnxruntime:", "[W:onnxruntime:"
_COLOUR = re.compile(r"\x1b\[[\d;]*m")


@contextlib.contextmanager
def failing(what: str, log: Sequence[str] = ()) -> Iterator[None]:
    """Raises :class:`EngineError` for whatever fails meanwhile; ``log``: what else the engine has to say of it."""
    try:
        yield
    except EngineError:
        raise
    except Exception as error:  # the engine raises RuntimeError and a dozen classes of its own
        why = first_line(error)
        reason = next((text for line in log if (text := _complaint(line))), why)
        raise EngineError(f"{what}: {why}" + (f" ({reason})" if reason not in why else "")) from error


@contextlib.contextmanager
def captured_stderr(log: list[str]) -> Iterator[None]:
    """Add ONNX Runtime's log, line by line, to ``log``: it goes to standard error, out of Python's hearing.

    What else is written there meanwhile goes on to it, as do the log's errors where nothing is raised.
    """
    hidden = _LOGGED
    with tempfile.TemporaryFile() as file:
        before = os.dup(2)
        os.dup2(file.fileno(), 2)
        try:
            yield
            hidden = _WARNING
        finally:
            os.dup2(before, 2)
            os.close(before)
            file.seek(0)
            lines = _COLOUR.sub("", file.read().decode(errors="replace")).splitlines()
            log += [line for line in lines if _LOGGED in line]
            sys.stderr.writelines(f"{line}\n" for line in lines if line and hidden not in line)


def _complaint(line: str) -> str:
    """What a line of ONNX Runtime's log says, without time and place; nothing where it is a warning."""
    text = re.sub(r"^(.*?:onnxruntime:[^\]]*\] )?(.*\[ONNXRuntimeError\] : \d+ : \w+ : )?", "", line)
    return "" if _WARNING in line else first_line(RuntimeError(text))
