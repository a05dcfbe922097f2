"""What a method is: which graphs it wants, what they carry, and which graph each network call runs.

Nothing here needs torch, so that plans can be made where bundles run. What a method does inside a graph is a
:class:`~tgate_export.methods.parts.Part`, which needs it, and is imported where graphs are described.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

from tgate_engine.errors import MethodError, shown
from tgate_engine.plan import Call
from tgate_engine.sampler import MOST_STEPS, Fact

Halves = Literal["both", "negative", "positive"]
Program = tuple[Call, ...]

FULL = "full"
"""Everything is computed, for both halves of guidance where there are two; what a method stores, this graph gives."""
MOST_MERGED = 0.75
"""Of the tokens of a grid: one of each four stays, for the others to be merged into."""
UNGUIDED = "unguided"
"""Everything is computed for the prompt's half alone: guidance stopped, nothing reused."""

PLANNING = "semantics-planning"
FIDELITY = "fidelity-improving"
"""The two stretches of a trajectory, in the paper's words: before the gate and after it."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The numbers of a method, as the command line has them.

    ``steps``: n, denoising steps, from 1 to :data:`~tgate_engine.sampler.MOST_STEPS`. ``gate``: m, in 1..n, from which
    step on the method goes another way; m = n never does. ``self_interval``: k, at least 1: before the gate,
    self-attention is computed at every k-th step; 1 always. ``warm_up``: w, at least 0: steps that reuse nothing.
    ``fidelity_interval``: f, at least 1, the same interval after the gate. ``forecast_interval``: r, at least 1: from
    the gate on every r-th network call is made, and what the others would have given is forecast; 1 makes all.
    ``cache_interval``: c, at least 1: every c-th network call is a full one, and the others compute the network's last
    layers alone over what it left; 1 makes all of them full. ``refresh_interval``: g: from the gate on, both halves of
    guidance are computed at every g-th step, and what is kept of them is kept anew; 0 never does, 1 would change all.
    ``merge_ratio``: the share of tokens that are merged into others for self-attention, up to :data:`MOST_MERGED`; 0
    merges none. It shapes graphs: all plans over them have the same.

    Raises :class:`MethodError` naming the value and what it must be.
    """

    steps: int
    gate: int
    self_interval: int = 1
    warm_up: int = 2
    fidelity_interval: int = 1
    forecast_interval: int = 1
    cache_interval: int = 1
    refresh_interval: int = 0
    merge_ratio: float = 0.0

    def __post_init__(self) -> None:
        intervals = [each.name for each in fields(self) if each.name not in ("steps", "gate", "merge_ratio")]
        for name in ("steps", "gate", *intervals):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int):
                raise MethodError(f"{name} must be a whole number, got {value!r}")
        if not 1 <= self.steps <= MOST_STEPS:
            raise MethodError(f"steps (n) must be from 1 to {MOST_STEPS}, got {shown(self.steps)}")
        if not 1 <= self.gate <= self.steps:
            raise MethodError(
                f"the gate step m must be between 1 and the number of steps n = {self.steps}, got m = "
                f"{shown(self.gate)}"
            )
        for name in intervals:
            if getattr(self, name) > MOST_STEPS:
                raise MethodError(f"{name} must be at most {MOST_STEPS}, got {shown(getattr(self, name))}")
        if self.self_interval < 1:
            raise MethodError(
                "the self-attention interval k must be at least 1 (1 switches its reuse off), "
                f"got k = {self.self_interval}"
            )
        if self.warm_up < 0:
            raise MethodError(f"the warm-up must be at least 0 steps, got {self.warm_up}")
        if self.fidelity_interval < 1:
            raise MethodError(
                "the fidelity interval f must be at least 1 (1 always computes self-attention after the gate), "
                f"got f = {self.fidelity_interval}"
            )
        if self.forecast_interval < 1:
            raise MethodError(
                "the forecast interval r must be at least 1 (1 makes every network call), "
                f"got r = {self.forecast_interval}"
            )
        if self.cache_interval < 1:
            raise MethodError(
                "the cache interval c must be at least 1 (1 makes every network call a full one), "
                f"got c = {self.cache_interval}"
            )
        if self.refresh_interval < 0 or self.refresh_interval == 1:
            raise MethodError(
                "the refresh interval g must be at least 2 (0 refreshes nothing, 1 would leave nothing to reuse), "
                f"got g = {self.refresh_interval}"
            )
        if not 0 <= self.merge_ratio <= MOST_MERGED:
            raise MethodError(
                f"the merge ratio must be above 0 and at most {MOST_MERGED}: one token of each four stays for the "
                f"others to be merged into; got {self.merge_ratio}"
            )

    def refreshes(self, i: int) -> bool:
        """Whether step ``i``, 0-based, comes after the gate and computes both halves of guidance."""
        g = self.refresh_interval
        return i >= self.gate and g > 0 and (i - self.gate) % g == g - 1

    def left_out(self, lead_in: int = 0) -> tuple[int, ...]:
        """The network calls, of ``lead_in + n``, that are not made because their outputs are forecast."""
        first = lead_in + self.gate
        return tuple(i for i in range(first, lead_in + self.steps) if (i - first) % self.forecast_interval)


