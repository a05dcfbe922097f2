"""The small decoder of a bundle, against diffusers: its AutoencoderTiny on the latents of its own pipeline."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from diffusers import AutoencoderTiny, EulerDiscreteScheduler
from safetensors.torch import load_file, save_file
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from tests.conftest import family_settings
from tests.tiny_families import FAMILY_VARIANTS, latent_noise, load_tiny, make_tiny
from tgate_engine.bundle import Bundle
from tgate_engine.errors import ExportError
from tgate_engine.report import Silent
from tgate_export.build import export
from tgate_export.families import find_model
from tgate_export.job import Job, prepare, preview_of
from tgate_export.preview_decoder import COMPONENT, PreviewDecoder
from tgate_export.settings import ExportSettings, check_settings
from tgate_export.tracing import trace_preview
from tgate_export.weights import WEIGHTS_FILE, attach, collect, save_graph, write_weights
from tgate_runtime.graph_call import GraphCall
from tgate_runtime.pipeline import Pipeline, Progress
from tgate_runtime.preview import end_of
from tgate_runtime.verify import verify

PROMPT = "a large red circle"
WEIGHTS = "diffusion_pytorch_model.safetensors"


def make_small(directory: Path, *, levels: int = 4, seed: int = 0, **config: Any) -> Path:
    """A small AutoencoderTiny of 2^(levels - 1) pixels a latent, whose pictures have every brightness."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        vae = AutoencoderTiny(
            **{
                "encoder_block_out_channels": (8,) * levels,
                "decoder_block_out_channels": (8,) * levels,
                "num_encoder_blocks": (1,) * levels,
                "num_decoder_blocks": (1,) * levels,
                **config,
            }
        )
    with torch.no_grad():
        last = vae.decoder.layers[-1]
        last.weight *= 6
        last.bias += 0.5
    vae.save_pretrained(directory)
    return directory


def small_of(directory: Path) -> Any:
    return AutoencoderTiny.from_pretrained(directory, local_files_only=True).eval()


# --- the graph ----------------------------------------------------------------------------------


def decoded_by_graph(job: Job, folder: Path, latents: torch.Tensor) -> dict[str, Any]:
    """What the exported graph makes of latents, on ONNX Runtime."""
    graph = trace_preview(job, FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv()))
    assert {ref.component for ref in graph.weights.values()} == {COMPONENT}
    attach(graph, write_weights(folder / WEIGHTS_FILE, collect([graph]), job.holder, lambda done, total: None))
    save_graph(graph, folder / "graph.onnx")
    session = onnxruntime.InferenceSession(folder / "graph.onnx", providers=["CPUExecutionProvider"])
    image, decoded = session.run(["image", "decoded"], {"latents": latents.numpy()})
    return {"image": image, "decoded": decoded}


@pytest.mark.parametrize(
    ("variant", "levels", "config"),
    [
        ("sd15_a", 4, {}),
        ("sd15_b", 3, {"num_decoder_blocks": (3, 1, 2), "decoder_block_out_channels": (4, 4, 4)}),
        ("pixart_alpha_a", 4, {"scaling_factor": 0.4, "act_fn": "silu", "upsample_fn": "bilinear"}),
    ],
)
def test_it_decodes_as_diffusers_does(variant: str, levels: int, config: dict[str, Any], tmp_path: Path) -> None:
    """Latents as a pipeline has them go into it divided by its own scaling factor, not by the checkpoint's."""
    checkpoint = make_tiny(tmp_path / "checkpoint", variant)
    small = make_small(tmp_path / "small", levels=levels, **config)
    job = prepare(family_settings(variant, checkpoint, tmp_path / "bundle", preview_decoder=small))
    vae, latents = small_of(small), latent_noise(variant, seed=3)
    with torch.no_grad():
        expected = vae.decode(latents / vae.config.scaling_factor).sample
    got = decoded_by_graph(job, tmp_path, latents)
    assert expected.std() > 0.3
    assert np.abs(got["decoded"] - expected.numpy()).max() / expected.abs().max() < 1e-4
    pixels = ((expected / 2 + 0.5).clamp(0, 1) * 255).round().permute(0, 2, 3, 1).numpy()
    assert np.abs(got["image"].astype(int) - pixels).max() <= 1  # where a pixel lies between two


# --- in a bundle --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with a small decoder, beside its checkpoint and that decoder."""
    root = tmp_path_factory.mktemp("preview")
    checkpoint = make_tiny(root / "checkpoint", "sd15_a")
    small = make_small(root / "small", scaling_factor=0.8)
    more = {
        "preview_decoder": small,
        "sampler": "euler",
        "steps": 6,
        "m": 2,
        "components": ["text", "denoiser", "decoder"],
        "batches": [(1, 1)],
    }
    return export(family_settings("sd15_a", checkpoint, root / "bundle", method="forecast", **more), Silent())


