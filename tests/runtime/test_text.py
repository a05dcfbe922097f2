"""A prompt becomes ids as the tokenizer's own library cuts them, and what was cut is quoted."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
import struct
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file
from tokenizers import models, pre_tokenizers, processors

from tests import toy_model
from tests.toy_bundle import edit_manifest
from tests.toy_model import LENGTH, WORDS
from tgate_engine.errors import BundleError, EngineError, RequestError
from tgate_export.tokenizers import token_ids
from tgate_runtime.request import MOST_CHARACTERS
from tgate_runtime.session import Session
from tgate_runtime.text import TextEncoder


@pytest.fixture(scope="module")
def encoder(session: Session) -> TextEncoder:
    return TextEncoder(session)


def ids(encoder: TextEncoder, prompt: str, number: int = 0) -> list[int]:
    """What a tokenizer gives the graph."""
    spec = encoder._session.manifest.tokenizers[number]
    row, _ = encoder._tokenize(encoder._tokenizers[number], spec, prompt)
    assert row.dtype == np.int64
    assert row.shape == (1, spec.length)
    return [int(i) for i in row[0]]


def words(*names: str) -> list[int]:
    return [WORDS.index(name) for name in names]


def test_ids_are_filled_up_with_each_tokenizers_padding(encoder: TextEncoder) -> None:
    assert ids(encoder, "a red circle") == words("<s>", "a", "red", "circle", "</s>") + [0] * 3
    assert ids(encoder, "a red circle", 1) == words("<s>", "a", "red", "circle", "</s>") + [2] * 3
    assert ids(encoder, "") == words("<s>", "</s>") + [0] * 6


def test_what_is_encoded_is_what_the_graph_makes_of_the_ids(encoder: TextEncoder) -> None:
    weights = toy_model.weights()
    encoded = encoder.encode("a red circle")
    row = ids(encoder, "a red circle")
    np.testing.assert_array_equal(encoded.tensors["text"], weights["embed.0"][row][np.newaxis])
    pooled = weights["embed.1"][ids(encoder, "a red circle", 1)].mean(axis=0, keepdims=True)
    np.testing.assert_allclose(encoded.tensors["pooled"], pooled, rtol=1e-6)
    assert encoded.cut == ""


@pytest.mark.parametrize(
    ("prompt", "cut"),
    [
        ("a large red circle above a", ""),
        ("A large red circle above a  small Blue, square", "small Blue, square"),
        ("a large red circle above a  blue", "blue"),
        ("ä ö ü ß é 円 红 blau", "红 blau"),
        ("🟥 🟦 🟥 🟦 🟥 🟦 🔵🔴", "🔵🔴"),
        ("a\nlarge\tred circle above a small\n blue ", "small\n blue"),
    ],
)
def test_what_does_not_fit_is_quoted_as_it_was_written(encoder: TextEncoder, prompt: str, cut: str) -> None:
    encoded = encoder.encode(prompt)
    assert encoded.cut == cut
    assert ids(encoder, prompt)[-1] == WORDS.index("</s>" if len(prompt.split()) >= LENGTH - 2 else "<pad>")
    kept = prompt[: len(prompt.rstrip()) - len(cut)] if cut else prompt
    for name, values in encoder.encode(kept).tensors.items():
        np.testing.assert_array_equal(encoded.tensors[name], values)


def with_tokenizer(source: Path, target: Path, tokenizer: Any, **fields: Any) -> Path:
    """The toy with another first tokenizer."""
    shutil.copytree(source, target)
    tokenizer.save(str(target / "tokenizer" / "0.json"))

    def edit(data: dict[str, Any]) -> None:
        data["tokenizers"][0].update(fields)
        content = (target / "tokenizer" / "0.json").read_bytes()
        data["files"]["tokenizer/0.json"] = {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}

    edit_manifest(target, edit)
    return target


def template(single: str) -> Any:
    """A tokenizer of the toy's words, with those special tokens."""
    tokenizer = tokenizers.Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if single:
        special = [(token, WORDS.index(token)) for token in ("<s>", "</s>") if token in single]
        tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=special)
    return tokenizer


LONG = "a red circle above a blue square a small circle"


