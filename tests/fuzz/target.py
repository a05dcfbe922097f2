"""What a target is, and the sound toy bundle that most of them begin with."""

from __future__ import annotations

import atexit
import functools
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.fuzz.mutations import Mutator
from tests.toy_bundle import build
from tgate_engine.bundle import Bundle
from tgate_runtime.pipeline import Pipeline
from tgate_runtime.session import Session

CORPUS = Path(__file__).parent / "corpus"


@dataclass(frozen=True, kw_only=True)
class Target:
    """``examples``: how many inputs each run of the tests tries; of a slow target few. ``native``: whether the tests
    read inputs in a process of their own, as where libraries in C or Rust do more than to read numbers.

    ``endless``: inputs may ask for much time and memory within the bounds that docs/security-bundle.md states, which
    is no fault then.
    """

    name: str
    run: Callable[[bytes], object]
    sound: Callable[[], Sequence[bytes]]
    mutate: Mutator
    examples: int = 100
    native: bool = True
    endless: bool = False

    def seeds(self) -> list[bytes]:
        """Sound files, and everything in the corpus."""
        return [*self.sound(), *self.corpus().values()]

    def corpus(self) -> dict[str, bytes]:
        """Files that are kept, by their names: what was a fault once, and what mutations do not find."""
        return {path.name: path.read_bytes() for path in sorted((CORPUS / self.name).glob("*"))}


@functools.cache
def workspace() -> Path:
    """A directory of this process, which removes it in the end; where it is killed, whoever started it does."""
    folder = tempfile.mkdtemp(prefix="tgate-fuzz-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


@functools.cache
def toy() -> Bundle:
    return Bundle.open(build(workspace() / "toy"))


@functools.cache
def session() -> Session:
    return Session.open(toy(), threads=1)


@functools.cache
def drawing() -> Pipeline:
    return Pipeline(session())


def written(name: str, data: bytes) -> Path:
    """A file of the workspace that holds ``data``."""
    path = workspace() / name
    path.write_bytes(data)
    return path


def file_of(name: str) -> Callable[[], Sequence[bytes]]:
    return lambda: [(toy().path / name).read_bytes()]
