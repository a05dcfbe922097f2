"""How far pictures look from the ungated ones, by LPIPS (arXiv 1801.03924): its authors' library over an AlexNet of
yours."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tgate_engine.errors import RequestError, shown
from tgate_runtime.tuning.quality import Metric, Pixels, psnr
from tgate_runtime.tuning.weights import digest_of, tensors_of

LEAST_SIDE = 31
"""Pixels: of a smaller picture AlexNet's last layers have nothing left."""
_BATCH = 8


def lpips(file: Path) -> Metric:
    """The metric "lpips": minus LPIPS' distance of each picture to the ungated one, 0 for equal ones; of a video, its
    frames' mean. "psnr" is told beside it.

    ``file``: the weights of AlexNet on ImageNet as torchvision names them, .pth or .safetensors. Those of LPIPS' own
    layers come with the library; nothing is fetched, and no code in a file is run. Raises :class:`RequestError` in one
    line for a file that holds none and where a library does not load, and ModuleNotFoundError where one is not
    installed. Comparing raises :class:`RequestError` for pictures below :data:`LEAST_SIDE`.
    """
    try:
        import lpips as library
        import torch
    except ModuleNotFoundError:
        raise
    except (ImportError, OSError, RuntimeError) as error:  # a torchvision that was built for another torch
        raise RequestError(
            f"the library lpips does not load ({shown(error, 200)}); torchvision is to be the one of this torch"
        ) from None
    if not file.is_file():
        raise RequestError(f"there is no file {file} with the weights of an AlexNet; give --lpips-model one")
    weights = tensors_of(file)
    # Its trunk is drawn at random and replaced at once: asked for its own, it would fetch it.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of how it asks torchvision
        model = library.LPIPS(net="alex", pnet_rand=True, verbose=False)
    own = model.net.state_dict()  # slice1.0.weight is features.0.weight, and so on
    names = {name: f"features.{name.partition('.')[2]}" for name in own}
    for name, theirs in names.items():
        if theirs not in weights:
            raise RequestError(f"{file} holds no AlexNet: it lacks {theirs}; give --lpips-model torchvision's")
        got, wanted = tuple(weights[theirs].shape), tuple(own[name].shape)
        if got != wanted:
            raise RequestError(
                f"{file} holds another network than AlexNet: its {theirs} is {got}, not {wanted}; give --lpips-model "
                "torchvision's"
            )
    model.net.load_state_dict({name: weights[theirs].float() for name, theirs in names.items()})
    model.eval()

    def distance(picture: Pixels, reference: Pixels) -> float:
        height, width = picture.shape[-3:-1]
        if min(height, width) < LEAST_SIDE:
            raise RequestError(
                f"lpips looks at pictures of {LEAST_SIDE} pixels and more, these have {width}x{height}; take psnr"
            )
        ours, theirs = (each.reshape(-1, height, width, 3) for each in (picture, reference))
        found: list[float] = []
        with torch.inference_mode():
            for first in range(0, len(ours), _BATCH):
                rows = slice(first, first + _BATCH)
                found += model(_tensor(ours[rows]), _tensor(theirs[rows])).flatten().tolist()
        return float(np.mean(found))

    def compare(
        pictures: Sequence[Pixels], references: Sequence[Pixels], _prompts: Sequence[str]
    ) -> dict[str, list[float]]:
        pairs = list(zip(pictures, references, strict=True))
        return {"lpips": [-distance(*pair) for pair in pairs], "psnr": [psnr(*pair) for pair in pairs]}

    return Metric(name="lpips", compare=compare, beside=("psnr",), judge=digest_of(model.state_dict()))


def _tensor(pictures: Pixels) -> Any:
    """[N, H, W, 3] of 0 to 255 as [N, 3, H, W] of -1 to 1."""
    import torch

    return torch.from_numpy(np.ascontiguousarray(pictures.transpose(0, 3, 1, 2))).float() / 127.5 - 1
