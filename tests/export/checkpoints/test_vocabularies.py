"""Files of tokenizers: whatever stands in them ends in a tokenizer or in one line, not in a panic or a hang."""

from __future__ import annotations

import base64
import json
import os
import random
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers.convert_slow_tokenizer import import_protobuf

from tests.export.checkpoints.leaves import bounded
from tgate_engine.errors import ExportError
from tgate_export import tokenizers
from tgate_export.checkpoints.directory import DirectoryCheckpoint
from tgate_export.checkpoints.vocabularies import FILE_BYTES, checked_vocabulary
from tgate_export.families import MODELS, location

Change = Callable[[Any], Any]


@pytest.fixture(params=["mini-sdxl", "mini-pixart"])
def model(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def directory(model: str, tmp_path: Path) -> Path:
    """A copy of an embedded model's tokenizer, beside the configurations that it is loaded with."""
    root = tmp_path / "checkpoint"
    shutil.copytree(location(model), root, ignore=shutil.ignore_patterns("*.safetensors"))
    return root / "tokenizer"


def refused(directory: Path, model: str) -> str:
    with bounded(), pytest.raises(ExportError) as caught:
        tokenizers.load(MODELS[model].family, DirectoryCheckpoint(directory.parent), 0)
    line = str(caught.value)
    assert "\n" not in line
    assert str(directory.parent) in line
    assert len(line) < 600 + 2 * len(str(directory))
    return line


def change(path: Path, made: Change) -> None:
    content = json.loads(path.read_text("utf-8"))
    path.write_text(json.dumps(made(content)), "utf-8")


def set_(*path: Any, to: Any) -> Change:
    """Put ``to`` at a place of a document."""

    def made(document: Any) -> Any:
        place = document
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = to
        return document

    return made


def test_what_is_there_is_read(directory: Path, model: str) -> None:
    loaded = tokenizers.load(MODELS[model].family, DirectoryCheckpoint(directory.parent), 0)
    assert loaded("a red circle")["input_ids"]


def test_only_what_was_checked_is_handed_on(directory: Path) -> None:
    for name in ("tokenization_evil.py", "chat_template.jinja", "tekken.json", "tokenizer.model"):
        (directory / name).write_text("x")
    os.mkfifo(directory / "chat_template.json")
    with checked_vocabulary(directory) as checked:
        names = {path.name for path in checked.iterdir()}
        assert all((checked / name).read_bytes() == (directory / name).read_bytes() for name in names)
    assert names <= {"tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt"}
    assert not checked.exists()


NEVER = r"(a+)+$"
BOMB = "((((a{1,1000}){1,1000}){1,1000}){1,1000})"
CHARSMAP = base64.b64encode(struct.pack("<I", 4) + b"\0\0\0\0" + b"x" * 100_000).decode()
SHORT = base64.b64encode(struct.pack("<I", 2**31) + b"\0\0\0\0").decode()

LIBRARY: dict[str, tuple[Change, str]] = {
    "no object": (lambda d: [d], "an object is wanted"),
    "deep": (set_("normalizer", to=json.loads("[" * 500 + "]" * 500)), "deeper than"),
    "model without a type": (lambda d: {**d, "model": {}}, "model has no type"),
    "no model": (set_("model", to=None), "model = None"),
    "foreign model": (set_("model", "type", to="Wordless"), "model.type = 'Wordless'"),
    "foreign normalizer": (set_("normalizer", to={"type": "StripAccents"}), "normalizer.type"),
    "foreign part": (set_("pre_tokenizer", to={"type": "Sequence", "pretokenizers": [{"type": "Digits"}]}), "'Digits'"),
    "type of a list": (set_("decoder", to={"type": ["ByteLevel"]}), "decoder.type"),
    "endless regex": (
        set_(
            "pre_tokenizer", to={"type": "Split", "pattern": {"Regex": NEVER}, "behavior": "Removed", "invert": False}
        ),
        "which is none of CLIP's, T5's or Qwen's",
    ),
    "regex bomb": (
        set_("normalizer", to={"type": "Replace", "pattern": {"Regex": BOMB}, "content": ""}),
        "which is none of CLIP's, T5's or Qwen's",
    ),
    "regex of a number": (
        set_("normalizer", to={"type": "Replace", "pattern": {"Regex": 1}, "content": ""}),
        "regular expression 1",
    ),
    "map of long texts": (
        set_("normalizer", to={"type": "Precompiled", "precompiled_charsmap": CHARSMAP}),
        "64 bytes of a character",
    ),
    "map cut off": (
        set_("normalizer", to={"type": "Precompiled", "precompiled_charsmap": SHORT}),
        "2147483648 of them a trie",
    ),
    "map of a list": (set_("normalizer", to={"type": "Precompiled", "precompiled_charsmap": [1]}), "base64 is wanted"),
    "filled up beyond memory": (
        set_("padding", to={"strategy": {"Fixed": 2**60}, "pad_id": 0}),
        f"padding = {2**60}",
    ),
    "cut at": (set_("truncation", to={"max_length": 2**60}), "truncation = "),
    "truncation of text": (set_("truncation", to="text"), "truncation = 'text'"),
    "added tokens of text": (set_("added_tokens", to="text"), "added_tokens = 'text'"),
    "added token of a number": (set_("added_tokens", to=[1]), "added_tokens = 1"),
    "added token of nothing": (set_("added_tokens", to=[{"id": 1, "content": ""}]), "a token of 1 to"),
    "added token far away": (set_("added_tokens", to=[{"id": 2**40, "content": "x"}]), "1099511627776"),
    "too many added": (set_("added_tokens", to=[{"id": 1, "content": "x"}] * 20_000), "at most 16384"),
    "no vocabulary": (set_("model", "vocab", to=None), "vocabulary is null"),
    "vocabulary of text": (set_("model", "vocab", to="text"), "vocabulary is text"),
    "place of a token": (set_("model", "vocab", to={"a": "0"}), "'a' = '0'"),
    "negative place": (set_("model", "vocab", to={"a": -1}), "'a' = -1"),
    "score of text": (set_("model", "vocab", to=[["a", "0"]]), "a token and its score"),
    "merges of text": (set_("model", "merges", to="text"), "merges = 'text'"),
    "merge of three": (set_("model", "merges", to=[["a", "b", "c"]]), "two tokens"),
    "merge of a number": (set_("model", "merges", to=[1]), "two tokens"),
    "long token": (set_("model", "vocab", to={"a" * 10_000: 0}), "10000 characters"),
}


@pytest.mark.parametrize("case", LIBRARY)
def test_a_tokenizer_json_that_is_none(directory: Path, model: str, case: str) -> None:
    made, why = LIBRARY[case]
    change(directory / "tokenizer.json", made)
    line = refused(directory, model)
    assert "tokenizer.json" in line
    assert why in line


CONFIG: dict[str, tuple[Change, str]] = {
    "code": (set_("auto_map", to={"AutoTokenizer": ["evil.Tokenizer", None]}), "code of the checkpoint's own"),
    "another file": (set_("gguf_file", to="/etc/passwd"), "gguf_file = '/etc/passwd'"),
    "a vocabulary's path": (set_("vocab", to="/etc/passwd"), "vocab = '/etc/passwd'"),
    "merges' path": (set_("merges", to="/etc/passwd"), "merges = "),
    "arguments": (set_("init_inputs", to=["x"]), "init_inputs = ['x']"),
    "a processor": (set_("post_processor", to="x"), "post_processor = 'x'"),
    "a thousand million extra tokens": (set_("extra_ids", to=10**9), "extra_ids = 1000000000"),
    "extra tokens of text": (set_("extra_ids", to="100"), "extra_ids = '100'"),
    "unknown token of a number": (set_("unk_token", to=1), "unk_token = 1"),
    "end of an object": (set_("eos_token", to={"content": 1}), "eos_token"),
    "end of a list": (set_("eos_token", to=["</s>"]), "eos_token"),
    "flag of text": (set_("eos_token", to={"content": "</s>", "lstrip": "x"}), "eos_token.lstrip = 'x'"),
    "extra of a number": (set_("extra_special_tokens", to=[1]), "extra_special_tokens = 1"),
    "extra of text": (set_("extra_special_tokens", to="text"), "extra_special_tokens = 'text'"),
    "added of a list": (set_("added_tokens_decoder", to=[]), "added_tokens_decoder = []"),
    "added nowhere": (set_("added_tokens_decoder", to={"x": {"content": "a"}}), "added_tokens_decoder = 'x'"),
    "added far away": (set_("added_tokens_decoder", to={"9" * 30: {"content": "a"}}), "added_tokens_decoder"),
    "added of null": (set_("added_tokens_decoder", to={"1": None}), "1 = None"),
    "a limit of text": (set_("model_max_length", to="text"), "model_max_length = 'text'"),
    "another class": (set_("tokenizer_class", to={"x": 1}), "{'x': 1}"),
}


@pytest.mark.parametrize("case", CONFIG)
def test_a_configuration_that_is_none(directory: Path, model: str, case: str) -> None:
    made, why = CONFIG[case]
    change(directory / "tokenizer_config.json", made)
    if case == "a limit of text":
        with pytest.raises(ExportError, match="model_max_length = 'text'"):
            DirectoryCheckpoint(directory.parent).token_limit("tokenizer")
        return
    assert why in refused(directory, model)


@pytest.mark.parametrize("model", ["mini-sdxl"], indirect=True)
@pytest.mark.parametrize(
    ("name", "content", "why"),
    [
        ("vocab.json", "[]", "holds a list"),
        ("vocab.json", '{"a": 0, "a": 1}', "says 'a' twice"),
        ("vocab.json", '{"a": 1e400}', "has a = inf"),
        ("vocab.json", '{"a": 4294967296}', "'a' = 4294967296"),
        ("vocab.json", '{"a": [0]}', "'a' = [0]"),
        ("merges.txt", "#version: 0.2\na b\na b c\n", "line 3, holds ['a', 'b', 'c']"),
        ("merges.txt", "a", "line 1, holds ['a']"),
        ("merges.txt", "\udcff", "is not UTF-8"),
        ("special_tokens_map.json", '{"eos_token": 7}', "eos_token = 7"),
        ("special_tokens_map.json", '{"additional_special_tokens": {"a": []}}', "additional_special_tokens"),
        ("added_tokens.json", '{"a": "0"}', "'a' = '0'"),
        ("added_tokens.json", "[" * 10_000, "deeper than"),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_other_files_that_are_none(directory: Path, model: str, name: str, content: str, why: str) -> None:
    (directory / name).write_bytes(content.encode("utf-8", "surrogateescape"))
    line = refused(directory, model)
    assert name in line
    assert why in line


def test_what_is_no_file_is_refused(directory: Path, model: str) -> None:
    (directory / "tokenizer.json").unlink()
    os.mkfifo(directory / "tokenizer.json")
    assert "is a FIFO" in refused(directory, model)
    (directory / "tokenizer.json").unlink()
    (directory / "tokenizer.json").symlink_to("nowhere")
    assert "is not there" in refused(directory, model)
    (directory / "tokenizer.json").unlink()
    (directory / "tokenizer.json").symlink_to("/etc/passwd")
    assert "outside the checkpoint" in refused(directory, model)
    (directory / "tokenizer.json").unlink()
    with (directory / "tokenizer.json").open("wb") as file:
        file.truncate(1 << 40)
    assert f"more than {FILE_BYTES} bytes" in refused(directory, model)


def test_a_directory_without_a_vocabulary(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="holds no vocabulary"), checked_vocabulary(tmp_path):
        pass


def pieces(**normalizer: Any) -> bytes:
    """A file of SentencePiece."""
    made: Any = import_protobuf().ModelProto()
    for piece in ("<pad>", "</s>", "<unk>", "▁a", "b"):
        made.pieces.add(piece=piece, score=-1.0)
    for name, value in normalizer.items():
        setattr(made.normalizer_spec, name, value)
    content: bytes = made.SerializeToString()
    return content


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"\xff" * 100, "is no model of SentencePiece"),
        (b"", "has 0 pieces"),
        (pieces(precompiled_charsmap=struct.pack("<I", 2**31)), "a trie; it is damaged"),
        (pieces(precompiled_charsmap=struct.pack("<I", 4) + b"\0" * 4 + b"x" * 10_000), "64 bytes of a character"),
    ],
    ids=["noise", "empty", "trie", "texts"],
)
def test_a_model_of_sentencepiece_that_is_none(tmp_path: Path, content: bytes, why: str) -> None:
    (tmp_path / "spiece.model").write_bytes(content)
    with pytest.raises(ExportError, match=why), checked_vocabulary(tmp_path):
        pass