@pytest.mark.parametrize("single", ["<s> $A </s>", "$A </s>", "<s> $A", "$A", "", "<s> <s> $A </s>"])
def test_a_long_prompt_is_cut_by_the_tokenizers_own_rule(toy_path: Path, tmp_path: Path, single: str) -> None:
    """Whatever special tokens it adds: as many of its words as fit beside them, the same as at export."""
    tokenizer = template(single)
    path = with_tokenizer(toy_path, tmp_path / "toy", tokenizer)
    with Session.open(path, plans=[], threads=1) as session:
        encoder = TextEncoder(session)
        special = [token for token in single.split() if token != "$A"]
        room = LENGTH - len(special)
        kept, lost = LONG.split()[:room], LONG.split()[room:]
        at = special.index("</s>") if "</s>" in special else len(special)
        expected = words(*special[:at], *kept, *special[at:])
        assert ids(encoder, LONG) == expected
        assert encoder._tokenize(encoder._tokenizers[0], session.manifest.tokenizers[0], LONG)[1] == " ".join(lost)
        tokenizer.enable_truncation(LENGTH)
        assert expected == tokenizer.encode(LONG).ids


@pytest.mark.parametrize("single", ["<s> $A </s>", "$A </s>", "$A"])
@pytest.mark.parametrize("prompt", ["", "a red circle", LONG, LONG + " nowhere"])
def test_export_encodes_the_same_ids_ahead_of_time(toy_path: Path, tmp_path: Path, single: str, prompt: str) -> None:
    path = with_tokenizer(toy_path, tmp_path / "toy", template(single))
    with Session.open(path, plans=[], threads=1) as session:
        ahead = token_ids(path, session.manifest.tokenizers, prompt)
        for number in range(2):
            assert ahead[f"ids.{number}"].tolist() == [ids(TextEncoder(session), prompt, number)]


def test_truncation_and_padding_of_the_file_do_not_count(toy_path: Path, tmp_path: Path) -> None:
    """The manifest says how long ids are, and what fills them up."""
    tokenizer = template("<s> $A </s>")
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=50, pad_id=9)
    path = with_tokenizer(toy_path, tmp_path / "toy", tokenizer)
    with Session.open(path, plans=[], threads=1) as session:
        row = ids(TextEncoder(session), "a red circle")
    assert row == words("<s>", "a", "red", "circle", "</s>") + [0] * 3


@pytest.mark.parametrize("prompt", ["\ud800", "a \udfff b"])
def test_text_that_is_no_unicode(encoder: TextEncoder, prompt: str) -> None:
    with pytest.raises(RequestError, match=r"must be text in valid Unicode, got '.*ud"):
        encoder.encode(prompt)


def test_a_bundle_without_a_text_graph(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Session, "graph", lambda *_: None)
    with pytest.raises(BundleError, match=r"has no text encoder \(--components\); export it with one"):
        TextEncoder(session)


@pytest.fixture
def damaged(toy_path: Path, tmp_path: Path) -> Iterator[Session]:
    path = Path(shutil.copytree(toy_path, tmp_path / "toy"))
    edit_manifest(path, lambda d: d["tokenizers"][1].update(file="full.onnx"))
    with Session.open(path, plans=[], threads=1) as session:
        yield session


def test_a_file_that_is_no_tokenizer(damaged: Session) -> None:
    with pytest.raises(BundleError, match=r"full\.onnx is not a tokenizer \(.*\); export the bundle again") as error:
        TextEncoder(damaged)
    assert "\n" not in str(error.value)


def vanishing(data: dict[str, Any]) -> None:
    """A character map of which z becomes nothing, and a token of that alone, for which the library panics."""
    units = [0] * 256
    units[0], node = 1 << 10, 1 ^ ord("z")
    units[node], units[node ^ 2] = ord("z") | 256 | 2 << 10, 1 << 31
    blob = struct.pack("<I256I", 1024, *units) + b"\0"
    data["normalizer"] = {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(blob).decode()}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "special"), False)
    data["added_tokens"] = [{"id": 12, "content": "zz", "normalized": True, **flags}]


