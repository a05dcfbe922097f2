"""What a stranger's ``tokenizer.json`` may hold: what export writes, and nothing that the library trips over."""

from __future__ import annotations

import base64
import copy
import io
import json
import struct
import time
from collections.abc import Callable
from typing import Any

import pytest
import tokenizers

from tgate_engine.tokenizer_check import ENDS, ENDS_BEFORE, MOST_BYTES, check_tokenizer

Json = dict[str, Any]
CLIP_WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


def added(number: int, content: str, **fields: Any) -> Json:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": number, "content": content, **flags, "special": True, **fields}


def clip() -> Json:
    """As transformers' CLIPTokenizer is written, with a small vocabulary."""
    vocabulary = ["a", "r", "e", "d</w>", "a</w>", "re", "red</w>", "<|startoftext|>", "<|endoftext|>"]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [added(7, "<|startoftext|>"), added(8, "<|endoftext|>")],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "NFC"},
                {"type": "Replace", "pattern": {"Regex": r"\s+"}, "content": " "},
                {"type": "Lowercase"},
            ],
        },
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": CLIP_WORDS}, "behavior": "Removed", "invert": True},
                {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
            ],
        },
        "post_processor": {
            "type": "RobertaProcessing",
            "sep": ["<|endoftext|>", 8],
            "cls": ["<|startoftext|>", 7],
            "trim_offsets": False,
            "add_prefix_space": False,
        },
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": "<|endoftext|>",
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "</w>",
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {token: i for i, token in enumerate(vocabulary)},
            "merges": [["r", "e"], ["re", "d</w>"]],
        },
    }


def t5(charsmap: bytes | None = None) -> Json:
    """As transformers' T5Tokenizer is written, over prompts in lower case."""
    first: list[Json] = [{"type": "Lowercase"}, {"type": "Replace", "pattern": {"Regex": ENDS}, "content": ""}]
    if charsmap is not None:
        first.append({"type": "Precompiled", "precompiled_charsmap": base64.b64encode(charsmap).decode()})
    end = {"SpecialToken": {"id": "</s>", "type_id": 0}}
    places: dict[str, Json] = {name: {"Sequence": {"id": name, "type_id": 0}} for name in ("A", "B")}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [added(0, "<pad>"), added(1, "</s>"), added(2, "<unk>")],
        "normalizer": {"type": "Sequence", "normalizers": first},
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "WhitespaceSplit"},
                {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True},
            ],
        },
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [places["A"], end],
            "pair": [places["A"], end, places["B"], end],
            "special_tokens": {"</s>": {"id": "</s>", "ids": [1], "tokens": ["</s>"]}},
        },
        "decoder": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True},
        "model": {
            "type": "Unigram",
            "unk_id": 2,
            "vocab": [["<pad>", 0.0], ["</s>", 0], ["<unk>", 0.0], ["▁a", -1.0], ["▁red", -1.5], ["▁", -9.0]],
            "byte_fallback": False,
        },
    }


def charsmap(label: int = ord("x"), value: int = 0, texts: bytes = b"yz\0", *, offset: int = 1, leaf: int = 2) -> bytes:
    """A trie of one byte: unit 0 is the root, whose children begin at ``offset``; the leaf is ``leaf`` off its node."""
    units = [0] * 256
    units[0] = offset << 10
    if offset < 256:
        node = offset ^ label
        units[node] = label | 256 | leaf << 10
        if node ^ leaf < 256:
            units[node ^ leaf] = 1 << 31 | value
    return struct.pack("<I256I", 1024, *units) + texts


def check(data: Any) -> str:
    return check_tokenizer(json.dumps(data).encode())


PROMPTS = ("", "a red a", "  A  RED\t</s> <|endoftext|> ", "x" * 300, " " * 50 + "a" + " " * 50)


@pytest.mark.parametrize("data", [clip(), t5(), t5(charsmap())], ids=["clip", "t5", "t5-charsmap"])
def test_what_export_writes_goes_on_unchanged(data: Json) -> None:
    """Ids are those of the library on the file itself, in which the decoder and pairs of texts are not asked for."""
    plain = tokenizers.Tokenizer.from_str(json.dumps(data))
    checked = tokenizers.Tokenizer.from_str(check(data))
    for prompt in PROMPTS:
        assert checked.encode(prompt).ids == plain.encode(prompt).ids
        assert checked.encode(prompt).offsets == plain.encode(prompt).offsets
    assert check_tokenizer(check(data).encode()) == check(data)