def test_a_model_of_sentencepiece_is_let_through(tmp_path: Path) -> None:
    (tmp_path / "spiece.model").write_bytes(pieces())
    with checked_vocabulary(tmp_path) as checked:
        assert (checked / "spiece.model").read_bytes() == pieces()


def test_a_vocabulary_is_the_one_that_its_class_reads(tmp_path: Path) -> None:
    """ChatGLM's has a name under which others have something lying beside theirs; only that class is given it."""
    (tmp_path / "tokenizer.model").write_bytes(pieces())
    with pytest.raises(ExportError, match="holds no vocabulary"), checked_vocabulary(tmp_path):
        pass
    with checked_vocabulary(tmp_path, ("tokenizer.model",)) as checked:
        assert (checked / "tokenizer.model").read_bytes() == pieces()
    (tmp_path / "tokenizer.model").write_bytes(b"\xff" * 100)
    with (
        pytest.raises(ExportError, match="is no model of SentencePiece"),
        checked_vocabulary(tmp_path, ("tokenizer.model",)),
    ):
        pass


def test_damaged_files_are_read_or_refused(directory: Path, model: str) -> None:
    """Thirty of each: bytes of all kinds changed, where only the library could find fault."""
    path, generator = directory / "tokenizer.json", random.Random(1)
    content = path.read_bytes()
    family, checkpoint = MODELS[model].family, DirectoryCheckpoint(directory.parent)
    refusals = 0
    for _ in range(30):
        damaged = bytearray(content)
        for _ in range(generator.choice((1, 3))):
            damaged[generator.randrange(len(damaged))] = generator.choice(b'0123456789"{}[],:truefalsenull')
        path.write_bytes(damaged)
        try:
            with bounded():
                tokenizers.load(family, checkpoint, 0)
        except ExportError as error:
            refusals += "\n" not in str(error)
    assert refusals > 10
