"""Pictures of strangers: the colours a viewer shows, from bytes written here, and nothing that harms."""

from __future__ import annotations

import io
import os
import struct
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from tgate_engine.errors import RequestError
from tgate_runtime import picture
from tgate_runtime.files import load_picture
from tgate_runtime.picture import READ, as_mask, as_rgb, read_mask, read_picture

SIXTEEN = np.array([0, 255, 256, 1000, 32768, 65535], np.uint16)
HIGH = np.array([0, 0, 1, 3, 128, 255], np.uint8)  # SIXTEEN // 256


def png(pixels: bytes, width: int, height: int, depth: int, kind: int, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG of rows without filters. ``kind``: 0 grey, 2 RGB, 3 palette, 4 grey and alpha, 6 RGBA."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    stride = len(pixels) // height
    rows = b"".join(b"\0" + pixels[i : i + stride] for i in range(0, len(pixels), stride))
    head = struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0)
    between = b"".join(chunk(*each) for each in chunks)
    body = chunk(b"IHDR", head) + between + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def tiff(
    pixels: bytes, width: int, height: int, *, bits: int, photometric: int = 1, order: str = "<", **tags: int
) -> bytes:
    """A TIFF of one strip and one sample."""
    more = {"sample_format": 339, "orientation": 274, "compression": 259}
    entries = {256: width, 257: height, 258: bits, 259: 1, 262: photometric, 277: 1, 278: height, 279: len(pixels)}
    entries |= {more[name]: value for name, value in tags.items()}
    entries[273] = 8 + 2 + 12 * (len(entries) + 1) + 4
    body = b"".join(
        struct.pack(order + "HHII" if order == "<" else ">HHII", tag, 4, 1, v) for tag, v in sorted(entries.items())
    )
    return (
        (b"II*\0" if order == "<" else b"MM\0*")
        + struct.pack(order + "IH", 8, len(entries))
        + body
        + b"\0" * 4
        + pixels
    )


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def read(content: bytes) -> NDArray[np.uint8]:
    image = read_picture(content, "a.png")
    assert image.mode == "RGB"
    assert image.info == {}
    return np.asarray(image)


