"""Values of configurations: typed, bounded, and tried one by one against whatever a stranger may write."""

from __future__ import annotations

import collections
import functools
import inspect
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import transformers

from tests.export.checkpoints.leaves import BAD, Leaf, bounded, changed, leaves
from tests.tiny_families import FAMILY_VARIANTS, make_tiny
from tests.tiny_models import make_tiny_sdxl
from tgate_engine.errors import ExportError, TgateError
from tgate_engine.plan_report import REPORTS
from tgate_export import tokenizers
from tgate_export.checkpoints import configs
from tgate_export.checkpoints.configs import (
    bounded_module,
    check_code,
    check_config,
    declared,
    without_code,
)
from tgate_export.checkpoints.directory import DirectoryCheckpoint
from tgate_export.checkpoints.published import facts
from tgate_export.families import MODELS, location
from tgate_export.families.base import Family, Size
from tgate_export.job import ExportSettings, prepare
from tgate_export.sampling import compile_sampler

SAMPLE = 29
"""One case of so many is tried in every run; a prime, so that all files, places and values take turns."""

UNET: Any = diffusers.UNet2DConditionModel


def own_values(cls: Any) -> dict[str, Any]:
    """The configuration of a class by its own defaults, as JSON."""
    parameters = inspect.signature(cls.__init__).parameters
    values = {name: p.default for name, p in parameters.items() if p.default is not inspect.Parameter.empty}
    made: dict[str, Any] = json.loads(json.dumps(values))
    return made


