"""What the documentation says holds: its links lead somewhere, its commands parse, its Python runs, its messages are
the code's."""

from __future__ import annotations

import ast
import asyncio
import contextlib
import io
import re
import shlex
import threading
import tomllib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tgate_cli.arguments import export_parser, tgate_parser
from tgate_runtime.mini import place_of
from tgate_runtime.names import INSTEAD

ROOT = Path(__file__).resolve().parents[2]
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md", *DOCS]
SOURCES = [
    path
    for package in (
        "tgate_engine",
        "export/tgate_export",
        "runtime/tgate_runtime",
        "serve/tgate_serve",
        "cli/tgate_cli",
    )
    for path in (ROOT / package).rglob("*.py")
]

FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
INLINE = re.compile(r"`([^`\n]+)`")
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
GAP = "…"
"""What stands for the parts of a message that differ."""


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def prose(page: Path) -> str:
    """A page without its blocks of code."""
    return FENCE.sub("", page.read_text("utf-8"))


def blocks(page: Path, language: str) -> list[str]:
    return [body for spoken, body in FENCE.findall(page.read_text("utf-8")) if spoken == language]


# --- links --------------------------------------------------------------------------------------


def anchors(markdown: str) -> list[str]:
    """The anchors of the headings, as GitHub and the site make them; those of headings that are there twice are left
    out, since the two number them differently."""
    headings = re.findall(r"^#{1,6} +(.+?) *$", markdown, re.MULTILINE)
    slugs = [re.sub(r"[^\w\- ]", "", LINK.sub("", text).lower()).replace(" ", "-") for text in headings]
    return [slug for slug, count in Counter(slugs).items() if count == 1]


def broken(page: Path) -> Iterator[str]:
    """The links of a page that lead nowhere."""
    for link in LINK.findall(prose(page)):
        if re.match(r"[a-z]+:", link):
            continue
        target, _, anchor = link.partition("#")
        path = page.parent / target if target else page
        if not path.exists() or (anchor and anchor not in anchors(prose(path))):
            yield link


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page: Path) -> None:
    assert list(broken(page)) == []


def test_a_broken_link_is_seen(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "# A page's `title`\n## Twice\n## Twice\n[a](page.md#a-pages-title) [b](none.md) [c](#none) [d](#twice)"
    )
    assert list(broken(page)) == ["none.md", "#none", "#twice"]


@pytest.mark.parametrize("page", DOCS, ids=name)
def test_links_out_of_the_documentation_are_those_that_the_site_has_copies_for(page: Path) -> None:
    outside = [link for link in LINK.findall(prose(page)) if link.startswith("..")]
    assert [link for link in outside if not re.fullmatch(r"\.\./[^.#][^#]*", link)] == []


def test_the_site_has_every_page_once() -> None:
    listed = re.findall(r"^ +- [^:\n]+: (\S+\.md)$", (ROOT / "mkdocs.yml").read_text("utf-8"), re.MULTILINE)
    assert sorted(listed) == [page.name for page in DOCS]


# --- commands -----------------------------------------------------------------------------------


def commands(page: Path) -> list[list[str]]:
    """The command lines of a page's blocks that are this program's, as a shell hands them over."""
    lines = [line for body in blocks(page, "") for line in body.replace("\\\n", " ").splitlines()]
    return [
        words for line in lines if re.match(r"tgate(-export)? ", line) and (words := shlex.split(line, comments=True))
    ]


COMMANDS = [(page, words) for page in PAGES for words in commands(page)]


def parse(words: list[str]) -> str:
    """What the parser says against a command line; nothing where it takes it."""
    parser = {"tgate": tgate_parser, "tgate-export": export_parser}[words[0]]()
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            parser.parse_args(words[1:])
    except SystemExit as ending:
        return said.getvalue() if ending.code else ""
    return ""


@pytest.mark.parametrize(("page", "words"), COMMANDS, ids=[f"{name(p)}: {shlex.join(w)[:80]}" for p, w in COMMANDS])
def test_a_command_line_parses(page: Path, words: list[str]) -> None:
    assert parse(words) == ""


def test_a_wrong_command_line_does_not_parse() -> None:
    assert "unrecognized" in parse(["tgate", "generate", "mini", "a star", "--steps", "5"])
    assert len(COMMANDS) > 50


def options() -> dict[str, set[str]]:
    """The options of each command, by its words."""
    (subparsers,) = (action for action in tgate_parser()._actions if action.dest == "command")
    assert isinstance(subparsers.choices, dict)
    known = {f"tgate {word}": set(p._option_string_actions) for word, p in subparsers.choices.items()}
    return {
        **known,
        "tgate": set(tgate_parser()._option_string_actions),
        "tgate-export": set(export_parser()._option_string_actions),
    }


