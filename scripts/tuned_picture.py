"""Saves what the page of a tuned plan looks like, as far as its first pictures, 1000 pixels wide.

tgate tune mini --budget psnr=30 --html page.html
python scripts/tuned_picture.py page.html docs/images/tuning.webp
"""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

ROWS = 2
"""Of pictures, which are in three columns here."""
MARGIN = 16


def main(page: str, output: str) -> None:
    """Open the file ``page`` and save the picture as ``output``, a WebP."""
    browser = subprocess.run([Path(__file__).parent / "serve_setup.sh"], stdout=subprocess.PIPE, text=True, check=True)
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=browser.stdout.strip())
        view = chromium.new_page(viewport={"width": 1000, "height": 800}, color_scheme="light")
        view.goto(Path(page).resolve().as_uri())
        last = view.locator("figure").nth(3 * ROWS - 1).bounding_box()
        assert last is not None
        height = last["y"] + last["height"] + MARGIN
        taken = view.screenshot(full_page=True, clip={"x": 0, "y": 0, "width": 1000, "height": height})
        chromium.close()
    Image.open(io.BytesIO(taken)).save(output, "WEBP", quality=80, method=6)
    print(f"{output}: {Path(output).stat().st_size} bytes")


if __name__ == "__main__":
    main(*sys.argv[1:3])
