"""The graphs of a bundle: text or image, decoder, and one denoising step for each variant of the method.

A job is of one size here (:meth:`~tgate_export.job.Job.at`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from tgate_engine.control import picture_name, residual_name, scale_name
from tgate_engine.errors import ExportError
from tgate_engine.graph import BATCH, CONTROL, DECODE, DENOISE, ENCODE, IMAGE, PREVIEW, REFERENCE, TEXT, TensorSpec
from tgate_engine.manifest import Tokenizer
from tgate_engine.step import HALVES, STEP, STEP_ROW, half
from tgate_export.families.base import control_component
from tgate_export.graphs import TracedGraph, store_linears_transposed, trace
from tgate_export.ip_adapter import COMPONENTS, ENCODER
from tgate_export.job import Job
from tgate_export.methods.base import Variant
from tgate_export.modules import Decoder, Encoder, fake_module, faked
from tgate_export.preview_decoder import COMPONENT
from tgate_export.step import ControlStep, DenoisingStep

TEXT_GRAPH = "text_encoder"
IMAGE_GRAPH = "image_encoder"
DECODER_GRAPH = "vae_decoder"
ENCODER_GRAPH = "vae_encoder"
PREVIEW_GRAPH = "preview_decoder"
REFERENCE_GRAPH = "reference_encoder"


def trace_text(job: Job, mode: FakeTensorMode, tokenizers: Sequence[Tokenizer]) -> TracedGraph:
    """One prompt's token ids, one input per tokenizer, to its conditioning."""
    encoders = [_fake(job, mode, component) for component in job.family.text_components]
    module = job.family.text(encoders, job.settings.clip_skip)
    inputs = [TensorSpec(name=t.input, dtype="int64", shape=(1, t.length)) for t in tokenizers]
    return _trace_encoder(job, mode, TEXT_GRAPH, module, inputs, "text")


def trace_image(job: Job, mode: FakeTensorMode) -> TracedGraph:
    """The picture that a request starts from, and noise to add to it, to its conditioning."""
    family, height, width = job.family, job.size.height, job.size.width
    encoders = [_fake(job, mode, component) for component in family.image_parts(job.checkpoint)]
    module = family.image(encoders, job.checkpoint, job.size)
    inputs = [
        TensorSpec(name="picture", dtype="uint8", shape=(1, height, width, 3)),
        TensorSpec(name="noise", dtype="float32", shape=(1, 3, height, width)),
    ]
    return _trace_encoder(job, mode, IMAGE_GRAPH, module, inputs, "image")


def trace_decoder(job: Job, mode: FakeTensorMode) -> TracedGraph:
    """One result's latents to its pixels, and beside them to what they were rounded from."""
    family = job.family
    vae, scaling = _fake(job, mode, family.decoder), family.scaling(job.checkpoint)
    module = Decoder(
        vae,
        scaling,
        getattr(torch, job.decoder_dtype),
        family.frames_axis,
        together=family.decodes_frames_together,
    )
    return trace(
        DECODER_GRAPH,
        DECODE,
        module,
        mode=mode,
        inputs=[TensorSpec(name="latents", dtype="float32", shape=(1, *job.latents))],
        outputs=["image", "decoded"],
        batch=(1, 1),
        components={"vae.": family.decoder},
        transposed=store_linears_transposed(module),
    )


def trace_preview(job: Job, mode: FakeTensorMode) -> TracedGraph:
    """One picture's latents to its pixels, and to what they were rounded from, by the small decoder."""
    preview, dtype = job.preview, getattr(torch, job.dtype_of(COMPONENT))
    assert preview is not None  # whoever asks has seen it
    module = Decoder(faked(mode, preview.build, dtype), preview.scaling(), dtype)
    return trace(
        PREVIEW_GRAPH,
        PREVIEW,
        module,
        mode=mode,
        inputs=[TensorSpec(name="latents", dtype="float32", shape=(1, *job.latents))],
        outputs=["image", "decoded"],
        batch=(1, 1),
        components={"vae.": COMPONENT},
        transposed=store_linears_transposed(module),
    )


def trace_encoder(job: Job, mode: FakeTensorMode) -> TracedGraph:
    """A picture that requests begin from, to the mean and the standard deviation of its latents; of an inpainting
    model, without what a mask covers."""
    family = job.family
    height, width = job.size.height, job.size.width
    mask = [TensorSpec(name="mask", dtype="uint8", shape=(1, height, width))] if job.inputs_from("masked") else []
    vae, scaling = _fake(job, mode, family.decoder), family.scaling(job.checkpoint)
    module = Encoder(vae, scaling, getattr(torch, job.decoder_dtype))
    return trace(
        ENCODER_GRAPH,
        ENCODE,
        module,
        mode=mode,
        inputs=[TensorSpec(name="picture", dtype="uint8", shape=(1, height, width, 3)), *mask],
        outputs=["latents", "deviation"],
        batch=(1, 1),
        components={"vae.": family.decoder},
        transposed=store_linears_transposed(module),
    )


def trace_reference(job: Job, mode: FakeTensorMode) -> TracedGraph:
    """A picture beside the prompt, as its encoder takes them, to what an IP-Adapter adds for it, ``<name>.<half>``."""
    family, side = job.family, int(job.family.config(job.checkpoint, ENCODER)["image_size"])
    encoders = [_fake(job, mode, component) for component in COMPONENTS]
    module = family.reference(job.checkpoint, encoders, guided=job.guided)
    return trace(
        REFERENCE_GRAPH,
        REFERENCE,
        module,
        mode=mode,
        inputs=[TensorSpec(name="picture", dtype="uint8", shape=(1, side, side, 3))],
        outputs=reference_outputs(job),
        batch=(1, 1),
        components={f"{component}.": component for component in COMPONENTS},
        transposed=store_linears_transposed(module),
    )


