"""What was measured of a plan: how near its pictures are to ungated ones, how long they take, and where that holds.

A report lies in the bundle beside what its manifest lists, as ``reports/<program>.json``, so that hosts need not know
of it. It belongs to a program, whatever plans of it are called: a plan that is made anew with other settings has none.
And it belongs to the files that draw, whichever bundle they lie in: an export that comes out the same has it too.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tgate_engine.atomic import write_atomically
from tgate_engine.bundle import Bundle
from tgate_engine.errors import BundleError, TgateError
from tgate_engine.graph import DECODE, IMAGE, TEXT
from tgate_engine.manifest import Manifest
from tgate_engine.manifest_json import content_digest
from tgate_engine.plain_files import open_inside, read_most
from tgate_engine.plan import Plan
from tgate_engine.reader import Reader, parse_json
from tgate_engine.sampler import MOST_CALLS, Fact, check_facts

FORM = 1
"""Of the JSON; another one means something else."""
REPORTS = "reports"
"""The folder they lie in."""
MOST_BYTES = 1 << 20
NEARNESS, DIFFERENCES = ("psnr", "ssim", "lpips"), ("accuracy", "clip", "reward")
"""The metrics: how near a plan's pictures are to the ungated ones, and a judge's verdict on them less that on those."""
_FORMS = {
    "psnr": (".2f", " dB"),
    "ssim": (".4f", ""),
    "lpips": (".4f", ""),
    "accuracy": ("+.1f", " points"),
    "first_object": ("+.1f", " points"),
    "right": (".1f", " %"),
    "ungated_right": (".1f", " %"),
    "clip": ("+.2f", " points"),
    "reward": ("+.3f", ""),
    "ungated_reward": ("+.3f", ""),
    "consistency": ("+.2f", " dB"),
    "frechet": ("+.3f", ""),
    "ungated_frechet": (".3f", ""),
}
"""How a value is written, and its unit; a difference has a sign."""
_PLAIN = (".4f", "")
_SHA256 = re.compile("[0-9a-f]{64}")
_MOST_GRAPHS = 1024
_MOST_ESTIMATES = 16


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A mean over pictures, and its bounds at 95 %."""

    mean: float
    low: float
    high: float

    def told(self, metric: str) -> str:
        """For a reader: ``31.20 dB (30.11 to 32.30)`` of "psnr", ``0.9512 (0.9401 to 0.9600)`` of "ssim",
        ``-0.8 points (-2.1 to +0.4)`` of "accuracy"."""
        form = _FORMS.get(metric, _PLAIN)[0]
        return f"{told(metric, self.mean)} ({self.low:{form}} to {self.high:{form}})"


@dataclass(frozen=True, kw_only=True)
class PlanReport:
    """``bundle``: its :func:`~tgate_engine.manifest_json.bundle_digest`. ``program``: :func:`program_digest` of the
    plan; ``settings``: its. ``files``: :func:`files_of` it.

    ``metric``: one of :data:`NEARNESS` ("psnr" in dB, "lpips" minus a distance) or of :data:`DIFFERENCES` (in points,
    "reward" without a unit), more being better; ``quality``: of the plan's pictures to the ungated ones of the same
    seeds; ``beside``: what else was found of them, by its name; ``judge``: the SHA-256 of the model that judged, or
    nothing. ``unrelated``: of ungated pictures to ungated ones of other seeds; ``elsewhere``: of ungated pictures of
    the same seeds on another engine, by that engine's name and version. ``images``, ``prompts``: how many of each;
    ``prompts_sha256``: of the prompts, a line each; ``seed``: the first picture's; ``size``: WIDTHxHEIGHT.

    ``predicted_ms``, ``measured_ms``, ``ungated_ms``: of one picture, text and decoder included, the last two measured
    in turns. ``macs``, ``ungated_macs``: all multiply-accumulates of a picture. ``engine``, ``engine_version``,
    ``precision``, ``threads`` (0: the engine's choice), ``machine``: what measured it; ``version``: of tgate-engine.
    """

    bundle: str
    program: str
    settings: Mapping[str, Fact]
    files: Mapping[str, str]
    metric: str
    quality: Estimate
    unrelated: Estimate
    beside: Mapping[str, Estimate] = field(default_factory=dict)
    judge: str = ""
    elsewhere: Mapping[str, Estimate] = field(default_factory=dict)
    images: int
    prompts: int
    prompts_sha256: str
    seed: int
    size: str
    predicted_ms: float
    measured_ms: float
    ungated_ms: float
    macs: int
    ungated_macs: int
    engine: str
    engine_version: str
    precision: str
    threads: int
    machine: str
    version: str

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        return {"form": FORM, **asdict(self)}


def told(metric: str, value: float) -> str:
    """A value for a reader, with its unit: ``31.20 dB`` of "psnr"."""
    form, unit = _FORMS.get(metric, _PLAIN)
    return f"{value:{form}}{unit}"


