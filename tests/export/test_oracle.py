"""diffusers' own pipeline, asked for what a job will be compared with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import pytest
import safetensors.torch
import torch

from tests.conftest import family_settings
from tests.plain import export_plain
from tests.tiny_families import load_tiny, make_tiny
from tgate_engine.bundle import Bundle
from tgate_engine.errors import ExportError
from tgate_export import oracle
from tgate_export.families.sd import StableDiffusion
from tgate_export.goldens import both_halves
from tgate_export.job import Job, prepare
from tgate_export.oracle import Oracle
from tgate_runtime.verify import verify

VARIANT, PROMPT, NEGATIVE = "sd15_a", "a large red circle", "a photo"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return make_tiny(tmp_path / "checkpoint", VARIANT)


def job_of(root: Path, **more: Any) -> Job:
    return prepare(family_settings(VARIANT, root, root.parent / "bundle", **more))


def rewrite(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text("utf-8")) | changes), "utf-8")


def trajectory(job: Job, steps: int = 2) -> oracle.Trajectory:
    asked = Oracle(job)
    _, positive, negative = asked.text(PROMPT, NEGATIVE)
    noise = torch.randn(1, *job.latents, generator=torch.Generator().manual_seed(2))
    return asked.trajectory(asked.module("unet"), noise, both_halves(job, positive, negative), steps, {})


def test_text_is_what_the_pipeline_makes_of_it(root: Path) -> None:
    ids, positive, negative = Oracle(job_of(root)).text(PROMPT, NEGATIVE)
    pipe = load_tiny(root, VARIANT)
    want, other = pipe.encode_prompt(PROMPT, "cpu", 1, True, NEGATIVE)
    assert torch.equal(positive["prompt_embeds"], want)
    assert torch.equal(negative["prompt_embeds"], other)
    length = pipe.tokenizer.model_max_length
    assert ids == [pipe.tokenizer(PROMPT, padding="max_length", max_length=length).input_ids]


def test_a_trajectory_is_the_pipelines(root: Path) -> None:
    """Its latents after every step, and what its autoencoder makes of the last ones."""
    job = job_of(root, sampler="euler")
    got = trajectory(job, steps=3)
    pipe = load_tiny(root, VARIANT)
    pipe.scheduler = diffusers.EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    seen: list[torch.Tensor] = []
    start = torch.randn(1, *job.latents, generator=torch.Generator().manual_seed(2))

    def note(_pipe: object, _step: int, _t: object, kwargs: dict[str, Any]) -> dict[str, Any]:
        seen.append(kwargs["latents"])
        return kwargs

    pipe(
        PROMPT,
        negative_prompt=NEGATIVE,
        num_inference_steps=3,
        guidance_scale=job.guidance_scale,
        latents=start.clone(),
        height=job.size.height,
        width=job.size.width,
        output_type="latent",
        callback_on_step_end=note,
    )
    assert len(got.latents) == 4
    for mine, want in zip(got.latents[1:], seen, strict=True):
        torch.testing.assert_close(mine, want, rtol=0, atol=1e-5)
    assert got.decoded is not None
    with torch.no_grad():
        want = pipe.vae.decode(seen[-1] / pipe.vae.config.scaling_factor).sample
    torch.testing.assert_close(got.decoded, want, rtol=0, atol=1e-4)


def test_it_says_whose_the_weights_are(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where diffusers cannot load a component, its weights are read here, and the name says so."""
    asked = Oracle(job_of(root))
    plain = f"StableDiffusionPipeline of diffusers {diffusers.__version__}"
    want = asked.module("unet").state_dict()
    assert asked.name == plain

    def fail(*_: object, **__: object) -> None:
        raise OSError("an old layout")

    monkeypatch.setattr(diffusers.UNet2DConditionModel, "from_pretrained", fail)
    module = asked.module("unet")
    assert asked.name == f"{plain}, weights as tgate-engine reads them"
    assert all(torch.equal(value, want[name]) for name, value in module.state_dict().items())


def test_what_fits_depends_on_the_parameters(
    root: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    asked = Oracle(job_of(root))
    count = sum(p.numel() for p in load_tiny(root, VARIANT).unet.parameters())
    for free, fits in ((4 * count * 1.2, True), (4 * count, False)):
        monkeypatch.setattr(oracle, "available_bytes", lambda free=free: free)
        assert asked.fits("unet") is fits
    assert "unet in float32 want 0.0 GiB" in caplog.text


def test_diffusers_own_failure_is_one_line(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise ValueError("first\nsecond")

    monkeypatch.setattr(StableDiffusion, "encode_with", fail)
    with pytest.raises(ExportError, match=r"StableDiffusionPipeline itself cannot run it.*--no-verify") as caught:
        Oracle(job_of(root)).text(PROMPT, NEGATIVE)
    assert "\n" not in str(caught.value)


def enlarge(root: Path, component: str, key: str, factor: float) -> None:
    file = root / component / "diffusion_pytorch_model.safetensors"
    tensors = safetensors.torch.load_file(file)
    safetensors.torch.save_file(tensors | {key: tensors[key] * factor}, file, {"format": "pt"})


def test_numbers_that_are_not_finite_are_refused(root: Path) -> None:
    enlarge(root, "vae", "decoder.conv_in.weight", 1e38)
    with pytest.raises(ExportError, match="itself makes numbers of it that are not finite"):
        trajectory(job_of(root))


def test_a_decoder_beyond_float16_is_refused_with_what_to_do(root: Path, tmp_path: Path) -> None:
    """A VAE that says it needs no float32 (force_upcast false) and does."""
    enlarge(root, "vae", "decoder.conv_in.weight", 1e5)
    rewrite(root / "vae" / "config.json", force_upcast=False)
    with pytest.raises(ExportError, match=r"65504.*force_upcast.*vae/config.json.*--dtype fp32"):
        trajectory(job_of(root, dtype="fp16"))
    rewrite(root / "vae" / "config.json", force_upcast=True)
    settings = family_settings(VARIANT, root, tmp_path / "bundle", dtype="fp16", components=("denoiser", "decoder"))
    assert all(golden.ok for golden in verify(Bundle.open(export_plain(settings)), threads=1))
