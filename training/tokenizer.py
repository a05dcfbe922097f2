"""A CLIP byte-pair vocabulary in which every caption word is one token and any other text still tokenizes.

Ids: 0..255 the bytes, 256..511 the bytes that end a word, then one id per merge, then the two specials.
"""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import Tokenizer, processors
from transformers import CLIPTokenizer

from training.grammar import vocabulary_words
from training.settings import MAX_TOKENS

BOS = "<|startoftext|>"
EOS = "<|endoftext|>"
_END = "</w>"


def _byte_symbols() -> list[str]:
    """The 256 printable stand-ins of byte-level BPE, indexed by byte."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    spare = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(spare)) for byte in range(256)]


def _merge(symbols: list[str], pair: tuple[str, str]) -> list[str]:
    merged: list[str] = []
    for symbol in symbols:
        if merged and (merged[-1], symbol) == pair:
            merged[-1] += symbol
        else:
            merged.append(symbol)
    return merged


def word_merges(words: list[str]) -> list[tuple[str, str]]:
    """Merges, by rank, that fuse each word to one symbol: earlier words first, each from the left."""
    merges: list[tuple[str, str]] = []
    for word in words:
        symbols = [*word[:-1], word[-1] + _END]
        for pair in merges:
            symbols = _merge(symbols, pair)
        while len(symbols) > 1:
            pair = (symbols[0], symbols[1])
            merges.append(pair)
            symbols = _merge(symbols, pair)
    return merges


def build_tokenizer() -> CLIPTokenizer:
    """The tokenizer that both text encoders use; pads with end-of-text to 48 ids."""
    symbols = _byte_symbols()
    merges = word_merges(vocabulary_words())
    tokens = [*symbols, *(symbol + _END for symbol in symbols), *(a + b for a, b in merges), BOS, EOS]
    vocab = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    return CLIPTokenizer(
        vocab=vocab, merges=merges, bos_token=BOS, eos_token=EOS, pad_token=EOS, unk_token=EOS,
        model_max_length=MAX_TOKENS,
    )  # fmt: skip


def save_tokenizer(tokenizer: CLIPTokenizer, folder: Path) -> None:
    """Write `folder` so that `transformers` and `tokenizers.Tokenizer.from_file` give the same 48 ids."""
    tokenizer.save_pretrained(folder)
    plain = Tokenizer.from_file(str(folder / "tokenizer.json"))
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    plain.post_processor = processors.RobertaProcessing((EOS, eos), (BOS, bos), False, False)
    plain.enable_truncation(max_length=MAX_TOKENS)
    plain.enable_padding(length=MAX_TOKENS, pad_id=eos, pad_token=EOS)
    plain.save(str(folder / "tokenizer.json"))
    vocab, merges = _tables(plain)
    (folder / "vocab.json").write_text(vocab, encoding="utf-8")
    (folder / "merges.txt").write_text(merges, encoding="utf-8")


def _tables(plain: Tokenizer) -> tuple[str, str]:
    """The contents of vocab.json and merges.txt."""
    model = json.loads(plain.to_str())["model"]
    pairs = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    return json.dumps(model["vocab"], ensure_ascii=False), "\n".join(["#version: 0.2", *pairs]) + "\n"
