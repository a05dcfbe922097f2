"""Talks to the programs of ``runtime/cpp/probes`` that are asked many things in one process."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def ask(probe: Path, mode: str, texts: Iterable[bytes]) -> list[bytes]:
    """What ``probe-json`` answers to each text."""
    given = [*texts]
    said = _run(probe, [mode], b"".join(b"%d\n%b" % (len(text), text) for text in given))
    answers, at = [], 0
    while at < len(said):
        end = said.index(b"\n", at) + 1
        at = end + int(said[at:end])
        answers.append(said[end:at])
    assert len(answers) == len(given)
    return answers


def lines(probe: Path, *arguments: object, texts: Iterable[bytes] = (), paths: Iterable[Path] = ()) -> list[Any]:
    """The lines of JSON that ``probe-bundle`` writes. ``texts``: manifests; ``paths``: of bundles."""
    given = b"".join(b"%d\n%b" % (len(text), text) for text in texts) + b"".join(
        b"%b\n" % bytes(path) for path in paths
    )
    return [json.loads(line) for line in _run(probe, [str(a) for a in arguments], given).splitlines()]


def _run(probe: Path, arguments: list[str], given: bytes) -> bytes:
    done = subprocess.run([probe, *arguments], input=given, capture_output=True, timeout=300, check=False)
    assert done.returncode == 0, f"{probe.name} ended with {done.returncode}: {done.stderr.decode()}"
    return done.stdout
