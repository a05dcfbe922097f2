"""The page at ``/``, in Chromium: it shows what the server does and draws, by mouse or keyboard, for whoever looks."""

from __future__ import annotations

import base64
import io
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from playwright.sync_api import Browser, Page, Request, Route, expect

from tests.serve.looking import (
    ROOT,
    WAIT_MS,
    Brake,
    answering,
    ask,
    chromium,
    contrasts,
    done,
    drawing,
    looks,
    saved,
    table,
    unnamed,
)
from tests.serve.running import PATH, Server, running, until
from tgate_runtime.request import MOST_CHARACTERS
from tgate_runtime.session import Session
from tgate_runtime.state import State
from tgate_serve.api.guards import Keys

LONG = "a green star " * 100
TOO_LONG = "a" * (MOST_CHARACTERS + 1)


@pytest.fixture(scope="module")
def server(session: Session) -> Iterator[Server]:
    with running(session, rows=6, added=0.1) as found:
        yield found


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as found:
        yield found


@pytest.fixture
def opened(browser: Browser) -> Iterator[Callable[..., Page]]:
    """Opens the page of a server; ``clean``: nothing may then be in the console, breaches of the policy among it."""
    contexts, said = [], []

    def open_page(server: Server, *, clean: bool = True, before: Callable[[Page], object] = id, **more: Any) -> Page:
        context = browser.new_context(**more)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(WAIT_MS)
        if clean:
            page.on("console", lambda message: said.append(message.text))
            page.on("pageerror", lambda error: said.append(str(error)))
        before(page)
        page.goto(server.url)
        expect(page.get_by_text(re.compile(r"\d running, \d waiting"))).to_be_visible()
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert said == []


@pytest.fixture
def brake(monkeypatch: pytest.MonkeyPatch) -> Iterator[Brake]:
    made, real = Brake(), State.take

    def take(self: State, rows: range) -> Any:
        made.wait()
        return real(self, rows)

    monkeypatch.setattr(State, "take", take)
    yield made
    made.let_go()


# --- drawing ------------------------------------------------------------------------------------


def test_gated_beside_ungated_from_one_seed(server: Server, session: Session, opened: Callable[..., Page]) -> None:
    """The pictures are those that the API gives, the steps those of the plans, and bars as long as their times."""
    page = opened(server)
    expect(page.get_by_label("Compare with")).to_have_value("ungated")
    asked: list[Any] = []

    def note(request: Request) -> None:
        if request.method == "POST":
            asked.append(request.post_data_json)

    page.on("request", note)
    ask(page, prompt="Ein grüner Stern!", Negative_prompt="blue", Seed="")
    done(page, "default", "ungated")
    expect(page.get_by_role("status")).to_contain_text(
        re.compile(r"plan default was drawn in .* and plan ungated in .* times")
    )

    seed = asked[0]["seed"]
    assert [each["plan"] for each in asked] == ["default", "ungated"]
    assert asked[1]["seed"] == seed
    assert 0 <= seed < 2**53
    expect(page.get_by_text(f"seed {seed}.")).to_be_visible()
    shares = {}
    for plan in ("default", "ungated"):
        name, content = saved(page, plan)
        assert name == f"ein-grüner-stern-{seed}-{plan}.png"
        answer = server.draw(prompt="Ein grüner Stern!", negative_prompt="blue", seed=seed, plan=plan).json()
        assert content == base64.b64decode(answer["data"][0]["b64_json"])
        rows = table(page, plan)
        assert [row[0] for row in rows] == [str(i) for i in range(1, 26)]
        assert [row[1] for row in rows] == [step.graph for step in session.plan(plan).steps]
        bars = drawing(page, plan).locator(".bars > span")
        assert [bar.split(",")[0] for bar in bars.evaluate_all("all => all.map((e) => e.title)")] == [
            f"step {row[0]}: {row[1]}" for row in rows
        ]
        spent_ms = [float(row[2].removesuffix(" ms")) for row in rows]
        widths = bars.evaluate_all("all => all.map((e) => e.getBoundingClientRect().width)")
        shares[plan] = (sum(spent_ms), sum(widths), len(set(bars.evaluate_all("all => all.map((e) => e.className)"))))
        for width, ms in zip(widths, spent_ms, strict=True):
            assert width / sum(widths) == pytest.approx(ms / sum(spent_ms), abs=0.01)
    (gated_ms, gated_px, colours), (ungated_ms, ungated_px, colour) = shares["default"], shares["ungated"]
    assert gated_px / ungated_px == pytest.approx(gated_ms / ungated_ms, rel=0.15)  # gaps between bars are no time
    assert (colours, colour) == (len({step.graph for step in session.plan("default").steps}), 1)
    assert colours > 1


