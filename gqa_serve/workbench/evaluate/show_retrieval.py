"""Retrieval in the report: a table, and heat maps over lengths and depths.

Owns their looks. Computes nothing that `compare.py` defines.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from gqa_serve.workbench.evaluate import compare
from gqa_serve.workbench.evaluate.estimate_cells import SURE, Row, estimate_cells
from gqa_serve.workbench.evaluate.intervals import Interval, wilson
from gqa_serve.workbench.evaluate.results import CandidateResult, Trial
from gqa_serve.workbench.evaluate.run import Work
from gqa_serve.workbench.report import Column, HeatMap, Table


def retrieval_table(results: Sequence[CandidateResult], work: Work) -> Table:
    rows: list[Row] = []
    for result in results:
        for task in work.tasks:
            trials = _select(result.trials, task, None)
            others = [] if result is results[0] else _select(results[0].trials, task, None)
            found = {length: _select(trials, task, length) for length in work.lengths}
            rows.append(
                {
                    "candidate": result.name,
                    "task": task,
                    **{
                        f"found_{n}": f"{sum(t.correct for t in part)}/{len(part)}"
                        for n, part in found.items()
                    },
                    **estimate_cells("accuracy", compare.accuracy(trials), 2),
                    **estimate_cells("key_logprob", compare.key_logprob(trials), 3),
                    **estimate_cells("difference", compare.key_logprob_difference(trials, others), 3),
                }
            )
    columns = [
        Column("candidate", "candidate"),
        Column("task", "task"),
        *(Column(f"found_{length}", f"at {length} tokens") for length in work.lengths),
        Column("accuracy_shown", f"found {SURE}"),
        Column("key_logprob_shown", "log p(key), nats/token"),
    ]
    if len(results) > 1:
        columns.append(Column("difference_shown", "minus the reference's"))
    note = (
        f"Each length: depths {', '.join(f'{depth:g}' for depth in work.depths)}, {work.samples} prompts "
        "each, greedy answers. Chance: a digit that is guessed has a log-probability of -2.30 nats."
    )
    return Table("Retrieval", columns, rows, note)


def heat_maps(results: Sequence[CandidateResult], work: Work) -> list[HeatMap]:
    """Of each candidate, two of each task. The colours of a task mean the same in all candidates' maps."""
    found = {(r.name, task): _grid(r, work, task, _share_found) for r in results for task in work.tasks}
    likely = {(r.name, task): _grid(r, work, task, _mean_logprob) for r in results for task in work.tasks}
    lowest = {
        task: min(value for r in results for row in likely[r.name, task] for value in row)
        for task in work.tasks
    }
    maps = []
    for name, task in found:
        maps.append(_heat_map(name, work, task, "share found", found[name, task], 0.0))
        what = "log-probability of the key, nats/token"
        maps.append(_heat_map(name, work, task, what, likely[name, task], lowest[task]))
    return maps


def _grid(
    result: CandidateResult, work: Work, task: str, value: Callable[[Sequence[Trial]], float]
) -> list[list[float]]:
    """[depths][lengths]"""
    return [
        [
            value([trial for trial in _select(result.trials, task, length) if trial.depth == depth])
            for length in work.lengths
        ]
        for depth in work.depths
    ]


def _heat_map(
    name: str, work: Work, task: str, what: str, cells: Sequence[Sequence[float]], low: float
) -> HeatMap:
    return HeatMap(
        f"{name}: {task}, {what}",
        "length, tokens",
        "depth of the fact, share of the filler",
        [str(length) for length in work.lengths],
        [f"{depth:g}" for depth in work.depths],
        cells,
        what,
        low,
        1.0 if what == "share found" else 0.0,
    )


def _share_found(trials: Sequence[Trial]) -> float:
    return compare.accuracy(trials).value


def _mean_logprob(trials: Sequence[Trial]) -> float:
    return math.fsum(math.fsum(t.logprobs) for t in trials) / sum(len(t.logprobs) for t in trials)


def _select(trials: Sequence[Trial], task: str, length: int | None) -> list[Trial]:
    return [trial for trial in trials if trial.task == task and length in (None, trial.length)]


def grid_cells(results: Sequence[CandidateResult], work: Work) -> list[dict[str, Any]]:
    """Every cell of every grid with Wilson's interval, for the JSON."""
    rows = []
    for result in results:
        for task in work.tasks:
            for length in work.lengths:
                for depth in work.depths:
                    trials = [t for t in _select(result.trials, task, length) if t.depth == depth]
                    hits = sum(trial.correct for trial in trials)
                    low, high = wilson(hits, len(trials)) or Interval(0.0, 1.0)
                    rows.append(
                        {
                            "candidate": result.name,
                            "task": task,
                            "length": length,
                            "depth": depth,
                            "hits": hits,
                            "trials": len(trials),
                            "low": low,
                            "high": high,
                            "key_logprob": _mean_logprob(trials),
                        }
                    )
    return rows
