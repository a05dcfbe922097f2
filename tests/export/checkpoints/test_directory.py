"""Directories in halves, in shards, in the hub's cache: read as diffusers' own loader reads them, or refused.

What is refused is refused in one line that names the file, and a pickle is never opened.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.export.checkpoints.copies import (
    DIFFUSERS,
    MODELS,
    PIXART,
    SD,
    TRANSFORMERS,
    Copy,
    Tensors,
    copy,
    job,
    read,
    refused,
    same,
    whole,
)
from tests.hub import cached
from tests.tiny_families import FAMILY_VARIANTS, load_tiny
from tgate_cli.main import export_main
from tgate_engine.errors import ExportError

__all__ = ["copy", "whole"]  # fixtures


# --- pickles ------------------------------------------------------------------------------------


class Trap:
    """Whoever unpickles it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.touch, (self.path,))


def trap(file: Path, sprung: Path) -> None:
    torch.save({"conv_in.weight": Trap(sprung)}, file)


def test_the_trap_works(tmp_path: Path) -> None:
    trap(tmp_path / "weights.bin", tmp_path / "sprung")
    torch.load(tmp_path / "weights.bin", weights_only=False)
    assert (tmp_path / "sprung").exists()


@pytest.mark.parametrize(
    ("component", "name"),
    [
        ("unet", "diffusion_pytorch_model.bin"),
        ("unet", "diffusion_pytorch_model.fp16.bin"),
        ("vae", "diffusion_pytorch_model.bin"),
        ("text_encoder", "pytorch_model.bin"),
        ("text_encoder", "pytorch_model-00001-of-00002.bin"),
        ("unet", "diffusion_pytorch_model.safetensors"),
        ("text_encoder", "model.safetensors"),
        ("unet", "model.ckpt"),
        ("unet", "model.pt"),
    ],
)
def test_a_pickle_is_refused_and_never_opened(
    copy: Copy, tmp_path: Path, capsys: pytest.CaptureFixture[str], component: str, name: str
) -> None:
    """Whatever it is called, and one that calls itself safetensors as well."""
    directory, sprung = copy(SD), tmp_path / "sprung"
    for file in (directory / component).glob("*.safetensors"):
        file.unlink()
    trap(directory / component / name, sprung)
    arguments = ["--model", MODELS[SD], "--checkpoint", str(directory), "--output", str(tmp_path / "bundle")]
    capsys.readouterr()
    assert export_main([*arguments, "--height", "64", "--width", "64", "--quiet"]) == 1
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("tgate-export: error: ")
    assert str(directory / component) in lines[0]
    assert "safetensors" in lines[0]
    assert name in lines[0] or not name.endswith(".bin")
    assert not sprung.exists()
    assert not (tmp_path / "bundle").exists()


def test_a_pickle_beside_the_weights_is_left_alone(whole: Copy, copy: Copy, tmp_path: Path) -> None:
    directory, sprung = copy(SD), tmp_path / "sprung"
    for component in ("unet", "vae"):
        trap(directory / component / "diffusion_pytorch_model.bin", sprung)
    trap(directory / "text_encoder" / "pytorch_model.bin", sprung)
    for component in ("unet", "vae", "text_encoder"):
        same(read(directory, SD, component), read(whole(SD), SD, component))
    job(directory, SD)
    assert not sprung.exists()


def test_an_index_that_names_a_pickle(copy: Copy, tmp_path: Path) -> None:
    directory, sprung = copy(SD), tmp_path / "sprung"
    keys = load_file(directory / "unet" / f"{DIFFUSERS}.safetensors").keys()
    (directory / "unet" / f"{DIFFUSERS}.safetensors").unlink()
    trap(directory / "unet" / "part.bin", sprung)
    index = {"metadata": {}, "weight_map": dict.fromkeys(keys, "part.bin")}
    (directory / "unet" / f"{DIFFUSERS}.safetensors.index.json").write_text(json.dumps(index))
    assert "part.bin" in refused(directory, SD)
    assert not sprung.exists()


# --- halves -------------------------------------------------------------------------------------


