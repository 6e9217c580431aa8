"""The plan in tables and sentences.

Owns which numbers stand where and what is said about them. Computes nothing that `answer.py` could.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from typing import Any

from gqa_serve.engine.memory import format_bytes
from gqa_serve.workbench.hardware import Hardware
from gqa_serve.workbench.plan.answer import Answer
from gqa_serve.workbench.report import Cell, Column, Table, gib, number, percent, scaled

Row = dict[str, Any]


def main_table(answers: Sequence[Answer], rows: Sequence[Row], title: str) -> Table:
    """One case: a row for each number of KV heads."""
    columns = [
        Column("label", "KV heads"),
        Column("kv_bytes_per_token", "KV/token, KiB", scaled(2**-10, 1)),
        Column("kv_bytes_per_request", "KV/request, MiB", scaled(2**-20, 0)),
        Column("weight_bytes", "weights, GiB", gib(2)),
        Column("max_tokens", "tokens fit, k", scaled(1e-3, 0)),
        Column("max_requests", "requests fit", number()),
        Column("weight_bytes_per_step", "weights/step, GB", scaled(1e-9, 2)),
        Column("kv_read_bytes_per_step_full", "KV/step full, GB", scaled(1e-9, 2)),
        Column("step_s_one", "step of 1, ms", scaled(1e3, 2)),
        Column("step_s_full", "step full, ms", scaled(1e3, 2)),
        Column("attention_share_full", "attention, %", percent(0)),
        Column("tokens_per_s_full", "tokens/s full", number()),
        Column("bound", "compute-bound at"),
        Column("prompt_s", "prompt, ms", scaled(1e3, 1)),
    ]
    if _priced(rows):
        columns.append(Column("cost_per_million_full", "cost of 1M", number(3)))
    marked = [
        {**row, "label": f"{answer.label}{'*' if answer.is_as_it_is else ''}", "bound": _bound(row)}
        for answer, row in zip(answers, rows, strict=True)
    ]
    for row in marked:
        if not row["max_requests"]:
            row["step_s_one"] = row["prompt_s"] = None  # of a request that there is no room for
    return Table(title, columns, marked, note=_note(rows))


def case_table(rows: Sequence[Row]) -> Table:
    """The model as it is in several cases."""
    columns = [
        Column("kv_dtype", "KV dtype"),
        Column("ranks", "ranks", number()),
        Column("context_len", "context, tokens", number()),
        Column("kv_bytes_per_token", "KV/token, KiB", scaled(2**-10, 1)),
        Column("weight_bytes_per_rank", "weights/rank, GiB", gib(1)),
        Column("max_tokens", "tokens", number()),
        Column("max_requests", "requests", number()),
        Column("step_s_one", "step of 1, ms", scaled(1e3, 2)),
        Column("step_s_full", "step full, ms", scaled(1e3, 2)),
        Column("tokens_per_s_full", "tokens/s full", number()),
    ]
    if _priced(rows):
        columns.append(Column("cost_per_million_full", "cost of 1M", number(3)))
    return Table("The model as it is, case by case", columns, rows)


def batch_tables(answers: Sequence[Answer], batches: Sequence[int], title: str) -> list[Table]:
    """Step time and tokens per second at given batches; a dash where the requests do not fit."""

    def table(what: str, value: Callable[[Answer, int], float], show: Callable[[Any], str]) -> Table:
        columns = [Column("batch", "requests", number())]
        columns += [Column(answer.label, answer.label, show) for answer in answers]
        rows: list[dict[str, Cell]] = [
            {
                "batch": batch,
                **{
                    answer.label: value(answer, batch) if batch <= answer.max_requests else None
                    for answer in answers
                },
            }
            for batch in batches
        ]
        return Table(f"{what}, {title}", columns, rows)

    return [
        table("Decode step, ms", lambda answer, batch: answer.decode.seconds(batch) * 1e3, number(2)),
        table("Tokens/s of all requests", Answer.tokens_per_second, number()),
    ]


def prompt_table(answers: Sequence[Answer], prompt_lens: Sequence[int], title: str) -> Table:
    """Least times to the first token."""
    columns = [Column("prompt_len", "prompt, tokens", number())]
    columns += [Column(answer.label, answer.label, scaled(1e3, 1)) for answer in answers]
    rows: list[dict[str, Cell]] = [
        {"prompt_len": length, **{answer.label: answer.prompt_seconds(length) for answer in answers}}
        for length in prompt_lens
    ]
    return Table(f"Least time to the first token, ms, {title}", columns, rows)


def case_title(row: Row, hardware: Hardware) -> str:
    """What one table is about."""
    ranks = "" if row["ranks"] == 1 else f"{row['ranks']} x "
    return (
        f"{ranks}{hardware.name}, weights {row['weight_format']}, KV {row['kv_dtype']}, requests of "
        f"{row['context_len']:,} tokens"
    )


def bound_paragraph(answer: Answer, row: Row) -> str:
    """Where decoding of the model as it is turns from memory to arithmetic, derived."""
    hardware = answer.hardware
    peak = hardware.peak(answer.formats.attention_precision)
    ridge = peak / hardware.bandwidth
    intensity = row["attention_flops_per_byte"]
    linear = row["linear_compute_bound_from"]
    if linear is None:
        first = "Its linear layers never turn compute-bound: their activations cost more time than products."
    else:
        first = (
            f"Its linear layers read weights once for the whole batch and turn compute-bound from {linear:,} "
            "requests on."
        )
    if row["attention_compute_bound"]:
        second = (
            f"Attention makes {intensity:.1f} operations of each byte it reads, more than the {ridge:.0f} "
            "that this hardware computes in the time of a byte, so it is bound by arithmetic."
        )
    else:
        second = (
            f"Attention reads each request's own K and V, {intensity:.1f} operations per byte at any batch, "
            f"and the hardware computes {ridge:.0f} in the time of a byte: it stays memory-bound, and from "
            f"{row['kv_outweighs_weights_from']:,} requests on a step reads more KV than weights."
        )
    whole = row["step_compute_bound_from"]
    if whole is None:
        third = (
            "So the whole step never turns compute-bound: each further request adds more time for its bytes "
            "than for its operations."
        )
    else:
        fits = " (which do not fit)" if whole > row["max_requests"] else ""
        third = f"The whole step has more arithmetic than memory time from {whole:,} requests on{fits}."
    return " ".join((f"{answer.label}:", first, second, third))


def window_paragraph(answer: Answer) -> str | None:
    """What layers with windows save, and what they don't."""
    windows = [window for window in answer.config.windows if window is not None]
    if not windows:
        return None
    context_len = answer.case.context_len
    stored = answer.kv_bytes_per_token * context_len
    read = answer.decode.read_bytes_per_request * answer.case.ranks
    sizes = ", ".join(f"{window:,}" for window in sorted(set(windows)))
    if read == stored:
        return (
            f"{len(windows)} of {answer.config.num_layers} layers see only the last {sizes} tokens, which "
            f"makes no difference to requests of {context_len:,}."
        )
    return (
        f"{len(windows)} of {answer.config.num_layers} layers see only the last {sizes} tokens. A step reads "
        f"{format_bytes(read)} of the {format_bytes(stored)} of a request of {context_len:,} tokens; the "
        "cache keeps all of it until the request ends. A cache that dropped what no window sees would hold "
        f"{stored / read:.1f} times as many such requests; this one doesn't."
    )


