"""What a LoRA's file says of a model's layers, in every naming; which files are refused.

Nothing here knows a loader: files are written key by key, and W + scale * alpha / rank * up @ down is computed here.
"""

from __future__ import annotations

import json
import math
import os
import random
import re
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tests.export.checkpoints.ldm import unet_key
from tests.export.checkpoints.leaves import bounded
from tests.export.loras import (
    Held,
    assert_refused,
    assert_values,
    build,
    directory,
    fused,
    layers_of,
    one_layer,
    product,
    text_keys,
    write_lora,
)
from tgate_engine.errors import ExportError
from tgate_export.checkpoints.base import Checkpoint
from tgate_export.checkpoints.directory import DirectoryCheckpoint
from tgate_export.lora import Lora, fuse_loras

__all__ = ["directory"]  # a fixture


def resized(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key: torch.zeros(t.shape[0], 7) if key.endswith("to_q.lora_A.weight") else t for key, t in tensors.items()}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param(lambda d: {"unet.conv_in.weight": torch.zeros(2)}, "holds no LoRA (its first tensor", id="none"),
        pytest.param(
            lambda d: {k.replace("down_blocks.0", "down_blocks.7"): t for k, t in d.items()},
            "is for another architecture: it changes unet.down_blocks.7.attentions.0",
            id="a layer",
        ),
        pytest.param(resized, "with 7 inputs, and this model's has", id="a shape"),
        pytest.param(
            lambda d: {k.replace("unet.", "transformer."): t for k, t in d.items()},
            "LoRAs of this model change unet, text_encoder, text_encoder_2",
            id="a component",
        ),
        pytest.param(
            lambda d: {k: t for k, t in d.items() if "to_q.lora_B" not in k}, "has half of a change of unet", id="half"
        ),
        pytest.param(
            lambda d: {k: t[0] if "to_q.lora_A" in k else t for k, t in d.items()}, "have no rank in common", id="a row"
        ),
        pytest.param(
            lambda d: {k.replace("resnets.0.conv1", "resnets.0.norm1"): t for k, t in d.items()},
            "resnets.0.norm1, which is a GroupNorm in this model",
            id="a norm",
        ),
        pytest.param(
            lambda d: {key: t * (".lora_A." in key) for key, t in d.items()},
            "changes nothing: it is as training begins, all zeros; give a trained one",
            id="untrained",
        ),
        pytest.param(
            lambda d: {**d, "unet.conv_in.dora_scale": torch.zeros(1)}, "is a DoRA; only a plain LoRA", id="DoRA"
        ),
        pytest.param(lambda d: {"lora_unet_conv_in.hada_w1_a": torch.zeros(1)}, "is a LyCORIS network", id="LyCORIS"),
        pytest.param(
            lambda d: {"lora_unet_conv_in.lora_down.weight": torch.zeros(1)},
            "has half of a change of unet.conv_in ('lora_unet_conv_in.lora_down.weight')",
            id="kohya's, incomplete",
        ),
        pytest.param(
            lambda d: {**d, "unet.conv_in.lora_mid.weight": torch.zeros(1)}, "which is no part of a LoRA", id="a tensor"
        ),
    ],
)
def test_files_that_are_refused(
    directory: Path,
    tmp_path: Path,
    change: Callable[[dict[str, Tensor]], dict[str, Tensor]],
    message: str,
) -> None:
    bad = tmp_path / "bad.safetensors"
    save_file({key: t.clone() for key, t in change(load_file(write_lora(directory, tmp_path))).items()}, bad)
    with pytest.raises(ExportError, match=re.escape(message)) as caught:
        fused(directory, [(bad, 1.0)])
    assert str(bad) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_no_such_file_and_no_safetensors_file(directory: Path, tmp_path: Path) -> None:
    path = tmp_path / "lora.safetensors"
    with pytest.raises(ExportError, match=r"does not exist; a \.safetensors file is wanted"):
        fused(directory, [(path, 1.0)])
    path.write_bytes(b"nothing")
    with pytest.raises(ExportError, match="is not a whole safetensors file"):
        fused(directory, [(path, 1.0)])


