"""Text and image encoders of the tiny checkpoints in ``tests/tiny_families.py``."""

from __future__ import annotations

import functools
import io
import math
import tempfile
from pathlib import Path
from typing import Any

import sentencepiece
import torch
from diffusers.pipelines.kolors.text_encoder import ChatGLMConfig, ChatGLMModel
from diffusers.pipelines.kolors.tokenizer import ChatGLMTokenizer
from tokenizers import pre_tokenizers
from transformers import (
    BertConfig,
    BertModel,
    BertTokenizer,
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModel,
    CLIPVisionModelWithProjection,
    Gemma2Config,
    Gemma2Model,
    GemmaConfig,
    GemmaModel,
    GemmaTokenizer,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
    UMT5Config,
    UMT5EncoderModel,
)

from tests.draw import draw
from tests.tiny_models import BEGIN_TOKEN, END_TOKEN, _spread_text, _vocabulary

# Words with a token of their own; all else goes letter by letter.
T5_WORDS = ("a", "red", "blue", "green", "circle", "square", "above", "below", "large", "small", "photo", "of")


def clip(width: int, length: int, second: bool) -> dict[str, Any]:
    """CLIP as in SD 1.5, or as in SD 2.1 if ``second``: another activation, and padding with "!"."""
    vocabulary, merges = _vocabulary()
    config = CLIPTextConfig(
        vocab_size=len(vocabulary),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=length,
        hidden_act="gelu" if second else "quick_gelu",
        bos_token_id=vocabulary[BEGIN_TOKEN],
        eos_token_id=vocabulary[END_TOKEN],
        pad_token_id=vocabulary[END_TOKEN],
    )
    encoder = CLIPTextModel(config)
    _spread_text(encoder)
    pad = "!" if second else END_TOKEN
    tokenizer = CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=length, pad_token=pad)
    return {"text_encoder": encoder, "tokenizer": tokenizer}


def clip_with_projection(width: int, pooled: int, seed: str) -> dict[str, Any]:
    """CLIP as in Stable Diffusion 3: its pooled text is projected."""
    parts = clip(width, length=24, second=pooled != 8)
    config = CLIPTextConfig(**{**parts["text_encoder"].config.to_dict(), "projection_dim": pooled})
    return {**parts, "text_encoder": draw(CLIPTextModelWithProjection(config).eval(), seed)}


def clip_vision(width: int, side: int, seed: str) -> dict[str, Any]:
    """CLIP's vision model as in Wan 2.1: three layers, of which the last is not read."""
    config = CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=side,
        patch_size=side // 4,
        hidden_act="gelu",
    )
    processor = CLIPImageProcessor(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    return {"image_encoder": draw(CLIPVisionModel(config).eval(), seed), "image_processor": processor}


def t5(width: int) -> dict[str, Any]:
    """T5 v1.1 in small. Its own initialisation already tells prompts apart."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((f"▁{word}", -1.0) for word in T5_WORDS)]
    pieces += [("▁", -10.0), *((chr(code), -10.0) for code in range(33, 127))]
    tokenizer = T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=512)
    config = T5Config(
        vocab_size=len(pieces),
        d_model=width,
        d_kv=8,
        d_ff=2 * width,
        num_layers=2,
        num_heads=2,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
    )
    return {"text_encoder": T5EncoderModel(config), "tokenizer": tokenizer}


def bert(width: int, seed: str) -> dict[str, Any]:
    """BERT in small."""
    tokenizer = bert_tokenizer()
    config = BertConfig(
        vocab_size=len(tokenizer.get_vocab()),
        hidden_size=width,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=2 * width,
        max_position_embeddings=80,
    )
    return {"text_encoder": draw(BertModel(config).eval(), seed), "tokenizer": tokenizer}


def bert_tokenizer() -> Any:
    """BERT's kind of tokenizer: letters, whole and within words, and the words of T5's."""
    letters = [chr(code) for code in range(97, 123)]
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{letter}" for letter in letters)]
    tokens += [word for word in T5_WORDS if word not in tokens]
    return BertTokenizer(vocab={token: i for i, token in enumerate(tokens)}, model_max_length=77)


def chatglm(width: int, seed: str, **more: Any) -> dict[str, Any]:
    """ChatGLM in small; ``more``: what else its configuration says."""
    tokenizer = chatglm_tokenizer()
    config = ChatGLMConfig(
        num_layers=3,
        padded_vocab_size=tokenizer.vocab_size,
        hidden_size=width,
        ffn_hidden_size=2 * width,
        kv_channels=width // 4,
        num_attention_heads=4,
        seq_length=300,
        original_rope=True,
        **more,
    )
    return {"text_encoder": draw(ChatGLMModel(config).eval(), seed), "tokenizer": tokenizer}


def chatglm_tokenizer() -> Any:
    """ChatGLM's kind of tokenizer: pairs of letters, the words of T5's, and its special tokens behind them."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "tokenizer.model"
        file.write_bytes(_pairs_of_letters())
        tokenizer = ChatGLMTokenizer(str(file))

    def save(directory: str, filename_prefix: str | None = None) -> tuple[str]:  # its own copies a file that is gone
        target = Path(directory) / "tokenizer.model"
        target.write_bytes(_pairs_of_letters())
        return (str(target),)

    tokenizer.save_vocabulary = save
    return tokenizer


@functools.cache
def _pairs_of_letters() -> bytes:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([" ".join(T5_WORDS), "".join(map(chr, range(33, 127)))] * 5),
        model_writer=model,
        model_type="bpe",
        vocab_size=150,
        character_coverage=1.0,
        minloglevel=2,
    )
    return model.getvalue()


