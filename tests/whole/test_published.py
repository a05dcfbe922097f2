"""Every published configuration through the command line, with all its components: narrow here, at full size when slow.

The narrow ones are whole checkpoints (``tests/shrunken.py``), so that nothing but widths, depths and vocabularies
differs from what a user of the real model has. What they draw is compared with diffusers' own pipeline.
"""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors import safe_open

from tests.export.families.published import published as published_family
from tests.hub import cached, hub
from tests.oracle_families import Request, plain_latents
from tests.oracle_flow import plain_run
from tests.plain import plain
from tests.shrunken import load_shrunken, shrink, write_shrunken
from tgate_cli.main import export_main, main
from tgate_engine.bundle import Bundle
from tgate_engine.manifest import Manifest, Shape
from tgate_export.checkpoints import published
from tgate_export.checkpoints.directory import DirectoryCheckpoint
from tgate_export.families import EMBEDDED, MODELS, find_model
from tgate_export.modules import real_module
from tgate_runtime.generators import CONDITIONING, in_step, noise
from tgate_runtime.pipeline import Pipeline

__all__ = ["hub"]  # a fixture

TOLERANCE = 1e-4
"""Largest absolute difference over largest absolute value, float32."""

SEED, STEPS = 7, 4
FIRST, SECOND = "a large red circle above a small blue square", "a photo of a green square"

PUBLISHED = tuple(name for name, model in MODELS.items() if model.checkpoint != EMBEDDED)
DEFAULT = {"sd15": "plain", "sdxl": "plain", "pixart-alpha": "tgate", "opensora": "plain"}
"""By which method one of each architecture is exported, but for Stable Video Diffusion, which takes a minute. Gating of
each architecture has tests of its own (``tests/whole/test_families.py``); all of these models are gated in the slow
tests."""
QUICK = ("sdxl", "pixart-alpha")
"""A U-Net and a transformer, in every run of the tests."""

SIZES: Mapping[str, tuple[int, int]] = {"svd": (64, 128), "opensora": (16, 32)}
"""Height and width in pixels. Elsewhere:"""
SIZE = (32, 64)
FRAMES: Mapping[str, int] = {"svd": 3, "opensora": 17, "ltx-video": 9}

SCHEDULERS: Mapping[str, str] = {
    "lcm-sdxl": "LCMScheduler",
    "lcm-pixart": "LCMScheduler",
    "svd": "EulerDiscreteScheduler",
    "opensora": "DDIMScheduler",
    **dict.fromkeys(("sd3-medium", "sd35-medium", "ltx-video", "qwen-image"), "FlowMatchEulerDiscreteScheduler"),
}
"""diffusers' class of the sampler that a model is exported with. Elsewhere:"""
SCHEDULER = "DPMSolverMultistepScheduler"


CASES = [
    *(
        pytest.param(model, method, id=f"{model}-{method}", marks=[] if model in QUICK else pytest.mark.slow)
        for model, method in DEFAULT.items()
    ),
    *(
        pytest.param(model, MODELS[model].method, id=f"{model}-{MODELS[model].method}", marks=pytest.mark.slow)
        for model in PUBLISHED
        if DEFAULT.get(model) != "tgate"
        and (MODELS[model].facts.text_graph or model == "svd")
        and MODELS[model].facts.name != "flux"
    ),
]
"""FLUX.1 and models whose prompts ``tgate embed`` encodes have tests of their own, from the prompt on
(``tests/whole/test_flow_families.py``)."""


# --- as they are published, and narrow ----------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    return functools.cache(lambda model: write_shrunken(tmp_path_factory.mktemp(model) / "checkpoint", model))


@pytest.mark.parametrize("model", PUBLISHED)
def test_nothing_but_sizes_is_shrunken(model: str) -> None:
    """The same keys, and the same values but for numbers; lists as long and as nested; strings and switches alike."""

    def same_kind(one: Any, other: Any) -> bool:
        if isinstance(one, list):
            return len(one) == len(other) and all(map(same_kind, one, other))
        if isinstance(one, dict):
            return one.keys() == other.keys() and all(same_kind(one[key], other[key]) for key in one)
        if isinstance(one, int) and not isinstance(one, bool):
            return isinstance(other, int) and other <= one
        return bool(one == other)

    for name, config in published.facts(model)["components"].items():
        if name.startswith(("tokenizer", "scheduler", "feature_extractor", "image_processor")):
            continue
        small = shrink(config, config.get("vocab_size", 0))
        assert small.keys() == config.keys()
        assert all(same_kind(config[key], small[key]) for key in config), name
        assert small != config


