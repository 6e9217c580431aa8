"""How much KV cache the measured requests wanted: each of them, and all together over time.

    tokens held            prompt + output so far, from when a request was sent to its last token
    by reservation         the longest request's tokens for each that is in flight: what a cache without
                           paging sets aside, as it can't know how long an answer becomes
    by blocks              tokens held, each request rounded up to whole blocks (paging)

Owns these definitions. Demand counts requests that wait in the server's queue too: it is what a cache that
lets nobody wait has to hold. Knows no server. Invariant: tokens held <= by blocks, and <= by reservation.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gqa_serve.engine.model_config import ModelConfig
from gqa_serve.workbench.records import RequestRecord
from gqa_serve.workbench.report import Cell, Column, Plot, Series, Table, number, scaled

Floats = NDArray[np.float64]
BLOCK_SIZE = 16
_PLOT_POINTS = 400


@dataclass(frozen=True)
class KvDemand:
    """Step functions: at `times` [n], in seconds, `held`, `blocks` and `reserved` [n], in tokens, change.

    `peaks` [requests]: prompt and output of each. `longest`: of all, what a reservation sets aside.
    """

    times: Floats
    held: Floats
    blocks: Floats
    reserved: Floats
    peaks: Floats
    longest: int

    def over_time(self, values: Floats) -> dict[str, float]:
        """Mean, p50, p99 and max of a step function, weighted by how long each value lasts."""
        lasting = np.diff(self.times)
        total = float(lasting.sum())
        if total <= 0:
            return {}
        order = np.argsort(values[:-1], kind="stable")
        share = np.cumsum(lasting[order]) / total
        ranked = values[:-1][order]

        def quantile(q: float) -> float:
            return float(ranked[min(int(np.searchsorted(share, q - 1e-12)), len(ranked) - 1)])

        mean = float((values[:-1] * lasting).sum()) / total
        return {"mean": mean, "p50": quantile(0.5), "p99": quantile(0.99), "max": float(ranked[-1])}


def kv_demand(records: Sequence[RequestRecord], *, block_size: int = BLOCK_SIZE) -> KvDemand | None:
    """The demand of the requests that ended well; None without any."""
    good = [record for record in records if record.error is None and record.token_s]
    if not good:
        return None
    peaks = np.array([record.prompt_tokens + record.output_tokens for record in good], dtype=np.float64)
    longest = int(peaks.max())
    times, held, blocks, reserved = [], [], [], []
    for record in good:
        own = record.prompt_tokens + np.arange(len(record.token_s) + 1, dtype=np.float64)
        in_blocks = np.ceil(own / block_size) * block_size
        times.append(record.sent_s + np.array([0.0, *record.token_s, record.token_s[-1]]))
        held.append(np.diff(own, prepend=0.0, append=0.0))
        blocks.append(np.diff(in_blocks, prepend=0.0, append=0.0))
        reserved.append(np.array([longest, *[0.0] * len(record.token_s), -longest]))
    joined = np.concatenate(times)
    order = np.argsort(joined, kind="stable")
    at, first = np.unique(joined[order], return_index=True)
    last = np.append(first[1:], len(joined)) - 1  # several changes at one time are one

    def total(changes: list[Floats]) -> Floats:
        summed: Floats = np.cumsum(np.concatenate(changes)[order])[last]
        return summed

    return KvDemand(at, total(held), total(blocks), total(reserved), peaks, longest)


def kv_tables(demand: KvDemand, config: ModelConfig | None, kv_dtype_bytes: int = 2) -> list[Table]:
    """Per request and over time, in tokens and, where the model is known, in MiB."""
    per_token = None if config is None else config.kv_bytes_per_token(kv_dtype_bytes)
    mean = float(demand.peaks.mean())
    own: dict[str, float] = {"mean": mean, "max": float(demand.peaks.max())}
    own |= {f"p{q}": float(np.percentile(demand.peaks, q)) for q in (50, 99)}
    deviation = float(demand.peaks.std(ddof=1)) if len(demand.peaks) > 1 else 0.0
    rows = [_row("each request, at its end", own, per_token)]
    names = {"all, tokens held": demand.held, "all, in blocks": demand.blocks}
    names["all, by reservation"] = demand.reserved
    found = {name: demand.over_time(values) for name, values in names.items()}
    rows += [_row(name, of, per_token) for name, of in found.items()]
    note = (
        f"Requests differ by {deviation / mean:.0%} of their mean (coefficient of variation); the longest "
        f"has {demand.longest:,} tokens, {demand.longest / mean:.1f} times the mean."
    )
    if found["all, tokens held"]:
        note += _paging_note(found)
    columns = [Column("name", "KV demand, tokens")]
    columns += [Column(key, key, number()) for key in ("mean", "p50", "p99", "max")]
    if per_token is not None:
        columns += [
            Column(f"{key}_bytes", f"{key}, MiB", scaled(2.0**-20, 1)) for key in ("mean", "p99", "max")
        ]
    return [Table("KV-cache demand", columns, rows, note)]


def _paging_note(found: dict[str, dict[str, float]]) -> str:
    held, blocks, reserved = (
        found[f"all, {name}"] for name in ("tokens held", "in blocks", "by reservation")
    )
    return (
        " A cache that reserves the longest request's length for each would use "
        f"{held['mean'] / reserved['mean']:.0%} of what it sets aside; blocks of {BLOCK_SIZE} use "
        f"{held['mean'] / blocks['mean']:.1%}, so the same memory serves "
        f"{reserved['mean'] / blocks['mean']:.1f} times as many requests at once. Sizing for the p99 of "
        f"demand takes {blocks['p99'] / blocks['mean']:.1f} times the mean."
    )


def kv_plot(demand: KvDemand, config: ModelConfig | None, kv_dtype_bytes: int = 2) -> Plot:
    """Tokens, or MiB where the model is known, over the time of the run."""
    scale = 1.0 if config is None else config.kv_bytes_per_token(kv_dtype_bytes) / 2**20
    step = max(1, math.ceil(len(demand.times) / _PLOT_POINTS))
    kept = slice(None, None, step)
    begin = float(demand.times[0])
    x = [float(at) - begin for at in demand.times[kept]]
    series = [
        Series(label, x, [float(value) * scale for value in values[kept]])
        for label, values in (
            ("reserved by the longest", demand.reserved),
            (f"in blocks of {BLOCK_SIZE}", demand.blocks),
            ("tokens held", demand.held),
        )
    ]
    unit = "tokens" if config is None else "MiB"
    return Plot("KV-cache demand over time", "time, s", f"KV cache, {unit}", series, kind="step")


def _row(name: str, values: dict[str, float], per_token: int | None) -> dict[str, Cell]:
    row: dict[str, Cell] = {"name": name, **values}
    if per_token is not None:
        row |= {f"{key}_bytes": value * per_token for key, value in values.items()}
    return row
