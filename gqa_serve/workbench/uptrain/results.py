"""The report of a finished run: what was lost, what came back, and how training went.

Owns tables and plots over the run's log. Imports no torch.
Invariant: every number is the log's or the run's notes'; nothing is computed again.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from gqa_serve.workbench.report import Cell, Column, Plot, Report, Series, Table, number
from gqa_serve.workbench.uptrain.budget import write_count


def summarize(facts: Mapping[str, Any], log: Sequence[Mapping[str, Any]], command: str) -> Report:
    """`facts` of the session, `log` as `journal.read_journal` gives it."""
    report = Report("uptrain", f"Uptraining {facts['output']}", command)
    measured = [entry for entry in log if "validation_loss" in entry]
    losses = {"before": facts["loss_before"], "after": measured[-1]["validation_loss"] if measured else None}
    if facts["teacher_loss"] is not None:
        losses["teacher"] = facts["teacher_loss"]
    if facts["loss_before"] is not None:
        report.sections.append(_losses_table(losses, facts))
    report.sections.append(_run_table(facts, log))
    report.sections.append(_loss_plot(log, measured, facts))
    report.sections.append(
        Plot(
            "Learning rate and gradient norm",
            "tokens",
            "learning rate; gradient norm",
            [_series("learning rate", log, "learning_rate"), _series("gradient norm", log, "gradient_norm")],
            log_y=True,
        )
    )
    report.data = {**facts, "validation_loss": losses["after"], "log": [dict(entry) for entry in log]}
    return report


def _losses_table(losses: Mapping[str, float | None], facts: Mapping[str, Any]) -> Table:
    rows: list[dict[str, Cell]] = [
        {"which": which, "loss": loss, "perplexity": None if loss is None else math.exp(min(loss, 700.0))}
        for which, loss in losses.items()
    ]
    return Table(
        "Validation loss",
        [
            Column("which", ""),
            Column("loss", "loss (nats/token)", number(4)),
            Column("perplexity", "perplexity", number(2)),
        ],
        rows,
        note=f"Over {facts['held_out_tokens']:,} tokens that this run did not train on.",
    )


def _run_table(facts: Mapping[str, Any], log: Sequence[Mapping[str, Any]]) -> Table:
    seconds = log[-1]["seconds"] if log else 0.0
    tokens = log[-1]["tokens"] if log else 0
    rows: list[dict[str, Cell]] = [
        {"what": "heads, KV heads", "value": f"{facts['num_heads']}, {facts['num_kv_heads']}"},
        {"what": "parameters", "value": write_count(facts["parameters"])},
        {"what": "of these trained", "value": write_count(facts["trained_parameters"])},
        {"what": "budget (tokens)", "value": write_count(facts["budget_tokens"])},
        {"what": "trained on (tokens)", "value": write_count(tokens)},
        {"what": "steps", "value": f"{facts['steps']:,} x {facts['batch_size']} x {facts['seq_len']} tokens"},
        {"what": "time (s)", "value": f"{seconds:,.0f}"},
        {"what": "speed (tokens/s)", "value": f"{tokens / seconds:,.0f}" if seconds else None},
        {"what": "computed on", "value": facts["machine"]},
    ]
    return Table("The run", [Column("what", ""), Column("value", "value")], rows)


def _loss_plot(
    log: Sequence[Mapping[str, Any]], measured: Sequence[Mapping[str, Any]], facts: Mapping[str, Any]
) -> Plot:
    series = [_series("training, of each step", log, "cross_entropy")]
    if measured:
        before = [] if facts["loss_before"] is None else [(0.0, facts["loss_before"])]
        points = before + [(entry["tokens"], entry["validation_loss"]) for entry in measured]
        series.append(Series("validation", [x for x, _ in points], [y for _, y in points]))
    bounds = {} if facts["teacher_loss"] is None else {"teacher, validation": facts["teacher_loss"]}
    return Plot("Loss", "tokens", "cross-entropy (nats/token)", series, bounds=bounds)


def _series(label: str, log: Sequence[Mapping[str, Any]], key: str) -> Series:
    return Series(label, [entry["tokens"] for entry in log], [entry[key] for entry in log])
