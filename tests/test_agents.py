"""Agents over a real server and model: the Responses API and Anthropic's Messages API, tools and schemas.

The demo model is far too small to choose tools well; what is tested is that it must, that what it writes fits
the schema, and that a conversation goes on with the results.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import anthropic
import openai
import pydantic
import pytest
from demo_server import RunningServer
from openai.types.responses import Response

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "city": {"enum": ["Rome", "Oslo"]},
        "days": {"type": "integer", "minimum": 1, "maximum": 9},
    },
    "required": ["city", "days"],
    "additionalProperties": False,
}


class Arguments(pydantic.BaseModel):
    city: str
    days: int


def check(arguments: Any) -> None:
    """Raises if the arguments do not fit the schema."""
    found = Arguments.model_validate(arguments, strict=True)
    assert found.city in ("Rome", "Oslo")
    assert 1 <= found.days <= 9


@pytest.fixture
def client(demo_server: RunningServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{demo_server.url}/v1", api_key="none", max_retries=0) as opened:
        yield opened


@pytest.fixture
def model(client: openai.OpenAI) -> str:
    return client.models.list().data[0].id


def test_an_agent_over_responses(client: openai.OpenAI, model: str) -> None:
    tool: Any = {"type": "function", "name": "forecast", "parameters": SCHEMA, "strict": True}
    options: dict[str, Any] = {"model": model, "temperature": 1.2, "extra_body": {"seed": 7}, "tools": [tool]}
    options["parallel_tool_calls"] = False
    with client.responses.stream(input="Will it rain in Rome?", tool_choice="required", **options) as stream:
        first = stream.get_final_response()
    (call,) = first.output
    assert call.type == "function_call"
    check(json.loads(call.arguments))
    result: Any = {"type": "function_call_output", "call_id": call.call_id, "output": "Rain on Monday."}
    second = client.responses.create(
        input=[result], previous_response_id=first.id, max_output_tokens=12, tool_choice="none", **options
    )
    Response.model_validate_json(second.to_json(), strict=True)
    assert second.usage is not None
    assert 0 < second.usage.output_tokens <= 12
    assert [item.type for item in second.output] == ["message"]


def test_a_schema_over_responses(client: openai.OpenAI, model: str) -> None:
    class Trip(pydantic.BaseModel):
        city: str = pydantic.Field(max_length=12)
        days: int = pydantic.Field(ge=1, le=9)

    for seed in range(3):
        answer = client.responses.parse(
            model=model, input="Plan a trip.", text_format=Trip, temperature=1.5, extra_body={"seed": seed}
        )
        assert isinstance(answer.output_parsed, Trip)


def test_an_agent_over_messages(demo_server: RunningServer, model: str) -> None:
    client = anthropic.Anthropic(base_url=demo_server.url, api_key="none", max_retries=0)
    messages: list[Any] = [{"role": "user", "content": "Will it rain in Rome?"}]
    options: dict[str, Any] = {
        "model": model,
        "tools": [{"name": "forecast", "input_schema": SCHEMA}],
        "extra_body": {"temperature": 1, "seed": 3},
    }
    forced: Any = {"type": "tool", "name": "forecast"}
    with client.messages.stream(messages=messages, max_tokens=200, tool_choice=forced, **options) as stream:
        first = stream.get_final_message()
    assert first.stop_reason == "tool_use"
    (call,) = first.content
    assert call.type == "tool_use"
    check(call.input)
    messages += [
        {"role": "assistant", "content": [call.to_dict()]},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": call.id, "content": "Rain."}]},
    ]
    counted = client.messages.count_tokens(model=model, messages=messages, tools=options["tools"])
    second = client.messages.create(messages=messages, max_tokens=12, **options)
    used = second.usage
    assert counted.input_tokens == used.input_tokens + (used.cache_read_input_tokens or 0)
    assert used.cache_read_input_tokens
    assert used.output_tokens <= 12
