"""libtgate makes the ids of a prompt that the Python runtime makes with the pinned ``tokenizers``, cuts it at the same
place, and refuses the files that it refuses."""

from __future__ import annotations

import copy
import importlib.util
import io
import json
import struct
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tokenizers

import tgate_engine
from tests.contract.test_tokenizer_check import HOSTILE, OTHER, Json, added, charsmap, clip, leaves, put, t5
from tests.cpp.prompts import prompts
from tests.cpp.tokenizer_files import byte_level, byte_words, clip_words, drawn, mapped
from tests.fuzz.mutations import mutate_json
from tests.runtime.test_text import vanishing
from tests.toy_bundle import _tokenizer as toy_tokenizer
from tgate_engine.errors import BundleError, RequestError
from tgate_export.tokenizers import _lower_first, _write_vectors_out
from tgate_runtime.request import MOST_CHARACTERS
from tgate_runtime.text import TextEncoder, _load

Encoded = tuple[list[int], str]
LENGTH = 8
FIXED = ("", "a red circle", "  A  RED\t</s> <|endoftext|> ", "x" * 300, "ﷺ½ é e\u0301 🏳️\u200d🌈\0\x1b[2J" * 20)
EMBEDDED = sorted(Path(tgate_engine.__file__).parent.glob("models/*/tokenizer*/tokenizer.json"))


# --- the two sides ------------------------------------------------------------------------------


class Cpp:
    """``probe-tokenizer``, with a folder for the files that it is to read."""

    def __init__(self, program: Path, folder: Path) -> None:
        self._program, self._file = program, folder / "0.json"

    def encode(self, content: bytes, given: Sequence[bytes], length: int, pad: int) -> list[Encoded | str]:
        """Ids and what was cut, or what is said of a prompt. Raises BundleError for a file that is not taken."""
        self._file.write_bytes(content)
        stdin = b"".join(struct.pack("=I", len(each)) + each for each in given)
        arguments = [str(self._program), str(self._file), str(length), str(pad)]
        done = subprocess.run(arguments, input=stdin, capture_output=True, check=False)
        if done.returncode:
            assert done.returncode == 2, done.stderr
            line = done.stderr.decode().removesuffix("\n")
            assert line.isprintable()
            raise BundleError(line)
        answers: list[Encoded | str] = []
        at, out = 0, done.stdout
        while at < len(out):
            (code,) = struct.unpack_from("=I", out, at)
            at += 4
            ids: list[int] = [] if code else np.frombuffer(out, np.int64, length, at).tolist()
            at += 8 * len(ids)
            (size,) = struct.unpack_from("=I", out, at)
            text = out[at + 4 : at + 4 + size].decode()
            at += 4 + size
            answers.append(text if code else (ids, text))
        assert len(answers) == len(given)
        return answers


@pytest.fixture
def cpp(cpp_build: Path, tmp_path: Path) -> Cpp:
    return Cpp(cpp_build / "probe-tokenizer", tmp_path)


def loaded(content: bytes, length: int, pad: int) -> Callable[[str], Encoded | str]:
    """The same as the Python runtime has it. Raises BundleError."""
    spec: Any = SimpleNamespace(file="0.json", input="ids.0", length=length, pad_id=pad)
    bundle: Any = SimpleNamespace(file=Path, read=lambda _name, _most: content)
    takes: Any = SimpleNamespace(inputs=[SimpleNamespace(name="ids.0", dtype="int64", shape=(1, length))])
    tokenizer = _load(bundle, spec, takes)

    def encode(prompt: str) -> Encoded | str:
        try:
            ids, cut = TextEncoder._tokenize(tokenizer, spec, prompt)
        except RequestError as error:
            return str(error)
        return ids[0].tolist(), cut

    return encode


def compared(cpp: Cpp, content: bytes, texts: Sequence[str], *, length: int = LENGTH, pad: int = 0) -> int:
    """How many prompts of those were cut; all are the same on both sides."""
    encode = loaded(content, length, pad)
    answers = cpp.encode(content, [text.encode() for text in texts], length, pad)
    cut = 0
    for text, answer in zip(texts, answers, strict=True):
        assert answer == encode(text), ascii(text)
        cut += bool(answer[1])
    return cut


