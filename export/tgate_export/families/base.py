"""What the exporter asks of an architecture, and what most of them have in common."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import accelerate
import transformers
from torch import Tensor, nn
from transformers.initialization import no_init_weights

from tgate_engine.errors import ExportError
from tgate_engine.manifest import Conditioning, Guidance
from tgate_export.attention import AttentionSite
from tgate_export.checkpoints import Checkpoint
from tgate_export.checkpoints.configs import bounded_module, check_code, check_config, class_name, without_code
from tgate_export.checkpoints.files import plain, quoted
from tgate_export.families.facts import Facts
from tgate_export.libraries import refusing
from tgate_export.methods.base import Halves
from tgate_export.schedulers import MU, PIPELINE_SCALES, PIPELINE_SIGMAS

Texts = Mapping[str, Tensor]
"""Conditioning of one prompt by name, each [1, ...]."""


@dataclass(frozen=True)
class ConditioningInput:
    """One conditioning tensor of a family, per half: its shape without the batch, and where its value comes from.

    ``follows_dtype``: it has the network's dtype; otherwise it is float32. ``mask``: it holds ones and zeros.
    ``attended``: the network reads it in cross-attention alone, so no graph that reuses it may take it. ``value``: the
    row of one whose source is "constant".
    """

    conditioning: Conditioning
    shape: tuple[int, ...]
    follows_dtype: bool = True
    mask: bool = False
    attended: bool = False
    value: tuple[float, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Size:
    """What is made: height and width in pixels, and frames, 1 for a picture."""

    height: int
    width: int
    frames: int = 1

    def __str__(self) -> str:
        return f"{self.width}x{self.height}"


@dataclass(frozen=True, kw_only=True)
class Scaling:
    """What a pipeline does to final latents before it decodes them: ``latents * std / scale + mean``; and the reverse
    to those of a picture.

    ``mean`` and ``std``: one number for each channel, or one for all. ``stored``: they are parameters of the decoder,
    ``latents_mean`` and ``latents_std`` [C], and not these.
    """

    scale: float
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    stored: bool = False


INPAINTING = 9
"""Channels that diffusers' inpainting pipelines give a network: 4 of latents, the mask, 4 of the masked picture's."""
_CONTROL = "controlnet:"


def control_component(name: str) -> str:
    """The component that a ControlNet of that name is."""
    return _CONTROL + name


class Family(ABC):
    """One architecture. Modules are built from configs alone, so that their weights may be fake.

    A family says how a model loads, what its inputs are, how it is conditioned and how diffusers' own pipeline is
    asked for the same; nothing about reuse. Class attributes describe it; methods that most architectures
    share are given here.
    """

    facts: Facts
    """What is known without this code."""
    pipeline_classes: tuple[str, ...]
    """The ``_class_name`` values of model_index.json that it loads."""
    classes: Mapping[str, type[nn.Module]]
    """The module of each component, by its directory in the checkpoint."""
    beside: Mapping[str, type[nn.Module]] = {}
    """The same of components that are brought beside a checkpoint."""
    inpainting_class: str = ""
    """The one of ``pipeline_classes`` whose networks are told what lies around a mask, beside latents; empty where
    there is none."""
    control_class: type[nn.Module] | None = None
    """The class of its ControlNets; None where it takes none."""
    renamed: Mapping[str, str] = {}
    """Pipelines that checkpoints name and diffusers has by another name now."""
    aliases: Mapping[str, tuple[str, ...]] = {}
    """Further names that checkpoints have for a class, by its own."""
    denoiser: str
    decoder: str = "vae"
    late_denoiser: str = ""
    """A second network of the denoiser's class, for late steps, where checkpoints may have one; see :meth:`late`."""
    late_guidance_argument: str = ""
    """What diffusers' pipeline calls its guidance scale."""
    text_components: tuple[str, ...] = ()
    tokenizers: tuple[str, ...] = ()
    """One for each text component."""
    brought: tuple[str, ...] = ()
    """Modules of code that its checkpoints name as their own (``auto_map``), in whose place diffusers' classes run."""
    lower_prompts: bool = False
    """Whether the pipeline strips prompts and writes them in lower case before the tokenizer sees them."""
    tokenizer_class: type[Any] = transformers.CLIPTokenizer
    image_components: tuple[str, ...] = ()
    """Components that encode the picture a request starts from, those that checkpoints may have
    (:meth:`image_parts`); none where a prompt is all."""
    picture_processor: str = "feature_extractor"
    """What diffusers' pipeline calls that which prepares pictures for CLIP's vision model."""
    after_gate: Halves = "negative"
    """The half of guidance that goes on after the gate. Cross-attention no longer tells; other conditioning does."""
    frames_axis: int | None = None
    """The axis of frames in latents [B, ...]; None for pictures."""
    frames_argument: str = ""
    """What diffusers' pipeline calls the number of frames; empty for pictures."""
    decodes_frames_together: bool = False
    """Whether the decoder takes a video's latents as they are, [1, C, F, h, w], instead of frame by frame; a picture's
    are then those of a video of one frame."""
    picture_pipeline: str = ""
    """diffusers' pipeline that begins from a picture; empty where there is none."""
    fps: int = 8
    """Frames a second of a video."""
    guidance_beyond: float = 0.0
    """How much more a pipeline guides than its guidance scale says."""
    textual_inversions: bool = False
    """Whether the pipeline writes out a textual inversion of several vectors before the tokenizer sees it."""

    def __init__(self) -> None:
        self._skeletons: WeakKeyDictionary[Checkpoint, dict[str, nn.Module]] = WeakKeyDictionary()

    @property
    def name(self) -> str:
        return self.facts.name

    def pipeline(self, checkpoint: Checkpoint) -> str:
        """The name of diffusers' class of the checkpoint's pipeline."""
        name = str(checkpoint.model_index["_class_name"])
        return self.renamed.get(name, name)

    def pipeline_parts(self) -> Mapping[str, Any]:
        """What diffusers' pipeline wants beside a checkpoint's components, and is no part of a bundle."""
        return {}

    def no_negative(self) -> str:
        """What the pipeline takes for a negative prompt where none is given."""
        return ""

    def check_pipeline(self, checkpoint: Checkpoint) -> None:
        """Raises :class:`~tgate_engine.errors.ExportError` for a checkpoint of another pipeline."""
        name = checkpoint.model_index.get("_class_name")
        if name not in self.pipeline_classes:
            raise ExportError(
                f"{checkpoint.where} holds a {plain(name)}; wanted is a {' or '.join(self.pipeline_classes)}"
            )

    def check(self, checkpoint: Checkpoint) -> None:
        """Raises :class:`~tgate_engine.errors.ExportError` where the configs are of another architecture, or ask for
        something that the pipeline would not do."""
        inputs, channels = self.config(checkpoint, self.denoiser)["in_channels"], self.latent_channels(checkpoint)
        if self.inpaints(checkpoint):
            if (inputs, channels) != (INPAINTING, 4):
                raise ExportError(
                    f"{checkpoint.where}: the {self.denoiser} takes {inputs} channels, its latents have {channels}; "
                    f"{self.inpainting_class} is exported with {INPAINTING} and 4. A plain model takes masks as well: "
                    f"name {self.pipeline_classes[0]} in its model_index.json"
                )
        elif inputs != channels:
            if self.inpainting_class and (inputs, channels) == (INPAINTING, 4):
                raise ExportError(
                    f"{checkpoint.where}: the {self.denoiser} takes {inputs} channels, its latents have {channels}; "
                    f"that is an inpainting model's: name {self.inpainting_class} in its model_index.json"
                )
            raise ExportError(
                f"{checkpoint.where}: the {self.denoiser} takes {inputs} channels, its latents have {channels}; "
                "image-to-image checkpoints cannot be exported"
            )
        self.check_decoder(checkpoint)

    def inpaints(self, checkpoint: Checkpoint) -> bool:
        """Whether the checkpoint's network is told what lies around a mask."""
        name = checkpoint.model_index.get("_class_name")
        return bool(self.inpainting_class) and name == self.inpainting_class

    def check_decoder(self, checkpoint: Checkpoint) -> None:
        """Raises :class:`~tgate_engine.errors.ExportError` for a decoder of anything but colours."""
        for key in ("in_channels", "out_channels"):
            channels = self.config(checkpoint, self.decoder).get(key)
            if channels not in (None, 3):
                raise ExportError(
                    f"{checkpoint.where}: {self.decoder}/config.json has {key} = {channels}; pictures have 3 channels"
                )
        config = self.config(checkpoint, self.decoder)
        levels = len(config["block_out_channels"])
        for key in (
            "up_block_types",
            *(("down_block_types",) if self.image_components or self.facts.from_pictures else ()),
        ):  # what encodes
            if key in config and len(config[key]) != levels:
                raise ExportError(
                    f"{checkpoint.where}: {self.decoder}/config.json has {len(config[key])} {key} and {levels} "
                    "block_out_channels; they must be as many, or pictures have another size than their latents say"
                )

    def skeleton(self, checkpoint: Checkpoint, component: str) -> nn.Module:
        """A component's module without memory for its weights, to look at, never to change. Built once."""
        built = self._skeletons.setdefault(checkpoint, {})
        if component not in built:
            with accelerate.init_empty_weights(include_buffers=False):
                built[component] = self.build(checkpoint, component)
        return built[component]

    def config(self, checkpoint: Checkpoint, component: str) -> Mapping[str, Any]:
        """A component's configuration as its class reads it: what config.json leaves out has the class's default."""
        config: Any = self.skeleton(checkpoint, component).config
        values: Mapping[str, Any] = config.to_dict() if hasattr(config, "to_dict") else config
        return values

    def build(self, checkpoint: Checkpoint, component: str) -> nn.Module:
        """A component's module in evaluation mode, its weights uninitialised."""
        cls: Any = self.class_of(component)
        where = f"{checkpoint.where}: {component}/config.json"
        config = without_code(checkpoint.config(component), self.brought)
        own = issubclass(cls, transformers.PreTrainedModel)
        if own:
            check_code(where, config)  # what lies around the component's part
            config = self._own_config(checkpoint, component, config)
        self._check_class(checkpoint, component, config)
        check_config(where, cls.config_class if own else cls, config)
        if own and config.get("return_dict") is False:
            raise ExportError(
                f"{where} has return_dict = false, which pipelines of diffusers do not expect; leave it out"
            )
        advice = "the checkpoint is of another architecture, or damaged"
        with refusing(f"{checkpoint.where}: {component} is no {cls.__name__}", advice), bounded_module(where):
            module = _transformers_module(cls, config) if own else _diffusers_module(cls, config)
        return module.eval()

    def _own_config(self, checkpoint: Checkpoint, component: str, config: dict[str, Any]) -> dict[str, Any]:
        """The part of a configuration of several models (CLIP's text and vision) that is the component's."""
        cls: Any = self.class_of(component).config_class
        part = config.get(cls.base_config_key) if cls.base_config_key else None
        return dict(part) if isinstance(part, Mapping) and config.get("model_type") != cls.model_type else config

    def _check_class(self, checkpoint: Checkpoint, component: str, config: Mapping[str, Any]) -> None:
        cls: Any = self.class_of(component)
        names = (cls.__name__, *self.aliases.get(cls.__name__, ()))
        named = {"model_index.json": checkpoint.named_class(component)}
        if issubclass(cls, transformers.PreTrainedModel):
            kind = config.get("model_type")
            if kind not in (None, cls.config_class.model_type):
                raise ExportError(
                    f"{checkpoint.where}: {component}/config.json has model_type = {quoted(kind)}, {cls.__name__} has "
                    f"{cls.config_class.model_type!r}; the checkpoint is of another architecture"
                )
        else:
            named["its config.json"] = class_name(f"{checkpoint.where}: {component}/config.json", config)
        for place, name in named.items():
            if name is not None and name not in names:
                raise ExportError(
                    f"{checkpoint.where}: {component} is a {name} in {place}; {self.name} wants {' or '.join(names)}"
                )
        if config.get("quantization_config") is not None:
            quantised = config["quantization_config"]
            method = quantised.get("quant_method", "unknown") if isinstance(quantised, Mapping) else quantised
            raise ExportError(
                f"{checkpoint.where}: {component} is quantised (quantization_config in its config.json, method "
                f"{quoted(method)}); give the checkpoint with floating-point weights"
            )

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

    def steered(
        self,
        denoiser: nn.Module,
        latents: Tensor,
        timesteps: Tensor,
        guidance: Tensor,
        conditioning: Mapping[str, Tensor],
        residuals: Sequence[Tensor],
    ) -> Tensor:
        """:meth:`denoise`, with ``residuals`` [N, ...] of ControlNets added to what the network keeps on its way down,
        and the last of them to its middle."""
        raise NotImplementedError(f"{self.name} takes no ControlNets")

    def look(
        self,
        net: nn.Module,
        latents: Tensor,
        timesteps: Tensor,
        conditioning: Mapping[str, Tensor],
        pictures: Tensor,
    ) -> Sequence[Tensor]:
        """The residuals of a ControlNet for :meth:`steered`, each [N, ...]. ``pictures``: [M, 3, H, W] from 0 to 1,
        each for N / M rows that lie together; the rest as :meth:`denoise` takes it."""
        raise NotImplementedError(f"{self.name} takes no ControlNets")

    def check_control(self, checkpoint: Checkpoint, net: str) -> None:
        """Raises :class:`ExportError` for a ControlNet whose configuration is of another architecture, or asks for
        something that the pipeline would not do."""
        raise NotImplementedError(f"{self.name} takes no ControlNets")

    def late(self, checkpoint: Checkpoint) -> float | None:
        """The timestep, in training steps, below which :attr:`late_denoiser` runs; None where there is one network.
        Raises :class:`ExportError` where the configuration does not say it rightly."""
        return None

    def denoisers(self, checkpoint: Checkpoint) -> tuple[str, ...]:
        """The components that denoise, the first steps' first."""
        return (self.denoiser,) if self.late(checkpoint) is None else (self.denoiser, self.late_denoiser)

    def image_parts(self, checkpoint: Checkpoint) -> tuple[str, ...]:
        """Those of :attr:`image_components` that the checkpoint has."""
        return self.image_components

    def class_of(self, component: str) -> type[Any]:
        """The module's class of a component."""
        component = self.denoiser if component == self.late_denoiser else component
        if component.startswith(_CONTROL) and self.control_class is not None:
            return self.control_class
        return self.classes[component] if component in self.classes else self.beside[component]

    def deep(self, checkpoint: Checkpoint, branch: int) -> str | None:
        """The denoiser's module whose output is all that its last ``branch`` + 1 layers take of those below, beside
        skip connections from its first ones; None where the architecture has no such connections. Raises
        :class:`ExportError` where it has not so many layers."""
        return None

    def finest(self, checkpoint: Checkpoint, sites: Sequence[AttentionSite]) -> tuple[str, ...]:
        """Those of the denoiser's self-attention modules that attend over its finest grid, each the first layer of a
        transformer block; empty where the architecture has no such levels. ``sites``: all of its attention."""
        return ()

    @abstractmethod
    def conditioning(self, checkpoint: Checkpoint, size: Size) -> Sequence[ConditioningInput]:
        """What :meth:`denoise` takes, for results of that size."""

    def latent_channels(self, checkpoint: Checkpoint) -> int:
        return int(self.config(checkpoint, self.decoder)["latent_channels"])

    def pixels(self, checkpoint: Checkpoint) -> int:
        """Pixels per latent pixel."""
        return int(2 ** (len(self.config(checkpoint, self.decoder)["block_out_channels"]) - 1))

    def latents(self, checkpoint: Checkpoint, size: Size) -> tuple[int, ...]:
        """The shape of one result's latents."""
        factor = self.pixels(checkpoint)
        shape = [self.latent_channels(checkpoint), size.height // factor, size.width // factor]
        if self.frames_axis is not None:
            shape.insert(self.frames_axis - 1, size.frames)
        return tuple(shape)

    def scaling(self, checkpoint: Checkpoint) -> Scaling:
        """What the pipeline does to latents before decoding. Raises :class:`ExportError` for keys of the decoder's
        config that ask for more than the pipeline would do."""
        config = self.config(checkpoint, self.decoder)
        for key in ("shift_factor", "latents_mean", "latents_std"):
            value = config.get(key)
            values = value if isinstance(value, (list, tuple)) else (value,)
            if value is not None and any(v not in (0, 0.0) for v in values):
                raise ExportError(
                    f"{checkpoint.where}: {self.decoder}/config.json has {key} = {value}, which "
                    f"{checkpoint.model_index['_class_name']} ignores; set it to null to export what diffusers draws"
                )
        return Scaling(scale=self._scaling_factor(checkpoint))

    def _scaling_shifted(self, checkpoint: Checkpoint) -> Scaling:
        """Of pipelines that add a shift."""
        config = self.config(checkpoint, self.decoder)
        shift = config["shift_factor"]
        if shift is None or config["latents_mean"] is not None or config["latents_std"] is not None:
            raise ExportError(
                f"{checkpoint.where}: {self.decoder}/config.json has shift_factor = {shift}, latents_mean = "
                f"{config['latents_mean']} and latents_std = {config['latents_std']}; {self.pipeline_classes[0]} wants "
                "a shift_factor, and ignores the others: set them to null"
            )
        return Scaling(scale=self._scaling_factor(checkpoint), mean=(float(shift),))

    def _scaling_by_channel(self, checkpoint: Checkpoint) -> Scaling:
        """Of pipelines that undo a normalisation of each channel."""
        config, channels = self.config(checkpoint, self.decoder), self.latent_channels(checkpoint)
        mean, std = config["latents_mean"], config["latents_std"]
        if len(mean) != channels or len(std) != channels or not all(map(math.isfinite, (*mean, *std))):
            raise ExportError(
                f"{checkpoint.where}: {self.decoder}/config.json has {len(mean)} latents_mean and {len(std)} "
                f"latents_std for {channels} channels; as many finite numbers of each are wanted"
            )
        return Scaling(scale=1.0, mean=tuple(map(float, mean)), std=tuple(map(float, std)))

    def _scaling_factor(self, checkpoint: Checkpoint) -> float:
        value = self.config(checkpoint, self.decoder)["scaling_factor"]
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < abs(value) < math.inf:
            raise ExportError(
                f"{checkpoint.where}: {self.decoder}/config.json has scaling_factor = {value!r}; latents are divided "
                "by it, so it must be a finite number other than 0"
            )
        return float(value)

    def scheduler_config(self, checkpoint: Checkpoint, size: Size) -> Mapping[str, Any]:
        """The scheduler's configuration as the pipeline uses it for a size, with what it hands over beside it
        (:data:`~tgate_export.schedulers.MU`); its class is the one that model_index.json names."""
        config = {
            k: v for k, v in checkpoint.scheduler_config().items() if k not in (MU, PIPELINE_SIGMAS, PIPELINE_SCALES)
        }
        class_name(f"{checkpoint.where}: scheduler/scheduler_config.json", config)
        if named := checkpoint.named_class("scheduler"):
            config["_class_name"] = named
        return config

    def guidance(self, checkpoint: Checkpoint, scale: float) -> Guidance:
        """How a guidance scale acts on this checkpoint's network."""
        return "classifier-free" if scale > 1 else "none"

    def as_pipeline(self, latents: Tensor) -> Tensor:
        """Latents [B, ...] as diffusers' pipeline holds them in its loop."""
        return latents

    def from_pipeline(self, latents: Tensor, shape: Sequence[int]) -> Tensor:
        """The reverse, to latents of that shape."""
        return latents

    def lengths(self, output: Tensor) -> Tensor | None:
        """How long a model output [B, ...] is, a number that broadcasts to it, where the pipeline brings guided output
        back to the length of the prompt's half; None where guided output stays as it is."""
        return None

    def guidance_ramp(self, latents: Sequence[int]) -> Tensor | None:
        """How guidance grows over the frames; see :class:`~tgate_export.step.DenoisingStep`."""
        return None

    def text(self, encoders: Sequence[nn.Module], clip_skip: int = 0) -> nn.Module:
        """Token ids, one tensor [B, T] per tokenizer, to the conditioning of source "text", in its order.

        The module's sub-modules carry the names of ``text_components``. With ``clip_skip``, it gives further tensors:
        those of :meth:`negative_text`, which the pipeline encodes another way for a negative prompt.
        """
        raise NotImplementedError(f"{self.name} is not conditioned by text")

    def negative_text(self, clip_skip: int) -> tuple[str, ...]:
        """Names of conditioning that :meth:`text` gives once more, for negative prompts, after all the others."""
        return ()

    def rescales_guidance(self, checkpoint: Checkpoint) -> bool:
        """Whether the checkpoint's pipeline can rescale guidance."""
        return self.facts.rescales_guidance

    def check_clip_skip(self, checkpoint: Checkpoint, clip_skip: int) -> None:
        """Raises :class:`ExportError` where so many layers cannot be left out of the text encoders."""
        if clip_skip and not self.facts.clip_skips:
            raise ExportError(f"--clip-skip is for models with CLIP text encoders; {checkpoint.where} has none")
        for component in self.text_components if clip_skip else ():
            layers = int(self.config(checkpoint, component)["num_hidden_layers"])
            if not 0 < clip_skip < layers:
                raise ExportError(
                    f"--clip-skip must be from 1 to {layers - 1}, since the {component} has {layers} layers; "
                    f"got {clip_skip}"
                )

    def token_length(self, checkpoint: Checkpoint, index: int) -> int:
        """Tokens of a prompt for tokenizer ``index``, start and end included."""
        component, tokenizer = self.text_components[index], self.tokenizers[index]
        places = int(self.config(checkpoint, component)["max_position_embeddings"])
        limit = checkpoint.token_limit(tokenizer) or places
        if limit > places:
            raise ExportError(
                f"{checkpoint.where}: {tokenizer}/tokenizer_config.json has model_max_length = {limit}, and the "
                f"{component} has places for {places} tokens; set it to {places} at most"
            )
        return limit

    def vocabulary(self, checkpoint: Checkpoint, component: str) -> int:
        """Tokens that a text encoder knows."""
        return int(self.config(checkpoint, component)["vocab_size"])

    def tokenizer_kind(self, index: int) -> type[Any]:
        """The class of tokenizer ``index``."""
        return self.tokenizer_class

    def end_token(self, checkpoint: Checkpoint, index: int) -> int | None:
        """The token by which a text encoder tells where a prompt ends and padding begins; None where it does not."""
        return None

    def image(self, encoders: Sequence[nn.Module], checkpoint: Checkpoint, size: Size) -> nn.Module:
        """A picture, uint8 [1, H, W, 3], and normal noise [1, 3, H, W] to the conditioning of source "image" at a size.

        The module's sub-modules carry the names of :meth:`image_parts`, whose ``encoders`` are.
        """
        raise NotImplementedError(f"{self.name} is not conditioned by an image")

    def reference(self, checkpoint: Checkpoint, encoders: Sequence[nn.Module], *, guided: bool) -> nn.Module:
        """A reference picture, uint8 [1, S, S, 3], to the conditioning of source "reference", ``<name>.<half>`` in the
        halves' order, the positive alone where nothing is ``guided``.

        The module's sub-modules carry the names of :data:`~tgate_export.ip_adapter.COMPONENTS`.
        """
        raise NotImplementedError(f"{self.name} takes no picture beside the prompt")

    def size_multiple(self, checkpoint: Checkpoint) -> int:
        """Height and width must be multiples of this many pixels."""
        return self.pixels(checkpoint)

    @abstractmethod
    def default_size(self, checkpoint: Checkpoint) -> Size:
        """The size where the user names none. Raises :class:`ExportError` where the checkpoint names none either."""

    def default_frames(self, checkpoint: Checkpoint) -> int:
        """Frames where the user names no number."""
        return 1

    def check_size(self, checkpoint: Checkpoint, size: Size) -> None:
        """Raises :class:`~tgate_engine.errors.ExportError` for a size that the network cannot make."""
        multiple = self.size_multiple(checkpoint)
        for name, pixels in (("height", size.height), ("width", size.width)):
            if pixels < multiple or pixels % multiple:
                below = max(multiple, pixels // multiple * multiple)
                raise ExportError(
                    f"the {name} must be a multiple of {multiple} pixels for this model, got {pixels}; "
                    f"the nearest are {below} and {below + multiple}"
                )
        if size.frames < 1:
            raise ExportError(f"--frames must be at least 1, got {size.frames}")

    def zero_negative(self, checkpoint: Checkpoint) -> bool:
        """Whether a request without a negative prompt gets zeros for its text."""
        return False

    def encode_with(self, pipe: Any, prompt: str, negative: str, clip_skip: int) -> tuple[Texts, Texts]:
        """What diffusers' own pipeline makes of a prompt and a negative prompt: conditioning of source "text"."""
        raise NotImplementedError(f"{self.name} is not conditioned by text")

    def encode_image_with(self, pipe: Any, picture: Tensor, noise: Tensor, size: Size) -> Texts:
        """What diffusers' own pipeline makes of a picture and noise, as :meth:`image` takes them, at a size."""
        raise NotImplementedError(f"{self.name} is not conditioned by an image")

    @abstractmethod
    def call(self, pipe: Any, conditioning: Texts, guidance_scale: float, guidance_rescale: float) -> dict[str, Any]:
        """Arguments that have diffusers' own pipeline denoise with that conditioning, ``<name>.<half>`` to [B, ...].

        ``pipe`` is the caller's to throw away: parts of it may be put out of action."""


def _transformers_module(cls: Any, config: Mapping[str, Any]) -> nn.Module:
    parsed = cls.config_class.from_dict(dict(config))
    parsed._attn_implementation = "sdpa" if cls._supports_sdpa else "eager"
    with no_init_weights():
        module: nn.Module = cls(parsed)
    return module


def _diffusers_module(cls: Any, config: Mapping[str, Any]) -> nn.Module:
    with no_init_weights():
        module: nn.Module = cls.from_config(dict(config))
    return module


def side(checkpoint: Checkpoint, component: str, sample_size: object) -> tuple[int, int]:
    """Height and width, in latent pixels, that ``sample_size`` of a network's config says. Raises ExportError."""
    pair: Any = [sample_size, sample_size] if isinstance(sample_size, int) else sample_size
    whole = isinstance(pair, (list, tuple)) and len(pair) == 2 and all(type(n) is int and n > 0 for n in pair)
    if not whole:
        raise ExportError(
            f"{checkpoint.where}: {component}/config.json has sample_size = {sample_size!r}, which names no size of "
            "latents; give --size WIDTHxHEIGHT"
        )
    return pair[0], pair[1]
