"""What is known of each architecture before its code, which takes PyTorch and diffusers, is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What the command line has to know of an architecture.

    ``name``: its own, and its file's in this folder. ``cls``: the class in it. ``sources``: what conditions its models.
    ``video``: whether they make videos. ``clip_skips``: whether the pipeline can leave out its text encoders' last
    layers (``--clip-skip``). ``rescales_guidance``: whether it can rescale guidance (``--guidance-rescale``; arXiv
    2305.08891, section 3.4). ``text_graph``: whether its text encoders are exported as a graph; where they are not,
    requests bring what ``tgate embed`` made of their prompts. ``cross_attention``: whether cross-attention is a layer
    of its own; where text and picture attend to each other in one (joint attention), it cannot be reused by itself.
    ``guided``: whether there are two halves of guidance, and so a difference to reuse, and not a scale that the network
    takes as an input.
    ``from_pictures``: whether diffusers has a pipeline that begins from a picture in place of noise, and so export an
    encoder. ``ip_adapters``: whether an IP-Adapter may be brought (``--ip-adapter``). ``controlnets``: whether
    ControlNets can be exported beside it (``--controlnet``). ``late``: whether a checkpoint may have a second network,
    for late steps, with a guidance scale of its own (``--guidance-scale-2``).
    """

    name: str
    cls: str
    sources: tuple[Literal["text", "image"], ...] = ("text",)
    video: bool = False
    clip_skips: bool = False
    rescales_guidance: bool = False
    text_graph: bool = True
    cross_attention: bool = True
    guided: bool = True
    from_pictures: bool = False
    ip_adapters: bool = False
    controlnets: bool = False
    late: bool = False


SD = Facts(
    name="sd",
    cls="StableDiffusion",
    clip_skips=True,
    rescales_guidance=True,
    from_pictures=True,
    ip_adapters=True,
    controlnets=True,
)
SDXL = Facts(
    name="sdxl",
    cls="Sdxl",
    clip_skips=True,
    rescales_guidance=True,
    from_pictures=True,
    ip_adapters=True,
    controlnets=True,
)
KOLORS = Facts(name="kolors", cls="Kolors", text_graph=False, from_pictures=True)
PIXART = Facts(name="pixart", cls="PixArt")
SVD = Facts(name="svd", cls="StableVideo", sources=("image",), video=True)
LATTE = Facts(name="latte", cls="Latte", video=True)
SANA = Facts(name="sana", cls="Sana", text_graph=False)
SPRINT = Facts(name="sprint", cls="SanaSprint", text_graph=False, guided=False)
LUMINA = Facts(name="lumina", cls="Lumina", text_graph=False)
COSMOS = Facts(name="cosmos", cls="Cosmos", text_graph=False)
SD3 = Facts(name="sd3", cls="StableDiffusion3", cross_attention=False)
WAN = Facts(name="wan", cls="Wan", video=True, text_graph=False, late=True)
WAN_I2V = Facts(
    name="wan_i2v", cls="WanImageToVideo", sources=("text", "image"), video=True, text_graph=False, late=True
)
LTX = Facts(name="ltx", cls="Ltx", video=True, rescales_guidance=True)
QWEN = Facts(name="qwen", cls="QwenImage", text_graph=False, cross_attention=False)
FLUX = Facts(name="flux", cls="Flux", cross_attention=False, guided=False)
HUNYUAN = Facts(name="hunyuan", cls="HunyuanDiT", text_graph=False, rescales_guidance=True)