def written(data: Any) -> bytes:
    return json.dumps(data).encode()


# --- ids ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [LENGTH, 77])
@pytest.mark.parametrize("path", EMBEDDED, ids=lambda path: "-".join(path.parts[-3:-1]))
def test_tokenizers_of_embedded_models(cpp: Cpp, path: Path, length: int) -> None:
    data = json.loads(path.read_bytes())
    cut = compared(
        cpp,
        path.read_bytes(),
        [*FIXED, *prompts(Random(length), 500)],
        length=length,
        pad=data["model"]["vocab"]["!"] if isinstance(data["model"]["vocab"], dict) else 0,
    )
    assert cut > (3 if length > LENGTH else 100)


@pytest.mark.parametrize("make", [clip, t5, lambda: t5(charsmap()), lambda: json.loads(toy_tokenizer().to_str())])
def test_tokenizers_of_the_tests(cpp: Cpp, make: Callable[[], Json]) -> None:
    assert compared(cpp, written(make()), [*FIXED, *prompts(Random(1), 300)]) > 20


def test_a_published_charsmap(cpp: Cpp) -> None:
    messages: Any = pytest.importorskip("sentencepiece.sentencepiece_model_pb2")
    sentencepiece = pytest.importorskip("sentencepiece")
    model, out = messages.ModelProto(), io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a red circle above a blue square"] * 20),
        model_writer=out,
        vocab_size=30,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    model.ParseFromString(out.getvalue())
    normalizer = mapped(model.normalizer_spec.precompiled_charsmap)
    compared(cpp, written(byte_words(normalizer=normalizer)), prompts(Random(2), 1000), length=200)


def test_textual_inversions_and_prompts_in_lower_case(cpp: Cpp) -> None:
    """As export writes them: a token of several vectors is written out before all else."""
    data = clip()
    names = ["<Cat>", "<Cat>_1", "<Cat>_2", "Ω", "Ω_1"]
    data["added_tokens"] += [added(9 + i, name, normalized=True, special=False) for i, name in enumerate(names)]
    plain = tokenizers.Tokenizer.from_str(json.dumps(data))
    inverted = _write_vectors_out(plain, {"<Cat>": names[:3], "Ω": names[3:]})
    texts = [*FIXED, *(f"{text}{name}{text}" for text in prompts(Random(3), 150) for name in ("<Cat>", "<cat>", "Ω"))]
    assert compared(cpp, inverted.to_str().encode(), texts, length=20) > 20
    assert compared(cpp, _lower_first(plain).to_str().encode(), texts) > 20


def test_every_component_and_flag(cpp: Cpp) -> None:
    rng, tried = Random(4), 0
    for _ in range(100):
        tried += _compared_drawn(cpp, rng, 60)
    assert tried > 90


@pytest.mark.slow
def test_every_component_and_flag_a_million_times(cpp: Cpp) -> None:
    rng = Random(5)
    for _ in range(1000):
        _compared_drawn(cpp, rng, 1000)


def _compared_drawn(cpp: Cpp, rng: Random, count: int) -> bool:
    """Whether a drawn file is taken: two of its added tokens may be one to its normalizer."""
    content, length, pad = drawn(rng)
    try:
        compared(cpp, content, prompts(rng, count), length=length, pad=pad)
    except BundleError as error:
        if "of which the library takes either" not in str(error):
            raise
        return False
    return True


# --- characters ---------------------------------------------------------------------------------

WORDS = {
    "letters, numbers and spaces": byte_words(words=clip_words(True)),
    "GPT-2's words": byte_words(words=byte_level()),
    "\\w": byte_words(words={"type": "Whitespace"}),
    "spaces": byte_words(words={"type": "WhitespaceSplit"}),
    "lower case": byte_words(normalizer={"type": "Lowercase"}),
    "compositions": byte_words(normalizer={"type": "NFC"}),
    "added": byte_words(added_tokens=[added(512, "b", single_word=True), added(513, "c", lstrip=True, rstrip=True)]),
}