@dataclass(frozen=True, kw_only=True)
class Network:
    """What a method has to know of a denoiser to say what its graphs are.

    ``sites``: its attention modules (:class:`~tgate_export.attention.AttentionSite`). ``guided``: whether it runs both
    halves of classifier-free guidance. ``after_gate``: the half that the paper goes on with after the gate. ``deep``:
    the module whose output is all that the network's last layers take of those below, beside skip connections; None
    where there are none. ``rows``: of that output for one half of one image, 1 but for videos,
    whose frames are rows. ``finest``: its self-attention modules over the finest grid that has any, of a U-Net's
    transformer blocks; empty where there are none that are known.
    """

    sites: Sequence[Any]
    guided: bool
    after_gate: Halves = "negative"
    deep: str | None = None
    rows: int = 1
    finest: Sequence[str] = ()


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One denoising graph: which halves of guidance it runs, and what a method does inside it. ``late``: whether it is
    of a second network (:mod:`tgate_export.methods.late`)."""

    name: str
    halves: Halves
    parts: tuple[Any, ...] = field(default=())
    late: bool = False


class Method(ABC):
    """One way to reuse. Immutable.

    ``takes``: the settings that mean something to it beside n, m and r, of k, w, f, c and g. ``gated``: whether m does.
    ``forecasts``: r where a user names none, ``caches``: c, and ``merges``: the merge ratio, 0 where it merges none.
    """

    name: str
    takes: frozenset[str] = frozenset()
    gated: bool = True
    forecasts: int = 1
    caches: int = 1
    merges: float = 0.0

    @abstractmethod
    def program(self, settings: Settings, lead_in: int = 0) -> tuple[Call, ...]:
        """The graph of each of ``lead_in + n`` network calls, those that are forecast among them. ``lead_in``: calls
        that a sampler makes before the rules begin (PNDM: 1), which compute everything."""

    @abstractmethod
    def variants(self, network: Network, settings: Settings) -> tuple[Variant, ...]:
        """The graphs that plans of such settings run, :data:`FULL` first. Needs torch."""

    @abstractmethod
    def short(self, settings: Settings) -> Settings:
        """Settings of as few steps as run every graph of such a bundle: what goldens walk."""

    def check(self, *, guided: bool) -> None:
        """Raises :class:`MethodError` where the method means nothing without guidance, and there is none."""
        del guided

    def baselines(self, settings: Settings, lead_in: int = 0, *, guided: bool) -> dict[str, tuple[Call, ...]]:
        """Programs that a plan of those settings is to be measured against, the plainest first."""
        plain = {"ungated": ungated(settings.steps, lead_in)}
        return plain | ({"guidance_stopped": guidance_stopped(settings, lead_in)} if guided else {})

    def idle(self, settings: Settings, lead_in: int = 0, made: Callable[[Program], Program] = lambda own: own) -> str:
        """What of k, f and g asks for reuse and brings none, as a sentence; empty where there is nothing to tell.

        A short stretch may hold nothing but warm-up and steps that compute their self-attention anyway. ``made``: what
        becomes of a program before it runs.
        """
        own, said = made(self.program(settings, lead_in)), []
        for letter, name, none in (
            ("k", "self_interval", 1),
            ("f", "fidelity_interval", 1),
            ("g", "refresh_interval", 0),
        ):
            value = getattr(settings, name)
            plain = replace(settings, **{name: none})
            if letter in self.takes and value > 1 and made(self.program(plain, lead_in)) == own:
                said.append(f"g = {value} refreshes nothing" if letter == "g" else f"{letter} = {value} reuses nothing")
        numbers = f"n = {settings.steps}, m = {settings.gate}, w = {settings.warm_up}"
        return f"{' and '.join(said)} at {numbers}" if said else ""

    def facts(self, settings: Settings) -> dict[str, Fact]:
        """The settings for a plan's reader, and for :func:`settings_of`."""
        facts: dict[str, Fact] = {"method": self.name, "n": settings.steps}
        facts |= {"m": settings.gate} if self.gated else {}
        own = {"k": settings.self_interval, "w": settings.warm_up, "f": settings.fidelity_interval}
        own |= {"c": settings.cache_interval}
        facts |= {name: value for name, value in own.items() if name in self.takes}
        facts |= {"g": settings.refresh_interval} if settings.refresh_interval else {}
        facts |= {"ratio": settings.merge_ratio} if settings.merge_ratio else {}
        return facts | ({"r": settings.forecast_interval} if settings.forecast_interval > 1 else {})

    def settings(
        self,
        *,
        steps: int,
        gate: int | None,
        defaults: Mapping[str, int],
        k: int | None = None,
        w: int | None = None,
        f: int | None = None,
        c: int | None = None,
        g: int | None = None,
        r: int | None = None,
        ratio: float | None = None,
    ) -> Settings:
        """Settings from what a user names. None takes ``defaults``, by "k", "w" and "f", where the method knows it.

        Raises :class:`MethodError` for a setting that would change nothing, and where the method wants a gate and
        ``gate`` is None.
        """
        named = {"k": k, "w": w, "f": f, "c": c, "g": g}
        idle = {"k": 1, "w": 0, "f": 1, "c": 1, "g": 0}
        for name, value in named.items():
            if value is not None and value != idle[name] and name not in self.takes:
                words = {"k": "--k", "w": "--warm-up", "f": "--fidelity-interval", "c": "--cache-interval"}
                words |= {"g": "--refresh"}
                why = {"c": "makes no shallow call", "g": "keeps no difference of guidance"}.get(
                    name, "reuses no self-attention"
                )
                raise MethodError(f"{words[name]} {value} would change nothing: method {self.name} {why}; leave it out")
        if ratio is not None and not (ratio and self.merges):
            why = "merges tokens, and this is none; take more" if self.merges else "merges no tokens; leave it out"
            raise MethodError(f"--merge-ratio {ratio:g} would change nothing: method {self.name} {why}")
        if gate is None and self.gated:
            raise MethodError(f"method {self.name} wants the step at which its gate closes; give --m")
        if gate is not None and not self.gated:
            raise MethodError(f"--m {gate} would change nothing: method {self.name} has no gate; leave it out")
        defaults = {"c": self.caches, **defaults}
        values = {
            name: (defaults.get(name, idle[name]) if value is None else value) if name in self.takes else idle[name]
            for name, value in named.items()
        }
        settings = Settings(
            steps=steps,
            gate=steps if gate is None else gate,
            self_interval=values["k"],
            warm_up=values["w"],
            fidelity_interval=values["f"],
            forecast_interval=self.forecasts if r is None else r,
            cache_interval=values["c"],
            refresh_interval=values["g"],
            merge_ratio=self.merges if ratio is None else ratio,
        )
        if settings.refresh_interval and not any(map(settings.refreshes, range(settings.steps))):
            raise MethodError(
                f"--refresh {settings.refresh_interval} would change nothing: from step m = {settings.gate} on there "
                f"are {settings.steps - settings.gate} steps; take a smaller one, or leave it out"
            )
        self._check_forecasts(settings, named=r is not None)
        return settings

    def _check_forecasts(self, settings: Settings, *, named: bool) -> None:
        """``named``: whether r is a user's and not the method's own."""
        r = settings.forecast_interval
        if r == 1 and self.forecasts > 1:
            raise MethodError(
                f"--forecast 1 would change nothing: method {self.name} does nothing else; take 2 or more"
            )
        if r > 1 and not settings.left_out():
            what = f"--forecast {r}" if named else f"method {self.name}"
            instead = "leave it out" if named else "another --method"
            raise MethodError(
                f"{what} would change nothing: from step m = {settings.gate} on there is one network call at most; "
                f"take a smaller --m, or {instead}"
            )
        if r > 1 and settings.refresh_interval:
            raise MethodError(
                f"--refresh {settings.refresh_interval} and --forecast {r} don't go together: steps that compute both "
                "halves would be among those that are left out; give one of them"
            )
        if r > 1 and settings.fidelity_interval > 1:
            # The steps that compute self-attention are counted in n: those that are made may be all of them, or none.
            raise MethodError(
                f"--fidelity-interval {settings.fidelity_interval} and --forecast {r} don't go together: steps that "
                "compute self-attention would be among those that are left out; give one of them"
            )


def settings_of(facts: Mapping[str, Fact]) -> Settings:
    """The settings that :meth:`Method.facts` told; what a method does not take is as it is where nothing is reused."""
    n = int(facts.get("n") or 1)
    least = {"m": n, "k": 1, "w": 0, "f": 1, "r": 1, "c": 1, "g": 0}
    m, k, w, f, r, c, g = (int(facts.get(name) or value) for name, value in least.items())
    return Settings(
        steps=n,
        gate=m,
        self_interval=k,
        warm_up=w,
        fidelity_interval=f,
        forecast_interval=r,
        cache_interval=c,
        refresh_interval=g,
        merge_ratio=float(facts.get("ratio") or 0),
    )


def ungated(steps: int, lead_in: int = 0) -> tuple[Call, ...]:
    """Nothing reused, guidance throughout."""
    return (Call(PLANNING, FULL),) * (lead_in + steps)


def guidance_stopped(settings: Settings, lead_in: int = 0) -> tuple[Call, ...]:
    """Nothing reused, guidance stopped at m: what remains of a saving without any reuse."""
    before = (Call(PLANNING, FULL),) * (lead_in + settings.gate)
    return (*before, *(Call(FIDELITY, UNGUIDED),) * (settings.steps - settings.gate))