def test_a_picture_is_seen_as_it_forms(server: Server, opened: Callable[..., Page], brake: Brake) -> None:
    page = opened(server)
    brake.hold(after=14)
    ask(page, Seed="3")
    ours = drawing(page, "default")
    expect(ours).to_contain_text("Step 14 of 25")
    expect(ours.get_by_role("progressbar")).to_have_js_property("value", 14)
    expect(ours.get_by_role("img", name=re.compile("still forming"))).to_be_visible()
    forming = looks(ours)
    expect(drawing(page, "ungated")).to_contain_text("Waits for plan default")
    expect(page.get_by_text("mini: 1 running, 0 waiting")).to_be_visible()
    brake.let_go()
    done(page, "default", "ungated")
    expect(ours.get_by_role("img", name="“a green star”, plan default", exact=True)).to_be_visible()
    assert forming[0] == looks(ours)[0] == (128, 128)
    assert forming[1] != looks(ours)[1]


def test_the_queue_is_seen(session: Session, opened: Callable[..., Page], brake: Brake) -> None:
    """One image at a time, and three that want to be it."""
    brake.hold()
    with running(session, rows=1) as server, ThreadPoolExecutor() as threads:
        first = threads.submit(server.draw, seed=1)
        assert until(lambda: server.worker.load() == (1, 0))
        page = opened(server)
        page.get_by_label("Draw both at once").check()
        ask(page, Compare_with="guidance_stopped")
        expect(page.get_by_text("mini: 1 running, 2 waiting")).to_be_visible()
        expect(page.get_by_text("Waits behind 1 image")).to_be_visible()
        expect(page.get_by_text("About to start")).to_be_visible()
        brake.let_go()
        done(page, "default", "guidance_stopped")
        expect(page.get_by_role("status")).to_contain_text("drawn at once")
        assert first.result().status_code == 200
        page.close()  # before its server


def test_company_is_seen(server: Server, opened: Callable[..., Page], brake: Brake) -> None:
    brake.hold()
    page = opened(server)
    page.get_by_label("Draw both at once").check()
    ask(page)
    assert until(lambda: sum(server.worker.load()) == 2)
    brake.let_go()
    done(page, "default", "ungated")
    rows = table(page, "default")
    shared = [row for row in rows if row[3] == "2"]
    assert {row[1] for row in shared} == {"full"}
    titles = drawing(page, "default").locator(".bars > span").evaluate_all("all => all.map((e) => e.title)")
    assert [title.endswith("2 images in the call") for title in titles] == [row[3] == "2" for row in rows]


def test_drawings_are_cancelled(server: Server, opened: Callable[..., Page], brake: Brake) -> None:
    """One by its button, and all by Escape; the server draws neither on, and the page draws again."""
    page, before = opened(server), server.worker.counts.cancelled
    brake.hold(after=3)
    ask(page)
    expect(drawing(page, "default")).to_contain_text("Step 3 of 25")
    cancel = page.get_by_role("button", name="Cancel plan default")
    cancel.focus()
    page.keyboard.press("Enter")
    expect(drawing(page, "default")).to_contain_text("Cancelled")
    expect(page.get_by_role("heading", name="default")).to_be_focused()
    expect(cancel).to_be_hidden()
    expect(drawing(page, "ungated")).to_contain_text("About to start")
    brake.hold(after=2)  # the call that was held is the first of them
    expect(drawing(page, "ungated")).to_contain_text("Step 1 of 25")
    page.keyboard.press("Escape")
    expect(drawing(page, "ungated")).to_contain_text("Cancelled")
    assert until(lambda: server.worker.load() == (0, 0))
    assert server.worker.counts.cancelled == before + 2
    expect(page.get_by_role("alert")).to_be_empty()

    brake.hold()
    ask(page, Compare_with="")
    assert until(lambda: sum(server.worker.load()) == 1)
    expect(page.get_by_role("button", name="Draw", exact=True)).to_be_disabled()
    page.get_by_label("Prompt", exact=True).press("Control+Enter")
    expect(page.get_by_role("status")).to_contain_text("under way")
    brake.let_go()
    done(page, "default")


# --- what goes wrong ----------------------------------------------------------------------------


