"""What eager PyTorch computes from a few inputs, recorded beside the bundle so that it can prove itself anywhere.

Text, picture, ungated trajectory and decoder are diffusers' own (:mod:`tgate_export.oracle`), so they check how the
checkpoint was read. Gated trajectories are the method here over the same modules. All are as short as they can be
while running every graph, in float32: they check tracing, conversion, weights, plan and runtime at once.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path

import diffusers
import safetensors.torch
import torch
from torch import Tensor, nn

from tgate_engine.conditioning import halves, masked_halves, reference_halves
from tgate_engine.control import controls_for, picture_name
from tgate_engine.graph import GraphSpec
from tgate_engine.manifest import Golden, Tokenizer
from tgate_engine.plan import Plan
from tgate_engine.plan_build import build_plan
from tgate_engine.sampler import HISTORY, Sampler
from tgate_engine.step import LATENTS, NEXT_LATENTS, NOISE, OUTPUT, STEP, past, step_row
from tgate_export.families.base import Texts, control_component
from tgate_export.ip_adapter import COMPONENTS, ENCODER
from tgate_export.job import Job
from tgate_export.methods.base import FULL, Program, Settings, Variant, ungated
from tgate_export.methods.late import PREFIX, shared_out
from tgate_export.oracle import Oracle
from tgate_export.sampling import compile_sampler
from tgate_export.step import ControlStep, DenoisingStep
from tgate_export.tracing import (
    DECODER_GRAPH,
    ENCODER_GRAPH,
    IMAGE_GRAPH,
    PREVIEW_GRAPH,
    REFERENCE_GRAPH,
    TEXT_GRAPH,
    reference_outputs,
)

GOLDEN_PROMPT = "a large red circle above a small blue square"
GOLDEN_NEGATIVE = "a photo"
GOLDEN_SEED = 2404
GOLDEN_SCALE = 0.6
"""Of the picture beside the prompt, with an IP-Adapter."""

UNGATED, UNGATED_STEPS = "ungated", 3
"""Name and length of the trajectory that is diffusers' own: long enough for samplers that look back."""

TOLERANCES = {"float32": 1e-4, "float16": 3e-2, "bfloat16": 2e-1}
"""Largest absolute difference over largest absolute value, by the dtype of the graphs: a few steps of rounding."""

SHAKE = 1e-6
"""Some float32 rounding errors. A trajectory that this much of its noise moves further than its tolerance is allowed
four times what PyTorch itself was moved: now and then a trained network sits on an edge."""

IMAGE_TOLERANCES = {"float32": 1e-3, "float16": 3e-2, "bfloat16": 1.25e-1}
"""As above, for what the decoder's pixels are rounded from, and for the latents that the encoder makes of a picture."""


def record(
    job: Job,
    stage: Path,
    tokenizers: Sequence[Tokenizer],
    graphs: Mapping[str, GraphSpec],
    carries: Collection[str],
    *,
    on_golden: Callable[[str], None] = lambda name: None,
) -> dict[str, Golden]:
    """Record every golden of a bundle below ``stage``, for one image of each size. ``graphs``: those of any shape.
    ``on_golden`` hears of each before it is recorded.

    Raises :class:`ExportError` where diffusers itself cannot run the checkpoint.
    """
    recorded = dict[str, Golden]()
    for size in job.sizes:
        own = _record_size(job.at(size), stage / "golden", tokenizers, graphs, carries, on_golden)
        suffix = "" if size == job.sizes[0] else f"-{size}"
        recorded |= {f"{name}{suffix}": golden for name, golden in own.items()}
    return recorded


