"""Records in files, read by other means than those that wrote them: chunks by hand, ffmpeg, Pillow, and a parser of the
form that people's tools know."""

from __future__ import annotations

import io
import json
import logging
import re
import struct
import subprocess
import zlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import ExifTags, Image

from tests.runtime.records import PROMPTS, record
from tgate_engine.errors import RequestError
from tgate_runtime.files import load_record, save_video
from tgate_runtime.record import MOST_BYTES, Record
from tgate_runtime.stamps import HOLD, PARAMETERS, comment, parameters, read_stamp, save_options

PICTURES = [kind for kind in HOLD if kind != "MP4"]


def saved(kind: str, of: Record | None, size: int = 8) -> bytes:
    content = io.BytesIO()
    Image.linear_gradient("L").resize((size, size)).convert("RGB").save(content, kind, **save_options(of, kind))
    return content.getvalue()


def chunks(png: bytes) -> Iterator[tuple[str, bytes]]:
    """(kind, data) of a PNG, read by the letter of the standard."""
    at = 8
    while at < len(png):
        (length,) = struct.unpack_from(">I", png, at)
        kind, data = png[at + 4 : at + 8], png[at + 8 : at + 8 + length]
        assert struct.unpack_from(">I", png, at + 8 + length) == (zlib.crc32(kind + data),)
        yield kind.decode("ascii"), data
        at += 12 + length


def texts(png: bytes) -> dict[str, str]:
    found = {}
    for kind, data in chunks(png):
        if kind == "tEXt":
            key, _, value = data.partition(b"\0")
            found[key.decode("latin-1")] = value.decode("latin-1")
        if kind == "iTXt":
            key, _, rest = data.partition(b"\0")
            assert rest[:2] == b"\0\0", "not compressed"
            _, _, value = rest[2:].split(b"\0", 2)
            found[key.decode("latin-1")] = value.decode("utf-8")
    return found


def parsed(text: str) -> dict[str, str]:
    """As the web UI and what reads its pictures do: the last line are pairs, if there are three; the lines before it
    are the prompt, up to one that begins "Negative prompt:"."""
    *lines, last = text.strip().split("\n")
    pairs = re.findall(r'([A-Za-z][\w /-]*): ?("(?:[^"\\]|\\.)*"|[^,]*)(?:,\s*|$)', last)
    assert len(pairs) >= 3
    found = {key: json.loads(value) if value[:1] == '"' else value for key, value in pairs}
    halves: dict[str, list[str]] = {"Prompt": [], "Negative prompt": []}
    half = "Prompt"
    for line in map(str.strip, lines):
        if line.startswith("Negative prompt:"):
            half, line = "Negative prompt", line.removeprefix("Negative prompt:").strip()
        halves[half].append(line)
    return {**found, **{half: "\n".join(of) for half, of in halves.items()}}


# --- the text that other programs read ----------------------------------------------------------


def test_the_form_that_tools_read() -> None:
    text = parameters(record(prompt="a star,\ngreen", negative_prompt="blue: (much)", seed=2**63 - 1))
    assert text == (
        "a star,\ngreen\nNegative prompt: blue: (much)\n"
        "Steps: 25, Sampler: DPM++ 2M, CFG scale: 4.5, Seed: 9223372036854775807, Size: 128x96, "
        "Model hash: 2b2b2b2b2b, Model: mini-pixart, Version: tgate-engine 0.1.0"
    )
    assert parsed(text) == {
        "Prompt": "a star,\ngreen",
        "Negative prompt": "blue: (much)",
        "Steps": "25",
        "Sampler": "DPM++ 2M",
        "CFG scale": "4.5",
        "Seed": "9223372036854775807",
        "Size": "128x96",
        "Model hash": "2b2b2b2b2b",
        "Model": "mini-pixart",
        "Version": "tgate-engine 0.1.0",
    }


@pytest.mark.parametrize(
    ("sampler", "shown"),
    [
        ("euler_a", {"Sampler": "Euler a"}),
        ("dpmpp_2m_karras", {"Sampler": "DPM++ 2M", "Schedule type": "Karras"}),
        ("ddim", {"Sampler": "DDIM"}),
        ("of another, time", {"Sampler": "of another, time"}),
    ],
)
def test_samplers_as_tools_call_them(sampler: str, shown: dict[str, str]) -> None:
    of = record(plan=replace(record().plan, sampler=sampler))
    found = parsed(parameters(of))
    assert {key: found[key] for key in ("Sampler", "Schedule type") if key in found} == shown