def umt5(width: int, seed: str) -> dict[str, Any]:
    """UMT5 in small, which has a table of places in every layer; its tokenizer is T5's."""
    parts = t5(width)
    known = parts["text_encoder"].config.to_dict()
    names = ("vocab_size", "d_model", "d_kv", "d_ff", "num_layers", "num_heads", "feed_forward_proj")
    config = UMT5Config(**{name: known[name] for name in names})
    return {**parts, "text_encoder": draw(UMT5EncoderModel(config).eval(), seed)}


def image_encoder(width: int) -> Any:
    encoder = CLIPVisionModelWithProjection(
        CLIPVisionConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=224,  # the pipeline resizes to this, whatever the configuration
            patch_size=56,
            projection_dim=width,
            hidden_act="gelu",
        )
    )
    with torch.no_grad():
        for name, parameter in encoder.named_parameters():
            if name.endswith(("patch_embedding.weight", "visual_projection.weight")):
                parameter.normal_(std=1.5 / math.sqrt(parameter[0].numel()))
    return encoder


def gemma(width: int, seed: str, *, first: bool = False) -> dict[str, Any]:
    """Gemma 2 in small, or Gemma, the ``first``."""
    tokenizer = gemma_tokenizer()
    options = {
        "vocab_size": len(tokenizer.get_vocab()),
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
    }
    model = (
        GemmaModel(GemmaConfig(**options)) if first else Gemma2Model(Gemma2Config(**options, query_pre_attn_scalar=8))
    )
    return {"text_encoder": draw(model.eval(), seed), "tokenizer": tokenizer}


def qwen(width: int, seed: str) -> dict[str, Any]:
    """Qwen2.5-VL in small, of which a prompt runs the text's part."""
    tokenizer = qwen_tokenizer()
    tokens = len(tokenizer.get_vocab())
    text = {
        "vocab_size": tokens,
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 2048,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e4,
            "mrope_section": [width // 4 - 2, 1, 1],  # of half a head
        },
    }
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": width}
    seen = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    ids = dict.fromkeys(seen, tokens - 1)  # no prompt has it
    config = Qwen2_5_VLConfig(text_config=text, vision_config={**vision, "fullatt_block_indexes": [0]}, **ids)
    return {"text_encoder": draw(Qwen2_5_VLForConditionalGeneration(config).eval(), seed), "tokenizer": tokenizer}


def qwen_tokenizer() -> Any:
    """Qwen's kind of tokenizer: bytes as letters, with the words of T5's and a space before each."""
    vocabulary = {token: i for i, token in enumerate(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])}
    merges = []
    for letter in sorted(pre_tokenizers.ByteLevel.alphabet()):
        vocabulary[letter] = len(vocabulary)
    for word in T5_WORDS:
        whole = "\u0120"  # a space
        for letter in word:
            if whole + letter not in vocabulary:
                merges.append((whole, letter))
                vocabulary[whole + letter] = len(vocabulary)
            whole += letter
    return Qwen2Tokenizer(
        vocab={**vocabulary, "<|vision_pad|>": len(vocabulary)},
        merges=merges,
        extra_special_tokens=["<|im_start|>", "<|im_end|>"],
    )


def gemma_tokenizer() -> Any:
    """Gemma's kind of tokenizer, with the words of T5's: bytes where it has no letter, and no space before a text."""
    letters = ["▁", "\n", *(chr(code) for code in range(33, 127))]
    tokens = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *(f"<0x{byte:02X}>" for byte in range(256)), *letters]
    merges = []
    for word in T5_WORDS:
        whole = "▁"
        for letter in word:
            if whole + letter not in tokens:
                merges.append((whole, letter))
                tokens.append(whole + letter)
            whole += letter
    return GemmaTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=merges, padding_side="right")
