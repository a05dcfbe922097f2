"""``tgate adapt``, and what ``tgate generate`` and ``tgate inspect`` make of adapters, on the bundle that ships."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import load_file, save_file

from tests.cli.running import Run, fails
from tgate_engine.bundle import Bundle
from tgate_export.families import location


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of all queries of ``mini-pixart``'s transformer."""
    path = tmp_path_factory.mktemp("lora") / "style.v1.safetensors"
    weights = load_file(Path(location("mini-pixart")) / "transformer" / "diffusion_pytorch_model.safetensors")
    torch.manual_seed(0)
    tensors = {}
    for name, weight in weights.items():
        if name.endswith("to_q.weight"):
            layer, (outputs, inputs) = name.removesuffix(".weight"), weight.shape
            tensors[f"transformer.{layer}.lora_A.weight"] = torch.randn(4, inputs) / inputs**0.5
            tensors[f"transformer.{layer}.lora_B.weight"] = torch.randn(outputs, 4) * 0.2
    save_file(tensors, path)
    return path


@pytest.fixture
def bundle(shipped_bundle: Path, tmp_path: Path) -> Path:
    return shutil.copytree(shipped_bundle, tmp_path / "bundle")


def draw(run: Run, bundle: Path, name: str, *more: object) -> NDArray[np.uint8]:
    path = bundle.parent / name
    status, _, err = run("generate", bundle, "a green star", "--seed", 1, "--output", path, "--quiet", *more)
    assert (status, err) == (0, "")
    with Image.open(path) as image:
        return np.asarray(image)


def test_a_lora_is_kept_named_drawn_with_and_taken_out(run: Run, bundle: Path, lora: Path) -> None:
    before = (bundle / "manifest.json").read_bytes()
    status, out, _ = run("adapt", bundle, lora)
    assert status == 0
    layers = Bundle.open(bundle).manifest.adapters["style.v1"].layers
    assert out.startswith(f"{bundle}: adapter style.v1, {layers} layers of transformer, rank 4, ")
    status, out, _ = run("adapt", bundle, lora, "--name", "other", "--json")
    told = json.loads(out)
    assert (told["name"], told["layers"], told["rank"], told["left"]) == ("other", {"transformer": layers}, 4, [])
    assert f"adapter style.v1: {layers} layers, rank 4, " in run("inspect", bundle)[1]
    assert json.loads(run("inspect", bundle, "--json")[1])["adapters"]["other"]["rank"] == 4
    fails(run("adapt", bundle, lora, "--quiet"), "already has an adapter 'style.v1'; use another --name, or --force")
    assert run("adapt", bundle, lora, "--force", "--quiet")[0] == 0

    plain = draw(run, bundle, "plain.png")
    half = draw(run, bundle, "half.png", "--lora", "style.v1:0.5")
    assert not np.array_equal(plain, half)
    both = draw(run, bundle, "both.png", "--lora", "style.v1:0.25", "--lora", "other:0.25")
    assert np.abs(both.astype(int) - half).max() <= 1, "two quarters of one change"
    again = bundle.parent / "again.png"
    status, _, err = run("generate", bundle, "--from", bundle.parent / "half.png", "--output", again)
    assert status == 0
    assert "this is not how" not in err
    with Image.open(again) as image:
        assert np.array_equal(np.asarray(image), half)
    scaled = run("generate", bundle, "--from", bundle.parent / "half.png", "--lora", "style.v1", "--output", again)
    assert "adapter style.v1 1 of " in scaled[2]

    assert run("adapt", bundle, "--remove", "other", "--remove", "style.v1", "--quiet")[0] == 0
    assert (bundle / "manifest.json").read_bytes() == before
    assert not any((bundle / "adapters").iterdir())
    fails(
        run("generate", bundle, "--from", bundle.parent / "half.png", "--output", again),
        "the bundle has no adapter 'style.v1'; it has none; `tgate adapt` adds one",
    )
    assert np.array_equal(draw(run, bundle, "plain.png"), plain)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((), "required: LORA; or --remove NAME"),
        (("--remove", "a", "--name", "b"), "--remove takes adapters out and adds none; leave out --name"),
        (("x.safetensors", "--remove", "a"), "leave out LORA"),
        (("--force", "--remove", "a"), "leave out --force"),
        (("x.safetensors", "--name", "a b"), "an adapter's name is 1 to 64 letters"),
    ],
)
def test_command_lines_that_are_wrong(run: Run, good: Path, arguments: tuple[str, ...], says: str) -> None:
    fails(run("adapt", good, *arguments), says, status=2)


def test_files_that_are_none(run: Run, bundle: Path, tmp_path: Path) -> None:
    fails(run("adapt", bundle, tmp_path / "none.safetensors", "--quiet"), "none.safetensors does not exist")
    odd = tmp_path / "odd.safetensors"
    odd.write_bytes(b"x" * 100)
    fails(run("adapt", bundle, odd, "--quiet"), "odd.safetensors")
    fails(run("adapt", tmp_path / "nothing", odd, "--quiet"), "nothing is not a bundle")
    fails(run("adapt", bundle, "--remove", "a", "--quiet"), "has no adapter 'a'; it has none")


@pytest.mark.parametrize(
    ("loras", "says", "status"),
    [
        (("a:1", "a:2"), "--lora a is there 2 times; give one scale", 2),
        (("a:much",), "expected a finite number, got 'much'", 2),
        (("a:nan",), "expected a finite number, got 'nan'", 2),
        (("a b",), "an adapter's name is 1 to 64 letters", 2),
        (("a:1",), "the bundle has no adapter 'a'; it has none; `tgate adapt` adds one", 1),
    ],
)
def test_loras_that_are_none(run: Run, good: Path, loras: tuple[str, ...], says: str, status: int) -> None:
    options = [option for lora in loras for option in ("--lora", lora)]
    fails(run("generate", good, "a red fox", *options, "--quiet"), says, status=status)
    assert not list(Path.cwd().glob("toy-*"))
