"""Cost models: the roofline equals step_cost.py's, a fit finds the factors that made the measurements."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gqa_serve.engine.model_config import ModelConfig
from gqa_serve.errors import ConfigError
from gqa_serve.workbench import step_cost
from gqa_serve.workbench.hardware import H100
from gqa_serve.workbench.kernel_cost import FP8, KV_FP8, Formats
from gqa_serve.workbench.records import RequestRecord, write_records
from gqa_serve.workbench.sharding import all_reduce_seconds, local_config
from gqa_serve.workbench.simulate.cost_model import visible_pairs
from gqa_serve.workbench.simulate.fit import fit, read_measurements
from gqa_serve.workbench.simulate.fitted import FittedCost, read_cost_model, write_cost_model
from gqa_serve.workbench.simulate.fleet import Fleet
from gqa_serve.workbench.simulate.jobs import make_jobs
from gqa_serve.workbench.simulate.roofline import Roofline
from gqa_serve.workbench.simulate.routing import make_routing
from gqa_serve.workbench.step_samples import StepSample
from gqa_serve.workbench.trace import TraceRequest
from tests.workbench.test_twin import make_spec

LLAMA = ModelConfig.from_hf(
    {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
    }
)
WINDOWED = dataclasses.replace(LLAMA, windows=(512, None) * 16)
FORMATS = (Formats(), Formats(weights=FP8, kv=KV_FP8, block_size=32))


def brute_pairs(query_len: int, context_len: int, window: int | None) -> int:
    seen = range(context_len - query_len + 1, context_len + 1)
    return sum(position if window is None else min(position, window) for position in seen)


@given(st.integers(1, 60), st.integers(0, 60), st.none() | st.integers(1, 40))
def test_pairs_are_counted_as_by_hand(query_len: int, computed: int, window: int | None) -> None:
    assert visible_pairs(query_len, computed + query_len, window) == brute_pairs(
        query_len, computed + query_len, window
    )


@settings(max_examples=60, deadline=None)
@given(
    config=st.sampled_from([LLAMA, WINDOWED]),
    formats=st.sampled_from(FORMATS),
    contexts=st.lists(st.integers(1, 3000), max_size=12),
    chunks=st.lists(st.tuples(st.integers(2, 700), st.integers(0, 2000)), max_size=3),
    ranks=st.sampled_from([1, 4, 16]),
    rows=st.integers(0, 3),
)
def test_the_roofline_is_that_of_step_cost(
    config: ModelConfig,
    formats: Formats,
    contexts: list[int],
    chunks: list[tuple[int, int]],
    ranks: int,
    rows: int,
) -> None:
    if not contexts and not chunks:
        return
    prompts = [(query_len, computed + query_len) for query_len, computed in chunks]
    lens = [*((1, length) for length in contexts), *prompts]
    sampled = min(len(lens), len(contexts) + rows)
    local = local_config(config, ranks)
    expected = step_cost.step(local, lens, formats, num_sampled=sampled).seconds(H100)
    tokens = sum(query_len for query_len, _ in lens)
    expected += all_reduce_seconds(config, tokens, ranks, H100)
    roofline = Roofline(config, H100, formats, ranks=ranks, efficiency=0.5, overhead_s=1e-4)
    seconds = roofline.step_seconds(contexts, prompts, sampled)
    assert seconds == pytest.approx(expected / 0.5 + 1e-4, rel=1e-9)


@settings(max_examples=30, deadline=None)
@given(
    config=st.sampled_from([LLAMA, WINDOWED]),
    contexts=st.lists(st.integers(1, 3000), min_size=1, max_size=12),
    num_steps=st.integers(1, 40),
)
def test_several_steps_at_once_cost_what_each_costs(
    config: ModelConfig, contexts: list[int], num_steps: int
) -> None:
    fitted = FittedCost(step_s=1e-3, decode_s=1e-5, context_s=1e-8, prefill_s=1e-5, pair_s=1e-9)
    for cost in (Roofline(config, H100, Formats()), fitted):
        each = [
            cost.step_seconds([length + step for length in contexts], [], len(contexts))
            for step in range(num_steps)
        ]
        assert cost.decode_seconds(contexts, num_steps) == each  # to the last bit: no run may depend on it


TRUE = FittedCost(step_s=4e-3, decode_s=2e-4, context_s=3e-7, prefill_s=6e-5, pair_s=2e-9, request_s=0.003)


def samples(noise: float, outliers: int) -> list[StepSample]:
    random = Random(0)
    found = []
    for index in range(400):
        contexts = [random.randint(10, 4000) for _ in range(random.choice([0, 1, 4, 16, 64]))]
        chunks = [(n := random.randint(2, 500), n + random.randint(0, 2000)) for _ in range(index % 3)]
        seconds = TRUE.step_seconds(contexts, chunks, 0) * random.uniform(1 - noise, 1 + noise)
        found.append(
            StepSample(
                num_decode=len(contexts),
                decode_context_tokens=sum(contexts),
                chunks=tuple(chunks),
                num_sampled=len(contexts),
                seconds=seconds * (20 if index % 25 == 0 and outliers else 1),
                forward_s=seconds,
            )
        )
    return found


def test_a_fit_finds_the_factors_behind_samples() -> None:
    cost, _ = fit(samples(0.0, 0), [])
    for name in ("step_s", "decode_s", "context_s", "prefill_s", "pair_s"):
        assert getattr(cost, name) == pytest.approx(getattr(TRUE, name), rel=1e-6)


def test_steps_that_something_held_up_hardly_matter() -> None:
    cost, _ = fit(samples(0.03, 1), [])
    for name in ("step_s", "decode_s", "context_s", "prefill_s"):
        assert getattr(cost, name) == pytest.approx(getattr(TRUE, name), rel=0.1)


def run_true(
    requests: Sequence[TraceRequest], cost: FittedCost, concurrency: int | None = None
) -> list[RequestRecord]:
    jobs = make_jobs(requests)
    spec = make_spec(
        num_blocks=4000, block_size=16, max_model_len=4096, max_num_seqs=32, max_num_batched_tokens=512
    )
    Fleet(spec, cost, 1, make_routing("round-robin"), concurrency).run(jobs)
    return [job.record() for job in jobs]


def test_records_alone_tell_the_step_times() -> None:
    """Records that the twin itself made, with known factors: from outside, only tokens are seen."""
    random, at, requests = Random(3), 0.0, []
    for _ in range(150):
        at += random.expovariate(2.0)
        requests.append(
            TraceRequest(
                arrival_s=at, prompt_tokens=random.randint(20, 600), output_tokens=random.randint(10, 120)
            )
        )
    records = run_true(requests, TRUE)
    cost, _ = fit([], records)
    again = run_true(requests, cost)
    for key in ("ttft_s", "tpot_s"):
        real = [getattr(record, key) for record in records]
        twin = [getattr(record, key) for record in again]
        assert sum(twin) == pytest.approx(sum(real), rel=0.05)
    assert cost.step_s == pytest.approx(TRUE.step_s, rel=0.1)
    assert cost.request_s == pytest.approx(TRUE.request_s, rel=0.3)


def test_runs_in_several_files_stay_apart(tmp_path: Path) -> None:
    """Each run's times begin at zero; taken for one run, their steps would seem to interleave."""
    random, paths = Random(4), []
    for concurrency in (1, 4, 16):
        requests = [
            TraceRequest(prompt_tokens=random.randint(20, 600), output_tokens=random.randint(10, 120))
            for _ in range(50)
        ]
        paths.append(tmp_path / f"{concurrency}.jsonl")
        write_records(paths[-1], run_true(requests, TRUE, concurrency))
    cost, _ = fit(*read_measurements(paths))
    for rows in (1, 4, 16):
        contexts = [400] * rows
        assert cost.step_seconds(contexts, [], rows) == pytest.approx(
            TRUE.step_seconds(contexts, [], rows), rel=0.1
        )


def test_records_add_what_the_server_adds_to_samples() -> None:
    slower = dataclasses.replace(TRUE, step_s=TRUE.step_s + 2e-3)
    requests = [
        TraceRequest(arrival_s=index / 3, prompt_tokens=50 + index, output_tokens=60) for index in range(60)
    ]
    cost, _ = fit(samples(0.0, 0), run_true(requests, slower))
    assert cost.step_s == pytest.approx(slower.step_s, rel=0.02)
    assert cost.prefill_s == pytest.approx(TRUE.prefill_s, rel=1e-6)


def test_too_little_to_fit_is_said() -> None:
    with pytest.raises(ConfigError, match="too few"):
        fit(samples(0.0, 0)[:3], [])


def test_a_cost_model_is_read_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "cost.json"
    write_cost_model(path, TRUE)
    assert read_cost_model(path) == TRUE


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "no cost model"),
        ('{"kind": "fitted", "step_s": -1}', "step_s must be seconds"),
        ("{", "Could not"),
    ],
)
def test_a_wrong_cost_model_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "cost.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_cost_model(path)
