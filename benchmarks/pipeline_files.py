"""One random SD 1.5 in the forms that different pipelines read: a diffusers directory, our bundle, OpenVINO's files."""

from __future__ import annotations

import gzip
import json
import subprocess
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import openvino as ov
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoTokenizer, CLIPTextModel, CLIPTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from benchmarks.frugality import product
from tgate_engine.atomic import staging
from tgate_export.checkpoints.published import PublishedCheckpoint, facts
from tgate_export.families import MODELS
from tgate_export.modules import real_module
from tgate_export.schedulers import make_scheduler

MODEL = "sd15"
MERGES = 49152 - 256 - 2
"""How many lines of CLIP's table are merges of its vocabulary: what is left of 49,152 without bytes and word ends."""


def vocabulary(table: str, merges: int = MERGES) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """CLIP's tokens by their text, and its merges in order, of the table that is published with CLIP.

    ``table``: a heading, then a merge of two tokens a line. Bytes come first, then bytes that end a word, what the
    merges make, and the two marks. Raises :class:`ValueError` for fewer merges than are wanted.
    """
    lines = table.split("\n")[1 : merges + 1]
    pairs = [(left, right) for left, _, right in (line.partition(" ") for line in lines) if left and right]
    if len(pairs) != merges:
        raise ValueError(f"the table holds {len(pairs)} merges, {merges} are wanted; give CLIP's own")
    bare = [*bytes_to_unicode().values()]
    made = [left + right for left, right in pairs]
    tokens = [*bare, *(token + "</w>" for token in bare), *made, "<|startoftext|>", "<|endoftext|>"]
    return {token: number for number, token in enumerate(tokens)}, pairs


def write_checkpoint(folder: Path, table: Path, sampler: str) -> None:
    """A diffusers directory with the weights that ``tgate-export --weights random`` draws, in float32. ``table``:
    CLIP's merges, packed with gzip. Its scheduler is the one that stands for ``sampler``, with all settings named."""
    family = MODELS[MODEL].family
    checkpoint = PublishedCheckpoint(MODEL, family.build)
    with staging(folder) as place:
        for name in ("unet", "vae"):
            real_module(family, checkpoint, name).save_pretrained(place / name)
        text = real_module(family, checkpoint, "text_encoder")
        text.config.save_pretrained(place / "text_encoder")
        # By the names of the published file, which newer releases of transformers leave "text_model" out of.
        tensors = {f"text_model.{key.removeprefix('text_model.')}": t for key, t in text.state_dict().items()}
        save_file(tensors, place / "text_encoder" / "model.safetensors", {"format": "pt"})
        tokens, merges = vocabulary(gzip.decompress(table.read_bytes()).decode("utf-8"))
        tokenizer = CLIPTokenizer(vocab=tokens, merges=merges, model_max_length=77)
        tokenizer.save_pretrained(place / "tokenizer")
        make_scheduler(sampler, checkpoint.scheduler_config()).save_pretrained(place / "scheduler")
        index = {name: of for name, of in facts(MODEL)["model_index"].items() if "safety" not in name}
        del index["feature_extractor"]
        (place / "model_index.json").write_text(json.dumps(index, indent=1))


def write_bundle(folder: Path, checkpoint: Path, pixels: int, sampler: str, steps: int, gate: int) -> None:
    """Our bundle of it."""
    size, plan = ("--size", f"{pixels}x{pixels}"), ("--sampler", sampler, "--steps", str(steps), "--m", str(gate))
    what = ("--model", MODEL, "--checkpoint", str(checkpoint), "--components", "text,denoiser,decoder", "--no-verify")
    subprocess.run(product("export_main", *what, *size, *plan, "--output", str(folder), "--quiet"), check=True)


def write_openvino(folder: Path, checkpoint: Path, pixels: int) -> None:
    """What OpenVINO GenAI reads: each component converted by OpenVINO from PyTorch, in float32, with the names and in
    the folders that optimum-intel gives them."""
    import openvino_tokenizers
    from diffusers import AutoencoderKL, UNet2DConditionModel

    with staging(folder) as place:
        text = CLIPTextModel.from_pretrained(checkpoint / "text_encoder").eval()
        width, given = text.config.hidden_size, {"input_ids": torch.zeros(1, 77, dtype=torch.int64)}
        model = converted(_encoded, text, given, ("last_hidden_state", "pooler_output"))
        _save(place / "text_encoder", model, checkpoint / "text_encoder")
        del text, model  # one component at a time
        vae = AutoencoderKL.from_pretrained(checkpoint / "vae").eval()
        small = pixels // 2 ** (len(vae.config.block_out_channels) - 1)
        latents = torch.zeros(1, vae.config.latent_channels, small, small)
        model = converted(_decoded, vae, {"latent_sample": latents}, ("sample",))
        _save(place / "vae_decoder", model, checkpoint / "vae")
        del vae, model
        unet = UNet2DConditionModel.from_pretrained(checkpoint / "unet").eval()
        given = {"sample": latents.repeat(2, 1, 1, 1), "timestep": torch.ones(1, dtype=torch.int64)}
        given["encoder_hidden_states"] = torch.zeros(2, 77, width)
        model = converted(_denoised, unet, given, ("out_sample",))
        _save(place / "unet", model, checkpoint / "unet")
        del unet, model
        tokenizer = openvino_tokenizers.convert_tokenizer(AutoTokenizer.from_pretrained(checkpoint / "tokenizer"))
        ov.save_model(tokenizer, place / "tokenizer" / "openvino_tokenizer.xml")
        for file in ("tokenizer/tokenizer_config.json", "scheduler/scheduler_config.json", "model_index.json"):
            (place / file).parent.mkdir(exist_ok=True)
            (place / file).write_bytes((checkpoint / file).read_bytes())


def _encoded(text: Any, ids: Tensor) -> tuple[Tensor, Tensor]:
    given = text(ids)
    return given.last_hidden_state, given.pooler_output


def _decoded(vae: Any, latents: Tensor) -> Tensor:
    decoded: Tensor = vae.decode(latents, return_dict=False)[0]
    return decoded


def _denoised(unet: Any, *given: Tensor) -> Tensor:
    denoised: Tensor = unet(*given, return_dict=False)[0]
    return denoised


def converted(
    call: Callable[..., Any], module: nn.Module, given: Mapping[str, Tensor], outputs: Sequence[str]
) -> ov.Model:
    """``call`` of a module and tensors as OpenVINO's model, of any batch; inputs are named as ``given`` has them."""

    class Called(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = module

        def forward(self, *tensors: Tensor) -> Any:
            return call(module, *tensors)

    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that shapes become constants is meant
        model = ov.convert_model(Called(), example_input=tuple(given.values()))
    for port, (name, tensor) in zip(model.inputs, given.items(), strict=True):
        port.get_tensor().set_names({name})
        port.get_node().set_friendly_name(name)
        port.get_node().set_partial_shape(ov.PartialShape([-1, *tensor.shape[1:]]))
    for port, name in zip(model.outputs, outputs, strict=True):
        port.get_tensor().set_names({name})
    model.validate_nodes_and_infer_types()
    return model


def _save(folder: Path, model: ov.Model, component: Path) -> None:
    ov.save_model(model, folder / "openvino_model.xml", compress_to_fp16=False)
    (folder / "config.json").write_bytes((component / "config.json").read_bytes())
