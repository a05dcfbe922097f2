"""The judge of the embedded models without PyTorch is the network that was trained."""

from __future__ import annotations

import random

import numpy as np
import torch

from tgate_runtime.tuning.accuracy import PAIRS
from tgate_runtime.tuning.judge import logits
from training import grammar
from training.classifier import load_classifier, to_input
from training.render import render


def test_it_is_the_network_that_was_trained() -> None:
    rng = random.Random(3)
    pictures = np.stack([render(grammar.draw_scene(rng)) for _ in range(24)])
    noise = np.random.default_rng(0).integers(0, 256, (4, 128, 128, 3), np.uint8)
    given = np.concatenate([pictures, noise])
    with torch.no_grad():
        trained = load_classifier()(to_input(given)).numpy()
    assert PAIRS == grammar.PAIRS  # in which order it speaks
    assert np.ptp(trained) > 20
    np.testing.assert_allclose(logits(given), trained, atol=2e-4)
