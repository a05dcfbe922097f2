from __future__ import annotations

import pytest
from tokenizers import Tokenizer, models

from tgate_engine.errors import ExportError, MethodError
from tgate_export.libraries import one_line, refusing


class PanicException(BaseException):
    """What a panic in Rust becomes: no Exception."""


@pytest.mark.parametrize(
    "error", [ValueError("a\nb."), RecursionError("deep"), MemoryError(), PanicException("index out of bounds")]
)
def test_what_a_library_raises_is_one_line(error: BaseException) -> None:
    with pytest.raises(ExportError) as caught, refusing("x is no model", "give another"):
        raise error
    assert str(caught.value).startswith(f"x is no model ({type(error).__name__}")
    assert str(caught.value).endswith("; give another")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(3), GeneratorExit()])
def test_what_is_no_fault_of_the_library_goes_on(error: BaseException) -> None:
    with pytest.raises(type(error)), refusing("x", "y"):
        raise error


def test_our_own_refusals_are_left_as_they_are() -> None:
    with pytest.raises(MethodError, match=r"^m$"), refusing("x", "y"):
        raise MethodError("m")


def test_a_long_message_is_cut() -> None:
    assert len(one_line(ValueError("x" * 10_000))) < 250


def test_a_real_panic_is_caught() -> None:
    """A tokenizer whose unknown token is none of its tokens: the library asks for it while it encodes."""
    tokenizer = Tokenizer(models.WordLevel({"a": 0}, unk_token="?"))
    with pytest.raises(ExportError, match="no tokenizer"), refusing("no tokenizer", "give another"):
        tokenizer.encode("b")