@pytest.mark.parametrize("model", ["one, two", 'a "name"', "line\nSteps: 9, Seed: 9", "key: value"])
def test_values_that_hold_the_forms_own_signs(model: str) -> None:
    found = parsed(comment(record(model=model)))
    assert (found["Model"], found["Seed"]) == (model, "7")
    assert json.loads(found["tgate"])["model"] == model


def test_without_a_prompt_the_pairs_are_all() -> None:
    assert parameters(record(prompt=None)).startswith("Steps: 25")


@pytest.mark.parametrize("prompt", PROMPTS.values(), ids=PROMPTS)
def test_the_prompts_settings_are_the_last_line_whatever_it_says(prompt: str) -> None:
    found = parsed(parameters(record(prompt=prompt)))
    assert (found["Steps"], found["Seed"], found["CFG scale"]) == ("25", "7", "4.5")


# --- in files -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", PICTURES)
@pytest.mark.parametrize("prompt", PROMPTS.values(), ids=PROMPTS)
def test_every_prompt_comes_back_from_every_format(kind: str, prompt: str) -> None:
    of = record(prompt=prompt, negative_prompt=PROMPTS["lines"], given={"initial_latents": "3c" * 32})
    assert read_stamp(saved(kind, of), "x") == of


@pytest.mark.parametrize("prompt", PROMPTS.values(), ids=PROMPTS)
def test_a_png_has_both_in_its_text_chunks_before_its_pixels(prompt: str) -> None:
    of = record(prompt=prompt)
    png = saved("PNG", of)
    found = texts(png)
    assert json.loads(found["tgate"]) == of.to_json()
    assert found[PARAMETERS] == parameters(of).replace("\0", " ")
    kinds = [kind for kind, _ in chunks(png)]
    assert max(kinds.index(kind) for kind in kinds if kind in ("tEXt", "iTXt")) < kinds.index("IDAT")


@pytest.mark.parametrize("kind", ["JPEG", "WEBP", "TIFF"])
def test_exif_has_the_text_as_the_users_comment(kind: str) -> None:
    of = record(prompt="a grüner star, 星 🌟", negative_prompt="b")
    with Image.open(io.BytesIO(saved(kind, of))) as image:
        raw = image.getexif().get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment]
    assert raw[:8] == b"UNICODE\0"
    assert raw[8:].decode("utf-16-be") == parameters(of)


def test_a_gif_has_both_in_its_comment() -> None:
    of = record(prompt=PROMPTS["letters"])
    with Image.open(io.BytesIO(saved("GIF", of))) as image:
        found = parsed(image.info["comment"].decode())
    assert found["Prompt"] == of.prompt
    assert json.loads(found["tgate"]) == of.to_json()


@pytest.mark.parametrize("prompt", [PROMPTS["letters"], PROMPTS["the form itself"], "=;#\\\n" * 3, "🌟" * 2**15])
def test_an_mp4_has_both_in_its_comment(tmp_path: Path, prompt: str) -> None:
    """As ffmpeg shows it, whose arguments are shorter than the longest prompt, and read by everybody."""
    ffmpeg = pytest.importorskip("imageio_ffmpeg")
    of = record(prompt=prompt)
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "blue")]
    save_video(frames, tmp_path / "a.mp4", fps=8, record=of)
    assert load_record(tmp_path / "a.mp4") == of
    show = [ffmpeg.get_ffmpeg_exe(), "-v", "error", "-i", tmp_path / "a.mp4", "-f", "ffmetadata", "-"]
    told = subprocess.run(show, capture_output=True, text=True, check=True).stdout
    (line,) = re.findall(r"^comment=((?:[^\\\n]|\\.|\\\n)*)", told, re.MULTILINE)
    assert re.sub(r"\\(.)", r"\1", line, flags=re.DOTALL) == comment(of)


