"""Eager references for the families other than SDXL, with one signature for all of them.

The four functions are those of ``tests/oracle.py``; each takes a float32 pipeline on the CPU, a :class:`Request` and a
scheduler, and returns final latents [B, ...]. The pipeline is left as found, the scheduler is copied. SDXL itself
(``lcm_sdxl``) is passed on to ``tests/oracle.py``.

What the network sees after the gate in ``tgate==1.0.0``, and in :func:`written_out_latents`. All cross-attention is
reused there, so only what enters elsewhere counts:

=============  ======================================================================================================
SD 1.5, 2.1    the negative prompt; nothing of it is left, for all of it passes through cross-attention
PixArt         the negative prompt and mask; nothing of them is left. Size and aspect ratio are the same in both halves
SVD            the positive half: the image's real latents and embedding (the latter only in cross-attention)
Latte          no loader in the package; as PixArt: nothing of the text is left
=============  ======================================================================================================

Faults of the package, pinned in ``tests/test_oracle_families.py``. Of those in ``tests/oracle.py``, 1, 2, 5, 6, 7 and 9
lie in code that all loaders share. All loaders import and run on diffusers 0.42; no name had to be patched for that.

*   **SD, SVD: no guidance.** They have no ``lcm`` argument, so the gate step always halves the batch. SD raises for one
    image and averages two with each other; SVD, which would halve the frames, raises. With guidance off,
    :func:`tgate_latents` replaces the loader's ``tgate_scheduler`` by one that keeps the shape.
*   **PixArt-α: PNDM.** It doubles the batch by the call's index (``i < gate_step``), and combines the halves by the
    step's (``i - num_warmup_steps``). With PNDM's extra call the gate step gets a single half and fails. Refused here;
    :func:`written_out_latents` has it right. PixArt-Σ counts steps in both places.
*   **PixArt-α: one step.** It takes ``pred_original_sample`` of the scheduler's output, which most schedulers,
    LCM's among them, do not have. Diffusers itself takes the second member of the tuple. n = 1 is refused here.

SVD has one token in cross-attention, so its softmax is 1 and the output does not depend on the query: reusing it
changes nothing but the mean of the halves, and nothing at all without guidance.

Of these pipelines only PixArt-α's sets the scheduler's begin index; here it is set for all (fault 6).
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import PIL.Image
import tgate
import torch
from diffusers.models.attention_processor import Attention

from tests import oracle
from tests.oracle import Action, Prompt, _actions, _check, _with_begin_index

Pipeline = Any
Half = Mapping[str, torch.Tensor]
Predict = Callable[[int, torch.Tensor, torch.Tensor], torch.Tensor]

_SDXL = "StableDiffusionXLPipeline"
_SD = "StableDiffusionPipeline"
_ALPHA = "PixArtAlphaPipeline"
_SIGMA = "PixArtSigmaPipeline"
_SVD = "StableVideoDiffusionPipeline"
_LATTE = "LattePipeline"

FPS, MOTION_BUCKET, NOISE_AUGMENTATION, MIN_GUIDANCE = 7, 127, 0.02, 1.0


@dataclass(frozen=True, kw_only=True)
class Request:
    """What one run is to make."""

    prompt: Prompt | None = None  # one, or one for each of B; None for SVD
    negative_prompt: Prompt | None = None  # None is the empty prompt; zeros where SDXL's checkpoint says so
    image: PIL.Image.Image | None = None  # SVD: as large as the output; the same for all of B
    steps: int
    guidance_scale: float  # in SVD that of the last frame; the first has 1
    latents: torch.Tensor  # noise of unit variance [B, ...]
    step_noise: Callable[[int], torch.Tensor] | None = None  # noise [B, ...] that step i adds; None: at random
    augmentation: torch.Tensor | None = None  # SVD: noise [1, 3, H, W] on the image; None is none


def plain_latents(pipe: Pipeline, request: Request, scheduler: Any) -> torch.Tensor:
    """Final latents of diffusers' own pipeline."""
    if _kind(pipe) == _SDXL:
        with _run(pipe, request, scheduler):
            return oracle.plain_latents(pipe, **_sdxl(request), scheduler=scheduler)
    with _run(pipe, request, scheduler):
        return pipe(**_call(pipe, request))[0]


