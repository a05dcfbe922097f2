"""What a picture was drawn from, so that it can be drawn again; as JSON, which is read back distrustfully."""

from __future__ import annotations

import hashlib
import json
import re
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from tgate_engine import __version__
from tgate_engine.errors import RequestError, TgateError, shown
from tgate_engine.manifest import Manifest
from tgate_engine.plan import Plan
from tgate_engine.reader import Reader, parse_json
from tgate_engine.sampler import MOST_STEPS, Fact, check_facts
from tgate_engine.step import step_row
from tgate_runtime.control import Controls
from tgate_runtime.engines.protocol import Engine
from tgate_runtime.generators import SEED_LIMIT
from tgate_runtime.picture import as_mask, as_rgb

FORM = 1
"""Of the JSON; another one means something else."""
MOST_BYTES = 2**20
"""Of a record's JSON: room for two prompts as long as any that is read."""
GIVEN = ("image", "mask", "initial_latents", "prompt_embeds", "ip_adapter_image")
"""What a request may be given in arrays, whose numbers no record holds."""

_MOST_FACTS = 64
_AGAIN = "draw the picture anew"
_SIZE = re.compile("[1-9][0-9]{0,5}x[1-9][0-9]{0,5}")
_SHA256 = re.compile("[0-9a-f]{64}")
_OPTIONS = {"m": "--m", "k": "--k", "w": "--warm-up", "f": "--fidelity-interval", "r": "--forecast", "n": "--steps"}
"""What `tgate plan` calls a method's settings."""


@dataclass(frozen=True, kw_only=True)
class PlanRecord:
    """A plan: its name, what it was made from, and the :func:`digest_of_plan` of its program."""

    name: str
    settings: Mapping[str, Fact]
    sampler: str
    steps: int
    digest: str

    @staticmethod
    def of(plan: Plan) -> PlanRecord:
        """Those of ``plan``."""
        return PlanRecord(
            name=plan.name,
            settings=dict(plan.settings),
            sampler=plan.sampler.name,
            steps=plan.sampler.steps,
            digest=digest_of_plan(plan),
        )

    def __str__(self) -> str:
        settings = [f"{key}={shown(fact, 20)}" for key, fact in self.settings.items() if key in _OPTIONS]
        method = shown(self.settings.get("method", ""), 20)
        return f"{shown(self.name)!r} ({', '.join(filter(None, [method, *settings, shown(self.sampler)]))})"


@dataclass(frozen=True, kw_only=True)
class EngineRecord:
    """An engine: its name, its version, and what it computes in; empty where it does not say."""

    name: str
    version: str
    precision: str

    @staticmethod
    def of(engine: Engine) -> EngineRecord:
        """Those of ``engine``."""
        return EngineRecord(name=engine.name, version=engine.version, precision=engine.options.precision or "")

    def __str__(self) -> str:
        return " ".join(shown(word, 40) for word in (self.name, self.version, self.precision) if word)


@dataclass(frozen=True, kw_only=True)
class LoraRecord:
    """An adapter: its scale, and its file's SHA-256."""

    scale: float
    sha256: str

    def __str__(self) -> str:
        return f"{self.scale:g} of {self.sha256[:16]}…"


@dataclass(frozen=True, kw_only=True)
class ControlRecord:
    """What a :class:`~tgate_runtime.control.Control` said, with the SHA-256 of its picture as RGB."""

    scale: float
    start: float
    end: float
    until_gate: bool
    sha256: str

    def __str__(self) -> str:
        gate = ", until the gate" if self.until_gate else ""
        return f"{self.scale:g} of {self.sha256[:16]}… from {self.start:g} to {self.end:g}{gate}"