def test_the_pixels_are_the_same_and_nothing_is_noted_where_nothing_is_given() -> None:
    for kind in PICTURES:
        plain, noted = saved(kind, None), saved(kind, record(prompt="secret"))
        with Image.open(io.BytesIO(plain)) as one, Image.open(io.BytesIO(noted)) as other:
            assert one.convert("RGB").tobytes() == other.convert("RGB").tobytes()
        assert b"tgate" not in plain
        with pytest.raises(RequestError, match="x holds no record of what it was drawn from"):
            read_stamp(plain, "x")
    assert [save_options(record(), kind) for kind in ("BMP", "PPM")] == [{}, {}]


def test_what_is_too_long_for_a_jpeg_is_left_out_from_its_end(caplog: pytest.LogCaptureFixture) -> None:
    """The JSON is what is read back, so the text goes first."""
    of = record(prompt="🌟" * 15_000)
    assert read_stamp(saved("JPEG", of), "x") == of
    assert caplog.records == []
    with caplog.at_level(logging.WARNING, "tgate"), pytest.raises(RequestError, match="holds no record"):
        read_stamp(saved("JPEG", record(prompt="🌟" * 17_000)), "x")
    assert "a JPEG has room for" in caplog.text


# --- from strangers -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [*PICTURES, "MP4"])
def test_files_that_are_cut_or_changed_end_in_one_line(kind: str, recwarn: pytest.WarningsRecorder) -> None:
    of = record(prompt="a")
    content = saved(kind, of) if kind != "MP4" else mp4(comment(of).encode())
    if kind == "MP4":
        assert read_stamp(content, "x") == of
    for at in range(0, len(content), max(1, len(content) // 150)):
        for damaged in (content[:at], content[:at] + bytes([content[at] ^ 0x81]) + content[at + 1 :]):
            says = ""
            try:
                read_stamp(damaged, "x")
            except RequestError as error:
                says = str(error)
            assert recwarn.list == []
            assert says.isprintable()
            assert len(says) < 500


def mp4(text: bytes) -> bytes:
    def box(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I4s", 8 + len(content), kind) + content

    data = box(b"data", struct.pack(">II", 1, 0) + text)
    meta = box(b"meta", bytes(4) + box(b"ilst", box(b"\xa9too", b"x") + box(b"\xa9cmt", data)))
    return box(b"ftyp", b"isom") + box(b"mdat", bytes(9)) + box(b"moov", box(b"udta", meta))


@pytest.mark.parametrize("size", [0, 1, 7, 8, 2**32 - 1])
def test_boxes_of_any_size_end(size: int) -> None:
    content = mp4(b"x")
    for kind in (b"moov", b"udta", b"meta", b"ilst", b"data"):
        at = content.index(kind) - 4
        with pytest.raises(RequestError, match="holds no record"):
            read_stamp(content[:at] + struct.pack(">I", size) + content[at + 4 :], "x")


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", "1", '{"form": 1}', "{" * 100_000, '{"a": 1e999}', "x" * (MOST_BYTES + 1)]
)
@pytest.mark.parametrize("kind", ["PNG", "MP4"])
def test_records_that_are_none(kind: str, text: str) -> None:
    if kind == "PNG":
        content = io.BytesIO()
        chunk = save_options(record(), "PNG")
        chunk["pnginfo"].chunks.clear()
        chunk["pnginfo"].add_text("tgate", text)
        Image.new("L", (1, 1)).save(content, "PNG", **chunk)
        png = content.getvalue()
    else:
        png = mp4(f"Steps: 1, tgate: {json.dumps(text)}".encode())
    with pytest.raises(RequestError, match="record") as caught:
        read_stamp(png, "x")
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    "content", [b"", b"%!PS-Adobe-3.0 EPSF-3.0\n", b"\x89PNG\r\n\x1a\n", b"\0" * 100, b"GIF89a", b"\0\0\0\x08ftyp"]
)
def test_files_that_are_no_picture(content: bytes) -> None:
    with pytest.raises(RequestError, match=r"x (is not a picture that can be read|holds no record)"):
        read_stamp(content, "x")


def test_a_bomb_of_pixels_is_not_decoded() -> None:
    """A record is read from a head alone."""
    content = bytearray(saved("PNG", record()))
    content[16:24] = struct.pack(">II", 2**14, 2**13)  # of the size in IHDR, with its checksum
    content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    assert read_stamp(bytes(content), "x") == record()
