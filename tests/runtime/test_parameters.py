"""The text that other programs note in a picture: what is taken of it, what is told, and what is refused."""

from __future__ import annotations

import io
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import ExifTags, Image
from PIL.PngImagePlugin import PngInfo

from tests.runtime.records import PROMPTS, record
from tgate_engine.errors import RequestError
from tgate_runtime import stamps
from tgate_runtime.parameters import Parameters, parse_parameters

TEXT = (
    "a castle, (oil painting:1.2),\nby night\nNegative prompt: blurry, low quality\nSteps: 30, Sampler: DPM++ 2M, "
    'Schedule type: Karras, CFG scale: 6.5, Seed: 1234567890, Size: 512x768, Model hash: 6ce0161689, Model: "v1, 5", '
    "Version: v1.10.1"
)
NOTED = Parameters(
    prompt="a castle, (oil painting:1.2),\nby night",
    negative_prompt="blurry, low quality",
    seed=1234567890,
    guidance_scale=6.5,
    size="512x768",
    left={
        "Steps": "30",
        "Sampler": "DPM++ 2M",
        "Schedule type": "Karras",
        "Model hash": "6ce0161689",
        "Model": "v1, 5",
        "Version": "v1.10.1",
    },
)


def parsed(text: str) -> Parameters:
    found = parse_parameters(text, "a.png")
    assert found is not None
    return found


def test_what_is_taken_and_what_is_left() -> None:
    assert parsed(TEXT) == parsed(f"\n{TEXT} \n") == NOTED
    assert NOTED.request() == {
        "prompt": NOTED.prompt,
        "negative_prompt": "blurry, low quality",
        "seed": 1234567890,
        "guidance_scale": 6.5,
        "size": "512x768",
    }


def test_what_it_does_not_say_is_not_asked_for() -> None:
    assert parsed("a\nSteps: 3").request() == {"prompt": "a"}
    assert parsed("Steps: 3, Seed: 0").request() == {"prompt": "", "seed": 0}
    assert parsed("a\nNegative prompt:\nSteps: 3").request() == {"prompt": "a", "negative_prompt": ""}
    assert parsed("a\nNegative prompt: b\nc\nSteps: 3").negative_prompt == "b\nc"


@pytest.mark.parametrize("prompt", [PROMPTS[name] for name in PROMPTS if name != "the form itself"])
def test_our_own_text_is_read_as_well(prompt: str) -> None:
    """All but the spaces around it, which the form does not keep."""
    of = record(prompt=prompt, negative_prompt="blue", seed=2**63 - 1)
    found = parsed(stamps.parameters(of))
    asked = {"prompt": prompt.strip(), "seed": of.seed, "guidance_scale": 4.5, "size": "128x96"}
    assert found.request() == {**asked, "negative_prompt": "blue"}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "\n",
        "a castle by night",
        "a castle\nSampler: Euler, Seed: 3",
        "a\nSteps: 3, and no pair",
        "a\nSteps: 3, Steps: 4",
        'a\nSteps: 3, Model: "\\x"',
        "a\n" + ", ".join(["Steps: 3", *(f"A{i}: 1" for i in range(256))]),
        "a\nSteps: 3\nand more",
    ],
)
def test_texts_that_are_something_else(text: str) -> None:
    assert parse_parameters(text, "a.png") is None


@pytest.mark.parametrize(
    ("pairs", "says"),
    [
        ("Seed: -1", f"have Seed: -1, expected a whole number from 0 to {2**63 - 1}; give the prompt yourself"),
        (f"Seed: {2**63}", "have Seed: "),
        ("Seed: 1e3", "have Seed: 1e3"),
        ("Seed: \u0663", "have Seed: "),
        ("CFG scale: nan", "have CFG scale: nan, expected a number"),
        ("CFG scale: 1e3", "have CFG scale: 1e3"),
        ("CFG scale: " + "9" * 400, "have CFG scale: 99"),
        ("Size: 512", "have Size: 512, expected WIDTHxHEIGHT"),
        ("Size: 0x512", "have Size: 0x512"),
        ("Denoising strength: 0.7", "another program with Denoising strength: 0.7, which no bundle does"),
        ("Hires upscale: 2", "another program with Hires upscale: 2"),
        ('ControlNet 0: "Module: canny, Model: x"', "another program with ControlNet 0: Module: canny"),
        ("Hires upscale: \x1b[2J" + "x" * 500, "another program with Hires upscale: "),
    ],
)
def test_numbers_that_mean_nothing_and_pictures_of_more_than_a_prompt(pairs: str, says: str) -> None:
    with pytest.raises(RequestError) as error:
        parse_parameters(f"a\nSteps: 3, {pairs}", "a.png")
    assert says in str(error.value)
    assert "a.png" in str(error.value)
    assert str(error.value).isprintable()
    assert len(str(error.value)) < 300


def saved(kind: str, text: str) -> bytes:
    """A picture as the web UI saves it."""
    content, picture, more = io.BytesIO(), Image.new("RGB", (8, 8)), dict[str, Any]()
    if kind == "PNG":
        more["pnginfo"] = PngInfo()
        more["pnginfo"].add_text("parameters", text)
    elif kind == "GIF":
        more["comment"] = text.encode()
    else:
        exif = Image.Exif()
        exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment] = b"UNICODE\0" + text.encode("utf-16-be")
        more["exif"] = exif
    picture.save(content, kind, **more)
    return content.getvalue()


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF"])
def test_pictures_of_another_program(kind: str) -> None:
    assert stamps.read_notes(saved(kind, TEXT), "a.png") == NOTED
    for read, content in ((stamps.read_stamp, saved(kind, TEXT)), (stamps.read_notes, saved(kind, "a holiday"))):
        with pytest.raises(RequestError, match=r"a\.png holds no record of what it was drawn from"):
            read(content, "a.png")


PIECES = st.sampled_from(
    [
        "Steps: 3",
        "Seed: 7",
        "Seed:",
        "Size: 8x8",
        "CFG scale: 1.5",
        "Negative prompt: ",
        "\n",
        ", ",
        ":",
        '"',
        "\\",
        "é",
    ]
)


@given(st.lists(PIECES | st.text(max_size=4), max_size=30).map("".join))
def test_whatever_it_says_is_another_text_or_a_line_or_a_request(text: str) -> None:
    try:
        found, said = parse_parameters(text, "a.png"), "a line"
    except RequestError as error:
        found, said = None, str(error)
    assert said.isprintable()
    if found is not None:
        assert "Steps" in found.left
        assert found.seed is None or 0 <= found.seed < 2**63
        assert found.prompt in text
