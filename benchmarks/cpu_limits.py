"""What this machine can do at most, and how a measurement compares with it.

Owns the table of results; the limits (read bandwidth; float32, int8 and bfloat16 peak; measured by loops in
the native module) are the workbench's. A machine's speed drifts, so limits are measured before and after each
part of a run, and a part is compared with the better of the two.
"""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from gqa_serve import __version__
from gqa_serve.workbench.bench.limits import Limits, processor_name


@dataclasses.dataclass
class Result:
    """One line: rates of some rounds, and the limits they are compared with (what the limit is -> rate)."""

    part: str
    model: str
    what: str
    unit: str
    rates: list[float]
    limits: dict[str, float] = dataclasses.field(default_factory=dict)

    @property
    def median(self) -> float:
        return statistics.median(self.rates)

    def __str__(self) -> str:
        fractions = "   ".join(
            f"{self.median / limit:4.0%}, best {max(self.rates) / limit:4.0%} of {name}"
            for name, limit in self.limits.items()
        )
        scale, unit = (1e9, "G" + self.unit) if self.median > 1e8 else (1, self.unit)
        spread = f"({min(self.rates) / scale:.1f} .. {max(self.rates) / scale:.1f})"
        return f"  {self.what:<34} {self.median / scale:9.1f} {unit:<8} {spread:<20} {fractions}"


class Report:
    """Prints results as they come, and keeps them for `--json`."""

    def __init__(self, isa: str, threads: int) -> None:
        self.isa = isa
        self.threads = threads
        self.results: list[Result] = []
        self.limits: list[Limits] = []
        print(self.machine(), flush=True)

    def machine(self) -> str:
        """Processor, cores, threads, instruction set, versions."""
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        return (
            f"{processor_name()}, {cores} cores; {self.threads} threads, {self.isa}; "
            f"gqa-serve {__version__}, torch {torch.__version__}, "
            f"Python {platform.python_version()}, {platform.platform()}"
        )

    def measure_limits(self) -> Limits:
        self.limits.append(Limits.measure(self.isa, self.threads))
        return self.limits[-1]

    def section(self, title: str) -> None:
        print(f"\n{title}", flush=True)

    def add(self, results: Sequence[Result]) -> None:
        self.results += results
        for result in results:
            print(result, flush=True)

    def write(self, path: Path) -> None:
        """Everything, as JSON."""
        rows: list[dict[str, Any]] = [
            {**dataclasses.asdict(result), "median": result.median} for result in self.results
        ]
        limits = [dataclasses.asdict(limit) for limit in self.limits]
        document = {"machine": self.machine(), "limits": limits, "results": rows}
        path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
