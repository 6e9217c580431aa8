"""Same request, same bytes: on the native backend a request's numbers depend on the request alone.

Each request's tokens, log-probabilities and pooled states, compared as hexadecimal floats, are computed alone
on one thread in one chunk, and then in company: random arrivals, chunks, block sizes, thread counts,
instruction sets, prefix hits and preemptions, for every format of weights and cache.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from fake_runner import assert_conserved, request
from gguf_files import base_metadata, convert_tensors, write_gguf
from tiny import tiny_model

from gqa_serve.config import EngineConfig
from gqa_serve.engine.backends import native_is_built
from gqa_serve.engine.core import Engine
from gqa_serve.engine.kernels.cpu import load
from gqa_serve.engine.model_runner import ModelRunner
from gqa_serve.engine.request import TokenLogprobs, TokenOutput

pytestmark = pytest.mark.skipif(not native_is_built(), reason="the native kernels are not built")

MAX_LEN = 512


def agreeing_levels(name: str) -> list[list[str]]:
    """Instruction sets, in groups of the same bytes: AMX sums bfloat16 weights in its own order."""
    levels: list[str] = load().isa_levels() if native_is_built() else []
    if name != "bfloat16" or "amx" not in levels:
        return [levels]
    return [[isa for isa in levels if isa != "amx"], ["amx"]]


Numbers = tuple[tuple[int, str, tuple[str, ...]], ...]

# Name -> (how the checkpoint is stored, engine settings).
FORMATS: dict[str, tuple[str, dict[str, Any]]] = {
    "float32": ("float32", {}),
    "bfloat16": ("bfloat16", {}),
    "float16": ("float16", {}),
    "int8": ("bfloat16", {"quantization": "int8", "kv_cache_dtype": "int8"}),
    "int4": ("float32", {"quantization": "int4", "kv_cache_dtype": "bfloat16"}),
    "Q8_0": ("Q8_0", {}),
    "Q4_0": ("Q4_0", {"kv_cache_dtype": "int8"}),
    "Q4_1": ("Q4_1", {"kv_cache_dtype": "float32"}),
}


def checkpoint(stored: str, path: Path) -> Path:
    """A tiny model with windows, soft caps and norms of heads (Gemma 2 and 3), or of Llama's kind as GGUF."""
    if stored.startswith("Q"):
        model = tiny_model("llama", max_position_embeddings=MAX_LEN, num_attention_heads=8)
        metadata = {**base_metadata(model.config), "vocab_size": model.config.vocab_size}
        kind = gguf.GGMLQuantizationType[stored]
        return write_gguf(path / "tiny.gguf", "llama", metadata, convert_tensors(model, "llama"), kind)
    model = tiny_model("gemma3", max_position_embeddings=MAX_LEN, hidden_size=72, num_attention_heads=6)
    model.to(getattr(torch, stored)).save_pretrained(path)
    return path


def engine_of(path: Path, settings: dict[str, Any], **more: Any) -> Engine:
    config = EngineConfig(
        model="tiny", backend="native", **{"kv_cache_memory": 2**24, "max_num_seqs": 8, **settings, **more}
    )
    return Engine(ModelRunner(path, config), config)


def prompts(rng: random.Random) -> list[list[int]]:
    """Short and long prompts; some begin alike. Longer than a KV split, a chunk and a window."""
    shared = [rng.randrange(3, 128) for _ in range(290)]
    lengths = [1, 2, 15, 16, 17, 63, 64, 65, 130, 255, 256, 257, 300]
    fresh = [[rng.randrange(3, 128) for _ in range(length)] for length in lengths]
    return [*fresh, shared[:200], shared[:280], [*shared, 5]]


def submit(engine: Engine, index: int, prompt: Sequence[int]) -> None:
    seeded = {"temperature": 0.9, "seed": index, "top_p": 0.9} if index % 3 == 2 else {}
    scored = {"prompt_logprobs": 2} if index % 4 == 1 else {}
    engine.add(request(str(index), prompt, max_tokens=20, logprobs=3, **seeded, **scored))
    if index % 3 == 0:
        pooling = "mean" if index % 2 else "last"
        engine.add(request(f"{index} pooled", prompt, max_tokens=0, pooling=pooling))


def exact(entries: Sequence[TokenLogprobs | None]) -> Numbers:
    return tuple(
        (e.token_id, float(e.logprob).hex(), tuple(float(value).hex() for _, value in e.top))
        for e in entries
        if e is not None
    )


def collect(outputs: dict[str, Numbers], step: Sequence[TokenOutput]) -> int:
    """Add a step's outputs; how many prompt tokens of them came from the cache."""
    for output in step:
        entries = [*(output.prompt_logprobs or []), *(output.logprobs or [])]
        outputs[output.request_id] = outputs.get(output.request_id, ()) + exact(entries)
        if output.pooled is not None:
            outputs[output.request_id] += ((0, output.pooled.hex(), ()),)
    return sum(output.num_cached_tokens for output in step)


def alone(engine: Engine, requests: Sequence[Sequence[int]]) -> dict[str, Numbers]:
    outputs: dict[str, Numbers] = {}
    for index, prompt in enumerate(requests):
        submit(engine, index, prompt)
        while engine.has_work:
            collect(outputs, engine.step())
    return outputs


def together(
    engine: Engine, requests: Sequence[Sequence[int]], rng: random.Random
) -> tuple[dict[str, Numbers], int]:
    """Requests arrive in random order, some steps apart. Also returns the number of prefix hits' tokens."""
    outputs: dict[str, Numbers] = {}
    cached = 0
    waiting = list(enumerate(requests))
    rng.shuffle(waiting)
    while waiting or engine.has_work:
        while waiting and rng.random() < 0.5:
            submit(engine, *waiting.pop())
        cached += collect(outputs, engine.step())
    assert_conserved(engine)
    return outputs, cached


CASES = [(name, levels) for name in FORMATS for levels in agreeing_levels(name)]


@pytest.mark.parametrize(("name", "levels"), CASES, ids=[f"{name}-{'-'.join(isas)}" for name, isas in CASES])
def test_same_bytes_in_any_company(name: str, levels: list[str], tmp_path: Path) -> None:
    stored, settings = FORMATS[name]
    path = checkpoint(stored, tmp_path)
    rng = random.Random(name)
    requests = prompts(rng)
    reference = {"cpu_isa": levels[-1], "prefix_caching": False, "max_num_batched_tokens": 1024}
    one = engine_of(path, settings, threads=1, **reference)
    wanted = alone(one, requests)
    assert len(wanted) > len(requests)  # some are pooled too
    assert all(wanted.values())
    preemptions = cached = 0
    for number in range(4):
        # In every other round the cache holds the longest request and no more, so that others give way.
        tight = number % 2 == 1
        block_size = 16 if tight else rng.choice([16, 32, 64])
        blocks = 320 // block_size if tight else 400
        engine = engine_of(
            path,
            settings,
            threads=rng.choice([1, 2, 3]),
            cpu_isa=rng.choice(levels),
            block_size=block_size,
            max_num_batched_tokens=rng.choice([8, 33, 100, 700]),
            max_model_len=320,
            kv_cache_memory=blocks * block_size * one.info.kv_bytes_per_token,
        )
        outputs, hits = together(engine, requests, rng)
        assert outputs == wanted
        preemptions += engine.scheduler.num_preemptions
        cached += hits
    assert preemptions > 0
    assert cached > 0
