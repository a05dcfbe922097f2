"""One target in one process, led by what its inputs reach: ``python -m tests.fuzz.cover TARGET FOLDER``.

Needs atheris, and code that atheris has instrumented as it was imported, so this imports nothing of ours before.
``FOLDER`` holds ``seeds`` and ``found``, the files to begin with and those that reached something new, and gets
``board`` and ``faults``.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from random import Random

import atheris

with atheris.instrument_imports(include=["tgate_engine", "tgate_export", "tgate_runtime", "tgate_cli"]):
    from tests.fuzz.board import MOST_BYTES, Board
    from tests.fuzz.judging import FAULT, bounded_memory, judge
    from tests.fuzz.targets import find_target

_OWN_SHARE = 0.8
"""How many inputs are made by the target's own mutations; libFuzzer makes the others."""
_ANEW = 0.5
"""How many of those begin with what is sound: what reached something new was mostly refused, and would be again."""


def main(name: str, folder: Path) -> None:
    """Never returns: whoever started the process ends it."""
    target = find_target(name)
    board, places = Board(folder / "board"), set[str]()
    tempfile.tempdir = str(folder)
    sound = target.sound()
    for data in sound:  # libraries import much when they are first asked
        target.run(data)

    def once(data: bytes) -> None:
        board.begin(data)
        outcome = judge(target.run, data, endless=target.endless)
        board.end(outcome.kind)
        if outcome.kind == FAULT and outcome.place not in places:
            places.add(outcome.place)
            number = len(list((folder / "faults").iterdir()))
            (folder / "faults" / f"{number}").write_bytes(data)
            (folder / "faults" / f"{number}.txt").write_text(f"{outcome.place}\t{outcome.says}")

    def mutated(data: bytes, most: int, seed: int) -> bytes:
        rng = Random(seed)
        if rng.random() < _OWN_SHARE:
            data = target.mutate(rng.choice(sound) if rng.random() < _ANEW else data, rng)
            return data[:most] if len(data) <= MOST_BYTES else data[:0]
        return bytes(atheris.Mutate(data, most))

    options = [
        "-timeout=0",
        "-handle_alrm=0",
        "-rss_limit_mb=0",
        "-malloc_limit_mb=0",
        "-len_control=0",
        "-verbosity=0",
    ]
    options += [f"-max_len={MOST_BYTES}", f"-artifact_prefix={folder}/"]
    places_of_inputs = [str(folder / "found"), str(folder / "seeds")]
    atheris.Setup([sys.argv[0], *options, *places_of_inputs], once, custom_mutator=mutated)
    with bounded_memory():
        atheris.Fuzz()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
