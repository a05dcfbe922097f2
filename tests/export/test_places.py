from __future__ import annotations

from pathlib import Path

import pytest

from tgate_export.places import local


def test_a_path_is_one_whether_anything_is_there_or_not(tmp_path: Path) -> None:
    assert local(str(tmp_path)) == tmp_path
    assert local(str(tmp_path / "none")) == tmp_path / "none"
    (tmp_path / "link").symlink_to("nowhere")
    assert local(str(tmp_path / "link")) == tmp_path / "link"
    assert local("~") == Path.home()


@pytest.mark.parametrize("text", ["x" * 10**5, "/" + "x/" * 10**4, "a\0b", "~nobody-of-that-name/a", "/etc/passwd/a"])
def test_what_no_file_is_called(text: str) -> None:
    assert local(text) is None
