"""A method that reuses nothing: one denoising graph, for tests of exports that are not about reuse."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from unittest import mock

from tgate_engine.plan import Call
from tgate_engine.report import Silent
from tgate_export.build import ExportSettings, export
from tgate_export.methods import METHODS
from tgate_export.methods.base import FULL, Method, Network, Settings, Variant, ungated


class Plain(Method):
    """Everything is computed in every step; its one baseline is the same."""

    name = "plain"

    def program(self, settings: Settings, lead_in: int = 0) -> tuple[Call, ...]:
        return ungated(settings.steps, lead_in)

    def variants(self, network: Network, settings: Settings) -> tuple[Variant, ...]:
        return (Variant(name=FULL, halves="both" if network.guided else "positive"),)

    def short(self, settings: Settings) -> Settings:
        return Settings(steps=2, gate=2)

    def baselines(self, settings: Settings, lead_in: int = 0, *, guided: bool) -> dict[str, tuple[Call, ...]]:
        return {"ungated": ungated(settings.steps, lead_in)}


@contextmanager
def plain() -> Iterator[None]:
    """While open, ``--method plain`` is one."""
    with mock.patch.dict(METHODS, {"plain": Plain()}):
        yield


def export_plain(settings: ExportSettings) -> Path:
    """The bundle of those settings, but for the method."""
    with plain():
        return export(replace(settings, method="plain", fidelity_interval=None), Silent())
