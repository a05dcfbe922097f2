"""What every token of a picture shows, and a throw-away head that must read it off a transformer's hidden states.

A transformer has no notion of a place, and learns shapes slowly from noise alone. Aligning its hidden states with
what the picture holds teaches it faster (Yu et al. 2024, arXiv 2410.06940, do so with features of another network;
here the scene itself is known). The head is not part of the model.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from training.grammar import BACKGROUNDS, PAIR_INDEX, PAIRS, TEXTURES, Scene
from training.settings import IMAGE_PX, LATENT_PX

NOTHING = len(PAIRS)


class TokenReader(nn.Module):
    """Hidden states [B, N, width] to the loss of reading each token, float [B]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.sizes = (len(PAIRS) + 1, 2, len(BACKGROUNDS), len(TEXTURES))
        self.layers = nn.Sequential(nn.Linear(width, 2 * width), nn.SiLU(), nn.Linear(2 * width, sum(self.sizes)))

    def forward(self, states: torch.Tensor, targets: dict[str, torch.Tensor]) -> torch.Tensor:
        """`targets` as from `token_targets`."""
        pair, offset, background, texture = self.layers(states).split(self.sizes, dim=-1)
        rows = (-1, states.shape[1])
        item = functional.cross_entropy(pair.flatten(0, 1), targets["pair"].flatten(), reduction="none").view(rows)
        where = (offset - targets["offset"]).square().sum(-1) * (targets["pair"] != NOTHING)
        behind = functional.cross_entropy(
            background.flatten(0, 1), targets["background"].flatten(), reduction="none"
        ).view(rows)
        pattern = functional.cross_entropy(texture.flatten(0, 1), targets["texture"].flatten(), reduction="none").view(
            rows
        )
        return (item + where + 0.3 * behind + 0.3 * pattern).mean(dim=1)


class PlaceReader(nn.Module):
    """States [B, S, width] of captions to the loss of telling what lies at each place, float [B].

    What a picture shows where must be in the text's states before a denoiser can attend to it, and is learnt far more
    slowly from noise than from being asked.
    """

    def __init__(self, width: int, places: int = 64) -> None:
        super().__init__()
        self.places = nn.Parameter(torch.randn(places, width) * 0.1)
        self.attention = nn.MultiheadAttention(width, 4, batch_first=True)
        self.pair = nn.Linear(width, NOTHING + 1)

    def forward(self, states: torch.Tensor, pairs: torch.Tensor) -> torch.Tensor:
        """`pairs`: int64 [B, places], as `token_targets` gives them; places of the background do not count."""
        read, _ = self.attention(self.places.expand(len(states), -1, -1), states, states, need_weights=False)
        lost = functional.cross_entropy(self.pair(read).flatten(0, 1), pairs.flatten(), reduction="none")
        shown = (pairs != NOTHING).float()
        return (lost.view(pairs.shape) * shown).sum(1) / shown.sum(1).clamp(min=1)


def token_targets(scenes: list[Scene], corners: torch.Tensor | None, side: int, patch: int) -> dict[str, torch.Tensor]:
    """What the tokens of [B, side * side] windows show, by row and column.

    `corners`, int64 [B, 2], are the windows' columns and rows in latents, None for whole pictures; `side` counts
    tokens. `pair`: the (colour, shape) whose circle holds the token's centre, or `NOTHING`; `offset` [B, N, 2]: from
    the item's centre, in its radii; `background` and `texture`: the scene's, for every token.
    """
    step = IMAGE_PX // LATENT_PX
    start = torch.zeros(len(scenes), 2) if corners is None else corners.float()
    along = (torch.arange(side) + 0.5) * patch * step
    x = (start[:, 0, None, None] * step + along[None, None, :]).expand(-1, side, -1).flatten(1)
    y = (start[:, 1, None, None] * step + along[None, :, None]).expand(-1, -1, side).flatten(1)
    pair = torch.full(x.shape, NOTHING)
    offset = torch.zeros(*x.shape, 2)
    for row, scene in enumerate(scenes):
        for item in scene.items:
            apart = torch.stack([x[row] - item.x_px, y[row] - item.y_px], dim=-1) / item.radius_px
            inside = apart.square().sum(-1) < 1
            pair[row][inside] = PAIR_INDEX[item.colour, item.shape]
            offset[row][inside] = apart[inside]
    backgrounds, textures = tuple(BACKGROUNDS), TEXTURES
    return {
        "pair": pair,
        "offset": offset,
        "background": torch.tensor([backgrounds.index(s.background) for s in scenes])[:, None].expand_as(pair),
        "texture": torch.tensor([textures.index(s.texture) for s in scenes])[:, None].expand_as(pair),
    }
