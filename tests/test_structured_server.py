"""Structured output over HTTP from a real server with the demo model."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from typing import Any, Literal

import openai
import pydantic
import pytest
from demo_server import RunningServer


class Person(pydantic.BaseModel):
    name: str = pydantic.Field(max_length=12)
    age: int = pydantic.Field(ge=0, le=120)
    mood: Literal["happy", "sad"]


@pytest.fixture
def client(demo_server: RunningServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{demo_server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


ASK: Any = [{"role": "user", "content": "Describe a person."}]


def test_a_model_is_parsed_whole_and_from_a_stream(client: openai.OpenAI) -> None:
    fields: dict[str, Any] = {
        "model": "demo",
        "messages": ASK,
        "temperature": 1.3,
        "seed": 4,
        "max_tokens": 80,
    }
    whole = client.chat.completions.parse(**fields, response_format=Person)
    assert isinstance(whole.choices[0].message.parsed, Person)
    assert whole.choices[0].finish_reason == "stop"
    with client.chat.completions.stream(**fields, response_format=Person) as stream:
        final = stream.get_final_completion()
    assert final.choices[0].message.parsed == whole.choices[0].message.parsed


def test_usage_counts_forced_tokens_and_logprobs_cover_each(client: openai.OpenAI) -> None:
    fields: dict[str, Any] = {
        "model": "demo",
        "prompt": "x",
        "max_tokens": 60,
        "extra_body": {"guided_regex": "the quick brown fox jumps( over| under) it"},
    }
    fast = client.completions.create(**fields)
    slow = client.completions.create(**fields, logprobs=0, temperature=0)
    assert re.fullmatch("the quick brown fox jumps( over| under) it", fast.choices[0].text)
    assert slow.choices[0].logprobs is not None
    assert "".join(slow.choices[0].logprobs.tokens or []) == slow.choices[0].text
    assert slow.usage is not None
    assert fast.usage is not None
    assert slow.usage.completion_tokens == len(slow.choices[0].logprobs.tokens or [])
    assert fast.usage.completion_tokens >= 6


def test_many_at_once_beside_others(client: openai.OpenAI) -> None:
    texts: dict[int, str] = {}

    def ask(number: int) -> None:
        extra = {"guided_choice": ["left", "right"]} if number % 2 else {"min_tokens": 5}
        answer = client.completions.create(
            model="demo", prompt="Turn", max_tokens=12, seed=number, temperature=1.5, extra_body=extra
        )
        texts[number] = answer.choices[0].text

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {texts[number] for number in range(1, 12, 2)} <= {"left", "right"}
    assert len(texts) == 12


def test_what_cannot_be_enforced_is_refused_and_the_server_goes_on(client: openai.OpenAI) -> None:
    for schema in ({"not": {}}, {"type": "array", "uniqueItems": True}, {"$ref": "http://127.0.0.1:1/x"}):
        with pytest.raises(openai.BadRequestError) as caught:
            client.completions.create(model="demo", prompt="x", extra_body={"guided_json": schema})
        assert caught.value.param == "guided_json"
    answer = client.chat.completions.create(
        model="demo", messages=ASK, max_tokens=200, response_format={"type": "json_object"}, temperature=0
    )
    if answer.choices[0].finish_reason == "stop":
        assert isinstance(json.loads(answer.choices[0].message.content or ""), dict)