# --- one value ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({"in_channels": "text"}, r"in_channels = 'text' \(text\); a whole number from 1 to 65536 is wanted"),
        ({"in_channels": True}, r"in_channels = True \(true or false\); a whole number"),
        ({"in_channels": 0.5}, "a whole number"),
        ({"in_channels": 0}, "a whole number from 1"),
        ({"in_channels": -4}, "a whole number from 1"),
        ({"in_channels": 2**31}, "a whole number from 1"),
        ({"in_channels": []}, r"\(a list\); a whole number"),
        ({"in_channels": {}}, r"\(an object\); a whole number"),
        ({"in_channels": None}, r"\(null\); a whole number"),
        ({"layers_per_block": 10**7}, "a whole number from 0 to 256, or a list"),
        ({"layers_per_block": [1, 10**7]}, "a list of a whole number from 0 to 256"),
        ({"transformer_layers_per_block": [1, [2, 10**7]]}, "a list of a list of a whole number"),
        ({"block_out_channels": 320}, "a list is wanted"),
        ({"block_out_channels": [320] * 2000}, "a list of at most 1024"),
        ({"down_block_types": [1]}, "a list of text"),
        ({"act_fn": "x" * 10_000}, "text of at most 256 characters"),
        ({"act_fn": 1}, "text is wanted"),
        ({"norm_eps": -1e-5}, "a number from 0 to 1"),
        ({"dropout": "0.1"}, "a number is wanted"),
        ({"dropout": 1e300}, "a number of at most"),
        ({"center_input_sample": 1}, "true or false, or null"),
        ({"auto_map": {"AutoModel": "evil.Model"}}, "code of the checkpoint's own, which is never run"),
    ],
    ids=str,
)
def test_a_value_that_means_nothing_is_refused(changes: dict[str, Any], wanted: str) -> None:
    with pytest.raises(ExportError, match=wanted) as caught:
        check_config("unet/config.json", UNET, changes)
    assert str(caught.value).startswith("unet/config.json has ")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    "changes",
    [
        {"attn_implementation": "somebody/kernel"},
        {"_attn_implementation": "somebody/kernel:entry"},
        {"experts_implementation": "somebody/kernel"},
        {"dtype": "load"},
        {"torch_dtype": ["float32"]},
        {"num_labels": 10**7},
        {"id2label": {str(i): "x" for i in range(5000)}},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_what_transformers_would_fetch_or_look_up_is_refused(changes: dict[str, Any]) -> None:
    """An implementation of attention is fetched from the hub and run; a dtype is looked up as a name in torch."""
    with pytest.raises(ExportError, match=next(iter(changes))):
        check_config("text_encoder/config.json", transformers.CLIPTextConfig, changes)


@pytest.mark.parametrize("key", ["auto_map", "custom_pipelines", "trust_remote_code"])
def test_code_of_the_checkpoints_own_is_refused(key: str) -> None:
    with pytest.raises(ExportError, match=key):
        check_code("model_index.json", {key: ["x.py"]})


@pytest.mark.parametrize(
    ("named", "kept"),
    [
        ({"AutoModel": "modeling_own.Model", "AutoTokenizer": ["tokens_own.Slow", None]}, False),
        ({"AutoModel": "modeling_own.Model", "AutoConfig": "evil.Config"}, True),
        ({"AutoModel": "somebody/repo--modeling_own.Model"}, True),
        ({"AutoTokenizer": [None, None]}, True),
        ({"AutoModel": [["modeling_own"]]}, True),
        ({}, True),
        (["modeling_own.Model"], True),
    ],
)
def test_code_that_diffusers_brings_is_left_out(named: Any, kept: bool) -> None:
    config = {"auto_map": named, "hidden_size": 8}
    assert without_code(config, ("modeling_own", "tokens_own")) == (config if kept else {"hidden_size": 8})
    assert without_code(config, ()) == config


@pytest.mark.parametrize("model", MODELS)
def test_published_configurations_are_let_through(model: str) -> None:
    """Annotations are not always true: what is published is the measure."""
    for component, cls in MODELS[model].family.classes.items():
        kind: Any = cls
        config = _published(model, component)
        if config is not None:
            check_config(component, kind.config_class if hasattr(kind, "config_class") else kind, config)


def _published(model: str, component: str) -> Any:
    try:
        return facts(model)["components"].get(component)
    except ExportError:  # embedded models have files
        return json.loads((Path(location(model)) / component / "config.json").read_text("utf-8"))


def test_every_key_of_a_class_has_a_type() -> None:
    """A release of diffusers or transformers with another way to annotate would let everything through."""
    for cls in (UNET, diffusers.AutoencoderKL, transformers.CLIPTextConfig, transformers.T5Config):
        loose = [key for key, wanted in declared(cls).items() if len(wanted.kinds) > 3]
        assert loose == []


# --- what no single value shows -----------------------------------------------------------------


def test_a_module_of_too_many_tensors_is_refused_while_it_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(configs, "MOST_PARAMETERS", 100)
    made: list[torch.nn.Module] = []

    def layers() -> None:
        while len(made) < 10**5:
            made.append(torch.nn.Linear(1, 1, device="meta"))

    with pytest.raises(ExportError, match="more than 100 tensors"), bounded_module("unet/config.json"):
        layers()
    assert len(made) == 50
    made.clear()
    with bounded_module("unet/config.json"):
        torch.nn.Linear(1, 1, device="meta")
    [torch.nn.Linear(1, 1, device="meta") for _ in range(100)]  # outside, nothing is counted


def test_layers_that_are_few_by_themselves_and_many_together(tmp_path: Path) -> None:
    """256 in each of 16 blocks: every number is in bounds, their product takes minutes and gigabytes."""
    config = {
        "down_block_types": ["DownBlock2D"] * 16,
        "up_block_types": ["UpBlock2D"] * 16,
        "block_out_channels": [32] * 16,
        "layers_per_block": 256,
    }
    checkpoint = _written(tmp_path, "sd15", {"unet": config})
    with bounded(), pytest.raises(ExportError, match=r"unet/config\.json asks for more than"):
        MODELS["sd15"].family.build(checkpoint, "unet")


def test_a_table_of_places_that_is_too_large(tmp_path: Path) -> None:
    """Tables are numbers, not weights: they would take memory before anything is checked against the file."""
    config = {"sample_size": 4096, "patch_size": 1, "num_attention_heads": 64, "attention_head_dim": 64}
    checkpoint = _written(tmp_path, "pixart-alpha", {"transformer": config})
    with bounded(), pytest.raises(ExportError, match="a table of 68719476736 numbers"):
        MODELS["pixart-alpha"].family.build(checkpoint, "transformer")


def _written(root: Path, model: str, configs: dict[str, Any]) -> DirectoryCheckpoint:
    """A checkpoint of configurations alone."""
    index = {"_class_name": MODELS[model].family.pipeline_classes[0]}
    root.mkdir(exist_ok=True)
    (root / "model_index.json").write_text(json.dumps(index))
    for component, config in configs.items():
        (root / component).mkdir()
        (root / component / "config.json").write_text(json.dumps(config))
    return DirectoryCheckpoint(root)


# --- every value --------------------------------------------------------------------------------


def _small(root: Path) -> dict[str, Path]:
    """Small checkpoints, by model: the embedded ones, and configurations without weights of the other families."""
    made = {}
    for model in ("mini-sdxl", "mini-pixart"):
        made[model] = root / model
        shutil.copytree(location(model), made[model], ignore=shutil.ignore_patterns("*.safetensors", "README.md"))
    svd, latte = MODELS["svd"].family, MODELS["opensora"].family
    vision = transformers.CLIPVisionConfig(hidden_size=8, intermediate_size=8, num_attention_heads=2)
    unet = own_values(svd.classes["unet"]) | {
        "block_out_channels": [32, 64],
        **_json("svd_a"),
        "cross_attention_dim": 8,
    }
    parts = {"unet": unet, "vae": own_values(svd.classes["vae"]), "image_encoder": vision.to_dict()}
    _written(made.setdefault("svd", root / "svd"), "svd", parts)
    transformer = own_values(latte.classes["transformer"]) | _json("latte_a") | {"caption_channels": 8}
    _written(made.setdefault("opensora", root / "opensora"), "opensora", {"transformer": transformer})
    unet = own_values(MODELS["sd15"].family.classes["unet"]) | _json("sd15_a") | {"cross_attention_dim": 8}
    _written(made.setdefault("sd15", root / "sd15"), "sd15", {"unet": unet})
    return made


def _json(variant: str) -> dict[str, Any]:
    made: dict[str, Any] = json.loads(json.dumps(FAMILY_VARIANTS[variant].network))
    return made


def _cases(root: Path) -> list[tuple[Path, Leaf, str]]:
    files = [p for p in sorted(root.rglob("*.json")) if p.name not in ("vocab.json", "tokenizer.json")]
    files = [p for p in files if p.parent.name != REPORTS]
    return [(file, leaf, bad) for file in files for leaf in leaves(json.loads(file.read_text("utf-8"))) for bad in BAD]


def _read(family: Family, root: Path, file: Path) -> None:
    """What reads one file of a checkpoint, and nothing else."""
    checkpoint = DirectoryCheckpoint(root)
    part = file.parent.name
    if file.name == "model_index.json":
        family.check_pipeline(checkpoint)
        for name in (*family.classes, *family.tokenizers, "scheduler"):
            checkpoint.named_class(name)
    elif part == "scheduler":
        compile_sampler("euler", family.scheduler_config(checkpoint, Size(height=512, width=512)), 2)
    elif part in family.tokenizers:
        tokenizers.load(family, checkpoint, family.tokenizers.index(part))
        family.token_length(checkpoint, family.tokenizers.index(part))
    else:
        family.skeleton(checkpoint, part)


def _outcome(read: Callable[[], None], file: Path, text: str) -> str:
    """Whether a file with that text is read or refused; what else happens is raised. The file is left as it was."""
    before = file.read_bytes()
    file.unlink()  # it may be a link
    file.write_text(text)
    line = "read"
    try:
        with bounded():
            read()
    except TgateError as error:
        line = str(error)
    finally:
        file.write_bytes(before)
    assert not any(sign in line for sign in ("\n", "alloc", "MemoryError")), line
    return line if line == "read" else "refused"


def test_whatever_stands_in_a_configuration_is_read_or_refused(tmp_path: Path) -> None:
    """A deterministic part of every value of every file; the whole of it is slow."""
    outcomes: collections.Counter[str] = collections.Counter()
    number = 0
    for model, root in _small(tmp_path).items():
        family = MODELS[model].family
        for file, leaf, bad in _cases(root):
            number += 1
            if number % SAMPLE == 0:
                text = changed(json.loads(file.read_text("utf-8")), leaf, bad)
                outcomes[_outcome(functools.partial(_read, family, root, file), file, text)] += 1
    assert outcomes["refused"] > 100
    assert outcomes["read"] > 10  # a reader that refused everything would pass, too


WHOLE = {"sd15_a": "sd15", "sdxl": "sdxl", "pixart_alpha_a": "pixart-alpha", "latte_a": "opensora", "svd_a": "svd"}


@pytest.mark.slow
@pytest.mark.parametrize("variant", WHOLE)
def test_whatever_stands_in_any_file_of_a_checkpoint(variant: str, tmp_path: Path) -> None:
    """All of it, through everything that an export checks before it traces. Takes some minutes for each."""
    source, root = tmp_path / "source", tmp_path / "copy"
    if variant in FAMILY_VARIANTS:
        make_tiny(source, variant)
    else:
        make_tiny_sdxl(source, "conv_projection")
    shutil.copytree(source, root, copy_function=os.link)
    frames = {"svd_a": 3, "latte_a": 3}.get(variant)
    side = 32 if variant == "svd_a" else 64

    def read() -> None:
        settings = ExportSettings(
            model=WHOLE[variant],
            checkpoint=str(root),
            steps=2,
            m=1,
            k=1,
            warm_up=0,
            sampler="euler",
            height=side,
            width=side,
            frames=frames,
        )
        job = prepare(settings)
        for index in range(len(job.family.tokenizers)):
            tokenizers.load(job.family, job.checkpoint, index)

    read()
    outcomes: collections.Counter[str] = collections.Counter()
    for file, leaf, bad in _cases(root):
        text = changed(json.loads(file.read_text("utf-8")), leaf, bad)
        outcomes[_outcome(read, file, text)] += 1
    assert min(outcomes["refused"], outcomes["read"]) > 100