def test_previews_are_what_diffusers_pipeline_would_show_with_that_decoder(bundle: Path) -> None:
    """Its scheduler's own estimate of the clean latents, as its pipeline would decode it, at every step; and the last
    one is the picture that the pipeline itself gives."""
    small = small_of(bundle.parent / "small")
    pipe = load_tiny(bundle.parent / "checkpoint", "sd15_a")
    pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    pipe.vae = small
    noise, estimates = latent_noise("sd15_a", seed=7), list[torch.Tensor]()
    step = pipe.scheduler.step

    def watched(*args: Any, **options: Any) -> Any:
        estimates.append(step(*args, **{**options, "return_dict": True}).pred_original_sample)
        pipe.scheduler._step_index -= 1
        return step(*args, **options)

    pipe.scheduler.step = watched
    height, width = (8 * side for side in FAMILY_VARIANTS["sd15_a"].latents[1:])
    options = {"num_inference_steps": 6, "guidance_scale": 7.5, "height": height, "width": width}
    final = pipe(PROMPT, negative_prompt="blue", latents=noise.clone(), output_type="pt", **options).images
    with torch.no_grad():
        wanted = [small.decode(x0 / small.config.scaling_factor).sample[0] for x0 in estimates]
    shown, ended = list[np.ndarray[Any, Any]](), list[np.ndarray[Any, Any]]()

    def look(progress: Progress) -> None:
        shown.append(np.asarray(progress.preview()[0], float))
        ended.append(decoded(own, progress))

    with Pipeline.open(bundle, threads=1) as own:
        request = {"negative_prompt": "blue", "guidance_scale": 7.5, "initial_latents": noise.numpy()}
        own(PROMPT, plan="ungated", on_step=look, **request)
    assert len(shown) == len(wanted) == 6
    for i, (picture, floats, expected) in enumerate(zip(shown, ended, wanted, strict=True)):
        assert np.abs(floats - expected.numpy()).max() / expected.abs().max() < 1e-4, i
        pixels = ((expected / 2 + 0.5).clamp(0, 1) * 255).round().permute(1, 2, 0).numpy()
        assert np.abs(picture - pixels).max() <= 1, i
    assert np.abs(shown[-1] - (final[0] * 255).round().permute(1, 2, 0).numpy()).max() <= 1
    assert np.abs(shown[0] - shown[-1]).mean() > 2  # it comes about


def decoded(own: Pipeline, progress: Progress) -> np.ndarray[Any, Any]:
    """What the small decoder's pixels are rounded from."""
    state = progress.look._state
    assert state is not None
    latents = end_of(state, 0, progress.plan.steps[progress.step.index + 1 :])
    graph = own.session.graph("preview")
    assert graph is not None
    with GraphCall.borrow(own.session, graph) as call:
        call.inputs["latents"].write(latents[None])
        call()
        values: np.ndarray[Any, Any] = call.outputs["decoded"].read()[0]
    return values


def test_its_golden_is_diffusers_and_finds_other_weights(bundle: Path, tmp_path: Path) -> None:
    checked = {golden.name: golden for golden in verify(Bundle.open(bundle))}
    assert checked["preview"].ok
    golden = Bundle.open(bundle).manifest.goldens["preview"]
    assert golden.oracle.startswith("AutoencoderTiny of diffusers")
    assert golden.tolerance == 1e-4
    recorded = load_file(bundle / golden.file)
    small = small_of(bundle.parent / "small")
    with torch.no_grad():
        again = small.decode(recorded["input.latents"] / 0.8).sample
    assert torch.equal(again, recorded["output.decoded"])


def test_its_weights_and_graph_are_few(bundle: Path) -> None:
    """Of its encoder, and of what makes no pictures of latents, nothing is in the bundle."""
    manifest = Bundle.open(bundle).manifest
    graph = manifest.graph("preview")
    assert graph is not None
    assert graph.macs.paper < manifest.graph("decode").macs.paper  # type: ignore[union-attr]
    assert [tensor.name for tensor in graph.inputs] == ["latents"]
    names = [name for name in load_file(bundle / manifest.weights) if name.startswith(COMPONENT)]
    assert names
    assert all(name.startswith(f"{COMPONENT}.decoder.layers.") for name in names)


