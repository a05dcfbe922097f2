"""A long run over all targets: ``python -m tests.fuzz --seconds 600``; ``make fuzz TIME=600``.

Each target gets its share of the time, in a process that is watched from here. What it finds is kept in the corpus,
where the tests read it from then on; what reached something new lies in ``.cache/fuzz``, and the next run goes on from
there. Ends with exit status 1 where a fault was found.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from hypothesis import HealthCheck, Phase, given, settings

from tests.fuzz.board import Board
from tests.fuzz.child import NO_ANSWER, Child, how_it_ended
from tests.fuzz.inputs import inputs
from tests.fuzz.judging import ENDLESS, FAULT, PATIENCE, ROOT, SECONDS
from tests.fuzz.target import CORPUS, Target
from tests.fuzz.targets import every_target

FOUND = ROOT / ".cache" / "fuzz"
_START_S = 120
_MOST_FOUND = 300
"""Files to go on from, the smallest ones: each of them is read first."""
_MOST_KEPT = 5
"""Of the inputs that end a process, of which nothing tells whether two are one fault."""


@dataclass
class Run:
    """What came of a target: inputs by outcome, and the places of faults with the files that show them."""

    target: Target
    seconds: float = 0
    counts: Counter[str] = field(default_factory=Counter)
    faults: dict[str, list[str]] = field(default_factory=dict)

    def keep(self, data: bytes, place: str, says: str) -> None:
        """Keep an input that is a fault, and tell of it."""
        names = self.faults.setdefault(place, [])
        if len(names) >= (1 if " in " in place else _MOST_KEPT):
            return
        name = hashlib.sha256(data).hexdigest()[:12]
        folder = CORPUS / self.target.name
        folder.mkdir(exist_ok=True, parents=True)
        (folder / name).write_bytes(data)
        names.append(name)
        print(f"{self.target.name}: {place}: {says}\n    {folder / name}", flush=True)


def main() -> int:
    """The exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description="Fuzz every place where bytes come in.")
    parser.add_argument("--seconds", type=float, default=600, help="for all targets together (600)")
    parser.add_argument("--engine", choices=("atheris", "hypothesis"), help="what makes inputs; atheris where it is")
    parser.add_argument("targets", nargs="*", help="names of targets; all where none is given")
    asked = parser.parse_args()
    chosen = [target for target in every_target() if not asked.targets or target.name in asked.targets]
    engine = asked.engine or ("atheris" if importlib.util.find_spec("atheris") else "hypothesis")
    if engine == "hypothesis" and not asked.engine:
        print("atheris is not installed (pip install '.[fuzz]'), so hypothesis makes the inputs, blindly", flush=True)
    runs = []
    for target in chosen:
        run = Run(target)
        (with_atheris if engine == "atheris" else with_hypothesis)(run, asked.seconds / len(chosen))
        runs.append(run)
        print(*table([run]), sep="\n", flush=True)
    print("", *table(runs), sep="\n")
    return 1 if any(run.faults for run in runs) else 0


def table(runs: list[Run]) -> Iterator[str]:
    """Lines to print."""
    yield f"{'target':12}{'executions':>12}{'per s':>8}" + "".join(f"{kind:>11}" for kind in (*Board.KINDS, "places"))
    for run in runs:
        total = sum(run.counts.values())
        kinds = "".join(f"{run.counts[kind]:11}" for kind in Board.KINDS)
        yield f"{run.target.name:12}{total:12}{total / max(run.seconds, 1e-9):8.0f}{kinds}{len(run.faults):11}"


def with_hypothesis(run: Run, seconds: float) -> None:
    """Inputs that nothing leads, in a process that is started again when one ends it."""
    end = time.monotonic() + seconds
    with Child() as child:

        @settings(
            max_examples=500,
            database=None,
            deadline=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(inputs(run.target))
        def batch(data: bytes) -> None:
            if time.monotonic() < end:
                found = child.judge(run.target, data)
                run.counts[found.kind] += 1
                if found.kind == FAULT:
                    run.keep(data, found.place, found.says)

        while time.monotonic() < end:
            batch()
    run.seconds = seconds


def with_atheris(run: Run, seconds: float) -> None:
    """Inputs that are led by what they reach. A process that ends in one, or does not come back from it, is started
    again."""
    found = FOUND / run.target.name
    found.mkdir(exist_ok=True, parents=True)
    for path in sorted(found.iterdir(), key=lambda each: each.stat().st_size)[_MOST_FOUND:]:
        path.unlink()
    while run.seconds < seconds - 1:
        folder = Path(tempfile.mkdtemp(prefix="tgate-fuzz-"))
        try:
            for name in ("seeds", "faults"):
                (folder / name).mkdir()
            (folder / "found").symlink_to(found)
            for number, data in enumerate(run.target.seeds()):
                (folder / "seeds" / str(number)).write_bytes(data)
            _watch(run, folder, seconds - run.seconds)
            for path in sorted((folder / "faults").glob("*.txt")):
                place, _, says = path.read_text().partition("\t")
                run.keep(path.with_suffix("").read_bytes(), place, says)
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def _watch(run: Run, folder: Path, seconds: float) -> None:
    """One process, for so many seconds from its first input on, or until an input ends it."""
    board = Board(folder / "board")
    with (folder / "log").open("wb") as log:
        command = [sys.executable, "-m", "tests.fuzz.cover", run.target.name, str(folder)]
        process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)
        try:
            ended, took = _ended(process, board, seconds)
            run.seconds += took
        finally:
            process.kill()
            process.wait()
    run.counts.update(board.counts)
    if not board.begun:
        sys.exit((folder / "log").read_text(errors="replace")[-2000:])
    if ended == NO_ANSWER and run.target.endless:
        run.counts[ENDLESS] += 1
    elif ended:
        run.counts[FAULT] += 1
        run.keep(board.current, ended, (folder / "log").read_text(errors="replace")[-300:])


def _ended(process: subprocess.Popen[bytes], board: Board, seconds: float) -> tuple[str, float]:
    """How a process ended, or that it does not go on; empty where its time is over. And how many seconds it read."""
    begun, since, first = 0, time.monotonic(), 0.0
    now = since
    while process.poll() is None:
        time.sleep(0.2)
        now = time.monotonic()
        if board.begun != begun:
            begun, since, first = board.begun, now, first or now
        if first and now - first > seconds:
            return "", now - first
        if now - since > (2 * PATIENCE * SECONDS if first else _START_S):
            return NO_ANSWER, now - (first or now)
    return how_it_ended(process.returncode), now - (first or now)


if __name__ == "__main__":
    sys.exit(main())
