"""The graphs of a bundle: text or image, decoder, and one denoising step for each variant of the method."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from tgate_engine.errors import ExportError
from tgate_engine.manifest import Carry, TensorSpec, Tokenizer
from tgate_engine.rows import STEP_ROW
from tgate_export.gating import AttentionSite, GatedStep, Variant, carry_name
from tgate_export.graphs import TracedGraph, store_linears_transposed, trace
from tgate_export.job import Job
from tgate_export.modules import Decoder, fake_module

TEXT_GRAPH = "text_encoder"
IMAGE_GRAPH = "image_encoder"
DECODER_GRAPH = "vae_decoder"


def trace_text(job: Job, mode: FakeTensorMode, tokenizers: Sequence[Tokenizer]) -> TracedGraph:
    """One prompt's token ids, one input per tokenizer, to its conditioning."""
    encoders = [_fake(job, mode, component) for component in job.family.text_components]
    module = job.family.text(encoders, job.settings.clip_skip)
    inputs = [TensorSpec(name=t.input, dtype="int64", shape=(1, t.length)) for t in tokenizers]
    return _trace_encoder(job, mode, TEXT_GRAPH, module, inputs, "text")


def trace_image(job: Job, mode: FakeTensorMode) -> TracedGraph:
    """The picture that a request starts from, and noise to add to it, to its conditioning."""
    family, height, width = job.family, job.size.height, job.size.width
    module = family.image([_fake(job, mode, component) for component in family.image_components], job.checkpoint)
    inputs = [
        TensorSpec(name="picture", dtype="uint8", shape=(1, height, width, 3)),
        TensorSpec(name="noise", dtype="float32", shape=(1, 3, height, width)),
    ]
    return _trace_encoder(job, mode, IMAGE_GRAPH, module, inputs, "image")


def trace_decoder(job: Job, mode: FakeTensorMode) -> TracedGraph:
    """One result's latents to its pixels, and beside them to what they were rounded from."""
    family = job.family
    vae, scaling = _fake(job, mode, family.decoder), family.scaling(job.checkpoint)
    module = Decoder(vae, scaling, getattr(torch, job.decoder_dtype), family.frames_axis)
    return trace(
        DECODER_GRAPH,
        module,
        mode=mode,
        inputs=[TensorSpec(name="latents", dtype="float32", shape=(1, *job.latents))],
        outputs=["image", "decoded"],
        batch=(1, 1),
        components={"vae.": family.decoder},
        transposed=store_linears_transposed(module),
    )


def trace_step(
    job: Job,
    mode: FakeTensorMode,
    denoiser: nn.Module,
    transposed: frozenset[str],
    sites: Sequence[AttentionSite],
    variant: Variant,
    carries: Mapping[str, Carry],
) -> TracedGraph:
    """One denoising step of ``variant``; ``carries`` are those that the graphs traced before it give."""
    conditioning = {c.conditioning.name: c for c in job.conditioning}
    step = GatedStep(
        denoiser,
        job.family.denoise,
        sites,
        variant,
        tuple(conditioning),
        getattr(torch, job.dtype),
        job.family.guidance_ramp(job.latents),
        job.settings.guidance_rescale,
    )

    def spec(name: str) -> TensorSpec:
        if name in carries:
            return TensorSpec(name=name, dtype=carries[name].dtype, shape=carries[name].shape)
        stem = name.rpartition(".")[0]
        if stem in conditioning:
            dtype = job.dtype if conditioning[stem].follows_dtype else "float32"
            return TensorSpec(name=name, dtype=dtype, shape=("batch", *conditioning[stem].shape))
        tail = (STEP_ROW,) if name == "step" else job.latents
        return TensorSpec(name=name, dtype="float32", shape=("batch", *tail))

    with step.attached():
        graph = trace(
            variant.name,
            step,
            mode=mode,
            inputs=[spec(name) for name in step.input_names],
            outputs=step.output_names,
            batch=job.settings.batch,
            components={"denoiser.": job.family.denoiser},
            transposed=frozenset(f"denoiser.{name}" for name in transposed),
        )
    if ("cross", True) in variant.reuses:
        for name in (t.name for t in graph.inputs):
            stem = name.rpartition(".")[0]
            if stem in conditioning and conditioning[stem].attended:
                raise ExportError(
                    f"{job.checkpoint.where}: with cross-attention reused the {job.family.denoiser} still reads "
                    f"{name}: it takes its conditioning in another place as well, and cannot be gated"
                )
    return graph


def carries_of(graph: TracedGraph, sites: Sequence[AttentionSite], variant: Variant) -> list[Carry]:
    """The carries that a graph stores, with the shapes it gives them in."""
    outputs = {tensor.name: tensor for tensor in graph.outputs}
    found = []
    for kind, mean in variant.stores:
        for i, site in enumerate(s for s in sites if s.kind == kind):
            tensor = outputs[carry_name(kind, i, mean)]
            found.append(
                Carry(
                    name=tensor.name,
                    module=site.module,
                    attention=kind,
                    mean=mean,
                    dtype=tensor.dtype,
                    shape=tensor.shape,
                )
            )
    return found


def _trace_encoder(
    job: Job, mode: FakeTensorMode, name: str, module: nn.Module, inputs: Sequence[TensorSpec], source: str
) -> TracedGraph:
    """A graph of one request's conditioning of that source. Parameters are prefixed by their components' names."""
    components = job.family.text_components if source == "text" else job.family.image_components
    return trace(
        name,
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
