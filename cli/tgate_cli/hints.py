"""What to type in place of options that other programs have: diffusers' names, and this program's own elsewhere."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping, Sequence

_PLAN = "steps, sampler and reuse belong to a plan: add one with `tgate plan BUNDLE --name NAME {}`, then --plan NAME"
_SIZE = "a bundle has fixed sizes: --size WIDTHxHEIGHT takes one, `tgate-export --size` makes more"
_SEED = "--seed S draws the same noise on every machine; --generator torch-cuda the noise of a GPU"
_FIXED = "it is settled at export: `tgate-export {}`"

_AT_RUN_TIME: Mapping[str, str] = {
    "--m": _PLAN.format("--m M"),
    "--k": _PLAN.format("--m M --k K"),
    "--steps": _PLAN.format("--m M --steps N"),
    "--num-inference-steps": _PLAN.format("--m M --steps N"),
    "--sampler": _PLAN.format("--m M --sampler NAME"),
    "--scheduler": _PLAN.format("--m M --sampler NAME"),
    "--warm-up": _PLAN.format("--m M --k K --warm-up W"),
    "--fidelity-interval": _PLAN.format("--m M --fidelity-interval F"),
    "--gate-step": _PLAN.format("--m M"),
    "--height": _SIZE,
    "--width": _SIZE,
    "--num-images-per-prompt": "--num-images N",
    "--batch-size": "--num-images N draws several at once",
    "--guidance": "--guidance-scale G",
    "--cfg-scale": "--guidance-scale G",
    "--latents": "--initial-latents X.npy",
    "--output-type": "the ending of --output says it: .png, .jpg, .webp; .mp4 or .gif for videos",
    "--manual-seed": _SEED,
    "--lora": _FIXED.format("--lora FILE[:SCALE]"),
    "--dtype": f"{_FIXED.format('--dtype')}; --precision says what an engine computes in",
    "--torch-dtype": f"{_FIXED.format('--dtype')}; --precision says what an engine computes in",
    "--clip-skip": _FIXED.format("--clip-skip N"),
    "--guidance-rescale": _FIXED.format("--guidance-rescale R"),
    "--model": "give the bundle's directory, which `tgate-export --model NAME` makes",
    "--provider": "--engine NAME, one of `tgate engines`",
}
_AT_EXPORT: Mapping[str, str] = {
    "--num-inference-steps": "--steps N",
    "--scheduler": "--sampler NAME",
    "--gate-step": "--m M",
    "--torch-dtype": "--dtype fp32, fp16 or bf16",
    "--precision": "--dtype fp32, fp16 or bf16",
    "--batch-size": "--batch N or LEAST:MOST",
    "--num-frames": "--frames F",
    "--pretrained-model-name-or-path": "--model NAME, and --checkpoint DIR_OR_HUB_ID",
    "--seed": "an export draws nothing; `tgate generate --seed S` does",
    "--prompt": "an export draws nothing; `tgate generate BUNDLE PROMPT` does",
    "--engine": "a bundle is for every engine; `tgate generate --engine NAME` chooses one",
}


def hint(unknown: Sequence[str], *, known: Collection[str], exports: bool) -> str:
    """What to type in place of the ``unknown`` arguments; empty where nothing is near.

    ``known``: the options that the command has. ``exports``: whether it makes graphs.
    """
    if "--prompts-file" in known and not any(text.startswith("-") for text in unknown):
        return "put the prompt in quotation marks, and several after --prompt each"
    table = _AT_EXPORT if exports else _AT_RUN_TIME
    names = [text.partition("=")[0].replace("_", "-") for text in unknown if text.startswith("--")]
    return "; ".join(dict.fromkeys(text for name in names if (text := table.get(name) or _near(name, known))))


def _near(name: str, known: Collection[str]) -> str:
    """Options that begin so or are spelled nearly so, as a question."""
    near = [option for option in known if option.startswith(name)]
    near = near or difflib.get_close_matches(name, known, n=1, cutoff=0.8)
    return f"did you mean {' or '.join(near)}?" if near else ""
