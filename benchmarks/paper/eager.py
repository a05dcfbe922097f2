"""An embedded model in eager PyTorch, whose every step is what a rule says: the paper's analytical tool (section 3)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline, PixArtAlphaPipeline
from torch import nn

from training.evaluate import Pictures
from training.models import time_ids
from training.settings import LATENT_CHANNELS, LATENT_PX

MODELS = Path(__file__).parents[2] / "tgate_engine/models"
GUIDANCE = {"mini-sdxl": 5.0, "mini-pixart": 4.5}
STEPS = 25
PROMPT, NULL = "prompt", "null"


@dataclass(frozen=True, kw_only=True)
class Step:
    """Step ``i`` (0-based). ``level``: its noise, sigma over alpha. ``half``: what the network gives for the prompt or
    the null text, float32 [B, 4, 16, 16]. ``scale``: that of guidance."""

    i: int
    level: float
    scale: float
    half: Callable[[str], torch.Tensor]

    def guided(self) -> torch.Tensor:
        """Equation 2."""
        null = self.half(NULL)
        return null + self.scale * (self.half(PROMPT) - null)


Rule = Callable[[Step], torch.Tensor]


class Eager:
    """Draws with a rule. Not thread-safe."""

    def __init__(self, model: str) -> None:
        self._pipe = DiffusionPipeline.from_pretrained(MODELS / model)
        self._pixart = isinstance(self._pipe, PixArtAlphaPipeline)
        self._guidance = GUIDANCE[model]
        self.network: nn.Module = self._pipe.transformer if self._pixart else self._pipe.unet
        self.running = PROMPT
        """Which half the network computes at the moment."""

    def attentions(self, kind: str) -> dict[str, nn.Module]:
        """Its modules of ``self`` or ``cross`` attention, by name, in the order in which they run."""
        last = {"self": "attn1", "cross": "attn2"}[kind]
        return {name: module for name, module in self.network.named_modules() if name.endswith(f".{last}")}

    @torch.no_grad()
    def draw(self, captions: Sequence[str], seed: int, rule: Rule) -> Pictures:
        """uint8 [B, 128, 128, 3]; picture j starts from the noise of ``seed + j``. 25 steps of the model's sampler."""
        encoded = self._encoded(["", *captions])
        halves = {
            NULL: {name: value[:1].expand(len(captions), *value.shape[1:]) for name, value in encoded.items()},
            PROMPT: {name: value[1:] for name, value in encoded.items()},
        }
        scheduler = self._pipe.scheduler
        scheduler.set_timesteps(STEPS)
        shape = (1, LATENT_CHANNELS, LATENT_PX, LATENT_PX)
        noise = [torch.randn(shape, generator=torch.Generator().manual_seed(seed + j)) for j in range(len(captions))]
        latents = torch.cat(noise) * scheduler.init_noise_sigma
        for i, t in enumerate(scheduler.timesteps):
            alpha = float(scheduler.alphas_cumprod[t])
            scaled = scheduler.scale_model_input(latents, t)

            def half(name: str, scaled: torch.Tensor = scaled, t: torch.Tensor = t) -> torch.Tensor:
                self.running = name
                return self._noise(scaled, t, halves[name])

            step = Step(i=i, level=((1 - alpha) / alpha) ** 0.5, scale=self._guidance, half=half)
            latents = scheduler.step(rule(step), t, latents, return_dict=False)[0]
        images = self._pipe.vae.decode(latents / self._pipe.vae.config.scaling_factor).sample
        pixels = (images / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()
        return np.asarray((pixels * 255).round().astype(np.uint8))

    def _encoded(self, texts: list[str]) -> dict[str, torch.Tensor]:
        if self._pixart:
            states, mask, _, _ = self._pipe.encode_prompt(texts, False, clean_caption=False)
            return {"states": states, "mask": mask}
        states, _, pooled, _ = self._pipe.encode_prompt(texts, do_classifier_free_guidance=False)
        return {"states": states, "pooled": pooled}

    def _noise(self, latents: torch.Tensor, t: torch.Tensor, text: dict[str, torch.Tensor]) -> torch.Tensor:
        given: dict[str, Any] = {"encoder_hidden_states": text["states"], "timestep": t.expand(len(latents))}
        if self._pixart:
            given["encoder_attention_mask"] = text["mask"]
            given["added_cond_kwargs"] = {"resolution": None, "aspect_ratio": None}
            return torch.as_tensor(self.network(latents, **given).sample.chunk(2, dim=1)[0])
        given["added_cond_kwargs"] = {"text_embeds": text["pooled"], "time_ids": time_ids(len(latents))}
        return torch.as_tensor(self.network(latents, **given).sample)


class Kept:
    """What an eager model's attention modules gave last, and whether they give it again: self-attention, cached."""

    def __init__(self, eager: Eager) -> None:
        self._eager = eager
        self._outputs: dict[tuple[str, str], torch.Tensor] = {}
        self.reuse = False

    @contextmanager
    def attached(self, kind: str) -> Iterator[None]:
        """While open, those modules keep their outputs, each half's apart; where ``reuse`` is set they give those."""
        undo = []
        for name, module in self._eager.attentions(kind).items():
            undo.append((module, module.forward))
            module.forward = self._wrapped(name, module.forward)
        try:
            yield
        finally:
            for module, forward in undo:
                module.forward = forward
            self._outputs.clear()

    def _wrapped(self, name: str, forward: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def run(*args: Any, **kwargs: Any) -> torch.Tensor:
            key = (name, self._eager.running)
            if not self.reuse:
                self._outputs[key] = forward(*args, **kwargs)
            return self._outputs[key]

        return run
