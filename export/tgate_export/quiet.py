"""Libraries that talk while they work: what matters of it is checked here, and raised."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator

import diffusers
import transformers


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without warnings and progress bars of diffusers and transformers."""
    level, bars = transformers.logging.get_verbosity(), transformers.logging.is_progress_bar_enabled()
    diffusers_level, diffusers_bars = diffusers.logging.get_verbosity(), diffusers.logging.is_progress_bar_enabled()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    diffusers.logging.set_verbosity_error()
    diffusers.logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers.logging.set_verbosity(level)
        diffusers.logging.set_verbosity(diffusers_level)
        if diffusers_bars:
            diffusers.logging.enable_progress_bar()
        if bars:
            transformers.logging.enable_progress_bar()
