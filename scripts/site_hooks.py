"""Hooks of `mkdocs build`: links that leave docs/, and a site that asks no other host for anything.

Pages are read in the repository too, where they link to files beside docs/. The site has copies of those files, and the
name alone where a link leads to a directory.
"""

from __future__ import annotations

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import BuildError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
COPIES = "repository"
LEAVING = re.compile(r"\[([^\]]+)\]\(\.\./([^)#\s]+)\)")
# The theme's own script would fetch what draws diagrams, which no page has, and what browsers have had since 2020.
ELSEWHERE = re.compile(
    r"""<(?:script|img|iframe|source|video|audio|embed|object)\b[^>]*?\b(?:src|data|srcset)=["']?(?:https?:)?//
      | <link\b(?![^>]*\brel=["']?canonical)[^>]*?\bhref=["']?(?:https?:)?//
      | url\(\s*["']?(?:https?:)?//
      | @import\s+["'](?:https?:)?//
      | class="mermaid""",
    re.VERBOSE,
)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add a copy of every file beside docs/ that a page links to."""
    targets = {target for page in files.documentation_pages() for _, target in LEAVING.findall(page.content_string)}
    for target in sorted(targets):
        path = ROOT / target
        if path.is_file():
            files.append(File.generated(config, _copy(target), content=path.read_bytes()))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Lead links out of docs/ to the copies."""

    def led(match: re.Match[str]) -> str:
        text, target = match.groups()
        return text if (ROOT / target).is_dir() else f"[{text}]({_copy(target)})"

    return LEAVING.sub(led, markdown)


def on_post_build(config: MkDocsConfig) -> None:
    """Fail where a page or a stylesheet of the site would load something from elsewhere."""
    site = Path(config.site_dir)
    for path in sorted([*site.rglob("*.html"), *site.rglob("*.css")]):
        if found := ELSEWHERE.search(path.read_text("utf-8")):
            raise BuildError(f"{path.relative_to(site)} loads something from another host: {found[0]}")


def _copy(target: str) -> str:
    """Where the site has a file of the repository. Markdown is no page of the site, and is shown as it is."""
    return f"{COPIES}/{target}.txt" if target.endswith(".md") else f"{COPIES}/{target}"