# --- what is refused ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def job(bundle: Path) -> Job:
    root = bundle.parent
    return prepare(family_settings("sd15_a", root / "checkpoint", root / "none", preview_decoder=root / "small"))


def refused(job: Job, small: Path) -> str:
    """The line that an export of the job's checkpoint with that directory ends in."""
    with pytest.raises(ExportError) as error:
        preview_of(replace(job.settings, preview_decoder=small), job.family, job.checkpoint)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_another_class_is_refused(job: Job, tmp_path: Path) -> None:
    assert "_class_name = 'AutoencoderKL'; --preview-decoder wants a directory of diffusers' AutoencoderTiny" in (
        refused(job, Path(job.checkpoint.where, "vae"))
    )
    assert "has no config.json; --preview-decoder wants" in refused(job, Path(job.checkpoint.where))
    unnamed = make_small(tmp_path / "unnamed")
    edit(unnamed, _class_name=None)
    assert "_class_name = None; --preview-decoder wants" in refused(job, unnamed)


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (
            {"latent_channels": 16},
            "is for latents of 16 channels, and {} has 4; give the AutoencoderTiny that",
        ),
        ({"levels": 3}, "is for 4 pixels a latent, and {} has 8"),
        ({"upsampling_scaling_factor": 3}, "is for 27 pixels a latent, and {} has 8"),
        ({"out_channels": 1, "in_channels": 1}, "is for pictures of 1 channels, and {} has 3"),
        ({"scaling_factor": 0.0}, "has scaling_factor = 0.0 and shift_factor = 0.0; latents are divided by a number"),
        ({"shift_factor": 0.1}, "and shift_factor = 0.1; latents are divided by"),
    ],
)
def test_one_of_other_latents_is_refused(job: Job, config: dict[str, Any], says: str, tmp_path: Path) -> None:
    assert says.format(job.checkpoint.where) in refused(job, make_small(tmp_path / "small", **config))


def test_damage_is_refused(job: Job, tmp_path: Path) -> None:
    sound = make_small(tmp_path / "sound")
    weights = load_file(sound / WEIGHTS)

    def damaged(name: str, tensors: dict[str, torch.Tensor] | None = None, **config: Any) -> str:
        folder = tmp_path / name
        shutil.copytree(sound, folder)
        save_file(weights if tensors is None else tensors, folder / WEIGHTS)
        edit(folder, **config)
        return refused(job, folder)

    last = "decoder.layers.0.weight"
    assert "num_decoder_blocks = 'many' (text); " in damaged("text", num_decoder_blocks="many")
    assert "makes no AutoencoderTiny (ValueError" in damaged("lengths", num_decoder_blocks=[1, 1])
    assert "makes no AutoencoderTiny (" in damaged("activation", act_fn="quick")
    assert f"has no tensor '{last}'" in damaged("missing", {k: v for k, v in weights.items() if k != last})
    assert "that nothing in a AutoencoderTiny of its config.json reads" in damaged(
        "more", {**weights, "scales": torch.ones(3)}
    )
    assert "is stored as I8: integers are no weights" in damaged(
        "int8", {**weights, last: weights[last].to(torch.int8)}
    )
    (sound / WEIGHTS).unlink()
    assert "has no safetensors weights" in refused(job, sound)


def test_a_tensor_that_is_not_finite_is_refused(job: Job, tmp_path: Path) -> None:
    small = make_small(tmp_path / "small")
    weights = load_file(small / WEIGHTS)
    weights["decoder.layers.0.bias"][1] = torch.nan
    save_file(weights, small / WEIGHTS)
    damaged = replace(job, preview=PreviewDecoder(small))
    with pytest.raises(ExportError, match=r"small: preview_decoder tensor 'decoder.layers.0.bias' holds NaN"):
        decoded_by_graph(damaged, tmp_path, latent_noise("sd15_a"))


def test_what_decodes_videos_takes_none(tmp_path: Path) -> None:
    small = make_small(tmp_path / "small")
    with pytest.raises(ExportError, match="--preview-decoder is for models of pictures; svd makes videos"):
        check_settings(ExportSettings(model="svd", preview_decoder=small))
    with pytest.raises(ExportError, match="qwen decodes its latents as a video's, and an AutoencoderTiny decodes pic"):
        PreviewDecoder(small).check(find_model("qwen-image").family, None)  # type: ignore[arg-type]
    with pytest.raises(ExportError, match=r"nowhere: there is no such directory; give that of a diffusers Autoenc"):
        check_settings(ExportSettings(model="sd15", preview_decoder=tmp_path / "nowhere"))


def edit(folder: Path, **config: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text("utf-8")), **config}), "utf-8")
