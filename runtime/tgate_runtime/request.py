"""What a request asks for, checked before any step is taken; each raises :class:`RequestError` in one line."""

from __future__ import annotations

import math
import operator
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tgate_engine.errors import RequestError, shown
from tgate_engine.graph import DECODE, ENCODE, IMAGE, PREVIEW, TEXT, Role
from tgate_engine.manifest import Manifest, Shape
from tgate_engine.plan import Plan
from tgate_runtime.finite import not_finite
from tgate_runtime.generators import SEED_LIMIT, check_seed, random_seed

_MOST_GUIDANCE = 1e6
"""Nobody draws with more than a few dozen; where it multiplies a network's output, float32 has room for this."""

STRENGTH = 0.6
"""Of a request that begins from a picture and names none."""

NO_ENCODER = (
    "the bundle has no encoder, and so no request begins from a picture: export it again, with an encoder among its "
    "--components (SD and SDXL have one where they are left out)"
)

DECODERS: Mapping[str, Role] = {"full": DECODE, "preview": PREVIEW}
"""What a request may name to have its pictures decoded by, and the role of its graph."""

MOST_CHARACTERS = 2**15
"""Of a prompt. Models take some hundred tokens of it; this keeps what a prompt can cost below a second."""

_ARTICLE = {"prompt": "a prompt", "image": "an image"}
_BOOKKEEPING_BYTES = 2**10
_USUAL_MEMORY = 2**36


def check_source(
    manifest: Manifest,
    *,
    prompt: object = None,
    negative_prompt: object = None,
    image: object = None,
    prompt_embeds: object = None,
) -> None:
    """What conditions a request is one thing, and one that the bundle takes, or a prompt and an image where its model
    takes both; None is not given. Beside a prompt, or its embeddings, an image is what the request begins from, where
    the bundle has an encoder."""
    source = "image" if manifest.conditioned_by("image") else "prompt"
    if takes_both(manifest):
        _check_both(manifest, prompt, image, prompt_embeds)
        source, image = "prompt", None
    elif begins_from(manifest, image) and manifest.graph(ENCODE) is not None:
        image = None
    elif begins_from(manifest, image) and (prompt is not None or prompt_embeds is not None):
        raise RequestError(NO_ENCODER)
    named = {"prompt": prompt, "image": image, "prompt_embeds": prompt_embeds}
    several = [name for name, value in named.items() if value is not None]
    if len(several) != 1 or several[0] not in (source, "prompt_embeds"):
        raise RequestError(
            f"{manifest.model} is conditioned by {_ARTICLE[source]}: give {source}, or prompt_embeds, and "
            f"nothing else; got {' and '.join(several) or 'neither'}"
        )
    if source == "image" and negative_prompt is not None:
        raise RequestError(f"{manifest.model} is conditioned by an image and takes no negative prompt")
    if prompt_embeds is not None and negative_prompt is not None:
        raise RequestError("prompt_embeds hold the negative half already; leave out the negative prompt")
    if image is not None and manifest.graph(IMAGE) is None:
        raise RequestError("the bundle has no image encoder (--components); export it with one")
    if prompt is not None and manifest.graph(TEXT) is None:
        raise RequestError(
            "the bundle has no text encoder (--components): give prompt_embeds, which `tgate embed` makes"
        )


def takes_both(manifest: Manifest) -> bool:
    """Whether a request is conditioned by a prompt and an image at once."""
    return bool(manifest.conditioned_by("image")) and bool(manifest.conditioned_by("text"))


def _check_both(manifest: Manifest, prompt: object, image: object, prompt_embeds: object) -> None:
    """A bundle without an image encoder takes embeddings alone, which hold then what an image is encoded to."""
    named = {"prompt": prompt, "prompt_embeds": prompt_embeds, "image": image}
    got = " and ".join(name for name, value in named.items() if value is not None) or "neither"
    texts = (prompt is not None) + (prompt_embeds is not None)
    if manifest.graph(IMAGE) is None and (image is not None or prompt is not None or texts != 1):
        raise RequestError(
            f"the bundle has no image encoder (--components), and {manifest.model} is conditioned by a prompt and an "
            f"image: give prompt_embeds that hold what both are encoded to, or export it with one; got {got}"
        )
    if manifest.graph(IMAGE) is not None and (image is None or texts != 1):
        raise RequestError(
            f"{manifest.model} is conditioned by a prompt and an image: give image, and prompt or prompt_embeds beside "
            f"it; got {got}"
        )


