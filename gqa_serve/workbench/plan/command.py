"""`gqa-serve plan`: from flags to the report.

Owns what combinations are answered, in which order, and which are refused. Imports no torch and reads no
weights.
"""

from __future__ import annotations

import argparse
import itertools
import shlex
from collections.abc import Sequence
from typing import Any

from gqa_serve.config import EngineConfig
from gqa_serve.engine.memory import format_bytes
from gqa_serve.errors import ConfigError
from gqa_serve.workbench.hardware import CPU, Hardware, find_hardware
from gqa_serve.workbench.model_source import ModelSource, group_counts, read_model
from gqa_serve.workbench.plan import tables
from gqa_serve.workbench.plan.answer import Answer, Case, batch_ladder, smallest_ranks
from gqa_serve.workbench.plan.capacity import GPU_RESERVE, MemorySettings
from gqa_serve.workbench.plan.flags import DEFAULT_CONTEXT_LEN, make_plan_parser
from gqa_serve.workbench.plan.serving_formats import served_formats, served_kv_dtype
from gqa_serve.workbench.report import Report, check_output_flags
from gqa_serve.workbench.sharding import local_config

DEFAULT_RANKS = (1, 2, 4, 8)
NATIVE_BLOCK_MULTIPLE = 16


def run(words: list[str]) -> None:
    """Answer `words` and print. Raises ConfigError, ModelError, HubError."""
    args = make_plan_parser().parse(words)
    if not args.model:
        raise ConfigError(
            "Which model? Give --model a hub id, a directory, a .gguf file, a config.json, or 'demo'."
        )
    check_output_flags(args)
    settings = _memory_settings(args)
    source = read_model(args.model, revision=args.revision, offline=args.offline)
    hardware = find_hardware(args.hardware)
    if hardware.is_cpu:
        _check_cpu_settings(args, settings)
    cases = _cases(args, source, hardware, settings)
    answers = [_answers(args, source, hardware, settings, case) for case in cases]
    for group in answers:
        _check_asked_memory(group)
    if args.batch_sizes and not any(answer.max_requests for group in answers for answer in group):
        raise ConfigError("Nothing fits, so there are no batches; see the plan without --batch-sizes.")
    report(args, words, source, hardware, answers).deliver(args)


def report(
    args: argparse.Namespace,
    words: Sequence[str],
    source: ModelSource,
    hardware: Hardware,
    groups: Sequence[Sequence[Answer]],
) -> Report:
    """The whole report; `groups`: the answers of each case, by number of KV heads."""
    prompt_lens = args.prompt_lens or [groups[0][0].case.context_len]
    numbers = [[answer.numbers(prompt_lens[0], args.price) for answer in group] for group in groups]
    config = source.config
    result = Report(
        "plan",
        f"{source.name}: {source.num_parameters / 1e9:.2f}B parameters, {config.num_layers} layers, "
        f"{config.num_heads} heads of {config.head_dim} over {config.num_kv_heads} KV heads",
        shlex.join(["gqa-serve", "plan", *words]),
        data=_data(source, hardware, numbers, groups),
    )
    result.sections.append(result.title)
    as_is = [
        (answer, row)
        for group, rows in zip(groups, numbers, strict=True)
        for answer, row in zip(group, rows, strict=True)
        if answer.is_as_it_is
    ]
    if len(groups) > 1 and as_is:
        result.sections.append(tables.case_table([row for _, row in as_is]))
    for group, rows in zip(groups, numbers, strict=True):
        title = tables.case_title(rows[0], hardware)
        result.sections.append(tables.main_table(group, rows, title))
        if args.batch_sizes:
            result.sections += tables.batch_tables(group, args.batch_sizes, title)
        if args.prompt_lens and len(args.prompt_lens) > 1:
            result.sections.append(tables.prompt_table(group, args.prompt_lens, title))
    first, first_row = as_is[0] if as_is else (groups[0][0], numbers[0][0])
    measured = None
    if args.hardware.lower() == CPU:
        from gqa_serve.workbench.machine import how_measured

        measured = how_measured()
    result.sections.append(tables.bound_paragraph(first, first_row))
    if (windows := tables.window_paragraph(first)) is not None:
        result.sections.append(windows)
    most = max(answer.max_requests for group in groups for answer in group)
    result.sections.append(tables.assumptions(first, most_requests=most, measured=measured))
    result.sections.append(tables.unknowns(args.model, args.hardware))
    if args.html is not None:
        from gqa_serve.workbench.plan.figures import figures

        result.sections += figures(groups[0])
    return result


def _data(
    source: ModelSource,
    hardware: Hardware,
    numbers: Sequence[Sequence[dict[str, Any]]],
    groups: Sequence[Sequence[Answer]],
) -> dict[str, Any]:
    """What the JSON holds beside the tables: every number of every case, and curves over the batch."""
    config = source.config
    rows = [row for rows in numbers for row in rows]
    answers = [
        {**row, "curve": _curve(answer)}
        for answer, row in zip(itertools.chain.from_iterable(groups), rows, strict=True)
    ]
    return {
        "model": {
            "name": source.name,
            "architecture": config.architecture,
            "num_parameters": source.num_parameters,
            "num_layers": config.num_layers,
            "num_heads": config.num_heads,
            "num_kv_heads": config.num_kv_heads,
            "head_dim": config.head_dim,
            "windows": list(config.windows),
            "stored_bytes": source.stored_bytes,
        },
        "hardware": {name: getattr(hardware, name) for name in hardware.__dataclass_fields__},
        "answers": answers,
    }


