"""The command line: ``tgate`` and ``tgate-export``.

Export and run time are imported inside the commands that need them, so that a production host needs no torch and a
build host no engine. Results go to stdout, everything else to stderr.

Exit status: 0 done; 1 the work failed; 2 the command line is wrong; 70 a fault of the program itself;
130 interrupted; 143 terminated. A failure is one line on stderr that begins ``tgate: error:``.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import NoReturn

from tgate_cli import export_commands, run_commands
from tgate_cli.arguments import FAILED, export_parser, tgate_parser
from tgate_cli.command import Show
from tgate_cli.display import reporter
from tgate_engine.errors import TgateError
from tgate_engine.report import Reporter

FAULT, INTERRUPTED, TERMINATED = 70, 130, 143

COMMANDS: dict[str, Callable[[argparse.Namespace, Reporter], Show]] = {
    "generate": run_commands.generate,
    "inspect": run_commands.inspect,
    "verify": run_commands.verify,
    "bench": run_commands.bench,
    "engines": run_commands.engines,
    "build": run_commands.build,
    "plan": export_commands.plan,
    "embed": export_commands.embed,
    "export": export_commands.export,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """``tgate``. Returns the exit status."""
    return _run(tgate_parser(), arguments)


def export_main(arguments: Sequence[str] | None = None) -> int:
    """``tgate-export``. Returns the exit status."""
    return _run(export_parser(export_commands.list_models), arguments)


class _Terminated(BaseException):
    """SIGTERM came. Not an Exception, so that only clean-up code sees it on its way to the top."""


def _parse(parser: argparse.ArgumentParser, arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse; a PROMPT may also come after options, where argparse no longer looks for one that may be left out."""
    args, left = parser.parse_known_args(arguments)
    if left and not left[0].startswith("-") and getattr(args, "prompt", "") is None:
        args.prompt = left.pop(0)
    if left:
        args.parser.error(f"unrecognized arguments: {' '.join(left)}")
    return args


def _run(parser: argparse.ArgumentParser, arguments: Sequence[str] | None) -> int:
    """Parse, run the command, and turn whatever ends it into one line and an exit status."""
    args = _parse(parser, arguments)
    try:
        with _sigterm_raises(), reporter(quiet=args.quiet) as report, _warnings_to(report):
            show = COMMANDS[args.command](args, report)
        show()
        sys.stdout.flush()
    except BrokenPipeError:  # the reader of stdout went away, which is its right
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except (TgateError, OSError) as error:
        return _fail(args, _line(error), FAILED)
    except KeyboardInterrupt:
        return _fail(args, "interrupted", INTERRUPTED)
    except _Terminated:
        return _fail(args, "terminated", TERMINATED)
    except Exception as error:  # a fault of the program: still one line, unless asked for more
        hint = "" if args.traceback else "; run with --traceback to see where"
        return _fail(args, f"unexpected {type(error).__name__}: {error}{hint}", FAULT)
    return 0


def _fail(args: argparse.Namespace, text: str, status: int) -> int:
    if args.traceback:
        traceback.print_exc()
    print(f"tgate: error: {' '.join(text.split())}", file=sys.stderr)
    return status


def _line(error: TgateError | OSError) -> str:
    if isinstance(error, TgateError):
        return str(error)
    what = error.strerror or str(error)
    return f"{os.fsdecode(error.filename)}: {what}" if error.filename else what


@contextlib.contextmanager
def _sigterm_raises() -> Iterator[None]:
    """Lets SIGTERM unwind the stack, so that what is half written is removed."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handler(*_: object) -> NoReturn:
        raise _Terminated

    before = signal.signal(signal.SIGTERM, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class _Handler(logging.Handler):
    """Gives the warnings of the log ``tgate`` to a reporter."""

    def __init__(self, report: Reporter) -> None:
        super().__init__(logging.WARNING)
        self._report = report

    def emit(self, record: logging.LogRecord) -> None:
        self._report.warn(" ".join(record.getMessage().split()))


@contextlib.contextmanager
def _warnings_to(report: Reporter) -> Iterator[None]:
    log, handler = logging.getLogger("tgate"), _Handler(report)
    log.addHandler(handler)
    try:
        yield
    finally:
        log.removeHandler(handler)


if __name__ == "__main__":
    sys.exit(main())