def halves(folder: Path, stem: str = DIFFUSERS, *, alone: bool) -> Tensors:
    """Write the fp16 file of a component: other values than the full file's, so that they can be told apart."""
    tensors = load_file(folder / f"{stem}.safetensors")
    found = {name: (value * 0.5).half() if value.is_floating_point() else value for name, value in tensors.items()}
    save_file(found, folder / f"{stem}.fp16.safetensors", {"format": "pt"})
    if alone:
        (folder / f"{stem}.safetensors").unlink()
    return found


@pytest.mark.parametrize("prefer_half", [False, True], ids=["fp32", "fp16"])
@pytest.mark.parametrize("alone", [False, True], ids=["both", "alone"])
def test_the_fp16_variant(whole: Copy, copy: Copy, alone: bool, prefer_half: bool) -> None:
    """Read where it is wanted, or where there is nothing else."""
    directory = copy(SD)
    for component, stem in (("unet", DIFFUSERS), ("vae", DIFFUSERS), ("text_encoder", TRANSFORMERS)):
        halves(directory / component, stem, alone=alone)
    variant = "fp16" if prefer_half or alone else None
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(directory, variant=variant, dtype=torch.float32)
    for component in ("unet", "vae", "text_encoder"):
        got = read(directory, SD, component, prefer_half=prefer_half)
        same(got, getattr(pipe, component).state_dict())
        full = read(whole(SD), SD, component)
        assert any(not torch.equal(got[name], full[name]) for name in full) is (variant == "fp16")


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_the_dtype_of_an_export_chooses(copy: Copy, dtype: str) -> None:
    directory = copy(SD)
    half = halves(directory / "unet", alone=False)["conv_in.weight"]
    got = job(directory, SD, dtype=dtype).checkpoint.tensors("unet").read("conv_in.weight")
    if dtype == "fp32":
        assert got.dtype == torch.float32
        assert not torch.equal(got.half(), half)
    else:
        assert torch.equal(got, half)


@pytest.mark.parametrize("name", ["index.fp16.json", "fp16.index.json"])
@pytest.mark.parametrize("component", ["unet", "text_encoder"])
def test_shards_of_halves_under_both_names_of_their_index(copy: Copy, component: str, name: str) -> None:
    """Written by diffusers and transformers themselves, whose name for the index changed and changed back."""
    directory = copy(SD)
    module = getattr(load_tiny(directory, SD), component).half()
    stem = DIFFUSERS if component == "unet" else TRANSFORMERS
    shutil.rmtree(directory / component)
    module.save_pretrained(directory / component, variant="fp16", max_shard_size="30KB")
    (written,) = (directory / component).glob("*.index*.json")
    wanted = f"{stem}.safetensors.{name}" if name.startswith("index") else f"{stem}.fp16.safetensors.index.json"
    written.rename(directory / component / wanted)
    assert len(list((directory / component).glob("*.safetensors"))) > 1
    for prefer_half in (False, True):
        same(read(directory, SD, component, prefer_half=prefer_half), module.float().state_dict())


def test_weights_without_moving_averages_are_left_alone(whole: Copy, copy: Copy) -> None:
    """Stable Diffusion 1.5 has them beside its own, under names that look like a variant's."""
    directory = copy(SD)
    tensors = load_file(directory / "unet" / f"{DIFFUSERS}.safetensors")
    save_file(
        {name: value * 2 for name, value in tensors.items()}, directory / "unet" / f"{DIFFUSERS}.non_ema.safetensors"
    )
    for prefer_half in (False, True):
        same(read(directory, SD, "unet", prefer_half=prefer_half), read(whole(SD), SD, "unet"))
    (directory / "unet" / f"{DIFFUSERS}.safetensors").unlink()
    assert "no safetensors weights" in refused(directory, SD)


# --- shards -------------------------------------------------------------------------------------


def sharded(directory: Path) -> dict[str, Any]:
    """Cut the U-Net into shards, by diffusers. Gives their index."""
    unet = load_tiny(directory, SD).unet
    shutil.rmtree(directory / "unet")
    unet.save_pretrained(directory / "unet", max_shard_size="200KB")
    index: dict[str, Any] = json.loads(index_of(directory).read_text())
    assert len(set(index["weight_map"].values())) > 1
    return index


