"""Texts that people type for places: a path that no file can have ends in one line as well."""

from __future__ import annotations

from pathlib import Path


def local(location: str) -> Path | None:
    """A location as a path, whether anything is there or not; None where no path is written so."""
    try:
        path = Path(location).expanduser()
        path.lstat()
    except FileNotFoundError:
        return path
    except (OSError, RuntimeError, ValueError):  # too long, an unknown user's home, a zero byte
        return None
    return path
