"""What diffusers itself makes of a checkpoint: its own pipeline, on modules that diffusers and transformers load.

Goldens come from here, so that a bundle is compared with something that does not share the exporter's reading of a
checkpoint. Where diffusers cannot load a component as it is read here (a single file, one with LoRAs), its weights
are the exporter's and the pipeline around them is diffusers' still.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import PIL.Image
import torch
import transformers
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from torch import Tensor, nn

from tgate_engine.errors import ExportError
from tgate_engine.step import half
from tgate_export import tokenizers
from tgate_export.checkpoints import Checkpoint
from tgate_export.checkpoints.directory import TensorFiles
from tgate_export.families.base import Texts
from tgate_export.ip_adapter import ENCODER, PROJECTION, TOKENS, adapted, as_diffusers, attach, fill
from tgate_export.job import Job
from tgate_export.libraries import one_line, refusing
from tgate_export.modules import real_module
from tgate_export.preview_decoder import COMPONENT
from tgate_export.quiet import quiet
from tgate_export.recipes import SAMPLERS
from tgate_export.sampling import drawing
from tgate_export.schedulers import sampler_class

SPARE = 1.1
"""Memory that a network takes in use, over that of its weights: what is not enough for sure."""

_FAR = 1000.0
"""Standard deviations, by which a small one is read off a sample without losing its digits."""

log = logging.getLogger("tgate")


@dataclass(frozen=True, kw_only=True)
class Trajectory:
    """``latents``: [B, ...] before the first step, in unit variance, and after each. ``decoded``: what the decoder
    made of the first result's last ones, float32 [F, 3, H, W]; None where none was asked for."""

    latents: list[Tensor]
    decoded: Tensor | None


