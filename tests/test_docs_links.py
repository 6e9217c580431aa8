"""The documents hang together: the index names every page, each link leads to a file and a heading."""

from __future__ import annotations

import functools
import re
from pathlib import Path

import pytest
from document_blocks import DOCUMENTS, REPOSITORY

INDEX = REPOSITORY / "docs" / "README.md"
PAGES = [*DOCUMENTS, REPOSITORY / "CONTRIBUTING.md", REPOSITORY / "CHANGELOG.md"]


def prose(path: Path) -> str:
    """The document without its blocks of code, fenced ones and such between backquotes."""
    text = re.sub(r"^( *)```.*?^ *```", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"(?<!\[)`[^`\n]*`(?!\])", "", text)


def links(path: Path) -> list[str]:
    """The targets of all links but those to other places of the web."""
    found = re.findall(r"\]\(([^)\s]+)\)", prose(path))
    return [target for target in found if not re.match(r"[a-z]+:", target)]


@functools.cache
def anchors(path: Path) -> frozenset[str]:
    """The anchors of a document's headings, as GitHub makes them."""
    text = re.sub(r"^ *```.*?^ *```", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    made: list[str] = []
    for title in re.findall(r"^#{1,6} (.+)$", text, re.MULTILINE):
        title = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", title)
        slug = re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")
        made.append(slug if slug not in made else f"{slug}-{made.count(slug)}")
    return frozenset(made)


def broken(path: Path) -> list[str]:
    """The links of a document that lead nowhere."""
    wrong = []
    for target in links(path):
        name, _, anchor = target.partition("#")
        file = (path.parent / name).resolve() if name else path
        if not file.exists() or (anchor and file.suffix == ".md" and anchor not in anchors(file)):
            wrong.append(target)
    return wrong


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_every_link_leads_somewhere(path: Path) -> None:
    assert broken(path) == []


def test_the_index_names_every_page() -> None:
    named = {(INDEX.parent / target.partition("#")[0]).resolve() for target in links(INDEX)}
    assert {str(page) for page in PAGES if page != INDEX} - {str(page) for page in named} == set()


def test_a_broken_link_is_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# A `b`: c\n\n[x](#a-b-c) [y](#no) [z](gone.md) [w](https://example.org) `[v](u.md)`\n")
    assert broken(page) == ["#no", "gone.md"]
