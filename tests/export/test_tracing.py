"""Graphs of a job: what they compute, what they take and give, and what cannot be traced for a method."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from tests.conftest import family_settings
from tests.tiny_families import make_tiny
from tgate_engine.bundle import Bundle
from tgate_engine.conditioning import half_names
from tgate_engine.errors import ExportError
from tgate_engine.graph import BATCH, DENOISE
from tgate_engine.step import STEP_INPUTS, STEP_OUTPUTS
from tgate_export.graphs import store_linears_transposed
from tgate_export.job import Job, prepare
from tgate_export.methods.base import Variant
from tgate_export.methods.parts import Part
from tgate_export.modules import fake_module
from tgate_export.tracing import encoder_outputs, trace_step


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny(tmp_path_factory.mktemp("tracing") / "checkpoint", "sd15_a")


@pytest.fixture(scope="module")
def job(root: Path) -> Job:
    return prepare(family_settings("sd15_a", root, root.parent / "bundle"))


def test_what_is_reused_is_not_computed(mini_bundle: Path) -> None:
    """Counted in the graphs themselves: attention products, and the inputs that are left."""
    manifest = Bundle.open(mini_bundle).manifest
    graphs = {name: spec for name, spec in manifest.shapes[0].graphs.items() if spec.role == DENOISE}
    count = {}
    for name, spec in graphs.items():
        model = onnx.load(mini_bundle / spec.file, load_external_data=False)
        count[name] = sum(node.op_type == "Attention" for node in model.graph.node)
    facts = [(str(carry["keeps"]), carry["of"]) for carry in manifest.carries.values()]
    kinds = [keeps for keeps, of in facts if of == "all" or keeps == "cross-attention"]
    cross, own = kinds.count("cross-attention"), kinds.count("self-attention")
    assert count == {
        "full": own + cross,
        "reuse_self": cross,
        "reuse_cross": own,
        "reuse_both": 0,
        "unguided": own + cross,
    }
    inputs = graphs["reuse_cross"].input_names()
    assert not [name for name in inputs if name.startswith("prompt_embeds") or name.endswith(".positive")]
    assert {name for name in inputs if name.endswith(".negative")} == {"pooled.negative", "time_ids.negative"}


def test_every_name_is_of_the_step_the_conditioning_or_a_carry(mini_bundle: Path) -> None:
    """And every tensor but the carries' has the batch first; so have those."""
    manifest = Bundle.open(mini_bundle).manifest
    known = {*STEP_INPUTS, *half_names(manifest.conditioning), *manifest.carries}
    for spec in manifest.shapes[0].graphs.values():
        if spec.role == DENOISE:
            assert set(spec.input_names()) <= known
            assert spec.output_names()[:2] == STEP_OUTPUTS
            assert set(spec.output_names()[2:]) <= manifest.carries.keys()
            assert {t.shape[0] for t in (*spec.inputs, *spec.outputs)} == {BATCH}


def test_a_part_that_ends_text_which_is_read_all_the_same_is_refused(job: Job) -> None:
    class EndsText(Part):
        ends_text = True

    mode = FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv())
    denoiser = fake_module(mode, job.family, job.checkpoint, "unet", torch.float32)
    transposed = store_linears_transposed(denoiser)
    variant = Variant(name="odd", halves="positive", parts=(EndsText(),))
    with pytest.raises(ExportError, match=r"with cross-attention reused the unet still reads prompt_embeds.positive"):
        trace_step(job, mode, denoiser, transposed, variant, (1, 1), {})


def test_encoders_give_conditioning_and_what_a_negative_prompt_becomes(root: Path, job: Job) -> None:
    assert encoder_outputs(job, "text") == ["prompt_embeds"]
    skipping = prepare(family_settings("sd15_a", root, root.parent / "bundle", clip_skip=1))
    assert encoder_outputs(skipping, "text") == ["prompt_embeds", "prompt_embeds.negative"]
