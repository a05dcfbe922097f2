"""Requests for ``mini`` with few steps, and what each is alone, drawn by the pipeline: the measure of all company."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tgate_engine.graph import DENOISE
from tgate_engine.plan import Plan
from tgate_engine.plan_build import build_plan
from tgate_export.methods.base import Settings, ungated
from tgate_export.methods.tgate import Tgate
from tgate_runtime.conditioning import conditioning_inputs, from_embeddings
from tgate_runtime.pipeline import Pipeline
from tgate_runtime.session import Session
from tgate_serve.worker import Request

PROGRAMS: dict[str, Settings | int] = {
    "short": Settings(steps=4, gate=2, self_interval=2, warm_up=0),
    "long": Settings(steps=7, gate=4, self_interval=2, warm_up=0),
    "ungated": 5,
    "early": Settings(steps=6, gate=1),
}


@functools.cache
def plans(session: Session) -> dict[str, Plan]:
    """Plans that meet in every graph of TGATE, with as many of the first calls of the bundle's own sampler."""
    graphs, carries = session.shapes()[0].graphs, session.manifest.carries
    own = session.plan("default").sampler
    made = {}
    for name, asked in PROGRAMS.items():
        program = ungated(asked) if isinstance(asked, int) else Tgate().program(asked)
        sampler = replace(own, steps=len(program), calls=own.calls[: len(program)])
        made[name] = build_plan(
            name, program, sampler=sampler, guidance_scale=5.0, graphs=graphs, carries=carries, settings={}
        )
    return made


@dataclass(frozen=True)
class Wish:
    """Images of one plan: a seed for each, and one that the conditioning is drawn from."""

    plan: str
    seeds: tuple[int, ...]
    text: int = 0
    guidance_scale: float = 5.0

    def embeds(self, session: Session) -> dict[str, NDArray[Any]]:
        """What stands for a prompt, ``<name>.<half>`` to [1, ...]."""
        rng = np.random.default_rng(self.text)
        encoded = {c.name for c in session.manifest.conditioning if c.source != "constant"}
        return {
            name: rng.standard_normal(spec.resolve(1)).astype(np.float32)
            for name, spec in sorted(conditioning_inputs(session).items())
            if name.rpartition(".")[0] in encoded
        }

    def request(self, session: Session, **more: Any) -> Request:
        return Request(
            conditioning=from_embeddings(session, self.embeds(session)),
            seeds=self.seeds,
            plan=plans(session)[self.plan],
            guidance_scale=self.guidance_scale,
            **more,
        )

    def alone(self, session: Session) -> NDArray[np.float32]:
        """Its final latents [N, ...], each image drawn by itself."""
        return np.concatenate([_alone(session, replace(self, seeds=(seed,))) for seed in self.seeds])


@functools.cache
def _alone(session: Session, wish: Wish) -> NDArray[np.float32]:
    return Pipeline(session)(
        prompt_embeds=wish.embeds(session),
        seed=wish.seeds[0],
        plan=plans(session)[wish.plan],
        guidance_scale=wish.guidance_scale,
    ).latents


def denoisers(session: Session) -> list[str]:
    return [name for name, graph in session.shapes()[0].graphs.items() if graph.role == DENOISE]
