"""The blocks of commands and of Python in README.md and docs/: where each stands, its lines, and its mark.

A block is fenced or indented by four spaces. It is one of commands where its fence says so (sh, bash,
console) or a line of it begins with a program that the documents use, and one of Python where its fence says
so or it begins with an import. The mark is an HTML comment on the line above the block, or above the blank
line before it:

    <!-- runs -->                       tests/test_docs_blocks.py runs it, in an empty directory
    <!-- runs: against a server -->     ... with a server of the demo model where the block says port 8000
    <!-- runs: slowly -->               ... with the slow tests
    <!-- tested by tests/test_x.py -->  that test runs these commands, or what they call
    <!-- needs: a GPU -->               nothing runs it here; what it takes to run it

Knows nothing of what the commands do. Raises nothing: a block without a mark has an empty one.
"""

from __future__ import annotations

import re
import textwrap
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).parent.parent
DOCUMENTS = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").rglob("*.md"))]
PROGRAMS = (
    "gqa-serve|docker|kubectl|helm|curl|pip|python3?|make|lm_eval|git|ray|serve|npm|cosign|gh|"
    r"\.venv/bin/\S+|\. \.venv|\. \S+/activate"
)
COMMAND = re.compile(rf"^(\$ )?([A-Z_]+=\S+ )*({PROGRAMS}) ")
IMPORT = re.compile(r"^(from \S+ import|import) \S+")
OF_SHELLS = ("sh", "bash", "console")
MARK = re.compile(r"^<!-- (runs|runs: against a server|runs: slowly|tested by \S+|needs: .+?) -->$")


@dataclass(frozen=True)
class Block:
    """Lines of commands, or of Python, in a document; `line` counts from 1."""

    document: Path
    line: int
    lines: tuple[str, ...]
    mark: str
    is_python: bool

    @property
    def name(self) -> str:
        """Where it stands, as test ids and messages say it."""
        return f"{self.document.relative_to(REPOSITORY)}:{self.line}"

    def commands(self) -> str:
        """What a shell, or Python, is given: the lines after `$ ` where there are such, else all of them."""
        prompted = [line[2:] for line in self.lines if line.startswith("$ ")]
        return "\n".join(prompted or self.lines) + "\n"


def _mark_above(lines: list[str], start: int) -> str:
    """The mark above the block that begins at this index; empty where there is none."""
    above = start - 1
    if above >= 0 and not lines[above].strip():
        above -= 1
    found = MARK.match(lines[above].strip()) if above >= 0 else None
    return found.group(1) if found else ""


def _spans(lines: list[str]) -> list[tuple[int, str, list[str]]]:
    """Each block's first index, language ("" of an indented one), and lines without their indent."""
    spans: list[tuple[int, str, list[str]]] = []
    index = 0
    while index < len(lines):
        if fence := re.match(r"^( *)```(\w*)", lines[index]):
            start, indent = index, len(fence.group(1))
            index += 1
            while index < len(lines) and not lines[index].strip().startswith("```"):
                index += 1
            spans.append((start, fence.group(2), [line[indent:] for line in lines[start + 1 : index]]))
        elif re.match(r"^ {4,}\S", lines[index]) and (index == 0 or not lines[index - 1].strip()):
            start = index
            while index < len(lines) and (lines[index].startswith("    ") or not lines[index].strip()):
                index += 1
            inner = textwrap.dedent("\n".join(lines[start:index]).rstrip()).splitlines()
            spans.append((start, "", inner))
            continue
        index += 1
    return spans


def _language(fence: str, lines: list[str]) -> str:
    """What runs a block of this fence: "sh", "python", or "" for nobody."""
    if fence in OF_SHELLS or (not fence and any(COMMAND.match(line) for line in lines)):
        return "sh"
    if fence == "python" or (not fence and lines and IMPORT.match(lines[0])):
        return "python"
    return ""


def blocks(document: Path) -> list[Block]:
    """The blocks of commands and of Python of one document."""
    lines = document.read_text(encoding="utf-8").splitlines()
    found = [(start, _language(fence, inner), inner) for start, fence, inner in _spans(lines)]
    return [
        Block(document, start + 1, tuple(inner), _mark_above(lines, start), language == "python")
        for start, language, inner in found
        if language
    ]
