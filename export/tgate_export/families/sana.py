"""Sana: a diffusion transformer with linear self-attention, text by Gemma, and an autoencoder of 32 pixels a side."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from typing import Any

import diffusers
import transformers
from torch import Tensor, nn

from tgate_engine.errors import ExportError
from tgate_engine.manifest import Conditioning
from tgate_export.checkpoints import Checkpoint
from tgate_export.families.base import ConditioningInput, Family, Size, Texts, side
from tgate_export.families.facts import SANA

TOKENS = 300
"""Tokens of a prompt: what diffusers' pipeline encodes, the instruction before it not counted."""


class Sana(Family):
    """Sana (arXiv 2410.10629) and Sana 1.5 (arXiv 2501.18427), in diffusers layout.

    A prompt follows an instruction to Gemma, which diffusers' pipeline writes; a negative prompt stands alone. Both
    are encoded by that pipeline itself (``tgate embed``), so that the instruction is the one it has.
    """

    facts = SANA
    pipeline_classes = ("SanaPipeline",)
    classes: Mapping[str, type[nn.Module]] = {
        "transformer": diffusers.SanaTransformer2DModel,
        "vae": diffusers.AutoencoderDC,
        "text_encoder": transformers.Gemma2Model,
    }
    denoiser = "transformer"
    text_components = ("text_encoder",)
    tokenizers = ("tokenizer",)
    tokenizer_class = transformers.GemmaTokenizer

    def check(self, checkpoint: Checkpoint) -> None:
        super().check(checkpoint)
        config = self.config(checkpoint, "transformer")
        self.check_output(checkpoint)
        if config["cross_attention_dim"] is None:
            raise ExportError(
                f"{checkpoint.where}: the transformer has cross_attention_dim = null, and diffusers cannot run it; "
                "the checkpoint is of another architecture"
            )

    def check_output(self, checkpoint: Checkpoint) -> None:
        """Raises :class:`~tgate_engine.errors.ExportError` for a network whose output or guidance is another's."""
        config = self.config(checkpoint, "transformer")
        channels, outputs = config["in_channels"], config["out_channels"]
        if outputs not in (channels, 2 * channels):
            raise ExportError(
                f"{checkpoint.where}: the transformer gives {outputs} channels; samplers take {channels}, or twice as "
                "many where it predicts a variance"
            )
        if config["guidance_embeds"]:
            raise ExportError(
                f"{checkpoint.where}: the transformer takes the guidance scale (guidance_embeds), as Sana-Sprint's "
                "does; take --model sana-sprint-1.6b or sana-sprint-0.6b, or give a checkpoint of Sana"
            )

    def check_decoder(self, checkpoint: Checkpoint) -> None:
        config = self.config(checkpoint, "vae")
        if config["in_channels"] != 3:
            raise ExportError(
                f"{checkpoint.where}: vae/config.json has in_channels = {config['in_channels']}; pictures have 3 "
                "channels"
            )
        halves = [len(config[f"{half}_block_out_channels"]) for half in ("encoder", "decoder")]
        if halves[0] != halves[1]:
            raise ExportError(
                f"{checkpoint.where}: vae/config.json has {halves[0]} encoder_block_out_channels and {halves[1]} "
                "decoder_block_out_channels; they must be as many, or pictures have another size than their latents say"
            )

    def denoise(
        self,
        denoiser: nn.Module,
        latents: Tensor,
        timesteps: Tensor,
        guidance: Tensor,
        conditioning: Mapping[str, Tensor],
    ) -> Tensor:
        assert isinstance(denoiser, diffusers.SanaTransformer2DModel)
        scale: Any = denoiser.config["timestep_scale"]
        output: Tensor = denoiser(
            latents,
            encoder_hidden_states=conditioning["prompt_embeds"],
            encoder_attention_mask=conditioning["prompt_mask"],
            timestep=timesteps * scale,
            return_dict=False,
        )[0]
        return output[:, : latents.shape[1]]

    def conditioning(self, checkpoint: Checkpoint, size: Size) -> Sequence[ConditioningInput]:
        """The text's states and its mask, each half's own."""
        width = int(self.config(checkpoint, "transformer")["caption_channels"])
        text, mask = (Conditioning(name=name, source="text") for name in ("prompt_embeds", "prompt_mask"))
        return (
            ConditioningInput(text, (TOKENS, width), attended=True),
            ConditioningInput(mask, (TOKENS,), mask=True, attended=True),
        )

    def pixels(self, checkpoint: Checkpoint) -> int:
        return int(2 ** (len(self.config(checkpoint, "vae")["encoder_block_out_channels"]) - 1))

    def size_multiple(self, checkpoint: Checkpoint) -> int:
        """The pipeline takes none but multiples of 32, whatever the autoencoder."""
        return math.lcm(32, self.pixels(checkpoint) * int(self.config(checkpoint, "transformer")["patch_size"]))

    def default_size(self, checkpoint: Checkpoint) -> Size:
        height, width = side(checkpoint, "transformer", self.config(checkpoint, "transformer")["sample_size"])
        return Size(height=height * self.pixels(checkpoint), width=width * self.pixels(checkpoint))

    def encode_with(self, pipe: Any, prompt: str, negative: str, clip_skip: int) -> tuple[Texts, Texts]:
        instruction = inspect.signature(type(pipe).__call__).parameters["complex_human_instruction"].default
        positive, mask, other, other_mask = pipe.encode_prompt(
            prompt,
            negative_prompt=negative,
            device="cpu",
            max_sequence_length=TOKENS,
            complex_human_instruction=instruction,
        )
        return (
            {"prompt_embeds": positive, "prompt_mask": mask.float()},
            {"prompt_embeds": other, "prompt_mask": other_mask.float()},
        )

    def call(self, pipe: Any, conditioning: Texts, guidance_scale: float, guidance_rescale: float) -> dict[str, Any]:
        return {
            "negative_prompt": None,
            "prompt_embeds": conditioning["prompt_embeds.positive"],
            "prompt_attention_mask": conditioning["prompt_mask.positive"],
            "negative_prompt_embeds": conditioning.get("prompt_embeds.negative"),
            "negative_prompt_attention_mask": conditioning.get("prompt_mask.negative"),
            "guidance_scale": guidance_scale,
            "use_resolution_binning": False,
        }
