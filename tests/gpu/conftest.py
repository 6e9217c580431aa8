"""Tests on a real GPU: `make test-gpu`. Elsewhere they are not collected into a run (mark `gpu`)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.gpu)


@pytest.fixture(scope="session")
def gpu() -> torch.device:
    """The device; without one a test that was asked for fails, so that nothing passes for having been
    skipped.
    """
    if not torch.cuda.is_available():
        pytest.fail("There is no CUDA device here; run without -m gpu.")
    return torch.device("cuda")
