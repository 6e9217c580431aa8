"""What `bench kernel` shows: attention and products against the device's limits, and plots.

Owns columns, axes and the comparison that grouped-query attention is about: K and V read once a group, beside
what reading them once a query head would take.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from gqa_serve.workbench.bench.kernel_cases import AttentionCase, KernelResult, LinearCase
from gqa_serve.workbench.bench.limits import Ceiling
from gqa_serve.workbench.report import Cell, Column, Plot, Section, Series, Table, number, percent, scaled

_NOTE = (
    "GB/s counts K and V once for all query heads of a group. The next column is what a kernel would have to "
    "read in the same time that reads them once a query head{beyond}. MHA/: the time of the same case with a "
    "KV head for each query head, over this one's."
)


def sections(results: Sequence[KernelResult], ceilings: dict[str, Ceiling]) -> list[Section]:
    """Tables of what was measured, then plots. `ceilings`: by weight format; attention's under ""."""
    attention = [(r, r.case) for r in results if isinstance(r.case, AttentionCase)]
    decode = [(r, case) for r, case in attention if case.part == "decode"]
    prefill = [(r, case) for r, case in attention if case.part == "prefill"]
    linear = [(r, r.case) for r in results if isinstance(r.case, LinearCase)]
    parts: list[Section] = []
    if decode:
        parts.append(_decode(decode, ceilings.get("")))
    if prefill:
        parts.append(_prefill(prefill, ceilings.get("")))
    if linear:
        parts.append(_linear(linear, ceilings))
    return [*parts, *_plots(decode, ceilings.get(""))]


def _share(result: KernelResult, ceiling: Ceiling | None) -> float | None:
    return None if ceiling is None else ceiling.seconds(result.work) / result.seconds.median


def _bound(result: KernelResult, ceiling: Ceiling | None) -> str | None:
    return None if ceiling is None else ceiling.bound(result.work)


_HEADS = (
    Column("kv_dtype", "KV"),
    Column("num_heads", "heads", number()),
    Column("num_kv_heads", "KV heads", number()),
    Column("head_dim", "head_dim", number()),
    Column("batch_size", "batch", number()),
    Column("context_len", "tokens", number()),
    Column("seconds", "ms a layer", scaled(1e3, 3)),
    Column("spread", "± %", percent()),
)


def _shape(result: KernelResult, case: AttentionCase) -> dict[str, Cell]:
    return {
        "kv_dtype": case.kv_dtype,
        "num_heads": case.heads.num_heads,
        "num_kv_heads": case.heads.num_kv_heads,
        "head_dim": case.heads.head_dim,
        "batch_size": case.batch_size,
        "context_len": case.context_len,
        "seconds": result.seconds.median,
        "spread": result.seconds.spread,
    }


def _decode(decode: Sequence[tuple[KernelResult, AttentionCase]], ceiling: Ceiling | None) -> Table:
    mha = {
        (case.kv_dtype, case.heads.num_heads, case.heads.head_dim, case.batch_size, case.context_len): result
        for result, case in decode
        if case.heads.group_size == 1
    }
    rows: list[dict[str, Cell]] = []
    for result, case in decode:
        rate = result.work.read_bytes / result.seconds.median
        key = (case.kv_dtype, case.heads.num_heads, case.heads.head_dim, case.batch_size, case.context_len)
        whole = mha.get(key)
        rows.append(
            {
                **_shape(result, case),
                "read_bytes": result.work.read_bytes,
                "bytes_per_s": rate,
                "bytes_per_s_by_query_head": rate * case.heads.group_size,
                "flops": result.work.attention_ops / result.seconds.median,
                "share": _share(result, ceiling),
                "bound": _bound(result, ceiling),
                "speedup": None if whole is None else whole.seconds.median / result.seconds.median,
            }
        )
    columns = (
        *_HEADS,
        Column("read_bytes", "K, V, MiB", scaled(2.0**-20)),
        Column("bytes_per_s", "GB/s", scaled(1e-9)),
        Column("bytes_per_s_by_query_head", "by query head, GB/s", scaled(1e-9)),
        Column("flops", "GFLOP/s", scaled(1e-9, 0)),
        Column("share", "of the limit, %", percent(0)),
        Column("bound", "limit"),
        Column("speedup", "MHA/, x", number(2)),
    )
    beyond = "" if ceiling is None else f" (at most {ceiling.bandwidth / 1e9:,.1f} GB/s is possible here)"
    return Table("Attention of decoding", columns, rows, _NOTE.format(beyond=beyond))