def _unicode() -> Any:
    path = Path(__file__).parents[2] / "runtime" / "cpp" / "scripts" / "make_unicode.py"
    spec = importlib.util.spec_from_file_location("make_unicode", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _around(codes: Sequence[int]) -> list[str]:
    """Each character between others that it may join or part."""
    return [text for code in codes for text in (f"a{c}a1{c}!{c}'s b {c} c{c}{c}b" for c in [chr(code)])]


@pytest.mark.parametrize("name", WORDS)
def test_characters(cpp: Cpp, name: str) -> None:
    rng = Random(6)
    codes = [
        *range(0x250),
        *(rng.choice((rng.randrange(0xD800), rng.randrange(0xE000, 0x110000))) for _ in range(1500)),
    ]
    compared(cpp, written(WORDS[name]), _around(codes), length=200)


def _clusters(codes: Sequence[int]) -> list[str]:
    """Each character where it joins others, or parts them, in every way that there is: a last one of up to 5 bytes
    shows whether what comes before it is of one grapheme with it."""
    patterns = (
        "a{0}\u0301 {0}\u0301\u0301 {0}a\u0301",
        "©{0}\u200d©\u0301 ©\u200d{0}\u0301 {0}\u200d©\u0301",
        "क{0}क\u0301 क\u094d{0}क\u0301 क{0}\u094dक\u0301 {0}\u094dक\u0301 क\u094d{0}\u0301",
        "\u1100{0}\u0301 {0}\u1100\u0301 \u1161{0}\u0301 {0}\u1161\u0301 \u11a8{0}\u0301 {0}\u11a8\u0301",
        "\uac00{0}\u0301 \uac01{0}\u0301 \U0001f1e6{0}\U0001f1e6\u0301 \r{0}\n",
    )
    return [pattern.format(chr(code)) for code in codes for pattern in patterns]


def test_graphemes(cpp: Cpp) -> None:
    """A character map that knows the first byte of everything shows which characters are looked up as one."""
    rng = Random(7)
    codes = [*range(0x900, 0xE00), 0xA9, 0xAD, 0x200C, 0x200D, 0x600, 0x1100, 0x1160, 0x11A8, 0xAC00, 0xAC01, 10, 13]
    codes += [rng.choice((rng.randrange(0xD800), rng.randrange(0xE000, 0x20000))) for _ in range(800)]
    compared(cpp, _counted(), [*_clusters(codes), *prompts(rng, 1500)], length=200)


def _counted() -> bytes:
    return written(byte_words(normalizer=mapped(_unicode().counting_map())))


@pytest.mark.slow
def test_tables_of_characters_are_those_of_the_library() -> None:
    unicode = _unicode()
    assert unicode.TARGET.read_text("utf-8") == unicode.written()


@pytest.mark.slow
@pytest.mark.parametrize("name", WORDS)
def test_all_characters(cpp: Cpp, name: str) -> None:
    codes = [code for code in range(0x110000) if not 0xD800 <= code < 0xE000]
    for i in range(0, len(codes), 50_000):
        compared(cpp, written(WORDS[name]), _around(codes[i : i + 50_000]), length=200)


@pytest.mark.slow
def test_graphemes_of_all_characters(cpp: Cpp) -> None:
    codes = [code for code in range(0x110000) if not 0xD800 <= code < 0xE000]
    content = _counted()
    for i in range(0, len(codes), 20_000):
        compared(cpp, content, _clusters(codes[i : i + 20_000]), length=200)


# --- prompts and files that are refused ---------------------------------------------------------


def test_prompts_that_are_refused(cpp: Cpp) -> None:
    texts = [b"\xed\xa0\x80", b"a \xff", b"\xc0\x80", b"a" * MOST_CHARACTERS, "é".encode() * (MOST_CHARACTERS + 1)]
    *odd, longest, longer = cpp.encode(written(clip()), texts, LENGTH, 0)
    assert all("must be text in valid Unicode, got '" in line for line in odd if isinstance(line, str))
    assert [type(line) for line in odd] == [str] * 3
    assert longest == loaded(written(clip()), LENGTH, 0)("a" * MOST_CHARACTERS)
    assert longer == (
        "the prompt has 32769 characters, at most 32768 are read, and a model takes a few hundred words of them; "
        "shorten it"
    )


@pytest.mark.parametrize(
    "text", ["abcdefghijklm" * 2520, "a" * 32768, " " * 32768, "漢" * 32768, "e\u0323\u0301" * 10000]
)
def test_long_prompts_take_no_longer_for_being_one_word(cpp: Cpp, text: str) -> None:
    content = EMBEDDED[0].read_bytes()
    begin = time.process_time()
    cpp.encode(content, [text.encode()], LENGTH, 0)
    assert time.process_time() - begin < 1


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_refused(cpp: Cpp, name: str) -> None:
    make, change, _ = HOSTILE[name]
    data = make()
    change(data)
    assert not _taken(cpp, written(data))


@pytest.mark.parametrize(
    ("length", "pad", "says"),
    [(2, 0, "it puts 2 tokens around a prompt, and 2 fit"), (3, 9, "padding is token 9, which"), (3, -1, "token -1,")],
)
def test_a_manifest_that_does_not_fit(cpp: Cpp, length: int, pad: int, says: str) -> None:
    for refuse in (loaded, lambda content, *rest: cpp.encode(content, [], *rest)):
        with pytest.raises(BundleError, match=says):
            refuse(written(clip()), length, pad)


def test_a_normalizer_that_leaves_nothing_of_a_token(cpp: Cpp) -> None:
    data = json.loads(toy_tokenizer().to_str())
    vanishing(data)
    with pytest.raises(BundleError, match=r"\S+ is not a tokenizer \(its normalizer leaves nothing of the token zz\);"):
        cpp.encode(written(data), [], LENGTH, 0)


STRICTER = (
    "is no whole number of 64 bits",
    "NaN and Infinity are no numbers",
    "it goes wrong at byte",
    "it is nested more than",
    "has the key",
    "have one id",
    "of which the library takes either",
)
"""What is taken in Python: JSON that means several things or is beyond all bounds, where nothing is read of it; and
tokens that the library itself takes one or another of, as it happens."""


def _taken(cpp: Cpp, content: bytes, length: int = LENGTH, pad: int = 0) -> bool:
    """Whether a file is taken, in which case the same becomes of prompts; by both sides, or by neither."""
    try:
        answers = cpp.encode(content, [text.encode() for text in FIXED], length, pad)
    except BundleError as error:
        if not any(reason in str(error) for reason in STRICTER):
            with pytest.raises(BundleError):
                loaded(content, length, pad)
        return False
    encode = loaded(content, length, pad)
    assert answers == [encode(text) for text in FIXED]
    return True


def test_two_tokens_that_the_library_takes_either_of(cpp: Cpp) -> None:
    data = clip()
    data["added_tokens"] += [added(9, "Foo", normalized=True), added(10, "foo", normalized=True)]
    with pytest.raises(BundleError, match="makes the added tokens Foo and foo one, of which the library takes either"):
        cpp.encode(written(data), [], LENGTH, 0)
    put("model.vocab.e", 1)(data)
    data["added_tokens"] = [added(1, "r"), added(1, "e")]
    with pytest.raises(BundleError, match="the added tokens r and e have one id, 1"):
        cpp.encode(written(data), [], LENGTH, 0)


def _mutated(cpp: Cpp, rng: Random, count: int) -> int:
    sound = [written(clip()), written(t5()), written(t5(charsmap())), toy_tokenizer().to_str().encode()]
    return sum(
        _taken(cpp, mutate_json(rng.choice(sound), rng), rng.choice((8, 8, 3, 2, 1)), rng.choice((0, 0, 0, 3, 99)))
        for _ in range(count)
    )


def test_mutated_files(cpp: Cpp) -> None:
    assert 5 < _mutated(cpp, Random(8), 120) < 90


@pytest.mark.slow
def test_thousands_of_mutated_files(cpp: Cpp) -> None:
    _mutated(cpp, Random(9), 5000)


@pytest.mark.slow
@pytest.mark.parametrize("make", [clip, lambda: t5(charsmap())], ids=["clip", "t5"])
def test_every_leaf_of_every_other_type(cpp: Cpp, make: Callable[[], Json]) -> None:
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
            _taken(cpp, written(data))