def test_the_charsmap_of_the_example_does_something() -> None:
    """What the tests below break is read: x becomes yz."""
    tokenizer = tokenizers.Tokenizer.from_str(check(t5(charsmap())))
    assert tokenizer.normalizer.normalize_str("ax") == "ayz"


def test_a_published_charsmap_is_taken() -> None:
    """SentencePiece's own, as T5's file holds it."""
    sentencepiece = pytest.importorskip("sentencepiece")
    messages: Any = pytest.importorskip("sentencepiece.sentencepiece_model_pb2")
    model, out = messages.ModelProto(), io.BytesIO()
    lines = iter(["a red circle above a blue square"] * 20)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=lines, model_writer=out, vocab_size=30, hard_vocab_limit=False, minloglevel=2
    )
    model.ParseFromString(out.getvalue())
    published = model.normalizer_spec.precompiled_charsmap
    assert len(published) > 200_000
    assert tokenizers.Tokenizer.from_str(check(t5(published))).normalizer.normalize_str("ﷺ½") == "صلى الله عليه وسلم1⁄2"


@pytest.mark.parametrize(
    ("blob", "says"),
    [
        (b"", "trie takes 0 of 0 bytes"),
        (b"\xff" * 8, "trie takes 4294967295 of 8 bytes"),
        (charsmap()[:1000], "trie takes 1024 of 1000 bytes"),
        (struct.pack("<I", 4) + b"\0" * 8, "trie takes 4 of 12"),
        (charsmap(offset=2**20), "leads out of its trie"),
        (charsmap(leaf=2**20), "leads out of its trie"),
        (charsmap(value=2**30), "points beside its texts"),
        (charsmap(value=1, texts="é\0".encode()), "points beside its texts"),
        (charsmap(texts=b"\xff\0"), "not UTF-8"),
        (charsmap(texts=b"y" * 10**6 + b"\0"), "makes more than 64 bytes of a character"),
        (b"\0" * 2**21, "at most 1048576 are read"),
    ],
    ids=range(11),
)
def test_charsmaps_that_lead_astray(blob: bytes, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        check(t5(blob))


def test_a_trie_that_leads_in_a_circle_ends() -> None:
    """Every node its own child: no texts are reached, and the walk is over when all nodes are seen."""
    units = [(i & 255) | (i & 255) << 10 for i in range(256)]
    check(t5(struct.pack("<I256I", 1024, *units) + b"\0"))


def put(path: str, value: Any) -> Callable[[Json], None]:
    """Sets what is at ``a.b.0.c``."""

    def change(data: Json) -> None:
        *way, last = path.split(".")
        at: Any = data
        for part in way:
            at = at[int(part) if isinstance(at, list) else part]
        at[int(last) if isinstance(at, list) else last] = value

    return change


def nested(depth: int) -> Any:
    inner: Any = {"type": "NFC"}
    for _ in range(depth):
        inner = {"type": "Sequence", "normalizers": [inner]}
    return inner


def replaced(pattern: Any, content: str) -> Json:
    return {"type": "Replace", "pattern": pattern, "content": content}


HOSTILE: dict[str, tuple[Callable[[], Json], Callable[[Json], None], str]] = {
    "catastrophic regex": (clip, put("normalizer.normalizers.1.pattern", {"Regex": "(a+)+$"}), "does not write"),
    "catastrophic split": (clip, put("pre_tokenizer.pretokenizers.0.pattern", {"Regex": "(a+)+$"}), "Regex is"),
    "regex with other content": (clip, put("normalizer.normalizers.1.content", "x" * 10**6), "does not write"),
    "both patterns": (clip, put("normalizer.normalizers.1.pattern", {"Regex": r"\s+", "String": "a"}), "wanted is one"),
    "doubling": (clip, put("normalizer.normalizers.1", replaced({"String": "a"}, "aa")), "does not write"),
    "doubled spaces": (clip, put("normalizer.normalizers.1", replaced({"String": " "}, "\ue000  ")), "does not write"),
    "empty pattern": (clip, put("normalizer.normalizers.1", replaced({"String": ""}, "\ue000")), "1 to 256"),
    "private pattern": (clip, put("normalizer.normalizers.1", replaced({"String": "\ue000"}, "\ue000")), "does not"),
    "foreign normalizer": (clip, put("normalizer", {"type": "Prepend", "prepend": "x"}), "normalizer.type is Prepend"),
    "foreign model": (clip, put("model.type", "WordPiece"), "model.type is WordPiece, known is BPE or Unigram"),
    "type of another type": (clip, put("model.type", ["BPE"]), "model.type is"),
    "no model": (clip, put("model", None), "model is None"),
    "dropout": (clip, put("model.dropout", 0.5), "model.dropout is 0.5"),
    "unknown field": (clip, put("model.cache_capacity", 2**62), "model.cache_capacity is not known"),
    "prefix that cuts characters": (clip, put("model.continuing_subword_prefix", "é"), "prefix is é"),
    "merge out of vocabulary": (clip, put("model.merges.0", ["<|endoftext|>", "e"]), "merges name <|endoftext|>e"),
    "unknown unknown": (clip, put("model.unk_token", "nowhere"), "unk_token nowhere is not in"),
    "negative id": (clip, put("model.vocab.re", -1), "vocab.re is -1"),
    "huge id": (clip, put("model.vocab.re", 2**32 - 1), "vocab.re is 4294967295"),
    "long token": (clip, put("model.vocab." + "x" * 300, 9), "1 to 256 characters"),
    "flag as number": (clip, put("pre_tokenizer.pretokenizers.1.use_regex", 1), "use_regex is 1, known is False or"),
    "empty added token": (clip, put("added_tokens.0.content", ""), "content is , wanted is text"),
    "added token of spaces": (clip, put("added_tokens.0.content", " \t "), "wanted is more than spaces"),
    "special token that is none": (clip, put("post_processor.sep", ["x", 99]), "puts token 99 around a text"),
    "score that is none": (t5, put("model.vocab.3.1", float("nan")), "has the score nan"),
    "score without bounds": (t5, put("model.vocab.3.1", 1e300), "has the score"),
    "unknown beyond the end": (t5, put("model.unk_id", 6), "unk_id is 6, the vocabulary has 6 tokens"),
    "byte fallback": (t5, put("model.byte_fallback", True), "byte_fallback is True"),
    "text twice": (t5, put("post_processor.single.1", {"Sequence": {"id": "A", "type_id": 0}}), "more than once"),
    "second text": (t5, put("post_processor.single.0.Sequence.id", "B"), "id is B"),
    "special token that is missing": (t5, put("post_processor.special_tokens", {}), "which is not in special_tokens"),
    "many special tokens": (
        t5,
        put("post_processor.single", [{"Sequence": {"id": "A", "type_id": 0}}] * 99),
        "st 16",
    ),
    "ids of special tokens": (t5, put("post_processor.special_tokens.</s>.ids", []), "as many ids as names"),
    "other replacement": (t5, put("pre_tokenizer.pretokenizers.1.replacement", "__"), "replacement is __"),
    "nested": (t5, put("normalizer", nested(9)), "nested too deeply"),
    "escapes": (t5, put("model.type", "\x1b[2J\nx"), r"model.type is \\x1b\[2J\\nx, known"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_what_export_does_not_write_is_refused_by_its_place(name: str) -> None:
    make, change, says = HOSTILE[name]
    data = make()
    check(data)
    change(data)
    with pytest.raises(ValueError, match=says) as caught:
        check(data)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 400


def leaves(data: Any, way: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    return [path for key, value in items for path in ((*way, key), *leaves(value, (*way, key)))]


OTHER: list[Any] = [
    None,
    True,
    -1,
    0.5,
    2**63,
    10**400,
    float("inf"),
    "",
    "x" * 999,
    "\ud800",
    [],
    [[]],
    {},
    {"type": "NFC"},
]


@pytest.mark.parametrize("make", [clip, lambda: t5(charsmap())], ids=["clip", "t5"])
def test_every_leaf_of_every_other_type(make: Callable[[], Json]) -> None:
    """Each is refused in one line, or the library loads and runs it without a panic, which is no Exception."""
    tried, said = 0, set[str]()
    for way in leaves(make()):
        for value in (*OTHER, "left out"):
            data = copy.deepcopy(make())
            at: Any = data
            for part in way[:-1]:
                at = at[part]
            if value == "left out":
                del at[way[-1]]
            else:
                at[way[-1]] = value
            tried += 1
            try:
                text = check(data)
            except ValueError as error:
                said.add(str(error))
                continue
            try:
                tokenizer = tokenizers.Tokenizer.from_str(text)
                for prompt in PROMPTS[:3]:
                    tokenizer.encode(prompt)
            except Exception as error:
                pytest.fail(f"{way} = {value!r:.40}: {error}")
    assert tried > 1000
    assert all(line.isprintable() for line in said)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff\xfe",
        b"[" * 10**6,
        b'{"a":' * 10**5,
        b"9" * 5000,
        b"[]",
        b"null",
        b'"x"',
        b"{}",
        b" " * (MOST_BYTES + 1),
    ],
    ids=range(10),
)
def test_what_is_no_object_of_json(content: bytes) -> None:
    with pytest.raises(ValueError) as caught:
        check_tokenizer(content)
    assert str(caught.value).isprintable()


def test_a_name_that_stands_twice_is_read_once() -> None:
    """The last one counts in Python; the library never sees the first."""
    text = json.dumps(clip()).replace('"dropout": null', '"dropout": 0.9, "dropout": null')
    assert check_tokenizer(text.encode()).count("dropout") == 1


def test_textual_inversions_are_taken_and_their_number_is_bounded() -> None:
    """As export writes them out: a few of many vectors are taken, more than a prompt can afford are not."""

    def inverted(names: int, vectors: int) -> Json:
        data = clip()
        private = iter(range(0xE000, 0xF900))
        before, after = [], []
        for i in range(names):
            parts = [chr(next(private)) for _ in range(vectors)]
            before.append(replaced({"String": f"<{i}>"}, " ".join(parts)))
            after.append(replaced({"String": f"<{i}>"}, parts[0]))
            data["added_tokens"] += [added(len(data["added_tokens"]), p, normalized=True, special=False) for p in parts]
        data["normalizer"] = {"type": "Sequence", "normalizers": [*before, data["normalizer"], *after]}
        return data

    text = check(inverted(5, 75))
    written = tokenizers.Tokenizer.from_str(text).normalizer.normalize_str("a <3> B")
    assert len(written) == len("a  b") + 75 + 74
    with pytest.raises(ValueError, match=r"writes out 400 names of textual inversions, up to 51 times as long"):
        check(clip() | {"normalizer": _many(200, 77)})
    with pytest.raises(ValueError, match="use fewer of them"):
        check(clip() | {"normalizer": _many(4000, 1), "added_tokens": [added(i, f"<{i}>") for i in range(600)]})


def _many(names: int, vectors: int) -> Json:
    each = [replaced({"String": f"{i:03}"}, " ".join("\ue000" * vectors)) for i in range(names)]
    return {"type": "Sequence", "normalizers": each + each}


def test_the_ends_of_a_text_are_those_of_python() -> None:
    """Every space there is, on either side, and two in a row; the pattern of older bundles is taken, and this one used
    in its place."""
    data = t5()
    put("normalizer.normalizers.1.pattern", {"Regex": ENDS_BEFORE})(data)
    normalizer = tokenizers.Tokenizer.from_str(check(data)).normalizer
    spaces = [chr(code) for code in range(0x110000) if chr(code).isspace()]
    assert len(spaces) == 29
    for first in ("", *spaces):
        for second in ("", *spaces):
            for text in (f"{first}a b{second}", f"a{first}{second}", f"{first}{second}a", first + second):
                assert normalizer.normalize_str(text) == text.strip()


def test_the_ends_of_a_text_are_found_in_linear_time() -> None:
    """Spaces in the middle were each tried as the beginning of the end: seconds for 16 000."""
    data = t5()
    put("normalizer.normalizers.1.pattern", {"Regex": ENDS_BEFORE})(data)
    normalizer = tokenizers.Tokenizer.from_str(check(data)).normalizer
    begin = time.process_time()
    normalizer.normalize_str("a" + " " * 2**15 + "b")
    assert time.process_time() - begin < 1
