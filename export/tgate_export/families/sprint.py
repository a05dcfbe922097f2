"""Sana-Sprint: Sana distilled to a few steps, which takes the guidance scale as an input and time as an angle."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

from tgate_engine.errors import ExportError
from tgate_engine.manifest import Guidance
from tgate_export.checkpoints import Checkpoint
from tgate_export.families.base import Texts
from tgate_export.families.facts import SPRINT
from tgate_export.families.sana import TOKENS, Sana
from tgate_export.schedulers import MIDDLE


class SanaSprint(Sana):
    """Sana-Sprint (arXiv 2503.09641), in diffusers layout.

    A network of flow matching that is used as one of TrigFlow: its pipeline turns the angle of the noise into the time
    that the network knows, scales what it sees, and turns what it gives into what the sampler wants. All of that is in
    the graphs. There is one half, so nothing is doubled.
    """

    facts = SPRINT
    pipeline_classes = ("SanaSprintPipeline",)

    def check_output(self, checkpoint: Checkpoint) -> None:
        config = self.config(checkpoint, "transformer")
        if config["out_channels"] != config["in_channels"]:
            raise ExportError(
                f"{checkpoint.where}: the transformer takes {config['in_channels']} channels and gives "
                f"{config['out_channels']}; {self.pipeline_classes[0]} wants as many"
            )
        if not config["guidance_embeds"]:
            raise ExportError(
                f"{checkpoint.where}: the transformer has guidance_embeds = false, and {self.pipeline_classes[0]} "
                "gives it the guidance scale; a checkpoint of Sana is exported by --model sana-1.6b"
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
        scale: Any = denoiser.config["guidance_embeds_scale"]
        sine, cosine = torch.sin(timesteps), torch.cos(timesteps)
        time = sine / (cosine + sine)
        column = time.view(-1, 1, 1, 1)
        length = torch.sqrt(column**2 + (1 - column) ** 2)
        seen = latents * length
        output: Tensor = denoiser(
            seen.to(latents.dtype),
            encoder_hidden_states=conditioning["prompt_embeds"],
            encoder_attention_mask=conditioning["prompt_mask"],
            guidance=guidance * scale,
            timestep=time,
            return_dict=False,
        )[0]
        return ((1 - 2 * column) * seen + (1 - 2 * column + 2 * column**2) * output) / length

    def guidance(self, checkpoint: Checkpoint, scale: float) -> Guidance:
        return "embedded"

    def encode_with(self, pipe: Any, prompt: str, negative: str, clip_skip: int) -> tuple[Texts, Texts]:
        instruction = inspect.signature(type(pipe).__call__).parameters["complex_human_instruction"].default
        states, mask = pipe.encode_prompt(
            prompt, device="cpu", max_sequence_length=TOKENS, complex_human_instruction=instruction
        )
        return {"prompt_embeds": states, "prompt_mask": mask.float()}, {}

    def call(self, pipe: Any, conditioning: Texts, guidance_scale: float, guidance_rescale: float) -> dict[str, Any]:
        pipe.scheduler.set_timesteps = functools.partial(_set_timesteps, pipe.scheduler.set_timesteps)
        return {
            "prompt_embeds": conditioning["prompt_embeds.positive"],
            "prompt_attention_mask": conditioning["prompt_mask.positive"],
            "guidance_scale": guidance_scale,
            "intermediate_timesteps": None,  # the pipeline refuses another number of steps beside one
            "use_resolution_binning": False,
        }


def _set_timesteps(own: Any, steps: int, **options: Any) -> None:
    """A scheduler's ``set_timesteps`` with the angle that the pipeline has by default for two steps."""
    own(steps, **{**options, "intermediate_timesteps": MIDDLE if steps == 2 else None})
