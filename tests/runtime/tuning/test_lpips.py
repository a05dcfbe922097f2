"""LPIPS over an AlexNet of random weights, against the library asked directly. What needs the library is skipped where
it is not installed: it brings torchvision along, which is built for one torch alone."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from tests.tiny_alexnet import SHAPES, alexnet
from tgate_engine.errors import RequestError
from tgate_runtime.tuning.lpips import LEAST_SIDE, lpips
from tgate_runtime.tuning.quality import psnr

PROMPTS = ["a large red circle", "a small blue square"]


def library() -> Any:
    return pytest.importorskip("lpips", exc_type=ImportError)


def pictures(count: int, *, seed: int, side: int = 48) -> list[Any]:
    coarse = np.random.default_rng(seed).integers(0, 256, (count, 6, 6, 3), np.uint8)
    return list(np.kron(coarse, np.ones((1, side // 6, side // 6, 1), np.uint8)))


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Read only."""
    place = tmp_path_factory.mktemp("alexnet") / "alexnet.pth"
    torch.save(alexnet(), place)
    return place


def distances(ours: list[Any], theirs: list[Any]) -> list[float]:
    """What the library itself says, one pair at a time, its trunk filled layer by layer."""
    model = library().LPIPS(net="alex", pnet_rand=True, verbose=False)
    layers = [layer for part in model.net.children() for layer in part if isinstance(layer, torch.nn.Conv2d)]
    for layer, place in zip(layers, SHAPES, strict=True):
        layer.weight.data = alexnet()[f"features.{place}.weight"]
        layer.bias.data = alexnet()[f"features.{place}.bias"]
    with torch.no_grad():
        pairs = zip(
            *([torch.tensor(each).permute(2, 0, 1)[None] / 255 for each in of] for of in (ours, theirs)), strict=True
        )
        return [float(model(*pair, normalize=True)) for pair in pairs]


def test_a_value_is_minus_the_librarys_distance(file: Path) -> None:
    library()
    ours, theirs = pictures(2, seed=1), pictures(2, seed=2)
    metric = lpips(file)
    told = metric.compare(ours, theirs, PROMPTS)
    expected = [-each for each in distances(ours, theirs)]
    np.testing.assert_allclose(told["lpips"], expected, rtol=1e-4)
    assert max(expected) < -0.05
    assert abs(expected[0] - expected[1]) > 0.001
    assert list(told["psnr"]) == [psnr(*pair) for pair in zip(ours, theirs, strict=True)]
    assert set(told) == {metric.name, *metric.beside}
    assert metric.compare(ours, ours, PROMPTS)["lpips"] == [0, 0]


def test_a_video_is_worth_what_its_frames_are_in_the_mean(file: Path) -> None:
    library()
    frames, others = pictures(20, seed=3), pictures(20, seed=4)
    told = lpips(file).compare([np.stack(frames)], [np.stack(others)], PROMPTS[:1])
    assert told["lpips"] == pytest.approx([-np.mean(distances(frames, others))], rel=1e-4)


def test_another_trunk_is_another_judge_whatever_its_file(file: Path, tmp_path: Path) -> None:
    library()
    save_file(alexnet(), tmp_path / "same.safetensors")
    save_file(alexnet(seed=1), tmp_path / "other.safetensors")
    assert (
        lpips(file).judge == lpips(tmp_path / "same.safetensors").judge != lpips(tmp_path / "other.safetensors").judge
    )


def test_what_is_no_alexnet_is_refused_in_one_line(file: Path, tmp_path: Path) -> None:
    library()

    def refused(place: Path) -> str:
        with pytest.raises(RequestError) as error:
            lpips(place)
        assert "\n" not in str(error.value)
        return str(error.value)

    place = tmp_path / "model.pth"
    assert "there is no file" in refused(place)
    place.write_bytes(b"nothing")
    assert "holds no weights that can be read" in refused(place)
    torch.save([1, 2], place)
    assert "holds no weights by their names" in refused(place)
    torch.save({name: value for name, value in alexnet().items() if "8" not in name}, place)
    assert "holds no AlexNet: it lacks features.8.weight" in refused(place)
    torch.save(alexnet() | {"features.3.weight": torch.zeros(128, 64, 3, 3)}, place)
    assert "its features.3.weight is (128, 64, 3, 3), not (192, 64, 5, 5)" in refused(place)
    with pytest.raises(RequestError, match=f"{LEAST_SIDE} pixels and more, these have 30x30; take psnr"):
        lpips(file).compare(pictures(1, seed=0, side=30), pictures(1, seed=0, side=30), PROMPTS[:1])
    small = [picture[:LEAST_SIDE, :LEAST_SIDE] for picture in pictures(1, seed=0)]
    assert lpips(file).compare(small, small, PROMPTS[:1])["lpips"] == [0]


def test_a_library_that_does_not_load_is_told_in_one_line(
    file: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As torchvision is that was built for another torch."""
    (tmp_path / "lpips.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')\n")
    monkeypatch.delitem(sys.modules, "lpips", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(RequestError, match=r"does not load \(operator torchvision::nms does not exist\); torch"):
        lpips(file)


@pytest.mark.parametrize("name", ["lpips", "torch"])
def test_what_is_not_installed_is_named(file: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    if name == "torch":
        library()
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ModuleNotFoundError) as missing:
        lpips(file)
    assert missing.value.name == name
