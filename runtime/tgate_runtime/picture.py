"""Pictures of strangers as RGB: which files are decoded at all, and what their pixels mean."""

from __future__ import annotations

import io
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError

from tgate_engine.errors import RequestError, shown

READ = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF", "PPM")
"""Formats that are decoded, by Pillow's names: those that people have pictures in, whose decoders many eyes look at.
Pillow would try some forty more by what a file begins with, whatever its name is; PostScript among them, for which it
starts another program."""

MOST_BYTES = 2**28
MOST_PIXELS = 2**26

_MOST_SCANNED = 2**31
"""Pixels of a JPEG times its scans. A progressive one may be scanned again and again, at a few bytes each."""

_TIFF_COMPRESSIONS = {"raw", "packbits", "tiff_lzw", "tiff_deflate", "tiff_adobe_deflate", "tiff_ccitt"}
_TIFF_COMPRESSIONS |= {"group3", "group4"}
_PHOTOMETRIC, _WHITE_IS_ZERO = 262, 0

_SIXTEEN_BITS = ("I;16", "I;16L", "I;16B", "I;16N")
_WITH_ALPHA = {"LA": "LA", "La": "LA", "PA": "PA", "RGBA": "RGBA", "RGBa": "RGBA"}
_PLAIN = ("1", "L", "P", "RGB", "RGBX", "CMYK", "YCbCr", "HSV")
_UNSCALED_KEYS = {"L;2", "L;4", "RGB;16B"}
"""PNGs whose transparent colour Pillow compares with pixels that it has scaled to 8 bits."""


def read_picture(content: bytes, name: str) -> Image.Image:
    """The picture of a file's ``content``, as :func:`as_rgb` makes it. ``name``: what errors call it.

    Raises :class:`RequestError` for another format than :data:`READ`, for several pictures in one file, for more than
    :data:`MOST_PIXELS`, and for a file that is damaged or cut short.
    """
    return _read(content, name, as_rgb)


def read_mask(content: bytes, name: str) -> Image.Image:
    """The mask of a file's ``content``, as :func:`as_mask` makes it. Raises as :func:`read_picture` does."""
    return _read(content, name, as_mask)


def _read(content: bytes, name: str, made: Callable[[Image.Image], Image.Image]) -> Image.Image:
    try:
        with Image.open(io.BytesIO(content), formats=READ) as image:
            _check_file(image, content)
            return made(image)
    except RequestError as error:
        raise RequestError(f"{name}: {error}") from None
    except UnidentifiedImageError:
        raise RequestError(
            f"{name} is not a picture that can be read: it is none of {', '.join(READ)}; convert it to PNG"
        ) from None
    except Exception as error:  # Pillow raises what its decoders stumble over: a dozen kinds, struct's and zlib's too
        raise RequestError(
            f"{name} is not a picture that can be read ({type(error).__name__}: {shown(error, 200)}); convert it to PNG"
        ) from None