def reference_outputs(job: Job) -> list[str]:
    """Names of what the reference graph gives."""
    halves = HALVES if job.guided else HALVES[1:]
    return [half(c.conditioning.name, which) for c in job.inputs_from("reference") for which in halves]


def trace_step(
    job: Job,
    mode: FakeTensorMode,
    denoiser: nn.Module,
    transposed: frozenset[str],
    variant: Variant,
    batch: tuple[int, int],
    carries: Mapping[str, TensorSpec],
) -> TracedGraph:
    """One denoising step of ``variant``, whose network ``denoiser`` is; ``carries`` are those that the graphs traced
    before it give."""
    conditioning = {c.conditioning.name: c for c in job.conditioning}
    step = DenoisingStep(
        denoiser,
        job.family.denoise,
        variant,
        tuple(conditioning),
        getattr(torch, job.dtype),
        job.ramp(variant),
        job.settings.guidance_rescale,
        job.family.lengths,
        job.family.guidance_beyond,
        {net: len(shapes) for net, shapes in job.controls.items()},
        job.family.steered,
    )
    given = {**carries, **_control_specs(job)}

    def spec(name: str) -> TensorSpec:
        if name in given:
            return given[name]
        stem = name.rpartition(".")[0]
        if stem in conditioning:
            dtype = job.dtype if conditioning[stem].follows_dtype else "float32"
            return TensorSpec(name=name, dtype=dtype, shape=(BATCH, *conditioning[stem].shape))
        tail = (STEP_ROW,) if name == STEP else job.latents
        return TensorSpec(name=name, dtype="float32", shape=(BATCH, *tail))

    with step.attached():
        graph = trace(
            variant.name,
            DENOISE,
            step,
            mode=mode,
            inputs=[spec(name) for name in step.input_names],
            outputs=step.output_names,
            batch=batch,
            components={"denoiser.": job.denoiser_of(variant)},
            transposed=frozenset(f"denoiser.{name}" for name in transposed),
        )
    if any(part.ends_text for part in variant.parts):
        for name in (t.name for t in graph.inputs):
            stem = name.rpartition(".")[0]
            if stem in conditioning and conditioning[stem].attended:
                raise ExportError(
                    f"{job.checkpoint.where}: with cross-attention reused the {job.family.denoiser} still reads "
                    f"{name}: it takes its conditioning in another place as well, and cannot be gated"
                )
    return graph


def trace_control(
    job: Job,
    mode: FakeTensorMode,
    net: str,
    module: nn.Module,
    transposed: frozenset[str],
    name: str,
    wanted: Sequence[str],
    batch: tuple[int, int],
) -> TracedGraph:
    """A ControlNet's graph, which gives ``wanted``: what a denoising graph takes of it. ``module``: the network."""
    conditioning = {c.conditioning.name: c for c in job.conditioning}
    step = ControlStep(module, job.family.look, net, wanted, tuple(conditioning), getattr(torch, job.dtype))

    def spec(each: str) -> TensorSpec:
        stem = each.rpartition(".")[0]
        if each == picture_name(net):
            return TensorSpec(name=each, dtype="uint8", shape=(BATCH, job.size.height, job.size.width, 3))
        if stem in conditioning:
            dtype = job.dtype if conditioning[stem].follows_dtype else "float32"
            return TensorSpec(name=each, dtype=dtype, shape=(BATCH, *conditioning[stem].shape))
        return TensorSpec(name=each, dtype="float32", shape=(BATCH, *((STEP_ROW,) if each == STEP else job.latents)))

    return trace(
        name,
        CONTROL,
        step,
        mode=mode,
        inputs=[spec(each) for each in step.input_names],
        outputs=step.output_names,
        batch=batch,
        components={"net.": control_component(net)},
        transposed=frozenset(f"net.{each}" for each in transposed),
    )


def _control_specs(job: Job) -> dict[str, TensorSpec]:
    """What the denoiser may take of the job's ControlNets."""
    specs = [TensorSpec(name=scale_name(net), dtype="float32", shape=(BATCH,)) for net in job.controls]
    specs += [
        TensorSpec(name=half(residual_name(net, index), which), dtype=job.dtype, shape=(BATCH, *shape))
        for net, shapes in job.controls.items()
        for index, shape in enumerate(shapes)
        for which in HALVES
    ]
    return {spec.name: spec for spec in specs}


def _trace_encoder(
    job: Job, mode: FakeTensorMode, name: str, module: nn.Module, inputs: Sequence[TensorSpec], source: str
) -> TracedGraph:
    """A graph of one request's conditioning of that source. Parameters are prefixed by their components' names."""
    components = job.family.text_components if source == "text" else job.family.image_parts(job.checkpoint)
    return trace(
        name,
        TEXT if source == "text" else IMAGE,
        module,
        mode=mode,
        inputs=inputs,
        outputs=encoder_outputs(job, source),
        batch=(1, 1),
        components={f"{component}.": component for component in components},
        transposed=store_linears_transposed(module),
    )


def encoder_outputs(job: Job, source: str) -> list[str]:
    """Names of what the text or the image graph gives: conditioning, and after it ``<name>.negative`` for what a
    negative prompt becomes where that is not what a prompt becomes."""
    names = [c.conditioning.name for c in job.inputs_from(source)]
    own = job.family.negative_text(job.settings.clip_skip) if source == "text" else ()
    return [*names, *(f"{name}.negative" for name in own)]


def _fake(job: Job, mode: FakeTensorMode, component: str) -> nn.Module:
    return fake_module(mode, job.family, job.checkpoint, component, getattr(torch, job.dtype_of(component)))