@pytest.mark.parametrize("model", PUBLISHED)
def test_every_component_is_read_as_diffusers_reads_it(checkpoint_of: Callable[[str], Path], model: str) -> None:
    directory, family = checkpoint_of(model), find_model(model).family
    checkpoint, pipe = DirectoryCheckpoint(directory), load_shrunken(directory)
    family.check(checkpoint)
    absent = {*family.image_components}.difference(family.image_parts(checkpoint))
    for name in dict.fromkeys((*family.classes, *family.denoisers(checkpoint))):
        if name in absent:
            continue
        got, want = real_module(family, checkpoint, name).state_dict(), getattr(pipe, name).state_dict()
        assert got.keys() == want.keys()
        assert all(torch.equal(got[key], want[key]) for key in want), name


# --- from the command line to a picture ---------------------------------------------------------


@dataclass(frozen=True)
class Subject:
    """A narrow model: diffusers' pipeline of its checkpoint, and the bundle that the command line makes of it."""

    model: str
    eager: Any
    bundle: Bundle
    pipe: Pipeline

    @property
    def shape(self) -> Shape:
        (shape,) = self.bundle.manifest.shapes
        return shape

    def request(self, second: bool) -> dict[str, Any]:
        """What one of two requests is about, in the words of the engine's pipeline."""
        if self.model == "svd":
            return {"image": _picture(self.shape.height, self.shape.width, int(second))}
        guided = self.bundle.manifest.guided
        return {"prompt": SECOND if second else FIRST, "negative_prompt": "a circle" if second and guided else None}

    def start(self) -> torch.Tensor:
        return torch.randn(1, *self.shape.latents, generator=torch.Generator().manual_seed(SEED))

    def drawn(self, plan: str, second: bool = False) -> Any:
        return self.pipe(**self.request(second), plan=plan, seed=SEED, initial_latents=self.start().numpy())

    def wanted(self, second: bool) -> torch.Tensor:
        """Final latents of diffusers' pipeline."""
        manifest = self.bundle.manifest
        augmentation = noise(SEED, (1, 3, self.shape.height, self.shape.width), draw=CONDITIONING)
        request = Request(
            **self.request(second),
            steps=STEPS,
            guidance_scale=manifest.guidance_scale,
            latents=self.start(),
            step_noise=lambda step: torch.from_numpy(noise(SEED, self.shape.latents, draw=in_step(step)))[None],
            augmentation=torch.from_numpy(augmentation) if self.model == "svd" else None,
        )
        cls = getattr(diffusers, SCHEDULERS.get(self.model, SCHEDULER))
        if self.model == "ltx-video":  # its pipeline holds latents in another form
            return plain_run(
                self.eager,
                SECOND if second else FIRST,
                self.request(second)["negative_prompt"] or "",
                latents=request.latents,
                num_inference_steps=STEPS,
                guidance_scale=manifest.guidance_scale,
                height=self.shape.height,
                width=self.shape.width,
                num_frames=manifest.frames,
            )
        return plain_latents(self.eager, request, cls.from_config(self.eager.scheduler.config))

    def decoded(self, latents: NDArray[np.float32]) -> NDArray[np.float64]:
        """What diffusers' autoencoder makes of one result's latents: [F, H, W, 3], 0 to 255."""
        manifest, vae = self.bundle.manifest, self.eager.vae
        rows = torch.from_numpy(latents)
        if manifest.frames > 1 and self.model != "ltx-video":
            rows = rows.movedim(find_model(self.model).family.frames_axis or 1, 1).flatten(0, 1)
        options = {"num_frames": manifest.frames} if self.model == "svd" else {}
        with torch.no_grad():
            shift = vae.config.get("shift_factor") or 0.0
            pixels = vae.decode(rows / vae.config.scaling_factor + shift, **options).sample
        if pixels.dim() == 5:  # decoded as one video
            pixels = pixels.squeeze(0).movedim(1, 0)
        return np.asarray((pixels / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).double() * 255)


def _picture(height: int, width: int, seed: int) -> Image.Image:
    coarse = Image.fromarray(np.random.default_rng(seed).integers(0, 255, (4, 4, 3), np.uint8))
    return coarse.resize((width, height), Image.Resampling.BICUBIC)


