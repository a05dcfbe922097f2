"""Plans over a bundle's graphs: at export, and later where only n, m, k, w, f or the sampler change.

Nothing here needs torch, unless a sampler has to be compiled that the bundle has no table of.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from tgate_engine.bundle import DEFAULT, Bundle
from tgate_engine.errors import ExportError, PlanError
from tgate_engine.graph import GraphSpec
from tgate_engine.manifest import Manifest
from tgate_engine.plan import MOST_GUIDANCE, Plan
from tgate_engine.plan_build import build_plan
from tgate_engine.sampler import Fact, Sampler
from tgate_engine.sampler_tables import load_tables
from tgate_export.methods import METHODS, find_method
from tgate_export.methods.base import Method, Program, Settings, settings_of
from tgate_export.methods.forecast.fold import FORECAST_OF, forecast
from tgate_export.methods.late import Late, has_late, shared_out
from tgate_export.recipes import check_sampler

log = logging.getLogger("tgate")

_INSTEAD = {"k": "; take a larger m, or a smaller k or w", "f": "; take a smaller m or f", "g": "; take another g"}
"""What brings reuse where a setting brings none: k counts before the gate, f and g after it."""


def make_plans(
    name: str,
    method: Method,
    settings: Settings,
    *,
    sampler: Sampler,
    guidance_scale: float,
    guided: bool,
    graphs: Mapping[str, GraphSpec],
    carries: Collection[str],
    existing: Mapping[str, Plan] | None = None,
    late: Late | None = None,
) -> dict[str, Plan]:
    """The plan of those settings, and its baselines, by name.

    A baseline that one of ``existing`` already is, whatever its name, is not made again. The default plan's are called
    as the method calls them, where that is free, those of others ``<name>.<baseline>``. ``late``: when a second network
    runs, where there are two. Raises :class:`PlanError` where graphs are missing, and :class:`MethodError` for settings
    that two networks cannot share.
    """
    if late is None and has_late(graphs):
        raise PlanError("the graphs are of two networks, and nothing says at which timesteps each of them runs")
    if late is not None:
        late.check(settings)
        late = late.at(guidance_scale)
    of_two: dict[str, Fact] = {} if late is None else late.facts()

    def made(program: Program) -> Program:
        return program if late is None else shared_out(program, late.calls(sampler))

    def build(
        label: str, program: Program, facts: Any, baselines: tuple[str, ...] = (), left_out: Collection[int] = ()
    ) -> Plan:
        return build_plan(
            label,
            [call for i, call in enumerate(made(program)) if i not in left_out],
            sampler=forecast(sampler, left_out),
            guidance_scale=guidance_scale,
            graphs=graphs,
            carries=carries,
            settings={**facts, **of_two},
            baselines=baselines,
        )

    plans: dict[str, Plan] = {}
    baselines: list[str] = []
    for baseline, program in method.baselines(settings, sampler.lead_in, guided=guided).items():
        label = baseline if name == DEFAULT and baseline not in (existing or {}) else f"{name}.{baseline}"
        facts = {"method": baseline, "n": settings.steps}
        plan = build(label, program, facts if baseline == "ungated" else {**facts, "m": settings.gate})
        same = next((old.name for old in (existing or {}).values() if old.same_program(plan)), None)
        if same is None:
            plans[label] = plan
        if (same or label) not in baselines:  # where m = n, stopping guidance at m is no other than the ungated plan
            baselines.append(same or label)
    if told := method.idle(settings, sampler.lead_in, made):
        log.warning("plan %s: %s%s", name, told, _INSTEAD[told[0]])
    if method.gated and settings.gate == settings.steps:
        log.warning("plan %s: m = n = %d, so that no step comes after the gate; take a smaller m", name, settings.gate)
    own_program, left_out = method.program(settings, sampler.lead_in), settings.left_out(sampler.lead_in)
    own = build(name, own_program, method.facts(settings), tuple(baselines), left_out)
    if late is not None and settings.gate < settings.steps and not any(step.reads for step in own.steps):
        log.warning(
            "plan %s: nothing is left to reuse, since a network's first step computes everything, and no other step "
            "comes after the gate; take a smaller m, or more steps",
            name,
        )
    return {name: own, **plans}


def add_plan(
    path: Path,
    *,
    name: str,
    m: int | None = None,
    k: int | None = None,
    steps: int | None = None,
    sampler: str | None = None,
    warm_up: int | None = None,
    fidelity_interval: int | None = None,
    forecast_interval: int | None = None,
    cache_interval: int | None = None,
    refresh_interval: int | None = None,
    guidance_scale: float | None = None,
    force: bool = False,
    save: bool = True,
) -> dict[str, Plan]:
    """Make one more plan over the graphs of a bundle, of the bundle's own method; the plan and its baselines, by name.

    ``steps``, ``sampler``, ``warm_up`` and ``guidance_scale``: None takes those of the default plan; ``k`` and
    ``fidelity_interval`` are 1 where left out, ``refresh_interval`` 0; ``forecast_interval`` and ``cache_interval`` are
    the method's own; ``m`` is for methods with a gate. The bundle's manifest is replaced atomically, unless ``save``
    is false. Raises a :class:`~tgate_engine.errors.TgateError`; what the settings and the manifest tell comes before
    any file's digest.
    """
    bundle = Bundle.open(path, check_digests=False)
    manifest = bundle.manifest
    default = manifest.plan(DEFAULT)
    users = [label for label, plan in manifest.plans.items() if name in plan.baselines]
    if users:
        raise PlanError(f"plan {name!r} is what {', '.join(users)} is measured against; use another --name")
    if save and not force:
        bundle.check_free([name])
    method = method_of(default)
    n = int(default.settings["n"] or 0) if steps is None else steps
    settings = method.settings(
        steps=n,
        gate=m,
        k=k,
        w=warm_up,
        f=fidelity_interval,
        c=cache_interval,
        g=refresh_interval,
        r=forecast_interval,
        ratio=settings_of(default.settings).merge_ratio or None,
        defaults={"w": int(default.settings.get("w") or 0)},
    )
    scale = _guidance(manifest, guidance_scale)
    late = Late.of(default.settings, default.guidance_scale)
    if late is not None:
        late.check(settings)
    bundle = bundle.checked()
    plans = make_plans(
        name,
        method,
        settings,
        sampler=sampler_of(bundle, sampler or default.sampler.name, n),
        guidance_scale=scale,
        guided=manifest.guided,
        graphs=manifest.shapes[0].graphs,
        carries=manifest.carries,
        existing={n: plan for n, plan in manifest.plans.items() if n != name and not n.startswith(f"{name}.")},
        late=late,
    )
    if save:
        bundle.save_plans(plans, force=force)
    return plans


def sampler_of(bundle: Bundle, name: str, steps: int) -> Sampler:
    """The compiled sampler of that name and number of steps.

    Taken from the bundle's plans or its table; only where neither has it, it is compiled, which needs the extra
    ``[export]``. Raises :class:`ExportError` where that is not installed, or the sampler cannot be compiled.
    """
    manifest = bundle.manifest
    for plan in manifest.plans.values():
        if FORECAST_OF not in plan.sampler.options and (plan.sampler.name, plan.sampler.steps) == (name, steps):
            return plan.sampler
    tables = load_tables(bundle.file(manifest.samplers)) if manifest.samplers else {}
    if (name, steps) in tables:
        return tables[name, steps]
    if not any(name == own for own, _ in tables):
        check_sampler(name)
    try:
        from tgate_export.sampling import compile_sampler
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("tgate_"):
            raise
        counts = sorted(n for own, n in tables if own == name)
        there = f"{name} for {_listed(counts)} steps" if counts else f"{', '.join(dict.fromkeys(s for s, _ in tables))}"
        raise ExportError(
            f"the bundle has no table of sampler {name!r} for {steps} steps (it has {there or 'none'}), and compiling "
            f"one needs {error.name}: pip install 'tgate-engine[export]'"
        ) from None
    return compile_sampler(name, manifest.scheduler, steps)


def check_guidance(scale: float) -> None:
    """Raises :class:`ExportError` for a guidance scale that means nothing."""
    if not 0 <= scale <= MOST_GUIDANCE:
        raise ExportError(
            f"the guidance scale must be a finite number of at least 0 and at most {MOST_GUIDANCE:g}, got {scale}"
        )


def _guidance(manifest: Manifest, scale: float | None) -> float:
    if scale is None:
        return manifest.guidance_scale
    check_guidance(scale)
    if manifest.guidance != "embedded" and (scale > 1) != manifest.guided:
        raise ExportError(
            f"guidance scale {scale} does not fit a bundle exported "
            f"{'with' if manifest.guided else 'without'} guidance; export again with --guidance-scale"
        )
    return scale


def method_of(plan: Plan) -> Method:
    """The method that a bundle's default plan was made by."""
    name = plan.settings.get("method")
    if name not in METHODS:
        raise PlanError(
            f"plan {plan.name!r} is of method {name!r}, which is none of {', '.join(METHODS)}; export again"
        )
    return find_method(str(name))


def _listed(counts: list[int]) -> str:
    """Numbers for a reader: 1 to 30, 35, 40."""
    runs: list[list[int]] = []
    for count in counts:
        if runs and runs[-1][-1] == count - 1:
            runs[-1].append(count)
        else:
            runs.append([count])
    return ", ".join(f"{run[0]} to {run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
