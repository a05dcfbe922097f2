"""Captions to conditioning, and a short warm start of the text encoders without the denoiser.

The warm start asks a throw-away head to read the attributes of the scene (colour and shape of each item
in caption order, layout, background, texture) off the very states that the denoiser will attend to.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer, T5EncoderModel, T5Tokenizer

from training import pixart
from training.grammar import BACKGROUNDS, COLOURS, SHAPES, TEXTURES, Scene, draw_scene, training_caption
from training.models import build_text_encoders
from training.reading import NOTHING, token_targets
from training.settings import LATENT_PX, MAX_TOKENS, MODELS, PIXART_SETTINGS, SETTINGS, PixArtSettings, Settings
from training.tokenizer import build_tokenizer

_SLOTS = 3
_LAYOUTS = ("centre", "left", "right", "top", "bottom", "above", "below", "row", "column")
_HEADS = {"colour": len(COLOURS) + 1, "shape": len(SHAPES) + 1}
_SCENE_HEADS = {
    "layout": len(_LAYOUTS) + 1,
    "background": len(BACKGROUNDS) + 1,
    "texture": len(TEXTURES) + 1,
}
_SIDE = 8  # of the grid of places
_OPPOSITE = {"left": "right", "right": "left", "above": "below", "below": "above"}
_PLACED = (
    "unsaid",
    *(f"{layout} 0" for layout in ("centre", "left", "right", "top", "bottom")),
    *(f"{layout} of two" for layout in _OPPOSITE),
    *(f"{layout} {index}" for layout in ("row", "column") for index in range(_SLOTS)),
)
_SAID = {layout: (f"{layout} ",) for layout in ("row", "column")} | {
    "centre": ("in the centre",),
    "left": ("on the left", "left of"),
    "right": ("on the right", "right of"),
    "top": ("at the top",),
    "bottom": ("at the bottom",),
    "above": ("above", "over"),
    "below": ("below", "under"),
}


def token_ids(tokenizer: CLIPTokenizer, captions: list[str]) -> torch.Tensor:
    """int64 [B, 48], padded with end-of-text."""
    encoded = tokenizer(captions, padding="max_length", max_length=MAX_TOKENS, truncation=True, return_tensors="pt")
    return torch.as_tensor(encoded.input_ids)


def encode(
    text_1: CLIPTextModel, text_2: CLIPTextModelWithProjection, ids: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """SDXL's conditioning of ids [B, 48]: penultimate states [B, 48, width 1 + width 2], pooled [B, P]."""
    first = text_1(ids, output_hidden_states=True)
    second = text_2(ids, output_hidden_states=True)
    states = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1)
    return states, second.text_embeds