def test_errors_are_told_in_the_servers_words(server: Server, opened: Callable[..., Page]) -> None:
    page = opened(server, clean=False)
    ask(page, prompt=TOO_LONG)
    message = server.refused(prompt=TOO_LONG)[1]["message"]
    expect(page.get_by_role("alert")).to_have_text(message)
    expect(drawing(page, "default")).to_contain_text("Failed")
    expect(drawing(page, "ungated")).to_contain_text("Cancelled")
    page.route(f"**{PATH}", lambda route: route.abort())
    ask(page)
    expect(page.get_by_role("alert")).to_have_text(re.compile("does not answer"))
    broken = 'data: {"type":"error","error":{"message":"<b>stopped</b>"}}\n\n'
    for body, told in ((": waiting\n\n", "hung up"), (broken, "<b>stopped</b>")):
        page.unroute(f"**{PATH}")
        page.route(f"**{PATH}", answering(body, "text/event-stream"))
        ask(page)
        expect(page.get_by_role("alert")).to_contain_text(told)
    page.unroute(f"**{PATH}")
    ask(page)
    done(page, "default", "ungated")
    expect(page.get_by_role("alert")).to_be_empty()


def test_a_seed_that_is_none_is_not_sent(server: Server, opened: Callable[..., Page]) -> None:
    """Beyond 2**53 a browser would send another one."""
    page = opened(server)
    for seed in ("-1", "1.5", "x", str(2**53)):
        ask(page, Seed=seed)
        assert not page.get_by_label("Seed", exact=True).evaluate("(field) => field.checkValidity()")
        expect(page.get_by_role("article")).to_have_count(0)
    ask(page, Seed=str(2**53 - 1), Compare_with="")
    done(page, "default")
    expect(page.get_by_text(f"seed {2**53 - 1}.")).to_be_visible()


def test_a_key_is_asked_for(session: Session, browser: Browser) -> None:
    key = "a-key-of-enough-characters"
    with running(session, rows=1, keys=Keys([key])) as server:
        page = browser.new_page()
        page.goto(server.url)
        expect(page.get_by_label("API key")).to_be_focused()
        expect(page.get_by_role("alert")).to_contain_text("API key is wanted")
        page.keyboard.type("another-key-of-some-length")
        page.keyboard.press("Enter")
        expect(page.get_by_role("alert")).to_contain_text("API key is wanted")
        page.get_by_label("API key").fill(key)
        page.get_by_role("button", name="Use this key").click()
        expect(page.get_by_label("API key")).to_be_hidden()
        page.reload()  # the tab has kept it
        ask(page, Compare_with="")
        done(page, "default")
        expect(page.get_by_label("API key")).to_be_hidden()
        assert page.evaluate("[localStorage.length, sessionStorage.length, document.cookie]") == [0, 1, ""]
        page.close()


def test_names_are_text_and_videos_are_left_out(server: Server, opened: Callable[..., Page]) -> None:
    """Whatever a bundle calls itself."""
    evil = "<img src=x onerror=alert(1)>"

    def served(route: Route) -> None:
        answer = route.fetch().json()
        mini = answer["data"][0]
        film = {**mini, "id": "film", "tgate": {**mini["tgate"], "makes": "videos"}}
        plain = {**mini, "id": evil, "tgate": {**mini["tgate"], "negative_prompt": False}}
        plain["tgate"]["plans"] = [{**mini["tgate"]["plans"][0], "name": evil, "baselines": []}]
        route.fulfill(body=json.dumps({**answer, "data": [film, mini, plain]}), content_type="application/json")

    page = opened(server, before=lambda page: page.route("**/v1/models", served), clean=False)
    page.on("dialog", lambda dialog: pytest.fail(dialog.message))
    model = page.get_by_label("Model")
    assert model.locator("option").all_inner_texts() == ["mini", evil]
    expect(page.get_by_text("Left out, as this page draws pictures of prompts: film.")).to_be_visible()
    expect(page.get_by_label("Negative prompt")).to_be_visible()
    model.select_option(evil)
    expect(page.get_by_label("Negative prompt")).to_be_hidden()
    assert page.get_by_label("Compare with").locator("option").all_inner_texts() == ["nothing"]
    ask(page, prompt=evil)
    expect(page.get_by_role("heading", name=evil)).to_be_visible()
    expect(page.get_by_role("alert")).to_contain_text("that model is not served")
    assert page.locator("img[src=x]").count() == 0


def test_no_script_but_the_pages_own_runs(server: Server, browser: Browser) -> None:
    page = browser.new_page()
    said: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.goto(server.url)
    page.evaluate("""() => {
      const script = document.createElement("script");
      script.textContent = "window.ran = true";
      document.body.append(script);
    }""")
    assert page.evaluate("window.ran") is None
    assert any("Content Security Policy" in text for text in said)
    page.close()


# --- whoever looks ------------------------------------------------------------------------------


