"""The page of a tuned plan, in Chromium: what it shows, for whoever looks, and that it asks nobody for anything."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page

from tests.cli.running import Run, fails
from tests.cli.tuned import HOSTILE, data, pairs, report
from tests.serve.looking import WAIT_MS, chromium, contrasts, unnamed
from tgate_cli.tune_page import MOST_SIDE, page
from tgate_engine.plan_report import Estimate


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as found:
        yield found


@pytest.fixture
def opened(browser: Browser, tmp_path: Path) -> Iterator[Callable[..., Page]]:
    """Opens a page from a file; nothing may then be in the console, and nothing asked of anybody."""
    contexts, said = [], []

    def open_page(text: str, **more: Any) -> Page:
        file = tmp_path / "page.html"
        file.write_text(text, "utf-8")
        contexts.append(browser.new_context(**more))
        found = contexts[-1].new_page()
        found.set_default_timeout(WAIT_MS)
        found.on("console", lambda message: said.append(message.text))
        found.on("pageerror", lambda error: said.append(str(error)))
        found.on("request", lambda request: said.append(request.url) if request.url != file.as_uri() else None)
        found.goto(file.as_uri())
        return found

    yield open_page
    for context in contexts:
        context.close()
    assert [each for each in said if not each.startswith("data:image/webp;base64,")] == []


def test_the_front_the_steps_and_the_pictures_are_shown(opened: Callable[..., Page]) -> None:
    shown = opened(page(data(), pairs()))
    assert shown.title() == "tgate tune: toy"
    assert "m=2 is the fastest plan found" in shown.locator("main > p").first.inner_text()
    rows = shown.locator("#front ~ .wide tbody tr").all()
    assert [row.locator("td").first.inner_text() for row in rows] == ["150.0", "210.0", "260.0"]
    assert [row.get_attribute("class") for row in rows] == [None, "chosen", None]

    # Up is better, to the right is slower; the chosen point lies above the budget and before the ungated plan.
    places = {}
    for group in shown.locator("svg g").all():
        title = group.locator("title").text_content() or ""
        box = group.locator("circle").bounding_box()
        assert box is not None
        places[title.partition(":")[0]] = (box["x"], box["y"])
    assert sorted(places, key=lambda name: places[name][0]) == ["m=1", "m=2", "m=3"]
    assert sorted(places, key=lambda name: -places[name][1]) == ["m=1", "m=2", "m=3"]
    goal = shown.locator("svg .goal").bounding_box()
    assert goal is not None
    assert places["m=2"][1] < goal["y"] < places["m=1"][1]

    bars = shown.locator(".bars")
    widths = [bars.nth(i).locator("span").evaluate_all("all => all.map((e) => e.offsetWidth)") for i in range(2)]
    assert sum(widths[0]) / sum(widths[1]) == pytest.approx(200 / 280, abs=0.02)
    assert widths[0][0] / widths[0][2] == pytest.approx(70 / 30, abs=0.1)

    pictures = shown.locator("figure img")
    looks = """(image) => {
      const canvas = document.createElement("canvas");
      [canvas.width, canvas.height] = [image.naturalWidth, image.naturalHeight];
      const drawn = canvas.getContext("2d");
      drawn.drawImage(image, 0, 0);
      return [canvas.width, canvas.height, ...drawn.getImageData(4, 4, 1, 1).data];
    }"""
    for at, colour in ((0, "red"), (1, "blue")):
        width, height, r, _, b, _ = pictures.nth(at).evaluate(looks)
        assert (width, height) == (24, 16)
        assert (r > 200, b > 200) == (colour == "red", colour == "blue")
    captions = shown.locator("figcaption").all_inner_texts()
    assert captions == ["24.10 dB; seed 10; a green star", "28.75 dB; seed 7; a green star"]
    assert shown.locator("#facts ~ .wide tr").filter(has_text="d" * 64).count() == 1


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_for_whoever_looks(opened: Callable[..., Page], scheme: str) -> None:
    shown = opened(page(data(), pairs()), color_scheme=scheme, viewport={"width": 360, "height": 700})
    shown.locator("summary").click()
    assert unnamed(shown) == []
    texts = [text for text in contrasts(shown)["texts"] if not re.match("<(text|title|style)", text[0])]
    assert [text for text in texts if text[1] < 4.5] == []
    assert shown.evaluate("document.documentElement.scrollWidth") <= 360


def test_what_a_stranger_wrote_stays_text(opened: Callable[..., Page]) -> None:
    facts = report(machine=HOSTILE, settings={"method": HOSTILE})
    shown = opened(page(data(model=HOSTILE, chosen=HOSTILE, report=facts), pairs(HOSTILE)))
    assert shown.title() == f"tgate tune: {HOSTILE}"
    assert shown.locator("script").count() == 0
    assert shown.locator("img").count() == 4
    assert shown.locator("[onerror]").count() == 0
    assert HOSTILE in shown.locator("figcaption").first.inner_text()
    assert shown.locator("img").first.get_attribute("alt") == f"Ungated, seed 10: {HOSTILE}"


def test_differences_a_speed_and_videos(opened: Callable[..., Page]) -> None:
    none = Estimate(mean=0.0, low=0.0, high=0.0)
    facts = report(metric="accuracy", quality=none, unrelated=none, judge="f" * 64)
    zero = {"plan": "m=2", "settings": {}, "predicted_ms": 210.0, "faster": 1.4}
    front = [{**zero, "quality": {"mean": 0.0, "low": 0.0, "high": 0.0}}]
    goal = {"metric": "accuracy", "speedup": 1.4}
    shown = opened(page(data(report=facts, front=front, goal=goal), pairs(frames=3)))
    assert "+0.0 points (+0.0 to +0.0)" in shown.locator("tr.chosen").inner_text()
    assert shown.locator("figcaption").first.inner_text().startswith("+24.1 points; seed 10")
    assert shown.locator("svg circle").count() == 1


def test_large_pictures_are_made_smaller_and_nothing_else_is_asked_for() -> None:
    (first, _) = pairs()
    large = [type(first)(**{**vars(first), "tuned": first.tuned.repeat(40, 0).repeat(40, 1)})]
    text = page(data(), large)
    assert len(text) < 60_000
    assert MOST_SIDE < 24 * 40
    assert re.findall(r"""(?:src|href)=["'](?!data:image/webp;base64,)""", text) == []
    assert "url(" not in text
    assert "default-src 'none'" in text


