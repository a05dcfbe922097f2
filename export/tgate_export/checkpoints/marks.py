"""What a single file tells of itself: tensors that are marks, and metadata in its header.

Nothing in the layout of the original code says what a network predicts or how its noise is scheduled. Tools write
marks instead: ComfyUI tensors without values, Stability AI's model specification and kohya's trainer metadata. A mark
is a statement about a fact. Those that the exporter can follow change the published configurations; two that
disagree, one that disagrees with the model that was asked for, and one that cannot be followed are refused by name.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import diffusers
import torch
from torch import Tensor

from tgate_engine.errors import ExportError

CONVERT = "convert it to a diffusers directory first"

PREDICTION = "prediction type"
ZERO_SNR = "zero terminal SNR"

# What diffusers gives Playground v2.5, whose file holds neither range nor solver.
_PLAYGROUND: Mapping[str, Any] = {
    "_class_name": "EDMDPMSolverMultistepScheduler",
    "algorithm_type": "dpmsolver++",
    "euler_at_final": False,
    "final_sigmas_type": "zero",
    "lower_order_final": True,
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "rho": 7.0,
    "sigma_data": 0.5,
    "sigma_max": 80.0,
    "sigma_min": 0.002,
    "sigma_schedule": "karras",
    "solver_order": 2,
    "solver_type": "midpoint",
    "thresholding": False,
}
_PLAYGROUND_SCALING = 0.5

# CosXL, but for the ends of its range, which its file holds. Its noise is spaced evenly in its logarithm.
_COSXL: Mapping[str, Any] = {
    "_class_name": "EDMEulerScheduler",
    "final_sigmas_type": "zero",
    "num_train_timesteps": 1000,
    "prediction_type": "v_prediction",
    "sigma_data": 1.0,
    "sigma_min": 0.002,
    "sigma_schedule": "exponential",
}

# The model whose files are marked for EDM, and the channels of its latents.
_EDM_MODEL = "sdxl"
_LATENT_CHANNELS = 4

_SCHEDULES = ("alphas_cumprod", "betas", "denoiser.sigmas")

_EDM = ("edm_mean", "edm_std", "edm_vpred.sigma_max", "edm_vpred.sigma_min")

MARKS = ("v_pred", "ztsnr", "global_step", "scale_factor", *_EDM, *_SCHEDULES)
"""Tensors that are marks, by their names in the whole file."""

# By metadata key: patterns of its values, what each is called in messages, and the models that it can be. The group
# "v" says that the network predicts velocity. modelspec.architecture has a fixed vocabulary, trainers have not.
_ARCHITECTURES: Mapping[str, tuple[tuple[str, str, tuple[str, ...]], ...]] = {
    "modelspec.architecture": (
        (r"stable-diffusion-v1", "stable-diffusion-v1", ("sd15",)),
        (r"stable-diffusion-v2-768-(?P<v>v)", "stable-diffusion-v2-768-v", ("sd21",)),
        (r"stable-diffusion-xl-v1-base", "stable-diffusion-xl-v1-base", ("sdxl", "ssd-1b")),
    ),
    "ss_base_model_version": (
        (r"sd_?v?1([.-]\d)?(?P<v>_v)?", "sd_v1", ("sd15",)),
        (r"sd_?v?2([.-]\d)?(?P<v>_v)?", "sd_v2", ("sd21",)),
        (r"sdxl(?!.*refiner).*", "sdxl_base_v1-0", ("sdxl", "ssd-1b")),
    ),
}

_PREDICTIONS: Mapping[str, str] = {
    "epsilon": "epsilon",
    "eps": "epsilon",
    "v": "v_prediction",
    "v_prediction": "v_prediction",
    "v-prediction": "v_prediction",
}

_BOOLEANS: Mapping[str, bool] = {"true": True, "1": True, "false": False, "0": False}

# SD 2 was published twice: 512 pixels and noise, 768 pixels and velocity. Sizes between are nearer to one.
_SD2_BETWEEN = 640

# Steps that SD 2's base, which predicts noise, was trained for; diffusers tells it by them too.
_EPSILON_STEP = 875_000

_LONGEST = 256
"""Characters of a metadata value that is read."""

_Value = TypeVar("_Value")


@dataclass(frozen=True)
class _Statement:
    """``source``, as messages name it, says that ``fact`` is ``value``."""

    source: str
    fact: str
    value: object


@dataclass(frozen=True, kw_only=True)
class Marks:
    """What a file tells beyond the published configurations of its model.

    ``scheduler``: keys of the scheduler's configuration that differ; with a class, it takes the place of the whole.
    ``vae``: likewise of the autoencoder's. ``layers_skipped``: last layers of the text encoder that prompts were
    trained without.
    """

    scheduler: Mapping[str, Any] = field(default_factory=dict)
    vae: Mapping[str, Any] = field(default_factory=dict)
    layers_skipped: int = 0

    def scheduler_config(self, published: Mapping[str, Any]) -> dict[str, Any]:
        """The scheduler's configuration of this file."""
        return dict(self.scheduler) if "_class_name" in self.scheduler else {**published, **self.scheduler}