def t5_encode(text: T5EncoderModel, tokenizer: T5Tokenizer, captions: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """PixArt's conditioning: states [B, S, width] and their mask [B, S], S the longest caption's tokens.

    The pipeline pads to 120; since padding is masked everywhere, the real tokens do not see the difference.
    """
    tokens = tokenizer(captions, padding="longest", return_tensors="pt")
    states = text(tokens.input_ids, attention_mask=tokens.attention_mask).last_hidden_state
    return states, tokens.attention_mask


class _Reader(nn.Module):
    """Attribute logits: per slot by attention over the states, for the scene and slot 0 from the pooled vector."""

    def __init__(self, width: int, pooled: int) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(_SLOTS + 1, width) * 0.1)
        self.attention = nn.MultiheadAttention(width, 4, batch_first=True)
        self.slots = nn.ModuleDict({name: nn.Linear(width, size) for name, size in _HEADS.items()})
        self.scene = nn.ModuleDict({name: nn.Linear(width, size) for name, size in _SCENE_HEADS.items()})
        self.pooled = nn.ModuleDict({name: nn.Linear(pooled, size) for name, size in (_HEADS | _SCENE_HEADS).items()})

    def forward(
        self,
        states: torch.Tensor,
        pooled: torch.Tensor,
        targets: dict[str, torch.Tensor],
        padding: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The loss in nats of states [B, S, width], pooled [B, pooled] and padding [B, S], True where ignored."""
        queries = self.queries.expand(len(states), -1, -1)
        read, _ = self.attention(queries, states, states, key_padding_mask=padding, need_weights=False)
        loss = states.new_zeros(())
        for name in _HEADS:
            logits = self.slots[name](read[:, :_SLOTS])
            loss = loss + functional.cross_entropy(logits.flatten(0, 1), targets[name].flatten())
            loss = loss + 0.3 * functional.cross_entropy(self.pooled[name](pooled), targets[name][:, 0])
        for name in _SCENE_HEADS:
            loss = loss + 0.5 * functional.cross_entropy(self.scene[name](read[:, _SLOTS]), targets[name])
            loss = loss + 0.3 * functional.cross_entropy(self.pooled[name](pooled), targets[name])
        return loss


class _NounReader(nn.Module):
    """What and where each item is, read off its own word; and what lies at each place, read by attention.

    A transformer binds a colour to a place only if the states at a noun say where it lies, and learns that far more
    slowly from noise than from being asked.
    """

    def __init__(self, width: int, shape_ids: torch.Tensor) -> None:
        super().__init__()
        self.shape_ids = shape_ids
        self.noun = nn.Linear(width, len(COLOURS) + len(_PLACED))
        self.places = nn.Parameter(torch.randn(_SIDE * _SIDE, width) * 0.1)
        self.attention = nn.MultiheadAttention(width, 4, batch_first=True)
        self.pair = nn.Linear(width, NOTHING + 1)

    def forward(
        self, ids: torch.Tensor, states: torch.Tensor, padding: torch.Tensor, scenes: list[Scene], captions: list[str]
    ) -> torch.Tensor:
        """The loss in nats of states [B, S, width] of the tokens ids [B, S]; padding [B, S], True where ignored."""
        placed = [place for pair in zip(scenes, captions, strict=True) for place in _places(*pair)]
        colours = [tuple(COLOURS).index(item.colour) for scene in scenes for item in scene.items]
        colour, place = self.noun(states[torch.isin(ids, self.shape_ids)]).split((len(COLOURS), len(_PLACED)), dim=-1)
        nouns = functional.cross_entropy(colour, torch.tensor(colours))
        nouns = nouns + functional.cross_entropy(place, torch.tensor(placed))
        queries = self.places.expand(len(states), -1, -1)
        read, _ = self.attention(queries, states, states, key_padding_mask=padding, need_weights=False)
        pairs = token_targets(scenes, None, _SIDE, LATENT_PX // _SIDE)["pair"]
        shown = pairs != NOTHING
        return 2 * nouns + functional.cross_entropy(self.pair(read)[shown], pairs[shown])


def _places(scene: Scene, caption: str) -> list[int]:
    """For each item, where the caption says that it lies, as an index into `_PLACED`."""
    count = len(scene.items)
    if not any(word in caption for word in _SAID[scene.layout]):
        return [0] * count
    if count == 2:
        return [_PLACED.index(f"{layout} of two") for layout in (scene.layout, _OPPOSITE[scene.layout])]
    return [_PLACED.index(f"{scene.layout} {index}") for index in range(count)]


def _targets(scenes: list[Scene], captions: list[str]) -> dict[str, torch.Tensor]:
    """Class indices; the last class of every head means "the caption does not say"."""

    def said(name: str, names: tuple[str, ...], caption: str) -> int:
        return names.index(name) if name in names and f"{name} " in f"{caption} " else len(names)

    def slot(scene: Scene, attribute: str, names: tuple[str, ...]) -> list[int]:
        present = [names.index(getattr(item, attribute)) for item in scene.items]
        return present + [len(names)] * (_SLOTS - len(present))

    pairs = list(zip(scenes, captions, strict=True))
    return {
        "colour": torch.tensor([slot(scene, "colour", tuple(COLOURS)) for scene in scenes]),
        "shape": torch.tensor([slot(scene, "shape", SHAPES) for scene in scenes]),
        "layout": torch.tensor([said(scene.layout, _LAYOUTS, caption) for scene, caption in pairs]),
        "background": torch.tensor([said(scene.background, tuple(BACKGROUNDS), caption) for scene, caption in pairs]),
        "texture": torch.tensor([said(scene.texture, TEXTURES, caption) for scene, caption in pairs]),
    }


def warm_start(
    text_1: CLIPTextModel,
    text_2: CLIPTextModelWithProjection,
    tokenizer: CLIPTokenizer,
    settings: Settings,
) -> float:
    """Train both encoders in place for `settings.text_warmup_steps`; returns the last loss in nats."""
    reader = _Reader(settings.cross_attention_dim, settings.text_projection_dim)
    encoders = [*text_1.parameters(), *text_2.parameters()]

    def loss_of(captions: list[str], scenes: list[Scene]) -> torch.Tensor:
        return reader(*encode(text_1, text_2, token_ids(tokenizer, captions)), _targets(scenes, captions))

    return _train(loss_of, [*encoders, *reader.parameters()], settings.text_warmup_steps, settings.seed)


def warm_start_t5(text: T5EncoderModel, tokenizer: T5Tokenizer, settings: PixArtSettings) -> float:
    """Train the encoder in place for `settings.text_warmup_steps`; returns the last loss in nats."""
    reader = _Reader(settings.text_width, settings.text_width)
    shape_ids = torch.tensor(tokenizer.convert_tokens_to_ids([f"▁{shape}" for shape in SHAPES]))
    nouns = _NounReader(settings.text_width, shape_ids)

    def loss_of(captions: list[str], scenes: list[Scene]) -> torch.Tensor:
        states, mask = t5_encode(text, tokenizer, captions)
        mean = (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        ids = tokenizer(captions, padding="longest", return_tensors="pt").input_ids
        placed = nouns(ids, states, mask == 0, scenes, captions)
        return placed + reader(states, mean, _targets(scenes, captions), mask == 0)

    parameters = [*text.parameters(), *reader.parameters(), *nouns.parameters()]
    order = text.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight
    return _train(loss_of, parameters, settings.text_warmup_steps, settings.seed, order)


def _train(
    loss_of: Callable[[list[str], list[Scene]], torch.Tensor],
    parameters: list[nn.Parameter],
    steps: int,
    seed: int,
    order: nn.Parameter | None = None,
) -> float:
    """`order` are logits of relative positions: they must grow to several units, and learn twenty times as fast."""
    groups = [{"params": [parameter for parameter in parameters if parameter is not order]}]
    rates = [1.5e-3]
    if order is not None:
        groups.append({"params": [order]})
        rates.append(3e-2)
    optimizer = torch.optim.AdamW(groups, lr=1e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=rates, total_steps=steps)
    rng = random.Random(f"text-{seed}")
    loss = torch.zeros(())
    for step in range(steps):
        scenes = [draw_scene(rng) for _ in range(64)]
        captions = [training_caption(scene, rng) for scene in scenes]
        loss = loss_of(captions, scenes)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0:
            print(f"step {step}, loss {loss.item():.3f} nats", flush=True)
    return loss.item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=MODELS, default="mini-sdxl")
    parser.add_argument("--work", type=Path, default=Path(".cache/training"), help="folder of the checkpoints")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.model == "mini-sdxl":
        torch.manual_seed(SETTINGS.seed)
        tokenizer = build_tokenizer()
        text_1, text_2 = build_text_encoders(SETTINGS, tokenizer)
        loss = warm_start(text_1, text_2, tokenizer, SETTINGS)
        encoders: dict[str, nn.Module] = {"text_1": text_1, "text_2": text_2}
    else:
        torch.manual_seed(PIXART_SETTINGS.seed)
        t5_tokenizer = pixart.build_tokenizer()
        text = pixart.build_text_encoder(PIXART_SETTINGS, t5_tokenizer)
        loss = warm_start_t5(text, t5_tokenizer, PIXART_SETTINGS)
        encoders = {"text": text}
    weights = nn.ModuleDict(encoders).state_dict()
    path = arguments.work / f"{arguments.model}-text.safetensors"
    save_file({name: value.clone().contiguous() for name, value in weights.items()}, path)
    print(f"last loss {loss:.3f} nats")


if __name__ == "__main__":
    main()