def with_json(source: Path, target: Path, change: Callable[[dict[str, Any]], object], **fields: Any) -> Path:
    """The toy with a first tokenizer that a mischievous hand has changed."""
    data = json.loads(template("<s> $A </s>").to_str())
    change(data)

    class Written:
        def save(self, path: str) -> None:
            Path(path).write_text(json.dumps(data), encoding="utf-8")

    return with_tokenizer(source, target, Written(), **fields)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            lambda d: d.update(normalizer={"type": "Replace", "pattern": {"Regex": "(a+)+$"}, "content": ""}),
            "does not write",
        ),
        (lambda d: d["model"].update(unk_token="nowhere"), "unk_token nowhere is not in the vocabulary"),
        (lambda d: d["post_processor"].update(special_tokens={}), "not in special_tokens"),
        (lambda d: d["post_processor"].update(single=d["post_processor"]["single"] * 5), "more than once"),
        (lambda d: d["added_tokens"].append({"id": 0, "content": "x"}), "single_word is missing"),
        (vanishing, r"its normalizer leaves nothing of the token zz"),
        (lambda d: d["model"]["vocab"].clear(), "wanted is an object of 1 to"),
        (lambda d: d.update(model={"type": "WordPiece", "vocab": {}}), "model.type is WordPiece"),
    ],
    ids=range(8),
)
def test_hostile_tokenizers_are_refused_when_they_are_loaded(
    toy_path: Path, tmp_path: Path, change: Any, says: str
) -> None:
    path = with_json(toy_path, tmp_path / "toy", change)
    with Session.open(path, plans=[], threads=1) as session:
        with pytest.raises(BundleError, match=says) as caught:
            TextEncoder(session)
        assert re.fullmatch(r"\S+/0\.json is not a tokenizer \(.*\); export the bundle again", str(caught.value))


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"length": 2}, "puts 2 tokens around a prompt, and 2 fit"),
        ({"length": 9}, r"gives 9 tokens as ids\.0, where the text graph takes int64 \[1, 8\]"),
        ({"pad_id": 12}, "padding is token 12, which it does not have"),
        ({"pad_id": 2**62}, "padding is token 4611686018427387904"),
    ],
)
def test_a_manifest_that_does_not_fit_its_tokenizer(
    toy_path: Path, tmp_path: Path, fields: dict[str, int], says: str
) -> None:
    path = with_json(toy_path, tmp_path / "toy", lambda _: None, **fields)
    opened = Session.open(path, plans=[], threads=1)
    with opened as session, pytest.raises(BundleError, match=says):
        TextEncoder(session)


def test_a_token_beyond_the_embeddings_is_told_by_the_engine(toy_path: Path, tmp_path: Path) -> None:
    """The manifest does not say how many there are; ONNX Runtime looks."""
    path = with_json(toy_path, tmp_path / "toy", lambda d: d["model"]["vocab"].update(far=10**5))
    with Session.open(path, plans=[], threads=1) as session:
        encoder = TextEncoder(session)
        encoder.encode("a red circle")
        with pytest.raises(EngineError) as caught:
            encoder.encode("far away")
        assert str(caught.value).isprintable()


class PanicException(BaseException):
    """As the library's own: no Exception, and of a module that cannot be imported."""


