"""What a simulation found, as a report: latencies, what the engines did, cost, and plots over time.

Owns the tables and plots. Latencies are those of `records.py`, so that they can be laid beside measured ones.
Imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from gqa_serve.workbench.records import (
    Objectives,
    RequestRecord,
    Summary,
    comparison_table,
    latency_table,
    summarize,
)
from gqa_serve.workbench.report import (
    Cell,
    Column,
    Plot,
    Report,
    Section,
    Series,
    Table,
    gib,
    number,
    percent,
)
from gqa_serve.workbench.simulate.runs import CaseResult
from gqa_serve.workbench.simulate.timeline import on_grid

_CURVE = np.linspace(0, 100, 101)


def fill(report: Report, results: Sequence[CaseResult], objectives: Objectives | None) -> None:
    """Add everything that `results` tell to a report."""
    summaries = {result.case.label: summarize(result.records, objectives) for result in results}
    if len(results) == 1:
        report.sections.append(latency_table(next(iter(summaries.values()))))
    report.sections.append(comparison_table(summaries, "Traffic"))
    report.sections.append(engines_table(results, summaries))
    if failed := failures_table(results):
        report.sections.append(failed)
    report.sections += plots(results)
    report.data["runs"] = [_data(result, summaries[result.case.label]) for result in results]


def engines_table(results: Sequence[CaseResult], summaries: Mapping[str, Summary]) -> Table:
    """What the replicas did, and what that costs."""
    columns = [
        Column("name", "run"),
        Column("num_kv_heads", "KV heads", number()),
        Column("devices", "devices", number()),
        Column("duration_s", "virtual time, s", number(1)),
        Column("kv_bytes", "KV cache per device, GiB", gib()),
        Column("kv_tokens", "KV tokens per replica", number()),
        Column("kv_mean", "KV used, mean, %", percent()),
        Column("kv_peak", "KV used, peak, %", percent()),
        Column("batch", "requests per step", number(1)),
        Column("busy", "computing, %", percent()),
        Column("preemptions", "preemptions", number()),
        Column("hits", "prompt tokens from the cache, %", percent()),
        Column("rejected", "not served", number()),
        Column("cost", "cost per million output tokens", number(3)),
        Column("speed", "requests per wall second", number()),
    ]
    rows = [_engine_row(result, summaries[result.case.label]) for result in results]
    return Table("Engines", columns, rows)


def _engine_row(result: CaseResult, summary: Summary) -> dict[str, Cell]:
    case, counts = result.case, result.counts
    end_s = summary.duration_s
    blocks = case.spec.num_blocks
    replica_seconds = case.replicas * max(end_s, 1e-12)
    used = sum(timeline.used_seconds for timeline in result.timelines)
    hours = case.devices * end_s / 3600
    tokens = summary.output_tokens
    return {
        "name": case.label,
        "num_kv_heads": case.num_kv_heads,
        "devices": case.devices,
        "duration_s": end_s,
        "kv_bytes": case.kv_bytes,
        "kv_tokens": blocks * case.spec.block_size,
        "kv_mean": used / blocks / replica_seconds,
        "kv_peak": max(timeline.peak_used for timeline in result.timelines) / blocks,
        "batch": counts.num_rows / counts.num_steps if counts.num_steps else None,
        "busy": min(1.0, counts.busy_s / replica_seconds),
        "preemptions": counts.num_preemptions,
        "hits": counts.num_hit_tokens / counts.num_queried_tokens if counts.num_queried_tokens else None,
        "rejected": summary.num_failed,
        "cost": None if case.price is None or not tokens else case.price * hours / tokens * 1e6,
        "speed": summary.num_requests / max(result.wall_s, 1e-9),
    }


def failures_table(results: Sequence[CaseResult]) -> Table | None:
    """Requests that got no answer, by reason; None if there are none."""
    counted: dict[tuple[str, str], int] = {}
    for result in results:
        for record in result.records:
            if record.error is not None:
                key = (result.case.label, record.error)
                counted[key] = counted.get(key, 0) + 1
    if not counted:
        return None
    columns = [Column("name", "run"), Column("error", "reason"), Column("count", "requests", number())]
    rows: list[dict[str, Cell]] = [
        {"name": label, "error": error, "count": n} for (label, error), n in counted.items()
    ]
    return Table("Not served", columns, rows)


def plots(results: Sequence[CaseResult]) -> list[Section]:
    """Over time, and the distributions of latencies."""
    grids = {result.case.label: _grid(result) for result in results}
    over_time = [
        ("KV cache in use", "% of blocks", 1),
        ("Requests running", "requests", 2),
        ("Requests waiting", "requests", 3),
    ]
    found: list[Section] = []
    for title, unit, row in over_time:
        series = [Series(label, grid[0].tolist(), grid[row].tolist()) for label, grid in grids.items()]
        found.append(Plot(title, "virtual time, s", unit, series, kind="step"))
    for title, values in (
        ("Time to first token", lambda record: [] if record.ttft_s is None else [record.ttft_s]),
        ("Time between tokens", lambda record: record.itl_s),
    ):
        series = []
        for result in results:
            numbers = [value for record in result.records if record.error is None for value in values(record)]
            if numbers:
                curve = np.percentile(numbers, _CURVE) * 1e3
                series.append(Series(result.case.label, curve.tolist(), _CURVE.tolist()))
        if series:
            found.append(Plot(title, f"{title.lower()}, ms", "% of them at most so long", series))
    return found


def _grid(result: CaseResult) -> Any:
    """[4, n]: time, % of blocks in use, running, waiting, of the whole fleet."""
    end_s = max(timeline.points[-1][0] for timeline in result.timelines)
    grid = on_grid(result.timelines, end_s)
    grid[1] *= 100 / (result.case.spec.num_blocks * result.case.replicas)
    return grid


def _data(result: CaseResult, summary: Summary) -> dict[str, Any]:
    case, grid = result.case, _grid(result)
    return {
        "name": case.label,
        "model": case.source.name,
        "hardware": case.device_name,
        "replicas": case.replicas,
        "routing": case.routing,
        "settings": {name: getattr(case.spec, name) for name in case.spec.__dataclass_fields__},
        "cost_model": case.cost.to_json(),
        "summary": summary.to_json(),
        "counts": {name: getattr(result.counts, name) for name in result.counts.__dataclass_fields__},
        "over_time": {
            "seconds": grid[0].tolist(),
            "kv_used_percent": grid[1].tolist(),
            "running": grid[2].tolist(),
            "waiting": grid[3].tolist(),
        },
    }


def validation_table(measured: Sequence[RequestRecord], predicted: Sequence[RequestRecord]) -> Table:
    """Measured and predicted side by side, and how far the prediction is off."""
    runs = [summarize(measured), summarize(predicted)]
    rows: list[dict[str, Cell]] = []

    def add(name: str, values: Sequence[float | None]) -> None:
        real, twin = values
        error = None if not real or twin is None else twin / real - 1
        rows.append({"name": name, "measured": real, "predicted": twin, "error": error})

    add("output tokens/s", [run.output_rate for run in runs])
    add("requests/s", [run.request_rate for run in runs])
    for key, title in (("itl_s", "ITL"), ("tpot_s", "TPOT"), ("ttft_s", "TTFT"), ("e2e_s", "end to end")):
        for point in ("mean", "p50", "p99"):
            values = [run.latencies[key].get(point) for run in runs]
            add(f"{title} {point}, ms", [None if value is None else value * 1e3 for value in values])
    columns = [
        Column("name", ""),
        Column("measured", "measured", number(2)),
        Column("predicted", "predicted", number(2)),
        Column("error", "error, %", percent()),
    ]
    return Table("Predicted and measured", columns, rows)
