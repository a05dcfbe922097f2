"""What ImageReward's authors' own package says of the small models of ``tiny_reward``; writes data/image_reward.json.

    python -m tests.oracle_reward

In an environment of its own: image-reward 1.5 asks transformers for what release 5 no longer has. That of the file had
transformers 4.46.3, torchvision, timm 0.6.13, fairscale 0.4.13, pytest and, without what it brings along, image-reward.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import json
import sys
import tempfile
import types
from pathlib import Path

import pytest
import torch
from PIL import Image

from tests.tiny_reward import PROMPTS, SEEDS, TINY, Tiny, pictures, save_reward, weights

FILE = Path(__file__).parent / "data" / "image_reward.json"
VERSIONS = ("image-reward", "transformers", "timm", "torch", "torchvision", "pillow")


def main() -> None:
    """Score each picture by its prompt, one at a time, as the package's users do."""
    spec = importlib.util.find_spec("ImageReward")
    root = Path(spec.origin or "").parent if spec is not None else Path("nowhere: pip install image-reward")
    for package in ("ImageReward", "ImageReward.models"):  # whose own __init__ would want what only training needs
        empty = types.ModuleType(package)
        empty.__path__ = [str(root.joinpath(*package.split(".")[1:]))]
        sys.modules[package] = empty
    scores = {name: _scores(tiny) for name, tiny in TINY.items()}
    versions = {name: importlib.metadata.version(name) for name in VERSIONS}
    FILE.write_text(json.dumps({"versions": versions, "scores": scores}, indent=1) + "\n")


def _scores(tiny: Tiny) -> list[list[float]]:
    """For each of :data:`SEEDS`, each prompt's; by their classes at our sizes, with their preprocessing, tokenizer and
    forward pass."""
    theirs = importlib.import_module("ImageReward.ImageReward")
    blip = importlib.import_module("ImageReward.models.BLIP.blip")
    pretrain = importlib.import_module("ImageReward.models.BLIP.blip_pretrain")
    vit = importlib.import_module("ImageReward.models.BLIP.vit")
    sizes = {"img_size": tiny.side, "patch_size": tiny.patch, "depth": tiny.blocks, "num_heads": tiny.heads}
    eye = vit.VisionTransformer(embed_dim=tiny.width, drop_path_rate=0.1, **sizes)
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as instead:
        place = save_reward(Path(folder), tiny)
        fetched = blip.BertTokenizer.from_pretrained
        instead.setattr(blip.BertTokenizer, "from_pretrained", lambda _: fetched(place))
        instead.setattr(pretrain, "create_vit", lambda *_: (eye, tiny.width))
        model = theirs.ImageReward(med_config=str(place / "med_config.json"))
    model.mlp, model.preprocess = theirs.MLP(tiny.text_width), theirs._transform(tiny.side)
    model.load_state_dict(weights(tiny), strict=True)
    model.eval()
    with torch.no_grad():
        drawn = [zip(PROMPTS, pictures(seed), strict=True) for seed in SEEDS]
        return [[model.score(prompt, Image.fromarray(picture)) for prompt, picture in pairs] for pairs in drawn]


if __name__ == "__main__":
    main()
