"""Multiply-accumulates counted in the exported graphs, against PyTorch's own counter and against the paper."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tests.tiny_models import load_tiny_sdxl, tiny_model
from tgate_engine.bundle import Bundle
from tgate_engine.manifest import Macs, TensorSpec
from tgate_engine.rows import STEP_ROW
from tgate_engine.schedule import Phase, Schedule, Use
from tgate_export import macs
from tgate_export.checkpoints import Checkpoint
from tgate_export.families.sdxl import Sdxl
from tgate_export.gating import GatedStep, variants
from tgate_export.graphs import store_linears_transposed, trace
from tgate_export.modules import fake_module

TABLES = json.loads((Path(__file__).parent / "data" / "paper_tables.json").read_text())


def test_the_full_graph_counts_what_pytorch_counts(
    tiny_checkpoint: Callable[[str], Path], tiny_bundle: Callable[..., Path]
) -> None:
    """PyTorch's counter sees matrix products, convolutions and attention: two flops for each multiply-accumulate."""
    variant = "sdxl_like"
    model = tiny_model(variant)
    unet = load_tiny_sdxl(tiny_checkpoint(variant)).unet
    graphs = Bundle.open(tiny_bundle(variant)).manifest.graphs

    def flops(batch: int) -> int:
        height, width = model.latent_size
        # Only the plain products of the "math" kernel are seen by the counter on a CPU.
        with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
            unet(
                torch.randn(batch, 4, height, width),
                torch.tensor(1.0),
                torch.randn(batch, model.text_length, sum(model.text_widths)),
                added_cond_kwargs={
                    "text_embeds": torch.randn(batch, model.pooled_width),
                    "time_ids": torch.ones(batch, 6),
                },
            )
        return int(counter.get_total_flops())

    assert 2 * graphs["full"].macs.all == flops(2)
    assert 2 * graphs["unguided"].macs.all == flops(1)
    assert graphs["reuse_both"].macs.all < graphs["reuse_cross"].macs.all < graphs["unguided"].macs.all
    assert graphs["reuse_both"].macs.all == graphs["reuse_both"].macs.paper, "no attention product is left"


def test_a_symbolic_batch_counts_one_image(tiny_bundle: Callable[..., Path]) -> None:
    one = Bundle.open(tiny_bundle("conv_projection")).manifest.graphs
    many = Bundle.open(tiny_bundle("conv_projection", batch=(1, 4))).manifest.graphs
    assert {name: graph.macs for name, graph in one.items()} == {name: graph.macs for name, graph in many.items()}


class _Published(Sdxl):
    """Stable Diffusion XL base 1.0's denoiser, from its published configuration."""

    def build(self, checkpoint: Checkpoint, component: str) -> nn.Module:
        config: dict[str, Any] = {
            "sample_size": 128,
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "block_out_channels": (320, 640, 1280),
            "layers_per_block": 2,
            "transformer_layers_per_block": (1, 2, 10),
            "attention_head_dim": (5, 10, 20),
            "cross_attention_dim": 2048,
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        }
        module: nn.Module = UNet2DConditionModel(**config).eval()
        return module


@pytest.mark.slow
def test_sdxl_at_full_size_counts_what_the_paper_counts(tmp_path: Path) -> None:
    """Every row of Table 2 for SDXL that follows from the published schedule."""
    family = _Published()
    mode = FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv())
    unet = fake_module(mode, family, Checkpoint(tmp_path, {}), "unet", torch.float16)
    sites = family.attention(unet)
    transposed = store_linears_transposed(unet)
    shapes = {"prompt_embeds": (77, 2048), "pooled": (1280,), "time_ids": (6,)}
    carries: dict[str, TensorSpec] = {}
    counts: dict[str, Macs] = {}
    for variant in variants(guided=True, fidelity_reuse=False):
        step = GatedStep(unet, family.denoise, sites, variant, tuple(shapes), torch.float16)

        def spec(name: str) -> TensorSpec:
            if name in carries:
                return carries[name]
            stem = name.rpartition(".")[0]
            if stem in shapes:
                dtype = "float32" if stem == "time_ids" else "float16"
                return TensorSpec(name=name, dtype=dtype, shape=("batch", *shapes[stem]))
            return TensorSpec(
                name=name, dtype="float32", shape=("batch", STEP_ROW) if name == "step" else ("batch", 4, 128, 128)
            )

        with step.attached():
            graph = trace(
                variant.name,
                step,
                mode=mode,
                inputs=[spec(name) for name in step.input_names],
                outputs=step.output_batches,
                batch=(1, 1),
                components={"denoiser.": "unet"},
                transposed=frozenset(f"denoiser.{name}" for name in transposed),
            )
        carries.update({tensor.name: tensor for tensor in graph.outputs})
        counts[variant.name] = macs.count(graph.model, frozenset(graph.weights), 1)

    tera = {name: count.paper / 1e12 for name, count in counts.items()}
    for row in TABLES["rows"]:
        if row["model"] != "SDXL" or (row["m"], row["k"]) == (5, 3):
            continue  # at m = 5, k = 3 the paper counts one reused step where its schedule has none
        m = row["m"] or 25
        schedule = Schedule(steps=25, gate=m, self_interval=row["k"])
        reused = sum(a.phase is Phase.PLANNING and a.self_ is Use.REUSE for a in schedule.actions())
        total = (m - reused) * tera["full"] + reused * tera["reuse_self"] + (25 - m) * tera["reuse_cross"]
        assert total == pytest.approx(row["tera_macs"], rel=5e-4), row
    stopped = next(row for row in TABLES["rows"] if row["model"] == "SDXL, guidance stopped")
    assert 10 * tera["full"] + 15 * tera["unguided"] == pytest.approx(stopped["tera_macs"], rel=5e-4)
    assert {name: round(count.all / 1e12, 3) for name, count in counts.items() if name != "unguided"} == {
        "full": 6.761,
        "reuse_self": 5.070,
        "reuse_cross": 3.103,
    }
