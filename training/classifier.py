"""The judge: a small network that says which (colour, shape) pairs a picture shows, trained on renders alone."""

from __future__ import annotations

import argparse
import random
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional

from tgate_runtime.tuning.judge import WEIGHTS
from training.grammar import COLOURS, PAIR_INDEX, PAIRS, SHAPES, Scene, draw_scene
from training.render import render
from training.settings import SETTINGS


class PairClassifier(nn.Module):
    """Images float [B, 3, 128, 128] in [-1, 1] to logits [B, 42] of the pairs in `PAIRS`.

    A convolutional trunk scores every pair at each of 16x16 places; the logit of a pair is its best place,
    so a colour and a shape count only where they coincide.
    """

    def __init__(self, width: int = 32) -> None:
        super().__init__()

        def stage(source: int, target: int, stride: int) -> list[nn.Module]:
            return [nn.Conv2d(source, target, 3, stride, 1, bias=False), nn.BatchNorm2d(target), nn.ReLU()]

        self.trunk = nn.Sequential(
            *stage(3, width // 2, 2),
            *stage(width // 2, width, 2),
            *stage(width, width, 1),
            *stage(width, 2 * width, 2),
            *stage(2 * width, 2 * width, 1),
            *stage(2 * width, 2 * width, 1),
            nn.Conv2d(2 * width, 2 * width, 3, 1, 2, dilation=2),
            nn.ReLU(),
        )
        self.places = nn.Conv2d(2 * width, len(PAIRS), 1)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        scores: torch.Tensor = self.places(self.trunk(images))
        return scores.flatten(2).amax(dim=2)


def labels(scenes: list[Scene]) -> torch.Tensor:
    """float [B, 42]: 1 where the scene shows the pair."""
    target = torch.zeros(len(scenes), len(PAIRS))
    for row, scene in enumerate(scenes):
        for item in scene.items:
            target[row, PAIR_INDEX[item.colour, item.shape]] = 1.0
    return target


def to_input(images: np.ndarray) -> torch.Tensor:
    """uint8 [B, 128, 128, 3] to float [B, 3, 128, 128] in [-1, 1]."""
    return torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).float().div(127.5).sub(1.0)


def _degrade(images: torch.Tensor, rng: random.Random) -> torch.Tensor:
    """Half of the batches lightly blurred and noised, so that soft edges do not decide the verdict."""
    if rng.random() < 0.5:
        return images
    if rng.random() < 0.7:
        images = functional.avg_pool2d(functional.pad(images, (1, 1, 1, 1), mode="replicate"), 3, 1)
    return images + torch.randn_like(images) * rng.uniform(0.0, 0.08)


@torch.no_grad()
def presence(classifier: PairClassifier, images: np.ndarray, batch: int = 50) -> torch.Tensor:
    """Probabilities [N, 42] that each pair is present in uint8 images [N, 128, 128, 3]."""
    classifier.eval()
    parts = [classifier(to_input(images[i : i + batch])).sigmoid() for i in range(0, len(images), batch)]
    return torch.cat(parts)


def held_out_accuracy(classifier: PairClassifier, count: int = 1000, seed: int = 7) -> dict[str, float]:
    """Accuracy of "is this pair present (> 0.5)?" on `count` unseen renders, with balanced questions.

    Every render is asked about its first item and about one absent pair, alternately the same colour
    in another shape and the same shape in another colour.
    """
    rng = random.Random(f"judge-held-out-{seed}")
    scenes = [draw_scene(rng) for _ in range(count)]
    probabilities = presence(classifier, np.stack([render(scene) for scene in scenes]))
    present = absent = 0
    for row, scene in enumerate(scenes):
        item, shown = scene.items[0], {(item.colour, item.shape) for item in scene.items}
        same_colour = [(item.colour, shape) for shape in SHAPES if (item.colour, shape) not in shown]
        same_shape = [(colour, item.shape) for colour in COLOURS if (colour, item.shape) not in shown]
        present += int(probabilities[row, PAIR_INDEX[item.colour, item.shape]] > 0.5)
        other = rng.choice(same_colour if row % 2 else same_shape)
        absent += int(probabilities[row, PAIR_INDEX[other]] <= 0.5)
    return {
        "renders": count,
        "present_recognised": present / count,
        "absent_rejected": absent / count,
        "accuracy": (present + absent) / (2 * count),
    }


def load_classifier(path: Path = WEIGHTS) -> PairClassifier:
    """The trained judge, in float32; its weights are stored as float16."""
    classifier = PairClassifier()
    classifier.load_state_dict({name: value.float() for name, value in load_file(path).items()}, strict=False)
    return classifier.eval()


def train(steps: int, batch: int, seed: int) -> PairClassifier:
    torch.manual_seed(seed)
    rng = random.Random(f"judge-{seed}")
    classifier = PairClassifier()
    nn.init.constant_(classifier.places.bias, -4.0)
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=3e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=4e-3, total_steps=steps)
    for step in range(steps):
        scenes = [draw_scene(rng) for _ in range(batch)]
        images = _degrade(to_input(np.stack([render(scene) for scene in scenes])), rng)
        loss = functional.binary_cross_entropy_with_logits(classifier(images), labels(scenes)) * len(PAIRS)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 100 == 0:
            print(f"step {step}, loss {loss.item():.4f}", flush=True)
    return classifier.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=900)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--out", type=Path, default=WEIGHTS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    classifier = train(arguments.steps, arguments.batch, SETTINGS.seed)
    state = {k: v.half().contiguous() for k, v in classifier.state_dict().items() if v.is_floating_point()}
    save_file(state, arguments.out)
    print(held_out_accuracy(load_classifier(arguments.out)))


if __name__ == "__main__":
    main()