@dataclass(frozen=True, kw_only=True)
class Record:
    """What one image was drawn from. It holds no path, no name of a machine or a user, and no time.

    ``prompt``: None where an image or embeddings stood for it. ``size``: WIDTHxHEIGHT. ``bundle``: its
    :func:`~tgate_engine.manifest_json.bundle_digest`. ``strength``: of one that began from a picture; None for others,
    whose JSON has none. ``decoder``: "preview" where the small one made the picture; None, likewise, where the model's
    own did. ``loras``: of one that was drawn with adapters, by their names; JSON has none where there are none.
    ``controls``: likewise of one that was drawn with control pictures, by ControlNet. ``version``: of tgate-engine.
    ``given``: the SHA-256, by its name in :data:`GIVEN`, of what was given in arrays (:func:`digest_of_arrays`), this
    image's rows alone. ``ip_adapter_scale``: of one with such a picture; None, and not in the JSON, for others.
    """

    prompt: str | None
    negative_prompt: str | None
    seed: int
    generator: str
    guidance_scale: float
    size: str
    plan: PlanRecord
    model: str
    bundle: str
    engine: EngineRecord
    strength: float | None = None
    decoder: str | None = None
    loras: Mapping[str, LoraRecord] = field(default_factory=dict)
    controls: Mapping[str, ControlRecord] = field(default_factory=dict)
    version: str = __version__
    given: Mapping[str, str]
    ip_adapter_scale: float | None = None

    def to_json(self) -> dict[str, Any]:
        """The record as JSON values; :func:`parse_record` gives back an equal one."""
        data = asdict(self)
        for name in ("strength", "decoder"):
            if data[name] is None:
                del data[name]
        if not self.loras:
            del data["loras"]
        if self.ip_adapter_scale is None:
            del data["ip_adapter_scale"]
        if not self.controls:
            del data["controls"]
        return {"form": FORM, **data}

    def request(self) -> dict[str, Any]:
        """The arguments of :class:`~tgate_runtime.pipeline.Pipeline` that draw the image again, but for its plan
        (:func:`plan_for`), its :attr:`controls` and what was :attr:`given`, whose pictures and numbers it has not."""
        drawn = ("seed", "generator", "guidance_scale", "size", "strength", "decoder", "ip_adapter_scale")
        names = ("prompt", "negative_prompt", *drawn)
        loras = {name: lora.scale for name, lora in self.loras.items()}
        return {**{name: getattr(self, name) for name in names}, "loras": loras or None}

    def differences(self, other: Record) -> list[str]:
        """Why ``other`` may come out differently, a phrase for each: another bundle, engine or version."""
        mine, others = (
            {
                "model": shown(record.model),
                "bundle": f"{record.bundle[:16]}…",
                "plan": f"{record.plan} {record.plan.digest[:8]}…",
                "engine": str(record.engine),
                "tgate-engine": shown(record.version),
                **{f"adapter {shown(name)}": str(lora) for name, lora in sorted(record.loras.items())},
                **{f"ControlNet {shown(name)}": str(each) for name, each in sorted(record.controls.items())},
                **{name.replace("_", " "): f"{digest[:16]}…" for name, digest in sorted(record.given.items())},
            }
            for record in (self, other)
        )
        if self.plan.digest == other.plan.digest:  # whatever it is called
            del mine["plan"], others["plan"]
        names = dict.fromkeys([*mine, *others])
        return [
            f"{name} {others.get(name, 'none')} instead of {mine.get(name, 'none')}"
            for name in names
            if mine.get(name) != others.get(name)
        ]


def parse_record(text: str | bytes, where: str) -> Record:
    """The record of a JSON text, which anybody may have written. ``where``: what errors call it.

    Raises :class:`RequestError` in one line for anything that is none.
    """
    if len(text) > MOST_BYTES:
        raise RequestError(f"the record in {where} holds {len(text)} characters, of at most {MOST_BYTES}")
    try:
        return _record(Reader(parse_json(text), f"the record in {where}", _AGAIN))
    except ValueError as error:
        raise RequestError(f"the record in {where} is not JSON ({shown(error, 200)}); {_AGAIN}") from None
    except RequestError:
        raise
    except TgateError as error:  # a reader's, a plan's facts'
        raise RequestError(str(error)) from None


def plan_for(record: Record, manifest: Manifest) -> Plan:
    """The bundle's plan with the record's program, whatever it is called; the one of its name if there are several.

    Raises :class:`RequestError` that says how to add one where there is none.
    """
    drawn = record.plan
    same = [plan for plan in manifest.plans.values() if digest_of_plan(plan) == drawn.digest]
    if same:
        return next((plan for plan in same if plan.name == drawn.name), same[0])
    own = manifest.plans.get(drawn.name)
    name = drawn.name if own is None else f"{drawn.name}-again"
    instead = f"--plan takes one of {', '.join(shown(plan) for plan in sorted(manifest.plans))}"
    methods = {plan.settings.get("method") for plan in manifest.plans.values() if plan.baselines}
    if "m" in drawn.settings and drawn.settings.get("method") in methods:
        numbers = [f"{_OPTIONS[key]} {fact}" for key, fact in drawn.settings.items() if _is_setting(key, fact)]
        options = " ".join(["--name", shlex.quote(name), *numbers, "--sampler", shlex.quote(drawn.sampler)])
        instead = f"`tgate plan BUNDLE {options}` adds it, and {instead}"
    other = "" if own is None else f", but another {PlanRecord.of(own)}"
    found = f"the bundle has none like it{other}"
    raise RequestError(f"the picture was drawn by plan {drawn}, and {found}: {instead}")


