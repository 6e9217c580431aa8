"""docs/troubleshooting.md quotes messages: each is a string of the code, `...` where it puts a value."""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterator

import pytest
from document_blocks import REPOSITORY

GUIDE = REPOSITORY / "docs" / "troubleshooting.md"
VALUE = "\0"
CODE = re.compile(r"`([a-z_]+)`")


def string_of(node: ast.expr) -> str:
    """The text of an expression, with VALUE for what is known only when it runs."""
    match node:
        case ast.Constant(value=str(text)):
            return re.sub(r"%(\.\d+)?[sdrgf]", VALUE, text)
        case ast.JoinedStr(values=parts):
            return "".join(string_of(part) for part in parts)
        case ast.BinOp(op=ast.Add(), left=left, right=right):
            return string_of(left) + string_of(right)
        case _:
            return VALUE


@functools.cache
def code_strings() -> frozenset[str]:
    """All strings of gqa_serve but docstrings."""
    found = set()
    for path in (REPOSITORY / "gqa_serve").rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        prose = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        found |= {
            string_of(node)
            for node in ast.walk(tree)
            if isinstance(node, (ast.Constant, ast.JoinedStr, ast.BinOp)) and id(node) not in prose
        }
    return frozenset(found)


def cells(heading: str) -> Iterator[str]:
    """The cells below this heading in all tables of the guide."""
    column = None
    for line in GUIDE.read_text(encoding="utf-8").splitlines():
        row = [cell.strip() for cell in line.strip().strip("|").split(" | ")]
        if not line.startswith("|"):
            column = None
        elif column is None:
            column = row.index(heading) if heading in row else -1
        elif column >= 0 and not line.startswith("|---"):
            yield row[column]


MESSAGES = sorted({quoted for cell in cells("message") for quoted in re.findall(r"`([^`]+)`", cell)})


def occurs(message: str) -> bool:
    """Whether one string of the code has all literal parts of the message, in their order."""
    parts = [part.strip() for part in message.split("...") if len(part.strip()) > 1]
    pattern = re.compile(".*".join(map(re.escape, parts)), re.DOTALL)
    return any(pattern.search(text) for text in code_strings())


@pytest.mark.parametrize("message", MESSAGES)
def test_the_code_has_this_message(message: str) -> None:
    assert occurs(message)


def test_the_code_has_these_codes() -> None:
    named = [code for cell in cells("status, code") for code in CODE.findall(cell)]
    assert len(named) > 10
    assert set(named) <= code_strings()


def test_the_guide_has_messages_and_others_are_not_found() -> None:
    assert len(MESSAGES) > 50
    assert not occurs("The KV cache fits 17 blocks: one block of ... tokens takes ...")
    assert not occurs("Cannot listen on ...: ... Choose another --host, or stop what uses it.")