def _record_size(
    job: Job,
    directory: Path,
    tokenizers: Sequence[Tokenizer],
    graphs: Mapping[str, GraphSpec],
    carries: Collection[str],
    on_golden: Callable[[str], None],
) -> dict[str, Golden]:
    family, oracle, recorded = job.family, Oracle(job), dict[str, Golden]()
    suffix = "" if job.size == job.sizes[0] else f"-{job.size}"
    generator = torch.Generator().manual_seed(GOLDEN_SEED)
    on_golden(f"conditioning, {job.size}")
    conditioning = _conditioning(job, oracle, tokenizers, generator, directory, recorded)
    if "encoder" in job.components and oracle.fits(family.decoder):
        picture = _picture(job.size.height, job.size.width)
        mask = _mask(job.size.height, job.size.width) if job.inputs_from("masked") else None
        latents, deviation = oracle.encoded(picture, mask)
        recorded["latents"] = _record_graph(
            job,
            directory / f"latents{suffix}.safetensors",
            ENCODER_GRAPH,
            {"picture": picture} if mask is None else {"picture": picture, "mask": mask},
            {"latents": latents, "deviation": deviation},
            IMAGE_TOLERANCES[job.decoder_dtype],
            oracle.name,
        )

    if job.preview is not None:
        latents = torch.randn((1, *job.latents), generator=torch.Generator().manual_seed(GOLDEN_SEED))
        recorded["preview"] = _record_graph(
            job,
            directory / f"preview{suffix}.safetensors",
            PREVIEW_GRAPH,
            {"latents": latents},
            {"decoded": oracle.previewed(latents)},
            TOLERANCES[job.dtype],
            f"AutoencoderTiny of diffusers {diffusers.__version__}",
        )
    networks = dict.fromkeys(map(job.denoiser_of, job.variants))
    if not oracle.fits(*networks, *([family.decoder] if "decoder" in job.components else [])):
        return recorded
    denoiser, *others = map(oracle.module, networks)
    second = others[0] if others else None
    shape = (1, *job.latents)
    noise = torch.randn(shape, generator=generator)
    by_name = {variant.name: variant for variant in job.variants}
    made: dict[str, tuple[Plan, list[Tensor], dict[int, Tensor]]] = {}
    moved: dict[str, float] = {}  # by trajectory, what SHAKE of its noise moves it; diffusers' is not shaken
    decoded: Tensor | None = None
    for name, (sampler, program) in _programs(job).items():
        on_golden(f"{name}, {job.size}")
        short = build_plan(
            name,
            program,
            sampler=sampler,
            guidance_scale=job.guidance_scale,
            graphs=graphs,
            carries=carries,
            settings={"n": sampler.steps},
        )
        noises = {i: torch.randn(shape, generator=generator) for i, call in enumerate(sampler.calls) if call.noise}
        if name == UNGATED:
            trajectory = oracle.trajectory(denoiser, noise, conditioning, sampler.steps, noises, second)
            latents, decoded = trajectory.latents, trajectory.decoded
        else:
            latents = walk(job, short, denoiser, by_name, noise, conditioning, noises, second)
            shaken = walk(job, short, denoiser, by_name, noise * (1 + SHAKE), conditioning, noises, second)
            pairs = zip(shaken, latents, strict=True)
            moved[name] = max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)
        made[name] = (short, latents, noises)
    for net in job.controls:
        if oracle.fits(family.denoiser, control_component(net)):
            on_golden(f"ControlNet {net}, {job.size}")
            short = made[UNGATED][0]
            path = directory / f"control-{net}{suffix}.safetensors"
            recorded[f"control-{net}"] = _record_control(job, path, oracle, net, graphs, short, noise, conditioning)
    for name, (short, latents, noises) in made.items():
        tensors = {
            "latents.0": noise,
            **{f"latents.{i}": x for i, x in enumerate(latents) if i > 0},
            **{f"noise.{i}": x for i, x in noises.items()},
            **{f"conditioning.{name}": value for name, value in conditioning.items()},
            "guidance_scale": torch.tensor(short.guidance_scale),
        }
        path = directory / f"{name}{suffix}.safetensors"
        _save(path, tensors)
        recorded[name] = Golden(
            file=f"golden/{path.name}",
            size=str(job.size),
            tolerance=max(TOLERANCES[job.dtype], 4 * moved.get(name, max(moved.values()))),
            plan=short,
            oracle=oracle.name if name == UNGATED else f"the method in tgate-engine, over modules of {oracle.name}",
        )
    if decoded is not None:
        recorded["image"] = _record_graph(
            job,
            directory / f"image{suffix}.safetensors",
            DECODER_GRAPH,
            {"latents": made[UNGATED][1][-1][:1]},
            {"decoded": decoded},
            IMAGE_TOLERANCES[job.decoder_dtype],
            oracle.name,
        )
    return recorded


