"""Schemathesis over `/openapi.json`: requests by the thousand, right and wrong, answered as described."""

from __future__ import annotations

import gzip
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from fake_engine import FakeEngine, serving, wait_until

from gqa_serve.engine.wire import Profiled

KEY = "sk-test"


EVERYTHING = ("--max-examples", "50")
QUICK = ("--max-examples", "20", "--phases", "examples,fuzzing,stateful")
EDGES = ("--phases", "coverage", "--include-path", "/v1/chat/completions", "--include-tag", "Server")


@pytest.mark.parametrize("options", [QUICK, EDGES, pytest.param(EVERYTHING, marks=pytest.mark.slow)])
def test_nothing_that_fits_the_description_or_misses_it_is_a_surprise(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, options: tuple[str, ...]
) -> None:
    """All checks but one: JSON schemas cannot say that a token id is in the vocabulary or a prompt fits."""
    engine = FakeEngine()
    engine.profiled = Profiled(1, 1, gzip.compress(b"{}"))  # else every profile would wait for steps
    with serving(engine, api_key=(KEY,)) as server:
        command = [
            *(sys.executable, "-m", "schemathesis.cli", "run", f"{server.url}/openapi.json"),
            *("--header", f"Authorization: Bearer {KEY}"),
            *("--checks", "all", "--exclude-checks", "positive_data_acceptance"),
            *("--generation-deterministic", "--no-color", "--workers", "1", *options),
        ]
        environ = {**os.environ, "PYTHONWARNINGS": "default"}  # theirs are not ours to fix
        result = subprocess.run(
            command, cwd=tmp_path, env=environ, capture_output=True, text=True, timeout=240, check=False
        )
        assert result.returncode == 0, result.stdout[-20_000:] + result.stderr[-2000:]
        tested = re.search(r"Tested: (\d+)", result.stdout)
        selected = re.search(r"Selected: (\d+)/(\d+)", result.stdout)
        passed = re.search(r"(\d+) generated, (\d+) passed", result.stdout)
        assert tested is not None
        assert selected is not None
        assert passed is not None
        assert tested[1] == selected[1]
        assert (selected[1] == selected[2]) == (options is not EDGES)
        assert int(passed[1]) == int(passed[2]) > 500
        wait_until(lambda: server.engine.num_running == 0)
        assert len(server.engine.requests) > 10  # it was not all refused
    assert [record.getMessage() for record in caplog.records if record.levelname == "ERROR"] == []
