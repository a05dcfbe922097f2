"""Files of strangers, read whole: regular ones alone, of a bounded size, through one descriptor."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from tgate_engine.errors import TgateError


def read_regular(path: Path, most_bytes: int, error: type[TgateError]) -> bytes:
    """What a file holds. Raises ``error`` at once for one that is not there, cannot be read, holds more than
    ``most_bytes``, or is no regular file: a pipe would keep the reader waiting, a device never ends.
    """
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise error(f"{path}: there is no such file") from None
    except (OSError, ValueError) as fault:  # ValueError: a NUL in the name
        raise error(f"{path} cannot be read ({getattr(fault, 'strerror', None) or fault})") from None
    status = os.fstat(handle)
    if not stat.S_ISREG(status.st_mode):
        os.close(handle)
        raise error(f"{path} is not a regular file; name one")
    with os.fdopen(handle, "rb") as file:
        try:
            content = b"" if status.st_size > most_bytes else file.read(most_bytes + 1)
        except OSError as fault:
            raise error(f"{path} cannot be read ({fault.strerror})") from None
    size = max(status.st_size, len(content))
    if size > most_bytes:
        raise error(f"{path} holds {size} bytes; at most {most_bytes} are read")
    return content
