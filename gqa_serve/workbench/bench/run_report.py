"""The report of one run: what was sent, how fast it was answered, what is to be doubted about it.

Owns the choice of tables, plots and notes. Computes nothing that `records.py` or `kv_demand.py` define.
Invariant: every way in which the run was not what was asked for has a sentence.
"""

from __future__ import annotations

import collections
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from gqa_serve.engine.model_config import ModelConfig
from gqa_serve.workbench.bench.kv_demand import kv_demand, kv_plot, kv_tables
from gqa_serve.workbench.bench.load import Run, Sent
from gqa_serve.workbench.records import (
    Objectives,
    RequestRecord,
    Summary,
    describe,
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
    number,
    percent,
    scaled,
)
from gqa_serve.workbench.trace import TraceRequest

_BUSY = 0.8
_LATE_S = 0.05
_DRAIN = 0.1
_BINS = 60


@dataclass(frozen=True, kw_only=True)
class RunFacts:
    """What a report tells beside the records. `settings`: flags as given; `how_counted`: as calibrated."""

    label: str
    server: str
    model: str
    endpoint: str
    command: str
    settings: dict[str, Any]
    how_counted: str
    has_usage: bool
    refused: Sequence[str] = ()
    client_cpu: float = 0.0
    config: ModelConfig | None = None
    objectives: Objectives | None = None


def run_report(run: Run, facts: RunFacts) -> Report:
    """Tables, plots, notes and data. Raises ConfigError if there is no record."""
    records = run.records
    summary = summarize(records, facts.objectives)
    report = Report("bench", f"{facts.model} at {facts.server}", facts.command)
    report.data = {
        "label": facts.label,
        "server": facts.server,
        "model": facts.model,
        "endpoint": facts.endpoint,
        "settings": facts.settings,
        "summary": summary.to_json(),
        "interrupted": run.interrupted,
        "client_cpu": facts.client_cpu,
        "late_s": describe([record.late_s for record in records]) if run.scheduled else {},
    }
    demand = kv_demand(records)
    report.sections = [_overview(summary, run, facts), latency_table(summary)]
    if demand is not None:
        report.sections += kv_tables(demand, facts.config)
    if summary.num_failed:
        report.sections.append(_errors(records))
    report.sections += notes(run, facts)
    report.sections += _plots(records, facts.objectives)
    if demand is not None:
        report.sections.append(kv_plot(demand, facts.config))
    return report


def _overview(summary: Summary, run: Run, facts: RunFacts) -> Table:
    row: dict[str, Cell] = {
        "name": facts.label,
        "num_requests": summary.num_requests,
        "num_failed": summary.num_failed,
        "duration_s": summary.duration_s,
        "request_rate": summary.request_rate,
        "output_rate": summary.output_rate,
        "prompt_rate": summary.prompt_rate,
    }
    columns = [
        Column("name", "run"),
        Column("num_requests", "requests", number()),
        Column("num_failed", "failed", number()),
        Column("duration_s", "duration, s", number(1)),
        Column("request_rate", "requests/s", number(2)),
        Column("output_rate", "output tokens/s", number(1)),
        Column("prompt_rate", "prompt tokens/s", number(1)),
    ]
    if summary.cached_tokens is not None:
        row["cached"] = summary.cached_tokens / max(1, summary.prompt_tokens)
        columns.append(Column("cached", "prompt tokens from cache, %", percent()))
    if summary.goodput is not None:
        row["goodput"] = summary.goodput
        row["met"] = summary.goodput * summary.duration_s / summary.num_requests
        columns.append(Column("goodput", "goodput, requests/s", number(2)))
        columns.append(Column("met", "within objectives, %", percent()))
    if run.scheduled:
        late = describe([record.late_s for record in run.records])
        row["late_p99"] = late["p99"]
        columns.append(Column("late_p99", "sent late, p99, ms", scaled(1e3, 1)))
    return Table("Run", columns, [row])


def _errors(records: Sequence[RequestRecord]) -> Table:
    counts = collections.Counter(record.error for record in records if record.error is not None)
    rows: list[dict[str, Cell]] = [
        {"error": error, "count": count} for error, count in counts.most_common(10)
    ]
    note = f"and {len(counts) - 10} other errors" if len(counts) > 10 else ""
    return Table("Failures", [Column("error", "error"), Column("count", "requests", number())], rows, note)


