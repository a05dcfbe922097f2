"""Turns checkpoints into an fp16 diffusers directory; refuses one above the size budget."""

from __future__ import annotations

import argparse
import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file
from torch import nn

from training import models, pixart, tokenizer
from training.pool import load_vae
from training.settings import MAX_PIPELINE_BYTES, MODELS, PIXART_SETTINGS, SETTINGS


def weight_bytes(folder: Path) -> dict[str, int]:
    """Size in bytes of every safetensors file below `folder`, by relative path."""
    return {str(path.relative_to(folder)): path.stat().st_size for path in sorted(folder.rglob("*.safetensors"))}


def _tidy(folder: Path) -> None:
    """Drop the path that the autoencoder came from, and let a plain `from_pretrained` widen the fp16 weights.

    Transformers would otherwise keep fp16, diffusers not.
    """
    for config in folder.glob("*/config.json"):
        values = json.loads(config.read_text())
        values.pop("_name_or_path", None)
        if config.parent.name.startswith("text_encoder"):
            values["dtype"] = "float32"
        config.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")


def _mini_sdxl(checkpoints: Path | None) -> DiffusionPipeline:
    torch.manual_seed(SETTINGS.seed)
    clip = tokenizer.build_tokenizer()
    text_1, text_2 = models.build_text_encoders(SETTINGS, clip)
    unet = models.build_unet(SETTINGS)
    _load(checkpoints, "mini-sdxl", {"unet": unet, "text_1": text_1, "text_2": text_2})
    vae = models.build_vae(SETTINGS) if checkpoints is None else load_vae(checkpoints)
    return models.build_pipeline(vae=vae, unet=unet, text_1=text_1, text_2=text_2, tokenizer=clip)


def _mini_pixart(checkpoints: Path | None) -> DiffusionPipeline:
    torch.manual_seed(PIXART_SETTINGS.seed)
    t5 = pixart.build_tokenizer()
    transformer = pixart.build_transformer(PIXART_SETTINGS)
    text = pixart.build_text_encoder(PIXART_SETTINGS, t5)
    _load(checkpoints, "mini-pixart", {"transformer": transformer, "text": text})
    vae = models.build_vae(SETTINGS) if checkpoints is None else load_vae(checkpoints)
    return pixart.build_pipeline(vae=vae, transformer=transformer, text=text, tokenizer=t5)


def _load(checkpoints: Path | None, model: str, parts: dict[str, Any]) -> None:
    """Give `parts` the averaged weights of `model`, where there are checkpoints."""
    if checkpoints is not None:
        state = load_file(checkpoints / f"{model}-ema.safetensors")
        kept = {name: value for name, value in state.items() if name.split(".")[0] in parts}  # no training aids
        nn.ModuleDict(parts).load_state_dict(kept)


def assemble(model: str, checkpoints: Path | None, out: Path) -> dict[str, int]:
    """Write the pipeline of `model` to `out` (replacing only what it writes) and return `weight_bytes(out)`.

    `checkpoints` holds <model>-ema.safetensors and, unless the autoencoder is to be that of the embedded
    `mini-sdxl`, vae.safetensors and vae.scale, as the training scripts leave them; None keeps the seeded
    initial weights. Raises ValueError above 12 MiB and writes nothing.
    """
    pipeline = (_mini_sdxl if model == "mini-sdxl" else _mini_pixart)(checkpoints)
    pipeline.to(torch.float16)

    staging = out.with_name(out.name + ".staging")
    shutil.rmtree(staging, ignore_errors=True)
    pipeline.save_pretrained(staging, safe_serialization=True)
    _tidy(staging)
    if model == "mini-sdxl":
        for slot in ("tokenizer", "tokenizer_2"):
            tokenizer.save_tokenizer(pipeline.tokenizer, staging / slot)
    sizes = weight_bytes(staging)
    if sum(sizes.values()) > MAX_PIPELINE_BYTES:
        shutil.rmtree(staging)
        raise ValueError(
            f"the weights take {sum(sizes.values())} bytes, the budget is {MAX_PIPELINE_BYTES}: {sizes}; "
            "narrow its widths in settings.py"
        )
    out.mkdir(parents=True, exist_ok=True)
    for path in staging.iterdir():
        target = out / path.name
        if target.is_dir():
            shutil.rmtree(target)
        os.replace(path, target)
    staging.rmdir()
    return sizes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=MODELS, default="mini-sdxl")
    parser.add_argument("--work", type=Path, default=Path(".cache/training"), help="folder of the checkpoints")
    parser.add_argument("--out", type=Path, required=True, help="pipeline directory to write")
    parser.add_argument("--initial", action="store_true", help="write the untrained weights")
    arguments = parser.parse_args()
    sizes = assemble(arguments.model, None if arguments.initial else arguments.work, arguments.out)
    for name, size in sizes.items():
        print(f"{size:>10}  {name}")
    print(f"{sum(sizes.values()):>10}  of {MAX_PIPELINE_BYTES}")


if __name__ == "__main__":
    main()
