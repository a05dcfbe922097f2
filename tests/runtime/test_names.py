"""Diffusers' names get an answer, and what is an argument here is passed on."""

from __future__ import annotations

import inspect
import random

import pytest

from tgate_engine.errors import RequestError
from tgate_runtime.generators import check_generator
from tgate_runtime.names import INSTEAD, with_hints
from tgate_runtime.pipeline import Pipeline


@with_hints
def draw(prompt: str, *, size: str | None = None) -> tuple[str, str | None]:
    return prompt, size


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("num_inference_steps", "tgate plan"),
        ("height", 'size="WIDTHxHEIGHT"'),
        ("width", 'size="WIDTHxHEIGHT"'),
        ("num_images_per_prompt", "num_images=N"),
        ("callback_on_step_end", "on_step=F"),
        ("output_type", "latents"),
        ("latents", "initial_latents=X"),
    ],
)
def test_a_name_of_diffusers_says_what_to_give_instead(name: str, says: str) -> None:
    with pytest.raises(TypeError, match=rf"^a pipeline takes no {name}; ") as error:
        draw("a", **{name: "1"})
    assert says in str(error.value)
    assert "\n" not in str(error.value)


def test_other_calls_are_as_they_were() -> None:
    assert draw("a", size="4x4") == ("a", "4x4")
    with pytest.raises(TypeError, match=r"^a pipeline takes no colour$"):
        draw("a", colour=1)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="missing 1 required"):
        draw()  # type: ignore[call-arg]


def test_what_is_named_instead_is_an_argument() -> None:
    """A hint names what a call has, and stands for what it has not."""
    arguments = inspect.signature(Pipeline.__call__).parameters
    assert not INSTEAD.keys() & arguments.keys()
    named = {text.partition("=")[0] for text in INSTEAD.values() if "=" in text.split()[0]}
    assert {"num_images", "initial_latents", "on_step", "size"} <= named
    assert named <= arguments.keys()


def test_a_generator_object_points_to_seeds() -> None:
    with pytest.raises(RequestError, match=r"use one of numpy, torch-cuda; seed=S, or a list of seeds"):
        check_generator(random.Random(0))