def notes(run: Run, facts: RunFacts) -> list[str]:
    """What a reader must know before using the numbers, a sentence or two each."""
    good = [one for one in run.sent if one.record.error is None]
    found = [_interruption(run), _unanswered(run), _refusals(facts), _usage(facts)]
    if good:
        found += [_prompt_lengths(good, facts), _output_lengths(good), _silent(good)]
    found += [_draining(run), _client(facts), _lateness(run)]
    return [note for note in found if note]


def _interruption(run: Run) -> str:
    if not run.interrupted:
        return ""
    return (
        f"Interrupted: {len(run.sent)} of {run.num_wanted} requests had ended; {run.num_cut} that were "
        "running are not counted, so the longest answers are missing."
    )


def _unanswered(run: Run) -> str:
    if run.interrupted or not run.num_unsent:
        return ""
    return f"{run.num_unsent} later turns were not sent, because a turn before them failed."


def _refusals(facts: RunFacts) -> str:
    if not facts.refused:
        return ""
    words = {
        "ignore_eos": "answers end where the model ends them, not at the wanted length",
        "skip_special_tokens": "special tokens are not seen",
        "stream_options": "token counts are not told",
    }
    said = "; ".join(f"{name} ({words[name]})" for name in facts.refused)
    return f"The server refused: {said}."


def _usage(facts: RunFacts) -> str:
    if facts.has_usage:
        return ""
    return (
        "The server tells no usage: prompts are counted as wanted, without its template, and outputs as "
        "events that bring text."
    )


def _prompt_lengths(good: Sequence[Sent], facts: RunFacts) -> str:
    if not facts.has_usage:
        return ""
    wanted = np.array([one.request.prompt_tokens for one in good])
    real = np.array([one.record.prompt_tokens for one in good])
    if any(one.request.prompt is not None for one in good):
        return (
            f"Your texts have {wanted.mean():,.1f} tokens on average (whole conversations, as in the "
            f"dataset), and {real.mean():,.1f} as sent, with the answers that came and what the server adds. "
            "All numbers are from the real counts."
        )
    off = np.abs(real - wanted) / wanted
    if not off.any():
        return f"Prompts had exactly the wanted tokens (words counted {facts.how_counted})."
    return (
        f"Prompts had {real.mean():,.1f} tokens on average where {wanted.mean():,.1f} were wanted; the "
        f"mean deviation is {off.mean():.1%}, the largest {off.max():.1%} (words counted "
        f"{facts.how_counted}). All numbers are from the real counts."
    )


def _output_lengths(good: Sequence[Sent]) -> str:
    short = [one for one in good if one.record.output_tokens < one.request.output_tokens]
    over = sum(one.record.output_tokens > one.request.output_tokens for one in good)
    parts = []
    if short:
        real = sum(one.record.output_tokens for one in good) / sum(one.request.output_tokens for one in good)
        parts.append(
            f"{len(short)} of {len(good)} answers ended before their wanted length ({real:.1%} of the wanted "
            "tokens came): the server did not obey ignore_eos."
        )
    if over:
        parts.append(f"{over} answers were longer than max_tokens.")
    return " ".join(parts)


def _silent(good: Sequence[Sent]) -> str:
    silent = sum(not one.record.token_s for one in good)
    if not silent:
        return ""
    return f"{silent} answers brought no text at all; they have no TTFT and no ITL."


def _draining(run: Run) -> str:
    """Of a closed loop: how much of the run some of its users had nothing more to send."""
    records = run.records
    if run.scheduled or run.interrupted or not records:
        return ""
    last_sent = records[-1].sent_s
    duration = max(record.sent_s + record.e2e_s for record in records) - records[0].sent_s
    before = last_sent - records[0].sent_s
    first_end = min(record.sent_s + record.e2e_s for record in records)
    if (
        last_sent < first_end or duration - before < _DRAIN * duration
    ):  # all at once was wanted, or it is little
        return ""
    arrived = sum(
        record.sent_s + at <= last_sent for record in records if record.error is None for at in record.token_s
    )
    return (
        f"In the last {duration - before:,.1f} s ({1 - before / duration:.0%} of the run) there was nothing "
        f"new to send, and fewer users were at work; until then {arrived / before:,.1f} output tokens/s "
        "came. With more --num-requests this weighs less."
    )


