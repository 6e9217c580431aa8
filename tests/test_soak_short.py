"""The soak, for a quarter of a minute: all kinds of traffic, clients that leave, and faults."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from demo_model import demo_path

SOAK = Path(__file__).with_name("soak")


def test_a_quarter_of_a_minute_of_everything(tmp_path: Path) -> None:
    demo_path()  # skips where the weights are missing
    report = tmp_path / "report.json"
    command = [
        sys.executable,
        str(SOAK),
        "--minutes",
        "0.25",
        "--clients",
        "8",
        "--fault-every",
        "3",
        "--known",
        "12",
    ]
    result = subprocess.run(
        [*command, "--json", str(report)], capture_output=True, text=True, timeout=400, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
    found = json.loads(report.read_text(encoding="utf-8"))
    assert found["ends"]["complete"] > 12  # more than the known ones that come first
    assert found["faults"]["exception"] >= 1
    assert found["failures"] == []
