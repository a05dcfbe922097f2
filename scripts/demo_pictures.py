"""Draws the same prompts and seeds ungated (above) and gated (below), and saves them as one picture.

python scripts/demo_pictures.py BUNDLE OUTPUT.png
"""

from __future__ import annotations

import sys

from PIL import Image

from tgate_runtime import Pipeline

PROMPTS = (
    "a large red circle above a small blue square",
    "a small green triangle on a grey background",
    "a yellow star to the left of a blue ring",
    "a large purple square",
    "a white cross on a striped mint background",
    "a black circle below a red triangle",
)
GAP_PX = 4


def main(bundle: str, output: str) -> None:
    """Draw every prompt with both plans and save the sheet as ``output``."""
    with Pipeline.open(bundle, plans=["ungated", "default"]) as pipe:
        rows = [pipe(PROMPTS, seed=0, plan=plan).images for plan in ("ungated", "default")]
    width, height = rows[0][0].size
    sheet = Image.new("RGB", (len(PROMPTS) * (width + GAP_PX) - GAP_PX, 2 * height + GAP_PX), "white")
    for y, row in enumerate(rows):
        for x, image in enumerate(row):
            sheet.paste(image, (x * (width + GAP_PX), y * (height + GAP_PX)))
    sheet.save(output)
    print(f"{output}: ungated above, gated below; from the left:")
    for seed, prompt in enumerate(PROMPTS):
        print(f"  seed {seed}: {prompt}")


if __name__ == "__main__":
    main(*sys.argv[1:3])