def tgate_latents(pipe: Pipeline, request: Request, scheduler: Any, m: int, k: int, f: int, w: int) -> torch.Tensor:
    """Final latents of the paper's package: gate step ``m``, intervals ``k`` and ``f``, warm-up ``w``.

    Raises:
        ValueError: a setting on which the package is known to be wrong, or Latte, which it does not have.
    """
    _check(scheduler, m=m, k=k, f=f, w=w)
    kind = _kind(pipe)
    if kind == _SDXL:
        with _run(pipe, request, scheduler):
            return oracle.tgate_latents(pipe, **_sdxl(request), scheduler=scheduler, m=m, k=k, f=f, w=w)
    if kind not in _LOADERS:
        raise ValueError(f"the package has no loader for {kind}; use written_out_latents")
    guided = request.guidance_scale > 1
    settings: dict[str, Any] = {"gate_step": m, "sp_interval": k, "fi_interval": f, "warm_up": w}
    with _run(pipe, request, scheduler), ExitStack() as stack:
        if kind in (_ALPHA, _SIGMA):
            settings["lcm"] = not guided
            if kind == _ALPHA and request.steps == 1:
                raise ValueError("the package's PixArt-α takes pred_original_sample at n = 1; use written_out_latents")
            if kind == _ALPHA and guided and _extra_calls(pipe.scheduler, request.steps):
                raise ValueError("the package's PixArt-α miscounts PNDM's extra call; use written_out_latents")
        elif not guided:
            module = sys.modules[f"tgate.{'SVD' if kind == _SVD else 'SD'}"]
            rules = module.tgate_scheduler
            stack.enter_context(mock.patch.object(module, "tgate_scheduler", lambda **now: (*rules(**now)[:2], True)))
        result = _LOADERS[kind](pipe).tgate(**_call(pipe, request), **settings)
    return result.frames if kind == _SVD else result.images


