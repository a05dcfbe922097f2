"""The graphs of a bundle: text, decoder, and one denoising step for each variant of the method."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from tgate_engine.manifest import Carry, TensorSpec, Tokenizer
from tgate_engine.rows import STEP_ROW
from tgate_export.gating import AttentionSite, GatedStep, Variant, carry_name
from tgate_export.graphs import TracedGraph, store_linears_transposed, trace
from tgate_export.job import Job
from tgate_export.modules import Decoder, fake_module

TEXT_GRAPH = "text_encoder"
DECODER_GRAPH = "vae_decoder"


def trace_text(job: Job, mode: FakeTensorMode, tokenizers: Sequence[Tokenizer]) -> TracedGraph:
    """One prompt's token ids, one input per tokenizer, to its conditioning."""
    family, checkpoint = job.family, job.checkpoint
    dtype = getattr(torch, job.dtype)
    encoders = [fake_module(mode, family, checkpoint, c, dtype) for c in family.text_components]
    module = family.text(encoders)
    transposed = store_linears_transposed(module)
    return trace(
        TEXT_GRAPH,
        module,
        mode=mode,
        inputs=[TensorSpec(name=t.input, dtype="int64", shape=(1, t.length)) for t in tokenizers],
        outputs={c.conditioning.name: 1 for c in job.conditioning if c.conditioning.source == "text"},
        batch=(1, 1),
        components={f"{c}.": c for c in family.text_components},
        transposed=transposed,
    )


def trace_decoder(job: Job, mode: FakeTensorMode) -> TracedGraph:
    """One image's latents to its pixels."""
    family, checkpoint = job.family, job.checkpoint
    dtype = getattr(torch, job.decoder_dtype)
    module = Decoder(
        fake_module(mode, family, checkpoint, family.decoder, dtype), checkpoint.config(family.decoder), dtype
    )
    transposed = store_linears_transposed(module)
    return trace(
        DECODER_GRAPH,
        module,
        mode=mode,
        inputs=[TensorSpec(name="latents", dtype="float32", shape=(1, *job.latents))],
        outputs={"image": 1},
        batch=(1, 1),
        components={"vae.": family.decoder},
        transposed=transposed,
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
    step = GatedStep(denoiser, job.family.denoise, sites, variant, tuple(conditioning), getattr(torch, job.dtype))

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
        return trace(
            variant.name,
            step,
            mode=mode,
            inputs=[spec(name) for name in step.input_names],
            outputs=step.output_batches,
            batch=job.settings.batch,
            components={"denoiser.": job.family.denoiser},
            transposed=frozenset(f"denoiser.{name}" for name in transposed),
        )


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
