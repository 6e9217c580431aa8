"""What a soak found: every request's end, times, memory over time, and what was not as promised.

Owns counting and the report's two forms. Knows no HTTP. Invariant: `failures` holds a sentence for everything
that must not happen; an empty list is a passed soak.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil

MAX_RSS_GROWTH = 0.02
_MIN_SAMPLES = 300  # of memory, after warm-up, to judge by: one a second
_MAX_SHOWN = 20


@dataclasses.dataclass
class Sample:
    """Resident memory in bytes at a time: of the API process, and of the engine process with that id."""

    at_s: float
    api: int
    engine_pid: int | None
    engine: int


class Findings:
    """Everything that is counted."""

    def __init__(self) -> None:
        self.began_s = time.monotonic()
        self.ends: dict[str, Counter[str]] = defaultdict(Counter)
        self.times: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
        self.failures: list[str] = []
        self.faults: Counter[str] = Counter()
        self.samples: list[Sample] = []
        self.warm_s: float | None = None
        self.notes: dict[str, Any] = {}

    @property
    def num_requests(self) -> int:
        """Requests that ended."""
        return sum(sum(ends.values()) for ends in self.ends.values())

    def sample(self, api: psutil.Process, engine: psutil.Process | None) -> None:
        """Note what memory both processes hold."""
        held = 0
        try:
            held = 0 if engine is None else engine.memory_info().rss
        except psutil.NoSuchProcess:
            engine = None
        pid = None if engine is None else engine.pid
        self.samples.append(Sample(time.monotonic(), api.memory_info().rss, pid, held))

    def judge_memory(self) -> None:
        """Compare the first and the last fifth after warm-up: the API process, and each engine process.

        By the least that was held in each: a large body or prompt takes some MiB, which the allocator keeps
        for minutes and then gives back. Shorter runs show such steps and nothing else, and are not judged.
        """
        warm = [sample for sample in self.samples if self.warm_s is not None and sample.at_s >= self.warm_s]
        self._judge("API process", [sample.api for sample in warm])
        for number, pid in enumerate(dict.fromkeys(sample.engine_pid for sample in warm), 1):
            own = [sample for sample in warm if sample.engine_pid == pid]
            settled = [sample.engine for sample in own if sample.at_s - own[0].at_s >= self.settle_s]
            if pid is not None:
                self._judge(f"engine process {number}", settled)

    @property
    def settle_s(self) -> float:
        """How long an engine process takes to touch all the memory it uses: as long as the warm-up was."""
        return 0.0 if self.warm_s is None else self.warm_s - self.began_s

    def _judge(self, name: str, held: Sequence[int]) -> None:
        if not held:
            return
        share = max(1, len(held) // 5)
        first, last = min(held[:share]), min(held[-share:])
        growth = last / first - 1
        judged = len(held) >= _MIN_SAMPLES
        self.notes[f"memory of {name}"] = {
            "start_mib": round(first / 2**20, 1),
            "end_mib": round(last / 2**20, 1),
            "growth": round(growth, 4),
            "judged": judged,
        }
        if judged and growth > MAX_RSS_GROWTH:
            self.failures.append(f"The memory of the {name} grew by {growth:.1%}.")

    # --- the report ----------------------------------------------------------------------------------------

    def as_dict(self) -> dict[str, Any]:
        """The report as JSON values."""
        ends: Counter[str] = Counter()
        for counted in self.ends.values():
            ends += counted
        return {
            "passed": not self.failures,
            "seconds": round(time.monotonic() - self.began_s, 1),
            "requests": self.num_requests,
            "ends": dict(sorted(ends.items())),
            "ends_by_kind": {kind: dict(sorted(own.items())) for kind, own in sorted(self.ends.items())},
            "faults": dict(self.faults),
            "notes": self.notes,
            "times_ms": {
                kind: {name: _quantiles(values) for name, values in own.items()}
                for kind, own in sorted(self.times.items())
            },
            "failures": self.failures,
        }

    def text(self) -> str:
        """The report for people."""
        report = self.as_dict()
        lines = [f"{report['requests']} requests in {report['seconds']:.0f} s"]
        lines += [f"  {count:7d}  {end}" for end, count in report["ends"].items()]
        lines.append("faults: " + (", ".join(f"{n} {k}" for k, n in sorted(self.faults.items())) or "none"))
        for name, value in self.notes.items():
            lines.append(f"{name}: {value}")
        lines.append(f"{'ms, p50 / p99':<24}{'first byte':>18}{'between':>18}{'whole':>20}")
        for kind, own in report["times_ms"].items():
            columns = [own.get(name, {}) for name in ("first", "gap", "total")]
            cells = [f"{one['p50']:.0f} / {one['p99']:.0f}" if one else "-" for one in columns]
            lines.append(f"  {kind:<22}{cells[0]:>18}{cells[1]:>18}{cells[2]:>20}")
        lines += [f"FAILED: {failure}" for failure in self.failures[:_MAX_SHOWN]]
        if len(self.failures) > _MAX_SHOWN:
            lines.append(f"FAILED: and {len(self.failures) - _MAX_SHOWN} more")
        lines.append("passed" if not self.failures else "failed")
        return "\n".join(lines)

    def write(self, path: Path) -> None:
        """The report as a JSON file."""
        path.write_text(json.dumps(self.as_dict(), indent=1), encoding="utf-8")


def _quantiles(values: Sequence[float]) -> dict[str, float]:
    ordered = sorted(values)
    if not ordered:
        return {}
    return {
        "p50": round(ordered[len(ordered) // 2] * 1000, 1),
        "p99": round(ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))] * 1000, 1),
    }