ENCODERS = ("text_encoder", "text_encoder_2")
NAMINGS = ("kohya", "old diffusers", "diffusers", "peft", "each its own")
SUBSETS = {
    "all": ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2", "text_projection"),
    "without out": ("q_proj", "k_proj", "v_proj"),
    "q and fc1": ("q_proj", "fc1"),
    "out": ("out_proj",),
    "mlp": ("fc1", "fc2"),
    "projection": ("q_proj", "text_projection"),
    "last layer": ("layers.1.self_attn.v_proj",),
}


@pytest.mark.parametrize("subset", SUBSETS)
@pytest.mark.parametrize("naming", NAMINGS)
def test_any_layers_of_text_encoders_in_any_naming(directory: Path, tmp_path: Path, naming: str, subset: str) -> None:
    """Ranks differ from layer to layer, as do kohya's strengths, which some layers lack: theirs is their rank."""
    plain, path = DirectoryCheckpoint(directory), tmp_path / "a.safetensors"
    torch.manual_seed(11)
    tensors: dict[str, Tensor] = {}
    wanted: dict[str, dict[str, Tensor]] = {name: {} for name in ENCODERS}
    for component in ENCODERS:
        for number, (name, layer) in enumerate(layers_of(plain, component, SUBSETS[subset]).items()):
            rank = number % 3 + 1
            used = NAMINGS[number % 4] if naming == "each its own" else naming
            down_key, up_key, alpha_key = text_keys(used, component, name)
            tensors[down_key], tensors[up_key] = (
                torch.randn(rank, layer.in_features),
                torch.randn(layer.out_features, rank),
            )
            factor = 0.5
            if used == "kohya" and number % 2:
                tensors[alpha_key] = torch.tensor(number + 0.5)
                factor = 0.5 * (number + 0.5) / rank
            weight = f"{name}.weight"
            wanted[component][weight] = product(tensors[up_key], tensors[down_key], layer.weight.shape, factor)
    assert all(wanted.values())
    assert ("text_projection.weight" in wanted["text_encoder_2"]) == (subset in ("all", "projection"))
    save_file(tensors, path)
    checkpoint = fused(directory, [(path, 0.5)], ENCODERS)
    for component in ENCODERS:
        assert_values(checkpoint, plain, component, wanted[component])


def unet_layers(plain: Checkpoint) -> dict[str, nn.Module]:
    with torch.device("meta"):
        module = build(plain, "unet")
    ends = ("to_k", "to_out.0", "ff.net.2", "proj_out", "conv2", "linear_1", "conv_in", "time_emb_proj")
    return {n: m for n, m in module.named_modules() if n.endswith(ends)}


@pytest.mark.parametrize("naming", ["kohya", "old diffusers", "peft", "bare peft", "each its own"])
def test_any_layers_of_the_unet_in_any_naming(directory: Path, tmp_path: Path, naming: str) -> None:
    """Kohya's keys beside diffusers' too. Ranks differ, and strengths where there are any."""
    plain, path = DirectoryCheckpoint(directory), tmp_path / "a.safetensors"
    torch.manual_seed(13)
    tensors: dict[str, Tensor] = {}
    wanted = {}
    for number, (name, layer) in enumerate(unet_layers(plain).items()):
        shape: Any = layer.weight.shape
        rank, factor = number % 4 + 1, 0.25
        down, up = torch.randn(rank, *shape[1:]), torch.randn(shape[0], rank, *[1 for _ in shape[2:]])
        used = ("kohya", "old diffusers", "peft")[number % 3] if naming == "each its own" else naming
        stem = f"lora_unet_{name.replace('.', '_')}"
        if used == "kohya":
            keys = f"{stem}.lora_down.weight", f"{stem}.lora_up.weight"
            if number % 2:
                tensors[f"{stem}.alpha"], factor = torch.tensor(float(number)), 0.25 * number / rank
        elif used == "old diffusers":
            parent, _, leaf = name.replace("attn1.", "attn1.processor.").removesuffix(".0").rpartition(".")
            old = f"unet.{parent}.{leaf}_lora" if leaf in ("to_k", "to_out") else f"unet.{name}.lora"
            keys = f"{old}.down.weight", f"{old}.up.weight"
        else:
            root = "base_model.model." if used == "bare peft" else "unet."
            keys = f"{root}{name}.lora_A.weight", f"{root}{name}.lora_B.weight"
        tensors[keys[0]], tensors[keys[1]] = down, up
        wanted[f"{name}.weight"] = product(up, down, shape, factor)
    save_file(tensors, path)
    assert_values(fused(directory, [(path, 0.25)]), plain, "unet", wanted)


