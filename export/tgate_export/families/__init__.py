"""The models that can be exported, by name, and the architectures behind them.

A family is one file here. It says how an architecture loads, what conditions it, how diffusers' own pipeline is asked
for the same, and nothing about reuse, graphs or samplers. ``published`` holds the configurations of the models.

The table of models takes no PyTorch: a family's code is loaded when it is asked for.
"""

from __future__ import annotations

import difflib
import functools
import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import resources
from typing import TYPE_CHECKING

from tgate_engine.errors import ExportError, shown
from tgate_engine.sampler import Fact
from tgate_export.families.facts import (
    COSMOS,
    FLUX,
    HUNYUAN,
    KOLORS,
    LATTE,
    LTX,
    LUMINA,
    PIXART,
    QWEN,
    SANA,
    SD,
    SD3,
    SDXL,
    SPRINT,
    SVD,
    WAN,
    WAN_I2V,
    Facts,
)
from tgate_export.methods.base import Settings

if TYPE_CHECKING:
    from tgate_export.families.base import Family

EMBEDDED = "embedded"


@dataclass(frozen=True, kw_only=True)
class Model:
    """One name of ``--model``: what is known of its family, where its weights are, and the settings the paper or
    its authors use.

    ``checkpoint``: a hub id, or :data:`EMBEDDED` for one in `tgate_engine/models`. ``elsewhere``: hub ids of
    components that lie in repositories of their own. ``licence``: the weights'. ``guidance_scale_2``: of the second
    network where there are two; None is the first one's. ``batch``: images in one call, least and most, where the user
    names no range. ``tuned``: the method and the default plan's settings that `tgate tune` found, where it was asked:
    taken where the user names no part of a plan and no other weights, over the graphs that ``gate`` and
    ``self_interval`` want.
    """

    facts: Facts
    checkpoint: str
    licence: str
    steps: int
    gate: int
    self_interval: int
    guidance_scale: float
    guidance_scale_2: float | None = None
    warm_up: int = 2
    sampler: str = "dpmpp_2m"
    batch: tuple[int, int] = (1, 1)
    elsewhere: Mapping[str, str] = field(default_factory=dict)
    tuned: tuple[str, Settings] | None = None

    @property
    def method(self) -> str:
        """The method where the user names none: the paper's, or where it has nothing to reuse, one that has."""
        if self.facts.cross_attention:
            return "tgate"
        return "guidance_delta" if self.facts.guided else "forecast"

    @property
    def tuned_facts(self) -> Mapping[str, Fact] | None:
        """``tuned``, as a plan tells its settings."""
        from tgate_export.methods import find_method

        return None if self.tuned is None else find_method(self.tuned[0]).facts(self.tuned[1])

    @property
    def family(self) -> Family:
        """The family's code, loaded when it is first asked for. It takes seconds, and PyTorch."""
        return _load(self.facts)


