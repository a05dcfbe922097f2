"""The models that can be exported, by name, and the architectures behind them.

A family is one file here. It says how an architecture loads, what conditions it, how diffusers' own pipeline is asked
for the same, and nothing about reuse, graphs or samplers. ``published`` holds the configurations of the models.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import resources

from tgate_engine.errors import ExportError
from tgate_export.checkpoints.files import shown
from tgate_export.families.base import Family
from tgate_export.families.latte import Latte
from tgate_export.families.pixart import PixArt
from tgate_export.families.sd import StableDiffusion
from tgate_export.families.sdxl import Sdxl
from tgate_export.families.svd import StableVideo

EMBEDDED = "embedded"


@dataclass(frozen=True, kw_only=True)
class Model:
    """One name of ``--model``: its family, where its weights are, and the settings the paper or its authors use.

    ``checkpoint``: a hub id, or :data:`EMBEDDED` for a model inside this package. ``elsewhere``: hub ids of
    components that lie in repositories of their own. ``licence``: the weights'. ``batch``: images in one
    call, least and most, where the user names no range.
    """

    family: Family
    checkpoint: str
    licence: str
    steps: int
    gate: int
    self_interval: int
    guidance_scale: float
    warm_up: int = 2
    sampler: str = "dpmpp_2m"
    batch: tuple[int, int] = (1, 1)
    elsewhere: Mapping[str, str] = field(default_factory=dict)


MODELS: Mapping[str, Model] = {
    "mini-sdxl": Model(
        family=Sdxl(),
        checkpoint=EMBEDDED,
        licence="apache-2.0",
        steps=25,
        gate=10,
        self_interval=5,
        guidance_scale=5.0,
        batch=(1, 4),
    ),
    "mini-pixart": Model(
        family=PixArt(),
        checkpoint=EMBEDDED,
        licence="apache-2.0",
        steps=25,
        gate=15,
        self_interval=3,
        guidance_scale=4.5,
        batch=(1, 4),
    ),
    "sd15": Model(
        family=StableDiffusion(),
        checkpoint="stable-diffusion-v1-5/stable-diffusion-v1-5",
        licence="creativeml-openrail-m",
        steps=25,
        gate=10,
        self_interval=1,
        guidance_scale=7.5,
    ),
    "sd21": Model(
        family=StableDiffusion(),
        checkpoint="stabilityai/stable-diffusion-2-1",
        licence="openrail++",
        steps=25,
        gate=10,
        self_interval=1,
        guidance_scale=7.5,
    ),
    "sdxl": Model(
        family=Sdxl(),
        checkpoint="stabilityai/stable-diffusion-xl-base-1.0",
        licence="openrail++",
        steps=25,
        gate=10,
        self_interval=5,
        guidance_scale=5.0,
    ),
    "ssd-1b": Model(
        family=Sdxl(),
        checkpoint="segmind/SSD-1B",
        licence="apache-2.0",
        steps=25,
        gate=10,
        self_interval=5,
        guidance_scale=9.0,
    ),
    "lcm-sdxl": Model(
        family=Sdxl(),
        checkpoint="stabilityai/stable-diffusion-xl-base-1.0",
        elsewhere={"unet": "latent-consistency/lcm-sdxl"},
        licence="openrail++",
        steps=4,
        gate=1,
        self_interval=1,
        warm_up=0,
        guidance_scale=8.0,
        sampler="lcm",
    ),
    "pixart-alpha": Model(
        family=PixArt(),
        checkpoint="PixArt-alpha/PixArt-XL-2-1024-MS",
        licence="openrail++",
        steps=25,
        gate=15,
        self_interval=3,
        guidance_scale=4.5,
    ),
    "pixart-sigma": Model(
        family=PixArt(),
        checkpoint="PixArt-alpha/PixArt-Sigma-XL-2-1024-MS",
        licence="openrail++",
        steps=25,
        gate=15,
        self_interval=3,
        guidance_scale=4.5,
    ),
    "lcm-pixart": Model(
        family=PixArt(),
        checkpoint="PixArt-alpha/PixArt-LCM-XL-2-1024-MS",
        licence="openrail++",
        steps=4,
        gate=1,
        self_interval=1,
        warm_up=0,
        guidance_scale=0.0,
        sampler="lcm",
    ),
    "svd": Model(
        family=StableVideo(),
        checkpoint="stabilityai/stable-video-diffusion-img2vid-xt",
        licence="stable-video-diffusion-community",
        steps=25,
        gate=10,
        self_interval=5,
        guidance_scale=3.0,
        sampler="euler",
    ),
    "opensora": Model(
        family=Latte(),
        checkpoint="maxin-cn/Latte-1",
        licence="apache-2.0",
        steps=250,
        gate=100,
        self_interval=10,
        guidance_scale=7.5,
        sampler="ddim",
    ),
}


def find_model(name: str) -> Model:
    """The model of that name. Raises :class:`ExportError` with the nearest name."""
    if name in MODELS:
        return MODELS[name]
    near = difflib.get_close_matches(name[:64], MODELS, n=1, cutoff=0.0)
    raise ExportError(f"unknown model {shown(name)}; did you mean {near[0]!r}? Models: {', '.join(MODELS)}")


def location(name: str) -> str:
    """Where the weights of a model are: a hub id, or the directory of an embedded model."""
    checkpoint = find_model(name).checkpoint
    if checkpoint != EMBEDDED:
        return checkpoint
    return str(resources.files("tgate_export") / "models" / name)
