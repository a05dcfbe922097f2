"""Draws a comparison on the page of a running server, and saves what the page then looks like, 1280 pixels wide.

python scripts/page_picture.py http://127.0.0.1:8000 OUTPUT.png
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from playwright.sync_api import expect, sync_playwright

PROMPT = "a green star"
SEED = "7"
WAIT_MS = 120_000


def main(url: str, output: str) -> None:
    """Draw with the first model's first plan beside its baseline, and save the page as ``output``."""
    browser = subprocess.run([Path(__file__).parent / "serve_setup.sh"], stdout=subprocess.PIPE, text=True, check=True)
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=browser.stdout.strip())
        page = chromium.new_page(viewport={"width": 1280, "height": 800}, color_scheme="light")
        page.goto(url)
        page.get_by_label("Prompt", exact=True).fill(PROMPT)
        page.get_by_label("Seed").fill(SEED)
        page.get_by_role("button", name="Draw", exact=True).click()
        expect(page.get_by_role("status")).to_contain_text("times as long", timeout=WAIT_MS)
        expect(page.get_by_text("0 running, 0 waiting")).to_be_visible(timeout=WAIT_MS)
        page.screenshot(path=output, full_page=True, animations="disabled")
        print(f"{output}: {page.get_by_role('status').inner_text()}")
        chromium.close()


if __name__ == "__main__":
    main(*sys.argv[1:3])