def digest_of_plan(plan: Plan) -> str:
    """The SHA-256, in hex, of a plan's program: what its graphs are given, in float32 as they take it, and in which
    order they run, whatever the plan, its sampler and its baselines are called.

    The guidance scale is not in it: a request has its own.
    """
    program = [[step.graph, step.reads, step.writes] for step in plan.steps]
    rows = np.stack([step_row(step.call, 0.0) for step in plan.steps]) + np.float32(0)  # -0 is 0
    numbers = {"initial_scale": np.asarray(plan.sampler.initial_scale, np.float32), "rows": rows}
    return hashlib.sha256(f"{json.dumps(program)}{digest_of_arrays(numbers)}".encode()).hexdigest()


def loras_of(scales: Iterable[tuple[str, float]], manifest: Manifest) -> dict[str, LoraRecord]:
    """Of adapters of a bundle with their scales, what a record says of them."""
    files = {name: manifest.files[adapter.file].sha256 for name, adapter in manifest.adapters.items()}
    return {name: LoraRecord(scale=scale, sha256=files[name]) for name, scale in scales}


def controls_of(controls: Controls | None) -> dict[str, ControlRecord]:
    """What a record says of a request's control pictures, in the order of the ControlNets' names."""
    return {
        name: ControlRecord(
            scale=float(control.scale),
            start=float(control.start),
            end=float(control.end),
            until_gate=control.until_gate,
            sha256=digest_of_arrays({"image": np.asarray(as_rgb(control.image))}),
        )
        for name, control in sorted((controls or {}).items())
    }


def digest_of_arrays(arrays: Mapping[str, NDArray[Any]]) -> str:
    """The SHA-256, in hex, of the names, dtypes, shapes and numbers of arrays, in the order of their names."""
    digest = hashlib.sha256()
    for name, array in sorted(arrays.items()):
        values = np.asarray(array)
        values = np.ascontiguousarray(values, values.dtype.newbyteorder("<"))
        digest.update(f"{name} {values.dtype.str} {values.shape}\n".encode())
        digest.update(values.tobytes())
    return digest.hexdigest()


