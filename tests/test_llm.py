"""LLM, offline: what is refused, before anything is computed (generation itself is in test_demo.py)."""

from __future__ import annotations

from typing import Any

import pytest
from demo_model import demo_path

from gqa_serve import LLM, SamplingParams
from gqa_serve.errors import CacheCapacityError, ConfigError, GqaServeError, RequestError


@pytest.fixture(scope="module")
def llm() -> LLM:
    demo_path()
    return LLM("demo", kv_cache_memory="16MiB", progress=False)


@pytest.mark.parametrize(
    ("prompts", "params"),
    [
        ("a", {"max_tokens": 3}),
        ("a", SamplingParams(stop="END")),
        ("a", SamplingParams(temperature="hot")),
        (["a", "b"], [SamplingParams()]),
        ([["a"]], SamplingParams()),
        ([5.5], SamplingParams()),
        ([], None),
        ("", None),
        ([10**9], SamplingParams()),
        (["fine", [1] * 5000], SamplingParams()),
    ],
)
def test_mistakes_are_request_errors_and_leave_nothing_behind(llm: LLM, prompts: Any, params: Any) -> None:
    if prompts == []:
        assert llm.generate(prompts, params) == []
        return
    with pytest.raises(RequestError):
        llm.generate(prompts, params)
    assert not llm.engine.has_work


def test_one_call_at_a_time(llm: LLM) -> None:
    stream = llm.chat_stream(
        [{"role": "user", "content": "hi"}], SamplingParams(max_tokens=20, ignore_eos=True)
    )
    next(stream)
    with pytest.raises(RequestError, match="generating already"):
        llm.generate("a", SamplingParams(max_tokens=1))
    stream.close()
    assert llm.generate("a", SamplingParams(max_tokens=1))[0].outputs[0].token_ids


def test_a_stream_left_with_a_step_in_flight_is_in_nobodys_way() -> None:
    demo_path()
    llm = LLM("demo", backend="reference", kv_cache_memory="16MiB", progress=False)
    params = SamplingParams(temperature=0, max_tokens=4)
    (wanted,) = llm.generate("The capital of France is", params)
    llm.engine.runner.backend.lookahead = True  # as on a GPU
    stream = llm.chat_stream(
        [{"role": "user", "content": "hi"}], SamplingParams(max_tokens=20, ignore_eos=True)
    )
    next(stream)
    stream.close()
    assert llm.engine.has_work  # the step in flight
    (got,) = llm.generate("The capital of France is", params)
    assert got.outputs == wanted.outputs
    assert not llm.engine.has_work


def test_chat_stream_gives_one_answer(llm: LLM) -> None:
    with pytest.raises(RequestError, match="n must be 1"):
        list(llm.chat_stream([{"role": "user", "content": "hi"}], SamplingParams(n=2)))


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"max_modellen": 100}, ConfigError),
        ({"kv_cache_memory": "200TiB"}, CacheCapacityError),
        ({"kv_cache_memory": "1KiB"}, CacheCapacityError),
        ({"kv_cache_memory": "16MiB", "max_model_len": 8192}, CacheCapacityError),
        ({"max_model_len": 10_000_000}, ConfigError),
        ({"max_model_len": 1}, CacheCapacityError),
        ({"device": "cuda:7"}, ConfigError),
    ],
)
def test_settings_that_cannot_be_honoured(settings: dict[str, Any], error: type[GqaServeError]) -> None:
    demo_path()
    with pytest.raises(error):
        LLM("demo", progress=False, **settings)


def test_the_context_is_what_the_cache_holds(caplog: pytest.LogCaptureFixture, llm: LLM) -> None:
    tokens = llm.engine.info.num_blocks * llm.engine.info.block_size
    assert llm.engine.info.max_model_len == tokens
    assert tokens == 16 * 2**20 // llm.engine.info.kv_bytes_per_token // 16 * 16
