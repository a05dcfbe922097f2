"""The table of docs/models.md that says what becomes of every key, made from what the sweep tries.

``python -m tests.config_page`` writes it anew; ``tests/whole/test_config_sweep.py`` fails where it is out of date.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.config_values import TABLES, Tries, Try
from tests.pipeline_reference import LEFT_OUT

PAGE = Path(__file__).parent.parent / "docs" / "models.md"
BEGIN, END = "| where | keys | | remark |\n", "\n## What a single file says of itself\n"
ORDER = ("honoured", "no effect", "refused", "not read")

_WHERE = {
    "UNet2DConditionModel": "`unet` of SD, SDXL",
    "UNetSpatioTemporalConditionModel": "`unet` of SVD",
    "PixArtTransformer2DModel": "`transformer` of PixArt",
    "LatteTransformer3DModel": "`transformer` of Latte",
    "AutoencoderKL": "`vae` of SD, SDXL, PixArt, Latte",
    "AutoencoderKLTemporalDecoder": "`vae` of SVD",
    "CLIPTextConfig": "`text_encoder`, `text_encoder_2` of SD, SDXL",
    "CLIPVisionConfig": "`image_encoder` of SVD",
    "T5Config": "`text_encoder` of PixArt, Latte",
    "CLIPImageProcessor": "`feature_extractor` of SVD",
    "CLIPTokenizer": "`tokenizer`, `tokenizer_2` of SD, SDXL",
    "T5Tokenizer": "`tokenizer` of PixArt, Latte",
}
_PLACES = {
    "sd15_a": "SD",
    "conv_projection": "SDXL",
    "lcm_sdxl": "LCM-SDXL",
    "pixart_alpha_a": "PixArt-α at 512",
    "pixart_alpha_1024": "PixArt-α at 1024",
    "pixart_sigma_a": "PixArt-Σ",
    "latte_a": "Latte",
    "svd_b": "SVD",
    "conv_projection/text_encoder": "SDXL's first",
    "conv_projection/text_encoder_2": "SDXL's second",
    "conv_projection/tokenizer": "SDXL's first",
    "conv_projection/tokenizer_2": "SDXL's second",
}
_REMARKS = {
    ("UNet2DConditionModel", "sample_size"): "the default of `--height` and `--width`",
    ("UNet2DConditionModel", "upcast_attention"): "in float32",
    ("UNet2DConditionModel", "time_cond_proj_dim"): "the guidance scale as an input",
    ("UNetSpatioTemporalConditionModel", "num_frames"): "the default of `--frames`",
    ("AutoencoderKL", "latents_mean"): "SDXL's, with `latents_std`",
    ("AutoencoderKL", "force_upcast"): "chooses the decoder's dtype below float32",
    ("AutoencoderKLTemporalDecoder", "force_upcast"): "as above",
    ("T5Tokenizer", "model_input_names"): "diffusers wants the mask",
}


def table() -> str:
    """The table in Markdown, a line for all keys of a class that fare alike."""
    lines = [BEGIN.rstrip("\n"), "|---|---|---|---|"]
    for name, entry in TABLES.items():
        groups: dict[tuple[str, str], list[str]] = {}
        for key, tries in {**entry.keys, **entry.more}.items():
            groups.setdefault(_fate(name, key, tries), []).append("any other key" if key == "mystery" else f"`{key}`")
        where = _WHERE.get(name) or (
            f"`model_index.json` of {name.removesuffix('Pipeline')}"
            if name.endswith("Pipeline")
            else f"`scheduler`: {name.removesuffix('Scheduler')}"
        )
        for (verdict, remark), keys in sorted(groups.items(), key=lambda g: (_rank(g[0][0]), bool(g[0][1]))):
            lines.append(f"| {where} | {', '.join(keys)} | {verdict} | {remark} |")
            where = ""
    return "\n".join(lines) + "\n"


def written(text: str) -> str:
    """A page with the table in the old one's place."""
    return text[: text.index(BEGIN)] + table() + text[text.index(END) :]


def _rank(verdict: str) -> int:
    return ORDER.index(verdict) if verdict in ORDER else len(ORDER)


def _fate(name: str, key: str, tries: Tries) -> tuple[str, str]:
    """What becomes of a key's other values, and a remark on those that fare otherwise, or on leaving it out."""
    changed = [each for each in tries if each.value is not LEFT_OUT]
    left = [each for each in tries if each.value is LEFT_OUT]
    verdicts = {verdict for each in changed or left for verdict in (each.verdict, *each.but.values())}
    remarks = [_REMARKS[name, key]] if (name, key) in _REMARKS else []
    if len(verdicts) > 1 and "refused" in verdicts:
        remarks.append("refused: " + ", ".join(dict.fromkeys(filter(None, map(_refused, changed)))))
        verdicts -= {"refused"}
    verdict = "honoured" if verdicts == {"honoured", "no effect"} else " or ".join(sorted(verdicts, key=_rank))
    for fate, told in (("refused", "refused where left out"), ("not read", "left out: read all the same")):
        where = sorted({_PLACES.get(place, place) for each in left for place, v in each.but.items() if v == fate})
        whole = any(each.verdict == fate for each in left)
        if changed and verdict != fate and (whole or where):
            remarks.append(told if whole else f"{told} ({', '.join(where)})")
    return verdict, "; ".join(remarks)


def _refused(each: Try) -> str:
    """A value that is refused somewhere, and where it is not; empty where it never is."""
    if each.verdict == "refused":
        rest = sorted({_PLACES.get(place, place) for place, v in each.but.items() if v != "refused"})
        return _shown(each.value) + (f" (not {', '.join(rest)})" if rest else "")
    where = sorted({_PLACES.get(place, place) for place, v in each.but.items() if v == "refused"})
    return f"{_shown(each.value)} ({', '.join(where)})" if where else ""


def _shown(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return "such lists"
    return "such objects" if isinstance(value, dict) else f"`{value}`"


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text("utf-8")), "utf-8")