def test_both_namings_of_kohyas_unet_in_one_file(tiny_checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    """diffusers drops the original code's keys where others are beside them."""
    directory = tiny_checkpoint("sdxl_like")
    plain, path = DirectoryCheckpoint(directory), tmp_path / "a.safetensors"
    torch.manual_seed(14)
    with torch.device("meta"):
        module = build(plain, "unet")
    tensors: dict[str, Tensor] = {}
    wanted = {}
    for number, (name, layer) in enumerate(module.named_modules()):
        if name.endswith(("attn1.to_q", "attn2.to_out.0", "conv1")):
            spelled = unet_key(f"{name}.weight", frozenset()).removesuffix(".weight") if number % 2 else name
            stem, shape = "lora_unet_" + spelled.replace(".", "_"), layer.weight.shape
            down, up = torch.randn(2, *shape[1:]), torch.randn(shape[0], 2, *[1 for _ in shape[2:]])
            tensors |= {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up}
            tensors[f"{stem}.alpha"] = torch.tensor(1.0)
            wanted[f"{name}.weight"] = product(up, down, shape, 0.5)
    assert any("_blocks_" in key and "attentions" in key for key in tensors)
    assert any("input_blocks_" in key for key in tensors)
    save_file(tensors, path)
    assert_values(fused(directory, [(path, 1.0)]), plain, "unet", wanted)


@pytest.mark.parametrize(
    ("settings", "factor"),
    [
        pytest.param({"r": 2, "lora_alpha": 6}, 3.0, id="alpha"),
        pytest.param({"r": 4, "rank_pattern": {"k_proj": 2}, "lora_alpha": 6}, 3.0, id="a rank's pattern"),
        pytest.param({"r": 2, "lora_alpha": 6, "alpha_pattern": {"k_proj": 1, "self_attn.k_proj": 9}}, 0.5, id="first"),
        pytest.param({"r": 2, "lora_alpha": 6, "alpha_pattern": {"proj": 1}}, 3.0, id="no whole name"),
        pytest.param(
            {"r": 2, "lora_alpha": 6, "alpha_pattern": {"^text_model.encoder.layers.0.self_attn.k_proj": 1}},
            0.5,
            id="all",
        ),
        pytest.param({"r": 2, "lora_alpha": 6, "use_rslora": True}, 6 / 2**0.5, id="rslora"),
        pytest.param({"r": 2}, 4.0, id="peft's standard"),
        pytest.param({}, 1.0, id="none"),
    ],
)
def test_strength_in_settings(directory: Path, tmp_path: Path, settings: dict[str, Any], factor: float) -> None:
    plain, path = DirectoryCheckpoint(directory), tmp_path / "a.safetensors"
    name, layer, up, down = one_layer(plain)
    keys = text_keys("peft", "text_encoder", name)
    header = {"lora_adapter_metadata": json.dumps({f"text_encoder.{key}": value for key, value in settings.items()})}
    save_file({keys[0]: down, keys[1]: up}, path, header)
    wanted = {f"{name}.weight": product(up, down, layer.weight.shape, factor)}
    assert_values(fused(directory, [(path, 1.0)]), plain, "text_encoder", wanted)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"r": 4, "lora_alpha": 6}, "the rank 4, and its tensors have 2; they belong to another file"),
        ({"r": 2, "lora_alpha": "much"}, "its settings for the text_encoder are damaged"),
        ({"r": 2, "lora_alpha": 2, "alpha_pattern": {"(": 1}}, "its settings for the text_encoder are damaged"),
        ({"r": 2, "lora_alpha": 2, "alpha_pattern": [1]}, "its settings for the text_encoder are damaged"),
        (
            {"r": 2, "lora_alpha": float("inf")},
            "text_encoder.lora_alpha = inf, or another number that large; a finite number is wanted",
        ),
        ({"r": 2, "lora_alpha": 2, "use_dora": True}, "was trained with use_dora=True, and only a plain LoRA"),
        (
            {"r": 2, "lora_alpha": 2, "init_lora_weights": "pissa_niter_4"},
            "trained with init_lora_weights='pissa_niter_4'",
        ),
    ],
)
def test_settings_that_are_refused(directory: Path, tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    path = tmp_path / "a.safetensors"
    name, _, up, down = one_layer(DirectoryCheckpoint(directory))
    keys = text_keys("peft", "text_encoder", name)
    header = {"lora_adapter_metadata": json.dumps({f"text_encoder.{key}": value for key, value in settings.items()})}
    save_file({keys[0]: down, keys[1]: up}, path, header)
    assert_refused(directory, path, message)


STEM = "lora_te1_text_model_encoder_layers_0_self_attn_k_proj"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param({"lora_up": lambda t: t / 0}, f"'{STEM}.lora_up.weight' holds NaN or infinity", id="infinity"),
        pytest.param({"lora_down": lambda t: t * torch.nan}, f"'{STEM}.lora_down.weight' holds NaN", id="NaN"),
        pytest.param(
            {"lora_up": lambda t: t.to(torch.int8)},
            f"'{STEM}.lora_up.weight' is stored as torch.int8, and a LoRA must be stored as floating-point",
            id="integers",
        ),
        pytest.param({"lora_down": lambda t: t > 0}, f"'{STEM}.lora_down.weight' is stored as torch.bool", id="truths"),
        pytest.param(
            {"lora_up": lambda t: torch.cat([t, t], 1)},
            f"'{STEM}.lora_up.weight' [16, 4] and '{STEM}.lora_down.weight' [2, 16] have no rank in common",
            id="two ranks",
        ),
        pytest.param(
            {"lora_up": lambda t: t[:, :0], "lora_down": lambda t: t[:0]}, "have no rank in common", id="none"
        ),
        pytest.param({"lora_up": lambda t: t[:5]}, "k_proj with 5 outputs, and this model's has 16", id="outputs"),
        pytest.param(
            {"lora_down": lambda t: t[..., None, None].expand(-1, -1, 3, 3)},
            "k_proj with 9 elements of kernel, and this model's has 1",
            id="kernel",
        ),
        pytest.param({"alpha": lambda t: t * torch.nan}, f"'{STEM}.alpha' is not one finite number", id="alpha NaN"),
        pytest.param({"alpha": lambda t: t.expand(2)}, f"'{STEM}.alpha' is not one finite number", id="alphas"),
        pytest.param({"lora_up": None}, "has half of a change of text_encoder.text_model_encoder_layers_0", id="half"),
        pytest.param({"lora_up": None, "lora_down": None}, f"('{STEM}.alpha'); download it again", id="alpha alone"),
    ],
)
def test_damaged_tensors_are_named(
    directory: Path, tmp_path: Path, change: dict[str, Callable[[Tensor], Tensor] | None], message: str
) -> None:
    path = tmp_path / "a.safetensors"
    tensors = {f"{STEM}.lora_down.weight": torch.ones(2, 16), f"{STEM}.lora_up.weight": torch.ones(16, 2)}
    tensors |= {f"{STEM}.alpha": torch.tensor(1.0), "lora_te2_text_projection.lora_down.weight": torch.ones(1, 8)}
    tensors["lora_te2_text_projection.lora_up.weight"] = torch.ones(8, 1)
    for part, changed in change.items():
        key = next(key for key in tensors if key.startswith(f"{STEM}.{part}"))
        tensor = tensors.pop(key)
        if changed is not None:
            tensors[key] = changed(tensor).contiguous()
    save_file(tensors, path)
    assert_refused(directory, path, message)


