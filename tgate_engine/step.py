"""The step interface: what every denoising graph takes and gives, whatever the model, the method and the engine.

A graph is a whole step, and holds no number of it: timestep, guidance and sampler coefficients come as one row of
numbers for each image, so that graphs do not depend on n, m, k or the sampler, and images of one call may be at
different steps. Everything that a step carries to the next is an input and an output, by the names of this module.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from tgate_engine.sampler import HISTORY, SamplerStep

LATENTS = "latents"
"""Input, float32 [B, ...]: x_i, the latents before the step."""
NEXT_LATENTS = "next_latents"
"""Output, float32 [B, ...]: x_{i+1}."""
OUTPUT = "output"
"""Output, float32 [B, ...]: e_i, the network's output after guidance."""
NOISE = "noise"
"""Input, float32 [B, ...]: z_i, standard normal noise; anything finite where its coefficient is 0."""
STEP = "step"
"""Input, float32 [B, 12]: a row of numbers for each image, see :func:`step_row`."""
HALVES = ("negative", "positive")
"""The two halves of classifier-free guidance: the negative prompt's and the prompt's."""


def past(name: str, lag: int) -> str:
    """Input, float32 [B, ...]: ``latents.<lag>`` or ``output.<lag>``, x_{i-lag} or e_{i-lag}; zeros before there is
    one. ``lag`` 0 is the current one."""
    return f"{name}.{lag}" if lag else name


def half(name: str, which: str) -> str:
    """Input [B, ...]: the conditioning ``name`` of one of :data:`HALVES`."""
    return f"{name}.{which}"


PAST = tuple(past(name, lag) for name in (LATENTS, OUTPUT) for lag in range(1, HISTORY + 1))
STEP_INPUTS = (LATENTS, *PAST, NOISE, STEP)
STEP_OUTPUTS = (NEXT_LATENTS, OUTPUT)

TIMESTEP = 0
"""Column of ``step``: what the network is told, in training steps."""
INPUT_SCALE = 1
"""The network sees ``latents * input_scale``."""
GUIDANCE = 2
"""The weight of classifier-free guidance; graphs with one half do not read it."""
NOISE_COLUMN = 3
"""The coefficient of the step's own noise z_i."""
LATENTS_COLUMNS = slice(4, 5 + HISTORY)
"""Coefficients of x_i, x_{i-1}, x_{i-2}, x_{i-3}."""
OUTPUT_COLUMNS = slice(5 + HISTORY, 6 + 2 * HISTORY)
"""Coefficients of e_i, e_{i-1}, e_{i-2}, e_{i-3}."""
STEP_ROW = 6 + 2 * HISTORY
"""The row's length, 12."""


def step_row(call: SamplerStep, guidance_scale: float) -> NDArray[np.float32]:
    """One image's row for one step, float32 [12]."""
    row = np.empty(STEP_ROW, np.float32)
    row[TIMESTEP] = call.timestep
    row[INPUT_SCALE] = call.input_scale
    row[GUIDANCE] = guidance_scale
    row[NOISE_COLUMN] = call.noise
    row[LATENTS_COLUMNS] = call.latents
    row[OUTPUT_COLUMNS] = call.outputs
    return row
