"""Files of a stranger: regular, of a bounded size, and JSON that says each thing once."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path

import pytest

from tests.hub import cached
from tgate_engine.errors import ExportError
from tgate_export.checkpoints.files import (
    DEPTH,
    JSON_BYTES,
    check_inside,
    kind_of,
    open_regular,
    parse_object,
    plain,
    present,
    quoted,
    read_bytes,
    read_json,
)


def refused(path: Path) -> str:
    with pytest.raises(ExportError) as caught:
        read_json(path)
    line = str(caught.value)
    assert "\n" not in line
    assert len(line) < 400 + len(str(path))
    return line


def test_an_object_is_read(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text('{"a": [1, 2.5, null, true, "é"], "b": {"c": 1e30}, "n": 1000000000000000019884624838656}')
    assert read_json(path) == {"a": [1, 2.5, None, True, "é"], "b": {"c": 1e30}, "n": int(1e30)}


# --- what is no file ----------------------------------------------------------------------------


def test_a_fifo_is_refused_at_once(tmp_path: Path) -> None:
    """Opened as files usually are, it waits for somebody to write."""
    os.mkfifo(tmp_path / "config.json")
    assert "is a FIFO" in refused(tmp_path / "config.json")


def test_a_device_is_refused() -> None:
    """It never ends."""
    assert "is a device" in refused(Path("/dev/zero"))


def test_other_things_of_that_name_are_refused(tmp_path: Path) -> None:
    assert "is a directory" in refused(tmp_path)
    (tmp_path / "link").symlink_to("nowhere")
    assert "is a link to nowhere, which is not there" in refused(tmp_path / "link")
    (tmp_path / "loop").symlink_to("loop")
    assert "cannot be opened" in refused(tmp_path / "loop")
    assert "cannot be opened" in refused(tmp_path / ("x" * 5000))
    assert "cannot be opened" in refused(tmp_path / "a\0b")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "s"))
        assert "cannot be opened" in refused(tmp_path / "s")


def test_a_link_to_a_file_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("{}")
    (tmp_path / "b").symlink_to("a")
    assert read_json(tmp_path / "b") == {}
    with open_regular(tmp_path / "b") as file:
        assert file.read() == b"{}"


def test_a_file_that_is_too_large_is_not_read_whole(tmp_path: Path) -> None:
    """A sparse file of a terabyte takes no space, and all memory there is."""
    path = tmp_path / "config.json"
    with path.open("wb") as file:
        file.truncate(1 << 40)
    assert f"more than {JSON_BYTES} bytes" in refused(path)
    path.write_bytes(b"12345")
    assert read_bytes(path, 5) == b"12345"
    with pytest.raises(ExportError, match="more than 4 bytes"):
        read_bytes(path, 4)


def test_present_sees_a_link_to_nothing(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("nowhere")
    assert present(tmp_path / "link")
    assert not present(tmp_path / "other")


# --- what is no JSON ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ('{"a": 1, "b": {"a": 2, "a": 3}}', "says 'a' twice"),
        ('{"a": NaN}', "has a = nan"),
        ('{"a": [Infinity]}', "has a = inf"),
        ('{"a": -Infinity}', "has a = -inf"),
        ('{"b": {"a": 1e400}}', "has a = inf"),
        ('{"a": 1' + "0" * 400 + "}", "has a = inf"),
        ('{"a": 1' + "0" * 10_000 + "}", "has a = inf"),
        ("[" * 100_000, "deeper than"),
        ('{"a":' * 100_000, "deeper than"),
        ('{"a":' + "[" * DEPTH + "]" * DEPTH + "}", "deeper than"),
        ("[1]", "holds a list, and an object is wanted"),
        ("null", "holds null"),
        ('"text"', "holds text"),
        ("7", "holds a number"),
        ("true", "holds true or false"),
        ("", "not readable JSON"),
        ("{", "not readable JSON"),
        ("{'a': 1}", "not readable JSON"),
        ('{"a": "\\ud800"}', "half a character in a"),
        ('{"\\udfff": 1}', "half a character"),
        ('{"\\u001b[31m\\n": 1e400}', r"'\x1b[31m\n' = inf"),
    ],
    ids=lambda text: text[:24],
)
def test_what_is_no_object_of_finite_values_is_refused(tmp_path: Path, text: str, why: str) -> None:
    path = tmp_path / "config.json"
    path.write_text(text, "utf-8")
    line = refused(path)
    assert line.startswith(str(path))
    assert why in line


def test_bytes_that_are_no_text_are_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(b'{"a": "\xff"}')
    assert "not readable JSON" in refused(tmp_path / "config.json")


def test_as_deep_as_files_are() -> None:
    deep = '{"a":' + "[" * (DEPTH - 2) + "1" + "]" * (DEPTH - 2) + "}"
    assert parse_object(deep, "x")["a"]


def test_an_infinity_where_diffusers_writes_one() -> None:
    text = json.dumps({"lambda_min_clipped": float("-inf")})
    assert parse_object(text, "x", infinite=("lambda_min_clipped",))["lambda_min_clipped"] == float("-inf")
    with pytest.raises(ExportError, match="has lambda_min_clipped = nan"):
        parse_object('{"lambda_min_clipped": NaN}', "x", infinite=("lambda_min_clipped",))


# --- links --------------------------------------------------------------------------------------


def test_links_may_not_lead_out_of_a_checkpoint(tmp_path: Path) -> None:
    root, other = tmp_path / "checkpoint", tmp_path / "other"
    (root / "unet").mkdir(parents=True)
    other.mkdir()
    (other / "secret").write_text("{}")
    (root / "unet" / "a").symlink_to("../../other/secret")
    (root / "unet" / "b").symlink_to(other / "secret")
    (root / "vae").symlink_to(other)
    (root / "unet" / "inside").symlink_to("c")
    (root / "unet" / "c").write_text("{}")
    for path in (root / "unet" / "a", root / "unet" / "b", root / "vae" / "secret", root / ".." / "other"):
        with pytest.raises(ExportError, match="outside the checkpoint"):
            check_inside(root, path)
    check_inside(root, root / "unet" / "inside")
    (tmp_path / "link").symlink_to(root)
    check_inside(tmp_path / "link", tmp_path / "link" / "unet" / "c")


def test_the_hubs_cache_holds_its_files_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "model_index.json").write_text("{}")
    snapshot = cached(tmp_path, "owner/name", tmp_path / "c")
    check_inside(snapshot, snapshot / "model_index.json")
    (snapshot / "out").symlink_to(tmp_path / "c" / "model_index.json")
    with pytest.raises(ExportError, match="outside the checkpoint"):
        check_inside(snapshot, snapshot / "out")


# --- words --------------------------------------------------------------------------------------


def test_a_value_is_shown_on_one_line() -> None:
    assert quoted("a\nb\x1b[2J") == r"'a\nb\x1b[2J'"
    assert len(quoted("x" * 10**6)) < 80
    assert len(quoted([1] * 10**4)) < 80
    assert plain("UNet2DModel") == "UNet2DModel"
    assert plain("a\nb") == r"'a\nb'"
    assert plain(["a"]) == "['a']"
    values: list[object] = [None, True, 1, 1.5, "", [], {}]
    assert [kind_of(v) for v in values] == [
        "null",
        "true or false",
        "a number",
        "a number",
        "text",
        "a list",
        "an object",
    ]