@pytest.mark.parametrize(
    "key",
    [
        f"{STEM}.scale_weight",
        f"{STEM}.diff",
        f"{STEM}.lora_mid.weight",
        "text_encoder.text_model.encoder.layers.0.self_attn.k_proj.lora_A.scale",
        "text_encoder.text_model.encoder.layers.0.self_attn.k_proj.alpha",
        "text_encoder.text_model.embeddings.token_embedding.lora_embedding_A",
        "text_encoder_2.logit_scale",
    ],
)
def test_tensors_that_are_no_part_of_a_lora_are_named(directory: Path, tmp_path: Path, key: str) -> None:
    path = tmp_path / "a.safetensors"
    tensors = {f"{STEM}.lora_down.weight": torch.ones(2, 16), f"{STEM}.lora_up.weight": torch.ones(16, 2)}
    save_file({**tensors, key: torch.ones(1)}, path)
    assert_refused(directory, path, f"has a tensor {key!r}, which is no part of a LoRA")


@pytest.mark.parametrize(
    ("key", "message"),
    [
        (
            "lora_te1_text_model_encoder_layers_9_mlp_fc1",
            "text_encoder.text_model_encoder_layers_9_mlp_fc1, which this",
        ),
        ("lora_te1_text_projection", "text_encoder.text_projection, which this model has not"),
        ("lora_te1_text_model_final_layer_norm", "final_layer_norm, which is a LayerNorm in this model"),
        ("lora_unet_down_blocks_9_resnets_0_conv1", "unet.down_blocks.9.resnets.0.conv1, which this model has not"),
        ("lora_te3_encoder_block_0", "'lora_te3_encoder_block_0"),
    ],
)
def test_layers_that_the_model_has_not_are_named(directory: Path, tmp_path: Path, key: str, message: str) -> None:
    path = tmp_path / "a.safetensors"
    tensors = {f"{STEM}.lora_down.weight": torch.ones(2, 16), f"{STEM}.lora_up.weight": torch.ones(16, 2)}
    save_file(
        {**tensors, f"{key}.lora_down.weight": torch.ones(2, 16), f"{key}.lora_up.weight": torch.ones(16, 2)}, path
    )
    assert_refused(directory, path, message)


