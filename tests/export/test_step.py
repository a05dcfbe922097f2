"""One denoising step in its own arithmetic: input scaling, halves, guidance, the sampler's sum; on a toy network."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg
from torch import Tensor, nn

from tgate_engine.step import GUIDANCE, INPUT_SCALE, NOISE_COLUMN, OUTPUT_COLUMNS, STEP_ROW, TIMESTEP
from tgate_export.methods.base import Halves, Variant
from tgate_export.methods.parts import Part
from tgate_export.step import ControlStep, DenoisingStep

SHAPE = (3, 5, 6)
SCALES = torch.tensor([4.0, 7.5])
BOTH = Variant(name="full", halves="both")


def predict(network: nn.Module, latents: Tensor, times: Tensor, scales: Tensor, given: Mapping[str, Tensor]) -> Tensor:
    """A network that shows each input in its output."""
    column = (-1, 1, 1, 1)
    text = given["text"].mean(dim=1)
    output: Tensor = network(latents) + times.view(column) + 0.1 * scales.view(column) + text.view(column)
    return output


def rows(batch: int, **columns: Tensor) -> Tensor:
    """Step rows [B, 12] that change nothing but what is named."""
    step = torch.zeros(batch, STEP_ROW)
    step[:, INPUT_SCALE] = 1.0
    for name, values in columns.items():
        step[:, {"time": TIMESTEP, "scale": INPUT_SCALE, "guidance": GUIDANCE, "noise": NOISE_COLUMN}[name]] = values
    return step


def values(step: DenoisingStep, numbers: Tensor, seed: int = 0) -> dict[str, Tensor]:
    """An input of each name, drawn at random."""
    generator = torch.Generator().manual_seed(seed)
    batch = len(numbers)
    shapes = {"text.negative": (batch, 4), "text.positive": (batch, 4)}
    return {
        name: numbers if name == "step" else torch.randn(shapes.get(name, (batch, *SHAPE)), generator=generator)
        for name in step.input_names
    }


def outputs(step: DenoisingStep, named: Mapping[str, Tensor]) -> dict[str, Tensor]:
    with torch.no_grad(), step.attached():
        return dict(zip(step.output_names, step(*(named[name] for name in step.input_names)), strict=True))


@pytest.mark.parametrize("halves", ["both", "negative", "positive"])
def test_inputs_and_outputs_have_the_names_of_the_step_interface(halves: Halves) -> None:
    step = DenoisingStep(nn.Identity(), predict, Variant(name="x", halves=halves), ("text", "size"), torch.float32)
    which = ("negative", "positive") if halves == "both" else (halves,)
    past = ("latents.1", "latents.2", "latents.3", "output.1", "output.2", "output.3")
    conditioning = [f"{name}.{half}" for name in ("text", "size") for half in which]
    assert list(step.input_names) == ["latents", *past, "noise", "step", *conditioning]
    assert step.output_names == ("next_latents", "output")


def test_the_network_sees_scaled_latents_its_timestep_and_each_half_of_its_own_image() -> None:
    numbers = rows(2, time=torch.tensor([11.0, 22.0]), scale=torch.tensor([0.5, 2.0]), guidance=SCALES)
    step = DenoisingStep(nn.Tanh(), predict, BOTH, ("text",), torch.float32)
    named = values(step, numbers)
    got = outputs(step, named)["output"]
    for j, (time, scale, guidance) in enumerate(((11.0, 0.5, 4.0), (22.0, 2.0, 7.5))):
        base = torch.tanh(named["latents"][j] * scale) + time + 0.1 * guidance
        negative, positive = (base + named[f"text.{half}"][j].mean() for half in ("negative", "positive"))
        assert torch.allclose(got[j], negative + guidance * (positive - negative), atol=1e-4)


@pytest.mark.parametrize("half", ["negative", "positive"])
def test_one_half_is_not_guided(half: Halves) -> None:
    step = DenoisingStep(nn.Tanh(), predict, Variant(name="one", halves=half), ("text",), torch.float32)
    named = values(step, rows(2, guidance=SCALES))
    column = SCALES.view(2, 1, 1, 1)
    expected = torch.tanh(named["latents"]) + 0.1 * column + named[f"text.{half}"].mean(dim=1).view(2, 1, 1, 1)
    assert torch.allclose(outputs(step, named)["output"], expected, atol=1e-6)


def test_the_samplers_sum_has_a_coefficient_for_each_of_its_tensors() -> None:
    """Against the formula in float64, on a row of numbers with no zero and no two alike."""
    generator = np.random.default_rng(0)
    numbers = torch.from_numpy(generator.uniform(0.5, 2.0, (2, STEP_ROW)).astype(np.float32))
    step = DenoisingStep(nn.Tanh(), predict, Variant(name="one", halves="positive"), ("text",), torch.float32)
    named = values(step, numbers)
    got = outputs(step, named)
    row, wide = numbers.double(), {name: value.double() for name, value in named.items()}
    latents = [wide["latents"], wide["latents.1"], wide["latents.2"], wide["latents.3"]]
    outs = [got["output"].double(), wide["output.1"], wide["output.2"], wide["output.3"]]
    expected = row[:, 3].view(2, 1, 1, 1) * wide["noise"]
    for j in range(4):
        expected = expected + row[:, 4 + j].view(2, 1, 1, 1) * latents[j] + row[:, 8 + j].view(2, 1, 1, 1) * outs[j]
    assert torch.allclose(got["next_latents"].double(), expected, atol=1e-5)


@pytest.mark.parametrize("rescale", [0.0, 0.3, 1.0])
def test_rescaled_guidance_is_diffusers(rescale: float) -> None:
    """Output of one step, for a batch of two, against the function of diffusers' pipelines."""
    generator = torch.Generator().manual_seed(0)
    negative, positive = torch.randn(2, 2, *SHAPE, generator=generator)
    both = torch.stack([negative[0], positive[0], negative[1], positive[1]])
    numbers = rows(2, guidance=SCALES)
    numbers[:, OUTPUT_COLUMNS.start] = 1.0
    step = DenoisingStep(nn.Identity(), lambda *_: both, BOTH, (), torch.float32, rescale=rescale)
    got = outputs(step, values(step, numbers))
    expected = negative + SCALES.view(2, 1, 1, 1) * (positive - negative)
    if rescale:
        expected = rescale_noise_cfg(expected, positive, guidance_rescale=rescale)
    assert torch.allclose(got["output"], expected, atol=1e-6)
    assert torch.allclose(got["next_latents"], expected, atol=1e-6)