def begins_from(manifest: Manifest, image: object) -> bool:
    """Whether a request begins from its ``image``, and is not conditioned by it."""
    return image is not None and not manifest.conditioned_by("image")


def strength_of(strength: object, manifest: Manifest, image: object, mask: object = None) -> float | None:
    """The strength of a request that begins from ``image``; None for others, for whom neither it nor a mask is of any
    use. An inpainting model wants both, and if nothing else is said takes all steps."""
    if manifest.inpaints:
        missing = [name for name, value in (("image", image), ("mask", mask)) if value is None]
        if missing:
            raise RequestError(
                "the bundle draws within a mask (an inpainting model), and a request has no "
                f"{' and no '.join(missing)}: give an image and a mask beside the prompt"
            )
        return 1.0 if strength is None else check_strength(strength)
    if not begins_from(manifest, image):
        for name, value in (("strength", strength), ("mask", mask)):
            if value is not None:
                raise RequestError(
                    f"{name} would change nothing: it is for requests that begin from an image, beside a prompt; leave "
                    "it out, or give one"
                )
        return None
    return STRENGTH if strength is None else check_strength(strength)


def decoder_of(decoder: object, manifest: Manifest) -> Role:
    """The role of the graph that decodes a request's pictures, by a name of :data:`DECODERS`: the model's own decoder,
    or the small one. None is the model's own, without which there are latents alone."""
    if decoder is None:
        return DECODE
    if not isinstance(decoder, str) or decoder not in DECODERS:
        raise RequestError(f"a decoder is one of {', '.join(DECODERS)}, got {type(decoder).__name__} {shown(decoder)}")
    if manifest.graph(DECODERS[decoder]) is None:
        raise RequestError(
            "the bundle has no small decoder (--preview-decoder); export it again with one, or take decoder full"
            if decoder == "preview"
            else "the bundle has no decoder (--components); export it with one, or leave decoder out for the latents"
        )
    return DECODERS[decoder]


def check_strength(strength: object) -> float:
    """A strength as a float: above 0 and at most 1."""
    number = isinstance(strength, (int, float, np.integer, np.floating)) and not isinstance(strength, bool)
    if not number or not 0 < float(strength) <= 1:  # type: ignore[arg-type]
        raise RequestError(
            f"the strength is the part of a plan's steps that is taken, above 0 and at most 1, got {shown(strength)}"
        )
    return float(strength)  # type: ignore[arg-type]


def check_prompt(prompt: str) -> None:
    """One text, of a prompt or a negative one: it is valid Unicode, and no longer than :data:`MOST_CHARACTERS`."""
    if not isinstance(prompt, str):
        raise RequestError(f"the prompt must be a text, got {type(prompt).__name__} {shown(prompt)}")
    if len(prompt) > MOST_CHARACTERS:
        raise RequestError(
            f"the prompt has {len(prompt)} characters, at most {MOST_CHARACTERS} are read, and a model takes "
            "a few hundred words of them; shorten it"
        )
    try:
        prompt.encode()
    except UnicodeEncodeError:
        raise RequestError(f"the prompt must be text in valid Unicode, got '{shown(prompt)}'") from None


def check_prompts(
    prompt: str | Sequence[str] | None, negative: str | Sequence[str | None] | None
) -> tuple[list[str], list[str | None]]:
    """Prompts and as many negative prompts, each of which :func:`check_prompt` lets through."""
    prompts = [prompt] if isinstance(prompt, str) else prompt
    if not isinstance(prompts, (list, tuple)) or not prompts or not all(isinstance(text, str) for text in prompts):
        raise RequestError(f"the prompt must be a text or a list of texts, got {shown(prompt)}")
    negatives = [negative] * len(prompts) if negative is None or isinstance(negative, str) else negative
    if not isinstance(negatives, (list, tuple)) or not all(n is None or isinstance(n, str) for n in negatives):
        raise RequestError(f"the negative prompt must be a text or a list of texts, got {shown(negative)}")
    if len(negatives) != len(prompts):
        raise RequestError(
            f"got {len(prompts)} prompts and {len(negatives)} negative prompts; give one for each, or one"
        )
    for text in dict.fromkeys([*prompts, *negatives]):
        if text is not None:
            check_prompt(text)
    return [*prompts], [*negatives]


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
    number = check_scale(scale)
    if not abs(number) <= _MOST_GUIDANCE:
        raise RequestError(
            f"the guidance scale must be finite, got {shown(scale)}; at most {_MOST_GUIDANCE:.0f} is taken"
        )
    if manifest.guided and number <= 1:
        raise RequestError(
            f"the bundle was exported with guidance, which takes a scale above 1, got {scale}; "
            "export with --guidance-scale 1 for a bundle without guidance"
        )
    if manifest.guidance == "none" and number > 1:
        raise RequestError(
            f"the bundle was exported without guidance and takes no scale above 1, got {scale}; "
            "export with a --guidance-scale above 1"
        )
    return number