def guidance_stopped_latents(pipe: Pipeline, request: Request, scheduler: Any, m: int) -> torch.Tensor:
    """Final latents when guidance stops after step m − 1: the positive half goes on alone, nothing is reused."""
    if _kind(pipe) == _SDXL:
        with _run(pipe, request, scheduler):
            return oracle.guidance_stopped_latents(pipe, **_sdxl(request), scheduler=scheduler, m=m)
    with _run(pipe, request, scheduler), torch.no_grad():
        model = _model(pipe, request)

        def predict(step: int, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
            if model.negative is None or step >= m:
                return model.network(sample, timestep, model.positive)
            return model.guide(sample, timestep)

        return _denoise(pipe, request, predict)


def written_out_latents(
    pipe: Pipeline, request: Request, scheduler: Any, m: int, k: int, f: int, w: int
) -> torch.Tensor:
    """Final latents of the method itself, without the package. Settings: :func:`tgate_latents`.

    Every attention computes at every step; a hook on its output keeps, stores or replaces it.

    Raises:
        ValueError: m, k or f below 1, w below 0, or a sampler with several network calls per step.
    """
    _check(scheduler, m=m, k=k, f=f, w=w)
    if _kind(pipe) == _SDXL:
        with _run(pipe, request, scheduler):
            return oracle.written_out_latents(pipe, **_sdxl(request), scheduler=scheduler, m=m, k=k, f=f, w=w)
    stored: dict[str, torch.Tensor] = {}  # by module name; rows are B·x, or 2B·x before the gate
    now: dict[str, Action] = {}

    def hook_for(name: str) -> Callable[..., torch.Tensor]:
        kind = "cross" if name.endswith("attn2") else "self"

        def hook(_module: Any, _inputs: Any, output: torch.Tensor) -> torch.Tensor:
            action = now[kind]
            if action == "reuse":
                if stored[name].shape != output.shape:
                    raise AssertionError(f"{name}: stored {stored[name].shape}, computed {output.shape}")
                return stored[name]
            if action == "store":
                stored[name] = output
            if action == "store_mean":
                unconditional, conditional = output.chunk(2)
                stored[name] = (unconditional + conditional) / 2
            return output

        return hook

    with _run(pipe, request, scheduler), torch.no_grad(), ExitStack() as stack:
        model = _model(pipe, request)

        def predict(step: int, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
            now["self"], now["cross"] = _actions(step, m=m, k=k, f=f, w=w, guided=model.negative is not None)
            if model.negative is None:
                return model.network(sample, timestep, model.positive)
            if step >= m:
                half = model.positive if _kind(pipe) == _SVD else model.negative
                return model.network(sample, timestep, half)
            return model.guide(sample, timestep)

        for name, module in _network(pipe).named_modules():
            if name.endswith(("attn1", "attn2")) and module is not None:
                stack.callback(module.register_forward_hook(hook_for(name)).remove)
        return _denoise(pipe, request, predict)


@contextmanager
def restored(pipe: Pipeline, scheduler: Any) -> Iterator[None]:
    """Run the body on a copy of ``scheduler``, and remove what the package leaves behind before and after it."""
    _remove_patches(pipe)
    before = dict(pipe.__dict__)
    pipe.scheduler = _with_begin_index(copy.deepcopy(scheduler))
    pipe.set_progress_bar_config(disable=True)
    try:
        yield
    finally:
        _remove_patches(pipe)
        pipe.__dict__.clear()  # pipelines note a call's settings on themselves
        pipe.__dict__.update(before)


_LOADERS: dict[str, Callable[[Pipeline], Pipeline]] = {
    _SD: tgate.TgateSDLoader,
    _ALPHA: tgate.TgatePixArtAlphaLoader,
    _SIGMA: tgate.TgatePixArtSigmaLoader,
    _SVD: tgate.TgateSVDLoader,
}


def _kind(pipe: Pipeline) -> str:
    return type(pipe).__name__


def _network(pipe: Pipeline) -> torch.nn.Module:
    return pipe.unet if hasattr(pipe, "unet") else pipe.transformer


def _remove_patches(pipe: Pipeline) -> None:
    pipe.__dict__.pop("tgate", None)
    for module in _network(pipe).modules():
        if isinstance(module, Attention):
            vars(module).pop("forward", None)
            vars(module).pop("cache", None)


@contextmanager
def _run(pipe: Pipeline, request: Request, scheduler: Any) -> Iterator[None]:
    with restored(pipe, scheduler), _injected(pipe, request, scheduler):
        yield


@contextmanager
def _injected(pipe: Pipeline, request: Request, scheduler: Any) -> Iterator[None]:
    """Replace the random numbers of the scheduler, and of SVD's augmentation, by the request's.

    A scheduler that draws at all draws at every step from the first, so that its draws count its steps.
    """
    with ExitStack() as stack:
        noise = request.step_noise
        module = sys.modules[type(scheduler).__module__]
        if noise is not None and hasattr(module, "randn_tensor"):
            drawn = iter(range(request.steps))

            def draw(shape: Any, **_options: Any) -> torch.Tensor:
                return _shaped(noise(next(drawn)), shape)

            stack.enter_context(mock.patch.object(module, "randn_tensor", draw))
        if _kind(pipe) == _SVD:

            def augment(shape: Any, **_options: Any) -> torch.Tensor:
                if request.augmentation is None:
                    return torch.zeros(shape)
                return _shaped(request.augmentation.expand(*shape), shape)

            for place in (sys.modules[type(pipe).__module__], sys.modules["tgate.SVD"]):
                stack.enter_context(mock.patch.object(place, "randn_tensor", augment))
        yield


def _shaped(noise: torch.Tensor, shape: Any) -> torch.Tensor:
    if tuple(noise.shape) != tuple(shape):
        raise ValueError(f"noise {tuple(noise.shape)} where {tuple(shape)} is wanted")
    return noise.clone()


def _prompts(request: Request) -> tuple[list[str], list[str]]:
    """Prompts and negative prompts, B of each."""
    batch = request.latents.shape[0]
    both = []
    for given in (request.prompt or "", request.negative_prompt or ""):
        prompts = [given] * batch if isinstance(given, str) else given
        if len(prompts) != batch:
            raise ValueError(f"{len(prompts)} prompts for {batch} latents")
        both.append(prompts)
    return both[0], both[1]


def _sdxl(request: Request) -> dict[str, Any]:
    """Arguments of the functions of ``tests/oracle.py``."""
    prompts, negative = _prompts(request)
    return {
        "prompt": prompts,
        "negative_prompt": None if request.negative_prompt is None else negative,
        "steps": request.steps,
        "guidance_scale": request.guidance_scale,
        "latents": request.latents,
    }


def _size(pipe: Pipeline, latents: torch.Tensor) -> dict[str, int]:
    height, width = (side * pipe.vae_scale_factor for side in latents.shape[-2:])
    return {"height": height, "width": width}


def _images(request: Request) -> list[PIL.Image.Image]:
    if request.image is None:
        raise ValueError("Stable Video Diffusion starts from an image; the request has none")
    return [request.image] * request.latents.shape[0]


def _call(pipe: Pipeline, request: Request) -> dict[str, Any]:
    """Arguments common to the pipeline's call and the package's."""
    kind = _kind(pipe)
    common: dict[str, Any] = {
        "num_inference_steps": request.steps,
        "latents": request.latents.clone(),
        "output_type": "latent",
        **_size(pipe, request.latents),
    }
    if kind == _SVD:
        return common | {
            "image": _images(request),
            "num_frames": request.latents.shape[1],
            "min_guidance_scale": MIN_GUIDANCE,
            "max_guidance_scale": request.guidance_scale,
            "fps": FPS,
            "motion_bucket_id": MOTION_BUCKET,
            "noise_aug_strength": NOISE_AUGMENTATION,
        }
    prompts, negative = _prompts(request)
    common |= {"prompt": prompts, "negative_prompt": negative, "guidance_scale": request.guidance_scale}
    if kind in (_ALPHA, _SIGMA):
        common |= {"use_resolution_binning": False, "clean_caption": False}
    if kind == _LATTE:
        common |= {"clean_caption": False, "video_length": request.latents.shape[2]}
    return common


@dataclass(frozen=True)
class _Model:
    """A network with its conditioning; each half has B rows."""

    network: Callable[[torch.Tensor, torch.Tensor, Half], torch.Tensor]
    positive: Half
    negative: Half | None  # None without guidance
    scale: torch.Tensor | float

    def guide(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        """One call on both halves, the negative one first, combined."""
        assert self.negative is not None
        both = {name: torch.cat([self.negative[name], self.positive[name]]) for name in self.positive}
        unconditional, conditional = self.network(torch.cat([sample, sample]), timestep, both).chunk(2)
        return unconditional + self.scale * (conditional - unconditional)


def _model(pipe: Pipeline, request: Request) -> _Model:
    kind = _kind(pipe)
    build = {_SD: _sd, _SVD: _svd, _LATTE: _latte, _ALPHA: _pixart, _SIGMA: _pixart}[kind]
    return build(pipe, request)


def _sd(pipe: Pipeline, request: Request) -> _Model:
    prompts, negatives = _prompts(request)
    guided = request.guidance_scale > 1
    tokens, negative = pipe.encode_prompt(prompts, request.latents.device, 1, guided, negatives)

    def network(sample: torch.Tensor, timestep: torch.Tensor, half: Half) -> torch.Tensor:
        return pipe.unet(sample, timestep, encoder_hidden_states=half["tokens"], return_dict=False)[0]

    return _Model(network, {"tokens": tokens}, {"tokens": negative} if guided else None, request.guidance_scale)


def _pixart(pipe: Pipeline, request: Request) -> _Model:
    """Masks keep padding out of cross-attention. Size in image pixels, only where the pipeline would give it."""
    prompts, negatives = _prompts(request)
    guided = request.guidance_scale > 1
    tokens, mask, negative_tokens, negative_mask = pipe.encode_prompt(
        prompts, guided, negatives, max_sequence_length=300 if _kind(pipe) == _SIGMA else 120
    )
    sized = _kind(pipe) == _ALPHA and pipe.transformer.config.sample_size == 128
    height, width = (float(side) for side in _size(pipe, request.latents).values())

    def network(sample: torch.Tensor, timestep: torch.Tensor, half: Half) -> torch.Tensor:
        rows = sample.shape[0]
        size = {
            "resolution": torch.tensor([[height, width]] * rows) if sized else None,
            "aspect_ratio": torch.tensor([[height / width]] * rows) if sized else None,
        }
        output = pipe.transformer(
            sample,
            encoder_hidden_states=half["tokens"],
            encoder_attention_mask=half["mask"],
            timestep=timestep.expand(rows),
            added_cond_kwargs=size,
            return_dict=False,
        )[0]
        return output[:, : sample.shape[1]]  # the rest is learned sigma

    negative = {"tokens": negative_tokens, "mask": negative_mask} if guided else None
    return _Model(network, {"tokens": tokens, "mask": mask}, negative, request.guidance_scale)


def _latte(pipe: Pipeline, request: Request) -> _Model:
    """No mask in the network. One prompt: both halves are cut to the prompt's tokens. Several: its padding is zero."""
    prompts, negatives = _prompts(request)
    guided = request.guidance_scale > 1
    tokens, negative = pipe.encode_prompt(prompts, guided, negatives, clean_caption=False, mask_feature=True)

    def network(sample: torch.Tensor, timestep: torch.Tensor, half: Half) -> torch.Tensor:
        output = pipe.transformer(
            sample,
            timestep=timestep.expand(sample.shape[0]),
            encoder_hidden_states=half["tokens"],
            return_dict=False,
        )[0]
        return output.chunk(2, dim=1)[0]  # the rest is learned sigma

    return _Model(network, {"tokens": tokens}, {"tokens": negative} if guided else None, request.guidance_scale)


def _svd(pipe: Pipeline, request: Request) -> _Model:
    """The image enters as an embedding, and as latents beside those of every frame; both are zero in the other half."""
    images, frames = _images(request), request.latents.shape[1]
    rows = len(images)
    embedding = pipe._encode_image(images, "cpu", 1, False)
    pixels = pipe.video_processor.preprocess(images, **_size(pipe, request.latents))
    if request.augmentation is not None:
        pixels = pixels + NOISE_AUGMENTATION * request.augmentation
    image = pipe._encode_vae_image(pixels, "cpu", 1, False)[:, None].repeat(1, frames, 1, 1, 1)
    ids = pipe._get_add_time_ids(FPS - 1, MOTION_BUCKET, NOISE_AUGMENTATION, embedding.dtype, rows, 1, False)

    def network(sample: torch.Tensor, timestep: torch.Tensor, half: Half) -> torch.Tensor:
        return pipe.unet(
            torch.cat([sample, half["image"]], dim=2),
            timestep,
            encoder_hidden_states=half["embedding"],
            added_time_ids=half["ids"],
            return_dict=False,
        )[0]

    positive = {"image": image, "embedding": embedding, "ids": ids}
    negative = {"image": torch.zeros_like(image), "embedding": torch.zeros_like(embedding), "ids": ids}
    scale = torch.linspace(MIN_GUIDANCE, request.guidance_scale, frames).view(1, frames, 1, 1, 1)
    return _Model(network, positive, negative if request.guidance_scale > 1 else None, scale)


def _extra_calls(scheduler: Any, steps: int) -> int:
    scheduler.set_timesteps(steps)
    return max(len(scheduler.timesteps) - steps, 0)


def _denoise(pipe: Pipeline, request: Request, predict: Predict) -> torch.Tensor:
    """The sampler's loop. ``predict(step, scaled sample, timestep)`` sees −1 at PNDM's extra first call."""
    scheduler = pipe.scheduler
    extra = _extra_calls(scheduler, request.steps)
    # PixArt-α at one step: diffusers then takes the scheduler's second output, the denoised sample.
    member = 1 if _kind(pipe) == _ALPHA and request.steps == 1 else 0
    sample = request.latents * scheduler.init_noise_sigma
    for call, timestep in enumerate(scheduler.timesteps):
        prediction = predict(call - extra, scheduler.scale_model_input(sample, timestep), timestep)
        sample = scheduler.step(prediction, timestep, sample, return_dict=False)[member]
    return sample
