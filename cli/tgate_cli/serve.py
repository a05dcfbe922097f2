"""``tgate serve``: bundles behind HTTP."""

from __future__ import annotations

import argparse
import ipaddress
import logging
import sys
from collections.abc import Mapping
from contextlib import ExitStack

from tgate_cli.command import Show, asked_engine, needs
from tgate_engine.bundle import Bundle
from tgate_engine.errors import RequestError, shown
from tgate_engine.report import Reporter

_ADVICE = "pip install 'tgate-engine[serve,{}]'"


def serve(args: argparse.Namespace, report: Reporter) -> Show:
    """``tgate serve``. What can fail fails before the first request; requests are answered while results are shown, so
    that signals are the server's."""
    with needs("serving", _ADVICE.format(args.engine.removeprefix("ort-"))):
        from tgate_serve import server
        from tgate_serve.api.guards import LOOPBACK, Keys
        from tgate_serve.api.limits import Limits
        from tgate_serve.api.service import Service

    local = is_loopback(args.host)
    if not local and args.api_key_file is None and not args.without_api_key:
        raise RequestError(
            f"{shown(args.host)} can be reached from other machines: give --api-key-file, or --without-api-key if "
            "whoever reaches it may draw"
        )
    keys = None if args.api_key_file is None else Keys.load(args.api_key_file)
    bundles = bundles_asked(args.bundle)
    with ExitStack() as stack:
        listener = stack.enter_context(server.listening(args.host, args.port))
        report.stage(f"loading {args.engine}")
        engine = asked_engine(args)
        checked = {}
        for name, bundle in bundles.items():
            report.stage(f"opening {name}")
            checked[name] = bundle.checked()
        serving = server.Serving(
            plans=args.plan,
            sizes=args.size,
            rows=args.rows,
            queue=args.queue,
            patience=args.patience,
            memory_bytes=args.memory_limit,
            adapted=args.adapted,
        )
        models, metrics = stack.enter_context(server.opened(checked, engine, serving, report.progress))
        limits = Limits(images=args.most_images)
        service = Service(models, metrics, limits)
        rest = stack.pop_all()

    def show() -> None:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        logging.getLogger().addHandler(handler)  # what libraries warn of has a time too
        logging.getLogger("tgate").setLevel(logging.WARNING if args.quiet else logging.INFO)
        with rest:
            host, port = listener.getsockname()[:2]
            where = f"[{host}]" if ":" in host else host
            print(f"serving {', '.join(models)} at http://{where}:{port}", flush=True)
            hosts = None if not local else {*LOOPBACK, args.host}
            server.serve(service, listener, keys=keys, hosts=hosts, drain_s=args.drain_seconds)
            print("stopped", file=sys.stderr)

    return show


def bundles_asked(asked: list[str]) -> Mapping[str, Bundle]:
    """The bundles of the command line by the names that they are served under. Their digests are not checked yet."""
    from tgate_runtime.mini import place_of
    from tgate_serve.bundles import places_asked

    return {
        name: Bundle.open(place_of(directory), check_digests=False) for name, directory in places_asked(asked).items()
    }


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches that address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