def test_guided_output_is_brought_to_the_lengths_of_the_prompts_half() -> None:
    """And left alone where there is no guidance."""

    def lengths(output: torch.Tensor) -> torch.Tensor:
        return output.norm(dim=1, keepdim=True)

    generator = torch.Generator().manual_seed(0)
    negative, positive = torch.randn(2, 2, *SHAPE, generator=generator)
    both = torch.stack([negative[0], positive[0], negative[1], positive[1]])
    numbers = rows(2, guidance=SCALES)
    step = DenoisingStep(nn.Identity(), lambda *_: both, BOTH, (), torch.float32, lengths=lengths)
    guided = negative + SCALES.view(2, 1, 1, 1) * (positive - negative)
    want = guided / guided.norm(dim=1, keepdim=True) * positive.norm(dim=1, keepdim=True)
    assert torch.allclose(outputs(step, values(step, numbers))["output"], want, atol=1e-5)
    alone = Variant(name="one", halves="positive")
    step = DenoisingStep(nn.Identity(), lambda *_: positive, alone, (), torch.float32, lengths=lengths)
    assert torch.equal(outputs(step, values(step, numbers))["output"], positive)


def test_guidance_grows_over_the_frames() -> None:
    """From 1 at the first to the step row's at the last."""
    frames = 4
    ramp = torch.linspace(0, 1, frames).view(1, frames, 1, 1)
    generator = torch.Generator().manual_seed(0)
    negative, positive = torch.randn(2, 1, frames, 3, 3, generator=generator)
    step = DenoisingStep(nn.Identity(), lambda *_: torch.cat([negative, positive]), BOTH, (), torch.float32, ramp)
    named = {n: rows(1, guidance=torch.tensor([3.0])) if n == "step" else torch.zeros(1, frames, 3, 3)
             for n in step.input_names}  # fmt: skip
    got = outputs(step, named)["output"]
    for frame, scale in enumerate((1.0, 1 + 2 / 3, 1 + 4 / 3, 3.0)):
        expected = negative[:, frame] + scale * (positive[:, frame] - negative[:, frame])
        assert torch.allclose(got[:, frame], expected, atol=1e-6)


