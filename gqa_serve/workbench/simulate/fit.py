"""From measurements to a cost model: the factors of `fitted.py` that explain how long steps took.

Owns the regression and what counts as a measured step. `bench engine --steps` measures steps; from the
records of `bench` over HTTP they are made out: tokens that arrive together are of one step, which began when
those before arrived. Which part of a prompt was computed in which step cannot be seen from outside: the steps
from sending a request to its first token are taken together, as one sum.

Non-negative least squares (Lawson and Hanson 1974) of relative errors, reweighted by Huber's function (1964)
until outliers - a step that another program held up - count for little. Imports no torch; scipy to fit.
"""

from __future__ import annotations

import bisect
import importlib.util
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from gqa_serve.errors import ConfigError
from gqa_serve.workbench.records import RequestRecord, read_records
from gqa_serve.workbench.report import Cell, Column, Table, number, percent, scaled
from gqa_serve.workbench.simulate.cost_model import visible_pairs
from gqa_serve.workbench.simulate.fitted import TERMS, FittedCost
from gqa_serve.workbench.step_samples import StepSample, read_samples

_HUBER = 1.345  # of the spread of residuals: 95 % efficient where there are no outliers
_ROUNDS = 20
_TOGETHER = 0.25  # of the median time between tokens: those of one step arrive within it
_MOST_PROMPT_STEPS = 16
_FEW_IDLE = 5  # requests that met an idle server: too few to tell their way from what else was slow
_FAR = 5.0  # times what is typical
_Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Measured:
    """Sums of steps: `work` [n, 5 or 6] in the order of TERMS (steps, one-token rows, tokens they read,
    prompt tokens, pairs), then requests on their way; `seconds` [n]."""

    kind: str
    work: _Array
    seconds: _Array


def read_measurements(paths: Sequence[Path]) -> tuple[list[StepSample], list[RequestRecord]]:
    """Samples of steps and records of requests from files of either. Raises ConfigError.

    Times of records count from the start of their run: each file's are put behind those of the file before,
    as if one run had followed the other.
    """
    samples: list[StepSample] = []
    records: list[RequestRecord] = []
    for path in paths:
        try:
            with path.open(encoding="utf-8") as file:
                first = json.loads(file.readline() or "null")
        except (OSError, ValueError) as error:
            raise ConfigError(f"Could not read {path}: {error}.") from error
        if isinstance(first, dict) and "num_decode" in first:
            samples += read_samples(path)
        elif isinstance(first, dict) and "sent_s" in first:
            behind_s = max((record.sent_s + record.e2e_s for record in records), default=-1.0) + 1.0
            records += [replace(record, sent_s=record.sent_s + behind_s) for record in read_records(path)]
        else:
            raise ConfigError(
                f"{path} holds neither steps nor records. Measure some: gqa-serve bench engine --steps FILE, "
                "or gqa-serve bench --records FILE."
            )
    return samples, records


def require_scipy() -> None:
    """Raise ConfigError without scipy."""
    if importlib.util.find_spec("scipy") is None:
        raise ConfigError("Fitting needs scipy; run: pip install 'gqa-serve[workbench]'")


def fit(samples: Sequence[StepSample], records: Sequence[RequestRecord]) -> tuple[FittedCost, Table]:
    """The factors, and a table of what they leave unexplained. Raises ConfigError for too few measurements.

    With both, steps give the factors, and records what the server adds to every step and token.
    """
    require_scipy()
    groups = [measured for measured in (of_samples(samples), of_records(records)) if len(measured.seconds)]
    if not groups or min(len(group.seconds) for group in groups) < len(TERMS):
        raise ConfigError(
            "There are too few steps to fit to; measure more: 50 requests of different lengths at several "
            "concurrencies are a good start."
        )
    factors = _unbiased(_solve(groups[0].work, groups[0].seconds), groups[0])
    request_s = factors[len(TERMS)] if len(factors) > len(TERMS) else 0.0
    factors = factors[: len(TERMS)]
    if len(groups) == 2:
        work, seconds = groups[1].work, groups[1].seconds
        rest = seconds - work[:, : len(TERMS)] @ factors
        more = _solve(work[:, [0, 1, len(TERMS)]], rest, scale=seconds)
        factors[:2] += more[:2]
        request_s = more[2]
        factors = _unbiased(np.append(factors, request_s), groups[1])[: len(TERMS)]
    about = {f"num_{group.kind}": len(group.seconds) for group in groups} | _extent(samples, records)
    values = dict(zip(TERMS, map(float, factors), strict=True))
    cost = FittedCost(**values, request_s=float(request_s), about=about)
    return cost, residuals_table(cost, groups)


