"""Turns checkpoints into an fp16 diffusers directory; refuses one above the size budget."""

from __future__ import annotations

import argparse
import json
import os
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file

from training.models import build_pipeline, build_text_encoders, build_unet, build_vae
from training.settings import MAX_PIPELINE_BYTES, SETTINGS, Settings
from training.tokenizer import build_tokenizer, save_tokenizer


def weight_bytes(folder: Path) -> dict[str, int]:
    """Size in bytes of every safetensors file below `folder`, by relative path."""
    return {str(path.relative_to(folder)): path.stat().st_size for path in sorted(folder.rglob("*.safetensors"))}


def _load_as_float32(config: Path) -> None:
    """Let a plain `from_pretrained` widen the fp16 weights: transformers would otherwise keep fp16, diffusers not."""
    values = json.loads(config.read_text())
    values["dtype"] = "float32"
    config.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")


def assemble(checkpoints: Path | None, out: Path, settings: Settings = SETTINGS) -> dict[str, int]:
    """Write the pipeline to `out` (replacing only what it writes) and return `weight_bytes(out)`.

    `checkpoints` holds vae.safetensors, vae.scale and denoiser-ema.safetensors as the training scripts
    leave them; None keeps the seeded initial weights. Raises ValueError above 12 MiB and writes nothing.
    """
    torch.manual_seed(settings.seed)
    tokenizer = build_tokenizer()
    text_1, text_2 = build_text_encoders(settings, tokenizer)
    unet, vae = build_unet(settings), build_vae(settings)
    if checkpoints is not None:
        vae.load_state_dict(load_file(checkpoints / "vae.safetensors"))
        vae.register_to_config(scaling_factor=float((checkpoints / "vae.scale").read_text()))
        state = load_file(checkpoints / "denoiser-ema.safetensors")
        for name, module in (("unet", unet), ("text_1", text_1), ("text_2", text_2)):
            prefix = name + "."
            module.load_state_dict({k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)})
    pipeline = build_pipeline(vae=vae, unet=unet, text_1=text_1, text_2=text_2, tokenizer=tokenizer)
    pipeline.to(torch.float16)

    staging = out.with_name(out.name + ".staging")
    shutil.rmtree(staging, ignore_errors=True)
    pipeline.save_pretrained(staging, safe_serialization=True)
    for encoder in ("text_encoder", "text_encoder_2"):
        _load_as_float32(staging / encoder / "config.json")
    for slot in ("tokenizer", "tokenizer_2"):
        save_tokenizer(tokenizer, staging / slot)
    sizes = weight_bytes(staging)
    if sum(sizes.values()) > MAX_PIPELINE_BYTES:
        shutil.rmtree(staging)
        raise ValueError(
            f"the weights take {sum(sizes.values())} bytes, the budget is {MAX_PIPELINE_BYTES}: {sizes}; "
            "narrow unet_channels or vae_channels in settings.py"
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
    parser.add_argument("--work", type=Path, default=Path(".cache/training"), help="folder of the checkpoints")
    parser.add_argument("--out", type=Path, required=True, help="pipeline directory to write")
    parser.add_argument("--initial", action="store_true", help="write the untrained weights")
    arguments = parser.parse_args()
    sizes = assemble(None if arguments.initial else arguments.work, arguments.out)
    for name, size in sizes.items():
        print(f"{size:>10}  {name}")
    print(f"{sum(sizes.values()):>10}  of {MAX_PIPELINE_BYTES}")


if __name__ == "__main__":
    main()