class Noting(Part):
    """Takes one carry and gives one, and notes what it is told."""

    reads, writes = ("taken",), ("kept",)

    def __init__(self) -> None:
        self.begun: list[tuple[Sequence[str], int, int]] = []
        self.attached_to: list[nn.Module] = []

    @contextmanager
    def attached(self, denoiser: nn.Module) -> Iterator[None]:
        self.attached_to.append(denoiser)
        yield
        self.attached_to.remove(denoiser)

    def begin(self, carried: Mapping[str, Tensor], batch: int, halves: int) -> None:
        self.begun.append((list(carried), batch, halves))
        self.taken = carried["taken"]

    def difference(self) -> Tensor | None:
        return self.taken

    def end(self, difference: Tensor | None) -> dict[str, Tensor]:
        return {"kept": self.taken if difference is None else difference}


def test_a_part_that_kept_a_difference_guides_the_prompts_half() -> None:
    part, network = Noting(), nn.Identity()
    step = DenoisingStep(
        network, predict, Variant(name="one", halves="positive", parts=(part,)), ("text",), torch.float32
    )
    assert (step.input_names[-1], step.output_names[-1]) == ("taken", "kept")
    named = values(step, rows(2, guidance=SCALES))
    got = outputs(step, named)
    column = SCALES.view(2, 1, 1, 1)
    positive = named["latents"] + 0.1 * column + named["text.positive"].mean(dim=1).view(2, 1, 1, 1)
    assert torch.allclose(got["output"], positive + (column - 1) * named["taken"], atol=1e-5)
    assert torch.equal(got["kept"], named["taken"])
    assert part.begun == [(["taken"], 2, 1)]
    assert not part.attached_to


def test_where_both_halves_run_their_difference_comes_before_any_kept_one() -> None:
    part = Noting()
    step = DenoisingStep(
        nn.Identity(), predict, Variant(name="full", halves="both", parts=(part,)), ("text",), torch.float32
    )
    named = values(step, rows(2, guidance=SCALES))
    got = outputs(step, named)
    words = {half: named[f"text.{half}"].mean(dim=1).view(2, 1, 1, 1) for half in ("negative", "positive")}
    expected = (words["positive"] - words["negative"]).expand(2, *SHAPE)
    assert torch.allclose(got["kept"], expected, atol=1e-5)
    assert part.begun == [(["taken"], 2, 2)]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_network_runs_in_its_dtype_and_all_else_in_float32(dtype: torch.dtype) -> None:
    seen: list[torch.dtype] = []

    def note(_m: nn.Module, latents: Tensor, times: Tensor, scales: Tensor, _c: Mapping[str, Tensor]) -> Tensor:
        seen.extend((latents.dtype, times.dtype, scales.dtype))
        return latents

    step = DenoisingStep(nn.Identity(), note, BOTH, (), dtype)
    got = outputs(step, values(step, rows(1)))
    assert seen == [dtype, torch.float32, torch.float32]
    assert {tensor.dtype for tensor in got.values()} == {torch.float32}


def steer(
    network: nn.Module,
    latents: Tensor,
    times: Tensor,
    scales: Tensor,
    given: Mapping[str, Tensor],
    residuals: Sequence[Tensor],
) -> Tensor:
    """:func:`predict`, and what is added."""
    first, second = residuals
    return predict(network, latents, times, scales, given) + first + 2 * second


