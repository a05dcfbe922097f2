"""The data of the embedded model, and the judge of its pictures."""

from __future__ import annotations

import random

import numpy as np

from training.classifier import held_out_accuracy, load_classifier
from training.evaluate import evaluation_captions, named_pairs
from training.grammar import draw_scene, is_held_out, training_caption, write_caption
from training.render import render


def test_the_judge_is_right_on_renders_it_never_saw() -> None:
    """Above 98 %, on questions that are half positive, half near misses."""
    shares = held_out_accuracy(load_classifier(), count=300)
    assert min(shares.values()) > 0.98, shares


def test_training_never_sees_an_evaluation_caption() -> None:
    captions = evaluation_captions(500)
    assert len(set(captions)) == 500
    assert all(is_held_out(caption) for caption in captions)
    rng = random.Random(3)
    assert not any(is_held_out(training_caption(draw_scene(rng), rng)) for _ in range(3000))


def test_a_caption_names_what_the_scene_holds() -> None:
    rng = random.Random(5)
    for _ in range(200):
        scene = draw_scene(rng)
        held = [(item.colour, item.shape) for item in scene.items]
        assert named_pairs(write_caption(scene, rng)) == held


def test_a_scene_is_always_drawn_alike() -> None:
    scene = draw_scene(random.Random(9))
    picture = render(scene)
    assert picture.shape == (128, 128, 3)
    assert picture.dtype == np.uint8
    np.testing.assert_array_equal(picture, render(scene))
