"""Streams of POST /v1/responses: each event against the `openai` package, and the package's own helper."""

from __future__ import annotations

import asyncio
import json
import typing
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from fake_engine import IM_END, MODEL, FakeEngine, Script, Server, wait_until
from openai.types.responses import Response, ResponseStreamEvent
from test_responses import TOOL, City, says
from tool_model import call, think, tool_server

from gqa_serve.errors import EngineUnavailableError

# The event classes of the package by their type, out of `Annotated[Union[...], ...]`.
EVENT_TYPES = {
    typing.get_args(kind.model_fields["type"].annotation)[0]: kind
    for kind in typing.get_args(typing.get_args(ResponseStreamEvent)[0])
}


@pytest.fixture(scope="module")
def shared_server() -> Iterator[Server]:
    with tool_server() as running:
        yield running


def events_of(client: openai.OpenAI, **fields: Any) -> list[dict[str, Any]]:
    """The stream's events as they came, each valid in the strict sense; and in a proper order."""
    names: list[str] = []
    events: list[dict[str, Any]] = []
    with client.responses.with_streaming_response.create(model=MODEL, stream=True, **fields) as stream:
        for line in stream.iter_lines():
            if line.startswith("event: "):
                names.append(line.removeprefix("event: "))
            elif line.startswith("data: "):
                data = line.removeprefix("data: ")
                event = json.loads(data)
                EVENT_TYPES[event["type"]].model_validate_json(data, strict=True)
                events.append(event)
    assert names == [event["type"] for event in events]
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    return events


