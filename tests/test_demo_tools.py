"""Tools with the demo model, whose template knows none: what must be a call is one, and fits its schema."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Annotated, Any

import jsonschema_rs
import openai
import pydantic
import pytest
from demo_server import RunningServer

MODEL = "demo"
WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Tells the weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "maxLength": 20},
                "unit": {"type": "string", "enum": ["celsius", "fahrenheit"]},
                "days": {"type": "integer", "minimum": 1, "maximum": 7},
            },
            "required": ["city", "unit", "days"],
            "additionalProperties": False,
        },
    },
}
CLOCK: Any = {"type": "function", "function": {"name": "clock"}}
SCHEMAS = {
    "get_weather": WEATHER["function"]["parameters"],
    "clock": {"type": "object", "maxProperties": 0},
}
NAMED: Any = {"type": "function", "function": {"name": "get_weather"}}
USER: Any = [{"role": "user", "content": "How warm will it be in Paris tomorrow?"}]


@pytest.fixture(scope="module")
def client(demo_server: RunningServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{demo_server.url}/v1", api_key="none", max_retries=0) as opened:
        yield opened


def assert_fits(call: Any) -> None:
    jsonschema_rs.validate(SCHEMAS[call.function.name], json.loads(call.function.arguments))


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_required_calls_fit_their_schemas(client: openai.OpenAI, temperature: float) -> None:
    answer = client.chat.completions.create(
        model=MODEL, messages=USER, tools=[WEATHER, CLOCK], tool_choice="required", n=4, seed=7,
        temperature=temperature, max_tokens=300, parallel_tool_calls=False,
    )  # fmt: skip
    for choice in answer.choices:
        assert choice.finish_reason == "tool_calls"
        assert choice.message.content is None
        (call,) = choice.message.tool_calls or []
        assert_fits(call)


def test_an_agent_calls_a_tool_and_answers(client: openai.OpenAI) -> None:
    messages = list(USER)
    with client.chat.completions.stream(
        model=MODEL, messages=messages, tools=[WEATHER], tool_choice=NAMED, temperature=0, max_tokens=200
    ) as stream:
        message = stream.get_final_completion().choices[0].message
    (call,) = message.tool_calls or []
    assert_fits(call)
    messages.append(message.to_dict())
    messages.append({"role": "tool", "tool_call_id": call.id, "content": "Sunny, 21 degrees."})
    answer = client.chat.completions.create(
        model=MODEL, messages=messages, tools=[WEATHER], tool_choice="none", temperature=0, max_tokens=40
    ).choices[0]
    assert answer.message.content
    assert answer.message.tool_calls is None


def test_strict_tools_leave_the_model_its_words(client: openai.OpenAI) -> None:
    strict = {**WEATHER, "function": {**WEATHER["function"], "strict": True}}
    answer = client.chat.completions.create(
        model=MODEL, messages=USER, tools=[strict], temperature=1.2, seed=1, n=4, max_tokens=80
    )
    for choice in answer.choices:
        calls = choice.message.tool_calls or []
        assert choice.message.content or calls
        if choice.finish_reason != "length":
            assert (choice.finish_reason == "tool_calls") == bool(calls)
            for call in calls:
                assert_fits(call)


def test_a_form_for_the_text_or_a_call(client: openai.OpenAI) -> None:
    form: Any = {
        "type": "json_schema",
        "json_schema": {
            "name": "answer",
            "schema": {
                "type": "object",
                "properties": {"degrees": {"type": "integer", "minimum": -50, "maximum": 60}},
                "required": ["degrees"],
                "additionalProperties": False,
            },
        },
    }
    answer = client.chat.completions.create(
        model=MODEL, messages=USER, tools=[WEATHER], response_format=form, n=4, seed=2, max_tokens=200,
        parallel_tool_calls=False,
    )  # fmt: skip
    for choice in answer.choices:
        if choice.message.tool_calls:
            assert_fits(choice.message.tool_calls[0])
        else:
            assert choice.message.content is not None
            assert -50 <= json.loads(choice.message.content)["degrees"] <= 60


class Weather(pydantic.BaseModel):
    """What `parse` is to make of the answer."""

    city: Annotated[str, pydantic.StringConstraints(max_length=20)]
    degrees: Annotated[int, pydantic.Field(ge=-50, le=60)]


def test_parse_gives_models(client: openai.OpenAI) -> None:
    answer = client.chat.completions.parse(
        model=MODEL, messages=USER, response_format=Weather, temperature=0, max_tokens=100
    )
    assert isinstance(answer.choices[0].message.parsed, Weather)
    tool = openai.pydantic_function_tool(Weather, name="tell_weather")
    with client.chat.completions.stream(
        model=MODEL, messages=USER, tools=[tool], tool_choice="required", parallel_tool_calls=False,
        temperature=0, max_tokens=150,
    ) as stream:  # fmt: skip
        message = stream.get_final_completion().choices[0].message
    (call,) = message.tool_calls or []
    assert isinstance(call.function.parsed_arguments, Weather)
