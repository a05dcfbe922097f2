"""Which plans a bundle's graphs can run, to choose one of them by what it costs. Nothing here needs torch."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from tgate_engine.bundle import DEFAULT, Bundle
from tgate_engine.errors import MethodError, PlanError
from tgate_engine.plan import Call, Plan
from tgate_engine.plan_build import build_plan
from tgate_engine.sampler import Fact, Sampler
from tgate_export.methods.base import Method, Program, Settings, guidance_stopped, settings_of, ungated
from tgate_export.methods.forecast import Forecast
from tgate_export.methods.forecast.fold import FORECAST_OF, forecast
from tgate_export.methods.late import Late, shared_out
from tgate_export.plans import make_plans, method_of, sampler_of

INTERVALS = (1, 2, 3, 5, 8)
"""Of k, f and c: a longer one reuses more, and hardly more than the one before it."""
FORECASTS = (1, 2, 3)
"""Of r, where the sampler draws no noise in its steps."""
ALONE = (2, 3, 4, 5)
"""Of r, where forecasts are all that there is: guidance and attention stay, and a longer interval costs less."""
REFRESHES = (0, 8, 5, 3)
"""Of g, from none to many."""
STARTS = 12
"""Gate steps that are looked at first, at most; those between them come in where it pays."""
STOPPED = "guidance_stopped"
_FORECAST = Forecast()

Place = tuple[int, ...]
"""Where a plan stands: its method's number, m, then those of f, k, w, c, g and r among what is tried."""


@dataclass(frozen=True, kw_only=True)
class Candidates:
    """Plans of one sampler and number of steps, all of which a bundle's graphs can run, and no two the same program.

    ``ungated``: what they are compared with. ``plans``: by a label such as ``"m=10 k=3"``. ``start``: labels of a
    coarse choice that spans all of them, but for forecasts, which come in beside what is good without.
    """

    method: Method
    sampler: Sampler
    ungated: Plan
    plans: Mapping[str, Plan]
    start: Collection[str]
    _places: Mapping[str, Place]

    def near(self, label: str) -> list[str]:
        """Plans whose settings are at most one place from those of ``label``, each of them."""
        own = self._places[label]
        return [
            other
            for other, place in self._places.items()
            if other != label and all(abs(a - b) <= 1 for a, b in zip(own, place, strict=True))
        ]

    def kind(self, label: str) -> int:
        """What a plan saves by: its number is that of the method, of stopping guidance, or of forecasts alone."""
        return self._places[label][0]

    def named(self, bundle: Bundle, label: str, name: str) -> dict[str, Plan]:
        """The plan of that label under a name, and those of its baselines that the bundle has not, as
        :func:`~tgate_export.plans.make_plans` makes them."""
        plan, manifest = self.plans[label], bundle.manifest
        made = make_plans(
            name,
            _FORECAST if plan.settings["method"] == _FORECAST.name else self.method,
            settings_of(plan.settings),
            sampler=self.sampler,
            guidance_scale=plan.guidance_scale,
            guided=manifest.guided,
            graphs=manifest.shapes[0].graphs,
            carries=manifest.carries,
            existing={n: p for n, p in manifest.plans.items() if n != name and not n.startswith(f"{name}.")},
            late=_late(manifest.plan(DEFAULT)),
        )
        own = made.pop(name)
        if plan.settings["method"] != STOPPED:
            return {name: own, **made}
        plain = own.baselines[0]  # it is the other baseline itself
        return {name: replace(plan, name=name, baselines=(plain,)), **{n: p for n, p in made.items() if n == plain}}


