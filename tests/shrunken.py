"""Every published configuration as a whole checkpoint, every component of it narrow enough for two cores.

What is made smaller: channels, hidden widths, heads, layers, vocabularies, and all numbers that are sums of those. All
else stays as published: levels, blocks, patterns, activations, token ids, prompt lengths, schedulers, and what the
published files leave unsaid. Weights are random, written by diffusers and transformers themselves; ``config.json`` and
``model_index.json`` are then the published ones again. Tokenizers are of the published kind and files, their words few.

Weights are drawn so that activations stay of the order of one, and queries, keys and values tell their inputs apart:
as the classes initialise themselves, no prompt would matter.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import sentencepiece
import torch
import transformers
from diffusers.pipelines.kolors.text_encoder import ChatGLMModel

from tests.draw import draw
from tests.tiny_encoders import T5_WORDS, bert_tokenizer, chatglm_tokenizer, gemma_tokenizer, qwen_tokenizer
from tests.tiny_flow import Unguarded
from tests.tiny_models import END_TOKEN, _save_vocabulary, _vocabulary
from tgate_export.checkpoints import published

TEXT_DIVISOR = 32
"""Of every width that has to do with text, so that sums of them stay sums."""

CAPTIONS = tuple(
    f"a {size} {color} {shape}" for size in T5_WORDS[8:10] for color in T5_WORDS[1:4] for shape in T5_WORDS[4:6]
)
"""What the vocabularies of T5 are fitted to."""

# Modules and pipelines whose class in the published files is a name of old.
_NAMES = {"Transformer2DModel": "PixArtTransformer2DModel", "LuminaText2ImgPipeline": "LuminaPipeline"}


def write_shrunken(directory: Path, model: str) -> Path:
    """Write the checkpoint of ``model`` into ``directory``, new or empty; the same weights every time."""
    facts = published.facts(model)
    directory.mkdir(parents=True, exist_ok=True)
    vocabulary = _tokenizers(directory, facts)
    for name, config in facts["components"].items():
        folder = directory / name
        if name.startswith("tokenizer"):
            continue
        if name in ("scheduler", "feature_extractor", "image_processor"):
            file = "scheduler_config.json" if name == "scheduler" else "preprocessor_config.json"
            _write_json(folder / file, config)
            continue
        small = shrink(config, vocabulary)
        draw(_module(small), f"{model}/{name}").save_pretrained(folder, safe_serialization=True)
        _write_json(folder / "config.json", small)
    _write_json(directory / "model_index.json", facts["model_index"])
    return directory


def load_shrunken(directory: Path) -> Any:
    """diffusers' own pipeline of such a directory, in float32 on the CPU, silent, without what bundles do not have."""
    index = json.loads((directory / "model_index.json").read_text("utf-8"))
    without: dict[str, Any] = {name: None for name in ("safety_checker", "feature_extractor") if name in index}
    if (directory / "feature_extractor").is_dir():
        del without["feature_extractor"]
    if index["_class_name"] == "StableDiffusionXLPipeline":
        without["add_watermarker"] = False
    if index["_class_name"] == "Cosmos2TextToImagePipeline":
        without["safety_checker"] = Unguarded()
    loader = getattr(diffusers, _NAMES.get(index["_class_name"], index["_class_name"]))
    pipe = loader.from_pretrained(directory, dtype=torch.float32, local_files_only=True, **without)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def shrink(config: Mapping[str, Any], vocabulary: int) -> dict[str, Any]:
    """A component's configuration with its widths, heads and layers made small; no key is added or left out."""
    kind = str(config.get("_class_name") or config["model_type"])
    small = dict(config)
    for key, value in _SMALLER[kind].items():
        if small.get(key) is not None:
            small[key] = value(small[key])
    layers = small.get("layers_per_block")
    if isinstance(layers, int) and "reverse_transformer_layers_per_block" not in small:  # which tells them apart
        small["layers_per_block"] = 1
    for key in ("vocab_size", "padded_vocab_size"):
        if key in small:
            small[key] = vocabulary
    return small | {k: shrink(part, vocabulary) for k, part in small.items() if k in ("text_config", "vision_config")}


