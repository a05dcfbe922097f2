"""What the commands share: what one is, and what it says where a library is missing."""

from __future__ import annotations

import argparse
import contextlib
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tgate_engine.bundle import Bundle
from tgate_engine.errors import EngineError, shown

if TYPE_CHECKING:
    from tgate_runtime.engines.protocol import Builder, Engine, Options

Show = Callable[[], None]
"""Prints a command's results on stdout, once the reporter has let go of the terminal."""

LONGEST = 4000
"""Characters of a line: what a library says may be a page."""

OWN_PACKAGES = ("tgate_engine", "tgate_export", "tgate_runtime", "tgate_cli")
ADVICE = "it is not installed: pip install 'tgate-engine[{}]'"
EXPORT_ADVICE, RUN_ADVICE = ADVICE.format("export"), ADVICE.format("cpu")


@contextlib.contextmanager
def needs(work: str, advice: str) -> Iterator[None]:
    """Turns a library that is not installed into one line that says how to install it."""
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] in OWN_PACKAGES:
            raise
        raise EngineError(f"{work} needs {error.name}; {advice}") from None


def bundle_place(args: argparse.Namespace) -> Path:
    """The directory that BUNDLE names; ``mini`` is made ready where it names that."""
    from tgate_runtime.mini import place_of

    return place_of(args.bundle)


def bundle_asked(args: argparse.Namespace) -> Bundle:
    """The bundle that BUNDLE names, with its manifest and plans checked, and not its digests: :meth:`Bundle.checked`
    does that, which reads all of it, once there is nothing else to refuse.

    Needs what the contract needs. Raises :class:`BundleError` and :class:`PlanError`.
    """
    return Bundle.open(bundle_place(args), check_digests=False)


def asked_engine(args: argparse.Namespace) -> Engine:
    """The engine that the command line asks for. Asked for when all else is known to be right, since loading it takes
    a second or more, and before the bundle's digests, which may take longer."""
    from tgate_runtime.engines import open_engine

    return open_engine(args.engine, **_engine_options(args))


def asked_builder(args: argparse.Namespace) -> Builder:
    """What builds for the engine that the command line asks for, which need not run here."""
    from tgate_runtime.engines import open_builder

    return open_builder(args.engine, **_engine_options(args))


def _engine_options(args: argparse.Namespace) -> Options:
    return {
        "threads": args.threads,
        "device": args.device,
        "architecture": args.architecture,
        "precision": args.precision,
        "memory": args.memory,
    }


def engine_advice(args: argparse.Namespace) -> str:
    """What brings all that running on the engine of the command line takes: the extra that has its name, but for ORT's.

    No table is asked, since importing the run time may be what fails.
    """
    return ADVICE.format(args.engine.removeprefix("ort-"))


def print_lines(lines: Iterable[object]) -> None:
    """Prints results for people, a line each: what a terminal would obey is shown."""
    for line in lines:
        print(shown(line, LONGEST))


def print_json(data: Any) -> None:
    """Prints what ``--json`` asks for. Letters stay letters; what a terminal would obey is escaped as JSON has it."""
    text = json.dumps(data, indent=1, ensure_ascii=False)
    print("".join(c if c.isprintable() or c in " \n" else json.dumps(c)[1:-1] for c in text))