def assumptions(answer: Answer, *, most_requests: int, measured: str | None) -> str:
    """What the numbers take for granted; `most_requests`: of any full step in the tables."""
    settings, hardware = answer.settings, answer.hardware
    parts = [
        "Times are least times: each byte that must move, at the full bandwidth, each operation at the peak.",
        f"In a step every request has {answer.case.context_len:,} tokens; with fewer, steps are shorter.",
    ]
    if measured is not None:
        parts.append(f"This machine was {measured}; activations are taken to stay in its caches.")
    if settings.kv_cache_memory is not None:
        parts.append(
            f"The KV cache gets {format_bytes(settings.kv_cache_memory)}, as --kv-cache-memory says."
        )
    elif hardware.is_cpu:
        parts.append(
            "The KV cache gets what the server takes by itself: half of what weights leave free, at most 4 "
            "GiB or one longest request; --kv-cache-memory sets it."
        )
    else:
        parts.append(
            f"The KV cache gets {settings.utilization:.0%} of {hardware.memory_bytes / 1e9:.0f} GB less "
            f"weights and {format_bytes(settings.reserve)} for the GPU's context (--reserve)."
        )
    if most_requests > settings.max_num_seqs:
        parts.append(
            f"The server computes at most {settings.max_num_seqs} requests at once: full steps of more "
            "need a higher --max-num-seqs."
        )
    if answer.case.ranks > 1:
        parts.append(
            "Ranks split heads, MLP and vocabulary, and add up sums over their link; this server runs on one "
            "device so far, so these rows are about any that splits so. A rank holds at least one KV head: "
            f"below {answer.case.ranks} KV heads ranks hold copies, and the tables count these."
        )
    return " ".join(parts)


def unknowns(model: str, hardware: str) -> str:
    """What no arithmetic knows, and what to run instead; the arguments as they were typed."""
    model, hardware = shlex.quote(model), shlex.quote(hardware)
    return (
        "Not known here, and what measures it: how near kernels come to these times (gqa-serve bench engine "
        f"--model {model} --num-kv-heads all; gqa-serve bench kernel); real lengths and arrivals, prompts "
        "beside decoding, and waiting in the queue (gqa-serve bench --url http://127.0.0.1:8000; gqa-serve "
        f"simulate --model {model} --hardware {hardware} --trace FILE); how much of the prompts the prefix "
        "cache saves (the same two); what fewer KV heads cost in quality (gqa-serve convert --model "
        f"{model} --num-kv-heads N, then gqa-serve eval)."
    )


def _priced(rows: Sequence[Row]) -> bool:
    return any(row["cost_per_million_full"] is not None for row in rows)


def _bound(row: Row) -> str:
    whole = row["step_compute_bound_from"]
    return "never" if whole is None else f"{whole:,}"


def _note(rows: Sequence[Row]) -> str:
    """The words of the table; and where not even one request fits, cures."""
    short = [row for row in rows if not row["max_requests"]]
    note = (
        "* the model as it is. Per step: what it reads; full: with as many requests as fit; attention: its "
        f"share of a full step; prompt: of {rows[0]['prompt_len']:,} tokens, alone"
        f"{'; cost: of output tokens, in full steps' if _priced(rows) else ''}."
    )
    if not short:
        return note
    names = ", ".join(str(row["num_kv_heads"]) for row in short)
    return (
        f"{note} With {names} KV heads not one request fits: use more --tensor-parallel, --quantization, "
        "smaller --kv-dtypes, or shorter --context-lens."
    )
