"""What to type in place of options that other programs have: diffusers' names, and this program's own elsewhere; and of
what is spelled wrong."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping, Sequence

_PLAN = "steps, sampler and reuse belong to a plan: add one with `tgate plan BUNDLE --name NAME {}`, then --plan NAME"
_SIZE = "a bundle has fixed sizes: --size WIDTHxHEIGHT takes one, `tgate-export --size` makes more"
_SEED = "--seed S draws the same noise on every machine; --generator torch-cuda the noise of a GPU"
_LORA = "`tgate adapt BUNDLE FILE --name NAME` keeps it, and a request names it: `tgate generate --lora NAME[:SCALE]`"
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
    "--negative": "--negative-prompt TEXT",
    "--latents": "--initial-latents X.npy",
    "--output-type": "the ending of --output says it: .png, .jpg, .webp; .mp4 or .gif for videos",
    "--manual-seed": _SEED,
    **dict.fromkeys(("--lora-path", "--lora-weights"), _LORA),
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
    "--guidance": "--guidance-scale G",
    "--cfg-scale": "--guidance-scale G",
    "--torch-dtype": "--dtype fp32, fp16 or bf16",
    "--precision": "--dtype fp32, fp16 or bf16",
    "--batch-size": "--batch N or LEAST:MOST",
    "--num-frames": "--frames F",
    "--pretrained-model-name-or-path": "--model NAME, and --checkpoint DIR_OR_HUB_ID",
    "--seed": "an export draws nothing; `tgate generate --seed S` does",
    "--prompt": "an export draws nothing; `tgate generate BUNDLE PROMPT` does",
    "--engine": "a bundle is for every engine; `tgate generate --engine NAME` chooses one",
}
_OF_A_PLAN: Mapping[str, str] = {
    **{name: _AT_EXPORT[name] for name in ("--num-inference-steps", "--scheduler", "--gate-step")},
    **{name: _AT_EXPORT[name] for name in ("--guidance", "--cfg-scale")},
}
"""``tgate plan`` has these itself."""


def hint(unknown: Sequence[str], *, known: Collection[str], command: str) -> str:
    """What to type in place of the ``unknown`` arguments; empty where nothing is near.

    ``known``: the options that the ``command`` has, such as "generate" or "tgate-export".
    """
    if "--prompts-file" in known and not any(text.startswith("-") for text in unknown):
        return "put the prompt in quotation marks, and several after --prompt each"
    table = _AT_EXPORT if command == "tgate-export" else _AT_RUN_TIME
    if command == "plan":
        table = {**table, **_OF_A_PLAN}
    if command == "tune":
        table = {**table, "--num-inference-steps": "--steps N", "--num-images": "--images N"}
    table = {name: text for name, text in table.items() if name not in known}
    names = [text.partition("=")[0].replace("_", "-") for text in unknown if text.startswith("--")]
    return "; ".join(dict.fromkeys(text for name in names if (text := _instead(name, known, table))))


def meant(text: str, known: Collection[str]) -> str:
    """Which of the ``known`` was meant by ``text``, as a question; empty where nothing is near."""
    if text == "export" and "plan" in known:
        return "tgate-export is a program of its own"
    near = _near(text, known)
    return f"did you mean {' or '.join(near)}?" if near else ""


def _instead(name: str, known: Collection[str], table: Mapping[str, str]) -> str:
    """What the table says of an option, or of the one that it begins or nearly is; a question where that is one of the
    ``known``, which come first."""
    if name in table:
        return table[name]
    return meant(name, known) or "; ".join(dict.fromkeys(table[other] for other in _near(name, table)))


def _near(text: str, known: Collection[str]) -> list[str]:
    """Those that begin so, or else the one that is spelled nearly so."""
    begun = [other for other in known if other.startswith(text) and len(text.lstrip("-")) > 1]
    return begun or difflib.get_close_matches(text, known, n=1, cutoff=0.8)