def program_digest(plan: Plan) -> str:
    """The SHA-256, in hex, of what a plan does: its steps, sampler and guidance, whatever it and its settings are
    called."""
    data = plan.to_json()
    return content_digest({name: data[name] for name in ("guidance_scale", "sampler", "steps")})


def files_of(manifest: Manifest, plan: Plan, size: str) -> dict[str, str]:
    """SHA-256, in hex, of all files that decide on the plan's pictures of that size, by name: weights, tokenizers, and
    the graphs that it runs, those of text and of the decoder included. Raises as ``Manifest.shapes_of`` does."""
    shape = manifest.shapes_of(size)[0]
    around = [graph for role in (TEXT, IMAGE, DECODE) if (graph := shape.graph(role)) is not None]
    graphs = [*around, *(shape.graphs[name] for name in plan.graphs())]
    names = [manifest.weights, *(each.file for each in manifest.tokenizers), *(graph.file for graph in graphs)]
    return {name: manifest.files[name].sha256 for name in names if name}


def save_report(bundle: Bundle, report: PlanReport) -> str:
    """Write the report into the bundle, in place of one of the same program; its name there. Raises
    :class:`BundleError` where it cannot be written."""
    name = _name_of(report.program)
    file = bundle.path / name
    content = json.dumps(report.to_json(), indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    try:
        file.parent.mkdir(exist_ok=True)
        write_atomically(file, content.encode())
    except OSError as error:
        raise BundleError(f"{file} cannot be written ({error.strerror or error})") from error
    return name


def report_of(bundle: Bundle, plan: Plan, folder: Path | None = None) -> PlanReport | None:
    """The report of a plan's program, which lies in the bundle, or in ``folder`` as it would there; None where there is
    none, or it was measured on other files.

    Raises :class:`BundleError` in one line for a file that holds no report.
    """
    program, root = program_digest(plan), folder or bundle.path
    name = _name_of(program)
    where = f"{root / name}"
    try:
        with open_inside(root, name) as file:
            data = parse_json(read_most(file, MOST_BYTES))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise BundleError(f"{where} holds no report ({error}); remove it, or run `tgate tune` again") from None
    try:
        report = Reader(data, where, "remove it, or run `tgate tune` again").all_of(_report)
    except BundleError:
        raise
    except TgateError as error:  # a plan's facts'
        raise BundleError(f"{where}: {error}") from None
    if report.program != program or report.size not in {shape.size for shape in bundle.manifest.shapes}:
        return None
    return report if report.files == files_of(bundle.manifest, plan, report.size) else None


def _name_of(program: str) -> str:
    return f"{REPORTS}/{program[:16]}.json"


def _report(r: Reader) -> PlanReport:
    if r.whole("form") != FORM:
        raise BundleError(f"{r.where} is of another version of tgate-engine; {r.advice}")
    named = r.strings("files")
    if len(named) > _MOST_GRAPHS:
        raise BundleError(f"{r.where}.files: expected at most {_MOST_GRAPHS}, got {len(named)}; {r.advice}")
    return PlanReport(
        bundle=_digest(r, "bundle"),
        program=_digest(r, "program"),
        settings=check_facts(r.get("settings", dict)),
        files=named,
        metric=r.choice("metric", (*NEARNESS, *DIFFERENCES)),
        quality=r.inner("quality").all_of(_estimate),
        unrelated=r.inner("unrelated").all_of(_estimate),
        beside=r.table("beside", _estimate, _MOST_ESTIMATES),
        judge=_digest(r, "judge") if r.text("judge") else "",
        elsewhere=r.table("elsewhere", _estimate, _MOST_ESTIMATES),
        images=r.whole("images", 1),
        prompts=r.whole("prompts", 1),
        prompts_sha256=_digest(r, "prompts_sha256"),
        seed=r.whole("seed"),
        size=r.word("size"),
        predicted_ms=r.number("predicted_ms", 0),
        measured_ms=r.number("measured_ms", 0),
        ungated_ms=r.number("ungated_ms", 0),
        macs=r.whole("macs"),
        ungated_macs=r.whole("ungated_macs"),
        engine=r.word("engine"),
        engine_version=r.word("engine_version"),
        precision=r.text("precision"),
        threads=r.whole("threads", 0, MOST_CALLS),
        machine=r.text("machine"),
        version=r.word("version"),
    )


def _estimate(r: Reader) -> Estimate:
    return Estimate(mean=r.number("mean"), low=r.number("low"), high=r.number("high"))


def _digest(r: Reader, key: str) -> str:
    text = r.text(key)
    if not _SHA256.fullmatch(text):
        raise BundleError(f"{r.where}.{key}: expected 64 hexadecimal digits, got {text!r:.60}; {r.advice}")
    return text
