"""The judge's verdicts on renders of scenes that are known, and how many pictures a verdict takes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.toy_bundle import build
from tgate_engine.bundle import Bundle
from tgate_engine.errors import RequestError
from tgate_engine.manifest import MANIFEST_FILE, Manifest
from tgate_engine.manifest_json import parse_manifest
from tgate_runtime.mini import MODELS
from tgate_runtime.tuning import frechet
from tgate_runtime.tuning.accuracy import PAIRS, accuracy, least_images, named
from tgate_runtime.tuning.quality import psnr
from training import grammar
from training.evaluate import evaluation_captions, score_pictures
from training.grammar import named_pairs
from training.render import render


@pytest.fixture(scope="module")
def mini() -> Manifest:
    return parse_manifest((MODELS / "mini" / MANIFEST_FILE).read_bytes())


def scenes(count: int) -> list[tuple[str, grammar.Scene]]:
    return grammar.held_out_scenes(count, 5)


def test_captions_name_what_training_reads_of_them() -> None:
    for caption in evaluation_captions(200):
        assert [PAIRS[i] for i in named(caption)] == named_pairs(caption)


def test_a_picture_is_worth_what_its_verdict_is_less_that_on_the_ungated_one(mini: Manifest) -> None:
    (one, other), empty = scenes(2), np.full((128, 128, 3), 142, np.uint8)
    right, wrong = render(one[1]), render(other[1])
    metric = accuracy(mini, "128x128", [one[0]])
    assert metric.together is frechet.told
    told = metric.compare([right, empty, right, wrong], [right, right, empty, empty], [one[0]] * 4)
    assert told["accuracy"] == told["first_object"] == [0, -100, 100, 0]
    assert list(told["psnr"]) == [psnr(right, right), psnr(empty, right), psnr(right, empty), psnr(wrong, empty)]
    assert set(told) == {metric.name, *metric.beside}


def test_all_objects_and_the_first_one_are_told_apart(mini: Manifest) -> None:
    caption, scene = next(each for each in scenes(60) if len(each[1].items) == 2)
    whole, half = render(scene), render(replace(scene, items=scene.items[:1]))
    told = accuracy(mini, "128x128", [caption]).compare([half], [whole], [caption])
    assert (told["accuracy"], told["first_object"]) == ([-100], [0])


def test_shares_are_those_that_training_counts(mini: Manifest) -> None:
    chosen = scenes(40)
    captions = [caption for caption, _ in chosen]
    pictures = np.stack([render(scene) for _, scene in chosen])
    spoilt = np.concatenate([pictures[:20], pictures[:20][::-1]])
    told = accuracy(mini, "128x128", captions).compare(list(spoilt), list(pictures), captions)
    before, after = score_pictures(captions, pictures), score_pictures(captions, spoilt)
    assert before.all_objects > 0.9 > after.all_objects
    assert np.mean(told["accuracy"]) == pytest.approx(100 * (after.all_objects - before.all_objects), abs=0.01)
    assert np.mean(told["right"]) == pytest.approx(100 * after.all_objects, abs=0.01)
    assert np.mean(told["ungated_right"]) == pytest.approx(100 * before.all_objects, abs=0.01)
    assert np.mean(told["first_object"]) == pytest.approx(100 * (after.first_object - before.first_object), abs=0.01)


def test_what_cannot_be_judged_is_refused(mini: Manifest, tmp_path: Path) -> None:
    toy = Bundle.open(build(tmp_path / "toy", goldens=False)).manifest
    with pytest.raises(RequestError, match="the bundle is of toy; take psnr, ssim or clip"):
        accuracy(toy, "128x128", ["a red circle"])
    with pytest.raises(RequestError, match="knows pictures of 128x128, not of 64x64"):
        accuracy(mini, "64x64", ["a red circle"])
    with pytest.raises(RequestError, match='a prompt names none: "a red castle"'):
        accuracy(mini, "128x128", ["a red circle", "a red castle"])


@pytest.mark.parametrize("points", [-0.5, -1.0, -3.0, -40.0])
def test_so_few_pictures_of_which_none_is_worse_prove_a_loss_to_be_small(points: float) -> None:
    images, rng = least_images(points), np.random.default_rng(1)
    for count, seldom in ((images, True), (images * 2 // 3, False)):
        lost = rng.binomial(count, -points / 100, 40_000)
        assert bool(np.mean(lost == 0) < 0.03) is seldom  # how often such a loss stays unseen
    assert (1 + points / 100) ** (images - 1) > 0.025
