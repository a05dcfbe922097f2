"""What the tests of records share."""

from __future__ import annotations

from typing import Any

from tgate_runtime.record import EngineRecord, PlanRecord, Record


def record(**fields: Any) -> Record:
    """A record of mini, but for ``fields``."""
    plan = PlanRecord(
        name="default",
        settings={"method": "tgate", "n": 25, "m": 15, "k": 3, "w": 2, "f": 1},
        sampler="dpmpp_2m",
        steps=25,
        digest="1a" * 32,
    )
    usual: dict[str, Any] = {
        "prompt": "a green star",
        "negative_prompt": None,
        "seed": 7,
        "generator": "numpy",
        "guidance_scale": 4.5,
        "size": "128x96",
        "plan": plan,
        "model": "mini-pixart",
        "bundle": "2b" * 32,
        "engine": EngineRecord(name="ort-cpu", version="1.31.1", precision="f32"),
        "version": "0.1.0",
        "given": {},
    }
    return Record(**(usual | fields))


PROMPTS = {
    "plain": "a large red circle above a small blue square",
    "lines": 'two\nlines,\r\na "quoted" \\ word: and, commas\t\u2028 too',
    "the form itself": "Steps: 3, Sampler: none, CFG scale: 1, Seed: 2\nNegative prompt: nothing\nSteps: 4, Seed: 5",
    "json": '{"form": 1, "prompt": "another"}, tgate: "{}"',
    "letters": "ein grüner Stern, 一颗绿色的星星, نجمة, 🌟\u200d🎨",
    "unseen": "a\0b\x1b[2J\x7f\x85\ufeff\ud7ff\ue000",
    "a thousand words": "星" * 10_000,
    "ten thousand pictures": "🌟" * 10_000,
    "empty": "",
}
