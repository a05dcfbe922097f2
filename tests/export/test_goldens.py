"""Goldens are diffusers' own, so an export does not survive what it misreads; and options that reproduce diffusers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import safetensors.torch
import torch
from safetensors.numpy import load_file

from tests.conftest import family_settings
from tests.tiny_families import load_tiny, make_tiny
from tests.tiny_models import load_tiny_sdxl, make_tiny_sdxl
from tgate_engine.bundle import Bundle
from tgate_engine.errors import ExportError
from tgate_engine.report import Silent
from tgate_export import oracle
from tgate_export.build import export
from tgate_export.embed import embed
from tgate_export.families.base import Family, Scaling
from tgate_export.families.sd import StableDiffusion
from tgate_export.families.t5 import T5Text
from tgate_export.job import ExportSettings, prepare
from tgate_export.oracle import Oracle
from tgate_runtime.pipeline import Pipeline
from tgate_runtime.verify import verify

PROMPT, NEGATIVE = "a large red circle", "a photo"


def rewrite(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text("utf-8")) | changes), "utf-8")


def replayed(bundle: Path) -> list[str]:
    """Goldens that ONNX Runtime does not reproduce."""
    return [golden.name for golden in verify(Bundle.open(bundle), threads=1) if not golden.ok]


def relative(got: Any, want: torch.Tensor) -> float:
    return float((torch.as_tensor(got) - want).abs().max() / want.abs().max())


@pytest.fixture
def misread(monkeypatch: pytest.MonkeyPatch) -> dict[str, Callable[[], None]]:
    """Ways to misread a checkpoint, one for each kind of thing that is read."""

    def scale() -> None:
        monkeypatch.setattr(Family, "scaling", lambda *_: Scaling(scale=0.2))

    def text() -> None:
        forward = T5Text.forward

        def unmasked(self: T5Text, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            mask = forward(self, ids)[1]
            return self.text_encoder(ids).last_hidden_state, torch.ones_like(mask)

        monkeypatch.setattr(T5Text, "forward", unmasked)

    def timesteps() -> None:
        read = Family.scheduler_config
        monkeypatch.setattr(
            Family, "scheduler_config", lambda self, c: {**read(self, c), "timestep_spacing": "trailing"}
        )

    return {"image": scale, "text": text, "ungated": timesteps}


@pytest.mark.parametrize("kind", ["image", "text", "ungated"])
def test_a_misread_checkpoint_does_not_verify(
    tmp_path: Path, misread: dict[str, Callable[[], None]], kind: str
) -> None:
    root = make_tiny(tmp_path / "checkpoint", "pixart_alpha_a")
    misread[kind]()
    settings = ExportSettings(
        model="pixart-alpha",
        checkpoint=str(root),
        guidance_scale=1.0,
        height=64,
        width=64,
        output=tmp_path / "bundle",
        components=("denoiser", "decoder") if kind == "image" else ("text", "denoiser"),
    )
    assert kind in replayed(export(settings, Silent()))


def test_goldens_say_who_recorded_them(family_bundle: Callable[[str], tuple[Path, Path]]) -> None:
    _, bundle = family_bundle("sd21_v")
    goldens = Bundle.open(bundle).manifest.goldens
    for name in ("text", "ungated", "image"):
        assert goldens[name].oracle == f"StableDiffusionPipeline of diffusers {diffusers.__version__}"
    assert "the method in tgate-engine" in goldens["gated"].oracle
    assert not replayed(bundle)


def test_the_decoders_golden_holds_numbers_not_bytes(family_bundle: Callable[[str], tuple[Path, Path]]) -> None:
    checkpoint, bundle = family_bundle("sd21_v")
    recorded = load_file(bundle / "golden" / "image.safetensors")
    assert recorded["output.decoded"].dtype == np.float32
    vae = load_tiny(checkpoint, "sd21_v").vae
    latents = torch.from_numpy(recorded["input.latents"]) / vae.config.scaling_factor
    with torch.no_grad():
        assert relative(recorded["output.decoded"], vae.decode(latents).sample) < 1e-5


def test_what_does_not_fit_into_memory_is_not_recorded_and_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    root = make_tiny(tmp_path / "checkpoint", "sd15_a")
    monkeypatch.setattr(oracle, "available_bytes", lambda: 1000)
    bundle = export(family_settings("sd15_a", root, tmp_path / "bundle", guidance_scale=1.0), Silent())
    assert not Bundle.open(bundle).manifest.goldens
    assert "no goldens are recorded" in caplog.text


def test_a_decoder_beyond_float16_is_refused_with_what_to_do(tmp_path: Path) -> None:
    """A VAE that says it needs no float32 (force_upcast false) and does."""
    root = make_tiny(tmp_path / "checkpoint", "sd15_a")
    file = root / "vae" / "diffusion_pytorch_model.safetensors"
    tensors = safetensors.torch.load_file(file)
    tensors["decoder.conv_in.weight"] *= 1e5
    safetensors.torch.save_file(tensors, file, {"format": "pt"})
    rewrite(root / "vae" / "config.json", force_upcast=False)
    settings = family_settings(
        "sd15_a", root, tmp_path / "bundle", dtype="fp16", guidance_scale=1.0, components=("denoiser", "decoder")
    )
    with pytest.raises(ExportError, match=r"65504.*force_upcast.*vae/config.json.*--dtype fp32"):
        export(settings, Silent())
    assert not (tmp_path / "bundle").exists()
    rewrite(root / "vae" / "config.json", force_upcast=True)
    assert not replayed(export(settings, Silent()))


def test_diffusers_own_failure_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = prepare(family_settings("sd15_a", make_tiny(tmp_path / "checkpoint", "sd15_a"), tmp_path / "bundle"))

    def fail(*_: object) -> None:
        raise ValueError("first\nsecond")

    monkeypatch.setattr(StableDiffusion, "encode_with", fail)
    with pytest.raises(ExportError, match=r"StableDiffusionPipeline itself cannot run it.*--no-verify") as caught:
        Oracle(job).text(PROMPT, NEGATIVE)
    assert "\n" not in str(caught.value)


CLIP_MODELS = ("sd15_a", "sdxl")


@pytest.fixture(scope="module", params=CLIP_MODELS)
def optioned(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Any, Path]:
    """(name, diffusers' pipeline, bundle) with a layer skipped and guidance rescaled."""
    name, folder = request.param, tmp_path_factory.mktemp(request.param)
    if name == "sdxl":
        root = make_tiny_sdxl(folder / "checkpoint", "conv_projection")
        settings = ExportSettings(
            model="sdxl",
            checkpoint=str(root),
            height=64,
            width=64,
            m=3,
            k=1,
            steps=5,
            warm_up=0,
            clip_skip=1,
            guidance_rescale=0.7,
            output=folder / "bundle",
        )
        return name, load_tiny_sdxl(root), export(settings, Silent())
    root = make_tiny(folder / "checkpoint", name)
    more: dict[str, Any] = {"m": 3, "k": 1, "steps": 5, "warm_up": 0, "clip_skip": 1, "guidance_rescale": 0.7}
    return name, load_tiny(root, name), export(family_settings(name, root, folder / "bundle", **more), Silent())


def drawn(name: str, pipe: Any, noise: torch.Tensor, scale: float, **options: Any) -> torch.Tensor:
    height, width = (side * pipe.vae_scale_factor for side in noise.shape[-2:])
    if name != "sdxl" and not hasattr(
        pipe.text_encoder, "text_model"
    ):  # diffusers 0.42 looks for it, transformers 5 has it not
        object.__setattr__(pipe.text_encoder, "text_model", pipe.text_encoder)
    pipe.scheduler = diffusers.DPMSolverMultistepScheduler.from_config(pipe.scheduler.config, use_karras_sigmas=False)
    result: torch.Tensor = pipe(
        PROMPT,
        negative_prompt=NEGATIVE,
        num_inference_steps=5,
        guidance_scale=scale,
        latents=noise.clone(),
        height=height,
        width=width,
        output_type="latent",
        **options,
    ).images
    return result


def test_clip_skip_and_rescaled_guidance_equal_diffusers(optioned: tuple[str, Any, Path]) -> None:
    name, pipe, bundle = optioned
    with Pipeline.open(bundle, threads=1) as opened:
        manifest = opened.session.manifest
        noise = torch.randn(1, *manifest.latents, generator=torch.Generator().manual_seed(1))
        got = opened(PROMPT, negative_prompt=NEGATIVE, plan="ungated", initial_latents=noise.numpy()).latents
    scale = manifest.guidance_scale
    want = drawn(name, pipe, noise, scale, clip_skip=1, guidance_rescale=0.7)
    assert relative(got, want) < 1e-4
    for other in ({"clip_skip": 1}, {"guidance_rescale": 0.7}):
        assert relative(got, drawn(name, pipe, noise, scale, **other)) > 1e-2, f"{other} alone is told apart"
    assert (manifest.clip_skip, manifest.guidance_rescale) == (1, 0.7)


def test_embedding_ahead_of_time_skips_the_same_layers(optioned: tuple[str, Any, Path], tmp_path: Path) -> None:
    name, _, bundle = optioned
    checkpoint, file = bundle.parent / "checkpoint", tmp_path / "e.safetensors"
    model = "sdxl" if name == "sdxl" else "sd15"
    embed(model, [PROMPT], file, checkpoint=str(checkpoint), negative_prompt=NEGATIVE, clip_skip=1)
    noise = np.random.default_rng(0).standard_normal
    with Pipeline.open(bundle, threads=1) as opened:
        start = noise((1, *opened.session.manifest.latents)).astype(np.float32)
        want = opened(PROMPT, negative_prompt=NEGATIVE, initial_latents=start).latents
        got = opened(prompt_embeds=load_file(file), initial_latents=start).latents
    assert relative(got, torch.from_numpy(want)) < 1e-5


@pytest.mark.parametrize(
    ("variant", "options", "said"),
    [
        ("sd15_a", {"clip_skip": 2}, r"--clip-skip must be from 1 to 1"),
        ("sd15_a", {"clip_skip": -1}, r"--clip-skip must be from 1 to 1"),
        ("sd15_a", {"guidance_rescale": 1.5}, r"--guidance-rescale must be from 0 to 1"),
        ("sd15_a", {"guidance_rescale": float("nan")}, r"--guidance-rescale must be from 0 to 1"),
        ("sd15_a", {"guidance_rescale": 0.5, "guidance_scale": 1.0}, r"would change nothing"),
        ("lcm_sdxl", {"guidance_rescale": 0.5}, r"would change nothing"),
        ("pixart_alpha_a", {"clip_skip": 1}, r"--clip-skip is for models with CLIP"),
        ("pixart_alpha_a", {"guidance_rescale": 0.5}, r"does not rescale guidance"),
    ],
)
def test_options_that_mean_nothing_are_refused(
    tmp_path: Path, variant: str, options: dict[str, Any], said: str
) -> None:
    root = make_tiny(tmp_path / "checkpoint", variant)
    with pytest.raises(ExportError, match=said):
        prepare(family_settings(variant, root, tmp_path / "bundle", **options))