@pytest.mark.parametrize("error", [PanicException("range end \x1b[2J"), Exception("no [UNK]")])
def test_a_panic_of_the_library_is_one_line(encoder: TextEncoder, error: BaseException) -> None:
    class Raising:
        def __init__(self, error: BaseException) -> None:
            self.error = error

        def encode(self, _: str) -> Any:
            raise self.error

    spec = encoder._session.manifest.tokenizers[0]
    panics: Any = Raising(error)
    with pytest.raises(RequestError, match=r"the prompt cannot be tokenized \(.*\); write it differently") as caught:
        encoder._tokenize(panics, spec, "a")
    assert str(caught.value).isprintable()
    interrupted: Any = Raising(KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        encoder._tokenize(interrupted, spec, "a")


def test_the_length_of_a_prompt_is_bounded_before_it_is_tokenized(encoder: TextEncoder) -> None:
    encoder.encode("a" * MOST_CHARACTERS)
    begin = time.process_time()
    with pytest.raises(RequestError, match="the prompt has 100000000 characters, at most 32768 are read"):
        encoder.encode("a" * 10**8)
    assert time.process_time() - begin < 1


@pytest.mark.parametrize(
    "prompt", ["\0", "a\0b", "\x1b[2J", "\u202e", "\ufdd0\uffff", "\U0010ffff", "\ue000", "a" * 5000]
)
def test_odd_characters_are_words_like_others(encoder: TextEncoder, prompt: str) -> None:
    assert len(ids(encoder, prompt)) == LENGTH


def test_text_that_an_encoder_makes_nothing_of_is_refused(toy_path: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(toy_path, tmp_path / "toy"))
    weights = path / "weights.safetensors"
    tensors = load_file(weights)
    tensors["w.embed.0"][WORDS.index("red")] = [np.inf, np.nan, 1, 2]
    save_file(tensors, weights)
    with Session.open(path, check_digests=False, plans=[], threads=1) as session:
        encoder = TextEncoder(session)
        encoder.encode("a blue circle")
        with pytest.raises(EngineError, match=r"the text encoder's text of this prompt: 2 of 32 values are not finite"):
            encoder.encode("a red circle")


def test_many_threads_encode_what_one_does(encoder: TextEncoder) -> None:
    prompts = ["red", "blue circle", "a", LONG] * 8
    alone: list[NDArray[Any]] = [encoder.encode(prompt).tensors["text"] for prompt in prompts]
    with ThreadPoolExecutor(8) as pool:
        for encoded, expected in zip(pool.map(encoder.encode, prompts), alone, strict=True):
            np.testing.assert_array_equal(encoded.tensors["text"], expected)


# --- what other programs read in a prompt -------------------------------------------------------

WEIGHTS = (
    "a (green:1.5) star",
    "(a large green star : .8), small",
    "((green)) star",
    "a (green star)++",
    "a (green star)1.3",
    "a star++",
    "a star\nBREAK\na circle",
    "a star, BREAK, a circle",
)
PLAIN = (
    "a (green) star [and] {one} (more)",
    "a photo (16:9)",
    "a clock (at 10:30), 3 : 2.5",
    "(John 3:16.5)",
    "a book on C++ and Lua--",
    "a sign that says BREAK",
    "f((x), (y)), e^(-1.5)",
    "a <b> tag, <3, a -> b",
    "(red: 2), (f/2.8)",
)


@pytest.fixture
def fresh(toy_path: Path) -> Iterator[TextEncoder]:
    with Session.open(toy_path, plans=[], threads=1) as session:
        yield TextEncoder(session)


@pytest.mark.parametrize("prompt", WEIGHTS)
def test_weights_of_other_programs_are_told_once(
    fresh: TextEncoder, caplog: pytest.LogCaptureFixture, prompt: str
) -> None:
    for text in (prompt, "plain", prompt, WEIGHTS[0]):
        fresh.encode(text)
    (record,) = caplog.records
    assert (record.levelname, record.name) == ("WARNING", "tgate")
    quoted = record.getMessage().partition('"')[2].partition('"')[0]
    assert quoted in prompt
    assert "which other programs read as a weight" in record.getMessage()


def test_a_lora_of_other_programs_is_told_beside_weights(fresh: TextEncoder, caplog: pytest.LogCaptureFixture) -> None:
    fresh.encode("(green:1.5) star <lora:my style:0.8>, <lora:other:1>")
    fresh.encode("<lora:other:1>")
    assert [record.getMessage().partition(",")[0] for record in caplog.records] == [
        'the prompt says "(green:1.5)"',
        'the prompt says "<lora:my style:0.8>"',
    ]
    assert "tgate-export --lora" in caplog.text


@pytest.mark.parametrize("prompt", PLAIN)
def test_plain_signs_are_nothing_to_tell(fresh: TextEncoder, caplog: pytest.LogCaptureFixture, prompt: str) -> None:
    fresh.encode(prompt)
    assert caplog.records == []


@pytest.mark.parametrize(
    "part", ["(", "(a", "((", "a", "(a:", "(a:1", "<lora:", ",BREAK", ", ", "(a)+", "1.", "a+", ")"]
)
def test_looking_for_them_takes_no_time(fresh: TextEncoder, part: str) -> None:
    prompt = (part * MOST_CHARACTERS)[:MOST_CHARACTERS]
    begin = time.process_time()
    fresh._tell(prompt)
    assert time.process_time() - begin < 0.2


def test_what_is_told_is_shown_and_not_sent(fresh: TextEncoder, caplog: pytest.LogCaptureFixture) -> None:
    fresh.encode(f"(\x1b[2J{'x' * 500}:1.5)")
    assert caplog.records[0].getMessage().isprintable()
    assert len(caplog.records[0].getMessage()) < 200
