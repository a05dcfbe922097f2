"""The layout of ``step``, the one small input that tells a denoising graph which step it is.

A graph holds no step: timestep, guidance and sampler coefficients come as one row of numbers per image, so
that the graphs do not depend on n, m, k or the sampler, and images of one batch could be at different steps.
The exporter reads the row inside the graph with these names, a host fills it with :func:`step_row`.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from tgate_engine.sampler import HISTORY, SamplerStep

TIMESTEP = 0
"""What the network is told, in training steps."""
INPUT_SCALE = 1
"""The network sees ``latents * input_scale``."""
GUIDANCE = 2
"""The weight of classifier-free guidance; graphs with one half do not read it."""
NOISE = 3
"""The coefficient of the step's own noise z_i."""
LATENTS = slice(4, 5 + HISTORY)
"""Coefficients of x_i, x_{i-1}, x_{i-2}, x_{i-3}."""
OUTPUTS = slice(5 + HISTORY, 6 + 2 * HISTORY)
"""Coefficients of e_i, e_{i-1}, e_{i-2}, e_{i-3}."""
STEP_ROW = 6 + 2 * HISTORY
"""The row's length, 12: ``step`` has shape [B, 12]."""


def step_row(call: SamplerStep, guidance_scale: float) -> NDArray[np.float32]:
    """The row of one step, float32 [12], the same for every image that takes this step."""
    row = np.empty(STEP_ROW, np.float32)
    row[TIMESTEP] = call.timestep
    row[INPUT_SCALE] = call.input_scale
    row[GUIDANCE] = guidance_scale
    row[NOISE] = call.noise
    row[LATENTS] = call.latents
    row[OUTPUTS] = call.outputs
    return row