def _curve(answer: Answer) -> list[dict[str, float]]:
    """Steps at batches up to the largest that fits."""
    return [
        {
            "batch": batch,
            "step_s": answer.decode.seconds(batch),
            "tokens_per_s": answer.tokens_per_second(batch),
            "memory_s": answer.decode.memory_seconds(batch),
            "arithmetic_s": answer.decode.arithmetic_seconds(batch),
        }
        for batch in (batch_ladder(answer.max_requests) if answer.max_requests else [])
    ]


def _cases(
    args: argparse.Namespace, source: ModelSource, hardware: Hardware, settings: MemorySettings
) -> list[Case]:
    """Every combination that is asked for; refuses what cannot be served."""
    longest = source.config.context_limit
    context_lens = args.context_lens or [min(DEFAULT_CONTEXT_LEN, source.config.max_model_len)]
    for length in [*context_lens, *(args.prompt_lens or [])]:
        if length > longest:
            raise ConfigError(
                f"{length} tokens are more than the {longest} that {source.name} was made for; lower "
                "--context-lens and --prompt-lens."
            )
    kv_dtypes = [
        served_kv_dtype(source, hardware, args.quantization, dtype) for dtype in args.kv_dtypes or ["auto"]
    ]
    ranks = args.tensor_parallel
    if ranks is None:
        ranks = [_enough_ranks(args, source, hardware, settings, Case(kv_dtypes[0], 1, context_lens[0]))]
    for count in ranks:
        local_config(source.config, count)
    return [Case(*parts) for parts in dict.fromkeys(itertools.product(kv_dtypes, ranks, context_lens))]


def _enough_ranks(
    args: argparse.Namespace,
    source: ModelSource,
    hardware: Hardware,
    settings: MemorySettings,
    case: Case,
) -> int:
    """The smallest usual number of devices that the model as it is fits into."""
    possible = []
    for count in DEFAULT_RANKS if hardware.link_bandwidth is not None else (1,):
        if count > source.config.num_heads:
            break
        formats = served_formats(source, hardware, args.quantization, case.kv_dtype, settings.block_size)
        fewer = Case(case.kv_dtype, count, case.context_len)
        possible.append(Answer(source, source.config, fewer, formats, hardware, settings))
    return smallest_ranks(possible)


def _answers(
    args: argparse.Namespace, source: ModelSource, hardware: Hardware, settings: MemorySettings, case: Case
) -> list[Answer]:
    """One for each number of KV heads."""
    formats = served_formats(source, hardware, args.quantization, case.kv_dtype, settings.block_size)
    return [
        Answer(source, source.with_kv_heads(count), case, formats, hardware, settings)
        for count in args.num_kv_heads or group_counts(source.config)
    ]


def _memory_settings(args: argparse.Namespace) -> MemorySettings:
    """The server's own defaults and ranges, by way of its settings. Raises ConfigError."""
    if args.kv_cache_memory is not None and args.gpu_memory_utilization is not None:
        raise ConfigError(
            "--kv-cache-memory says what the KV cache takes, so --gpu-memory-utilization has no say; leave "
            "one of them out."
        )
    names = (
        "gpu_memory_utilization",
        "kv_cache_memory",
        "block_size",
        "max_num_batched_tokens",
        "max_num_seqs",
    )
    engine = EngineConfig(**{name: value for name in names if (value := getattr(args, name)) is not None})
    return MemorySettings(
        utilization=engine.gpu_memory_utilization,
        kv_cache_memory=engine.kv_cache_memory,
        block_size=engine.block_size,
        max_num_batched_tokens=engine.max_num_batched_tokens,
        max_num_seqs=engine.max_num_seqs,
        reserve=GPU_RESERVE if args.reserve is None else args.reserve,
    )


def _check_cpu_settings(args: argparse.Namespace, settings: MemorySettings) -> None:
    """Refuse what the server refuses on a CPU, and what means nothing there."""
    if args.gpu_memory_utilization is not None:
        raise ConfigError(
            "--gpu-memory-utilization is for GPUs; use --kv-cache-memory for the CPU's KV cache."
        )
    if args.reserve is not None:
        raise ConfigError("--reserve is for GPUs; leave it out, or use --kv-cache-memory.")
    if settings.block_size % NATIVE_BLOCK_MULTIPLE:
        raise ConfigError(
            f"--block-size {settings.block_size} is not a multiple of {NATIVE_BLOCK_MULTIPLE}, which CPUs "
            f"need; use {NATIVE_BLOCK_MULTIPLE}."
        )


def _check_asked_memory(answers: Sequence[Answer]) -> None:
    """Refuse a --kv-cache-memory that the model as it is leaves no room for, as the server would."""
    for answer in answers:
        asked = answer.settings.kv_cache_memory
        if asked is not None and answer.is_as_it_is and answer.memory.kv_budget_bytes < asked:
            free = format_bytes(max(0, answer.memory.kv_budget_bytes))
            raise ConfigError(
                f"--kv-cache-memory asks for {format_bytes(asked)}, but {answer.hardware.name} has only "
                f"{free} beside the weights and activations of {answer.source.name}; lower it."
            )
