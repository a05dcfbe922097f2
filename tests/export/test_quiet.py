"""Libraries are quiet for as long as they are asked to be."""

from __future__ import annotations

import warnings

import diffusers
import pytest
import transformers

from tgate_export.quiet import quiet


def test_what_was_loud_is_loud_again(recwarn: pytest.WarningsRecorder) -> None:
    before = (transformers.logging.get_verbosity(), diffusers.logging.get_verbosity())
    bars = (transformers.logging.is_progress_bar_enabled(), diffusers.logging.is_progress_bar_enabled())
    with quiet():
        warnings.warn("not heard", UserWarning, stacklevel=1)
        assert transformers.logging.get_verbosity() == transformers.logging.ERROR
        assert not diffusers.logging.is_progress_bar_enabled()
    assert not [warning for warning in recwarn if str(warning.message) == "not heard"]
    assert (transformers.logging.get_verbosity(), diffusers.logging.get_verbosity()) == before
    assert (transformers.logging.is_progress_bar_enabled(), diffusers.logging.is_progress_bar_enabled()) == bars


def test_an_error_restores_it_too() -> None:
    before = transformers.logging.get_verbosity()
    with pytest.raises(ZeroDivisionError), quiet():
        raise ZeroDivisionError
    assert transformers.logging.get_verbosity() == before
