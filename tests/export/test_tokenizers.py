"""What a prompt becomes: the exported tokenizer against transformers', and the text encoders against diffusers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from diffusers import StableDiffusionPipeline

from tests.conftest import family_settings
from tests.tiny_families import FAMILY_VARIANTS, load_tiny, make_tiny
from tgate_engine.errors import ExportError
from tgate_export import tokenizers as exported
from tgate_export.conditioning import encode
from tgate_export.families import find_model
from tgate_export.job import prepare
from tgate_export.modules import real_module
from tgate_export.tokenizers import export_tokenizers, token_ids

TOLERANCE = 1e-5


@pytest.fixture
def checkpoint(tmp_path: Path) -> Callable[[str], Path]:
    return lambda variant: make_tiny(tmp_path / variant, variant)


def texts(variant: str, root: Path, folder: Path, prompt: str) -> dict[str, torch.Tensor]:
    """The conditioning that a bundle's text graph gives of a prompt."""
    job = prepare(family_settings(variant, root, folder / "bundle"))
    specs = export_tokenizers(job.family, job.checkpoint, folder)
    text = job.family.text([real_module(job.family, job.checkpoint, name) for name in job.family.text_components])
    names = [c.conditioning.name for c in job.inputs_from("text")]
    return encode(text, names, *token_ids(folder, specs, prompt).values())


def refusal(variant: str, root: Path, folder: Path) -> str:
    with pytest.raises(ExportError) as caught:
        texts(variant, root, folder, "red")
    assert "\n" not in str(caught.value)
    return str(caught.value)


def rewrite(file: Path, **changes: Any) -> None:
    data = json.loads(file.read_text("utf-8")) if file.is_file() else {}
    file.write_text(json.dumps(data | changes), "utf-8")


def inverted(root: Path, vectors: dict[str, int]) -> Any:
    """A pipeline with textual inversions of so many vectors, saved where it was."""
    pipe = load_tiny(root, "sd15_a")
    generator = torch.Generator().manual_seed(3)
    for token, count in vectors.items():
        pipe.load_textual_inversion([{token: torch.randn(count, 24, generator=generator)}], token=[token])
    pipe.save_pretrained(root)
    return StableDiffusionPipeline.from_pretrained(root)


@pytest.mark.parametrize(
    "prompt",
    ["a red <tri>", "<tri>, <one> <pair>", "A <TRI> <Tri>", "<tri><tri> x<tri>y", "<tri>_1 <tri>_2", "no token at all"],
)
def test_textual_inversions_of_several_vectors(checkpoint: Callable[[str], Path], tmp_path: Path, prompt: str) -> None:
    """diffusers writes them out before it tokenizes; other capitals, which only the tokenizer knows, it does not."""
    root = checkpoint("sd15_a")
    pipe = inverted(root, {"<tri>": 3, "<pair>": 2, "<one>": 1})
    want = pipe.encode_prompt(prompt, "cpu", 1, False)[0]
    got = texts("sd15_a", root, tmp_path, prompt)["prompt_embeds"]
    assert float((got - want).abs().max() / want.abs().max()) < TOLERANCE


