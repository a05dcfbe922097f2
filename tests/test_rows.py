from __future__ import annotations

import numpy as np

from tgate_engine.rows import GUIDANCE, INPUT_SCALE, LATENTS, NOISE, OUTPUTS, STEP_ROW, TIMESTEP, step_row
from tgate_engine.sampler import SamplerStep


def test_a_row_holds_every_number_once() -> None:
    call = SamplerStep(timestep=961.5, input_scale=0.25, latents=(1, 2, 3, 4), outputs=(5, 6, 7, 8), noise=9)
    row = step_row(call, 7.5)
    assert row.dtype == np.float32
    assert row.tolist() == [961.5, 0.25, 7.5, 9, 1, 2, 3, 4, 5, 6, 7, 8]
    assert (row[TIMESTEP], row[INPUT_SCALE], row[GUIDANCE], row[NOISE]) == (961.5, 0.25, 7.5, 9)
    assert row[LATENTS].tolist() == [1, 2, 3, 4]
    assert row[OUTPUTS].tolist() == [5, 6, 7, 8]
    assert row.shape == (STEP_ROW,)