def _settings(model: str) -> list[str]:
    height, width = SIZES.get(model, SIZE)
    frames = ["--frames", str(FRAMES[model])] if model in FRAMES else []
    return ["--height", str(height), "--width", str(width), *frames, "--steps", str(STEPS), "--m", "2", "--quiet"]


@pytest.fixture(scope="module")
def subject_of(
    tmp_path_factory: pytest.TempPathFactory, checkpoint_of: Callable[[str], Path]
) -> Callable[[str, str], Subject]:
    """Exported as a user does it: every component, and checked against eager PyTorch before it gets its name."""

    @functools.cache
    def make(model: str, method: str) -> Subject:
        directory, target = checkpoint_of(model), tmp_path_factory.mktemp(model) / "bundle"
        arguments = ["--model", model, "--method", method, "--checkpoint", str(directory), "--output", str(target)]
        with plain():
            assert export_main([*arguments, *_settings(model)]) == 0
        bundle = Bundle.open(target)
        return Subject(model, load_shrunken(directory), bundle, Pipeline.open(bundle, threads=1))

    return make


@pytest.mark.parametrize(("model", "method"), CASES)
def test_every_component_is_exported(subject_of: Callable[[str, str], Subject], model: str, method: str) -> None:
    manifest, family = subject_of(model, method).bundle.manifest, find_model(model).family
    encodes = {"encode"} if find_model(model).facts.from_pictures else set()
    assert _roles(manifest) == ({"image"} if model == "svd" else {"text"}) | {"denoise", "decode"} | encodes
    assert len(manifest.tokenizers) == len(family.tokenizers)
    assert manifest.guidance == {"lcm-sdxl": "embedded", "lcm-pixart": "none"}.get(model, "classifier-free")
    assert {"ungated", "default"} <= manifest.plans.keys()
    assert manifest.goldens.keys() >= {"gated", "image", "conditioning" if model == "svd" else "text"}
    handed = {key: value for key, value in manifest.scheduler.items() if key in ("mu", "pipeline_sigmas")}
    assert manifest.scheduler == published.facts(model)["components"]["scheduler"] | handed
    assert bool(handed) == (model == "ltx-video")


@pytest.mark.parametrize(("model", "method"), CASES)
def test_ungated_latents_are_those_of_diffusers(
    subject_of: Callable[[str, str], Subject], model: str, method: str
) -> None:
    subject = subject_of(model, method)
    got = [subject.drawn("ungated", second).latents for second in (False, True)]
    for second in (False, True):
        assert _relative(got[second], subject.wanted(second)) < TOLERANCE
    assert _relative(got[0], torch.from_numpy(got[1])) > 50 * TOLERANCE, "what conditions it matters"
    if method == "tgate":
        gated = subject.drawn("default").latents
        assert _relative(gated, torch.from_numpy(got[0])) > TOLERANCE, "so does gating"


@pytest.mark.parametrize(("model", "method"), CASES)
def test_a_picture_or_a_video_is_drawn(subject_of: Callable[[str, str], Subject], model: str, method: str) -> None:
    """The default plan's, as large and long as it is to be, and what diffusers' autoencoder makes of its latents."""
    subject = subject_of(model, method)
    result = subject.drawn("default")
    pictures = result.videos[0] if model in FRAMES else result.images
    assert len(pictures) == FRAMES.get(model, 1)
    height, width = SIZES.get(model, SIZE)
    assert {picture.size for picture in pictures} == {(width, height)}
    got = np.stack([np.asarray(picture, np.float64) for picture in pictures])
    assert got.std() > 5, "it is no grey card"
    assert np.abs(got - subject.decoded(result.latents)).max() <= 1


def _relative(got: NDArray[np.float32], want: torch.Tensor) -> float:
    wanted = want.numpy().astype(np.float64)
    assert got.shape == wanted.shape
    return float(np.abs(got.astype(np.float64) - wanted).max() / np.abs(wanted).max())


# --- from the hub's cache -----------------------------------------------------------------------


