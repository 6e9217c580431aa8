"""SamplingParams: what is refused, with which field, and what the checkpoint may recommend."""

from __future__ import annotations

from typing import Any

import pytest

from gqa_serve.engine.request import SamplingParams, sampling_defaults
from gqa_serve.errors import ContextLengthError, RequestError


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1), ("temperature", 2.1), ("temperature", float("nan")), ("temperature", "hot"),
        ("top_p", 0.0), ("top_p", 1.1), ("top_k", -2), ("top_k", 50.0), ("min_p", 1.5),
        ("repetition_penalty", 0.0), ("repetition_penalty", 1e-40), ("repetition_penalty", 1e308),
        ("presence_penalty", 2.5), ("frequency_penalty", -2.5), ("max_tokens", -1), ("max_tokens", 2.5),
        ("min_tokens", -1), ("seed", 2**63), ("logprobs", 21), ("prompt_logprobs", -1), ("n", 0), ("n", 129),
        ("stop", "END"), ("stop", [""]), ("stop", ["x" * 1025]), ("stop", ["x"] * 65),
        ("stop_token_ids", [100]), ("stop_token_ids", [-1]), ("stop_token_ids", [1] * 1025),
        ("logit_bias", {100: 1.0}), ("logit_bias", {1: 101.0}), ("logit_bias", {1: float("nan")}),
    ],
)  # fmt: skip
def test_values_out_of_range_are_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(RequestError) as caught:
        SamplingParams(**{field: value}).validate(vocab_size=100)
    assert caught.value.param == field


def test_values_at_their_limits_are_fine() -> None:
    SamplingParams(
        temperature=2, top_p=1, top_k=-1, min_p=1, repetition_penalty=100, presence_penalty=-2, seed=-(2**63),
        frequency_penalty=2, max_tokens=0, logprobs=20, n=128, stop=["x" * 1024] * 64, stop_token_ids=[99],
        logit_bias={0: -100},
    ).validate(vocab_size=100)  # fmt: skip


def test_min_tokens_beyond_max_tokens() -> None:
    with pytest.raises(RequestError, match="must not exceed"):
        SamplingParams(min_tokens=3, max_tokens=2).validate()


def test_max_tokens_is_a_cap() -> None:
    assert SamplingParams(max_tokens=50).fit(90, 100).max_tokens == 10
    assert SamplingParams(max_tokens=5, min_tokens=5).fit(90, 100).max_tokens == 5
    assert SamplingParams().fit(90, 100).max_tokens == 10
    assert SamplingParams(max_tokens=0).fit(100, 100).max_tokens == 0
    with pytest.raises(ContextLengthError) as caught:
        SamplingParams().fit(100, 100, param="messages")
    assert (caught.value.param, caught.value.code) == ("messages", "context_length_exceeded")


def test_choices_have_seeds_of_their_own_that_wrap() -> None:
    assert SamplingParams(seed=5).for_choice(3).seed == 8
    assert SamplingParams(seed=2**63 - 1).for_choice(1).seed == -(2**63)
    assert SamplingParams().for_choice(3).seed is None


def test_recommendations_of_a_checkpoint() -> None:
    found = sampling_defaults({"temperature": 0.6, "top_k": 20.0, "top_p": None, "bos_token_id": 1})
    assert found == {"temperature": 0.6, "top_k": 20}
    for wrong in ({"temperature": 3.0}, {"temperature": "hot"}, {"top_k": 1.5}, {"top_p": 0}):
        with pytest.raises(RequestError):
            sampling_defaults(wrong)