def index_of(directory: Path) -> Path:
    return directory / "unet" / f"{DIFFUSERS}.safetensors.index.json"


def test_shards_are_read(whole: Copy, copy: Copy) -> None:
    directory = copy(SD)
    sharded(directory)
    same(read(directory, SD, "unet"), read(whole(SD), SD, "unet"))
    same(read(directory, SD, "unet"), load_tiny(directory, SD).unet.state_dict())


def test_a_shard_that_is_missing(copy: Copy) -> None:
    directory = copy(SD)
    name = sorted(set(sharded(directory)["weight_map"].values()))[1]
    (directory / "unet" / name).unlink()
    assert name in refused(directory, SD)


def test_a_shard_that_is_cut_off(copy: Copy) -> None:
    directory = copy(SD)
    name = sorted(set(sharded(directory)["weight_map"].values()))[1]
    path = directory / "unet" / name
    path.write_bytes(path.read_bytes()[:-100])
    assert name in refused(directory, SD)


@pytest.mark.parametrize("place", ["../vae/{}", "{root}/vae/{}", "../../{}", "sub/{}"])
def test_an_index_that_names_another_directory(copy: Copy, place: str) -> None:
    """Even where a file of that name lies there."""
    directory = copy(SD)
    index = sharded(directory)
    name = sorted(set(index["weight_map"].values()))[0]
    there = place.format(name, root=directory)
    (directory / "unet" / "sub").mkdir()
    shutil.move(directory / "unet" / name, directory / "unet" / there)
    index["weight_map"] = {key: there if file == name else file for key, file in index["weight_map"].items()}
    index_of(directory).write_text(json.dumps(index))
    assert there in refused(directory, SD)


def test_one_tensor_in_two_shards(copy: Copy) -> None:
    """Which of them counts nothing says, and they may differ."""
    directory = copy(SD)
    first, second = sorted(set(sharded(directory)["weight_map"].values()))[:2]
    tensors = load_file(directory / "unet" / first)
    key = sorted(tensors)[0]
    other = load_file(directory / "unet" / second) | {key: tensors[key] + 1}
    save_file(other, directory / "unet" / second)
    line = refused(directory, SD)
    assert key in line
    assert first in line or second in line


@pytest.mark.parametrize(
    "content",
    ["{", "[]", "{}", '{"weight_map": {}}', '{"weight_map": []}', '{"weight_map": {"a": 1}}', '{"weight_map": null}'],
)
def test_an_index_that_is_none(copy: Copy, content: str) -> None:
    directory = copy(SD)
    sharded(directory)
    index_of(directory).write_text(content)
    assert str(index_of(directory)) in refused(directory, SD)


def test_a_tensor_that_no_shard_has(copy: Copy) -> None:
    """The index promises it."""
    directory = copy(SD)
    index = sharded(directory)
    name = index["weight_map"]["conv_in.weight"]
    tensors = load_file(directory / "unet" / name)
    del tensors["conv_in.weight"]
    save_file(tensors, directory / "unet" / name)
    with pytest.raises(ExportError, match=r"conv_in\.weight") as caught:
        read(directory, SD, "unet")
    assert "\n" not in str(caught.value)


# --- the hub's cache ----------------------------------------------------------------------------


def test_a_snapshot_of_links(whole: Copy, tmp_path: Path) -> None:
    """Given by its path, as ``huggingface-cli download`` prints it."""
    snapshot = cached(tmp_path, "owner/name", whole(SD))
    links = [path for path in snapshot.rglob("*") if path.is_symlink()]
    assert len(links) > 8
    assert not any(os.path.isabs(os.readlink(link)) for link in links)
    for component in ("unet", "vae", "text_encoder"):
        same(read(snapshot, SD, component), read(whole(SD), SD, component))
    made, want = job(snapshot, SD), job(whole(SD), SD)
    assert (made.conditioning, made.latents, made.sampler) == (want.conditioning, want.latents, want.sampler)


