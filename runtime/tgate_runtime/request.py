"""What a request asks for, checked before any step is taken; each raises :class:`RequestError` in one line."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tgate_engine.errors import RequestError
from tgate_engine.manifest import Manifest
from tgate_engine.plan import Plan
from tgate_runtime.generators import SEED_LIMIT, check_seed, random_seed


def check_prompts(
    prompt: str | Sequence[str] | None, negative: str | Sequence[str | None] | None
) -> tuple[list[str], list[str | None]]:
    """Prompts and as many negative prompts."""
    prompts = [prompt] if isinstance(prompt, str) else prompt
    if not isinstance(prompts, (list, tuple)) or not prompts or not all(isinstance(text, str) for text in prompts):
        raise RequestError(f"the prompt must be a text or a list of texts, got {prompt!r:.80}")
    negatives = [negative] * len(prompts) if negative is None or isinstance(negative, str) else negative
    if not isinstance(negatives, (list, tuple)) or not all(n is None or isinstance(n, str) for n in negatives):
        raise RequestError(f"the negative prompt must be a text or a list of texts, got {negative!r:.80}")
    if len(negatives) != len(prompts):
        raise RequestError(
            f"got {len(prompts)} prompts and {len(negatives)} negative prompts; give one for each, or one"
        )
    return [*prompts], [*negatives]


def rows_of(embeds: Mapping[str, NDArray[Any]]) -> int:
    """The prompts that embeddings are for; whether all tensors agree is checked later."""
    return max([len(values) for values in embeds.values() if np.ndim(values)], default=1)


def seeds_of(seed: int | Sequence[int] | None, count: int) -> tuple[int, ...]:
    """One for each image."""
    if isinstance(seed, (list, tuple)):
        if len(seed) != count:
            raise RequestError(f"got {len(seed)} seeds for {count} images; give one for each, or one to count on from")
        return tuple(check_seed(each) for each in seed)
    first = random_seed() if seed is None else check_seed(seed)
    if first + count > SEED_LIMIT:
        raise RequestError(
            f"image j of a request has the seed s + j, which must be below {SEED_LIMIT}; got {first} for {count} images"
        )
    return tuple(first + j for j in range(count))


def scales_of(scale: float | Sequence[float] | None, count: int, plan: Plan, manifest: Manifest) -> list[float]:
    """One for each image."""
    if isinstance(scale, (list, tuple)):
        if len(scale) != count:
            raise RequestError(f"got {len(scale)} guidance scales for {count} images; give one for each, or one")
        return [_check_guidance(each, plan, manifest) for each in scale]
    return [_check_guidance(scale, plan, manifest)] * count  # type: ignore[arg-type]


def _check_guidance(scale: float | None, plan: Plan, manifest: Manifest) -> float:
    if scale is None:
        return plan.guidance_scale
    if isinstance(scale, bool) or not isinstance(scale, (int, float, np.integer, np.floating)):
        raise RequestError(f"the guidance scale must be a number, got {scale!r}")
    if not math.isfinite(scale) or abs(scale) > float(np.finfo(np.float32).max):
        raise RequestError(f"the guidance scale must be finite, got {scale}")
    if manifest.guided and scale <= 1:
        raise RequestError(
            f"the bundle was exported with guidance, which takes a scale above 1, got {scale}; "
            "export with --guidance-scale 1 for a bundle without guidance"
        )
    if manifest.guidance == "none" and scale > 1:
        raise RequestError(
            f"the bundle was exported without guidance and takes no scale above 1, got {scale}; "
            "export with a --guidance-scale above 1"
        )
    return float(scale)


def check_count(num_images: int) -> int:
    """The number of images of each prompt."""
    try:
        count = operator.index(num_images)
    except TypeError:
        count = 0
    if isinstance(num_images, bool) or count < 1:
        raise RequestError(f"the number of images must be a whole number of at least 1, got {num_images!r}")
    return count


def check_latents(latents: NDArray[Any], shape: tuple[int, ...]) -> NDArray[np.float32]:
    """Initial latents of that shape."""
    expected = f"initial latents must be float32 of shape {list(shape)}, standard normal noise"
    if not isinstance(latents, np.ndarray):
        raise RequestError(f"{expected}, got {type(latents).__name__}")
    if latents.shape != shape or latents.dtype != np.float32:
        raise RequestError(f"{expected}; got {latents.dtype} of shape {list(latents.shape)}")
    if not np.isfinite(latents).all():
        raise RequestError(f"{expected}; got values that are not finite")
    return latents