def read_marks(
    where: str, model: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], published: Mapping[str, Any]
) -> Marks:
    """The marks of a file that is said to hold ``model``.

    ``tensors``: the whole file's; marks alone are read. ``published``: the model's scheduler configuration.
    Raises :class:`ExportError`, in one line that starts with ``where``.
    """
    return _Reader(where, model, tensors, metadata, published).marks()


@dataclass(frozen=True)
class _Reader:
    where: str
    model: str
    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, str]
    published: Mapping[str, Any]

    @property
    def own_prediction(self) -> str:
        return str(self.published.get("prediction_type", "epsilon"))

    def marks(self) -> Marks:
        edm, vae = self._edm()
        statements = [*self._by_tensors(), *self._by_metadata()]
        if edm:
            name = "edm_mean" if vae else "edm_vpred.sigma_max"
            statements.append(_Statement(f"tensor {name!r}", PREDICTION, edm["prediction_type"]))
            statements.append(_Statement(f"tensor {name!r}", ZERO_SNR, False))
        agreed = self._agreed(statements)
        prediction, zero_snr = agreed.get(PREDICTION), agreed.get(ZERO_SNR)
        self._check_prediction(prediction)
        self._check_resolution(prediction)
        self._check_timesteps()
        if edm:
            changed: dict[str, Any] = edm
        else:
            other = prediction is not None and prediction.value != self.own_prediction
            changed = {"prediction_type": prediction.value} if prediction is not None and other else {}
            if zero_snr is not None and zero_snr.value:
                self._check_zero_snr(zero_snr, str(changed.get("prediction_type", self.own_prediction)))
                changed |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
        return Marks(scheduler=changed, vae=vae, layers_skipped=self._layers_skipped())

    def _by_tensors(self) -> Iterator[_Statement]:
        if "v_pred" in self.tensors:
            yield _Statement("tensor 'v_pred'", PREDICTION, "v_prediction")
        if "ztsnr" in self.tensors:
            yield _Statement("tensor 'ztsnr'", ZERO_SNR, True)
        step = self.tensors.get("global_step")
        if step is not None and step.numel() == 1 and float(step) == _EPSILON_STEP and self.model == "sd21":
            yield _Statement(f"tensor 'global_step' ({_EPSILON_STEP}, SD 2 base)", PREDICTION, "epsilon")
        for key in _SCHEDULES:
            if key in self.tensors and self._is_rescaled(key):
                yield _Statement(f"tensor {key!r}", ZERO_SNR, True)

    def _by_metadata(self) -> Iterator[_Statement]:
        if "_quantization_metadata" in self.metadata:
            raise self._refusal(
                "its metadata has _quantization_metadata, so its weights are quantised",
                "give the checkpoint in float32, float16 or bfloat16",
            )
        for key in _ARCHITECTURES:
            text = self._metadata_value(key)
            if text is not None and self._says_velocity(key, text):
                yield _Statement(f"its {key}", PREDICTION, "v_prediction")
        second = self._flag("ss_v2")
        if second is not None and second != (self.model == "sd21"):
            raise self._refusal(
                f"its metadata says ss_v2 = {self.metadata['ss_v2']!r}; {self.model} is "
                f"{'' if self.model == 'sd21' else 'not '}of Stable Diffusion 2",
                f"choose another --model or file, or {CONVERT}",
            )
        for key in ("modelspec.prediction_type", "modelspec.predict_key"):
            text = self._metadata_value(key)
            if text is not None:
                yield _Statement(f"its {key}", PREDICTION, self._one_of(key, text, _PREDICTIONS))
        velocity = self._flag("ss_v_parameterization")
        if velocity is not None:
            yield _Statement("its ss_v_parameterization", PREDICTION, "v_prediction" if velocity else "epsilon")
        rescaled = self._flag("ss_zero_terminal_snr")
        if rescaled is not None:
            yield _Statement("its ss_zero_terminal_snr", ZERO_SNR, rescaled)

    def _says_velocity(self, key: str, text: str) -> bool:
        """Whether the name of an architecture says what its network predicts. Refuses those of other models."""
        names = []
        for pattern, name, models in _ARCHITECTURES[key]:
            if self.model in models:
                match = re.fullmatch(pattern, text)
                if match is not None:
                    return match.groupdict().get("v") is not None
                names.append(name)
        raise self._refusal(
            f"its metadata says {key} = {self.metadata[key]!r}; {self.model} is {' or '.join(names)}",
            f"choose another --model or file, or {CONVERT}",
        )

    def _edm(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """The scheduler's whole configuration and what changes of the autoencoder's, where the file is EDM's."""
        marks = [name for name in _EDM if name in self.tensors]
        if not marks:
            return {}, {}
        if self.model != _EDM_MODEL:
            raise self._refusal(
                f"tensor {marks[0]!r} marks it as an EDM model, which is known of {_EDM_MODEL} alone", CONVERT
            )
        vpred = "edm_vpred.sigma_max" in marks
        if set(marks) not in (
            {"edm_mean", "edm_std"},
            {"edm_vpred.sigma_max"},
            {"edm_vpred.sigma_max", "edm_vpred.sigma_min"},
        ):
            raise self._refusal(
                f"it has the marks {', '.join(marks)}, and wants edm_mean and edm_std (Playground) or "
                "edm_vpred.sigma_max (CosXL), not parts or both of them",
                f"correct the file, or {CONVERT}",
            )
        if vpred:
            edm = dict(_COSXL)
            for end in ("sigma_max", "sigma_min"):
                if f"edm_vpred.{end}" in marks:
                    edm[end] = self._numbers(f"edm_vpred.{end}", 1, positive=True)[0]
            if edm["sigma_min"] >= edm["sigma_max"]:
                raise self._refusal(
                    f"its noise goes from {edm['sigma_min']:g} to {edm['sigma_max']:g} (edm_vpred.sigma_min, "
                    "edm_vpred.sigma_max), and must grow",
                    "correct the file",
                )
            return edm, {}
        return dict(_PLAYGROUND), {
            "latents_mean": self._numbers("edm_mean", _LATENT_CHANNELS),
            "latents_std": self._numbers("edm_std", _LATENT_CHANNELS, positive=True),
            "scaling_factor": _PLAYGROUND_SCALING,
        }

    def _numbers(self, key: str, count: int, *, positive: bool = False) -> list[float]:
        values = [float(value) for value in self.tensors[key].flatten()]
        if len(values) != count or not all(math.isfinite(v) and (v > 0 or not positive) for v in values):
            raise self._refusal(
                f"tensor {key!r} holds {values[:8]}, and must hold {count} {'positive' if positive else 'finite'} "
                f"number{'s' if count > 1 else ''}",
                "correct the file",
            )
        return values

    def _is_rescaled(self, key: str) -> bool:
        """Whether that buffer is the published noise schedule brought to a signal of zero at its end.

        Networks that were trained further keep the buffers of their ancestor, so the published schedule says nothing.
        """
        held = self.tensors[key]
        # Values are rounded to the file's dtype; schedules of other models differ by far more.
        tolerance = max(1e-3, 2 * torch.finfo(held.dtype).eps) if held.is_floating_point() else 0.0
        values = held.double().flatten()
        values = values.sort().values if key == "denoiser.sigmas" else values
        for rescaled in (False, True):
            table = _schedule(self.published, rescaled=rescaled)[key].double()
            # At the end of a rescaled schedule noise is infinite, and tools write another large number.
            end = -1 if rescaled and key == "denoiser.sigmas" else len(table)
            if values.shape == table.shape and torch.allclose(values[:end], table[:end], rtol=tolerance, atol=1e-6):
                return rescaled
        span = f"{float(values[0]):.4g} to {float(values[-1]):.4g}" if len(values) else "nothing"
        raise self._refusal(
            f"its noise schedule is neither the published one of {self.model} nor that with a terminal SNR of zero: "
            f"tensor {key!r} holds {len(values)} numbers, {span}",
            f"choose another --model or file, or {CONVERT}",
        )

    def _agreed(self, statements: list[_Statement]) -> dict[str, _Statement]:
        agreed: dict[str, _Statement] = {}
        for statement in statements:
            before = agreed.setdefault(statement.fact, statement)
            if before.value != statement.value:
                raise self._refusal(
                    f"it contradicts itself: by {before.source} its {statement.fact} is {before.value}, by "
                    f"{statement.source} {statement.value}",
                    f"correct the one that is wrong, or {CONVERT}",
                )
        return agreed

    def _check_prediction(self, prediction: _Statement | None) -> None:
        """Velocity in place of noise is a matter of the sampler; noise in place of velocity is SD 2's base."""
        if prediction is not None and prediction.value == "epsilon" and self.own_prediction != "epsilon":
            raise self._refusal(
                f"by {prediction.source} it predicts epsilon, as SD 2 base does; {self.model} predicts "
                f"{self.own_prediction}",
                CONVERT,
            )

    def _check_resolution(self, prediction: _Statement | None) -> None:
        """The size that a file was trained at tells the two of SD 2 apart where nothing else does."""
        text = self._metadata_value("modelspec.resolution")
        if text is None or self.model != "sd21" or prediction is not None:
            return
        size = re.fullmatch(r"(\d+)\s*[x,]\s*(\d+)", text)
        if size is None or int(size[1]) * int(size[2]) < _SD2_BETWEEN**2:
            raise self._refusal(
                f"its metadata says modelspec.resolution = {text!r}, and SD 2 of that size predicts noise; sd21 is "
                "768x768 and predicts velocity",
                f"{CONVERT}, or, if it does predict velocity, add modelspec.prediction_type = 'v' to its metadata",
            )

    def _check_timesteps(self) -> None:
        """A network for a part of the noise schedule draws nothing by itself."""
        text = self._metadata_value("modelspec.timestep_range")
        if text is None:
            return
        steps = [int(number) for number in re.findall(r"\d+", text)]
        last = int(self.published.get("num_train_timesteps", 1000)) - 1
        if len(steps) != 2 or steps[0] > 0 or steps[1] < last:
            raise self._refusal(
                f"its metadata says modelspec.timestep_range = {text!r}: it is trained for a part of the {last + 1} "
                "timesteps",
                "give a checkpoint for all of them",
            )

    def _check_zero_snr(self, zero_snr: _Statement, prediction: str) -> None:
        if prediction != "v_prediction":
            raise self._refusal(
                f"by {zero_snr.source} its terminal SNR is zero, where {prediction} says nothing of the picture; such "
                "a network predicts velocity, and nothing in the file says so",
                f"add the tensor 'v_pred' if it does, or {CONVERT}",
            )

    def _layers_skipped(self) -> int:
        """SDXL takes its encoders' last layer but one, whatever its trainer was told."""
        key = "modelspec.encoder_layer"
        text = self._metadata_value(key)
        if text is None or self.model not in ("sd15", "sd21"):
            return 0
        if not text.isdecimal() or int(text) < 1:
            raise self._refusal(f"its metadata says {key} = {text!r}, and 1 is the last layer", "correct the file")
        return int(text) - 1

    def _metadata_value(self, key: str) -> str | None:
        """A metadata value in lower case; None where it says nothing."""
        text = self.metadata.get(key, "").strip().lower()
        if len(text) > _LONGEST:
            raise self._refusal(
                f"its metadata says {key} = {text[:20]!r}… in {len(text)} characters, and {_LONGEST} are read",
                "correct the file",
            )
        return None if text in ("", "none", "null") else text

    def _flag(self, key: str) -> bool | None:
        text = self._metadata_value(key)
        return None if text is None else self._one_of(key, text, _BOOLEANS)

    def _one_of(self, key: str, text: str, table: Mapping[str, _Value]) -> _Value:
        if text not in table:
            raise self._refusal(
                f"its metadata says {key} = {self.metadata[key]!r}, which is none of {', '.join(table)}",
                f"correct the file, or {CONVERT}",
            )
        return table[text]

    def _refusal(self, what: str, advice: str) -> ExportError:
        return ExportError(f"{self.where}: {what}; {advice}")


def check_scale(where: str, tensors: Mapping[str, Tensor], scale: Callable[[], float]) -> None:
    """Raises :class:`ExportError` where the file holds another scale of latents than the autoencoder's config."""
    if "scale_factor" not in tensors:
        return
    held, scaling_factor = tensors["scale_factor"].double().flatten(), scale()
    if held.numel() != 1 or not math.isclose(float(held), scaling_factor, rel_tol=1e-2):
        raise ExportError(
            f"{where}: tensor 'scale_factor' holds {held.tolist()[:4]}, and the published autoencoder scales latents "
            f"by {scaling_factor:g}; {CONVERT}"
        )


def _schedule(published: Mapping[str, Any], *, rescaled: bool) -> dict[str, Tensor]:
    """The noise schedule of a configuration under the names that files have for it, each [timesteps]."""
    names = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas")
    options = {name: published[name] for name in names if name in published}
    scheduler: Any = diffusers.DDIMScheduler(**options, rescale_betas_zero_snr=rescaled)
    kept = scheduler.alphas_cumprod
    return {"alphas_cumprod": kept, "betas": scheduler.betas, "denoiser.sigmas": ((1 - kept) / kept).sqrt()}
