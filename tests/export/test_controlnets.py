"""ControlNets as an export reads them: what they give is what diffusers' own give, and what is none is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.tiny_control import make_control
from tests.tiny_families import FAMILY_VARIANTS, make_tiny
from tgate_engine.errors import ExportError
from tgate_export.checkpoints.directory import DirectoryCheckpoint
from tgate_export.controlnets import ControlNet, residual_shapes, with_controls
from tgate_export.families import find_model
from tgate_export.families.base import Size, control_component
from tgate_export.job import prepare
from tgate_export.modules import real_module
from tgate_export.settings import ExportSettings, check_settings

TINY = FAMILY_VARIANTS["sd15_a"]
SIZE = Size(height=TINY.latents[1] * TINY.vae_factor, width=TINY.latents[2] * TINY.vae_factor)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("controlnets") / "checkpoint"
    make_tiny(folder, "sd15_a")
    return folder


@pytest.fixture(scope="module")
def net(checkpoint: Path) -> Path:
    return make_control(checkpoint, checkpoint.parent / "net", pixels=TINY.vae_factor, seed=0)


def asked(checkpoint: Path, *nets: ControlNet, **more: Any) -> ExportSettings:
    settings = ExportSettings(
        model="sd15",
        checkpoint=str(checkpoint),
        controlnets=nets,
        sizes=[(SIZE.width, SIZE.height)],
        components=["denoiser"],
    )
    return replace(settings, **more)


def test_what_a_controlnet_gives_is_what_diffusers_own_gives(checkpoint: Path, net: Path) -> None:
    """For both halves of two images, whose pictures are embedded once each."""
    family = find_model("sd15").family
    opened = with_controls(DirectoryCheckpoint(checkpoint), [ControlNet("edges", str(net))], prefer_half=False)
    own = real_module(family, opened, control_component("edges"))
    theirs: Any = diffusers.ControlNetModel.from_pretrained(net)
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(4, *TINY.latents, generator=generator)
    text = torch.randn(4, 16, TINY.text_width, generator=generator)
    times, pictures = torch.tensor([3.0, 3.0, 700.0, 700.0]), torch.rand(2, 3, SIZE.height, SIZE.width)
    with torch.no_grad():
        given = family.look(own, latents, times, {"prompt_embeds": text}, pictures)
        down, middle = theirs(latents, times, text, pictures.repeat_interleave(2, 0), return_dict=False)
    for mine, wanted in zip(given, (*down, middle), strict=True):
        torch.testing.assert_close(mine, wanted, rtol=1e-4, atol=1e-5)
    shapes = tuple(tuple(each.shape[1:]) for each in (*down, middle))
    assert residual_shapes(family, opened, "edges", SIZE) == shapes
    assert "forward" not in vars(own.controlnet_cond_embedding)


def changed(net: Path, target: Path, **config: Any) -> Path:
    shutil.copytree(net, target)
    file = target / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **config}))
    return target


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ({"cross_attention_dim": 32}, "has cross_attention_dim = 32, the unet 24"),
        ({"in_channels": 9}, "has in_channels = 9, the unet 4"),
        ({"conditioning_channels": 1}, "looks at pictures of 1 channels; control pictures have 3"),
        ({"global_pool_conditions": True}, "goes over to its guess mode; that is not exported"),
        ({"addition_embed_type": "text"}, "has addition_embed_type = 'text', the unet None"),
        ({"class_embed_type": "timestep"}, "has class_embed_type = 'timestep' and so a further input"),
        ({"encoder_hid_dim": 24, "encoder_hid_dim_type": "text_proj"}, "encoder_hid_dim_type = 'text_proj'"),
        ({"_class_name": "ControlNetUnionModel"}, "is a ControlNetUnionModel in its config.json; sd wants Control"),
        ({"conditioning_embedding_out_channels": [4, 8]}, "ControlNet edges does not fit the model"),
        ({"down_block_types": ["DownBlock2D", "DownBlock2D"]}, "nothing in a ControlNetModel of its config.json reads"),
        ({"block_out_channels": [16, 48]}, "has shape"),
    ],
)
def test_of_another_architecture(
    checkpoint: Path, net: Path, tmp_path: Path, config: dict[str, Any], told: str
) -> None:
    """Told before anything is traced."""
    place = changed(net, tmp_path / "net", **config)
    # Weights that the changed configuration wants, where it is not they that are told of.
    if not told.startswith(("nothing", "has shape")) and "_class_name" not in config:
        fitting = diffusers.ControlNetModel.from_config(json.loads((place / "config.json").read_text()))
        save_file({n: t.contiguous() for n, t in fitting.state_dict().items()}, place / _WEIGHTS)
    with pytest.raises(ExportError) as caught:
        prepare(asked(checkpoint, ControlNet("edges", str(place))))
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)


_WEIGHTS = "diffusion_pytorch_model.safetensors"


def _no_config(net: Path) -> None:
    (net / "config.json").unlink()


def _no_weights(net: Path) -> None:
    (net / _WEIGHTS).unlink()


def _pipeline(net: Path) -> None:
    (net / "model_index.json").write_text("{}")


def _missing(net: Path) -> None:
    tensors = load_file(net / _WEIGHTS)
    tensors.pop("controlnet_mid_block.weight")
    save_file(tensors, net / _WEIGHTS)


def _link(net: Path) -> None:
    (net / "config.json").rename(net.parent / "config.json")
    (net / "config.json").symlink_to(net.parent / "config.json")


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (_no_config, "has no config.json; --controlnet wants a ControlNet in diffusers layout"),
        (_no_weights, "has no safetensors weights"),
        (_pipeline, "holds a whole pipeline"),
        (_missing, "has no tensor 'controlnet_mid_block.weight'"),
        (_link, "outside the checkpoint"),
    ],
)
def test_what_is_no_controlnet(
    checkpoint: Path, net: Path, tmp_path: Path, damage: Callable[[Path], None], told: str
) -> None:
    place = Path(shutil.copytree(net, tmp_path / "net"))
    damage(place)
    with pytest.raises(ExportError) as caught:
        prepare(asked(checkpoint, ControlNet("edges", str(place))))
    assert told in str(caught.value)


def test_settings(checkpoint: Path, net: Path) -> None:
    """What no checkpoint could mend."""
    edges = ControlNet("edges", str(net))
    for settings, told in (
        (asked(checkpoint, edges, edges), "--controlnet edges is there 2 times"),
        (asked(checkpoint, ControlNet("a", "/nowhere/x")), "ControlNet a: /nowhere/x is no directory"),
        (asked(checkpoint, edges, model="kolors"), "--controlnet is for Stable Diffusion and SDXL; kolors takes"),
        (
            replace(asked(checkpoint, edges), weights="none", checkpoint=None),
            "--weights none reads no checkpoint; leave out --checkpoint, --lora and --controlnet",
        ),
        (asked(checkpoint, *(ControlNet(f"n{i}", str(net)) for i in range(17))), "got 17 --controlnet, at most 16"),
    ):
        with pytest.raises(ExportError) as caught:
            check_settings(settings)
        assert told in str(caught.value)
    assert ControlNet.parse("edges=a=b") == ControlNet("edges", "a=b")
    for text in ("edges", "edges=", "=x", "a.b=x", "a=\n"):
        with pytest.raises(ExportError, match="--controlnet"):
            ControlNet.parse(text)


def test_a_hub_id_that_is_not_there_is_told_of_the_controlnet(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ExportError, match=r"ControlNet edges: .*could not be fetched.*with --controlnet"):
        prepare(asked(checkpoint, ControlNet("edges", "nobody/of-that-name")))
