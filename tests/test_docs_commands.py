"""Commands that the documents show: each flag of them is one that the command has."""

from __future__ import annotations

import contextlib
import functools
import io
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from gqa_serve.cli import main

REPOSITORY = Path(__file__).parent.parent
DOCUMENTS = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").rglob("*.md"))]
SUBCOMMANDS = {"bench": ("compare", "saturate", "selftest", "engine", "kernel")}
TOOLS = ("serve", "chat", "plan", "simulate", "bench", "convert", "uptrain", "eval")


def commands(text: str) -> Iterator[list[str]]:
    """The words of each `gqa-serve ...` that stands on a line of its own, or between backquotes."""
    joined = re.sub(r"\\\n\s*", " ", text)
    shown = re.findall(r"^ *(?:\$ )?(gqa-serve .*)$", joined, re.MULTILINE)
    inline = re.findall(r"`(gqa-serve [^`]*--[^`]*)`", re.sub(r"\s*\n\s*", " ", joined))
    for line in (*shown, *inline):
        lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        lexer.commenters = "#"
        words = []
        for word in lexer:
            if word in ("|", ">", ">>", "&", "&&", ";", "2>"):
                break
            words.append(word)
        yield words[1:]


@functools.cache
def help_of(*command: str) -> str:
    """What --help prints of a command."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
        main([*command, "--help"])
    return printed.getvalue()


def unknown_flags(words: list[str]) -> list[str]:
    """Flags of one command that its help does not name; what follows `--` is the server's."""
    tool = words[0] if words and words[0] in TOOLS else "serve"
    command = [tool]
    if len(words) > 1 and words[1] in SUBCOMMANDS.get(tool, ()):
        command.append(words[1])
    own, servers = words, []
    if "--" in words:
        own, servers = words[: words.index("--")], words[words.index("--") :]
    return [
        flag
        for part, name in ((own, command), (servers, ["serve"]))
        for word in part
        if (match := re.match(r"--[a-z][a-z0-9-]*", word)) and (flag := match.group()) != "--help"
        if not re.search(rf"{re.escape(flag)}(?![a-z0-9-])", help_of(*name))
    ]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_every_flag_exists(document: Path) -> None:
    wrong = [
        f"{flag} of: gqa-serve {shlex.join(words)}"
        for words in commands(document.read_text(encoding="utf-8"))
        for flag in unknown_flags(words)
    ]
    assert wrong == []


def test_the_documents_show_every_tool() -> None:
    found = [words[0] for path in DOCUMENTS for words in commands(path.read_text(encoding="utf-8")) if words]
    assert set(TOOLS) - {"serve"} <= set(found)
    assert len(found) > 60


def test_a_wrong_flag_is_found() -> None:
    (words,) = commands("    gqa-serve bench engine --model demo --no-such-flag 3  # why\n")
    assert unknown_flags(words) == ["--no-such-flag"]
    assert unknown_flags(["bench", "--model", "demo", "--rounds", "2"]) == ["--rounds"]
    assert unknown_flags(["bench", "--model", "demo", "--", "--threads", "1"]) == []