def as_rgb(image: Image.Image) -> Image.Image:
    """A new picture, RGB of 8 bits, as a viewer shows it: turned as its EXIF orientation says, what is transparent over
    white, 16 bits by their higher eight.

    Colour profiles are not applied: numbers are taken as sRGB, and CMYK as inks that multiply. Raises
    :class:`RequestError` for modes without a known white (32-bit integers, floats), for LAB, for pictures without
    pixels or with more than :data:`MOST_PIXELS`, and for opened files in a format other than :data:`READ`, which would
    be decoded here.
    """
    if not isinstance(image, Image.Image):
        raise RequestError(f"an image must be a PIL.Image.Image, got {type(image).__name__}")
    width, height = image.size
    if not 0 < width * height <= MOST_PIXELS:
        raise RequestError(f"the picture has {width} x {height} pixels, wanted are 1 to {MOST_PIXELS}; scale it first")
    file = isinstance(image, ImageFile.ImageFile)
    if file and image.format not in (*READ, "MPO"):
        raise RequestError(
            f"the picture is an opened {shown(image.format)} file, decoded are {', '.join(READ)}; decode it yourself "
            "with image.convert('RGB')"
        )
    is_portable_map, inverted = image.format == "PPM", _white_is_zero(image)
    if "transparency" in image.info and file and _raw_mode(image) in _UNSCALED_KEYS:
        raise RequestError("a transparent colour in a PNG of 2, 4 or 16 bits is not read; save it with alpha")
    upright = ImageOps.exif_transpose(image)
    if upright.mode in _SIXTEEN_BITS or (upright.mode == "I" and is_portable_map):
        return _from_16_bits(upright, inverted=inverted)
    if upright.mode in _WITH_ALPHA or (upright.mode in _PLAIN and "transparency" in upright.info):
        rgba = upright.convert(_WITH_ALPHA.get(upright.mode, upright.mode)).convert("RGBA")
        upright = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    elif upright.mode not in _PLAIN:
        raise RequestError(
            f"a picture of mode {shown(upright.mode)} is not read, since its range is not known; convert it to RGB"
        )
    return Image.fromarray(np.asarray(upright.convert("RGB")))  # without what the old one says about itself


def decoded(image: Image.Image) -> Image.Image:
    """:func:`as_rgb` of a picture that may be an opened file, which is decoded here. Raises :class:`RequestError`."""
    try:
        return as_rgb(image)
    except RequestError:
        raise
    except Exception as error:  # Pillow raises what its decoders stumble over
        raise RequestError(f"the image cannot be decoded ({type(error).__name__}: {shown(error, 200)})") from None


def as_mask(image: Image.Image) -> Image.Image:
    """A new mask, L of 8 bits, 255 where something is to be drawn anew and 0 where it stays: of a picture with alpha
    what is more transparent than not, of any other what is nearer to white than to black. Raises as :func:`as_rgb`
    does."""
    rgb = as_rgb(image)
    upright = ImageOps.exif_transpose(image)
    if upright.mode in _WITH_ALPHA:
        alpha = upright.convert(_WITH_ALPHA[upright.mode]).getchannel("A")
        return alpha.point([255 if value < 128 else 0 for value in range(256)])
    return rgb.convert("L").point([255 if value >= 128 else 0 for value in range(256)])


def _from_16_bits(image: Image.Image, *, inverted: bool) -> Image.Image:
    values = np.asarray(image).astype(np.uint16)
    grey = ((~values if inverted else values) >> 8).astype(np.uint8)
    if (transparent := image.info.get("transparency")) is not None:
        grey = np.where(values == transparent, np.uint8(255), grey)
    return Image.fromarray(grey).convert("RGB")


def _check_file(image: ImageFile.ImageFile, content: bytes) -> None:
    """What is bounded before anything is decoded, beside the size."""
    if image.format in ("JPEG", "MPO"):
        # FF DA begins a scan and stands nowhere else among the compressed bytes.
        scans = content.count(b"\xff\xda")
        if scans * image.width * image.height > _MOST_SCANNED:
            raise RequestError(f"the JPEG of {image.width} x {image.height} pixels has {scans} scans; save it anew")
    elif getattr(image, "is_animated", False):  # in an MPO the first picture is the one, others are its preview
        raise RequestError(f"the {image.format} file holds several pictures; save the one that is meant")
    if image.format == "TIFF" and (kind := image.info.get("compression")) not in _TIFF_COMPRESSIONS:
        raise RequestError(f"a TIFF with compression {shown(kind)} is not read; save it as PNG")


def _white_is_zero(image: Image.Image) -> bool:
    """Whether a TIFF counts from white to black: Pillow turns that round for 8 bits, and not for 16."""
    tags = getattr(image, "tag_v2", {}) if image.format == "TIFF" else {}
    return bool(tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO)


def _raw_mode(image: Image.Image) -> object:
    """How the pixels of an opened file are stored; None where it is loaded already."""
    tiles = getattr(image, "tile", [])
    return tiles[0][3] if tiles else None