def test_every_vector_of_an_inversion_counts(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    """What the test above would miss if an encoder did not tell tokens apart."""
    root = checkpoint("sd15_a")
    pipe = inverted(root, {"<tri>": 3})
    first = pipe.text_encoder(torch.tensor([pipe.tokenizer.encode("red <tri>")]))[0]
    whole = pipe.text_encoder(torch.tensor([pipe.tokenizer.encode("red <tri> <tri>_1 <tri>_2")]))[0]
    assert float((first[0, :3] - whole[0, :3]).abs().max()) < 1e-4
    assert float((first[0, -1] - whole[0, -1]).abs().max()) > 1e-2


@pytest.mark.parametrize("variant", ["pixart_alpha_a", "pixart_sigma_a", "latte_a"])
@pytest.mark.parametrize(
    "prompt",
    [
        "a red <pad> circle",
        "red </s> blue",
        "<pad>",
        "",
        " ".join(["red"] * 400),
        "A Red </S> Circle",
        "<PAD> red circle",
        "\x1c red\x1fcircle \u3000\x1f",
    ],
)
def test_t5_masks_what_the_tokenizer_masks(
    checkpoint: Callable[[str], Path], tmp_path: Path, variant: str, prompt: str
) -> None:
    """A prompt may spell padding out: it then counts, as every token up to the end of the text does. Capitals and what
    Python takes for space are gone before the tokenizer looks for such tokens."""
    root = checkpoint(variant)
    pipe = load_tiny(root, variant)
    got = texts(variant, root, tmp_path, prompt)
    length = got["prompt_mask"].shape[1]
    plain = pipe._text_preprocessing(prompt, clean_caption=False)
    ids = pipe.tokenizer(plain, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    want = pipe.text_encoder(ids.input_ids, attention_mask=ids.attention_mask)[0]
    assert torch.equal(got["prompt_mask"], ids.attention_mask.float())
    assert float((got["prompt_embeds"] - want).abs().max() / want.abs().max()) < TOLERANCE


def test_the_mask_does_not_follow_the_encoders_padding(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    """Which token pads is the tokenizer's to say; transformers' encoder does not ask its config."""
    root = checkpoint("pixart_alpha_a")
    before = texts("pixart_alpha_a", root, tmp_path / "before", "a red circle")
    rewrite(root / "text_encoder" / "config.json", pad_token_id=5)
    after = texts("pixart_alpha_a", root, tmp_path / "after", "a red circle")
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_an_end_that_the_tokenizer_does_not_write_is_refused(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    root = checkpoint("pixart_alpha_a")
    rewrite(root / "text_encoder" / "config.json", eos_token_id=7)
    assert "eos_token_id" in refusal("pixart_alpha_a", root, tmp_path)


@pytest.mark.parametrize("key", ["padding_side", "truncation_side"])
@pytest.mark.parametrize("variant", ["sd15_a", "pixart_alpha_a"])
def test_sides_other_than_the_right_are_refused(
    checkpoint: Callable[[str], Path], tmp_path: Path, variant: str, key: str
) -> None:
    root = checkpoint(variant)
    rewrite(root / "tokenizer" / "tokenizer_config.json", **{key: "left"})
    assert key in refusal(variant, root, tmp_path)


@pytest.mark.parametrize("place", ["model_index", "tokenizer_config"])
def test_a_tokenizer_of_another_class_is_refused(checkpoint: Callable[[str], Path], tmp_path: Path, place: str) -> None:
    root = checkpoint("sd15_a")
    if place == "model_index":
        rewrite(root / "model_index.json", tokenizer=["transformers", "T5Tokenizer"])
    else:
        rewrite(root / "tokenizer" / "tokenizer_config.json", tokenizer_class="BertTokenizer")
    assert "wants a CLIPTokenizer" in refusal("sd15_a", root, tmp_path)


def test_more_tokens_than_the_encoder_knows_are_refused(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    root = checkpoint("sd15_a")
    pipe = load_tiny(root, "sd15_a")
    pipe.tokenizer.add_tokens(["<new>"])
    pipe.tokenizer.save_pretrained(root / "tokenizer")
    assert "vocab_size" in refusal("sd15_a", root, tmp_path)


@pytest.mark.parametrize("names", [("style", "mystyle"), ("<a>", "x<a>_1y")])
def test_inversions_within_each_others_names_are_refused(
    checkpoint: Callable[[str], Path], tmp_path: Path, names: tuple[str, str]
) -> None:
    """diffusers writes the one out within the other."""
    root = checkpoint("sd15_a")
    inverted(root, {names[0]: 2, names[1]: 1})
    assert f"part of the name of {names[1]!r}" in refusal("sd15_a", root, tmp_path)


@pytest.mark.parametrize("limit", ["77", 7.5, 0, 1, -5, True, float("inf"), float("nan")])
def test_limits_that_are_no_number_of_tokens_are_refused(
    checkpoint: Callable[[str], Path], tmp_path: Path, limit: Any
) -> None:
    root = checkpoint("sd15_a")
    rewrite(root / "tokenizer" / "tokenizer_config.json", model_max_length=limit)
    assert "model_max_length = " in refusal("sd15_a", root, tmp_path)


def test_a_limit_beyond_the_encoders_places_is_refused(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    root = checkpoint("sd15_a")
    rewrite(root / "tokenizer" / "tokenizer_config.json", model_max_length=99)
    assert "model_max_length = 99" in refusal("sd15_a", root, tmp_path)


def test_tokenizers_of_unlike_length_are_refused(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    root = checkpoint("lcm_sdxl")
    rewrite(root / "tokenizer_2" / "tokenizer_config.json", model_max_length=12)
    assert "16 and 12 tokens" in refusal("lcm_sdxl", root, tmp_path)


@pytest.mark.parametrize("lost", ["normalizer", "post_processor", "pre_tokenizer"])
def test_a_tokenizer_that_does_not_do_the_same_is_refused(
    checkpoint: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lost: str
) -> None:
    """The comparison itself: as if a part of a tokenizer were lost on its way into the bundle."""
    root = checkpoint("sd15_a")
    write_out = exported._write_vectors_out

    def lossy(backend: tokenizers.Tokenizer, vectors: Any) -> tokenizers.Tokenizer:
        data = json.loads(write_out(backend, vectors).to_str())
        return tokenizers.Tokenizer.from_str(json.dumps(data | {lost: None}))

    monkeypatch.setattr(exported, "_several_vectors", lambda _added: {"red": ["red"]})
    monkeypatch.setattr(exported, "_write_vectors_out", lossy)
    assert "cannot be exported" in refusal("sd15_a", root, tmp_path)


def test_equal_tokenizers_share_a_file(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    root = checkpoint("lcm_sdxl")
    shutil.rmtree(root / "tokenizer_2")
    shutil.copytree(root / "tokenizer", root / "tokenizer_2")
    job = prepare(family_settings("lcm_sdxl", root, tmp_path / "bundle"))
    specs = export_tokenizers(find_model(FAMILY_VARIANTS["lcm_sdxl"].model).family, job.checkpoint, tmp_path)
    assert [spec.file for spec in specs] == ["tokenizer/0.json"] * 2