def _record_control(
    job: Job,
    path: Path,
    oracle: Oracle,
    net: str,
    graphs: Mapping[str, GraphSpec],
    plan: Plan,
    noise: Tensor,
    conditioning: Mapping[str, Tensor],
) -> Golden:
    """Save what a ControlNet gives beside the graph that computes everything, at the first step of ``plan``."""
    beside = controls_for(graphs, [FULL])
    name, spec = next((n, s) for n, s in beside.items() if picture_name(net) in s.input_names())
    step = ControlStep(
        oracle.module(control_component(net)),
        job.family.look,
        net,
        spec.output_names(),
        tuple(dict.fromkeys(each.rpartition(".")[0] for each in conditioning)),
        torch.float32,
    )
    given = {
        **conditioning,
        LATENTS: noise * plan.sampler.initial_scale,
        STEP: torch.from_numpy(step_row(plan.steps[0].call, job.guidance_scale))[None],
        picture_name(net): _picture(job.size.height, job.size.width),
    }
    with torch.no_grad():
        outputs = dict(zip(step.output_names, step(*(given[each] for each in step.input_names)), strict=True))
    inputs = {each: given[each] for each in spec.input_names()}
    return _record_graph(job, path, name, inputs, outputs, TOLERANCES[job.dtype], oracle.name)


def walk(
    job: Job,
    plan: Plan,
    denoiser: nn.Module,
    variants: Mapping[str, Variant],
    noise: Tensor,
    conditioning: Mapping[str, Tensor],
    step_noise: Mapping[int, Tensor] | None = None,
    second: nn.Module | None = None,
) -> list[Tensor]:
    """Run a plan in eager PyTorch, float32, on the device of ``noise``, where all else must be, too. Returns the
    latents before the first step and after each.

    ``noise``: unit variance, [B, ...]. ``conditioning``: ``<name>.<half>``, each [B, ...]. ``step_noise``: of the
    steps that draw noise, by index. ``second``: the network of late graphs, where there are any.
    """
    family = job.family
    names = tuple(dict.fromkeys(name.rpartition(".")[0] for name in conditioning))
    batch = noise.shape[0]
    latents = [noise * plan.sampler.initial_scale]
    outputs: list[Tensor] = []
    carries: dict[str, Tensor] = {}
    nothing = torch.zeros_like(noise)
    for step in plan.steps:
        variant = variants[step.graph]
        network = second if variant.late else denoiser
        assert network is not None  # whoever has late graphs brings it
        ramp = job.ramp(variant)
        gated = DenoisingStep(
            network,
            family.denoise,
            variant,
            names,
            torch.float32,
            ramp,
            job.settings.guidance_rescale,
            family.lengths,
            family.guidance_beyond,
        )
        named = {
            **conditioning,
            **carries,
            LATENTS: latents[-1],
            NOISE: (step_noise or {}).get(step.index, nothing),
            STEP: torch.from_numpy(step_row(step.call, job.guidance_scale)).to(noise.device).expand(batch, -1),
            **{past(LATENTS, j): latents[-1 - j] if j < len(latents) else nothing for j in range(1, HISTORY + 1)},
            **{past(OUTPUT, j): outputs[-j] if j <= len(outputs) else nothing for j in range(1, HISTORY + 1)},
        }
        with torch.no_grad(), gated.attached():
            results = dict(zip(gated.output_names, gated(*(named[n] for n in gated.input_names)), strict=True))
        latents.append(results[NEXT_LATENTS])
        outputs.append(results[OUTPUT])
        carries.update({name: results[name] for name in step.writes})
    return latents