@pytest.mark.parametrize("naming", ["old diffusers", "diffusers", "peft"])
def test_a_layer_that_is_changed_twice_is_named(directory: Path, tmp_path: Path, naming: str) -> None:
    """Of two changes under two namings, the last one would be taken alone."""
    path = tmp_path / "a.safetensors"
    name = "encoder.layers.0.self_attn.k_proj"
    down, up, _ = text_keys(naming, "text_encoder", name)
    tensors = {f"{STEM}.lora_down.weight": torch.ones(2, 16), f"{STEM}.lora_up.weight": torch.ones(16, 2)}
    save_file({**tensors, down: torch.ones(2, 16), up: torch.ones(16, 2)}, path)
    assert_refused(directory, path, f"changes text_encoder.{name} twice")
    first, second, _ = text_keys("peft" if naming != "peft" else "diffusers", "text_encoder", name)
    tensors = {down: torch.ones(2, 16), up: torch.ones(16, 2), first: torch.ones(2, 16), second: torch.ones(16, 2)}
    save_file(tensors, path)
    assert_refused(directory, path, "changes one layer twice, in ", repr(down), repr(first))


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2]
)
def test_stored_precisions(directory: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    plain, path = DirectoryCheckpoint(directory), tmp_path / "a.safetensors"
    name, layer, up, down = one_layer(plain)
    up, down = up.to(dtype), down.to(dtype)
    keys = text_keys("kohya", "text_encoder", name)
    save_file({keys[0]: down, keys[1]: up, keys[2]: torch.tensor(3)}, path)
    wanted = {f"{name}.weight": product(up, down, layer.weight.shape, 1.5)}
    assert_values(fused(directory, [(path, 1.0)]), plain, "text_encoder", wanted)


def test_bare_names_of_a_text_encoder(directory: Path, tmp_path: Path) -> None:
    """As peft saves one. Where there are two, the file does not say which it means."""
    plain, path = DirectoryCheckpoint(directory), tmp_path / "a.safetensors"
    name, layer, up, down = one_layer(plain)
    stem = f"base_model.model.text_model.{name.removeprefix('text_model.')}"
    save_file({f"{stem}.lora_A.weight": down, f"{stem}.lora_B.weight": up}, path)
    assert_refused(directory, path, "does not say which; put the component's name before its keys", "text_encoder_2.")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 2, "lora_alpha": 5}))
    held: Any = Held(plain, "", torch.zeros(0))
    held.model_index = {k: v for k, v in plain.model_index.items() if k != "text_encoder_2"}
    held.model_index["_class_name"] = "StableDiffusionPipeline"
    checkpoint = fuse_loras(held, [Lora(path)], build, components=["text_encoder"])
    wanted = {f"{name}.weight": product(up, down, layer.weight.shape, 2.5)}
    assert_values(checkpoint, plain, "text_encoder", wanted)


