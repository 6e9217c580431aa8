"""What happened to each request of a run, measured by `bench` or computed by `simulate`, and its summary.

Owns the definitions of the latencies, so that what is predicted and what is measured are the same thing:

    sent          first token                 last token
      |---- TTFT ----|-- ITL --|-- ITL --|-- ITL --|        TPOT = (e2e - TTFT) / (output tokens - 1)
      |------------------- e2e --------------------|

Imports no torch. Invariant: a record is complete; a request that failed has `error` and counts in no latency.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from gqa_serve.errors import ConfigError
from gqa_serve.workbench.json_lines import read_json_lines, write_json_lines
from gqa_serve.workbench.report import Cell, Column, Table, number, percent, scaled

PERCENTILES = (50, 90, 95, 99)


@dataclass(kw_only=True)
class RequestRecord:
    """One request; times in seconds, `sent_s` from the start of the run.

    `token_s`: when each token arrived, from `sent_s`; several may arrive together, then they have one time.
    `late_s`: how much later than planned it was sent.
    """

    sent_s: float
    prompt_tokens: int
    output_tokens: int
    token_s: list[float] = field(default_factory=list)
    e2e_s: float = 0.0
    cached_tokens: int | None = None
    preemptions: int | None = None
    late_s: float = 0.0
    conversation: str | None = None
    turn: int = 0
    replica: int | None = None
    finish_reason: str | None = None
    error: str | None = None

    @property
    def ttft_s(self) -> float | None:
        """Time to first token."""
        return self.token_s[0] if self.token_s else None

    @property
    def tpot_s(self) -> float | None:
        """Time per output token after the first."""
        if len(self.token_s) < 2 or self.output_tokens < 2:
            return None
        return (self.token_s[-1] - self.token_s[0]) / (self.output_tokens - 1)

    @property
    def itl_s(self) -> list[float]:
        """Times between tokens; of tokens that arrive together, the time before the first of them once."""
        gaps = np.diff(np.asarray(self.token_s))
        return list(gaps[gaps > 0].tolist())


@dataclass(frozen=True)
class Objectives:
    """Bounds in seconds that a good answer keeps; None: any."""

    ttft_s: float | None = None
    tpot_s: float | None = None
    e2e_s: float | None = None

    def met(self, record: RequestRecord) -> bool:
        """Whether it ended well and within all bounds. Without a token it kept none for the first."""
        if record.error is not None or (self.ttft_s is not None and record.ttft_s is None):
            return False
        values = (record.ttft_s, record.tpot_s, record.e2e_s)
        bounds = (self.ttft_s, self.tpot_s, self.e2e_s)
        return all(
            bound is None or value is None or value <= bound
            for value, bound in zip(values, bounds, strict=True)
        )


@dataclass(frozen=True)
class Summary:
    """A run in numbers. Rates are over `duration_s`, from the first request sent to the last end."""

    num_requests: int
    num_failed: int
    duration_s: float
    prompt_tokens: int
    output_tokens: int
    cached_tokens: int | None
    goodput: float | None
    """Requests per second that met the objectives."""
    latencies: dict[str, dict[str, float]]
    """"ttft_s", "tpot_s", "itl_s", "e2e_s": mean, p50, p90, p95, p99, max of each."""

    @property
    def request_rate(self) -> float:
        return _rate(self.num_requests - self.num_failed, self.duration_s)

    @property
    def output_rate(self) -> float:
        return _rate(self.output_tokens, self.duration_s)

    @property
    def prompt_rate(self) -> float:
        return _rate(self.prompt_tokens, self.duration_s)

    def to_json(self) -> dict[str, Any]:
        rates = {name: getattr(self, name) for name in ("request_rate", "output_rate", "prompt_rate")}
        return {**asdict(self), **rates}


def summarize(records: Sequence[RequestRecord], objectives: Objectives | None = None) -> Summary:
    """The summary of a run's records. Raises ConfigError if there are none."""
    if not records:
        raise ConfigError("There is no request to summarize.")
    good = [record for record in records if record.error is None]
    start = min(record.sent_s for record in records)
    duration_s = max(record.sent_s + record.e2e_s for record in records) - start
    cached = [record.cached_tokens for record in good if record.cached_tokens is not None]
    met = None
    if objectives is not None:
        met = _rate(sum(objectives.met(record) for record in good), duration_s)
    samples = {
        "ttft_s": [record.ttft_s for record in good if record.ttft_s is not None],
        "tpot_s": [record.tpot_s for record in good if record.tpot_s is not None],
        "itl_s": [gap for record in good for gap in record.itl_s],
        "e2e_s": [record.e2e_s for record in good],
    }
    return Summary(
        num_requests=len(records),
        num_failed=len(records) - len(good),
        duration_s=duration_s,
        prompt_tokens=sum(record.prompt_tokens for record in good),
        output_tokens=sum(record.output_tokens for record in good),
        cached_tokens=sum(cached) if cached else None,
        goodput=met,
        latencies={name: describe(values) for name, values in samples.items()},
    )


def _rate(count: int, seconds: float) -> float:
    """A run in which everything was refused at once took no time, and did nothing."""
    return count / seconds if seconds > 0 else 0.0


def describe(values: Sequence[float]) -> dict[str, float]:
    """mean, percentiles and max; {} of nothing."""
    if not values:
        return {}
    points = np.percentile(values, PERCENTILES)
    shown = {f"p{at}": float(point) for at, point in zip(PERCENTILES, points, strict=True)}
    return {"mean": float(np.mean(values)), **shown, "max": float(np.max(values))}


def latency_table(summary: Summary) -> Table:
    """Latencies in milliseconds, a row each."""
    names = {"ttft_s": "TTFT", "tpot_s": "TPOT", "itl_s": "ITL", "e2e_s": "end to end"}
    show = scaled(1e3, 1)
    columns = ["mean", *(f"p{at}" for at in PERCENTILES), "max"]
    return Table(
        "Latency",
        [Column("name", "ms"), *(Column(name, name, show) for name in columns)],
        [{"name": title, **summary.latencies[key]} for key, title in names.items()],
    )


def comparison_table(runs: dict[str, Summary], title: str = "Runs") -> Table:
    """Runs side by side, a row each."""
    columns = [
        Column("name", "run"),
        Column("request_rate", "requests/s", number(2)),
        Column("output_rate", "output tokens/s", number(1)),
        Column("goodput", "goodput, requests/s", number(2)),
        Column("failed", "failed, %", percent()),
        *(
            Column(f"{key}.{point}", f"{key[:-2].upper()} {point}, ms", scaled(1e3, 1))
            for key in ("ttft_s", "itl_s", "e2e_s")
            for point in ("mean", "p50", "p99")
        ),
    ]
    rows: list[dict[str, Cell]] = []
    for name, run in runs.items():
        row: dict[str, Cell] = {"name": name, "failed": run.num_failed / run.num_requests}
        row |= {"request_rate": run.request_rate, "output_rate": run.output_rate, "goodput": run.goodput}
        row |= {f"{key}.{point}": value for key, of in run.latencies.items() for point, value in of.items()}
        rows.append(row)
    return Table(title, columns, rows)


def read_records(path: Path) -> list[RequestRecord]:
    """The records of a JSONL file. Raises ConfigError that names the line."""
    return read_json_lines(path, RequestRecord, "record of a request")


def write_records(path: Path, records: Iterable[RequestRecord]) -> None:
    """One JSON object a line. Raises ConfigError if the file can't be written."""
    write_json_lines(path, records)
