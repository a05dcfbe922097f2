"""Which of the served plans a request means, by its name or by what it was made from. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

from tgate_engine.bundle import DEFAULT
from tgate_engine.errors import RequestError, shown
from tgate_engine.plan import Plan


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What a request says of its plan; None is not said. ``steps``: see :func:`steps_of`. ``m``, ``k``: the gate step
    and the self-attention interval, as the plan's settings have them."""

    plan: str | None = None
    steps: int | None = None
    m: int | None = None
    k: int | None = None

    def of(self, plans: Sequence[Plan]) -> Plan:
        """The plan that is meant: the named one, or the default, or else the only one that is as was said and is no
        other's baseline.

        Raises :class:`RequestError` that lists what there is, for none, for several, and for a name that says
        otherwise.
        """
        if self.plan is not None:
            named = [plan for plan in plans if plan.name == self.plan]
            if not named:
                raise RequestError(f"plan '{shown(self.plan)}' is not served; there is {_listed(plans)}")
            if not self._fits(named[0]):
                raise RequestError(f"plan '{self.plan}' is of {_facts(named[0])}, not of {self}; leave one out")
            return named[0]
        fitting = [plan for plan in plans if self._fits(plan)]
        baselines = {name for plan in plans for name in plan.baselines}
        chosen = [plan for plan in fitting if plan.name == DEFAULT] or [
            plan for plan in fitting if plan.name not in baselines
        ]
        if len(chosen or fitting) == 1:
            return (chosen or fitting)[0]
        if not fitting:
            raise RequestError(f"no plan of {self} is served; there is {_listed(plans)}")
        raise RequestError(f"several plans are of {self}: say which by plan; there is {_listed(chosen or fitting)}")

    def _fits(self, plan: Plan) -> bool:
        facts: Mapping[str, object] = {**plan.settings, "steps": steps_of(plan)}
        asked = {name: value for name in ("steps", "m", "k") if (value := getattr(self, name)) is not None}
        return all(facts.get(name) == value for name, value in asked.items())

    def __str__(self) -> str:
        said = [f"{field.name}={getattr(self, field.name)}" for field in fields(self) if field.name != "plan"]
        return ", ".join(text for text in said if not text.endswith("=None")) or "that kind"


def steps_of(plan: Plan) -> int:
    """The denoising steps that a plan was made for, forecast ones among them, which no network call is made for."""
    made = plan.settings.get("n")
    return made if isinstance(made, int) and not isinstance(made, bool) else plan.sampler.steps


def _listed(plans: Sequence[Plan]) -> str:
    return "; ".join(_told(plan) for plan in plans)


def _told(plan: Plan) -> str:
    return f"{plan.name} ({_facts(plan)})"


def _facts(plan: Plan) -> str:
    facts = {"steps": steps_of(plan), **{name: plan.settings[name] for name in ("m", "k") if name in plan.settings}}
    return ", ".join(f"{name}={fact}" for name, fact in facts.items())
