"""The step interface: names, and the row of numbers."""

from __future__ import annotations

import numpy as np

from tgate_engine import step
from tgate_engine.sampler import SamplerStep


def test_a_row_holds_every_number_once() -> None:
    call = SamplerStep(timestep=961.5, input_scale=0.25, latents=(1, 2, 3, 4), outputs=(5, 6, 7, 8), noise=9)
    row = step.step_row(call, 7.5)
    assert row.dtype == np.float32
    assert row.tolist() == [961.5, 0.25, 7.5, 9, 1, 2, 3, 4, 5, 6, 7, 8]
    assert (row[step.TIMESTEP], row[step.INPUT_SCALE], row[step.GUIDANCE]) == (961.5, 0.25, 7.5)
    assert row[step.NOISE_COLUMN] == 9
    assert row[step.LATENTS_COLUMNS].tolist() == [1, 2, 3, 4]
    assert row[step.OUTPUT_COLUMNS].tolist() == [5, 6, 7, 8]
    assert row.shape == (step.STEP_ROW,)


def test_the_names_are_those_of_the_page() -> None:
    assert step.STEP_INPUTS == (
        "latents",
        "latents.1",
        "latents.2",
        "latents.3",
        "output.1",
        "output.2",
        "output.3",
        "noise",
        "step",
    )
    assert step.STEP_OUTPUTS == ("next_latents", "output")
    assert [step.past("latents", lag) for lag in range(4)] == ["latents", "latents.1", "latents.2", "latents.3"]
    assert [step.half("text", which) for which in step.HALVES] == ["text.negative", "text.positive"]
