"""The engine in process: decoding at several batch sizes, and prefill.

Decoding keeps a batch of requests alive and counts the tokens of a few steps at a time; the largest batch
comes first and requests are dropped for the next, so that prompts are computed once. Prefill is one prompt
with one output token. Prompts are random token ids.
"""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cpu_limits import Limits, Report, Result
from cpu_models import FORMATS, head_weights, layer_weights

from gqa_serve.config import EngineConfig
from gqa_serve.engine.core import Engine
from gqa_serve.engine.model_runner import ModelRunner
from gqa_serve.engine.request import EngineRequest, SamplingParams

_STEPS = 8  # of decoding, timed at once
_WARM_UP_STEPS = 2


def load_engine(path: Path, form: str, **settings: Any) -> Engine:
    """An engine on the native backend, with no reuse of prompts."""
    config = EngineConfig(
        model=str(path),
        backend="native",
        prefix_caching=False,
        **{
            "max_num_seqs": 64,
            "kv_cache_memory": 2**31,
            "max_model_len": 2048,
            **FORMATS[form][0],
            **settings,
        },
    )
    return Engine(ModelRunner(path, config), config)


def random_prompts(engine: Engine, count: int, length: int, seed: int = 0) -> list[list[int]]:
    """Token ids anywhere in the vocabulary."""
    numbers = random.Random(seed)
    return [[numbers.randrange(engine.info.vocab_size) for _ in range(length)] for _ in range(count)]


def add(engine: Engine, prompts: Sequence[Sequence[int]], max_tokens: int) -> list[str]:
    """Queue greedy requests that do not stop early; their ids."""
    params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
    names = [f"request-{number}" for number in range(len(prompts))]
    for name, prompt in zip(names, prompts, strict=True):
        engine.add(EngineRequest(request_id=name, prompt=list(prompt), params=params))
    return names


def run_to_end(engine: Engine, prompts: Sequence[Sequence[int]], max_tokens: int) -> float:
    """Output tokens per second of these requests together, prefill included."""
    start = time.perf_counter()
    add(engine, prompts, max_tokens)
    count = 0
    while engine.has_work:
        for output in engine.step():
            check(output.error)
            count += len(output.token_ids)
    return count / (time.perf_counter() - start)


def check(error: str | None) -> None:
    """A failed step would be a fast one."""
    if error is not None:
        raise RuntimeError(error)


def decode_rates(engine: Engine, batches: Sequence[int], context: int, rounds: int) -> dict[int, list[float]]:
    """Batch size -> tokens per second of each round, at a context of about `context` tokens."""
    sizes = sorted(set(batches), reverse=True)
    growth = len(sizes) * (_WARM_UP_STEPS + rounds * _STEPS)
    prompts = random_prompts(engine, sizes[0], max(1, context - growth // 2))
    alive = add(engine, prompts, 2 * growth + context)
    waiting = set(alive)
    while waiting:  # until every request decodes
        for output in engine.step():
            check(output.error)
            waiting.discard(output.request_id)
    rates: dict[int, list[float]] = {}
    for size in sizes:
        for name in alive[size:]:
            engine.abort(name)
        alive = alive[:size]
        _decode(engine, _WARM_UP_STEPS)
        rates[size] = [_decode(engine, _STEPS) for _ in range(rounds)]
    for name in alive:
        engine.abort(name)
    return rates


def _decode(engine: Engine, steps: int) -> float:
    """Tokens per second of `steps` steps."""
    start = time.perf_counter()
    count = 0
    for _ in range(steps):
        for output in engine.step():
            check(output.error)
            count += len(output.token_ids)
    return count / (time.perf_counter() - start)


def prefill_rates(engine: Engine, length: int, rounds: int) -> list[float]:
    """Prompt tokens per second of one prompt, its first output token included."""
    rates = []
    for seed in range(rounds + 1):
        prompts = random_prompts(engine, 1, length, seed)
        rates.append(length * run_to_end(engine, prompts, 1))
    return rates[1:]  # the first warms up


def bench_engine(report: Report, model: str, path: Path, form: str, args: Any) -> None:
    """One model in one format, every batch size, and prefill."""
    before = report.measure_limits()
    engine = load_engine(path, form, threads=args.threads, kv_cache_dtype=args.kv_cache_dtype)
    decoding = decode_rates(engine, args.batches, args.context, args.rounds)
    prefill = prefill_rates(engine, args.prefill, args.rounds)
    limits = before.better(report.measure_limits())
    info = engine.info
    report.section(
        f"engine: {model} {form} ({info.weight_bytes / 1e6:.0f} MB of weights, KV {info.kv_dtype}); {limits}"
    )
    report.add(_results(engine, model, form, limits, decoding, prefill, args))


def _peaks(form: str, limits: Limits) -> dict[str, float]:
    """Of one multiply-add per weight and activation, for which tiles of bfloat16 need three."""
    if FORMATS[form][1]:
        return {"int8 peak": limits.int8_ops}
    peaks = {"float32 peak": limits.float_ops}
    if form == "bfloat16" and limits.bf16_ops:
        peaks["a third of the tile peak"] = limits.bf16_ops / 3
    return peaks


def _results(
    engine: Engine,
    model: str,
    form: str,
    limits: Limits,
    decoding: dict[int, list[float]],
    prefill: list[float],
    args: Any,
) -> list[Result]:
    """Limits: bandwidth / bytes of weights for each step, peak / 2 operations for each weight."""
    config = engine.runner.config  # type: ignore[attr-defined]
    peaks = _peaks(form, limits)
    per_prompt_token = layer_weights(config)
    per_token = per_prompt_token + head_weights(config)
    steps = limits.read_bytes / engine.info.weight_bytes
    results = [
        Result(
            "engine",
            f"{model} {form}",
            f"decode, batch {size}, context {args.context}",
            "tokens/s",
            rates,
            {"bandwidth": size * steps, **{name: peak / (2 * per_token) for name, peak in peaks.items()}},
        )
        for size, rates in sorted(decoding.items())
    ]
    what = f"prefill of {args.prefill:,}"
    fastest = {name: peak / (2 * per_prompt_token) for name, peak in peaks.items()}
    return [*results, Result("engine", f"{model} {form}", what, "tokens/s", prefill, fastest)]
