"""What goes to disk and comes from it: checked before the work, whole or not there."""

from __future__ import annotations

import errno
import os
import struct
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageSequence
from safetensors.numpy import save_file

from tgate_engine import underway
from tgate_engine.errors import RequestError
from tgate_runtime import files
from tgate_runtime.files import (
    FORMATS,
    check_place,
    load_array,
    load_embeddings,
    load_picture,
    new_files,
    output_paths,
    save_array,
    save_picture,
    save_video,
)


def picture(colour: int = 0, size: tuple[int, int] = (6, 4)) -> Image.Image:
    pixels = np.random.default_rng(colour).integers(0, 256, (size[1], size[0], 3), np.uint8)
    return Image.fromarray(pixels)


# --- where results go ---------------------------------------------------------------------------


def test_new_files_take_free_numbers_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file, a directory, a link that leads nowhere and what another request takes meanwhile: none is touched."""
    monkeypatch.chdir(tmp_path)
    Path("a-0001.png").write_text("mine")
    Path("a-0003.png").symlink_to("nowhere")
    Path("a-0004.png").mkdir()
    with new_files("a", ".png", 2) as first, new_files("a", ".png", 1) as second:
        assert [str(path) for path in (*first, *second)] == ["a-0002.png", "a-0005.png", "a-0006.png"]
    assert Path("a-0001.png").read_text() == "mine"
    assert all(path.is_file() for path in (*first, *second))


def test_new_files_go_where_the_work_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a-0001.png").write_text("mine")
    with pytest.raises(KeyboardInterrupt), new_files("a", ".png", 2):
        raise KeyboardInterrupt
    assert [path.name for path in tmp_path.iterdir()] == ["a-0001.png"]


def test_new_files_go_where_the_process_is_ended_hard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As while a video is encoded, which no signal interrupts."""
    monkeypatch.chdir(tmp_path)
    Path("a-0001.png").write_text("mine")
    with new_files("a", ".png", 2):
        underway.remove_unfinished()
        assert [path.name for path in tmp_path.iterdir()] == ["a-0001.png"]


def test_several_results_are_numbered(tmp_path: Path) -> None:
    assert output_paths(tmp_path / "a.png", 1) == [tmp_path / "a.png"]
    assert output_paths(tmp_path / "a.b.PNG", 3) == [tmp_path / f"a.b-{i}.PNG" for i in range(3)]
    assert output_paths(tmp_path / "a.npy", 2, decoded=False) == [tmp_path / "a-0.npy", tmp_path / "a-1.npy"]
    assert output_paths(tmp_path / "a.gif", 1, video=True) == [tmp_path / "a.gif"]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "more", "says"),
    [
        ("a.txt", {}, r"the suffix '\.txt' is no picture format; use one of \.png, \.jpg"),
        ("a", {}, r"the suffix '' is no picture format"),
        ("a.gif", {}, r"the suffix '\.gif' is no picture format"),
        ("a.png", {"video": True}, r"the suffix '\.png' is no video format; use one of \.mp4, \.gif"),
        ("a.png", {"decoded": False}, r"is no latents format; use one of \.npy: the bundle has no decoder"),
    ],
)
def test_a_suffix_of_another_kind(tmp_path: Path, name: str, more: dict[str, bool], says: str) -> None:
    with pytest.raises(RequestError, match=says):
        output_paths(tmp_path / name, 1, **more)


def test_places_where_nothing_can_be_written(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"there is no directory .*nowhere; make it first"):
        output_paths(tmp_path / "nowhere" / "a.png", 1)
    (tmp_path / "a.png").mkdir()
    with pytest.raises(RequestError, match="is a directory; name a file in it"):
        check_place(tmp_path / "a.png")
    with pytest.raises(RequestError, match=r"^/proc/x\.json cannot be written \(.*\); name another place$"):
        check_place(Path("/proc/x.json"))
    check_place(tmp_path / "b.png")
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


# --- pictures and videos ------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", FORMATS)
def test_a_picture_there_and_back(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    smooth = Image.linear_gradient("L").resize((16, 16)).convert("RGB")
    save_picture(smooth, path)
    again = load_picture(path)
    assert (again.mode, again.size) == ("RGB", (16, 16))
    allowed = 24 if suffix in (".jpg", ".jpeg", ".webp") else 0
    assert np.abs(np.asarray(again, int) - np.asarray(smooth, int)).max() <= allowed
    with Image.open(path) as stored:
        assert stored.format == FORMATS[suffix]


def test_a_failed_write_leaves_the_old_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_picture(picture(1), tmp_path / "a.png")

    def fail(*_: object) -> None:
        raise OSError(errno.EIO, "cannot rename")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="cannot rename"):
        save_picture(picture(2), tmp_path / "a.png")
    np.testing.assert_array_equal(np.asarray(load_picture(tmp_path / "a.png")), np.asarray(picture(1)))
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