def test_by_keyboard_alone(server: Server, opened: Callable[..., Page]) -> None:
    """Every control is reached with Tab, in the order of the page, and its focus is seen."""
    page = opened(server)
    reached = []
    for _ in range(8):
        page.keyboard.press("Tab")
        focused = page.locator(":focus")
        reached.append(focused.get_attribute("id"))
        assert focused.evaluate("(e) => getComputedStyle(e).outlineStyle") == "solid"
        if reached[-1] == "prompt":
            page.keyboard.type("a red circle")
        if reached[-1] == "compare":
            page.keyboard.press("g")
        if reached[-1] == "seed":
            page.keyboard.type("5")
    assert reached == ["prompt", "negative", "model", "size", "plan", "compare", "seed", "at-once"]
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    done(page, "default", "guidance_stopped")
    expect(page.get_by_role("button", name="Draw", exact=True)).to_be_focused()
    reached = []
    for _ in range(5):
        page.keyboard.press("Tab")
        reached.append(page.locator(":focus").inner_text())
    assert reached == [
        "Keep this seed",
        "Save picture of plan default",
        "Steps of plan default as a table",
        "Save picture of plan guidance_stopped",
        "Steps of plan guidance_stopped as a table",
    ]
    page.keyboard.press("Enter")
    expect(drawing(page, "guidance_stopped").get_by_role("table")).to_be_visible()
    page.get_by_label("Prompt", exact=True).press("Control+Enter")
    expect(page.get_by_role("status")).to_contain_text("Drawing with")


def test_all_of_it_is_named_and_stands_out(server: Server, opened: Callable[..., Page]) -> None:
    """Names for assistive technology, contrast as WCAG's AA has it in the reader's own scheme, and nothing wider than a
    small phone."""
    page = opened(server, viewport={"width": 360, "height": 740})
    assert unnamed(page) == []
    ask(page, prompt=LONG)
    done(page, "default", "ungated")
    for plan in ("default", "ungated"):
        drawing(page, plan).get_by_text("as a table").click()
        expect(drawing(page, plan)).to_contain_text("left unread: star a green star")
    assert unnamed(page) == []
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    grounds = []
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        grounds.append(page.evaluate("getComputedStyle(document.body).backgroundColor"))
        found = contrasts(page)
        assert len(found["texts"]) > 100
        assert len(found["bars"]) >= 50
        assert [text for text in found["texts"] if text[1] < 4.5] == []
        assert [bar for bar in found["bars"] if bar[1] < 3] == []
    assert grounds == ["rgb(255, 255, 255)", "rgb(20, 23, 26)"]


def test_little_is_read_out(server: Server, opened: Callable[..., Page]) -> None:
    """What changes in a live region is a drawing's beginning and end, and no step."""
    page = opened(server)
    page.evaluate("""() => {
      window.told = [];
      const region = document.querySelector("[role=status]");
      new MutationObserver(() => told.push(region.textContent)).observe(region, { childList: true, subtree: true });
    }""")
    ask(page, Compare_with="")
    done(page, "default")
    told = [text for text in page.evaluate("told") if text]
    assert len(told) == 2
    assert told[0] == "Drawing with plan default."
    assert told[1].startswith("Plan default is done: drawn in ")


# --- its parts ----------------------------------------------------------------------------------


def test_events_are_read_however_they_come(server: Server, opened: Callable[..., Page]) -> None:
    """Byte by byte, and with every end of line that there may be."""
    events = [{"type": "a", "text": "grüner Stern ☆"}, {"type": "b"}]
    stream = ": waiting\n\n" + "".join(
        f"event: {e['type']}\r\ndata: {json.dumps(e, ensure_ascii=False)}\r\n\r\n" for e in events
    )
    read = opened(server).evaluate(
        """async ([text, size]) => {
          const { eventsOf } = await import("/page/api.js");
          const bytes = new TextEncoder().encode(text);
          const answer = new Response(new ReadableStream({
            start(controller) {
              for (let i = 0; i < bytes.length; i += size) controller.enqueue(bytes.slice(i, i + size));
              controller.close();
            },
          }));
          const events = [];
          for await (const event of eventsOf(answer)) events.push(event);
          return events;
        }""",
        [stream + "data: {cut off", 1],
    )
    assert read == events


def test_the_picture_of_the_docs_is_made_anew(server: Server, tmp_path: Path) -> None:
    path = tmp_path / "server.png"
    script = ROOT / "scripts" / "page_picture.py"
    subprocess.run([sys.executable, script, server.url, path], check=True, timeout=WAIT_MS / 1000)
    for content in (path.read_bytes(), (ROOT / "docs" / "images" / "server.png").read_bytes()):
        assert len(content) < 200_000
        assert Image.open(io.BytesIO(content)).width == 1280
