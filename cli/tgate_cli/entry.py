"""Where the programs begin: before anything is imported that takes a while, Ctrl-C is given back to the system.

Python answers SIGINT with an exception, and so with a traceback from the middle of an import, until something else
answers it. By default the system ends the process, as it does for SIGTERM, and a shell counts that as 130 too.
:class:`tgate_cli.signals.Signals` takes over once a command runs.
"""

from __future__ import annotations

import signal


def tgate() -> int:
    """``tgate``. Returns the exit status."""
    _by_default()
    from tgate_cli.main import main

    return main()


def tgate_export() -> int:
    """``tgate-export``. Returns the exit status."""
    _by_default()
    from tgate_cli.main import export_main

    return export_main()


def _by_default() -> None:
    """Whoever ignores SIGINT, as a shell does for what runs in its background, goes on ignoring it."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