@pytest.mark.parametrize("halves", ["both", "negative"])
def test_residuals_are_added_half_by_half_and_image_by_image(halves: Halves) -> None:
    """Of two ControlNets, times the scale of each image; at a scale of 0 nothing, not even of what is not finite."""
    controls = {"a": 2, "b": 2}
    variant = Variant(name="x", halves=halves)
    own = DenoisingStep(nn.Tanh(), predict, variant, ("text",), torch.float32, controls=controls, steer=steer)
    plain = DenoisingStep(nn.Tanh(), predict, variant, ("text",), torch.float32)
    which = ("negative", "positive") if halves == "both" else ("negative",)
    names = [f"control.{net}.{i}.{half}" for net in controls for i in range(2) for half in which]
    assert {*own.input_names} - {*plain.input_names} == {"control.a", "control.b", *names}
    numbers = rows(2, guidance=torch.ones(2))  # the positive half alone
    named = values(plain, numbers)
    generator = torch.Generator().manual_seed(1)
    added = {name: torch.randn(2, *SHAPE, generator=generator) for name in names}
    scales = {"control.a": torch.tensor([0.5, -2.0]), "control.b": torch.tensor([3.0, 0.0])}
    for name in names:
        if name.startswith("control.b"):
            added[name][1] = float("nan")
    got = outputs(own, {**named, **added, **scales})["output"]
    base = outputs(plain, named)["output"]
    kept = which[-1]
    for j in range(2):
        wanted = base[j].clone()
        for net in controls:
            scale = float(scales[f"control.{net}"][j])
            for i, weight in enumerate((1, 2)):
                wanted += weight * scale * added[f"control.{net}.{i}.{kept}"][j] if scale else 0
        torch.testing.assert_close(got[j], wanted, rtol=1e-4, atol=1e-4)


def test_a_controlnet_looks_at_each_image_with_its_own_picture_and_halves() -> None:
    """And gives what is wanted of it, in that order."""
    seen = list[Tensor]()

    def look(
        _: nn.Module, latents: Tensor, times: Tensor, given: Mapping[str, Tensor], pictures: Tensor
    ) -> tuple[Tensor, Tensor]:
        seen.append(pictures)
        column = times.view(-1, 1, 1, 1) + given["text"].mean(dim=1).view(-1, 1, 1, 1)
        shown = pictures.mean(dim=(1, 2, 3)).repeat_interleave(len(latents) // len(pictures))
        return latents + column, latents * shown.view(-1, 1, 1, 1)

    wanted = ("control.a.0.negative", "control.a.0.positive", "control.a.1.positive")
    step = ControlStep(nn.Identity(), look, "a", wanted, ("text",), torch.float32)
    assert step.input_names == ("latents", "step", "text.negative", "text.positive", "control.a.picture")
    assert step.output_names == wanted
    generator = torch.Generator().manual_seed(0)
    latents, pictures = torch.randn(2, *SHAPE, generator=generator), torch.tensor([51, 255], dtype=torch.uint8)
    text = {f"text.{half}": torch.randn(2, 4, generator=generator) for half in ("negative", "positive")}
    numbers = rows(2, time=torch.tensor([11.0, 22.0]), scale=torch.tensor([0.5, 2.0]))
    shown = pictures.view(2, 1, 1, 1).expand(2, 8, 8, 3)
    with torch.no_grad():
        given = dict(zip(wanted, step(latents, numbers, *text.values(), shown), strict=True))
    assert seen[0].shape == (2, 3, 8, 8)
    for j, (time, scale, grey) in enumerate(((11.0, 0.5, 0.2), (22.0, 2.0, 1.0))):
        own = latents[j] * scale
        for half in ("negative", "positive"):
            torch.testing.assert_close(given[f"control.a.0.{half}"][j], own + time + text[f"text.{half}"][j].mean())
        torch.testing.assert_close(given["control.a.1.positive"][j], own * grey)