def digests_of_given(
    count: int,
    *,
    image: Image.Image | None = None,
    mask: Image.Image | None = None,
    prompt_embeds: Mapping[str, NDArray[Any]] | None = None,
    initial_latents: NDArray[Any] | None = None,
    ip_adapter_image: Image.Image | None = None,
) -> list[dict[str, str]]:
    """Of each of ``count`` images, :attr:`Record.given`: ``image`` and ``ip_adapter_image`` are all of them's, as RGB,
    and ``mask`` as it is read (:func:`~tgate_runtime.picture.as_mask`); a row of ``initial_latents`` [count, ...] is
    one's, and a row of ``prompt_embeds`` [N, ...] that of count / N neighbours."""
    each: list[dict[str, str]] = [{} for _ in range(count)]
    for name, picture in (("image", image), ("ip_adapter_image", ip_adapter_image)):
        if picture is not None:
            shared = digest_of_arrays({"image": np.asarray(as_rgb(picture))})
            each = [{**own, name: shared} for own in each]
    if mask is not None:
        shared = digest_of_arrays({"mask": np.asarray(as_mask(mask))})
        each = [{**own, "mask": shared} for own in each]
    for name, tensors in (
        ("initial_latents", {} if initial_latents is None else {"": initial_latents}),
        ("prompt_embeds", prompt_embeds or {}),
    ):
        rows = digests_of_rows(tensors)
        for j in range(count if rows else 0):
            each[j][name] = rows[j * len(rows) // count]
    return each


def digests_of_rows(tensors: Mapping[str, NDArray[Any]]) -> list[str]:
    """The :func:`digest_of_arrays` of each row of tensors [N, ...]; those with fewer rows are left out."""
    rows = _rows(tensors)
    count = max(map(len, rows.values()), default=0)
    return [digest_of_arrays({name: array[j] for name, array in rows.items()}) for j in range(count)]


def rows_with(digest: str, tensors: Mapping[str, NDArray[Any]]) -> Mapping[str, NDArray[Any]]:
    """The row of tensors [N, ...] that has a digest, as [1, ...]; all of them where none has."""
    for j, other in enumerate(digests_of_rows(tensors)):
        if other == digest:
            return {name: array[j : j + 1] for name, array in _rows(tensors).items()}
    return tensors


def _rows(tensors: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """Those that have as many rows as any of them has."""
    arrays = {name: array for name, array in tensors.items() if np.ndim(array)}
    count = max(map(len, arrays.values()), default=0)
    return {name: array for name, array in arrays.items() if len(array) == count}


def _is_setting(key: str, fact: Fact) -> bool:
    return key in _OPTIONS and isinstance(fact, int) and not isinstance(fact, bool)


def _record(r: Reader) -> Record:
    form = r.whole("form", 1)
    if form != FORM:
        raise RequestError(f"{r.where} has form {form}, this tgate-engine reads form {FORM}; update tgate-engine")
    plan, engine = (Reader(r.get(key, dict), f"{r.where}.{key}", _AGAIN) for key in ("plan", "engine"))
    facts = plan.get("settings", dict)
    given = r.strings("given")
    if len(facts) > _MOST_FACTS:
        raise RequestError(f"{plan.where}.settings: expected at most {_MOST_FACTS}, got {len(facts)}; {_AGAIN}")
    if odd := given.keys() - set(GIVEN):
        raise RequestError(f"{r.where}.given: expected {', '.join(GIVEN)}, got '{shown(min(odd), 40)}'; {_AGAIN}")
    size = r.text("size")
    if not _SIZE.fullmatch(size):
        raise RequestError(f"{r.where}.size: expected WIDTHxHEIGHT, got '{shown(size, 40)}'; {_AGAIN}")
    return Record(
        prompt=_prompt(r, "prompt"),
        negative_prompt=_prompt(r, "negative_prompt"),
        seed=r.whole("seed", 0, SEED_LIMIT - 1),
        generator=r.word("generator"),
        guidance_scale=r.number("guidance_scale"),
        strength=r.number("strength", 0, 1) if "strength" in r.data else None,
        decoder=r.choice("decoder", ("preview",)) if "decoder" in r.data else None,
        loras=_loras(r) if "loras" in r.data else {},
        controls=_controls(r) if "controls" in r.data else {},
        size=size,
        plan=PlanRecord(
            name=plan.word("name"),
            settings=check_facts(facts),
            sampler=plan.word("sampler"),
            steps=plan.whole("steps", 1, MOST_STEPS),
            digest=_digest(plan, "digest", plan.text("digest")),
        ),
        model=r.text("model"),
        bundle=_digest(r, "bundle", r.text("bundle")),
        engine=EngineRecord(
            name=engine.word("name"), version=engine.word("version"), precision=engine.text("precision")
        ),
        version=r.word("version"),
        given={name: _digest(r, name, digest) for name, digest in given.items()},
        ip_adapter_scale=r.number("ip_adapter_scale", 0) if "ip_adapter_scale" in r.data else None,
    )


def _loras(r: Reader) -> dict[str, LoraRecord]:
    names = r.named("loras", _MOST_FACTS)
    inner = {name: Reader(value, f"{r.where}.loras.{shown(name)}", _AGAIN) for name, value in names.items()}
    return {
        name: LoraRecord(scale=each.number("scale"), sha256=_digest(each, "sha256", each.text("sha256")))
        for name, each in inner.items()
    }


def _controls(r: Reader) -> dict[str, ControlRecord]:
    names = r.named("controls", _MOST_FACTS)
    inner = {name: Reader(value, f"{r.where}.controls.{shown(name)}", _AGAIN) for name, value in names.items()}
    return {
        name: ControlRecord(
            scale=each.number("scale"),
            start=each.number("start", 0, 1),
            end=each.number("end", 0, 1),
            until_gate=each.flag("until_gate"),
            sha256=_digest(each, "sha256", each.text("sha256")),
        )
        for name, each in inner.items()
    }


def _prompt(r: Reader, key: str) -> str | None:
    """How long a prompt may be, whoever encodes it says."""
    text = r.get(key, (str, type(None)))
    return None if text is None else str(text)


def _digest(r: Reader, key: str, text: str) -> str:
    if not _SHA256.fullmatch(text):
        raise RequestError(f"{r.where}.{key}: expected 64 hexadecimal digits, got '{shown(text, 40)}'; {_AGAIN}")
    return text