def test_shards_in_a_snapshot_of_links(whole: Copy, copy: Copy, tmp_path: Path) -> None:
    directory = copy(SD)
    sharded(directory)
    snapshot = cached(tmp_path, "owner/name", directory)
    same(read(snapshot, SD, "unet"), read(whole(SD), SD, "unet"))


LINKS = (
    "unet/diffusion_pytorch_model.safetensors",
    "vae/config.json",
    "text_encoder/model.safetensors",
    "scheduler/scheduler_config.json",
    "model_index.json",
)


@pytest.mark.parametrize("name", LINKS)
def test_a_link_that_points_nowhere(whole: Copy, tmp_path: Path, name: str) -> None:
    """A download that was broken off, or a cache that was cleaned: the line names the link, and says what it is."""
    snapshot = cached(tmp_path, "owner/name", whole(SD))
    (snapshot / name).resolve().unlink()
    assert (snapshot / name).is_symlink()
    line = refused(snapshot, SD)
    assert name in line
    assert "link" in line


def test_a_link_that_points_nowhere_does_not_choose_another_file(whole: Copy, copy: Copy, tmp_path: Path) -> None:
    """Were it passed over, halves would be exported as if they were the full weights."""
    directory = copy(SD)
    halves(directory / "unet", alone=False)
    snapshot = cached(tmp_path, "owner/name", directory)
    (snapshot / LINKS[0]).resolve().unlink()
    assert LINKS[0] in refused(snapshot, SD)


def test_families_have_these_variants() -> None:
    assert all(FAMILY_VARIANTS[name].model == MODELS[name] for name in (SD, PIXART))


# --- a stranger's -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "unet/config.json",
        "unet",
        f"unet/{DIFFUSERS}.safetensors",
        "scheduler/scheduler_config.json",
        "model_index.json",
    ],
)
def test_a_link_that_leads_out(whole: Copy, copy: Copy, name: str) -> None:
    """A file of somebody else's, whose content would come into the bundle or into a message."""
    directory = copy(SD)
    path = directory / name
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    path.symlink_to(whole(SD) / name)
    assert "outside the checkpoint" in refused(directory, SD)


@pytest.mark.parametrize("name", ["unet/config.json", "model_index.json", f"unet/{DIFFUSERS}.safetensors"])
def test_a_fifo_in_place_of_a_file(copy: Copy, name: str) -> None:
    directory = copy(SD)
    (directory / name).unlink()
    os.mkfifo(directory / name)
    line = refused(directory, SD)
    assert "FIFO" in line or "no safetensors weights" in line


@pytest.mark.parametrize("suffix", [".bin", ".ckpt", ".pt", ".pth", ".pkl"])
def test_pickles_are_never_read(copy: Copy, tmp_path: Path, suffix: str) -> None:
    directory = copy(SD)
    (directory / "unet" / f"{DIFFUSERS}.safetensors").unlink()
    pickle = b"cos\nsystem\n(S'touch " + str(tmp_path / "ran").encode() + b"'\ntR."
    (directory / "unet" / f"{DIFFUSERS}{suffix}").write_bytes(pickle)
    assert f"{DIFFUSERS}{suffix}, which is a pickle and is not read" in refused(directory, SD)
    assert not (tmp_path / "ran").exists()


def test_a_shard_by_the_name_of_a_pickle(copy: Copy) -> None:
    directory = copy(SD)
    index = sharded(directory)
    name = sorted(set(index["weight_map"].values()))[0]
    shutil.move(directory / "unet" / name, directory / "unet" / "a.bin")
    index["weight_map"] = {key: "a.bin" if file == name else file for key, file in index["weight_map"].items()}
    index_of(directory).write_text(json.dumps(index))
    assert "names a.bin; a .safetensors file beside it is wanted" in refused(directory, SD)


def test_an_adapter_of_another_model(copy: Copy) -> None:
    """transformers would load the model that it names, wherever that lies."""
    directory = copy(SD)
    (directory / "text_encoder" / "adapter_config.json").write_text('{"base_model_name_or_path": "/elsewhere"}')
    assert "an adapter of another model" in refused(directory, SD)
