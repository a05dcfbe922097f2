"""A denoiser small enough to read: two blocks of "attention" on 32 features, in NumPy float64.

It follows shared names (guidance halves, self and cross attention, text that enters through cross-attention
only) so that a bundle of it exercises everything a real one does. :mod:`tests.toy_bundle` writes the same
arithmetic as ONNX graphs; :func:`trajectory` is the slow reference that they are compared with, which walks
the rules of :mod:`tests.rules` and shares no code with plans or methods.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.rules import step_rule
from tgate_engine.sampler import Sampler

Array = NDArray[np.float64]

LATENTS = (2, 4, 4)
FEATURES = 32
BLOCKS = 2
WORDS = ("<pad>", "<s>", "</s>", "<unk>", "red", "blue", "large", "small", "circle", "square", "a", "above")
LENGTH = 8
WIDTH = 4
TIME_IDS = (0.25, -0.5)
"""Of pictures of the first size, 4 by 4."""


def time_ids(width: int, height: int) -> tuple[float, float]:
    """What conditions the toy on the size of its pictures."""
    return width / 16, -height / 8


def weights(seed: int = 0) -> dict[str, NDArray[np.float32]]:
    """Every weight of the toy, by name; float32."""
    rng = np.random.default_rng(seed)
    shapes: dict[str, tuple[int, ...]] = {
        "out": (FEATURES, FEATURES),
        "pooled": (WIDTH, FEATURES),
        "time": (len(TIME_IDS), FEATURES),
        "embed.0": (len(WORDS), WIDTH),
        "embed.1": (len(WORDS), WIDTH),
        "image": (LATENTS[0], 3),
    }
    for block in range(BLOCKS):
        shapes |= {f"self.{block}": (FEATURES, FEATURES), f"cross.{block}": (FEATURES, FEATURES)}
        shapes[f"text.{block}"] = (WIDTH, FEATURES)
    return {name: (rng.standard_normal(s) / np.sqrt(s[0])).astype(np.float32) for name, s in shapes.items()}


@dataclass
class Attention:
    """What each block's attention gave in one call, or is to give: lists of [rows, 32]."""

    self_: list[Array]
    cross: list[Array]


def network(
    w: Mapping[str, NDArray[np.float32]],
    x: Array,
    timestep: float,
    text: Array,
    pooled: Array,
    time_ids: Array,
    *,
    self_: list[Array] | None = None,
    cross: list[Array] | None = None,
    added: tuple[Array | float, Array | float] = (0.0, 0.0),
) -> tuple[Array, Attention]:
    """The model's output [rows, C, h, w] and its attention outputs; ``self_`` and ``cross`` replace computed ones, and
    ``added`` is what ControlNets add before and after the blocks."""
    rows = len(x)
    hidden = x.reshape(rows, FEATURES) + timestep * 1e-3 + added[0]
    seen = Attention([], [])
    for block in range(BLOCKS):
        seen.self_.append(np.tanh(hidden @ w[f"self.{block}"]) if self_ is None else self_[block])
        hidden = hidden + seen.self_[-1]
        if cross is None:
            seen.cross.append(np.tanh(hidden @ w[f"cross.{block}"] + text.mean(axis=1) @ w[f"text.{block}"]))
        else:
            seen.cross.append(cross[block])
        hidden = hidden + seen.cross[-1]
    out = (hidden + added[1]) @ w["out"] + pooled @ w["pooled"] + time_ids @ w["time"]
    return out.reshape(x.shape), seen


def residual(picture: NDArray[Any], timestep: float, latents: Array, pooled: Array) -> Array:
    """What a ControlNet adds before the blocks, [rows, 32]; after them it adds half of that, negated."""
    seen = np.asarray(picture, np.float64)[..., :2].transpose(2, 0, 1).reshape(-1) / 255
    own: Array = seen + timestep * 1e-3 + latents.reshape(len(latents), -1) + np.tile(pooled, FEATURES // WIDTH)
    return own


def _mean(both: Array) -> Array:
    """The mean of both halves [2B, 32], as [B, 32]."""
    negative, positive = np.split(both, 2)
    return (negative + positive) / 2


def trajectory(
    w: Mapping[str, NDArray[np.float32]],
    sampler: Sampler,
    noise: NDArray[Any],
    conditioning: Mapping[str, NDArray[Any]],
    guidance: float,
    *,
    guided: bool = True,
    m: int,
    k: int = 1,
    warm_up: int = 2,
    f: int = 1,
    reuse: bool = True,
    step_noise: Callable[[int], NDArray[Any]] | None = None,
    controls: Sequence[tuple[NDArray[Any], Sequence[float]]] = (),
) -> list[Array]:
    """x_0 .. x_N. ``conditioning``: ``<name>.<half>`` to [B, ...]. ``reuse`` False only stops guidance at m.
    ``step_noise``: z_i [B, ...] for call i of a stochastic sampler. ``controls``: of each ControlNet the picture
    [H, W, 3], and its scale at each call."""
    latents, outputs = [np.asarray(noise, np.float64) * sampler.initial_scale], []
    stored: Attention | None = None
    for call_index, call in enumerate(sampler.calls):
        rule = step_rule(call_index - sampler.lead_in, sampler.steps, m, k, warm_up, f, reuse=reuse)
        both = guided and rule.guided
        alone = "negative" if guided and reuse else "positive"
        halves = ["negative", "positive"] if both else [alone]
        text, pooled, time_ids = (
            np.concatenate([np.asarray(conditioning[f"{name}.{half}"], np.float64) for half in halves])
            for name in ("text", "pooled", "time_ids")
        )
        x = latents[-1] * call.input_scale
        added = sum(
            scales[call_index] * residual(picture, call.timestep, np.concatenate([latents[-1]] * len(halves)), pooled)
            for picture, scales in controls
        )
        out, seen = network(
            w,
            np.concatenate([x] * len(halves)),
            call.timestep,
            text,
            pooled,
            time_ids,
            self_=stored.self_ if rule.self_ == "reuse" and stored else None,
            cross=stored.cross if rule.cross == "reuse" and stored else None,
            added=(added, -0.5 * added),
        )
        if both:
            negative, positive = np.split(out, 2)
            out = negative + guidance * (positive - negative)
        if rule.gate and both:
            stored = Attention([_mean(a) for a in seen.self_], [_mean(a) for a in seen.cross])
        elif rule.gate:
            stored = seen
        elif rule.self_ == "store":
            stored = Attention(seen.self_, stored.cross if stored else [])
        outputs.append(out)
        following = np.zeros_like(latents[0])
        for lag in range(4):
            if lag < len(outputs):
                following += call.latents[lag] * latents[-1 - lag] + call.outputs[lag] * outputs[-1 - lag]
        if call.noise and step_noise is not None:
            following += call.noise * step_noise(call_index)
        latents.append(following)
    return latents