def _prefill(prefill: Sequence[tuple[KernelResult, AttentionCase]], ceiling: Ceiling | None) -> Table:
    rows = [
        {
            **_shape(result, case),
            "flops": result.work.attention_ops / result.seconds.median,
            "share": _share(result, ceiling),
            "bound": _bound(result, ceiling),
        }
        for result, case in prefill
    ]
    columns = (
        *_HEADS,
        Column("flops", "GFLOP/s", scaled(1e-9, 0)),
        Column("share", "of the limit, %", percent(0)),
        Column("bound", "limit"),
    )
    return Table(
        "Attention of prompts", columns, rows, "Operations that the causal mask leaves out don't count."
    )


def _linear(linear: Sequence[tuple[KernelResult, LinearCase]], ceilings: dict[str, Ceiling]) -> Table:
    rows: list[dict[str, Cell]] = [
        {
            "name": case.name,
            "inputs": case.inputs,
            "outputs": case.outputs,
            "weights": case.weights,
            "num_tokens": case.num_tokens,
            "seconds": result.seconds.median,
            "spread": result.seconds.spread,
            "bytes_per_s": result.work.read_bytes / result.seconds.median,
            "flops": result.work.product_ops / result.seconds.median,
            "share": _share(result, ceilings.get(case.weights)),
            "bound": _bound(result, ceilings.get(case.weights)),
        }
        for result, case in linear
    ]
    columns = (
        Column("name", "matrix"),
        Column("inputs", "inputs", number()),
        Column("outputs", "outputs", number()),
        Column("weights", "weights"),
        Column("num_tokens", "tokens", number()),
        Column("seconds", "ms", scaled(1e3, 3)),
        Column("spread", "± %", percent()),
        Column("bytes_per_s", "GB/s", scaled(1e-9)),
        Column("flops", "GOP/s", scaled(1e-9, 0)),
        Column("share", "of the limit, %", percent(0)),
        Column("bound", "limit"),
    )
    return Table("Matrix products", columns, rows, "GB/s counts the matrix, scales included, once a product.")


def _plots(decode: Sequence[tuple[KernelResult, AttentionCase]], ceiling: Ceiling | None) -> Iterator[Plot]:
    bounds = {} if ceiling is None else {"limit": ceiling.bandwidth / 1e9}
    rates: dict[str, list[tuple[float, float, float]]] = {}
    times: dict[str, list[tuple[float, float, float]]] = {}
    for result, case in decode:
        rate = result.seconds.per(result.work.read_bytes / 1e9)
        rest = f"{case.kv_dtype}, heads of {case.heads.head_dim}, batch {case.batch_size}"
        label = f"{case.heads.num_kv_heads} KV heads, {rest}"
        rates.setdefault(label, []).append((case.context_len, rate.median, rate.spread * rate.median))
        seconds = result.seconds
        label = f"{rest}, {case.context_len:,} tokens"
        times.setdefault(label, []).append(
            (case.heads.num_kv_heads, 1e3 * seconds.median, 1e3 * seconds.median * seconds.spread)
        )
    if any(len(of) > 1 for of in rates.values()):
        yield Plot(
            "K and V read a second", "context, tokens", "GB/s", _series(rates), log_x=True, bounds=bounds
        )
    if any(len(of) > 1 for of in times.values()):
        yield Plot("Decoding over KV heads", "KV heads", "ms a layer", _series(times), log_x=True, log_y=True)


def _series(points: dict[str, list[tuple[float, float, float]]]) -> list[Series]:
    series = []
    for label, of in points.items():
        x, y, errors = zip(*sorted(of), strict=True)
        series.append(Series(label, x, y, errors))
    return series
