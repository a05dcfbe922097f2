"""Files of checkpoints and LoRAs, as :mod:`tests.fuzz.targets` lists them."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
from diffusers import AutoencoderTiny
from numpy.typing import NDArray
from safetensors.numpy import save

from tests.fuzz.mutations import mutate_bytes, mutate_json, mutate_safetensors
from tests.fuzz.target import Target, workspace, written
from tests.tiny_flow import make_tiny_flow
from tests.tiny_ip_adapter import save_ip_adapter
from tgate_export.checkpoints.directory import DirectoryCheckpoint, TensorFiles
from tgate_export.checkpoints.headers import read_header
from tgate_export.families import MODELS, location
from tgate_export.families.base import Size
from tgate_export.ip_adapter import AdaptedCheckpoint
from tgate_export.ip_adapter_file import read_ip_adapter
from tgate_export.libraries import refusing
from tgate_export.lora import Lora, fuse_loras
from tgate_export.preview_decoder import PreviewDecoder
from tgate_export.sampling import compile_sampler
from tgate_export.tokenizers import export_tokenizers, load

_MODELS = ("mini-sdxl", "mini-pixart")
Tensors = dict[str, NDArray[Any]]

_NOT_JSON = ("merges.txt", "spiece.model")


# --- configurations and vocabularies ------------------------------------------------------------


@functools.cache
def _files() -> Mapping[str, bytes]:
    """Every file of the embedded checkpoints that is no weights, by ``model/component/file``."""
    left = shutil.ignore_patterns("*.safetensors", "*.md", "reports")
    for model in _MODELS:
        shutil.copytree(location(model), workspace() / model, ignore=left)
    paths = [path for model in _MODELS for path in sorted((workspace() / model).rglob("*")) if path.is_file()]
    return {path.relative_to(workspace()).as_posix(): path.read_bytes() for path in paths}


def _named(tokenizers: bool) -> Sequence[bytes]:
    """A line with the name, and the file."""
    own = {name: data for name, data in _files().items() if name.split("/")[1].startswith("tokenizer") == tokenizers}
    return [name.encode() + b"\n" + data for name, data in own.items()]


def mutate_named(data: bytes, rng: Random) -> bytes:
    """The file after its name."""
    name, _, content = data.partition(b"\n")
    changed = mutate_bytes if name.decode(errors="replace").endswith(_NOT_JSON) else mutate_json
    return name + b"\n" + changed(content, rng)


def checkpoint_file(data: bytes) -> None:
    """What reads one file of a checkpoint, and nothing else."""
    name, _, content = data.partition(b"\n")
    files = _files()
    known = name.decode(errors="replace")
    known = known if known in files else next(iter(files))
    path = workspace() / known
    path.write_bytes(content)
    try:
        _read(*known.split("/", 2))
    finally:
        path.write_bytes(files[known])


def _read(model: str, part: str, _file: str = "") -> None:
    family = MODELS[model].family
    checkpoint = DirectoryCheckpoint(workspace() / model)
    if part == "model_index.json":
        family.check_pipeline(checkpoint)
        for name in (*family.classes, *family.tokenizers, "scheduler"):
            checkpoint.named_class(name)
    elif part == "scheduler":
        compile_sampler("euler", family.scheduler_config(checkpoint, Size(height=512, width=512)), 2)
    elif part in family.tokenizers:
        export_tokenizers(family, checkpoint, workspace() / "exported")
    else:
        family.skeleton(checkpoint, part)


def pieces(data: bytes) -> None:
    """A vocabulary that SentencePiece's own library reads: ChatGLM's."""
    checkpoint = _kolors()
    (checkpoint.root / "tokenizer" / "tokenizer.model").write_bytes(data)
    loaded = load(MODELS["kolors"].family, checkpoint, 0)
    with refusing("it reads no prompt", "the vocabulary is damaged"):
        loaded(
            ["a large red circle", "", "\u6f22 <pad> x " * 99], padding="max_length", max_length=256, truncation=True
        )


@functools.cache
def _kolors() -> DirectoryCheckpoint:
    return DirectoryCheckpoint(make_tiny_flow(workspace() / "kolors", "kolors_a"))


def _pieces() -> Sequence[bytes]:
    return [(make_tiny_flow(workspace() / "sound", "kolors_a") / "tokenizer" / "tokenizer.model").read_bytes()]


# --- weights ------------------------------------------------------------------------------------


def header(data: bytes) -> None:
    """What is let through, the library reads."""
    from safetensors import safe_open

    path = written("header.safetensors", data)
    names = read_header(path).tensors.keys()
    with safe_open(path, framework="pt") as file:
        assert names == set(file.keys())


def _headers() -> Sequence[bytes]:
    tensors: Tensors = {
        "a.weight": np.zeros((3, 4), np.float32),
        "b": np.ones(2, np.float16),
        "empty": np.zeros((0, 5), np.int64),
    }
    return [save(tensors, {"format": "pt", "modelspec.title": "é", "ss_tag": '{"a": [1, {"b": null}]}'})]


def index(data: bytes) -> None:
    """The list of a component's shards."""
    folder = workspace() / "shards"
    folder.mkdir(exist_ok=True)
    for name in ("model-1.safetensors", "model-2.safetensors"):
        (folder / name).write_bytes(save({name: np.zeros(1, np.float32)}))
    (folder / "model.safetensors.index.json").write_bytes(data)
    TensorFiles.open(folder, False).stored()