# --- files of strangers -------------------------------------------------------------------------

QUERY = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
DOWN = f"unet.{QUERY}.lora_A.weight"


def refusal(directory: Path, path: Path) -> str:
    with pytest.raises(ExportError) as caught:
        fused(directory, [(path, 1.0)])
    line = str(caught.value)
    assert "\n" not in line
    assert len(line) < 500 + 2 * len(str(path))
    return line


def sparse(path: Path, shape: list[int], dtype: str = "F16", width: int = 2) -> Path:
    """A file of one tensor that holds nothing, however large it is."""
    size = width * math.prod(shape)
    header = json.dumps({DOWN: {"dtype": dtype, "shape": shape, "data_offsets": [0, size]}}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header)
    os.truncate(path, 8 + len(header) + size)
    return path


@pytest.mark.parametrize("shape", [[2, 1 << 29], [1 << 13, 1 << 13], [1 << 14, 1 << 14], [1 << 38]], ids=str)
def test_a_tensor_that_no_layer_has_takes_no_memory(directory: Path, tmp_path: Path, shape: list[int]) -> None:
    with bounded():
        line = refusal(directory, sparse(tmp_path / "a.safetensors", shape))
    assert "shape" in line or "are the most" in line


def test_tensors_without_number_are_refused(directory: Path, tmp_path: Path) -> None:
    many = {f"unet.x{i}.lora_A.weight": torch.zeros(0) for i in range(1 << 14)}
    save_file({**many, DOWN: torch.zeros(1)}, path := tmp_path / "a.safetensors")
    assert "16385 tensors" in refusal(directory, path)


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (os.mkfifo, "is a FIFO"),
        (lambda path: path.mkdir(), "is a directory"),
        (lambda path: path.symlink_to("nowhere"), "is not there"),
        (lambda path: path.write_bytes(b"PK\3\4" + bytes(200)), "is not a whole safetensors file"),
        (lambda path: path.write_bytes(struct.pack("<Q", 8) + b'{"a": []' + b"}"), "not readable JSON"),
    ],
    ids=["fifo", "directory", "link", "archive", "header"],
)
def test_what_is_no_safetensors_file(directory: Path, tmp_path: Path, make: Callable[[Path], object], why: str) -> None:
    make(tmp_path / "a.safetensors")
    assert why in refusal(directory, tmp_path / "a.safetensors")


