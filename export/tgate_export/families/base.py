"""What the exporter asks of an architecture, and what most of them have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import transformers
from torch import Tensor, nn

from tgate_engine.errors import ExportError
from tgate_engine.manifest import Conditioning, Guidance
from tgate_export.checkpoints import Checkpoint
from tgate_export.gating import AttentionSite, Halves


@dataclass(frozen=True)
class ConditioningInput:
    """One conditioning tensor of a family, per half: its shape without the batch, and where its value comes from.

    ``follows_dtype``: it has the network's dtype; otherwise it is float32. ``mask``: it holds ones and zeros.
    """

    conditioning: Conditioning
    shape: tuple[int, ...]
    follows_dtype: bool = True
    mask: bool = False


@dataclass(frozen=True, kw_only=True)
class Size:
    """What is made: height and width in pixels, and frames, 1 for a picture."""

    height: int
    width: int
    frames: int = 1


class Family(ABC):
    """One architecture. Modules are built from configs alone, so that their weights may be fake.

    A family says how a model loads, what its inputs are, which modules are gated and how it is conditioned; nothing
    about gating itself. Class attributes describe it; methods that most architectures share are given here.
    """

    name: str
    pipeline_classes: tuple[str, ...]
    """The ``_class_name`` values of model_index.json that it loads."""
    classes: Mapping[str, type[nn.Module]]
    """The module of each component, by its directory in the checkpoint."""
    denoiser: str
    decoder: str = "vae"
    text_components: tuple[str, ...] = ()
    tokenizers: tuple[str, ...] = ()
    """One for each text component."""
    lower_prompts: bool = False
    """Whether the pipeline strips prompts and writes them in lower case before the tokenizer sees them."""
    tokenizer_class: type[Any] = transformers.CLIPTokenizer
    image_components: tuple[str, ...] = ()
    """Components that encode the picture a request starts from; none where a prompt is all."""
    after_gate: Halves = "negative"
    """The half of guidance that goes on after the gate. Cross-attention no longer tells; other conditioning does."""
    frames_axis: int | None = None
    """The axis of frames in latents [B, ...]; None for pictures."""
    fps: int = 8
    """Frames a second of a video."""

    def check(self, checkpoint: Checkpoint) -> None:
        """Raises :class:`~tgate_engine.errors.ExportError` where the configs are of another architecture."""
        network, channels = checkpoint.config(self.denoiser), checkpoint.config(self.decoder).get("latent_channels")
        if network.get("in_channels") != channels:
            raise ExportError(
                f"{checkpoint.where}: the {self.denoiser} takes {network.get('in_channels')} channels, its latents "
                f"have {channels}; inpainting and image-to-image checkpoints cannot be exported"
            )

    def build(self, checkpoint: Checkpoint, component: str) -> nn.Module:
        """A component's module in evaluation mode, its weights uninitialised."""
        cls, config = self.classes[component], dict(checkpoint.config(component))
        try:
            if issubclass(cls, transformers.PreTrainedModel):
                wanted = cls.config_class.from_dict(config)
                wanted._attn_implementation = "sdpa" if cls._supports_sdpa else "eager"
                module: nn.Module = cls(wanted)
            else:
                module = cls.from_config(config)
        except (TypeError, ValueError, KeyError) as error:
            raise ExportError(
                f"{checkpoint.where}: {component} is no {cls.__name__} ({type(error).__name__}: {error}); the "
                "checkpoint is of another architecture, or damaged"
            ) from None
        return module.eval()

    @abstractmethod
    def attention(self, denoiser: nn.Module) -> tuple[AttentionSite, ...]:
        """The modules the method gates, in the order they run."""

    @abstractmethod
    def denoise(
        self,
        denoiser: nn.Module,
        latents: Tensor,
        timesteps: Tensor,
        guidance: Tensor,
        conditioning: Mapping[str, Tensor],
    ) -> Tensor:
        """One network call: latents [N, ...], timesteps and guidance scales [N], conditioning [N, ...] by name.

        Gives the model output, of the latents' shape.
        """

    @abstractmethod
    def conditioning(self, checkpoint: Checkpoint, size: Size) -> Sequence[ConditioningInput]:
        """What :meth:`denoise` takes, for results of that size."""

    def latents(self, checkpoint: Checkpoint, size: Size) -> tuple[int, ...]:
        """The shape of one result's latents."""
        factor = vae_factor(checkpoint.config(self.decoder))
        shape = [int(checkpoint.config(self.decoder)["latent_channels"]), size.height // factor, size.width // factor]
        if self.frames_axis is not None:
            shape.insert(self.frames_axis - 1, size.frames)
        return tuple(shape)

    def guidance(self, checkpoint: Checkpoint, scale: float) -> Guidance:
        """How a guidance scale acts on this checkpoint's network."""
        return "classifier-free" if scale > 1 else "none"

    def guidance_ramp(self, latents: Sequence[int]) -> Tensor | None:
        """How guidance grows over the frames; see :class:`~tgate_export.gating.GatedStep`."""
        return None

    def text(self, encoders: Sequence[nn.Module]) -> nn.Module:
        """Token ids, one tensor [B, T] per tokenizer, to the conditioning of source "text", in its order.

        The module's sub-modules carry the names of ``text_components``.
        """
        raise NotImplementedError(f"{self.name} is not conditioned by text")

    def token_length(self, checkpoint: Checkpoint, index: int) -> int:
        """Tokens of a prompt for tokenizer ``index``, start and end included."""
        length = int(checkpoint.config(self.text_components[index])["max_position_embeddings"])
        return min(length, checkpoint.token_limit(self.tokenizers[index]) or length)

    def image(self, encoders: Sequence[nn.Module], checkpoint: Checkpoint) -> nn.Module:
        """A picture, uint8 [1, H, W, 3], and normal noise [1, 3, H, W] to the conditioning of source "image".

        The module's sub-modules carry the names of ``image_components``.
        """
        raise NotImplementedError(f"{self.name} is not conditioned by an image")

    def size_multiple(self, checkpoint: Checkpoint) -> int:
        """Height and width must be multiples of this many pixels."""
        return vae_factor(checkpoint.config(self.decoder))

    @abstractmethod
    def default_size(self, checkpoint: Checkpoint) -> Size:
        """The size where the user names none."""

    def check_size(self, checkpoint: Checkpoint, size: Size) -> None:
        """Raises :class:`~tgate_engine.errors.ExportError` for a size that the network cannot make."""
        multiple = self.size_multiple(checkpoint)
        for name, pixels in (("--height", size.height), ("--width", size.width)):
            if pixels < multiple or pixels % multiple:
                below = max(multiple, pixels // multiple * multiple)
                raise ExportError(
                    f"{name} must be a multiple of {multiple} pixels for this model, got {pixels}; "
                    f"the nearest are {below} and {below + multiple}"
                )
        if size.frames < 1:
            raise ExportError(f"--frames must be at least 1, got {size.frames}")

    def zero_negative(self, checkpoint: Checkpoint) -> bool:
        """Whether a request without a negative prompt gets zeros for its text."""
        return False


def vae_factor(config: Mapping[str, Any]) -> int:
    """Pixels per latent pixel of an autoencoder."""
    return int(2 ** (len(config["block_out_channels"]) - 1))


def unet_attention(denoiser: nn.Module) -> tuple[AttentionSite, ...]:
    """Every transformer block's ``attn1`` (self) and ``attn2`` (cross), in the order they run in a U-Net."""
    order = ("down_blocks", "mid_block", "up_blocks")
    sites = block_attention(denoiser)
    return tuple(sorted(sites, key=lambda site: order.index(site.module.split(".")[0])))


def block_attention(denoiser: nn.Module) -> tuple[AttentionSite, ...]:
    """Every transformer block's ``attn1`` (self) and, where it has one, ``attn2`` (cross), as modules are listed."""
    names = [
        name
        for name, module in denoiser.named_modules()
        if name.endswith((".attn1", ".attn2")) and type(module).__name__ == "Attention"
    ]
    return tuple(AttentionSite(name, "self" if name.endswith("attn1") else "cross") for name in names)