def _conditioning(
    job: Job,
    oracle: Oracle,
    tokenizers: Sequence[Tokenizer],
    generator: torch.Generator,
    directory: Path,
    recorded: dict[str, Golden],
) -> dict[str, Tensor]:
    """``<name>.<half>`` to [1, ...] of the golden request. Records the graph that makes it, where there is one."""
    positive: Texts = {}
    negative: Texts | None = None
    suffix = "" if job.size == job.sizes[0] else f"-{job.size}"
    if "text" in job.components and oracle.fits(*job.family.text_components):
        rows, positive, negative = oracle.text(GOLDEN_PROMPT, GOLDEN_NEGATIVE)
        if job.size == job.sizes[0]:  # the text graph knows no size
            ids = {spec.input: torch.tensor([row]) for spec, row in zip(tokenizers, rows, strict=True)}
            path = directory / "text.safetensors"
            recorded["text"] = _record_graph(job, path, TEXT_GRAPH, ids, positive, TOLERANCES[job.dtype], oracle.name)
    if "image" in job.components and oracle.fits(*job.family.image_parts(job.checkpoint)):
        picture = _picture(job.size.height, job.size.width)
        noise = torch.randn((1, 3, job.size.height, job.size.width), generator=generator)
        made = oracle.image(picture, noise)
        recorded["conditioning"] = _record_graph(
            job,
            directory / f"conditioning{suffix}.safetensors",
            IMAGE_GRAPH,
            {"picture": picture, "noise": noise},
            made,
            TOLERANCES[job.dtype],
            oracle.name,
        )
        positive = {**positive, **made}
    drawn: dict[str, Tensor] = {}  # of what nothing makes: anything will do
    for c in job.conditioning:
        if c.conditioning.source in ("text", "image") and c.conditioning.name not in positive:
            shape = (1, *c.shape)
            drawn[c.conditioning.name] = torch.ones(shape) if c.mask else torch.randn(shape, generator=generator)
    if drawn:
        other = {n: -value if value.min() < 0 else value for n, value in drawn.items()}
        positive, negative = {**positive, **drawn}, {**(negative or {}), **other}
    beside = _reference(job, oracle, generator, directory, recorded) | _masked(job, generator)
    return both_halves(job, positive, negative) | beside


def _reference(
    job: Job, oracle: Oracle, generator: torch.Generator, directory: Path, recorded: dict[str, Golden]
) -> dict[str, Tensor]:
    """``<name>.<half>`` to [1, ...] of the picture beside the golden request's prompt; nothing without an IP-Adapter.
    Records the graph that makes it, which knows no size."""
    if not job.inputs_from("reference"):
        return {}
    shapes = {name: (1, *c.shape) for c in job.inputs_from("reference") for name in reference_outputs(job)}
    tokens: Texts = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    if oracle.fits(*COMPONENTS):
        side = int(job.family.config(job.checkpoint, ENCODER)["image_size"])
        picture = _picture(side, side)
        tokens = oracle.reference(picture)
        if job.size == job.sizes[0]:
            path, tolerance = directory / "reference.safetensors", TOLERANCES[job.dtype]
            inputs = {"picture": picture}
            recorded["reference"] = _record_graph(job, path, REFERENCE_GRAPH, inputs, tokens, tolerance, oracle.name)
    rows = reference_halves(
        [c.conditioning for c in job.conditioning],
        {name: value.numpy() for name, value in tokens.items()},
        GOLDEN_SCALE,
        guided=job.guided,
    )
    return {name: torch.from_numpy(values) for name, values in rows.items()}