def _over(divisor: int) -> Any:
    """Divides a number or each of a list, to 1 at least."""

    def divide(value: Any) -> Any:
        return [divide(part) for part in value] if isinstance(value, list) else max(1, value // divisor)

    return divide


def _layers(value: Any) -> Any:
    """Two at most; the pattern of nested lists stays."""
    return [_layers(part) for part in value] if isinstance(value, list) else min(value, 2)


def _transformers(value: Any) -> Any:
    """In a U-Net, level by level: one, two and ten become one, one and two; the pattern of nested lists stays."""
    if isinstance(value, int):
        return min(value, 2)
    if any(isinstance(part, list) for part in value):
        return [[min(one, 2) for one in part] if isinstance(part, list) else part for part in value]
    return [1 + (part >= 10) for part in value]


def _unet_heads(value: Any) -> Any:
    """Heads of 64 channels were 5, 10, 20: as many fewer as there are fewer channels."""
    return _over(5)(value) if isinstance(value, list) else _over(4)(value)


_TEXT = _over(TEXT_DIVISOR)
_UNET = {
    "block_out_channels": _over(10),
    "attention_head_dim": _unet_heads,  # which for these networks are heads
    "num_attention_heads": _unet_heads,
    "transformer_layers_per_block": _transformers,
    "reverse_transformer_layers_per_block": _transformers,
    "cross_attention_dim": _TEXT,
    "encoder_hid_dim": _TEXT,
    "addition_time_embed_dim": _TEXT,
    "projection_class_embeddings_input_dim": _TEXT,
    "time_cond_proj_dim": _over(16),
}
_VAE = {"block_out_channels": lambda value: [max(32, channels // 8) for channels in value]}
_DIT = {
    "num_attention_heads": _over(4),
    "attention_head_dim": _over(6),
    "cross_attention_dim": _over(24),  # heads times their width
    "caption_channels": _TEXT,
    "num_layers": _layers,
}
_CLIP = {
    "hidden_size": _TEXT,
    "intermediate_size": _TEXT,
    "projection_dim": _TEXT,
    "num_attention_heads": _over(4),
    "num_hidden_layers": _layers,
}
_SANA = {
    "num_attention_heads": _over(10),
    "attention_head_dim": _over(4),
    "num_cross_attention_heads": _over(10),
    "cross_attention_head_dim": _over(4),
    "cross_attention_dim": _over(40),  # heads times their width
    "caption_channels": _TEXT,
    "num_layers": _layers,
}
_SD3 = {
    "num_attention_heads": _over(4),
    "attention_head_dim": _over(8),
    "caption_projection_dim": _TEXT,  # heads times their width
    "joint_attention_dim": _TEXT,
    "pooled_projection_dim": _TEXT,
    "num_layers": _layers,
}
_WAN = {
    "num_attention_heads": _over(6),
    "attention_head_dim": _over(8),
    "ffn_dim": _TEXT,
    "freq_dim": _over(8),
    "text_dim": _TEXT,
    "image_dim": _TEXT,
    "added_kv_proj_dim": _over(53),  # heads times their width
    "num_layers": _layers,
}
_LTX = {
    "num_attention_heads": _over(8),
    "attention_head_dim": _over(4),
    "cross_attention_dim": _TEXT,  # heads times their width
    "caption_channels": _TEXT,
    "num_layers": _layers,
}
_HUNYUAN = {
    "num_attention_heads": _over(4),
    "attention_head_dim": _over(11),
    "hidden_size": _over(44),  # heads times their width
    "cross_attention_dim": _TEXT,
    "cross_attention_dim_t5": _TEXT,
    "pooled_projection_dim": _TEXT,
    "num_layers": _layers,
}
_LUMINA = {
    "num_attention_heads": _over(4),
    "num_kv_heads": _over(4),
    "hidden_size": _over(12),  # heads times their width
    "multiple_of": _over(16),
    "cross_attention_dim": _TEXT,
    "num_layers": _layers,
}
_COSMOS = {
    "num_attention_heads": _over(8),
    "attention_head_dim": _over(8),
    "adaln_lora_dim": _over(16),
    "text_embed_dim": _TEXT,
    "num_layers": _layers,
}
_FLUX = {
    "num_attention_heads": _over(12),
    "attention_head_dim": _over(4),
    "axes_dims_rope": _over(4),
    "joint_attention_dim": _TEXT,
    "pooled_projection_dim": _TEXT,
    "num_layers": _layers,
    "num_single_layers": _layers,
}
_QWEN = {
    "num_attention_heads": _over(12),
    "attention_head_dim": _over(4),
    "axes_dims_rope": _over(4),
    "joint_attention_dim": _TEXT,
    "num_layers": _layers,
}
# Its layers are counted by a list beside their number, and so stay as many.
_QWEN_TEXT = {
    "hidden_size": _TEXT,
    "intermediate_size": _TEXT,
    "num_attention_heads": _over(4),
    "num_key_value_heads": _over(4),
    "rope_scaling": lambda scaling: {**scaling, "mrope_section": _over(8)(scaling["mrope_section"])},
    # What sees pictures:
    "depth": _layers,
    "num_heads": _over(8),
    "out_hidden_size": _TEXT,
}
_T5 = {
    "d_model": _TEXT,
    "d_ff": _TEXT,
    "d_kv": _over(2),  # heads times this is d_model, as in the published encoder
    "num_heads": _over(16),
    "num_layers": _layers,
    "num_decoder_layers": _layers,
}
_DC_AE = {
    **dict.fromkeys(("encoder_block_out_channels", "decoder_block_out_channels"), _over(16)),
    **dict.fromkeys(("encoder_layers_per_block", "decoder_layers_per_block"), _over(3)),
}
_CAUSAL = {"base_dim": _over(12), "num_res_blocks": _over(2)}
_SMALLER: Mapping[str, Mapping[str, Any]] = {
    "UNet2DConditionModel": _UNET,
    "UNetSpatioTemporalConditionModel": _UNET,
    "AutoencoderKL": _VAE,
    "AutoencoderKLTemporalDecoder": _VAE,
    "Transformer2DModel": _DIT,
    "LatteTransformer3DModel": _DIT,
    "SanaTransformer2DModel": _SANA,
    "SD3Transformer2DModel": _SD3,
    "WanTransformer3DModel": _WAN,
    "HunyuanDiT2DModel": _HUNYUAN,
    "LTXVideoTransformer3DModel": _LTX,
    "AutoencoderDC": _DC_AE,
    "AutoencoderKLLTXVideo": {
        **dict.fromkeys(("block_out_channels", "decoder_block_out_channels"), _over(16)),
        **dict.fromkeys(("layers_per_block", "decoder_layers_per_block"), _layers),
    },
    "FluxTransformer2DModel": _FLUX,
    "CosmosTransformer3DModel": _COSMOS,
    "LuminaNextDiT2DModel": _LUMINA,
    "QwenImageTransformer2DModel": _QWEN,
    "AutoencoderKLWan": _CAUSAL,
    "AutoencoderKLQwenImage": _CAUSAL,
    "bert": _CLIP,
    "chatglm": {
        "hidden_size": _TEXT,
        "ffn_hidden_size": _TEXT,
        "kv_channels": _over(4),
        "num_attention_heads": _over(8),
        "num_layers": _layers,
    },
    "clip_text_model": _CLIP,
    "gemma": {
        "hidden_size": _TEXT,
        "intermediate_size": _TEXT,
        "head_dim": _over(16),
        "num_attention_heads": _over(4),
        "num_hidden_layers": _layers,
    },
    "clip_vision_model": _CLIP,
    "gemma2": {
        "hidden_size": _TEXT,
        "intermediate_size": _TEXT,
        "head_dim": _over(16),
        "query_pre_attn_scalar": _over(16),
        "num_attention_heads": _over(4),
        "num_key_value_heads": _over(4),
        "num_hidden_layers": _layers,
    },
    "qwen2_5_vl": _QWEN_TEXT,
    "qwen2_5_vl_text": _QWEN_TEXT,
    "t5": _T5,
    "umt5": _T5,
}


def _module(config: Mapping[str, Any]) -> Any:
    """The component that diffusers or transformers make of a configuration."""
    if "_class_name" in config:
        name = str(config["_class_name"])
        return getattr(diffusers, _NAMES.get(name, name)).from_config(dict(config)).eval()
    name = config["architectures"][0]
    cls = ChatGLMModel if name == "ChatGLMModel" else getattr(transformers, name)
    return cls(cls.config_class.from_dict(dict(config))).eval()


_OWN = {"GemmaTokenizerFast": gemma_tokenizer, "BertTokenizer": bert_tokenizer, "ChatGLMTokenizer": chatglm_tokenizer}


def _tokenizers(directory: Path, facts: Mapping[str, Any]) -> int:
    """Write every tokenizer that the model has, and give the size of the largest vocabulary; 0 where it has none."""
    components, sizes = facts["components"], list[int]()
    for name in components:
        if not name.startswith("tokenizer"):
            continue
        folder, limit = directory / name, int(components[name].get("model_max_length", 0))
        folder.mkdir()
        cls = facts["model_index"][name][1]
        if cls == "CLIPTokenizer":
            second = name == "tokenizer_2" or components["text_encoder"]["hidden_act"] == "gelu"
            sizes.append(_write_clip(folder, limit, "!" if second else END_TOKEN))
        elif cls in ("T5Tokenizer", "T5TokenizerFast"):
            sizes.append(_write_t5(folder, limit))
        elif cls in _OWN:
            tokenizer = _OWN[cls]()
            tokenizer.save_pretrained(folder)
            sizes.append(len(tokenizer.get_vocab()))
        elif cls == "Qwen2Tokenizer":
            sizes.append(write_qwen(folder, limit))
        else:
            raise ValueError(f"no small {cls} here")
    return max(sizes, default=0)


def _write_clip(folder: Path, limit: int, pad: str) -> int:
    """As published with Stable Diffusion: vocabulary and merges, and no ``tokenizer.json``."""
    _save_vocabulary(folder)
    special = {"bos_token": "<|startoftext|>", "eos_token": END_TOKEN, "pad_token": pad, "unk_token": END_TOKEN}
    _write_json(folder / "special_tokens_map.json", special)
    config = {"add_prefix_space": False, "do_lower_case": True, "errors": "replace", "model_max_length": limit}
    _write_json(folder / "tokenizer_config.json", {**config, **special, "tokenizer_class": "CLIPTokenizer"})
    return len(_vocabulary()[0])


def _write_t5(folder: Path, limit: int) -> int:
    """As published with T5: a model of sentencepiece with the 100 extra ids behind it, and no ``tokenizer.json``."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([*CAPTIONS, "".join(map(chr, range(33, 127)))] * 3),
        model_writer=model,
        vocab_size=160,
        hard_vocab_limit=False,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        pad_piece="<pad>",
        character_coverage=1.0,
        minloglevel=2,
    )
    (folder / "spiece.model").write_bytes(model.getvalue())
    extra = [f"<extra_id_{i}>" for i in range(100)]
    special = {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>", "additional_special_tokens": extra}
    _write_json(folder / "special_tokens_map.json", special)
    config = {"extra_ids": 100, "model_max_length": limit, "sp_model_kwargs": {}, "tokenizer_class": "T5Tokenizer"}
    _write_json(folder / "tokenizer_config.json", {**config, **special})
    processor = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    return int(processor.vocab_size()) + len(extra) + 28  # published tables are larger than the vocabulary, too


def write_qwen(folder: Path, limit: int) -> int:
    """As published with Qwen-Image: vocabulary and merges, and no ``tokenizer.json``."""
    tokenizer = qwen_tokenizer()
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    _write_json(folder / "vocab.json", model["vocab"])
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n", "utf-8")
    special = {name: getattr(tokenizer, name) for name in ("eos_token", "pad_token", "unk_token")}
    added = {
        str(i): {"content": str(token), "special": token.special, **dict.fromkeys(_PLAIN_TOKEN, False)}
        for i, token in tokenizer.added_tokens_decoder.items()
    }
    config = {"added_tokens_decoder": added, "model_max_length": limit, "tokenizer_class": "Qwen2Tokenizer"}
    _write_json(folder / "tokenizer_config.json", {**config, **special})
    return len(tokenizer.get_vocab())


_PLAIN_TOKEN = ("lstrip", "normalized", "rstrip", "single_word")


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", "utf-8")