class Oracle:
    """diffusers' pipeline for one job, in float32 on the CPU. Each call loads what it needs, and lets go of it."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._own = False
        with quiet():  # importing a pipeline makes transformers speak
            self._class: Any = getattr(diffusers, job.family.pipeline(job.checkpoint))

    @property
    def name(self) -> str:
        """Who recorded, for the manifest; asked for after the work."""
        whose = ", weights as tgate-engine reads them" if self._own else ""
        return f"{self._class.__name__} of diffusers {diffusers.__version__}{whose}"

    def module(self, component: str) -> nn.Module:
        """A component in float32 as diffusers or transformers loads it."""
        family, checkpoint = self._job.family, self._job.checkpoint
        directory = checkpoint.directory(component)
        cls: Any = family.class_of(component)
        if directory is not None:
            try:
                with quiet():
                    module: nn.Module = cls.from_pretrained(
                        directory,
                        local_files_only=True,
                        use_safetensors=True,
                        variant=_variant(checkpoint, component),
                        **{"dtype" if issubclass(cls, transformers.PreTrainedModel) else "torch_dtype": torch.float32},
                    )
                own = adapted(checkpoint) if component == family.denoiser else None
                if own is not None:
                    attach(module, own)
                    fill(module, own)
                return module.eval().requires_grad_(False)
            except Exception as error:  # the libraries raise many kinds for layouts they no longer read
                log.warning(
                    "%s does not load %s (%s); goldens are made with its weights as tgate-engine reads them",
                    cls.__name__,
                    directory,
                    one_line(error),
                )
        self._own = True
        return real_module(family, checkpoint, component)

    def fits(self, *components: str) -> bool:
        """Whether those components fit into free memory in float32; says so where they do not."""
        skeletons = [self._job.family.skeleton(self._job.checkpoint, component) for component in components]
        needed, free = sum(4 * p.numel() for s in skeletons for p in s.parameters()), available_bytes()
        if needed * SPARE > free:
            log.warning(
                "%s in float32 want %.1f GiB and %.1f GiB are free: no goldens are recorded of them",
                " and ".join(components),
                needed / 2**30,
                free / 2**30,
            )
        return needed * SPARE <= free

    def text(self, prompt: str, negative: str) -> tuple[list[list[int]], Texts, Texts]:
        """Token ids of the prompt, one row for each tokenizer, and the conditioning of prompt and negative prompt."""
        job = self._job
        names = [*job.family.tokenizers]
        loaded = {name: tokenizers.load(job.family, job.checkpoint, i) for i, name in enumerate(names)}
        lengths = [job.family.token_length(job.checkpoint, i) for i in range(len(names))]
        for name, length in zip(names, lengths, strict=True):
            loaded[name].model_max_length = length
        pipe = self._pipeline(**loaded, **{name: self.module(name) for name in job.family.text_components})
        ids = [
            tokenizers.transformers_ids(job.family, loaded[name], length, prompt)[0]
            for name, length in zip(names, lengths, strict=True)
        ]
        with torch.no_grad(), quiet():
            positive, other = self._run(job.family.encode_with, pipe, prompt, negative, job.settings.clip_skip)
        return ids, positive, other

    def image(self, picture: Tensor, noise: Tensor) -> Texts:
        """Conditioning of a picture, uint8 [1, H, W, 3], with noise [1, 3, H, W] on it."""
        job = self._job
        parts: dict[str, Any] = {name: self.module(name) for name in job.family.image_parts(job.checkpoint)}
        pipe = self._pipeline(**parts, **{job.family.picture_processor: self._extractor()})
        with torch.no_grad(), quiet():
            conditioning: Texts = self._run(job.family.encode_image_with, pipe, picture, noise, job.size)
        return conditioning

    def reference(self, picture: Tensor) -> Texts:
        """Conditioning of a picture beside the prompt, uint8 [1, S, S, 3]: ``<name>.<half>``."""
        job = self._job
        own = adapted(job.checkpoint)
        assert own is not None
        extractor = self._extractor(size=picture.shape[1], crop_size=picture.shape[1])
        pipe = self._pipeline(image_encoder=self.module(ENCODER), feature_extractor=extractor)
        projection = real_module(job.family, job.checkpoint, PROJECTION)
        image = PIL.Image.fromarray(picture[0].numpy())
        with torch.no_grad(), quiet():
            positive, negative = self._run(pipe.encode_image, image, "cpu", 1, own.adapter.kind == "plus")
            tokens = {half(TOKENS, "positive"): projection(positive)}
            return {half(TOKENS, "negative"): projection(negative), **tokens} if job.guided else tokens

    def _extractor(self, **otherwise: int) -> Any:
        """The checkpoint's feature extractor, or one with CLIP's values but for those."""
        folder = self._job.checkpoint.directory(self._job.family.picture_processor)
        configured = folder is not None and any(folder.glob("*processor_config.json"))
        with quiet(), refusing(f"{folder} makes no CLIPImageProcessor", "correct its preprocessor_config.json"):
            if configured:
                return transformers.CLIPImageProcessor.from_pretrained(folder, local_files_only=True)
            return transformers.CLIPImageProcessor(**otherwise)

    def encoded(self, picture: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation, in the denoiser's scale, of the latents that diffusers' pipeline begins from
        with a picture, uint8 [1, H, W, 3]: [1, C, h, w] each. ``mask``: those that its inpainting pipeline is told of
        what is left of it, where a mask, uint8 [1, H, W], is 0."""
        job = self._job
        cls: Any = self._class if mask is not None else getattr(diffusers, job.family.picture_pipeline)
        pipe = self._pipeline(cls, **{job.family.decoder: self.module(job.family.decoder)})
        pipe.scheduler = _Clean()

        def sample(noise: float) -> Tensor:
            pixels = pipe.image_processor.preprocess(PIL.Image.fromarray(picture[0].numpy()))
            if mask is not None:
                pixels = pixels * (pipe.mask_processor.preprocess(PIL.Image.fromarray(mask[0].numpy())) < 0.5)
            posterior = pipe.vae.encode(pixels).latent_dist
            pipe.vae.encode = lambda _pixels: AutoencoderKLOutput(latent_dist=posterior)
            try:
                with drawing(posterior, torch.full_like(posterior.mean, noise)):
                    if mask is not None:
                        latents: Tensor = pipe._encode_vae_image(pixels, None)
                    else:
                        latents = pipe.prepare_latents(pixels, None, 1, 1, torch.float32, torch.device("cpu"))
            finally:
                del pipe.vae.encode
            return latents

        with torch.no_grad(), quiet():
            mean = self._run(sample, 0.0)
            far = self._run(sample, _FAR)
        return mean, (far - mean) / _FAR

    def previewed(self, latents: Tensor) -> Tensor:
        """What diffusers' AutoencoderTiny makes of latents [1, C, h, w], given them as its pipelines do:
        [1, 3, H, W]."""
        preview = self._job.preview
        assert preview is not None  # whoever asks has seen it
        with quiet(), refusing(f"AutoencoderTiny does not load {preview.where}", "download it again"):
            module: Any = diffusers.AutoencoderTiny.from_pretrained(
                preview.root,
                local_files_only=True,
                use_safetensors=True,
                variant=preview.variant,
                torch_dtype=torch.float32,
            )
        with torch.no_grad(), self._in_range({COMPONENT: module}):
            decoded: Tensor = module.decode(latents / module.config.scaling_factor).sample
        return decoded

    def trajectory(
        self,
        denoiser: nn.Module,
        noise: Tensor,
        conditioning: Texts,
        steps: int,
        step_noise: Mapping[int, Tensor],
        second: nn.Module | None = None,
    ) -> Trajectory:
        """The pipeline's own loop from ``noise`` [B, ...], with conditioning ``<name>.<half>`` to [B, ...].

        ``step_noise``: what a stochastic sampler draws, by step. ``second``: the network of late steps, where there is
        one.
        """
        job = self._job
        decodes = "decoder" in job.components
        scheduler = self._scheduler()
        told = job.family.inpaints(job.checkpoint)  # its pipeline asks the decoder how many channels latents have
        vae = self.module(job.family.decoder) if decodes or told else None
        networks = {job.family.denoiser: denoiser, **({} if second is None else {job.family.late_denoiser: second})}
        pipe = self._pipeline(**networks, **{job.family.decoder: vae, "scheduler": scheduler})
        pipe.vae_scale_factor = job.family.pixels(job.checkpoint)
        latents: list[Tensor] = [noise]
        decoded: list[Tensor] = []
        step = scheduler.step

        @functools.wraps(step)
        def watched(*args: Any, **options: Any) -> Any:
            drawn = step_noise.get(len(latents) - 1, torch.zeros_like(noise))
            with drawing(scheduler, job.family.as_pipeline(drawn)):
                result = step(*args, **options)
            after = (result[0] if isinstance(result, tuple) else result.prev_sample).float()
            latents.append(job.family.from_pipeline(after, noise.shape).clone())
            return result

        scheduler.step = watched
        if vae is not None:
            vae.decode = _recording(vae.decode, decoded)
        options = {
            "num_inference_steps": steps,
            "latents": job.family.as_pipeline(noise).clone(),
            "height": job.size.height,
            "width": job.size.width,
            "output_type": "pt" if decodes else "latent",
        }
        if job.family.frames_argument:
            options[job.family.frames_argument] = job.size.frames
        if job.late is not None and job.guided:
            options[job.family.late_guidance_argument] = job.late.guidance
        call = job.family.call(pipe, conditioning, job.guidance_scale, job.settings.guidance_rescale)
        exported = {**networks, **({job.family.decoder: vae} if vae and decodes else {})}
        with as_diffusers(denoiser, conditioning) as picture, torch.no_grad(), quiet(), self._in_range(exported):
            self._run(pipe, **call, **options, **picture)
        for tensor in (*latents, *decoded):
            if not torch.isfinite(tensor).all():
                raise ExportError(
                    f"{job.checkpoint.where}: {self._class.__name__} itself makes numbers of it that are not "
                    "finite, in float32; the checkpoint is damaged, or its configuration is another's"
                )
        if job.family.decodes_frames_together:  # [1, 3, F, H, W]
            decoded = [frames.movedim(2, 1).flatten(0, 1) for frames in decoded]
        return Trajectory(latents=latents, decoded=torch.cat(decoded)[: job.size.frames] if decoded else None)

    @contextlib.contextmanager
    def _in_range(self, modules: Mapping[str, nn.Module]) -> Iterator[None]:
        """Raises :class:`ExportError` where a module that is exported in float16 makes numbers beyond it."""
        job, largest = self._job, torch.finfo(torch.float16).max
        beyond: dict[str, tuple[str, float]] = {}

        def look(component: str, name: str, output: object) -> None:
            if component in beyond or not isinstance(output, Tensor) or not output.is_floating_point():
                return
            size = float(output.abs().max())
            if size > largest:
                beyond[component] = (name, size)

        def watch(component: str, name: str) -> Any:
            return lambda _module, _inputs, output: look(component, name, output)

        hooks = [
            part.register_forward_hook(watch(component, name))
            for component, module in modules.items()
            if job.dtype_of(component) == "float16"
            for name, part in module.named_modules()
            if not any(part.children())
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
        for component, (name, size) in beyond.items():
            keep = f'set "force_upcast": true in {component}/config.json, which keeps it in float32; or '
            raise ExportError(
                f"{job.checkpoint.where}: the {component} makes numbers as large as {size:.4g} ({name}), beyond the "
                f"{largest:.0f} of float16, and pictures would come out black; "
                f"{keep if component == job.family.decoder else ''}export with --dtype fp32 or bf16"
            )

    def _scheduler(self) -> Any:
        """As people write it: the checkpoint's own scheduler, and the sampler's made from its configuration."""
        job = self._job
        recipe = SAMPLERS[job.sampler.name]
        name = str(job.scheduler.get("_class_name", recipe.scheduler))
        with quiet():
            own = getattr(diffusers, name).from_config(dict(job.checkpoint.scheduler_config()))
            own = self._pipeline(scheduler=own).scheduler  # pipelines change some options
            kind, options = sampler_class(job.sampler.name, job.scheduler)
            silent = {k: v for k, v in recipe.unless_stated.items() if k not in job.scheduler}
            same = type(own).__name__ == kind  # then what the pipeline changed holds, though no file states it
            config = {k: v for k, v in own.config.items() if k != "_use_default_values" or not same}
            return getattr(diffusers, kind).from_config(config, **options, **silent)

    def _pipeline(self, cls: Any = None, /, **parts: Any) -> Any:
        """``cls``: another pipeline than the checkpoint's own."""
        return bare_pipeline(cls or self._class, self._job.checkpoint, **self._job.family.pipeline_parts(), **parts)

    def _run(self, function: Any, *args: Any, **options: Any) -> Any:
        try:
            return function(*args, **options)
        except ExportError:
            raise
        except Exception as error:  # diffusers raises many kinds for checkpoints that do not fit its pipeline
            raise ExportError(
                f"{self._job.checkpoint.where}: {self._class.__name__} itself cannot run it ({one_line(error)}), so "
                "nothing tells what would be right; mend the checkpoint, or export without a check (--no-verify)"
            ) from error


def bare_pipeline(cls: Any, checkpoint: Checkpoint, **parts: Any) -> Any:
    """diffusers' pipeline with these parts alone, and the options of model_index.json."""
    known = inspect.signature(cls.__init__).parameters
    options = {
        name: value
        for name, value in checkpoint.model_index.items()
        if name in known and not isinstance(value, (list, tuple))
    }
    options |= {"requires_safety_checker": False, "add_watermarker": False}
    required = {name: None for name, p in known.items() if p.default is inspect.Parameter.empty and name != "self"}
    with quiet():
        pipe = cls(**{**required, **{k: v for k, v in options.items() if k in known}, **parts})
    pipe.set_progress_bar_config(disable=True)
    return pipe


class _Clean:
    """In the place of a scheduler, one that adds no noise to a picture."""

    order = 1

    def add_noise(self, latents: Tensor, _noise: Tensor, _timestep: Tensor) -> Tensor:
        return latents


def available_bytes() -> int:
    """Memory that can be had without swapping, in bytes; a large number where the system does not tell."""
    try:
        for line in Path("/proc/meminfo").read_text("ascii").splitlines():
            name, _, rest = line.partition(":")
            if name == "MemAvailable":
                return int(rest.split()[0]) * 1024
    except OSError:
        pass
    return 1 << 60


def _recording(decode: Any, decoded: list[Tensor]) -> Any:
    @functools.wraps(decode)
    def watched(*args: Any, **options: Any) -> Any:
        result = decode(*args, **options)
        decoded.append((result[0] if isinstance(result, tuple) else result.sample).float().clone())
        return result

    return watched


def _variant(checkpoint: Checkpoint, component: str) -> str | None:
    """The file that is read here: diffusers is to read the same one."""
    tensors = checkpoint.tensors(component)
    files = {path.name for path in tensors.files.values()} if isinstance(tensors, TensorFiles) else set()
    return "fp16" if any(".fp16" in name for name in files) else None