def _masked(job: Job, generator: torch.Generator) -> dict[str, Tensor]:
    """``<name>.<half>`` to [1, 1 + C, h, w] of what lies around the golden request's mask; nothing of other models."""
    if not job.inputs_from("masked"):
        return {}
    latents = torch.randn(job.latents, generator=generator)
    mask = _mask(*job.latents[-2:])[0].float() / 255
    conditioning = [c.conditioning for c in job.conditioning]
    rows = masked_halves(conditioning, mask.numpy(), latents.numpy(), guided=job.guided)
    return {name: torch.from_numpy(values) for name, values in rows.items()}


def both_halves(job: Job, positive: Texts, negative: Texts | None) -> dict[str, Tensor]:
    """``<name>.<half>`` to [1, ...] of a job's size, as :func:`tgate_engine.conditioning.halves` puts them together."""
    rows = halves(
        [c.conditioning for c in job.conditioning],
        {c.conditioning.name: c.value for c in job.conditioning},
        {name: value.numpy() for name, value in positive.items()},
        None if negative is None else {name: value.numpy() for name, value in negative.items()},
        guided=job.guided,
    )
    return {name: torch.from_numpy(values) for name, values in rows.items()}


def _picture(height: int, width: int) -> Tensor:
    """A smooth picture with an edge, uint8 [1, H, W, 3]."""
    rows, columns = torch.meshgrid(torch.linspace(0, 255, height), torch.linspace(0, 255, width), indexing="ij")
    disc = (rows - 128) ** 2 + (columns - 128) ** 2 < 60**2
    return torch.stack([rows, columns, torch.where(disc, 220.0, 30.0)], dim=-1).to(torch.uint8)[None]


def _mask(height: int, width: int) -> Tensor:
    """A mask of the lower right, uint8 [1, H, W]: 255 where it is drawn anew."""
    mask = torch.zeros(1, height, width, dtype=torch.uint8)
    mask[:, height // 3 :, width // 2 :] = 255
    return mask


def _programs(job: Job) -> dict[str, tuple[Sampler, Program]]:
    """Short programs that between them run every graph of the bundle; the first is what diffusers does. Of a second
    network's graphs each of the others has a program of its own, which runs no others."""
    lead_in, short = job.sampler.lead_in, job.method.short(job.method_settings)
    first, sampler = (compile_sampler(job.sampler.name, job.scheduler, n) for n in (UNGATED_STEPS, short.steps))
    baselines = job.method.baselines(Settings(steps=short.steps, gate=2), lead_in, guided=job.guided)
    own = {"gated": job.method.program(short, lead_in)}
    own |= {name: program for name, program in baselines.items() if name not in (UNGATED, *own)}
    programs = {UNGATED: (first, job.made(ungated(UNGATED_STEPS, lead_in), first))}
    programs |= {name: (sampler, program) for name, program in own.items()}
    if job.late is not None:
        programs |= {f"{PREFIX}{n}": (sampler, shared_out(each, [True] * len(each))) for n, each in own.items()}
    return programs


def _record_graph(
    job: Job,
    path: Path,
    graph: str,
    inputs: Mapping[str, Tensor],
    outputs: Mapping[str, Tensor],
    tolerance: float,
    oracle: str,
) -> Golden:
    """Save one run of a graph."""
    tensors = {f"input.{name}": value for name, value in inputs.items()}
    tensors |= {f"output.{name}": value for name, value in outputs.items()}
    _save(path, tensors)
    file = f"{path.parent.name}/{path.name}"
    return Golden(file=file, size=str(job.size), tolerance=tolerance, graph=graph, oracle=oracle)


def _save(path: Path, tensors: Mapping[str, Tensor]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    safetensors.torch.save_file({name: t.detach().contiguous().clone() for name, t in tensors.items()}, path)
