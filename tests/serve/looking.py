"""What looks at the server's page: a Chromium, hands and eyes, and a brake that holds workers at a step meanwhile."""

from __future__ import annotations

import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from playwright.sync_api import Browser, Locator, Page, Route, expect, sync_playwright

ROOT = Path(__file__).parents[2]
SETUP = ROOT / "scripts" / "serve_setup.sh"
WAIT_MS = 20_000

expect.set_options(timeout=WAIT_MS)


@contextmanager
def chromium() -> Iterator[Browser]:
    """A browser, installed where there is none and that may be done."""
    found = subprocess.run([SETUP], text=True, capture_output=True, check=False)
    assert found.returncode == 0, f"the page cannot be looked at without a browser:\n{found.stderr[-2000:]}"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found.stdout.strip())
        yield browser
        browser.close()


class Brake:
    """Lets workers make as many calls as it is told, and no more; any number once it is let go."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._left: int | None = None

    def hold(self, after: int = 0) -> None:
        """Hold before the call after so many."""
        with self._changed:
            self._left = after
            self._changed.notify_all()

    def let_go(self) -> None:
        with self._changed:
            self._left = None
            self._changed.notify_all()

    def wait(self) -> None:
        """Before a call. Whoever has forgotten to let go is not waited for: the worker outlives a test that fails."""
        with self._changed:
            self._changed.wait_for(lambda: self._left is None or self._left > 0, WAIT_MS / 1000)
            if self._left is not None:
                self._left -= 1


# --- hands and eyes -----------------------------------------------------------------------------


def ask(page: Page, *, prompt: str = "a green star", **chosen: str) -> None:
    """Fill the form in, and draw."""
    page.get_by_label("Prompt", exact=True).fill(prompt)
    for label, value in chosen.items():
        field = page.get_by_label(label.replace("_", " "), exact=True)
        field.fill(value) if label in ("Seed", "Negative_prompt") else field.select_option(value)
    page.get_by_role("button", name="Draw", exact=True).click()


def drawing(page: Page, plan: str) -> Locator:
    return page.get_by_role("article").filter(has=page.get_by_role("heading", name=plan, exact=True))


def done(page: Page, *plans: str) -> None:
    for plan in plans:
        expect(drawing(page, plan)).to_contain_text("Done: 25 steps")


def saved(page: Page, plan: str) -> tuple[str, bytes]:
    """The name and the bytes of the picture's file."""
    with page.expect_download() as download:
        page.get_by_role("link", name=f"Save picture of plan {plan}").click()
    return download.value.suggested_filename, download.value.path().read_bytes()


def table(page: Page, plan: str) -> list[list[str]]:
    """Step, graph, time in ms, images: of each step."""
    drawing(page, plan).get_by_text("as a table").click()
    rows = drawing(page, plan).locator("tbody tr").all()
    return [row.locator("td").all_inner_texts() for row in rows]


def looks(ours: Locator) -> tuple[tuple[int, int], str]:
    """The size and the pixels of a drawing's picture, as the browser has decoded it."""
    found = ours.locator("img").evaluate("""(image) => {
      const canvas = document.createElement("canvas");
      [canvas.width, canvas.height] = [image.naturalWidth, image.naturalHeight];
      canvas.getContext("2d").drawImage(image, 0, 0);
      return [canvas.width, canvas.height, canvas.toDataURL()];
    }""")
    return (found[0], found[1]), found[2]


def answering(body: str, content_type: str) -> Callable[[Route], None]:
    """Answers in the server's place."""

    def answer(route: Route) -> None:
        route.fulfill(body=body, content_type=content_type)

    return answer


# --- for whoever looks --------------------------------------------------------------------------


def unnamed(page: Page) -> list[str]:
    """What assistive technology finds on the page and has no name for, as Chromium's accessibility tree has it."""
    roles = {"button", "checkbox", "combobox", "image", "img", "link", "progressbar", "region", "textbox"}
    tree = page.context.new_cdp_session(page).send("Accessibility.getFullAXTree")
    nodes = [node for node in tree["nodes"] if not node["ignored"] and node["role"]["value"] in roles]
    assert nodes, "Chromium shows no accessibility tree"
    return [node["role"]["value"] for node in nodes if not node.get("name", {}).get("value", "").strip()]


_CONTRASTS = """() => {
  const numbers = (colour) => colour.match(/[\\d.]+/g).map(Number);
  const light = (colour) => {
    const [r, g, b] = numbers(colour).map((part) => part / 255).map((part) =>
      part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const ground = (element) => {
    for (; element; element = element.parentElement) {
      const colour = getComputedStyle(element).backgroundColor;
      if ((numbers(colour)[3] ?? 1) === 1) return colour;
    }
    throw new Error("nothing is painted behind it");
  };
  const ratio = (a, b) => {
    const [low, high] = [light(a), light(b)].sort((x, y) => x - y);
    return (high + 0.05) / (low + 0.05);
  };
  const own = (element) =>
    element.value || [...element.childNodes].some((node) => node.nodeType === 3 && node.data.trim());
  const found = [...document.querySelectorAll("body *")].filter((element) => element.checkVisibility());
  return {
    texts: found.filter(own).map((e) => [e.outerHTML.slice(0, 60), ratio(getComputedStyle(e).color, ground(e))]),
    bars: found.filter((e) => e.className.startsWith?.("graph-")).map((e) =>
      [e.className, ratio(getComputedStyle(e).backgroundColor, ground(e.closest(".track")))]),
  };
}"""


def contrasts(page: Page) -> dict[str, list[tuple[str, float]]]:
    """Of all ``texts`` that are seen, and all ``bars``: what they are, and the contrast with what is behind them, as
    WCAG 2 counts it: 1 to 21."""
    found: dict[str, list[tuple[str, float]]] = page.evaluate(_CONTRASTS)
    return found