@pytest.mark.parametrize("fps", [5, 8, 25])
def test_a_gif_holds_every_frame_in_its_time(tmp_path: Path, fps: int) -> None:
    frames = [Image.new("RGB", (8, 6), (40 * i, 0, 0)) for i in range(4)]
    save_video(frames, tmp_path / "a.gif", fps=fps)
    with Image.open(tmp_path / "a.gif") as stored:
        shown = [
            (frame.info["duration"], frame.convert("RGB").getpixel((0, 0))) for frame in ImageSequence.Iterator(stored)
        ]
        assert stored.info["loop"] == 0
    assert shown == [(10 * round(100 / fps), (40 * i, 0, 0)) for i in range(4)]


def test_an_mp4_needs_its_encoder_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)
    with pytest.raises(RequestError, match=r"needs imageio-ffmpeg, not installed: .*\[video\]'; or write \.gif"):
        output_paths(tmp_path / "a.mp4", 1, video=True)


class Encoder:
    """Stands for imageio-ffmpeg: writes the frames' bytes one after the other, or fails."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error = error
        self.fps = 0.0

    def write_frames(self, path: str, size: tuple[int, int], *, fps: int, **_: Any) -> Any:
        self.fps = fps
        with open(path, "wb") as file:
            yield
            try:
                while True:
                    frame = yield
                    if self.error:
                        raise self.error
                    file.write(frame)
            except GeneratorExit:
                return


def test_an_mp4_is_encoded_and_then_written_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = Encoder()
    monkeypatch.setattr(files, "_ffmpeg", lambda: encoder)
    frames = [picture(i) for i in range(3)]
    save_video(frames, tmp_path / "a.mp4", fps=7)
    assert (tmp_path / "a.mp4").stat().st_size > 0
    assert encoder.fps == 7
    monkeypatch.setattr(files, "_ffmpeg", lambda: Encoder(RuntimeError("no codec\nand more")))
    with pytest.raises(RequestError, match=r"b\.mp4: the video could not be encoded \(no codec\); write a \.gif"):
        save_video(frames, tmp_path / "b.mp4", fps=7)
    assert [path.name for path in tmp_path.iterdir()] == ["a.mp4"]


@pytest.mark.parametrize("content", [None, b"", b"no picture", b"\x89PNG\r\n\x1a\n"])
def test_files_that_are_no_picture(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "a.png").write_bytes(content)
    says = "there is no such file" if content is None else "is not a picture that can be read"
    with pytest.raises(RequestError, match=says):
        load_picture(tmp_path / "a.png")


# --- tensors ------------------------------------------------------------------------------------


def test_latents_there_and_back(tmp_path: Path) -> None:
    latents = np.random.default_rng(0).standard_normal((2, 4, 4)).astype(np.float32)
    save_array(latents, tmp_path / "a.npy")
    again = load_array(tmp_path / "a.npy")
    np.testing.assert_array_equal(again, latents)
    assert again.dtype == np.float32


def test_files_that_are_no_array(tmp_path: Path) -> None:
    (tmp_path / "text.npy").write_text("no array")
    np.save(tmp_path / "pickled.npy", np.array([{}], object), allow_pickle=True)
    np.savez(tmp_path / "several.npz", a=np.zeros(1))
    for name, says in (
        ("missing.npy", "there is no such file"),
        ("text.npy", "is not an array in NumPy's .npy format"),
        ("pickled.npy", "is not an array"),
        ("several.npz", "holds several arrays"),
    ):
        with pytest.raises(RequestError, match=says):
            load_array(tmp_path / name)


def test_embeddings_there_and_back(tmp_path: Path) -> None:
    tensors = {"text.positive": np.arange(6, dtype=np.float32).reshape(1, 2, 3)}
    save_file(tensors, tmp_path / "a.safetensors")
    again = load_embeddings(tmp_path / "a.safetensors")
    assert list(again) == ["text.positive"]
    np.testing.assert_array_equal(again["text.positive"], tensors["text.positive"])


def test_files_that_are_no_embeddings(tmp_path: Path) -> None:
    (tmp_path / "text.safetensors").write_text("no tensors")
    with pytest.raises(RequestError, match="is not a safetensors file of numbers NumPy has"):
        load_embeddings(tmp_path / "text.safetensors")
    with pytest.raises(RequestError, match="there is no such file"):
        load_embeddings(tmp_path / "missing.safetensors")


def safetensors(header: bytes, data: bytes = b"") -> bytes:
    return struct.pack("<Q", len(header)) + header + data


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\0" * 7,
        struct.pack("<Q", 2**63) + b"{}",
        struct.pack("<Q", 2**40) + b"{}",
        safetensors(b"[]"),
        safetensors(b"[" * 10**6),
        safetensors(b'{"a":' * 10**5),
        safetensors(b'{"a":[]}'),
        safetensors(b'{"a":{"dtype":[],"shape":{},"data_offsets":"x"}}'),
        safetensors(b'{"a":{"dtype":"F32","shape":[1e3],"data_offsets":[0,4]}}', bytes(4)),
        safetensors(b'{"a":{"dtype":"F32","shape":[9223372036854775807,9],"data_offsets":[0,4]}}', bytes(4)),
        safetensors(b'{"a":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}}', bytes(4)),
        safetensors(b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[4,0]}}', bytes(4)),
        safetensors(b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,400]}}', bytes(4)),
        safetensors(b'{"a":{"dtype":"F4","shape":[2],"data_offsets":[0,1]}}', bytes(1)),
        safetensors(b'{"a":{"dtype":"F8_E4M3","shape":[1],"data_offsets":[0,1]}}', bytes(1)),
        safetensors(b'{"\\u001b[2J":{"dtype":"Q","shape":[1],"data_offsets":[0,1]}}', bytes(1)),
        safetensors(b'{"__metadata__":[[[]]]}'),
    ],
    ids=range(18),
)
def test_headers_that_are_none_end_in_one_line_at_once(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.safetensors").write_bytes(content)
    begin = time.process_time()
    with pytest.raises(RequestError, match="is not a safetensors file of numbers NumPy has") as caught:
        load_embeddings(tmp_path / "a.safetensors")
    assert time.process_time() - begin < 1
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 500


def npy(header: str, data: bytes = b"", version: int = 1) -> bytes:
    text = header.encode() + b"\n"
    return b"\x93NUMPY" + bytes([version, 0]) + struct.pack("<H" if version == 1 else "<I", len(text)) + text + data


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "is not an array"),
        (b"\x93NUMPY\1", "is not an array"),
        (npy("{'descr': '|O', 'fortran_order': False, 'shape': (1,)}", bytes(8)), "an array of object, not of numbers"),
        (npy("{'descr': '<U4', 'fortran_order': False, 'shape': (1,)}", bytes(16)), "not of numbers"),
        (npy("{'descr': [('a', '<f4')], 'fortran_order': False, 'shape': (1,)}", bytes(4)), "not of numbers"),
        (npy("{'descr': '<c8', 'fortran_order': False, 'shape': (1,)}", bytes(8)), "not of numbers"),
        (npy("{'descr': '<f4', 'fortran_order': False, 'shape': (10**9,)}"), "is not an array"),
        (npy("{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000000,)}"), "takes 4000000000000"),
        (npy("{'descr': '<f4', 'fortran_order': False, 'shape': (" + "9" * 300 + ", 9)}"), "0 bytes of numbers, shape"),
        (npy("{'descr': '<f4', 'fortran_order': False, 'shape': (-1, -1)}", bytes(4)), "is not an array"),
        (npy("{'descr': '<f4', 'fortran_order': False, 'shape': (2,)}", bytes(4)), "4 bytes of numbers, shape"),
        (npy("{'descr': '<f4', 'fortran_order': False, 'shape': (1,)}", bytes(5)), "5 bytes of numbers, shape"),
        (npy("{'descr': '<f4', 'fortran_order': 1, 'shape': (1,)}", bytes(4)), "is not an array"),
        (npy("__import__('os').abort()"), "is not an array"),
        (npy("(" * 5000), "is not an array"),
        (npy("{'descr': '<f4', 'fortran_order': False, 'shape': (1,)}", bytes(4), version=3), "version"),
        (npy("{" + " " * 10**6 + "}", version=2), "is not an array"),
        (npy("\x1b[2J"), "is not an array"),
    ],
    ids=range(18),
)
def test_arrays_that_are_none_end_in_one_line_at_once(tmp_path: Path, content: bytes, says: str) -> None:
    (tmp_path / "a.npy").write_bytes(content)
    begin = time.process_time()
    with pytest.raises(RequestError, match=says) as caught:
        load_array(tmp_path / "a.npy")
    assert time.process_time() - begin < 1
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("descr", ["<f4", ">f4", "<f8", ">f2", "<i8", "|u1"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_arrays_of_every_order(tmp_path: Path, descr: str, order: str) -> None:
    values = np.arange(24).reshape(2, 3, 4)
    np.save(tmp_path / "a.npy", np.asarray(values, descr, order=order))  # type: ignore[call-overload]
    again = load_array(tmp_path / "a.npy")
    np.testing.assert_array_equal(again, values)
    assert again.dtype == np.dtype(descr).newbyteorder("=")
    assert again.dtype.isnative
    assert again.flags.c_contiguous


def test_an_array_of_one_number_and_of_none(tmp_path: Path) -> None:
    for values in (np.float32(3), np.zeros((0, 4), np.float32)):
        np.save(tmp_path / "a.npy", values)
        np.testing.assert_array_equal(load_array(tmp_path / "a.npy"), values)


@pytest.mark.parametrize("load", [load_picture, load_embeddings, load_array])
def test_only_regular_files_are_read(tmp_path: Path, load: Callable[[Path], Any]) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path, Path("/dev/zero")):
        with pytest.raises(RequestError, match="is not a plain file"):
            load(path)
    with (tmp_path / "hole").open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(RequestError, match="hole holds 1099511627776 bytes; at most"):
        load(tmp_path / "hole")