def rebuilt(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The output items, put together from the events alone, each event checked against its item."""
    items: list[dict[str, Any]] = []
    open_item = open_part = False
    for event in events:
        kind = event["type"].removeprefix("response.")
        if kind in ("created", "in_progress", "completed", "incomplete", "failed") or kind == "error":
            continue
        if kind == "output_item.added":
            assert not open_item
            assert event["output_index"] == len(items)
            assert event["item"]["status"] == "in_progress"
            items.append(event["item"])
            open_item = True
            continue
        item = items[-1]
        assert open_item
        assert event["output_index"] == len(items) - 1
        if kind == "output_item.done":
            assert not open_part
            item["status"] = event["item"]["status"]
            assert event["item"] == item
            open_item = False
            continue
        assert event["item_id"] == item["id"]
        if kind == "function_call_arguments.delta":
            item["arguments"] += event["delta"]
        elif kind == "function_call_arguments.done":
            assert event["arguments"] == item["arguments"]
        elif kind == "content_part.added":
            assert not open_part
            assert event["content_index"] == len(item["content"])
            item["content"].append(event["part"])
            open_part = True
        else:
            assert open_part
            assert event["content_index"] == len(item["content"]) - 1
            part = item["content"][-1]
            if kind == f"{part['type']}.delta":
                part["text"] += event["delta"]
                if "logprobs" in part:
                    part["logprobs"] += event["logprobs"]
            elif kind == f"{part['type']}.done":
                assert event["text"] == part["text"]
            else:
                assert kind == "content_part.done"
                assert event["part"] == part
                open_part = False
    assert not open_item
    assert not open_part
    return items


def test_the_events_of_a_message(client: openai.OpenAI, engine: FakeEngine) -> None:
    events = events_of(client, input="Hi", instructions="Be brief.")
    kinds = [event["type"].removeprefix("response.") for event in events]
    deltas = kinds.count("output_text.delta")
    assert deltas >= 1
    assert kinds == [
        "created",
        "in_progress",
        "output_item.added",
        "content_part.added",
        *["output_text.delta"] * deltas,
        "output_text.done",
        "content_part.done",
        "output_item.done",
        "completed",
    ]
    first, last = events[0]["response"], events[-1]["response"]
    assert (first["status"], first["output"], first["usage"]) == ("in_progress", [], None)
    assert (last["status"], last["id"]) == ("completed", first["id"])
    assert last["output"] == rebuilt(events)
    assert last["output"][0]["content"][0]["text"] == "Hello world"
    changed = {key for key in first if first[key] != last[key]}
    assert changed == {"status", "output", "usage", "completed_at"}
    # What is stored is what was told.
    stored = client.responses.retrieve(first["id"])
    assert json.loads(stored.to_json(exclude_unset=False))["output"][0]["id"] == last["output"][0]["id"]
    assert all(stream.aborts for stream in engine.streams)


def test_reasoning_text_and_calls_in_one_answer(client: openai.OpenAI, engine: FakeEngine) -> None:
    pieces = think("Let me") + "I look." + call("weather", '{"a": 1}') + call("weather", '{"b": 2}') + "Done."
    engine.script = lambda request: Script(list(pieces), hold_at=None)
    options: dict[str, Any] = {"input": "Hi", "tools": [TOOL], "store": False}
    events = events_of(client, **options)
    items = rebuilt(events)
    last = events[-1]["response"]
    assert items == last["output"]
    kinds = ["reasoning", "message", "function_call", "function_call", "message"]
    assert [item["type"] for item in items] == kinds
    assert items[0]["content"] == [{"type": "reasoning_text", "text": "Let me"}]
    calls = [item for item in items if item["type"] == "function_call"]
    assert [call["arguments"] for call in calls] == ['{"a": 1}', '{"b": 2}']
    assert last["usage"]["output_tokens_details"]["reasoning_tokens"] == 6
    # The same request without a stream gives the same, ids aside.
    whole = json.loads(client.responses.create(model=MODEL, **options).to_json(exclude_unset=False))
    for item in [*items, *whole["output"]]:
        del item["id"]
        item.pop("call_id", None)
    assert [
        {key: item[key] for key in told} for item, told in zip(whole["output"], items, strict=True)
    ] == items


def test_an_answer_cut_by_its_limit(client: openai.OpenAI, engine: FakeEngine) -> None:
    says(engine, call("weather", '{"city": "Rome"}'))
    events = events_of(client, input="Hi", tools=[TOOL], max_output_tokens=50)
    last = events[-1]
    assert last["type"] == "response.incomplete"
    assert last["response"]["incomplete_details"] == {"reason": "max_output_tokens"}
    (item,) = rebuilt(events)
    assert item["status"] == "incomplete"


def test_an_answer_without_text(client: openai.OpenAI, engine: FakeEngine) -> None:
    says(engine, "")
    (item,) = rebuilt(events_of(client, input="Hi"))
    assert item["content"][0]["text"] == ""


def test_logprobs_come_with_the_deltas(client: openai.OpenAI, engine: FakeEngine) -> None:
    engine.script = lambda request: Script(["Gr", b"\xc3", b"\xbc", "n"])
    include = ["message.output_text.logprobs"]
    events = events_of(client, input="Hi", include=include, top_logprobs=1)
    (item,) = rebuilt(events)
    (part,) = item["content"]
    assert part["text"] == "Grün"
    assert bytes(byte for entry in part["logprobs"] for byte in entry["bytes"]).decode() == "Grün"


def test_the_stream_helper(client: openai.OpenAI) -> None:
    with client.responses.stream(model=MODEL, input="Hi") as stream:
        text = "".join(event.delta for event in stream if event.type == "response.output_text.delta")
        final = stream.get_final_response()
    assert text == final.output_text == "Hello world"
    assert final.status == "completed"
    assert client.responses.retrieve(final.id).output_text == "Hello world"


def test_the_stream_helper_collects_calls(client: openai.OpenAI, engine: FakeEngine) -> None:
    engine.script = lambda request: Script(list(call("weather", '{"city": "Rome"}')))
    with client.responses.stream(model=MODEL, input="Hi", tools=[TOOL]) as stream:  # type: ignore[list-item]
        (item,) = stream.get_final_response().output
    assert item.type == "function_call"
    assert item.arguments == '{"city": "Rome"}'


def test_the_stream_helper_parses(client: openai.OpenAI, engine: FakeEngine) -> None:
    engine.script = lambda request: Script(list('{"name": "Rome", "rivers": []}'))
    with client.responses.stream(model=MODEL, input="Hi", text_format=City) as stream:
        assert stream.get_final_response().output_parsed == City(name="Rome", rivers=[])


def test_the_asynchronous_stream(server: Server) -> None:
    async def run() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
            stream = await client.responses.create(model=MODEL, input="Hi", stream=True)
            return [event.type async for event in stream]

    kinds = asyncio.run(run())
    assert kinds[0] == "response.created"
    assert kinds[-1] == "response.completed"


def test_an_error_before_the_first_token_is_a_status(client: openai.OpenAI, engine: FakeEngine) -> None:
    engine.script = lambda request: Script([], finish="error", error="boom")
    with pytest.raises(openai.InternalServerError):
        client.responses.create(model=MODEL, input="Hi", stream=True)


@pytest.mark.parametrize(
    ("fault", "message", "code"),
    [
        (EngineUnavailableError("The engine died."), "The engine died.", "engine_unavailable"),
        (ValueError("secret"), "The server failed while answering; its log says why.", "internal_error"),
    ],
)
def test_an_error_after_the_first_token_is_told(
    client: openai.OpenAI, engine: FakeEngine, fault: Exception, message: str, code: str
) -> None:
    engine.script = lambda request: Script(["Hel"], fault=fault)
    events = events_of(client, input="Hi")
    error, failed = events[-2:]
    assert (error["type"], error["message"], error["code"]) == ("error", message, code)
    assert failed["type"] == "response.failed"
    response = failed["response"]
    assert (response["status"], response["error"]["message"]) == ("failed", message)
    assert response["output"] == rebuilt(events[:-2])
    assert response["output"][0]["status"] == "incomplete"
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(response["id"])


def test_a_stream_is_given_up_when_its_client_leaves(client: openai.OpenAI, engine: FakeEngine) -> None:
    engine.script = lambda request: Script(["a", "b"], hold_at=1)
    stream = client.responses.create(model=MODEL, input="Hi", stream=True)
    seen: Response | None = None
    for event in stream:
        if event.type == "response.created":
            seen = event.response
        if event.type == "response.output_text.delta":
            break
    stream.close()
    wait_until(lambda: engine.ends() == ["abort"])
    assert seen is not None
    with pytest.raises(openai.NotFoundError):  # it never became complete
        client.responses.retrieve(seen.id)


def test_a_stop_string_ends_the_message(client: openai.OpenAI, engine: FakeEngine) -> None:
    engine.script = lambda request: Script(["Hello w", "orld", [IM_END]])
    events = events_of(client, input="Hi", extra_body={"stop": "wor"})
    (item,) = rebuilt(events)
    assert item["content"][0]["text"] == "Hello "
    assert events[-1]["type"] == "response.completed"


def test_logprobs_are_those_of_the_text_alone(client: openai.OpenAI, engine: FakeEngine) -> None:
    text = think("Hmm, let me see.") + "Grün." + call("weather", "{}") + "Done"
    engine.script = lambda request: Script(list(text))
    options: dict[str, Any] = {"input": "Hi", "tools": [TOOL], "include": ["message.output_text.logprobs"]}
    streamed = rebuilt(events_of(client, **options))
    whole = json.loads(client.responses.create(model=MODEL, **options).to_json(exclude_unset=False))["output"]
    for items in (streamed, whole):
        parts = [item["content"][0] for item in items if item["type"] == "message"]
        assert [part["text"] for part in parts] == ["Grün.", "Done"]
        for part in parts:
            assert (
                bytes(byte for entry in part["logprobs"] for byte in entry["bytes"]).decode() == part["text"]
            )


def test_logprobs_of_bytes_that_are_no_text(client: openai.OpenAI, engine: FakeEngine) -> None:
    engine.script = lambda request: Script(["a", b"\xff", "b"])
    (item,) = rebuilt(events_of(client, input="Hi", include=["message.output_text.logprobs"]))
    (part,) = item["content"]
    assert part["text"] == "a\ufffdb"
    assert [entry["bytes"] for entry in part["logprobs"]] == [[97], [255], [98]]