def _indices() -> Sequence[bytes]:
    shards = {"a": "model-1.safetensors", "b": "model-2.safetensors", "c": "model-1.safetensors"}
    return [json.dumps({"metadata": {"total_size": 8}, "weight_map": shards}).encode()]


def lora(data: bytes) -> None:
    """Read, fitted to the model's layers, and added to one of each component."""
    _files()
    family, path = MODELS["mini-sdxl"].family, written("lora.safetensors", data)
    checkpoint = DirectoryCheckpoint(Path(location("mini-sdxl")))
    fused = fuse_loras(checkpoint, [Lora(path, 0.5)], family.build, components=("unet", "text_encoder"))
    for component, keys in _layers().items():
        fused.tensors(component).read(f"{keys[0]}.weight")


@functools.cache
def _layers() -> Mapping[str, Sequence[str]]:
    """Some layers with weights of two dimensions, by component."""
    checkpoint = DirectoryCheckpoint(Path(location("mini-sdxl")))
    found = {}
    for component in ("unet", "text_encoder"):
        stored = checkpoint.tensors(component).stored()
        names = sorted(
            key.removesuffix(".weight") for key in stored if key.endswith((".to_q.weight", ".q_proj.weight"))
        )
        found[component] = names[:2]
    return found


def ip_adapter(data: bytes) -> None:
    """Read, fitted to the model's layers, and each tensor that export reads of it."""
    own = read_ip_adapter(written("ip-adapter.safetensors", data))
    checkpoint, unet = _unet()
    fitted = AdaptedCheckpoint(checkpoint, own, workspace(), unet, prefer_half=False)
    module = own.build()
    for name, parameter in module.named_parameters():
        assert fitted.tensors("ip_adapter").read(name).shape == parameter.shape
    for layer in fitted.layers.values():
        assert fitted.tensors("unet").read(f"{layer}.processor.to_k_ip.weight").shape[1] == own.width


@functools.cache
def _unet() -> tuple[DirectoryCheckpoint, Any]:
    checkpoint = DirectoryCheckpoint(Path(location("mini-sdxl")))
    return checkpoint, MODELS["mini-sdxl"].family.skeleton(checkpoint, "unet")


def _ip_adapters() -> Sequence[bytes]:
    """A plain one and a Plus one."""
    place = Path(location("mini-sdxl"))
    return [save_ip_adapter(place, workspace() / f"ip-{plus}", plus=plus).read_bytes() for plus in (False, True)]


def _loras() -> Sequence[bytes]:
    """peft's names with its settings, and kohya's with a strength for each layer."""
    checkpoint = DirectoryCheckpoint(Path(location("mini-sdxl")))
    peft: Tensors = {}
    kohya: Tensors = {}
    for component, layers in _layers().items():
        for layer in layers:
            outputs, inputs = checkpoint.tensors(component).stored()[f"{layer}.weight"].shape
            down, up = np.ones((2, inputs), np.float32), np.ones((outputs, 2), np.float32)
            peft |= {f"{component}.{layer}.lora_A.weight": down, f"{component}.{layer}.lora_B.weight": up}
            stem = {"unet": "lora_unet_", "text_encoder": "lora_te1_"}[component] + layer.replace(".", "_")
            kohya |= {
                f"{stem}.lora_down.weight": down,
                f"{stem}.lora_up.weight": up,
                f"{stem}.alpha": np.array(1, np.float32),
            }
    settings = {
        "unet.r": 2,
        "unet.lora_alpha": 4,
        "unet.rank_pattern": {"to_q": 2},
        "unet.alpha_pattern": {"down.*q": 8},
    }
    return [save(peft, {"format": "pt", "lora_adapter_metadata": json.dumps(settings)}), save(kohya), save(peft)]


def small_decoder(data: bytes) -> None:
    """The configuration of an AutoencoderTiny, beside sound weights."""
    folder = _small()
    (folder / "config.json").write_bytes(data)
    PreviewDecoder(folder).scaling()


@functools.cache
def _small() -> Path:
    folder = workspace() / "small"
    sides = {f"{side}_block_out_channels": (4, 4) for side in ("encoder", "decoder")}
    AutoencoderTiny(**sides, num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1)).save_pretrained(folder)
    return folder


@functools.cache
def _configs() -> Sequence[bytes]:
    """As it was, whatever has been written in its place since."""
    return [(_small() / "config.json").read_bytes()]


TARGETS = tuple(
    Target(name=name, run=run, sound=sound, mutate=mutate, examples=examples, native=False)
    for name, run, sound, mutate, examples in (
        ("config", checkpoint_file, partial(_named, False), mutate_named, 60),
        ("vocabulary", checkpoint_file, partial(_named, True), mutate_named, 12),
        ("pieces", pieces, _pieces, mutate_bytes, 40),
        ("header", header, _headers, mutate_safetensors, 100),
        ("index", index, _indices, mutate_json, 60),
        ("autoencoder", small_decoder, _configs, mutate_json, 60),
        ("lora", lora, _loras, mutate_safetensors, 30),
        ("ip_adapter", ip_adapter, _ip_adapters, mutate_safetensors, 30),
    )
)
"""In the tests' own process: to import PyTorch once more takes longer than all of them."""