MODELS: Mapping[str, Model] = {
    "mini-sdxl": Model(
        facts=SDXL,
        checkpoint=EMBEDDED,
        licence="apache-2.0",
        steps=25,
        gate=10,
        self_interval=5,
        guidance_scale=5.0,
        batch=(1, 4),
    ),
    "mini-pixart": Model(
        facts=PIXART,
        checkpoint=EMBEDDED,
        licence="apache-2.0",
        steps=25,
        gate=15,
        self_interval=3,
        guidance_scale=4.5,
        batch=(1, 4),
        tuned=("tgate+guidance_delta", Settings(steps=25, gate=7, refresh_interval=8)),
    ),
    "sd15": Model(
        facts=SD,
        checkpoint="stable-diffusion-v1-5/stable-diffusion-v1-5",
        licence="creativeml-openrail-m",
        steps=25,
        gate=10,
        self_interval=1,
        guidance_scale=7.5,
    ),
    "sd21": Model(
        facts=SD,
        checkpoint="stabilityai/stable-diffusion-2-1",
        licence="openrail++",
        steps=25,
        gate=10,
        self_interval=1,
        guidance_scale=7.5,
    ),
    "sdxl": Model(
        facts=SDXL,
        checkpoint="stabilityai/stable-diffusion-xl-base-1.0",
        licence="openrail++",
        steps=25,
        gate=10,
        self_interval=5,
        guidance_scale=5.0,
    ),
    "ssd-1b": Model(
        facts=SDXL,
        checkpoint="segmind/SSD-1B",
        licence="apache-2.0",
        steps=25,
        gate=10,
        self_interval=5,
        guidance_scale=9.0,
    ),
    "lcm-sdxl": Model(
        facts=SDXL,
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
    "kolors": Model(
        facts=KOLORS,
        checkpoint="Kwai-Kolors/Kolors-diffusers",
        licence="kolors",
        steps=50,
        gate=20,
        self_interval=5,
        guidance_scale=5.0,
        sampler="euler",
    ),
    "pixart-alpha": Model(
        facts=PIXART,
        checkpoint="PixArt-alpha/PixArt-XL-2-1024-MS",
        licence="openrail++",
        steps=25,
        gate=15,
        self_interval=3,
        guidance_scale=4.5,
    ),
    "pixart-sigma": Model(
        facts=PIXART,
        checkpoint="PixArt-alpha/PixArt-Sigma-XL-2-1024-MS",
        licence="openrail++",
        steps=25,
        gate=15,
        self_interval=3,
        guidance_scale=4.5,
    ),
    "lcm-pixart": Model(
        facts=PIXART,
        checkpoint="PixArt-alpha/PixArt-LCM-XL-2-1024-MS",
        licence="openrail++",
        steps=4,
        gate=1,
        self_interval=1,
        warm_up=0,
        guidance_scale=0.0,
        sampler="lcm",
    ),
    "hunyuandit-1.2": Model(
        facts=HUNYUAN,
        checkpoint="Tencent-Hunyuan/HunyuanDiT-v1.2-Diffusers",
        licence="tencent-hunyuan-community",
        steps=50,
        gate=30,
        self_interval=3,
        guidance_scale=5.0,
    ),
    "lumina-next": Model(
        facts=LUMINA,
        checkpoint="Alpha-VLLM/Lumina-Next-SFT-diffusers",
        licence="apache-2.0",
        steps=30,
        gate=18,
        self_interval=3,
        guidance_scale=4.0,
        sampler="euler",
    ),
    "sd3-medium": Model(
        facts=SD3,
        checkpoint="stabilityai/stable-diffusion-3-medium-diffusers",
        licence="stabilityai-ai-community",
        steps=28,
        gate=17,
        self_interval=1,
        guidance_scale=7.0,
        sampler="euler",
    ),
    "sd35-medium": Model(
        facts=SD3,
        checkpoint="stabilityai/stable-diffusion-3.5-medium",
        licence="stabilityai-ai-community",
        steps=40,
        gate=24,
        self_interval=1,
        guidance_scale=4.5,
        sampler="euler",
    ),
    "flux1-dev": Model(
        facts=FLUX,
        checkpoint="black-forest-labs/FLUX.1-dev",
        licence="flux-1-dev-non-commercial-license",
        steps=50,
        gate=30,
        self_interval=1,
        guidance_scale=3.5,
        sampler="euler",
    ),
    "flux1-schnell": Model(
        facts=FLUX,
        checkpoint="black-forest-labs/FLUX.1-schnell",
        licence="apache-2.0",
        steps=4,
        gate=2,
        self_interval=1,
        guidance_scale=0.0,
        sampler="euler",
    ),
    "qwen-image": Model(
        facts=QWEN,
        checkpoint="Qwen/Qwen-Image",
        licence="apache-2.0",
        steps=50,
        gate=30,
        self_interval=1,
        guidance_scale=4.0,
        sampler="euler",
    ),
    "sana-1.6b": Model(
        facts=SANA,
        checkpoint="Efficient-Large-Model/Sana_1600M_1024px_BF16_diffusers",
        licence="nscl-v2-custom",
        steps=20,
        gate=12,
        self_interval=3,
        guidance_scale=4.5,
    ),
    "sana-1.6b-512": Model(
        facts=SANA,
        checkpoint="Efficient-Large-Model/Sana_1600M_512px_diffusers",
        licence="nscl-v2-custom",
        steps=20,
        gate=12,
        self_interval=3,
        guidance_scale=4.5,
    ),
    "sana-sprint-1.6b": Model(
        facts=SPRINT,
        checkpoint="Efficient-Large-Model/Sana_Sprint_1.6B_1024px_diffusers",
        licence="nscl-v2-custom",
        steps=2,
        gate=1,
        self_interval=1,
        warm_up=0,
        guidance_scale=4.5,
        sampler="scm",
    ),
    "sana-sprint-0.6b": Model(
        facts=SPRINT,
        checkpoint="Efficient-Large-Model/Sana_Sprint_0.6B_1024px_diffusers",
        licence="nscl-v2-custom",
        steps=2,
        gate=1,
        self_interval=1,
        warm_up=0,
        guidance_scale=4.5,
        sampler="scm",
    ),
    "cosmos-predict2-2b": Model(
        facts=COSMOS,
        checkpoint="nvidia/Cosmos-Predict2-2B-Text2Image",
        licence="nvidia-open-model-license",
        steps=35,
        gate=21,
        self_interval=3,
        guidance_scale=7.0,
        sampler="euler",
    ),
    "svd": Model(
        facts=SVD,
        checkpoint="stabilityai/stable-video-diffusion-img2vid-xt",
        licence="stable-video-diffusion-community",
        steps=25,
        gate=10,
        self_interval=5,
        guidance_scale=3.0,
        sampler="euler",
    ),
    "opensora": Model(
        facts=LATTE,
        checkpoint="maxin-cn/Latte-1",
        licence="apache-2.0",
        steps=250,
        gate=100,
        self_interval=10,
        guidance_scale=7.5,
        sampler="ddim",
    ),
    "ltx-video": Model(
        facts=LTX,
        checkpoint="Lightricks/LTX-Video",
        licence="ltx-video-2b-v0.9",
        steps=50,
        gate=30,
        self_interval=3,
        guidance_scale=3.0,
        sampler="euler",
    ),
    "wan21-t2v-1.3b": Model(
        facts=WAN,
        checkpoint="Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
        licence="apache-2.0",
        steps=50,
        gate=30,
        self_interval=3,
        guidance_scale=5.0,
        sampler="unipc",
    ),
    "wan21-t2v-14b": Model(
        facts=WAN,
        checkpoint="Wan-AI/Wan2.1-T2V-14B-Diffusers",
        licence="apache-2.0",
        steps=50,
        gate=30,
        self_interval=3,
        guidance_scale=5.0,
        sampler="unipc",
    ),
    "wan22-t2v-a14b": Model(
        facts=WAN,
        checkpoint="Wan-AI/Wan2.2-T2V-A14B-Diffusers",
        licence="apache-2.0",
        steps=40,
        gate=24,
        self_interval=3,
        guidance_scale=4.0,
        guidance_scale_2=3.0,
        sampler="unipc",
    ),
    "wan21-i2v-14b": Model(
        facts=WAN_I2V,
        checkpoint="Wan-AI/Wan2.1-I2V-14B-480P-Diffusers",
        licence="apache-2.0",
        steps=40,
        gate=24,
        self_interval=3,
        guidance_scale=5.0,
        sampler="unipc",
    ),
    "wan22-i2v-a14b": Model(
        facts=WAN_I2V,
        checkpoint="Wan-AI/Wan2.2-I2V-A14B-Diffusers",
        licence="apache-2.0",
        steps=40,
        gate=24,
        self_interval=3,
        guidance_scale=3.5,
        guidance_scale_2=3.5,
        sampler="unipc",
    ),
}


@functools.cache
def _load(facts: Facts) -> Family:
    family: Family = getattr(importlib.import_module(f"tgate_export.families.{facts.name}"), facts.cls)()
    return family


def find_model(name: str) -> Model:
    """The model of that name. Raises :class:`ExportError` with those that begin so, or the nearest name."""
    if name in MODELS:
        return MODELS[name]
    begun = [model for model in MODELS if model.startswith(f"{name}-")]
    near = " or ".join(map(repr, begun or difflib.get_close_matches(name[:64], MODELS, n=1, cutoff=0.0)))
    ships = "; mini is the bundle that ships, made of mini-pixart" if name == "mini" else ""
    raise ExportError(f"unknown model '{shown(name)}'; did you mean {near}? Models: {', '.join(MODELS)}{ships}")


def find_text_model(name: str) -> Model:
    """The model of that name, which a prompt conditions. Raises :class:`ExportError`."""
    model = find_model(name)
    if "text" not in model.facts.sources:
        raise ExportError(f"{name} is conditioned by an image, not by a prompt; there is nothing to embed")
    return model


def location(name: str) -> str:
    """Where the weights of a model are: a hub id, or the directory of an embedded model."""
    checkpoint = find_model(name).checkpoint
    if checkpoint != EMBEDDED:
        return checkpoint
    return str(resources.files("tgate_engine") / "models" / name)