def grey(values: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """[1, W, 3]."""
    return np.repeat(values[np.newaxis, :, np.newaxis], 3, axis=2)


def over_white(colour: Any, alpha: Any) -> NDArray[np.float64]:
    share = np.asarray(alpha, float) / 255
    return np.asarray(colour, float) * share + 255 * (1 - share)


# --- 16 bits ------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["<", ">"])
def test_sixteen_bits_are_scaled_in_every_file(order: str) -> None:
    """By their higher byte: grey and RGB alike, in PNG, TIFF and PPM."""
    big, own = SIXTEEN.astype(">u2"), SIXTEEN.astype(f"{order}u2")
    np.testing.assert_array_equal(read(png(big.tobytes(), 6, 1, 16, 0)), grey(HIGH))
    np.testing.assert_array_equal(read(png(np.repeat(big, 3).tobytes(), 6, 1, 16, 2)), grey(HIGH))
    np.testing.assert_array_equal(read(tiff(own.tobytes(), 6, 1, bits=16, order=order)), grey(HIGH))
    np.testing.assert_array_equal(read(b"P5 6 1 65535\n" + big.tobytes()), grey(HIGH))
    assert np.abs(read(b"P6 6 1 65535\n" + np.repeat(big, 3).tobytes()).astype(int) - grey(HIGH)).max() <= 1  # rounded


def test_sixteen_bits_from_white_to_black() -> None:
    content = tiff(SIXTEEN.astype("<u2").tobytes(), 6, 1, bits=16, photometric=0)
    np.testing.assert_array_equal(read(content), grey(((65535 - SIXTEEN.astype(int)) // 256).astype(np.uint8)))
    np.testing.assert_array_equal(read(tiff(HIGH.tobytes(), 6, 1, bits=8, photometric=0)), grey(255 - HIGH))


def test_a_transparent_grey_of_sixteen_bits_is_white() -> None:
    content = png(SIXTEEN.astype(">u2").tobytes(), 6, 1, 16, 0, (b"tRNS", struct.pack(">H", 1000)))
    np.testing.assert_array_equal(read(content)[0, :, 0], [0, 0, 1, 255, 128, 255])


def test_sixteen_bits_with_alpha() -> None:
    values = np.array([[0x8000, 0x4000, 0x2000, 0x8000]], ">u2")
    expected = over_white([128, 64, 32], 128)
    assert np.abs(read(png(values.tobytes(), 1, 1, 16, 6))[0, 0] - expected).max() <= 1
    assert np.abs(read(png(values[:, [0, 3]].tobytes(), 1, 1, 16, 4))[0, 0] - over_white(128, 128)).max() <= 1


@pytest.mark.parametrize("mode", ["I;16", "I;16B"])
def test_pil_images_of_sixteen_bits(mode: str) -> None:
    order = ">" if mode.endswith("B") else "<"
    image = Image.frombytes(mode, (6, 1), SIXTEEN.astype(f"{order}u2").tobytes())
    np.testing.assert_array_equal(np.asarray(as_rgb(image)), grey(HIGH))


# --- orientation --------------------------------------------------------------------------------

CORNERS = np.array([[[255, 0, 0], [0, 255, 0], [0, 0, 255]], [[0, 0, 0], [255, 255, 255], [255, 255, 0]]], np.uint8)

TURNED: dict[int, Callable[[NDArray[Any]], NDArray[Any]]] = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: a[::-1].transpose(1, 0, 2),
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
    8: lambda a: a[:, ::-1].transpose(1, 0, 2),
}
"""EXIF's own definitions: where row 0 and column 0 of what is stored lie in what is shown."""


@pytest.mark.parametrize("orientation", TURNED)
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_orientation_is_applied_once(kind: str, orientation: int) -> None:
    large = CORNERS.repeat(16, axis=0).repeat(16, axis=1)  # what JPEG does to colours stays within a block
    exif = Image.Exif()
    exif[0x0112] = orientation
    every: dict[str, dict[str, Any]] = {"JPEG": {"quality": 100, "subsampling": 0}, "WEBP": {"lossless": True}}
    options = every.get(kind, {})
    content = saved(Image.fromarray(large), kind, exif=exif, **options)
    expected = TURNED[orientation](large).astype(int)
    got = read(content).astype(int)
    assert got.shape == expected.shape
    assert np.abs(got - expected).max() <= 4
    again = as_rgb(Image.open(io.BytesIO(content)))
    np.testing.assert_array_equal(np.asarray(as_rgb(again)), got)


# --- alpha, palettes, inks ----------------------------------------------------------------------


def test_what_is_transparent_lies_over_white() -> None:
    """Whatever colour is written below it, in every way to write transparency."""
    rgba = np.array([[[10, 20, 30, 255], [200, 0, 100, 0], [40, 80, 120, 128], [0, 0, 0, 1]]], np.uint8)
    expected = over_white(rgba[..., :3], rgba[..., 3:])
    for kind, options in (("PNG", {}), ("WEBP", {"lossless": True, "exact": True}), ("TIFF", {})):
        assert np.abs(read(saved(Image.fromarray(rgba), kind, **options)) - expected).max() <= 1
    la = np.array([[[10, 255], [200, 0], [40, 128]]], np.uint8)
    expected = over_white(la[..., :1], la[..., 1:]).repeat(3, axis=2)
    assert np.abs(read(saved(Image.fromarray(la, "LA"), "PNG")) - expected).max() <= 1


def test_palettes_with_transparency() -> None:
    colours = bytes([10, 20, 30, 200, 0, 100, 40, 80, 120])
    content = png(b"\0\1\2", 3, 1, 8, 3, (b"PLTE", colours), (b"tRNS", bytes([255, 0, 128])))
    expected = over_white(np.frombuffer(colours, np.uint8).reshape(3, 3), np.array([[255], [0], [128]]))
    assert np.abs(read(content)[0] - expected).max() <= 1
    image = Image.frombytes("P", (3, 1), b"\0\1\2")
    image.putpalette(colours)
    assert read(saved(image, "GIF", transparency=1)).tolist() == [[[10, 20, 30], [255] * 3, [40, 80, 120]]]
    assert read(saved(image, "GIF")).tolist() == [[[10, 20, 30], [200, 0, 100], [40, 80, 120]]]


@pytest.mark.parametrize(
    ("depth", "kind", "pixels", "key", "expected"),
    [
        (8, 0, bytes([7, 8]), struct.pack(">H", 7), [[255] * 3, [8] * 3]),
        (8, 2, bytes([1, 2, 3, 4, 5, 6]), struct.pack(">HHH", 1, 2, 3), [[255] * 3, [4, 5, 6]]),
        (1, 0, b"\x40", struct.pack(">H", 0), [[255] * 3, [255] * 3]),
        (1, 0, b"\x40", None, [[0] * 3, [255] * 3]),
        (2, 0, b"\x50", struct.pack(">H", 1), None),
        (4, 0, b"\x12", struct.pack(">H", 1), None),
        (16, 2, bytes(12), struct.pack(">HHH", 0, 0, 0), None),
    ],
)
def test_one_transparent_colour(depth: int, kind: int, pixels: bytes, key: bytes | None, expected: Any) -> None:
    """Right, or refused by name where it would be compared with other numbers than it is written in."""
    content = png(pixels, 2, 1, depth, kind, *([] if key is None else [(b"tRNS", key)]))
    if expected is not None:
        assert read(content)[0].tolist() == expected
        return
    with pytest.raises(RequestError, match=r"a\.png: a transparent colour in a PNG of 2, 4 or 16 bits is not read"):
        read(content)


def inks(cmyk: NDArray[np.uint8]) -> NDArray[np.float64]:
    return (255 - cmyk[..., :3].astype(float)) * (255 - cmyk[..., 3:].astype(float)) / 255


@pytest.mark.parametrize("kind", ["JPEG", "TIFF"])
def test_inks_multiply(kind: str) -> None:
    """Also as Adobe writes them into JPEG, upside down."""
    cmyk = np.array([[0, 0, 0, 0], [255, 0, 0, 0], [0, 128, 255, 64], [0, 0, 0, 255]], np.uint8)
    large = cmyk.repeat(16, axis=0)[np.newaxis].repeat(16, axis=0)
    content = saved(Image.fromarray(large, "CMYK"), kind, **({"quality": 100} if kind == "JPEG" else {}))
    assert (b"Adobe" in content) == (kind == "JPEG")
    assert np.abs(read(content) - inks(large)).max() <= 6


def test_inks_written_as_ycck() -> None:
    """Adobe's other way: what stands upside down for C, M, Y is the YCbCr of its complement. A file of the first way is
    marked as one of the second, so the numbers in it are known."""
    stored = 255 - np.array([60, 160, 200, 40], float)
    content = saved(Image.new("CMYK", (16, 16), (60, 160, 200, 40)), "JPEG", quality=100)
    at = content.index(b"Adobe") + 11
    assert content[at] == 0
    y, cb, cr = stored[:3] - [0, 128, 128]
    ink = np.clip([y + 1.402 * cr, y - 0.344136 * cb - 0.714136 * cr, y + 1.772 * cb], 0, 255)  # 255 - (255 - R)
    expected = (255 - ink) * stored[3] / 255
    assert np.abs(read(content[:at] + b"\x02" + content[at + 1 :])[8, 8] - expected).max() <= 4


def test_modes_of_pil_images() -> None:
    """In Python any image may be handed over; what has no known white is refused by name."""
    rgb = Image.fromarray(CORNERS)
    for mode in ("RGB", "RGBA", "RGBX", "RGBa", "YCbCr", "HSV"):
        assert (
            np.abs(
                np.asarray(as_rgb(rgb.convert("RGBA" if mode == "RGBa" else "RGB").convert(mode)), int) - CORNERS
            ).max()
            <= 3
        )
    for mode in ("L", "LA", "1", "I;16"):
        bits = Image.fromarray(np.array([[0, 255]], np.uint8)).convert("LA" if mode == "LA" else "L")
        image = Image.frombytes(mode, (2, 1), b"\0\0\xff\xff") if mode == "I;16" else bits.convert(mode)
        assert np.asarray(as_rgb(image))[0, :, 0].tolist() == [0, 255]
    for mode in ("I", "F", "LAB"):
        with pytest.raises(RequestError, match=f"of mode {mode} is not read.*convert it to RGB"):
            as_rgb(Image.new(mode, (2, 2)))


@pytest.mark.parametrize("odd", [None, "a.png", np.zeros((4, 4, 3), np.uint8), b"\x89PNG"])
def test_what_is_no_image(odd: Any) -> None:
    with pytest.raises(RequestError, match=r"an image must be a PIL\.Image\.Image, got "):
        as_rgb(odd)


def test_sizes_of_pil_images(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(picture, "MOST_PIXELS", 12)
    assert as_rgb(Image.new("L", (3, 4))).size == (3, 4)
    for size in ((0, 0), (0, 5), (13, 1)):
        with pytest.raises(RequestError, match=rf"has {size[0]} x {size[1]} pixels, wanted are 1 to 12"):
            as_rgb(Image.new("L", size))


def test_the_callers_image_is_left_as_it_is() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    image = Image.open(io.BytesIO(saved(Image.fromarray(CORNERS), "PNG", exif=exif)))
    as_rgb(image)
    assert image.size == (3, 2)
    plain = Image.fromarray(CORNERS)
    assert as_rgb(plain) is not plain


# --- what is not decoded ------------------------------------------------------------------------

POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n%%EOF\n"


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.eps"])
def test_postscript_starts_no_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Whatever the file is called, and whoever opened it."""
    from PIL import EpsImagePlugin

    def started(*_: Any, **__: Any) -> Any:
        pytest.fail("Ghostscript was started")

    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", started)
    (tmp_path / name).write_bytes(POSTSCRIPT)
    with pytest.raises(RequestError, match="it is none of PNG, JPEG, WEBP, BMP, TIFF, GIF, PPM; convert it to PNG"):
        load_picture(tmp_path / name)
    with pytest.raises(RequestError, match="is an opened EPS file"):
        as_rgb(Image.open(tmp_path / name))


def test_formats_of_the_rest_of_the_zoo_are_not_read() -> None:
    Image.init()
    image, tried = Image.fromarray(CORNERS.repeat(16, axis=0).repeat(16, axis=1)), 0
    for kind in sorted(set(Image.SAVE) - {*READ, "MPO"}):
        try:
            content = saved(image, kind)
        except Exception:  # Pillow writes not every format without more settings
            continue
        if content[:2] == b"\xff\xd8" or content[:4] == b"\x89PNG":
            continue
        tried += 1
        with pytest.raises(RequestError, match="is not a picture that can be read"):
            read(content)
    assert tried > 10


@pytest.mark.parametrize("kind", READ)
@pytest.mark.parametrize("kept", [0.05, 0.5, 0.9])
def test_files_cut_short_are_refused(kind: str, kept: float) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    content = saved(Image.fromarray(pixels).quantize(64) if kind == "GIF" else Image.fromarray(pixels), kind)
    read(content)
    with pytest.raises(RequestError, match="is not a picture that can be read") as caught:
        read(content[: int(len(content) * kept)])
    assert str(caught.value).isprintable()


def test_pixels_are_counted_before_any_is_decoded() -> None:
    """Files of a few hundred bytes that say they are large: refused at once, by every format."""
    huge = [
        png(b"\0", 60000, 1, 8, 0).replace(struct.pack(">II", 60000, 1), struct.pack(">II", 60000, 60000)),
        b"P5 60000 60000 255\n",
        tiff(b"\0", 60000, 60000, bits=8),
        saved(Image.new("L", (1, 1)), "GIF").replace(b"\1\0\1\0", struct.pack("<HH", 60000, 60000)),
        saved(Image.new("L", (1, 1)), "BMP").replace(struct.pack("<ii", 1, 1), struct.pack("<ii", 60000, 60000)),
        b"P5 0 0 255\n",
    ]
    begin = time.process_time()
    for content in huge:
        with pytest.raises(RequestError):
            read(content)
    assert time.process_time() - begin < 1


def test_a_jpeg_of_many_scans_is_not_begun() -> None:
    """Each costs a walk over all pixels: the last scan of a progressive file, a thousand times, takes minutes."""
    content = saved(Image.new("L", (2048, 2048)), "JPEG", progressive=True)
    last = content.rindex(b"\xff\xda")
    bomb = content[:last] + content[last:-2] * 1000 + content[-2:]
    begin = time.process_time()
    with pytest.raises(RequestError, match=r"the JPEG of 2048 x 2048 pixels has \d+ scans; save it anew"):
        read(bomb)
    assert time.process_time() - begin < 1
    read(content)


def test_several_pictures_in_a_file_are_refused() -> None:
    first, second = (Image.new("RGB", (8, 8), colour) for colour in ("red", "blue"))
    for kind in ("GIF", "PNG", "WEBP", "TIFF"):
        with pytest.raises(RequestError, match=f"the {kind} file holds several pictures; save the one that is meant"):
            read(saved(first, kind, save_all=True, append_images=[second]))
    photograph = saved(first, "MPO", save_all=True, append_images=[second])  # as telephones write JPEG
    assert np.abs(read(photograph).astype(int) - [255, 0, 0]).max() <= 2


def test_a_tiff_with_another_decoder_inside_is_refused() -> None:
    with pytest.raises(RequestError, match="a TIFF with compression jpeg is not read; save it as PNG"):
        read(saved(Image.new("RGB", (16, 16)), "TIFF", compression="jpeg"))


def test_garbage_ends_in_one_line() -> None:
    """Bytes changed in the headers and bodies of good files: a picture of the right kind, or one line."""
    rng = np.random.default_rng(7)
    smooth = Image.linear_gradient("L").resize((24, 24)).convert("RGB")
    files = [saved(smooth.quantize(8) if kind == "GIF" else smooth, kind) for kind in READ]
    files += [tiff(SIXTEEN.tobytes(), 6, 1, bits=16), saved(smooth, "TIFF", compression="tiff_lzw")]
    refused = 0
    for content in files:
        for _ in range(40):
            broken = np.frombuffer(content, np.uint8).copy()
            places = rng.integers(0, min(len(broken), 200), 3)
            broken[places] = rng.integers(0, 256, 3)
            try:
                assert read_picture(broken.tobytes(), "x").mode == "RGB"
            except RequestError as error:
                refused += 1
                lines = str(error)
                if not lines.isprintable() or len(lines) > 400:
                    pytest.fail(lines)
    assert refused > 50


@pytest.mark.parametrize("kind", ["fifo", "directory", "zeros"])
def test_only_regular_files_are_pictures(tmp_path: Path, kind: str) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    path = {"fifo": tmp_path / "pipe.png", "directory": tmp_path, "zeros": Path("/dev/zero")}[kind]
    with pytest.raises(RequestError, match="is not a plain file"):
        load_picture(path)


# --- masks --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("image", "wanted"),
    [
        (Image.fromarray(np.array([[0, 127, 128, 255]], np.uint8)), [0, 0, 255, 255]),
        (Image.fromarray(np.array([[0, 127, 128, 255]], np.uint8)).convert("RGB"), [0, 0, 255, 255]),
        (Image.fromarray(np.array([[False, True]])), [0, 255]),
        (Image.fromarray(np.array([[[9, 255], [9, 128], [250, 127], [250, 0]]], np.uint8), "LA"), [0, 0, 255, 255]),
        (Image.fromarray(np.array([[[250, 250, 250, 255], [0, 0, 0, 0]]], np.uint8), "RGBA"), [0, 255]),
    ],
    ids=["grey", "rgb", "bits", "grey-alpha", "rgba"],
)
def test_a_mask_is_white_or_transparent(image: Image.Image, wanted: list[int]) -> None:
    """Of a picture with alpha, its colours say nothing."""
    made = as_mask(image)
    assert made.mode == "L"
    assert np.asarray(made)[0].tolist() == wanted
    again = as_mask(made)
    assert np.asarray(again)[0].tolist() == wanted
    file = io.BytesIO()
    image.save(file, "PNG")
    assert np.asarray(read_mask(file.getvalue(), "m.png"))[0].tolist() == wanted


def test_no_mask() -> None:
    with pytest.raises(RequestError, match=r"m\.png is not a picture that can be read"):
        read_mask(b"x", "m.png")
    with pytest.raises(RequestError, match=r"an image must be a PIL\.Image\.Image, got str"):
        as_mask("m.png")  # type: ignore[arg-type]