def check_scale(scale: object) -> float:
    """A guidance scale as a float: a finite number, whatever a bundle makes of it."""
    if isinstance(scale, bool) or not isinstance(scale, (int, float, np.integer, np.floating)):
        raise RequestError(f"the guidance scale must be a number, got {type(scale).__name__} {shown(scale)}")
    try:
        number = float(scale)
    except OverflowError:  # a whole number of more than 308 digits
        number = math.inf
    if not math.isfinite(number):
        raise RequestError(f"the guidance scale must be finite, got {shown(scale)}")
    return number


def check_row(row: object, rows: int) -> int:
    """A row of a state that has so many."""
    try:
        number = operator.index(row)  # type: ignore[arg-type]
    except TypeError:
        number = -1
    if isinstance(row, bool) or not 0 <= number < rows:
        raise RequestError(f"the state has rows 0 to {rows - 1}, got {shown(row)}")
    return number


def check_mapping(values: object, what: str) -> None:
    """``values`` are tensors by their names."""
    if not isinstance(values, Mapping):
        raise RequestError(f"{what} must be tensors by their names, got {type(values).__name__} {shown(values)}")


def numbers_of(values: Any, what: str) -> NDArray[Any]:
    """``values`` as an array of numbers. Raises :class:`RequestError` for what is none."""
    try:
        array = np.asarray(values)
    except ValueError:  # rows of different lengths
        array = np.empty(0, object)
    if array.dtype.kind not in "fiub":
        raise RequestError(f"{what} must be an array of numbers, got {type(values).__name__} {shown(values)}")
    return array


def shown_names(names: Iterable[object]) -> str:
    """What there is, as a message lists it."""
    return shown(", ".join(map(str, names)), 1000) or "nothing"


def check_call(value: object, name: str) -> None:
    """``value`` can be called, or is None."""
    if value is not None and not callable(value):
        raise RequestError(f"{name} must be a function, got {type(value).__name__} {shown(value)}")


def check_several(values: object, name: str) -> None:
    """``values`` are several of something, or None; one text is not several letters."""
    if values is not None and (isinstance(values, (str, bytes, Mapping)) or not isinstance(values, Iterable)):
        raise RequestError(f"{name} must be a list, got {type(values).__name__} {shown(values)}; write {name}=[…]")


def check_count(num_images: int) -> int:
    """The number of images of each prompt."""
    try:
        count = operator.index(num_images)
    except TypeError:
        count = 0
    if isinstance(num_images, bool) or count < 1:
        raise RequestError(f"the number of images must be a whole number of at least 1, got {shown(num_images)}")
    return count


def check_room(count: int, shape: Shape, frames: int) -> None:
    """Raises :class:`RequestError` for more images than this machine has memory for: noise, latents and pictures of all
    of them are there at once, before the first one is handed out."""
    latents, pixels = 4 * math.prod(shape.latents), 3 * shape.width * shape.height * frames
    each, room = 2 * latents + pixels + _BOOKKEEPING_BYTES, _memory_bytes()
    if count > room // each:
        raise RequestError(
            f"{shown(count)} images of {shape.size} in one request take {each} bytes each, and this machine has room "
            f"for {room // each}; ask for fewer at a time"
        )


def _memory_bytes() -> int:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):  # a system that does not say
        return _USUAL_MEMORY


def check_latents(latents: NDArray[Any], shape: tuple[int, ...]) -> NDArray[np.float32]:
    """Initial latents of that shape."""
    expected = f"initial latents must be float32 of shape {list(shape)}, standard normal noise"
    if not isinstance(latents, np.ndarray):
        raise RequestError(f"{expected}, got {type(latents).__name__}")
    if latents.shape != shape or latents.dtype != np.float32:
        raise RequestError(f"{expected}; got {latents.dtype} of shape {list(latents.shape)}")
    if count := not_finite(latents):
        raise RequestError(f"{expected}; {count} of {latents.size} values are not finite")
    return latents
