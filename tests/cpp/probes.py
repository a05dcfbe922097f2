"""Hands records to the programs of ``runtime/cpp/probes``."""

from __future__ import annotations

import struct
import subprocess
from collections.abc import Iterable
from pathlib import Path


def record(kind: str, payload: bytes) -> bytes:
    """As ``probes/records.h`` reads it."""
    return kind.encode() + struct.pack("<Q", len(payload)) + payload


def ask(program: Path, records: Iterable[bytes]) -> list[str]:
    """The lines that a probe says of those records."""
    done = subprocess.run([program], input=b"".join(records), capture_output=True, check=True)
    return done.stdout.decode("utf-8").split("\n")[:-1]