def _client(facts: RunFacts) -> str:
    if facts.client_cpu < _BUSY:
        return ""
    return (
        f"The load generator was busy {facts.client_cpu:.0%} of the time: it may have been the bottleneck. "
        "Run several at once, on more cores, for more load."
    )


def _lateness(run: Run) -> str:
    if not run.scheduled or not run.sent:
        return ""
    late = describe([one.record.late_s for one in run.sent])
    if late["p99"] < _LATE_S:
        return ""
    return (
        f"Requests were sent {late['mean'] * 1e3:,.0f} ms late on average and {late['max'] * 1e3:,.0f} ms at "
        "most: --concurrency, or the machine of the load generator, held them back. Users would have waited "
        "that much longer than the latencies say."
    )


def _plots(records: Sequence[RequestRecord], objectives: Objectives | None) -> list[Section]:
    good = [record for record in records if record.error is None and record.token_s]
    if not good:
        return []
    bound = None if objectives is None else objectives.ttft_s
    ttft = Plot(
        "Time to first token over the run",
        "sent at, s",
        "TTFT, ms",
        [Series("TTFT", [r.sent_s for r in good], [r.token_s[0] * 1e3 for r in good])],
        kind="point",
        bounds={} if bound is None else {"objective": bound * 1e3},
    )
    return [ttft, _throughput(good), _distribution(good)]


def _throughput(good: Sequence[RequestRecord]) -> Plot:
    arrived = np.concatenate([record.sent_s + np.asarray(record.token_s) for record in good])
    end = float(arrived.max())
    counts, edges = np.histogram(arrived, bins=_BINS, range=(0.0, max(end, 1e-3)))
    rate = counts / np.diff(edges)
    return Plot(
        "Output tokens per second over the run",
        "time, s",
        "output tokens/s",
        [Series("tokens/s", edges[:-1].tolist(), rate.tolist())],
        kind="step",
    )


def _distribution(good: Sequence[RequestRecord]) -> Plot:
    samples = {
        "TTFT": [record.token_s[0] for record in good],
        "ITL": [gap for record in good for gap in record.itl_s],
        "TPOT": [value for record in good if (value := record.tpot_s) is not None],
        "end to end": [record.e2e_s for record in good],
    }
    points = np.linspace(0, 100, 101)
    series = [
        Series(name, points.tolist(), (np.percentile(values, points) * 1e3).clip(1e-3).tolist())
        for name, values in samples.items()
        if values
    ]
    return Plot("Percentiles of the latencies", "percentile", "ms", series, log_y=True)


def replayable(run: Run) -> list[TraceRequest]:
    """What was sent, with the real counts and times, as a trace. A conversation ends before a failure."""
    by_name: dict[str | None, list[Sent]] = {}
    for one in sorted(run.sent, key=lambda one: (one.record.sent_s, one.request.turn)):
        if one.record.error is None:
            by_name.setdefault(one.request.conversation, []).append(one)
    begin = min((one.record.sent_s for one in run.sent), default=0.0)
    trace: list[TraceRequest] = []
    for name, sent in by_name.items():
        before: Sent | None = None
        for one in sent:
            previous = before if name is not None else None
            trace.append(_as_sent(one, previous, begin))
            before = one
    return trace


def _as_sent(one: Sent, before: Sent | None, begin: float) -> TraceRequest:
    request, record = one.request, one.record
    prompt_tokens = max(1, record.prompt_tokens)
    if before is not None:  # a template may drop parts of earlier answers; a trace says that turns only grow
        held = max(1, before.record.prompt_tokens) + max(1, before.record.output_tokens)
        prompt_tokens = max(prompt_tokens, held + 1)
    ended = 0.0 if before is None else before.record.sent_s + before.record.e2e_s
    return TraceRequest(
        arrival_s=0.0 if before is not None else record.sent_s - begin,
        prompt_tokens=prompt_tokens,
        output_tokens=max(1, record.output_tokens),
        prefix=request.prefix,
        prefix_tokens=min(request.prefix_tokens, prompt_tokens),
        conversation=request.conversation,
        turn=request.turn,
        think_s=0.0 if before is None else max(0.0, record.sent_s - ended),
    )
