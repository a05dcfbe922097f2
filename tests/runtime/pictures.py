"""What one image of a request is, and what it becomes alone: the measure of all that runs together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.toy_bundle import Toy, make_plan, sampler
from tgate_engine.plan import Plan
from tgate_export.methods.base import Settings
from tgate_runtime.conditioning import conditioning_inputs
from tgate_runtime.runner import run
from tgate_runtime.session import Session
from tgate_runtime.state import State

EVERY_GRAPH = {
    "default": Settings(steps=8, gate=5, self_interval=2),
    "deep": Settings(steps=9, gate=4, self_interval=3, warm_up=0, fidelity_interval=2),
}
GUIDANCE = 3.0


def planned(session: Session, *, name: str = "p", lead_in: int = 0, noise: float = 0.0, **settings: Any) -> Plan:
    """A plan of those settings; ``noise``: what its sampler adds of its own in each step."""
    return make_plan(
        name,
        Settings(**settings),
        Toy(guided=session.manifest.guided),
        session.shapes()[0].graphs,
        lead_in=lead_in,
        own_sampler=sampler(settings["steps"], lead_in=lead_in, noise=noise),
    )


@dataclass(frozen=True)
class Picture:
    """One image: its plan, and a seed that all of its noise and conditioning is drawn from."""

    plan: Plan
    seed: int
    guidance_scale: float = GUIDANCE

    def start(self, session: Session) -> NDArray[np.float32]:
        """Standard normal noise [...]."""
        shape = session.shapes()[0].latents
        return np.random.default_rng((0, self.seed)).standard_normal(shape).astype(np.float32)

    def conditioning(self, session: Session) -> dict[str, NDArray[np.float32]]:
        """``<name>.<half>`` to [...]."""
        rng = np.random.default_rng((1, self.seed))
        inputs = conditioning_inputs(session)
        return {name: rng.standard_normal(t.resolve(1)[1:]).astype(np.float32) for name, t in inputs.items()}

    def step_noise(self, session: Session, step: int) -> NDArray[np.float32]:
        shape = session.shapes()[0].latents
        return np.random.default_rng((2, self.seed, step)).standard_normal(shape).astype(np.float32)

    def begin(self, session: Session, state: State, row: int) -> None:
        """Start it in a row."""
        state.begin(
            row,
            self.start(session),
            self.conditioning(session),
            guidance_scale=self.guidance_scale,
            plan=self.plan,
            step_noise=lambda step: self.step_noise(session, step),
        )

    def alone(self, session: Session) -> NDArray[np.float32]:
        """Its final latents [...], in a state and in calls of its own."""
        state = State(session, self.plan)
        steps = run(
            state,
            latents=self.start(session)[np.newaxis],
            conditioning={name: values[np.newaxis] for name, values in self.conditioning(session).items()},
            guidance_scale=self.guidance_scale,
            step_noise=lambda _, step: self.step_noise(session, step),
        )
        assert len(list(steps)) == len(self.plan.steps)
        return state.latents(0)
