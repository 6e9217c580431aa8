"""/v1/completions of the demo model: scores that agree with each other, ranks and masks that hold."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import openai
import pytest

if TYPE_CHECKING:
    from demo_server import RunningServer

TEXT = "The capital of France is Paris, which lies on the Seine."


@pytest.fixture(scope="module")
def client(demo_server: RunningServer) -> Iterator[openai.OpenAI]:
    with demo_server.client() as opened:
        yield opened


def complete(client: openai.OpenAI, prompt: Any, **fields: Any) -> Any:
    extra = {name: fields.pop(name) for name in list(fields) if name not in OPENAI}
    return client.completions.create(model="demo", prompt=prompt, extra_body=extra, **fields)


OPENAI = ("max_tokens", "echo", "logprobs", "n", "best_of", "seed", "temperature", "stream")


def test_scores_of_a_prompt_agree_however_they_are_asked_for(client: openai.OpenAI) -> None:
    scored = complete(client, TEXT, max_tokens=0, echo=True, logprobs=2, return_token_ids=True)
    (choice,) = scored.choices
    assert (choice.text, choice.finish_reason, scored.usage.completion_tokens) == (TEXT, "length", 0)
    ids = choice.prompt_token_ids
    lists = choice.logprobs
    assert len(ids) == len(lists.tokens) == len(lists.token_logprobs) == scored.usage.prompt_tokens
    assert "".join(lists.tokens) == TEXT
    for offset, token in zip(lists.text_offset, lists.tokens, strict=True):
        assert TEXT[offset:].startswith(token)
    # as vLLM spells it, from token ids, beside another prompt, with a token generated, as a stream
    (entry,) = complete(client, ids, max_tokens=1, prompt_logprobs=2).choices
    told = [None] + [
        place[str(token)]["logprob"] for token, place in zip(ids[1:], entry.prompt_logprobs[1:], strict=True)
    ]
    assert told == lists.token_logprobs
    other, again = complete(client, [ids[:7], ids], max_tokens=1, echo=True, logprobs=2).choices
    assert again.logprobs.token_logprobs[:-1] == lists.token_logprobs
    assert again.logprobs.top_logprobs[:-1] == lists.top_logprobs
    assert other.logprobs.token_logprobs[:-1] == lists.token_logprobs[:7]
    streamed: list[float] = []
    for chunk in complete(client, TEXT, max_tokens=2, echo=True, logprobs=0, stream=True):
        streamed += chunk.choices[0].logprobs.token_logprobs
    assert streamed[: len(ids)] == lists.token_logprobs


def test_a_truncated_prompt_is_its_end(client: openai.OpenAI) -> None:
    (whole,) = complete(client, TEXT, max_tokens=1, return_token_ids=True).choices
    (cut,) = complete(client, TEXT, truncate_prompt_tokens=5, max_tokens=0, echo=True, logprobs=0).choices
    (ids,) = complete(client, whole.prompt_token_ids[-5:], max_tokens=0, echo=True, logprobs=0).choices
    assert cut == ids


def test_best_of_picks_what_ranks_first(client: openai.OpenAI) -> None:
    fields: dict[str, Any] = {"max_tokens": 12, "temperature": 1.5, "seed": 11}
    candidates = complete(client, "Once upon a time", n=6, logprobs=0, **fields)
    means = [
        sum(choice.logprobs.token_logprobs) / len(choice.logprobs.token_logprobs)
        for choice in candidates.choices
    ]
    ranked = sorted(range(6), key=lambda index: -means[index])
    best = complete(client, "Once upon a time", n=2, best_of=6, **fields)
    assert [choice.text for choice in best.choices] == [candidates.choices[i].text for i in ranked[:2]]
    assert [choice.index for choice in best.choices] == [0, 1]
    assert best.usage == candidates.usage


@pytest.mark.parametrize("temperature", [0, 2])
def test_only_allowed_tokens_are_generated(client: openai.OpenAI, temperature: float) -> None:
    allowed = [30, 31, 32]
    answer = complete(client, TEXT, temperature=temperature, allowed_token_ids=allowed, return_token_ids=True)
    (choice,) = answer.choices
    assert set(choice.token_ids) <= set(allowed)
    assert len(choice.token_ids) == 16


def test_tokens_there_and_back(demo_server: RunningServer, client: openai.OpenAI) -> None:
    (choice,) = complete(client, TEXT, max_tokens=1, return_token_ids=True).choices
    post = client.post
    tokens = post(f"{demo_server.url}/tokenize", cast_to=object, body={"prompt": TEXT})
    assert isinstance(tokens, dict)
    assert tokens["tokens"] == choice.prompt_token_ids
    assert tokens["max_model_len"] == 8192
    text = post(f"{demo_server.url}/detokenize", cast_to=object, body={"tokens": tokens["tokens"]})
    assert text == {"prompt": TEXT}