def candidates(bundle: Bundle, *, steps: int | None = None, others: bool = True) -> Candidates:
    """The plans of the bundle's own method for every m, several k, w, f, c, g and r, and if ``others`` those that any
    bundle can run: guidance stopped at m and nothing reused, and forecasts from m on and nothing else; of the default
    plan's sampler, and of as many steps where ``steps`` is None.

    Raises as :func:`~tgate_export.plans.sampler_of` does, and :class:`PlanError` where nothing can be reused.
    """
    manifest = bundle.manifest
    default = manifest.plan(DEFAULT)
    method = method_of(default)
    n = int(default.sampler.options.get(FORECAST_OF) or default.sampler.steps) if steps is None else steps
    sampler = sampler_of(bundle, default.sampler.name, n)
    graphs, late = manifest.shapes[0].graphs, _late(default)
    of_two = {} if late is None else late.at(manifest.guidance_scale).facts()

    def made(program: Program) -> Program:
        return program if late is None else shared_out(program, late.calls(sampler))

    @functools.cache
    def folded(left_out: tuple[int, ...]) -> Sampler | None:
        try:
            return forecast(sampler, left_out)
        except MethodError:  # it looks too far back for that
            return None

    def build(label: str, program: Sequence[Call], facts: Mapping[str, Fact], sampler: Sampler) -> Plan:
        return build_plan(
            label,
            program,
            sampler=sampler,
            guidance_scale=manifest.guidance_scale,
            graphs=graphs,
            carries=manifest.carries,
            settings={**facts, **of_two},
        )

    plans: dict[str, Plan] = {}
    places: dict[str, Place] = {}
    plain = made(ungated(n, sampler.lead_in))
    seen: set[tuple[tuple[str, ...], tuple[int, ...]]] = {(_graphs(plain), ())}  # phases are words
    programs = _programs(method, default, n, sampler, made, others=others, guided=manifest.guided)
    for place, settings, whole in programs:
        left_out = settings.left_out(sampler.lead_in)
        program, own_sampler = tuple(call for i, call in enumerate(made(whole)) if i not in left_out), folded(left_out)
        named = _graphs(program)
        if own_sampler is None or not set(named) <= graphs.keys() or (named, left_out) in seen:
            continue
        seen.add((named, left_out))
        own: dict[str, Fact] = {"method": STOPPED, "n": n, "m": settings.gate}
        facts = (method.facts(settings), own, _FORECAST.facts(settings))[place[0]]
        label = _label(settings, gated=method.gated or place[0] > 0) + ("", " guidance stopped", " alone")[place[0]]
        plans[label], places[label] = build(label, program, facts, own_sampler), place
    if not plans:
        raise PlanError(f"no plan of {n} steps reuses anything over the graphs of {bundle.path}; take more --steps")
    gates = sorted({place[1] for place in places.values()})
    coarse = set(gates[:: -(-len(gates) // STARTS)]) | {gates[-1]}
    reference = build("ungated", plain, {"method": "ungated", "n": n}, sampler)
    return Candidates(
        method=method,
        sampler=sampler,
        ungated=reference,
        plans=plans,
        start=[label for label, place in places.items() if place[1] in coarse and place[-1] == 0],
        _places=places,
    )


def _graphs(program: Sequence[Call]) -> tuple[str, ...]:
    return tuple(call.graph for call in program)


def _late(default: Plan) -> Late | None:
    return Late.of(default.settings, default.guidance_scale)


def _programs(
    method: Method,
    default: Plan,
    n: int,
    sampler: Sampler,
    made: Callable[[Program], Program],
    *,
    others: bool,
    guided: bool,
) -> Iterator[tuple[Place, Settings, Program]]:
    """Every program to look at, by its place; plainer settings come before others of the same program. ``made``: what
    becomes of one before it runs."""
    alone = sampler.stochastic or method.name == _FORECAST.name or _late(default) is not None  # no forecasts beside it
    warm_up, ratio = int(default.settings.get("w") or 0), settings_of(default.settings).merge_ratio
    own = {name: int(default.settings.get(name) or 1) for name in ("k", "f", "c")}
    k, f, c = (sorted({*INTERVALS, own[name]}) if name in method.takes else [1] for name in ("k", "f", "c"))
    w = sorted({0, warm_up}) if "w" in method.takes else [0]
    r = FORECASTS[:1] if sampler.stochastic or "c" in method.takes or _late(default) is not None else FORECASTS
    g = REFRESHES if "g" in method.takes else REFRESHES[:1]
    for m in range(1, n + 1) if method.gated else (n,):
        for place in itertools.product(*(range(len(each)) for each in (f, k, w, c, g, r))):
            each = (of[i] for of, i in zip((f, k, w, c, g, r), place, strict=True))
            each_f, each_k, each_w, each_c, each_g, each_r = each
            settings = Settings(
                steps=n,
                gate=m,
                self_interval=each_k,
                warm_up=each_w,
                fidelity_interval=each_f,
                forecast_interval=each_r,
                cache_interval=each_c,
                refresh_interval=each_g,
                merge_ratio=ratio,
            )
            if each_g and not any(map(settings.refreshes, range(n))):
                continue
            if each_r > 1 and (each_f > 1 or each_g or not settings.left_out()):
                continue  # see Method.settings
            program = method.program(settings, sampler.lead_in)
            if "c" in method.takes and program == method.program(replace(settings, cache_interval=1), sampler.lead_in):
                continue  # it refuses a cache that nothing reads, too
            # Warm-up means something beside k alone; the default plan's is what a plan with k = 1 says it has.
            if (each_k > 1 or each_w == w[-1]) and not method.idle(settings, sampler.lead_in, made):
                yield (0, m, *place), settings, program
    for m in range(1, n + 1) if others else ():
        settings = Settings(steps=n, gate=m, warm_up=0)
        if guided:
            yield (1, m, 0, 0, 0, 0, 0, 0), settings, guidance_stopped(settings, sampler.lead_in)
        for i, each_r in enumerate(() if alone else ALONE):
            settings = Settings(steps=n, gate=m, warm_up=0, forecast_interval=each_r)
            if settings.left_out():
                yield (2, m, 0, 0, 0, 0, 0, i), settings, _FORECAST.program(settings, sampler.lead_in)


def _label(settings: Settings, *, gated: bool) -> str:
    words = [f"m={settings.gate}"] if gated else []
    if settings.self_interval > 1:
        words += [f"k={settings.self_interval}", f"w={settings.warm_up}"]
    if settings.fidelity_interval > 1:
        words.append(f"f={settings.fidelity_interval}")
    if settings.forecast_interval > 1:
        words.append(f"r={settings.forecast_interval}")
    if settings.refresh_interval:
        words.append(f"g={settings.refresh_interval}")
    if settings.cache_interval > 1:
        words.append(f"c={settings.cache_interval}")
    if settings.merge_ratio:
        words.append(f"merged={settings.merge_ratio:g}")
    return " ".join(words)