@pytest.mark.parametrize("page", [page for page in PAGES if page.name != "performance.md"], ids=name)  # its are old
def test_commands_in_the_text_have_the_options_that_are_named(page: Path) -> None:
    known = options()
    for span in INLINE.findall(prose(page)):
        if match := re.match(r"tgate(?:-export| [a-z]+)?(?=$| )", span):
            assert match[0] in known, span
            assert set(re.findall(r"(?<= )--[a-z-]+", span)) <= known[match[0]], span


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_extras_that_are_installed_are_there(page: Path) -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["optional-dependencies"]
    named = re.findall(r"(?:tgate-engine|'\.)\[([a-z,…]+)\]", page.read_text("utf-8"))
    assert {extra for names in named for extra in names.split(",")} - {GAP} <= extras.keys()


# --- Python -------------------------------------------------------------------------------------

PYTHON = [
    (page, number, block)
    for page in DOCS
    if page.name != "serving.md"  # asks a server: tests/serve/test_docs.py
    for number, block in enumerate(blocks(page, "python"))
]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    cache = tmp_path_factory.mktemp("home") / "cache"
    cache.mkdir(mode=0o700)
    return cache


@pytest.mark.parametrize(("page", "number", "block"), PYTHON, ids=[f"{name(p)}-{n}" for p, n, _ in PYTHON])
def test_a_block_of_python_runs(
    page: Path, number: int, block: str, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TGATE_CACHE", str(cache))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bundles").mkdir()
    (tmp_path / "bundles" / "mini").symlink_to(place_of("mini"))
    exec(compile(block, f"{page.name}, block {number}", "exec"), {"__name__": "__main__"})  # noqa: S102


def test_there_are_blocks() -> None:
    assert len(PYTHON) >= 9


class SlowPipeline:
    """Takes steps of 50 ms until it is told to end, or stopped from ``on_step``."""

    def __init__(self) -> None:
        self.end = threading.Event()
        self.running = self.most = 0

    def __call__(self, prompt: str, *, on_step: Callable[[object], None]) -> str:
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            while not self.end.wait(0.05):
                on_step(None)
        finally:
            self.running -= 1
        return prompt


def test_the_server_of_the_page_bounds_what_waits_and_stops_what_is_gone() -> None:
    tree = ast.parse(blocks(ROOT / "docs" / "library.md", "python")[0])
    tree.body.pop()  # which runs it
    page: dict[str, Any] = {}
    exec(compile(tree, "library.md", "exec"), page)  # noqa: S102

    async def visit() -> None:
        pipe = SlowPipeline()
        studio = page["Studio"](pipe, at_once=1, waiting=1)
        first, second = (asyncio.ensure_future(studio.draw(prompt)) for prompt in ("first", "second"))
        await asyncio.sleep(0.07)
        with pytest.raises(page["Busy"]):
            await studio.draw("third")
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
        await asyncio.sleep(0.07)
        assert pipe.running == pipe.most == 1  # the second one's turn began when the first one's thread had ended
        pipe.end.set()
        assert await second == "second"
        assert await studio.draw("fourth") == "fourth"

    asyncio.run(asyncio.wait_for(visit(), 10))


# --- messages and names -------------------------------------------------------------------------


def templates(tree: ast.AST) -> Iterator[str]:
    """The texts of a module, with a gap for what is put in."""
    inner: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            inner.update(id(value) for value in node.values)
            yield "".join(_fixed(value) for value in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in inner:
            yield re.sub(r"%(\.\d+)?[sdf]|\{[^}]*\}", GAP, node.value)


def _fixed(value: ast.expr) -> str:
    return str(value.value) if isinstance(value, ast.Constant) else GAP


def is_said(message: str, texts: list[str]) -> bool:
    """Whether one of the texts has all the fixed parts of a message, in their order."""
    parts = [re.escape(part.strip()) for part in message.split(GAP) if part.strip(" ;,.:'\"()")]
    assert parts
    pattern = re.compile(".*".join(parts), re.DOTALL)
    return any(pattern.search(text) for text in texts)


@pytest.fixture(scope="module")
def texts() -> list[str]:
    return [text for path in SOURCES for text in templates(ast.parse(path.read_text("utf-8")))]


MESSAGES = [
    message
    for line in (ROOT / "docs" / "troubleshooting.md").read_text("utf-8").splitlines()
    if re.match(r"\| `", line)
    for message in INLINE.findall(line.split(" | ")[0])
    if message not in {"No module named 'fcntl'", "TypeError"}  # Python's own
]


@pytest.mark.parametrize("message", MESSAGES)
def test_a_message_that_is_explained_is_one_that_is_said(message: str, texts: list[str]) -> None:
    assert is_said(message, texts)


def test_a_message_that_nobody_says_is_seen(texts: list[str]) -> None:
    assert not is_said("the bundle has no colour …; it has …", texts)
    assert len(MESSAGES) > 60


def test_every_name_of_diffusers_that_is_answered_has_its_row() -> None:
    rows = [
        line.split("|")[1] for line in (ROOT / "docs" / "migrate.md").read_text("utf-8").splitlines() if "|" in line
    ]
    assert set(INSTEAD) <= {name for row in rows for name in INLINE.findall(row)}