@pytest.mark.slow
def test_lcm_sdxl_is_put_together_from_two_repositories(
    hub: Path, checkpoint_of: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without ``--checkpoint``: SDXL's repository, its own U-Net in it, and the other U-Net in a repository alone."""
    base, other = checkpoint_of("sdxl"), checkpoint_of("lcm-sdxl")
    cached(hub, MODELS["lcm-sdxl"].checkpoint, base)
    cached(hub, MODELS["lcm-sdxl"].elsewhere["unet"], other / "unet")
    target = tmp_path / "bundle"
    assert export_main(["--model", "lcm-sdxl", "--output", str(target), *_settings("lcm-sdxl")]) == 0
    manifest = Bundle.open(target).manifest
    assert (manifest.guidance, len(manifest.tokenizers)) == ("embedded", 2)
    with (
        safe_open(target / "weights.safetensors", "numpy") as held,
        safe_open(other / "unet" / "diffusion_pytorch_model.safetensors", "numpy") as stored,
    ):
        np.testing.assert_array_equal(held.get_tensor("unet.conv_in.weight"), stored.get_tensor("conv_in.weight"))
    assert main(["verify", str(target), "--quiet"]) == 0


# --- at full size, with random weights ----------------------------------------------------------

DECODER = 49_490_199
"""Parameters of the image autoencoder's second half, the one-by-one convolution before it included."""

SD3_DECODER, DC_AE_DECODER = 49_545_475, 159_223_171
"""The same of Stable Diffusion 3's, of 16 channels, and of Sana's."""


@dataclass(frozen=True, kw_only=True)
class Full:
    """``denoiser``: its parameters, as its authors count them. ``size``: frames, height, width. ``weights``: none of a
    model that would fill the disk."""

    denoiser: int
    latents: tuple[int, ...]
    size: tuple[int, int, int]
    components: str = "denoiser,decoder"
    decoder_bytes: int = 4 * DECODER  # their configurations ask for float32, or are silent, which means the same
    further_bytes: int = 0
    weights: str = "random"


FULL: Mapping[str, Full] = {
    "sd15": Full(denoiser=859_520_964, latents=(4, 64, 64), size=(1, 512, 512)),
    "sd21": Full(denoiser=865_910_724, latents=(4, 96, 96), size=(1, 768, 768)),
    "sdxl": Full(denoiser=2_567_463_684, latents=(4, 128, 128), size=(1, 1024, 1024)),
    "ssd-1b": Full(denoiser=1_331_334_404, latents=(4, 128, 128), size=(1, 1024, 1024)),
    "lcm-sdxl": Full(denoiser=2_567_463_684 + 256 * 320, latents=(4, 128, 128), size=(1, 1024, 1024)),
    "kolors": Full(denoiser=2_579_458_820, latents=(4, 128, 128), size=(1, 1024, 1024)),
    "pixart-alpha": Full(denoiser=611_349_152, latents=(4, 128, 128), size=(1, 1024, 1024)),
    "pixart-sigma": Full(denoiser=610_856_096, latents=(4, 128, 128), size=(1, 1024, 1024), decoder_bytes=2 * DECODER),
    "lcm-pixart": Full(denoiser=611_349_152, latents=(4, 128, 128), size=(1, 1024, 1024)),
    "hunyuandit-1.2": Full(denoiser=1_499_952_032, latents=(4, 128, 128), size=(1, 1024, 1024)),
    "lumina-next": Full(denoiser=1_754_898_976, latents=(4, 128, 128), size=(1, 1024, 1024)),
    "sd3-medium": Full(
        denoiser=2_084_951_104, latents=(16, 128, 128), size=(1, 1024, 1024), decoder_bytes=4 * SD3_DECODER
    ),
    "sd35-medium": Full(
        denoiser=2_469_663_936, latents=(16, 128, 128), size=(1, 1024, 1024), decoder_bytes=4 * SD3_DECODER
    ),
    "flux1-dev": Full(denoiser=11_901_408_320, latents=(16, 128, 128), size=(1, 1024, 1024), weights="none"),
    "flux1-schnell": Full(denoiser=11_891_178_560, latents=(16, 128, 128), size=(1, 1024, 1024), weights="none"),
    "qwen-image": Full(denoiser=20_430_401_088, latents=(16, 166, 166), size=(1, 1328, 1328), weights="none"),
    "sana-1.6b": Full(
        denoiser=1_604_462_752, latents=(32, 32, 32), size=(1, 1024, 1024), decoder_bytes=2 * DC_AE_DECODER
    ),
    "sana-1.6b-512": Full(
        denoiser=1_604_462_752, latents=(32, 16, 16), size=(1, 512, 512), decoder_bytes=2 * DC_AE_DECODER
    ),
    "sana-sprint-1.6b": Full(
        denoiser=1_610_237_472, latents=(32, 32, 32), size=(1, 1024, 1024), decoder_bytes=2 * DC_AE_DECODER
    ),
    "sana-sprint-0.6b": Full(
        denoiser=593_501_216, latents=(32, 32, 32), size=(1, 1024, 1024), decoder_bytes=2 * DC_AE_DECODER
    ),
    "cosmos-predict2-2b": Full(denoiser=1_956_405_248, latents=(16, 96, 170), size=(1, 768, 1360), weights="none"),
    "svd": Full(
        denoiser=1_524_623_082,
        latents=(25, 4, 72, 128),
        size=(25, 576, 1024),
        components="image,denoiser,decoder",
        decoder_bytes=4 * 63_579_183,
        # The image graph's: CLIP's encoder, and the autoencoder's first half, in float32 as its second.
        further_bytes=2 * 632_076_800 + 4 * 34_163_664,
    ),
    "opensora": Full(denoiser=1_057_246_880, latents=(4, 17, 64, 64), size=(17, 512, 512)),
    "ltx-video": Full(
        denoiser=1_923_385_472, latents=(128, 21, 15, 22), size=(161, 480, 704), decoder_bytes=2 * 238_789_296
    ),
    # The decoder's graph of 21 latent frames takes minutes to trace.
    "wan21-t2v-1.3b": Full(
        denoiser=1_418_996_800, latents=(16, 21, 60, 104), size=(81, 480, 832), components="denoiser", decoder_bytes=0
    ),
    "wan21-t2v-14b": Full(
        denoiser=14_288_491_584,
        latents=(16, 21, 60, 104),
        size=(81, 480, 832),
        components="denoiser",
        weights="none",
    ),
    # Of each of its two networks.
    "wan22-t2v-a14b": Full(
        denoiser=14_288_491_584,
        latents=(16, 21, 60, 104),
        size=(81, 480, 832),
        components="denoiser",
        weights="none",
    ),
    "wan21-i2v-14b": Full(
        denoiser=16_394_878_784,
        latents=(16, 21, 60, 104),
        size=(81, 480, 832),
        components="denoiser",
        weights="none",
    ),
    # Of each of its two networks.
    "wan22-i2v-a14b": Full(
        denoiser=14_288_901_184,
        latents=(16, 21, 60, 104),
        size=(81, 480, 832),
        components="denoiser",
        weights="none",
    ),
}


def test_every_published_model_has_a_full_size() -> None:
    assert tuple(FULL) == PUBLISHED


@pytest.mark.slow
@pytest.mark.parametrize("model", FULL)
def test_full_size_with_random_weights(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It exports at the size that its configuration names, and says of itself what is known of the model."""
    full, target = FULL[model], tmp_path / "bundle"
    try:
        arguments = ["--model", model, "--weights", full.weights, "--components", full.components, "--dtype", "fp16"]
        assert export_main([*arguments, "--output", str(target), "--quiet"]) == 0
        capsys.readouterr()
        assert main(["inspect", str(target), "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        manifest = Bundle.open(target, check_digests=False).manifest
    finally:
        shutil.rmtree(target, ignore_errors=True)
    (shape,) = found["shapes"]
    assert tuple(shape["latents"]) == full.latents
    assert (found["frames"], shape["height"], shape["width"]) == full.size
    assert found["dtype"] == "float16"
    roles = {"image": "image", "denoiser": "denoise", "decoder": "decode"}
    assert _roles(manifest) == {roles[component] for component in full.components.split(",")}
    gated = {"tgate": {"reuse_cross", "reuse_self"}, "guidance_delta": {"reuse_delta", "unguided"}, "forecast": set()}
    assert shape["graphs"].keys() >= {"full", *gated[MODELS[model].method]}
    expected = 2 * full.denoiser + full.decoder_bytes + full.further_bytes
    # Beside parameters there are tables that are computed, such as places; equal tensors are written once.
    if full.weights == "none":
        _, checkpoint = published_family(model)
        denoiser = find_model(model).family.skeleton(checkpoint, "transformer")
        assert (found["bytes"]["weights"], sum(p.numel() for p in denoiser.parameters())) == (0, full.denoiser)
    else:
        assert found["bytes"]["weights"] == pytest.approx(expected, rel=0.01)
    settings = manifest.plan("default").settings
    assert (settings["n"], settings["m"]) == (MODELS[model].steps, MODELS[model].gate)


def _roles(manifest: Manifest) -> set[str]:
    return {graph.role for graph in manifest.shapes[0].graphs.values()}
