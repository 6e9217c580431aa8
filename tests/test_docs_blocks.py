"""Every block of commands or Python in README.md and docs/ is run by a test, or says what it needs.

The convention is document_blocks.py's. What runs here runs as a reader would have it: in a shell that stops
at the first failure, or in a Python of its own, in a directory of its own, with `gqa-serve` on the path; the
configs of tests/workbench/configs lie there under their names, and a server of the demo model stands for the
one on port 8000.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from document_blocks import DOCUMENTS, REPOSITORY, Block, blocks

if TYPE_CHECKING:
    from demo_server import RunningServer

BLOCKS = [block for document in DOCUMENTS for block in blocks(document)]
CONFIGS = Path(__file__).parent / "workbench" / "configs"
LIMIT_S = 250
SLOW_LIMIT_S = 1500


def marked(*marks: str) -> list[Block]:
    """The blocks with one of these marks."""
    return [block for block in BLOCKS if block.mark in marks]


def run(block: Block, folder: Path, port: int | None, limit_s: float) -> str:
    """What the block prints; an assertion fails with all of it where its status is not 0."""
    programs = folder / "bin"
    programs.mkdir()
    (programs / "gqa-serve").write_text(f'#!/bin/sh\nexec "{sys.executable}" -m gqa_serve.cli "$@"\n')
    (programs / "gqa-serve").chmod(0o755)
    for config in CONFIGS.glob("*.json"):
        shutil.copy(config, folder)
    commands = block.commands()
    if port is not None:
        assert ":8000" in commands, f"{block.name} asks no server on port 8000; is the mark right?"
        commands = commands.replace(":8000", f":{port}").replace("curl ", "curl --fail-with-body --silent ")
    runner = [sys.executable, "-c"] if block.is_python else ["bash", "-e", "-c"]
    done = subprocess.run(
        [*runner, commands],
        cwd=folder,
        env={**os.environ, "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=limit_s,
        check=False,
    )
    assert done.returncode == 0, f"{block.name}:\n{commands}\n{done.stdout}"
    return done.stdout


def test_every_block_says_who_runs_it() -> None:
    unmarked = [block.name for block in BLOCKS if not block.mark]
    assert unmarked == [], "mark them as tests/document_blocks.py says"
    assert len(BLOCKS) > 50


def test_the_tests_that_marks_name_exist() -> None:
    named = [(block.name, path) for block in BLOCKS for path in re.findall(r"tests/[\w/]+\.py", block.mark)]
    assert [name for name, path in named if not (REPOSITORY / path).is_file()] == []
    assert len(named) > 5


@pytest.mark.parametrize("block", marked("runs"), ids=lambda block: block.name)
def test_a_block_runs(block: Block, tmp_path: Path) -> None:
    assert run(block, tmp_path, None, LIMIT_S)


@pytest.mark.slow
@pytest.mark.timeout(SLOW_LIMIT_S + 30)
@pytest.mark.parametrize("block", marked("runs: slowly"), ids=lambda block: block.name)
def test_a_slow_block_runs(block: Block, tmp_path: Path, demo_server: RunningServer) -> None:
    port = int(demo_server.url.rpartition(":")[2]) if ":8000" in block.commands() else None
    assert run(block, tmp_path, port, SLOW_LIMIT_S)


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
@pytest.mark.parametrize("block", marked("runs: against a server"), ids=lambda block: block.name)
def test_a_block_runs_against_a_server(block: Block, tmp_path: Path, demo_server: RunningServer) -> None:
    assert run(block, tmp_path, int(demo_server.url.rpartition(":")[2]), LIMIT_S)


def test_a_block_without_a_mark_is_found(tmp_path: Path) -> None:
    document = tmp_path / "page.md"
    document.write_text(
        "Text.\n\n    gqa-serve --model demo\n\n<!-- runs -->\n\n    $ pip install x\n    done\n\n"
        "<!-- needs: a GPU -->\n```\nA=1 docker run\n```\n\n```python\nx = 1\n```\n\n    serve\n\n"
        "<!-- runs -->\n\n    import x\n    x.y()\n"
    )
    found = blocks(document)
    assert [(block.line, block.mark, block.is_python) for block in found] == [
        (3, "", False),
        (7, "runs", False),
        (11, "needs: a GPU", False),
        (15, "", True),
        (23, "runs", True),
    ]
    assert found[1].commands() == "pip install x\n"