def test_the_files_are_written_and_not_over_others(run: Run, toy: Path, tmp_path: Path, opened: Any) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text(f"a large red circle\n{HOSTILE}\n")
    html, told, state = tmp_path / "told.html", tmp_path / "told.md", tmp_path / "state.json"
    asked = ("tune", toy, "--budget", "psnr=22", "--prompts", prompts, "--images", 4, "--threads", 1, "--quiet")
    files = ("--html", html, "--markdown", told, "--state", state)
    fails(run(*asked, "--html", tmp_path / "none" / "told.html"), "there is no directory")
    html.write_text("mine")
    prompts = tmp_path / "prompts.md"
    prompts.write_text("a\n")
    fails(run(*asked, "--prompts", prompts, "--markdown", prompts, "--force"), "is a file that is read or kept too")
    assert prompts.read_text() == "a\n"
    fails(run(*asked, "--html", toy / "x.html"), "lies in a bundle, whose files are its own")
    fails(run(*asked, *files), "told.html exists already; choose another --html, or --force to replace it")
    assert (html.read_text(), told.exists(), state.exists()) == ("mine", False, False)
    assert run(*asked, *files, "--force")[0] == 0
    first = html.read_text("utf-8")
    assert first.count("<figure>") == 4
    assert opened(first).locator("script").count() == 0
    assert told.read_text("utf-8").startswith("### tgate tune: toy\n")
    # Made again from what was kept, it is the same page.
    html.unlink()
    assert run(*asked, *files, "--force")[0] == 0
    assert html.read_text("utf-8") == first


def test_the_page_says_what_brings_it(run: Run, good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jinja2", None)
    result = run("tune", good, "--budget", "psnr=22", "--html", tmp_path / "x.html")
    fails(result, "--html needs jinja2", "pip install 'tgate-engine[tune]'")
    assert not (tmp_path / "x.html").exists()