def _extent(samples: Sequence[StepSample], records: Sequence[RequestRecord]) -> dict[str, int]:
    """How far the measurements go, by the names of RANGES: beyond that a fit is a guess."""
    good = [record for record in records if record.error is None and record.token_s]
    ends = sorted(record.sent_s + record.e2e_s for record in good)
    sent = sorted(record.sent_s for record in good)
    held = [index + 1 - bisect.bisect_right(ends, at) for index, at in enumerate(sent)]
    contexts = [
        -(-sample.decode_context_tokens // sample.num_decode) for sample in samples if sample.num_decode
    ]
    chunks = [context_len for sample in samples for _, context_len in sample.chunks]
    return {
        "most_requests": max([*held, *(sample.num_decode for sample in samples)], default=0),
        "longest_context": max(
            [*contexts, *(record.prompt_tokens + record.output_tokens for record in good)], default=0
        ),
        "longest_prompt": max([*chunks, *(record.prompt_tokens for record in good)], default=0),
    }


def of_samples(samples: Sequence[StepSample]) -> Measured:
    """Each a step."""
    work = [
        (
            1,
            sample.num_decode,
            sample.decode_context_tokens,
            sum(query_len for query_len, _ in sample.chunks),
            sum(visible_pairs(*chunk) for chunk in sample.chunks),
        )
        for sample in samples
    ]
    seconds = np.array([sample.seconds for sample in samples], np.float64)
    return Measured("steps", np.array(work, np.float64).reshape(-1, len(TERMS)), seconds)


def of_records(records: Sequence[RequestRecord]) -> Measured:
    """Spans of steps that the records of one run tell of; the last column of `work` counts requests that met
    an idle server, whose way to the engine is part of the span."""
    good = [record for record in records if record.error is None and record.token_s]
    steps = _steps(good)
    joined = [False] * len(steps)  # whether a step belongs to the span of the one before it
    ends = [step.end_s for step in steps]
    for index, step in enumerate(steps):
        if not step.idle_before and step.first_sent_s is not None:
            began = max(bisect.bisect_right(ends, step.first_sent_s), index - _MOST_PROMPT_STEPS)
            for later in range(began + 1, index + 1):
                joined[later] = not steps[later].idle_before
    work: list[_Array] = []
    seconds: list[float] = []
    for step, belongs in zip(steps, joined, strict=True):
        if belongs:
            work[-1] += step.work
            seconds[-1] += step.seconds
        else:
            work.append(step.work.copy())
            seconds.append(step.seconds)
    found = np.array(work).reshape(-1, len(TERMS) + 1)
    idle = found[:, -1] > 0
    kept = ~idle if idle.sum() < _FEW_IDLE else np.ones(len(found), bool)
    return Measured("spans", found[kept], np.array(seconds)[kept])


@dataclass
class _Observed:
    """A step seen from outside. `first_sent_s`: when the earliest request with its first token in it was
    sent."""

    seconds: float
    end_s: float
    idle_before: bool
    first_sent_s: float | None
    work: _Array


def _steps(records: Sequence[RequestRecord]) -> list[_Observed]:
    """Tokens that arrive together make a step; two of one request never do."""
    arrivals = sorted(
        (record.sent_s + token_s, index, position)
        for index, record in enumerate(records)
        for position, token_s in enumerate(record.token_s)
    )
    gaps = [gap for record in records for gap in record.itl_s]
    together_s = _TOGETHER * float(np.median(gaps)) if gaps else 0.0
    clusters: list[list[tuple[float, int, int]]] = []
    members: set[int] = set()
    for arrival in arrivals:
        if not clusters or arrival[1] in members or arrival[0] - clusters[-1][-1][0] > together_s:
            clusters.append([])
            members = set()
        clusters[-1].append(arrival)
        members.add(arrival[1])
    sent = sorted(record.sent_s for record in records)
    done = sorted(record.sent_s + record.token_s[-1] for record in records)
    steps: list[_Observed] = []
    before_s = 0.0
    for cluster in clusters:
        end_s = cluster[0][0]
        idle = not steps or (
            bisect.bisect_right(sent, before_s) <= bisect.bisect_right(done, before_s + together_s)
        )
        first = [records[index] for _, index, position in cluster if position == 0]
        first_sent_s = min((record.sent_s for record in first), default=None)
        began_s = max(first_sent_s or 0.0, before_s) if idle else before_s
        rows = [records[index].prompt_tokens + position for _, index, position in cluster if position > 0]
        prompts = [(r.prompt_tokens - (r.cached_tokens or 0), r.prompt_tokens) for r in first]
        pairs = sum(visible_pairs(*chunk) for chunk in prompts)
        work = [1, len(rows), sum(rows), sum(query for query, _ in prompts), pairs, float(idle)]
        if end_s > began_s:
            steps.append(_Observed(end_s - began_s, end_s, idle, first_sent_s, np.array(work, np.float64)))
        before_s = end_s
    return steps


def _solve(work: _Array, seconds: _Array, scale: _Array | None = None) -> _Array:
    """Factors >= 0 with work @ factors near `seconds`, measured in shares of `scale` (or of themselves)."""
    from scipy.optimize import nnls

    shares = 1 / np.maximum(seconds if scale is None else scale, 1e-9)
    used = np.abs(work).max(axis=0) > 0
    # Columns of one size: pairs are millions where steps are ones.
    sizes = np.where(used, np.linalg.norm(work * shares[:, None], axis=0), 1.0)
    matrix, target = work * shares[:, None] / sizes, seconds * shares
    weights = np.ones(len(seconds))
    factors = np.zeros(work.shape[1])
    for _ in range(_ROUNDS):
        factors, _norm = nnls(matrix * weights[:, None], target * weights)
        residuals = np.abs(target - matrix @ factors)
        spread = max(1e-9, 1.4826 * float(np.median(residuals)))
        weights = np.sqrt(np.minimum(1.0, _HUBER * spread / np.maximum(residuals, 1e-12)))
    return np.asarray(factors / sizes)


def _unbiased(factors: _Array, measured: Measured) -> _Array:
    """The factors scaled so that sums come out right: those of answers by the steps without prompts, those of
    prompts by the others. Robust factors are those of a typical step; means are what a run is made of, and a
    busy machine's steps are long more often than short. Steps far off stay out of the sums.
    """
    factors, answers = factors.copy(), np.arange(len(factors)) < 3
    parts = [measured.work @ np.where(chosen, factors, 0) for chosen in (answers, ~answers)]
    near = measured.seconds <= _FAR * (parts[0] + parts[1])
    for chosen, steps, part, rest in (
        (answers, near & (measured.work[:, 3] == 0), 0, 1),
        (np.isin(np.arange(len(factors)), (3, 4)), near & (measured.work[:, 3] > 0), 1, 0),
    ):
        parts = [measured.work @ np.where(which, factors, 0) for which in (answers, ~answers)]
        total = float(parts[part][steps].sum())
        scale = float((measured.seconds - parts[rest])[steps].sum()) / total if total > 0 else 1.0
        factors[chosen] *= min(max(scale, 0.5), 2.0)
    return factors


def residuals_table(cost: FittedCost, groups: Sequence[Measured]) -> Table:
    """How far the fit is from what was measured, by what steps did; positive: it says too much."""
    factors = np.array([getattr(cost, name) for name in TERMS])
    rows: list[dict[str, Cell]] = []
    for group in groups:
        work = group.work[:, : len(TERMS)]
        predicted = work @ factors
        if group.work.shape[1] > len(TERMS):
            predicted = predicted + group.work[:, -1] * cost.request_s
        prompts, decodes = work[:, 3] > 0, work[:, 1] > 0
        parts = {
            "answers only": decodes & ~prompts,
            "prompts only": prompts & ~decodes,
            "both": prompts & decodes,
        }
        for name, chosen in parts.items():
            if chosen.any():
                errors = predicted[chosen] / group.seconds[chosen] - 1
                total = predicted[chosen].sum() / group.seconds[chosen].sum() - 1
                rows.append(
                    {
                        "kind": f"{group.kind}, {name}",
                        "count": int(chosen.sum()),
                        "mean_s": float(group.seconds[chosen].mean()),
                        "median": float(np.median(np.abs(errors))),
                        "p90": float(np.percentile(np.abs(errors), 90)),
                        "total": float(total),
                    }
                )
    columns = [
        Column("kind", "measured"),
        Column("count", "number", number()),
        Column("mean_s", "mean, ms", scaled(1e3, 2)),
        Column("median", "error, median, %", percent()),
        Column("p90", "error, p90, %", percent()),
        Column("total", "error of the sum, %", percent()),
    ]
    return Table("Fit of step times", columns, rows)


def factors_table(cost: FittedCost) -> Table:
    """The factors in words."""
    names = {
        "step_s": "each step",
        "decode_s": "each request that computes one token",
        "context_s": "each token that such a request reads",
        "prefill_s": "each token of a prompt",
        "pair_s": "each pair of tokens in a prompt's attention",
        "request_s": "each request, before the engine has it",
    }
    rows: list[dict[str, Cell]] = [{"name": t, "us": getattr(cost, n) * 1e6} for n, t in names.items()]
    return Table("Fitted times", [Column("name", "of"), Column("us", "microseconds", number(4))], rows)
