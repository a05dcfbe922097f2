"""What an adapter may be called."""

from __future__ import annotations

import pytest

from tgate_engine.adapter import check_adapter_name
from tgate_engine.errors import RequestError


@pytest.mark.parametrize("name", ["a", "style", "Style_v1.2-x", "0" * 64])
def test_names(name: str) -> None:
    assert check_adapter_name(name) == name


@pytest.mark.parametrize("name", ["", ".", "-a", "a b", "a:b", "a/b", "ä", "a\n", "0" * 65, None, 3])
def test_what_is_no_name_ends_in_one_line(name: object) -> None:
    with pytest.raises(RequestError, match="an adapter's name is 1 to 64 letters") as caught:
        check_adapter_name(name)
    assert "\n" not in str(caught.value)
