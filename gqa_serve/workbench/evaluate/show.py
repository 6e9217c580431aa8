"""The report: tables, heat maps, and sentences that say what the numbers allow to say.

Owns the words. Computes nothing that `compare.py` defines. Invariant: a value that has an interval is shown
with it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from gqa_serve.workbench.evaluate import compare
from gqa_serve.workbench.evaluate.compare import Estimate, Judged
from gqa_serve.workbench.evaluate.estimate_cells import SURE, Row, estimate_cells
from gqa_serve.workbench.evaluate.intervals import CONFIDENCE
from gqa_serve.workbench.evaluate.results import CandidateResult
from gqa_serve.workbench.evaluate.run import Work
from gqa_serve.workbench.evaluate.show_retrieval import heat_maps, retrieval_table
from gqa_serve.workbench.report import Column, Plot, Section, Series, Table, number, scaled


def sections(judged: Sequence[Judged], work: Work, margin: float) -> list[Section]:
    """Everything that was measured, the recommendation first."""
    results = [item.result for item in judged]
    parts: list[Section] = [_recommendation(judged, work, margin), *_sentences(judged, work, margin)]
    if "text" in work.tests:
        parts += [_text_intro(work), _text_table(results), _perplexity_plot(results)]
    if work.tasks:
        parts += [retrieval_table(results, work)]
        parts += heat_maps(results, work)
    if "speed" in work.tests:
        parts.append(_speed_table(results, work))
    if "text" in work.tests and len(results) > 1:
        parts.append(_scatter(judged, work))
    return parts


# --- recommendation ----------------------------------------------------------------------------------------


def _recommendation(judged: Sequence[Judged], work: Work, margin: float) -> Table:
    context, requests = work.context, work.requests
    rows: list[Row] = []
    for item in judged:
        held, speed, trials = item.result.held, item.result.speed, item.result.trials
        decode = None if speed is None else compare.speed_ratio(speed.decode_s, speed.reference_decode_s)
        rows.append(
            {
                "candidate": item.result.name,
                "heads": f"{held.num_heads}/{held.num_kv_heads}",
                "memory_bytes": held.memory_bytes(context, requests),
                "decode_tokens_per_s": None if speed is None else compare.decode_tokens_per_s(speed),
                **estimate_cells("decode_ratio", decode, 2),
                **estimate_cells("perplexity_ratio", _exp(item.log_ratio), 4),
                **estimate_cells("retrieval", compare.accuracy(trials) if trials else None, 2),
                "quality": _VERDICTS[item.verdict],
                "dominated_by": ", ".join(item.dominated_by) or None,
            }
        )
    columns = [
        Column("candidate", "candidate"),
        Column("heads", "heads/KV"),
        Column("memory_bytes", "memory, MiB", scaled(2.0**-20)),
    ]
    if "speed" in work.tests and len(judged) == 1:
        columns.append(Column("decode_tokens_per_s", "decode, tokens/s", number(1)))
    elif "speed" in work.tests:
        columns.append(Column("decode_ratio_shown", f"decode speed ratio {SURE}"))
    if "text" in work.tests and len(judged) > 1:
        columns.append(Column("perplexity_ratio_shown", f"perplexity ratio {SURE}"))
    if work.tasks:
        columns.append(Column("retrieval_shown", f"retrieval {SURE}"))
    note = f"Memory: weights and the KV cache of {requests} requests of {context} tokens."
    if len(judged) > 1:
        columns += [Column("quality", "quality"), Column("dominated_by", "dominated by")]
        note += (
            " Ratios: to the reference's, paired. Dominated: another takes no more memory, decodes no slower "
            f"(within {compare.SAME_SPEED:.0%}), is shown to lose at most {math.expm1(margin):.2%} of "
            "perplexity to it, is not shown to be worse at retrieval, and is better at one of these."
        )
    return Table("Memory, speed, quality", columns, rows, note)


_VERDICTS = {
    "reference": "reference",
    "same": "as the reference",
    "better": "better",
    "worse": "worse",
    "not separated": "not separated",
    "not measured": "not measured",
}


def _sentences(judged: Sequence[Judged], work: Work, margin: float) -> list[str]:
    """What follows for each candidate, and which are left."""
    lines = [line for item in judged[1:] for line in (_sentence(item, margin), _lost_answers(item)) if line]
    left = [item for item in judged if not item.dominated_by]
    if len(judged) > 1:
        names = ", ".join(item.result.name for item in left)
        lines.append(f"Worth considering (not dominated): {names}.")
        safe = [item for item in judged if item.keeps_quality]
        smallest = min(safe, key=lambda item: item.result.held.memory_bytes(work.context, work.requests))
        if smallest.verdict != "reference":
            share = smallest.result.held.memory_bytes(work.context, work.requests) / judged[
                0
            ].result.held.memory_bytes(work.context, work.requests)
            besides = ", and not shown to be worse at retrieval" if work.tasks else ""
            lines.append(
                f"The least memory at the reference's quality on this text{besides}: {smallest.result.name}, "
                f"{share:.0%} of the reference's."
            )
        elif any(item.log_ratio for item in judged):
            lines.append("No other candidate with less memory is shown to keep the reference's quality.")
    return lines


def _sentence(item: Judged, margin: float) -> str:
    ratio = item.log_ratio
    if ratio is None:
        return ""
    name, percent = item.result.name, math.expm1(margin) * 100
    change = _percent(ratio)
    if ratio.interval is None:
        return f"{name}: {change}; there are too few blocks of text for an interval."
    if item.verdict == "same":
        return f"{name}: {change}, as the reference within {percent:.3g} %."
    if item.verdict in ("worse", "better"):
        return f"{name}: {change}; it is {item.verdict} on this text."
    more = compare.more_text(ratio, margin) or 1.0
    if more <= 1:
        return f"{name}: {change}; the data do not say on which side of {percent:.3g} % it lies."
    return (
        f"{name}: {change}; the data do not separate it from the reference. About {more:.2g} times the text "
        f"would tell whether they differ by {percent:.3g} %."
    )


def _lost_answers(item: Judged) -> str:
    """What is shown of retrieval: perplexity can stay while it is lost."""
    if item.answers is None or item.answers.verdict == "not separated":
        return ""
    lost, won = item.answers.lost, item.answers.won
    return (
        f"{item.result.name}: {item.answers.verdict} at retrieval: of the facts that the reference finds "
        f"it misses {lost}, of those that the reference misses it finds {won}."
    )


def _percent(log_ratio: Estimate) -> str:
    """perplexity +1.2 % [+0.3, +2.1]"""
    shown = f"perplexity {math.expm1(log_ratio.value):+.2%}"
    if log_ratio.interval is None:
        return shown
    low, high = (100 * math.expm1(value) for value in log_ratio.interval)
    return f"{shown} [{low:+.2f}, {high:+.2f}]"


# --- text --------------------------------------------------------------------------------------------------


def _text_intro(work: Work) -> str:
    corpus = work.corpus
    blocks = "documents" if corpus.block_bytes is None else f"blocks of {corpus.block_bytes} bytes"
    kept = f" ({corpus.left_out_bytes} bytes more were left out: --max-text)" if corpus.left_out_bytes else ""
    return (
        f"Text: {len(corpus.documents)} documents, {corpus.num_bytes} bytes{kept}. Every token is scored "
        f"once, in windows of {work.window} tokens every {work.stride}. Intervals: bootstrap over {blocks}."
    )


def _text_table(results: Sequence[CandidateResult]) -> Table:
    rows: list[Row] = []
    notes = []
    for result in results:
        text = result.text
        assert text is not None
        rows.append(
            {
                "candidate": result.name,
                "tokens": sum(text.num_tokens),
                **estimate_cells("perplexity", compare.perplexity(text), 3),
                **estimate_cells("bits_per_byte", compare.bits_per_byte(text), 4),
                **estimate_cells("divergence", compare.divergence(text), 5),
                **estimate_cells("top_1", compare.top_1_agreement(text), 4),
            }
        )
        if text.divergence is None and result is not results[0] and text.no_agreement != "--no-agreement":
            notes.append(f"{result.name}: not compared token by token: {text.no_agreement}.")
    columns = [
        Column("candidate", "candidate"),
        Column("tokens", "tokens scored", number()),
        Column("perplexity_shown", f"perplexity {SURE}"),
        Column("bits_per_byte_shown", "bits per byte"),
    ]
    if any(result.text is not None and result.text.divergence is not None for result in results):
        columns += [
            Column("divergence_shown", "KL(reference || it), nats/token"),
            Column("top_1_shown", "same top token, share"),
        ]
    return Table("Text", columns, rows, " ".join(notes))


def _perplexity_plot(results: Sequence[CandidateResult]) -> Plot:
    """Over KV heads where they differ, else by candidate; a line joins what differs in KV heads alone."""
    label = f"perplexity ({CONFIDENCE:.0%} interval)"
    values = {result.name: compare.perplexity(result.text) for result in results if result.text is not None}
    if len({result.held.num_kv_heads for result in results}) > 1:
        groups: dict[str, list[CandidateResult]] = {}
        for result in sorted(results, key=lambda one: one.held.num_kv_heads):
            groups.setdefault("weights {}, KV {}".format(*_formats(result)), []).append(result)
        alike = len({(one.held.num_kv_heads, *_formats(one)) for one in results}) < len(results)
        if alike:  # say before and after uptraining: a line through both would be no curve
            groups = {one.name: [one] for one in results}
        series = [
            _series(
                name, [float(one.held.num_kv_heads) for one in group], [values[one.name] for one in group]
            )
            for name, group in groups.items()
        ]
        return Plot("Perplexity over KV heads", "KV heads", label, series, log_x=True)
    series = [_series("perplexity", list(values), list(values.values()))]
    return Plot("Perplexity", "candidate", label, series, kind="point")


def _formats(result: CandidateResult) -> tuple[str, str]:
    return result.held.weights, result.held.kv_dtype


def _series(label: str, x: Sequence[Any], estimates: Sequence[Estimate]) -> Series:
    errors = [
        (0.0, 0.0)
        if one.interval is None
        else (max(0.0, one.value - one.interval.low), max(0.0, one.interval.high - one.value))
        for one in estimates
    ]
    return Series(label, x, [one.value for one in estimates], errors)


# --- speed and memory --------------------------------------------------------------------------------------


def _speed_table(results: Sequence[CandidateResult], work: Work) -> Table:
    rows: list[Row] = []
    for result in results:
        held, speed = result.held, result.speed
        assert speed is not None
        decode = compare.speed_ratio(speed.decode_s, speed.reference_decode_s)
        prefill = compare.speed_ratio(speed.prefill_s, speed.reference_prefill_s)
        rows.append(
            {
                "candidate": result.name,
                "weights": held.weights,
                "weight_bytes": held.weight_bytes,
                "kv_dtype": held.kv_dtype,
                "kv_bytes_per_token": held.kv_bytes_per_token,
                "decode": compare.decode_tokens_per_s(speed),
                **estimate_cells("decode_ratio", decode, 2),
                "prefill": compare.prefill_tokens_per_s(speed),
                **estimate_cells("prefill_ratio", prefill, 2),
            }
        )
    columns = [
        Column("candidate", "candidate"),
        Column("weights", "weights as"),
        Column("weight_bytes", "weights, MiB", scaled(2.0**-20)),
        Column("kv_dtype", "KV as"),
        Column("kv_bytes_per_token", "KV, bytes/token", number()),
        Column("decode", "decode, tokens/s", number(1)),
        Column("prefill", "prefill, tokens/s", number(1)),
    ]
    if len(results) > 1:
        columns += [
            Column("decode_ratio_shown", f"decode ratio {SURE}"),
            Column("prefill_ratio_shown", "prefill ratio"),
        ]
    note = (
        f"On {results[0].held.device} ({results[0].held.backend}), in this run: a decode step of "
        f"{work.requests} requests at {work.context} tokens, a prefill step of {work.prefill_tokens} tokens; "
        "ratios to the reference's, from rounds in which both ran one after the other. Tokens/s of different "
        "rows are of different minutes: compare by the ratios."
    )
    return Table("Speed on this machine", columns, rows, note)


def roofline_table(
    hardware: str, names: Sequence[str], bounds: Mapping[str, float | str], work: Work
) -> Table:
    """Upper bounds of decode speed on other hardware, by candidate; a text tells why there is none."""
    best = bounds[names[0]]
    rows: list[Row] = []
    for name in names:
        bound = bounds[name]
        row: Row = {"candidate": name, "tokens_per_s": bound if isinstance(bound, float) else None}
        if isinstance(bound, float) and isinstance(best, float):
            row["ratio"] = bound / best
        rows.append(row)
    columns = [
        Column("candidate", "candidate"),
        Column("tokens_per_s", "decode at most, tokens/s", number()),
        Column("ratio", "to the reference's", number(2)),
    ]
    note = (
        f"Not measured: what the data sheet allows for {work.requests} requests at {work.context} tokens, by "
        "the account of gqa-serve plan."
    )
    reasons = [f" {name}: {bound}" for name, bound in bounds.items() if isinstance(bound, str)]
    return Table(f"Roofline on {hardware}", columns, rows, note + "".join(reasons))


def _scatter(judged: Sequence[Judged], work: Work) -> Plot:
    """Memory over quality, a series per candidate."""
    series = []
    for item in judged:
        assert item.result.text is not None
        memory = item.result.held.memory_bytes(work.context, work.requests) / 2**20
        ratio = _exp(item.log_ratio) or Estimate(1.0, None)
        series.append(_series(item.result.name, [memory], [ratio]))
    return Plot(
        "Memory and quality",
        f"weights and KV cache of {work.requests} x {work.context} tokens, MiB",
        f"perplexity / reference ({CONFIDENCE:.0%} interval)",
        series,
        kind="point",
    )


def _exp(estimate: Estimate | None) -> Estimate | None:
    return None if estimate is None else estimate.map(math.exp)
