"""A prompt becomes ids as the tokenizer's own library cuts them, and what was cut is quoted."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from numpy.typing import NDArray
from tokenizers import models, pre_tokenizers, processors

from tests import toy_model
from tests.toy_bundle import edit_manifest
from tests.toy_model import LENGTH, WORDS
from tgate_engine.errors import BundleError, RequestError
from tgate_export.tokenizers import token_ids
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
        data["files"]["tokenizer/0.json"]["bytes"] = (target / "tokenizer" / "0.json").stat().st_size

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
    with Session.open(path, check_digests=False, plans=[], threads=1) as session:
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
    with Session.open(path, check_digests=False, plans=[], threads=1) as session:
        ahead = token_ids(path, session.manifest.tokenizers, prompt)
        for number in range(2):
            assert ahead[f"ids.{number}"].tolist() == [ids(TextEncoder(session), prompt, number)]


def test_truncation_and_padding_of_the_file_do_not_count(toy_path: Path, tmp_path: Path) -> None:
    """The manifest says how long ids are, and what fills them up."""
    tokenizer = template("<s> $A </s>")
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=50, pad_id=9)
    path = with_tokenizer(toy_path, tmp_path / "toy", tokenizer)
    with Session.open(path, check_digests=False, plans=[], threads=1) as session:
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


def test_many_threads_encode_what_one_does(encoder: TextEncoder) -> None:
    prompts = ["red", "blue circle", "a", LONG] * 8
    alone: list[NDArray[Any]] = [encoder.encode(prompt).tensors["text"] for prompt in prompts]
    with ThreadPoolExecutor(8) as pool:
        for encoded, expected in zip(pool.map(encoder.encode, prompts), alone, strict=True):
            np.testing.assert_array_equal(encoded.tensors["text"], expected)