@pytest.mark.parametrize("suffix", [".bin", ".pt", ".pth", ".ckpt", ".pkl"])
def test_a_pickle_is_never_read(directory: Path, tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    path.write_bytes(b"cos\nsystem\n(S'touch " + str(tmp_path / "ran").encode() + b"'\ntR.")
    assert "is a pickle by its name" in refusal(directory, path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("alpha", [0.0, 1e38, -1e38, float("nan"), float("inf")])
def test_a_strength_that_means_nothing(directory: Path, tmp_path: Path, alpha: float) -> None:
    path = tmp_path / "a.safetensors"
    kohya = f"lora_unet_{QUERY.replace('.', '_')}"
    layer: Any = layers_of(DirectoryCheckpoint(directory), "unet", (".to_q",))[QUERY]
    weight = layer.weight
    tensors = {
        f"{kohya}.lora_down.weight": torch.ones(2, weight.shape[1]),
        f"{kohya}.lora_up.weight": torch.ones(weight.shape[0], 2),
        f"{kohya}.alpha": torch.tensor(alpha),
    }
    save_file(tensors, path)
    line = refusal(directory, path)
    assert "strength" in line or "is not one finite number" in line


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ("[" * 10_000, "deeper than"),
        ("[]", "holds a list"),
        ('{"a": 1, "a": 2}', "twice"),
        ('{"unet.r": 1e400}', "finite"),
        (json.dumps({"unet.r": 2, "unet.alpha_pattern": {"(a+)+": 1}}), "repeats too much"),
        (json.dumps({"unet.r": 2, "unet.rank_pattern": {".*.*.*x": 2}}), "repeats too much"),
        (json.dumps({"unet.r": 2, "unet.rank_pattern": {f"x{i}": 2 for i in range(5000)}}), "5000 patterns"),
    ],
    ids=lambda value: value[:30],
)
def test_settings_of_a_stranger(directory: Path, tmp_path: Path, settings: str, why: str) -> None:
    layer: Any = layers_of(DirectoryCheckpoint(directory), "unet", (".to_q",))[QUERY]
    tensors = {
        DOWN: torch.ones(2, layer.weight.shape[1]),
        DOWN.replace("lora_A", "lora_B"): torch.ones(layer.weight.shape[0], 2),
    }
    save_file(tensors, path := tmp_path / "a.safetensors", {"lora_adapter_metadata": settings})
    with bounded():
        assert why in refusal(directory, path)


def test_names_of_all_kinds_are_read_or_refused(directory: Path, tmp_path: Path) -> None:
    """Names as they are and damaged: the converters that they go through are other people's."""
    generator = random.Random(0)
    known = [DOWN, "lora_unet_x.lora_down.weight", "lora_te1_text_model_x.alpha", "text_model.x.lora.down.weight"]
    pieces = [
        ".",
        "_",
        "lora",
        "lora_A",
        "weight",
        "unet",
        "text_encoder",
        "down",
        "0",
        "processor",
        "q_proj",
        "é",
        " ",
    ]
    for _ in range(60):
        name = generator.choice(known)
        for _ in range(generator.randrange(4)):
            place = generator.randrange(len(name))
            name = name[:place] + generator.choice(pieces) + name[place + generator.randrange(3) :]
        save_file({name: torch.ones(2, 2), f"{name}.lora": torch.ones(1)}, path := tmp_path / "a.safetensors")
        refusal(directory, path)
