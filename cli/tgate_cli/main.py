"""The command line: ``tgate`` and ``tgate-export``.

Export and run time are imported inside the commands that need them, so that a production host needs no torch and a
build host no engine. Results go to stdout, everything else to stderr.

Exit status: 0 done; 1 the work failed; 2 the command line is wrong; 70 a fault of the program itself;
130 interrupted; 143 terminated. A failure is one line on stderr that begins ``tgate: error:`` or
``tgate-export: error:``.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence

from tgate_cli import export_commands, run_commands
from tgate_cli.arguments import CHECKS, FAILED, Parser, export_parser, tgate_parser
from tgate_cli.command import LONGEST, Show
from tgate_cli.display import reporter
from tgate_cli.generate import generate
from tgate_cli.serve import serve
from tgate_cli.signals import Signals
from tgate_cli.tune import tune
from tgate_engine.errors import TgateError, shown
from tgate_engine.report import Reporter

FAULT = 70

COMMANDS: dict[str, Callable[[argparse.Namespace, Reporter], Show]] = {
    "generate": generate,
    "inspect": run_commands.inspect,
    "verify": run_commands.verify,
    "bench": run_commands.bench,
    "engines": run_commands.engines,
    "build": run_commands.build,
    "serve": serve,
    "plan": export_commands.plan,
    "adapt": export_commands.adapt,
    "tune": tune,
    "embed": export_commands.embed,
    "export": export_commands.export,
}

STAY = ("serve",)
"""Commands whose results are shown until a signal comes, which they answer themselves."""


def main(arguments: Sequence[str] | None = None) -> int:
    """``tgate``. Returns the exit status."""
    return _run(tgate_parser(), arguments)


def export_main(arguments: Sequence[str] | None = None) -> int:
    """``tgate-export``. Returns the exit status."""
    return _run(export_parser(export_commands.list_models), arguments)


def _parse(parser: Parser, arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse; a PROMPT may also come after options, where argparse no longer looks for one that may be left out."""
    if parser.prog == "tgate" and not (sys.argv[1:] if arguments is None else arguments):
        parser.nothing()
    args, left = parser.parse_known_args(arguments)
    if left and not left[0].startswith("-") and getattr(args, "prompt", "") is None:
        args.prompt = left.pop(0)
    if left:
        args.parser.unknown(left)
    if args.command in CHECKS:
        CHECKS[args.command](args)
    return args


def _run(parser: Parser, arguments: Sequence[str] | None) -> int:
    """Parse, run the command, and turn whatever ends it into one line and an exit status."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by whoever started this
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 - as long as the process
    args = argparse.Namespace(traceback=False)
    signals = Signals(parser.prog)
    try:
        with _on_stdout():  # --help and --version print, and end here
            args = _parse(parser, arguments)
        with signals:
            with reporter(parser.prog, quiet=args.quiet) as report, _warnings_to(report):
                show = COMMANDS[args.command](args, report)
            if args.command in STAY:
                signals.leave()
            with _on_stdout():
                show()
    except BrokenPipeError:  # the reader of stdout went away, which is its right
        return FAILED
    except SystemExit:  # the parser's
        raise
    except BaseException as error:
        text, status = _ending(error, signals, args)
        if args.traceback:
            for line in traceback.format_exc().splitlines():
                print(shown(line, LONGEST), file=sys.stderr)
        print(f"{parser.prog}: error: {shown(text, LONGEST)}", file=sys.stderr)
        if signals.number is not None and arguments is None:  # the process is ours, and everything is cleaned up
            with contextlib.suppress(OSError):
                sys.stdout.flush()
            os._exit(status)  # taking PyTorch apart would take another five seconds
        return status
    return 0


@contextlib.contextmanager
def _on_stdout() -> Iterator[None]:
    """Around what prints results: all of it is written when this closes, or an error says that it was not.

    Raises :class:`TgateError` where standard output takes no more, and BrokenPipeError where its reader went away.
    """
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
    except OSError as error:
        with contextlib.suppress(OSError):  # nor is the rest, which Python would try to write once more
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):
            raise
        why = error.strerror or error
        raise TgateError(f"standard output cannot be written ({why}); send it to where there is room") from error


def _ending(error: BaseException, signals: Signals, args: argparse.Namespace) -> tuple[str, int]:
    """The line that says why a command ended, and the exit status. Raises what is nobody's matter here."""
    if signals.ended(error):  # whatever was raised on the way: a call that is cancelled fails
        return signals.says, signals.status
    if isinstance(error, TgateError | OSError):
        return " ".join(_line(error).split()), FAILED
    if not isinstance(error, Exception):
        raise error
    hint = "" if args.traceback else "; run with --traceback to see where"
    return f"unexpected {type(error).__name__}: {' '.join(str(error).split())}{hint}", FAULT


def _line(error: TgateError | OSError) -> str:
    if isinstance(error, TgateError):
        return str(error)
    what = error.strerror or str(error)
    return f"{os.fsdecode(error.filename)}: {what}" if error.filename else what


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
