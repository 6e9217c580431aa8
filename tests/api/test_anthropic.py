"""POST /v1/messages as the official `anthropic` client sees it, whole and streamed."""

from __future__ import annotations

import json
import typing
from collections.abc import Iterator
from typing import Any

import anthropic
import httpx2
import pytest
from anthropic.types import Message, RawMessageStreamEvent
from fake_engine import MAX_MODEL_LEN, MODEL, FakeEngine, Script, Server, serving, wait_until
from test_responses import City, prompt_text, says
from tool_model import call, think, tool_server

from gqa_serve.errors import EngineUnavailableError

USER = [{"role": "user", "content": "Hi"}]
TOOL = {"name": "weather", "description": "Somewhere.", "input_schema": {"type": "object", "properties": {}}}
EVENT_TYPES = {
    typing.get_args(kind.model_fields["type"].annotation)[0]: kind
    for kind in typing.get_args(typing.get_args(RawMessageStreamEvent)[0])
}


@pytest.fixture(scope="module")
def shared_server() -> Iterator[Server]:
    with tool_server() as running:
        yield running


@pytest.fixture
def client(server: Server) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0) as opened:
        yield opened


def create(client: anthropic.Anthropic, **fields: Any) -> Message:
    """A message, valid in the strict sense."""
    values: dict[str, Any] = {"model": MODEL, "max_tokens": 100, "messages": USER, **fields}
    message = client.messages.create(**values)
    return Message.model_validate_json(message.to_json(), strict=True)


def refusal(client: anthropic.Anthropic, **fields: Any) -> anthropic.APIStatusError:
    """The error that a request gets, in Anthropic's shape."""
    values: dict[str, Any] = {"model": MODEL, "max_tokens": 100, "messages": USER, **fields}
    with pytest.raises(anthropic.APIStatusError) as caught:
        client.messages.create(**values)
    error = caught.value
    body = json.loads(error.response.text)
    assert set(body) == {"type", "error", "request_id"}
    assert body["type"] == "error"
    assert set(body["error"]) == {"type", "message"}
    assert error.response.headers["request-id"] == body["request_id"]
    return error


def detail(error: anthropic.APIStatusError) -> tuple[str, str]:
    """Its type and message."""
    body = json.loads(error.response.text)["error"]
    return body["type"], body["message"]


def test_a_message(client: anthropic.Anthropic, engine: FakeEngine) -> None:
    engine.script = lambda request: Script(num_cached_tokens=16)
    message = create(client, system="Be brief.")
    assert message.id.startswith("msg_")
    assert (message.type, message.role, message.model) == ("message", "assistant", MODEL)
    (block,) = message.content
    assert block.type == "text"
    assert block.text == "Hello world"
    assert (message.stop_reason, message.stop_sequence) == ("end_turn", None)
    assert message.usage.cache_read_input_tokens == 16
    assert message.usage.input_tokens + 16 == len(engine.requests[0].prompt)
    assert message.usage.output_tokens == len("Hello world") + 1
    assert prompt_text(engine.requests[0]) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )


def test_options_reach_the_engine(client: anthropic.Anthropic, engine: FakeEngine) -> None:
    create(client, extra_body={"temperature": 0.5, "seed": 5, "top_p": 0.9, "top_k": 3, "priority": 2})
    (request,) = engine.requests
    params = request.params
    assert (params.temperature, params.top_p, params.top_k, params.seed) == (0.5, 0.9, 3, 5)
    assert (params.max_tokens, request.priority) == (100, 2)


def test_why_a_message_ends(client: anthropic.Anthropic, engine: FakeEngine) -> None:
    limited = create(client, max_tokens=3)
    assert limited.stop_reason == "max_tokens"
    assert limited.usage.output_tokens == 3
    stopped = create(client, stop_sequences=["x", "wor"])
    assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", "wor")
    assert stopped.content[0].text == "Hello "  # type: ignore[union-attr]
    engine.script = lambda request: Script(["a" * 1000])
    filled = create(client, max_tokens=20_000)
    assert filled.stop_reason == "model_context_window_exceeded"
    assert filled.usage.input_tokens + filled.usage.output_tokens == MAX_MODEL_LEN


def test_blocks_become_a_conversation(client: anthropic.Anthropic, engine: FakeEngine) -> None:
    cached = {"cache_control": {"type": "ephemeral"}}
    billing = {"type": "text", "text": "x-anthropic-billing-header: cc_version=1; cch=123;"}
    create(
        client,
        system=[billing, {"type": "text", "text": "Rules.", **cached}],
        tools=None,
        messages=[
            {
                "role": "user",
                "content": [{"type": "text", "text": "One.", **cached}, {"type": "text", "text": "Two."}],
            },
            {
                "role": "assistant",
                "content": [
                    {"type": "thinking", "thinking": "Hm.", "signature": "s"},
                    {"type": "redacted_thinking", "data": "opaque"},
                    {"type": "text", "text": "Let me see."},
                    {"type": "tool_use", "id": "toolu_1", "name": "weather", "input": {"city": "Rome"}},
                    {"type": "tool_use", "id": "toolu_2", "name": "weather", "input": {}},
                ],
            },
            {
                "role": "user",
                "content": [
                    {"type": "tool_result", "tool_use_id": "toolu_1", "content": "25 C", **cached},
                    {
                        "type": "tool_result",
                        "tool_use_id": "toolu_2",
                        "is_error": True,
                        "content": [{"type": "text", "text": "No city."}],
                    },
                    {"type": "text", "text": "Well?"},
                ],
            },
        ],
    )
    assert prompt_text(engine.requests[0]) == (
        "<|im_start|>system\nRules.<|im_end|>\n<|im_start|>user\nOne.\nTwo.<|im_end|>\n"
        "<|im_start|>assistant\n<think>Hm.</think>Let me see."
        + call("weather", '{"city": "Rome"}')
        + call("weather", "{}")
        + "<|im_end|>\n<|im_start|>tool\n25 C<|im_end|>\n"
        "<|im_start|>tool\nError:\nNo city.<|im_end|>\n<|im_start|>user\nWell?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_an_answer_can_be_begun(client: anthropic.Anthropic, engine: FakeEngine) -> None:
    create(client, messages=[*USER, {"role": "assistant", "content": "Once upon"}])
    assert prompt_text(engine.requests[0]).endswith("<|im_start|>assistant\nOnce upon")


def test_a_tool_loop(client: anthropic.Anthropic, engine: FakeEngine) -> None:
    says(engine, think("Hmm.") + "Let me see." + call("weather", '{"city": "Rome"}'), "Sunny.")
    messages: list[Any] = list(USER)
    first = create(client, messages=messages, tools=[TOOL], tool_choice={"type": "auto"}, max_tokens=200)
    assert first.stop_reason == "tool_use"
    assert [block.type for block in first.content] == ["thinking", "text", "tool_use"]
    thinking, _, wanted = first.content
    assert thinking.thinking == "Hmm."  # type: ignore[union-attr]
    assert first.usage.output_tokens_details is not None
    assert first.usage.output_tokens_details.thinking_tokens == 4
    assert wanted.type == "tool_use"
    assert (wanted.name, wanted.input) == ("weather", {"city": "Rome"})
    messages.append({"role": "assistant", "content": [block.to_dict() for block in first.content]})
    result = {"type": "tool_result", "tool_use_id": wanted.id, "content": "25 C"}
    messages.append({"role": "user", "content": [result]})
    second = create(client, messages=messages, tools=[TOOL])
    assert second.stop_reason == "end_turn"
    assert "<|im_start|>tool\n25 C<|im_end|>" in prompt_text(engine.requests[1])


def test_a_call_cut_by_the_limit(client: anthropic.Anthropic, engine: FakeEngine) -> None:
    says(engine, call("weather", '{"city": "Rome"}'))
    limit = len('<tool_call>{"name": "weather", "arguments": {"c')
    message = create(client, max_tokens=limit, tools=[TOOL])
    assert message.stop_reason == "max_tokens"
    assert message.content[0].input == {"incomplete_json": '{"c'}  # type: ignore[union-attr]


def test_thinking_can_be_kept_from_the_answer(client: anthropic.Anthropic, engine: FakeEngine) -> None:
    engine.script = lambda request: Script([think("Hmm.") + "Yes."])
    message = create(client, thinking={"type": "adaptive", "display": "omitted"})
    assert [block.type for block in message.content] == ["thinking", "text"]
    assert message.content[0].thinking == ""  # type: ignore[union-attr]
    told = events_of(client, thinking={"type": "adaptive", "display": "omitted"})
    assert "Hmm" not in json.dumps(told)


def test_the_templates_switch_for_thinking(client: anthropic.Anthropic, engine: FakeEngine) -> None:
    asked: list[Any] = [
        anthropic.omit,
        {"type": "enabled", "budget_tokens": 1024},
        {"type": "adaptive"},
        {"type": "disabled"},
    ]
    for thinking in asked:
        create(client, thinking=thinking, max_tokens=2000)
    is_off = [prompt_text(request).endswith("<think></think>") for request in engine.requests]
    assert is_off == [False, False, False, True]


def test_parse_asks_for_a_schema_and_reads_the_answer(
    client: anthropic.Anthropic, engine: FakeEngine
) -> None:
    says(engine, *['{"name": "Rome", "rivers": ["Tiber"]}'] * 2)
    options: dict[str, Any] = {"model": MODEL, "max_tokens": 100, "messages": USER}
    assert client.messages.parse(**options, output_format=City).parsed_output == City(
        name="Rome", rivers=["Tiber"]
    )
    older = {"output_format": {"type": "json_schema", "schema": City.model_json_schema()}}
    client.messages.create(**options, extra_body=older)
    for request in engine.requests:
        assert request.params.grammar is not None
        assert "rivers" in request.params.grammar


def test_tokens_are_counted(client: anthropic.Anthropic, engine: FakeEngine) -> None:
    counted = client.messages.count_tokens(model=MODEL, messages=USER, system="Be brief.")  # type: ignore[arg-type]
    message = create(client, system="Be brief.")
    assert counted.input_tokens == message.usage.input_tokens
    # Whether a prompt fits is what one counts for, so one that doesn't is counted too.
    long = [{"role": "user", "content": "x" * 600}]
    assert client.messages.count_tokens(model=MODEL, messages=long).input_tokens > 600  # type: ignore[arg-type]
    assert len(engine.requests) == 1


# --- streams -----------------------------------------------------------------------------------------------


def events_of(client: anthropic.Anthropic, **fields: Any) -> list[dict[str, Any]]:
    """The stream's events as they came, each valid in the strict sense."""
    values: dict[str, Any] = {"model": MODEL, "max_tokens": 100, "messages": USER, **fields}
    names: list[str] = []
    events: list[dict[str, Any]] = []
    with client.messages.with_streaming_response.create(stream=True, **values) as stream:
        for line in stream.iter_lines():
            if line.startswith("event: "):
                names.append(line.removeprefix("event: "))
            elif line.startswith("data: "):
                event = json.loads(line.removeprefix("data: "))
                if event["type"] not in ("ping", "error"):
                    EVENT_TYPES[event["type"]].model_validate_json(json.dumps(event), strict=True)
                events.append(event)
    assert names == [event["type"] for event in events]
    return events


def test_the_events_of_a_message(client: anthropic.Anthropic, engine: FakeEngine) -> None:
    engine.script = lambda request: Script(num_cached_tokens=16)
    events = events_of(client, stop_sequences=["wor"])
    kinds = [event["type"] for event in events]
    deltas = kinds.count("content_block_delta")
    assert deltas >= 1
    assert kinds == [
        "message_start",
        "ping",
        "content_block_start",
        *["content_block_delta"] * deltas,
        "content_block_stop",
        "message_delta",
        "message_stop",
    ]
    assert events[0]["message"]["content"] == []
    assert events[-2]["delta"] == {"stop_reason": "stop_sequence", "stop_sequence": "wor"}
    usage = events[-2]["usage"]
    assert usage["cache_read_input_tokens"] == 16
    assert usage["input_tokens"] + 16 == len(engine.requests[0].prompt)


def test_the_stream_helper_puts_all_kinds_of_blocks_together(
    client: anthropic.Anthropic, engine: FakeEngine
) -> None:
    text = think("Let me") + "I look." + call("weather", '{"a": 1}') + call("weather", "{}") + "Done."
    engine.script = lambda request: Script(list(text))
    options: dict[str, Any] = {"model": MODEL, "max_tokens": 200, "messages": USER, "tools": [TOOL]}
    with client.messages.stream(**options) as stream:
        seen = {event.type for event in stream}
        final = stream.get_final_message()
    assert {"text", "thinking", "input_json", "message_stop"} <= seen
    whole = create(client, **options)
    kinds = ["thinking", "text", "tool_use", "tool_use", "text"]
    assert [block.type for block in final.content] == kinds
    put_together = [block.to_dict() for block in [*final.content, *whole.content]]
    for block in put_together:
        block.pop("parsed_output", None)  # the helper's own
        block.pop("id", None)
    assert put_together[: len(kinds)] == put_together[len(kinds) :]
    assert (final.stop_reason, final.usage.output_tokens) == (whole.stop_reason, whole.usage.output_tokens)


def test_an_error_after_the_first_token(client: anthropic.Anthropic, engine: FakeEngine) -> None:
    engine.script = lambda request: Script(["Hel"], fault=EngineUnavailableError("The engine died."))
    with (
        pytest.raises(anthropic.APIStatusError, match="The engine died"),
        client.messages.stream(model=MODEL, max_tokens=5, messages=USER) as stream,  # type: ignore[arg-type]
    ):
        stream.until_done()
    events = events_of(client)
    assert events[-1]["type"] == "error"
    assert events[-1]["error"] == {"type": "overloaded_error", "message": "The engine died."}
    assert events[-1]["request_id"] == events[0]["message"]["id"]
    engine.script = lambda request: Script(["Hel"], fault=ValueError("secret"))
    assert events_of(client)[-1]["error"]["type"] == "api_error"


def test_a_stream_is_given_up_when_its_client_leaves(client: anthropic.Anthropic, engine: FakeEngine) -> None:
    engine.script = lambda request: Script(["a", "b"], hold_at=1)
    with client.messages.stream(model=MODEL, max_tokens=5, messages=USER) as stream:  # type: ignore[arg-type]
        for event in stream:
            if event.type == "content_block_delta":
                break
    wait_until(lambda: engine.ends() == ["abort"])


# --- errors ------------------------------------------------------------------------------------------------

IMAGE = {"type": "image", "source": {"type": "url", "url": "http://x/"}}
IMPOSSIBLE = {"type": "json_schema", "schema": {"not": {}}}
CALL = {"type": "tool_use", "id": "t", "name": "weather", "input": {}}


@pytest.mark.parametrize(
    ("fields", "path"),
    [
        ({"messages": [{"role": "user", "content": [IMAGE]}]}, "messages[0].content[0]"),
        (
            {"messages": [{"role": "user", "content": [{"type": "document", "source": {}}]}]},
            "messages[0].content[0]",
        ),
        (
            {
                "messages": [
                    *USER,
                    {"role": "assistant", "content": [CALL]},
                    {
                        "role": "user",
                        "content": [{"type": "tool_result", "tool_use_id": "t", "content": [IMAGE]}],
                    },
                ]
            },
            "messages[2].content[0].content[0]",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t"}]}]},
            "messages[0].content[0]",
        ),
        ({"messages": [*USER, {"role": "assistant", "content": [CALL]}]}, "messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role"),
        ({"messages": []}, "messages"),
        ({"system": [IMAGE]}, "system[0]"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"extra_body": {"temperature": 1.5}}, "temperature"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools[0]"),
        ({"tools": [{"name": "a"}]}, "tools[0].input_schema"),
        ({"tools": [{**TOOL, "input_examples": [{}]}]}, "tools[0].input_examples"),
        ({"tools": [{**TOOL, "allowed_callers": ["code_execution_20250825"]}]}, "tools[0].allowed_callers"),
        ({"tool_choice": {"type": "any"}}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": {"type": "some"}}, "tool_choice.type"),
        ({"tools": [TOOL], "tool_choice": {"type": "tool"}}, "tool_choice.name"),
        ({"tools": [TOOL], "tool_choice": {"type": "tool", "name": "x"}}, "tool_choice.name"),
        ({"tools": [{**TOOL, "input_schema": {"type": "array"}}]}, "tools[0].input_schema.type"),
        ({"thinking": {"type": "enabled", "budget_tokens": 10}}, "thinking.budget_tokens"),
        ({"thinking": {"type": "enabled"}}, "thinking.budget_tokens"),
        ({"thinking": {"type": "deep"}}, "thinking.type"),
        ({"output_config": {"effort": "least"}}, "output_config.effort"),
        ({"output_config": {"format": {"type": "xml"}}}, "output_config.format.type"),
        ({"output_config": {"format": IMPOSSIBLE}}, "output_config.format.schema"),
        ({"extra_body": {"output_format": IMPOSSIBLE}}, "output_format.schema"),
        ({"extra_body": {"container": "c"}}, "container"),
        ({"extra_body": {"mcp_servers": [{"type": "url"}]}}, "mcp_servers"),
        ({"extra_body": {"speed": "fast"}}, "speed"),
        ({"extra_body": {"stop": "x"}}, "stop"),
        ({"extra_body": {"max_tokens": "many"}}, "max_tokens"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_its_path(
    client: anthropic.Anthropic, engine: FakeEngine, fields: dict[str, Any], path: str
) -> None:
    error = refusal(client, **fields)
    kind, message = detail(error)
    assert (error.status_code, kind) == (400, "invalid_request_error")
    assert path in message
    assert not engine.requests


def test_what_claude_code_sends_is_taken(client: anthropic.Anthropic) -> None:
    keep = {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]}
    message = create(
        client,
        metadata={"user_id": "u"},
        service_tier="auto",
        thinking={"type": "adaptive"},
        output_config={"effort": "medium"},
        extra_query={"beta": "true"},
        extra_body={"context_management": keep, "unheard_of": 1, "stop_sequences": None},
    )
    assert message.stop_reason == "end_turn"


def test_errors_have_anthropics_types(client: anthropic.Anthropic, engine: FakeEngine) -> None:
    unknown = refusal(client, model="claude")
    assert isinstance(unknown, anthropic.NotFoundError)
    assert detail(unknown)[0] == "not_found_error"
    long = refusal(client, messages=[{"role": "user", "content": "x" * 600}])
    assert detail(long)[1].startswith("prompt is too long: 6")
    endless = refusal(client, messages=[{"role": "user", "content": "x" * 60_000}])
    assert detail(endless)[1].startswith("prompt is too long: ")
    engine.capacity = 0
    full = refusal(client)
    assert (full.status_code, detail(full)[0]) == (429, "rate_limit_error")
    assert full.response.headers["retry-after"] == "3"
    engine.state = "restarting"
    down = refusal(client)
    assert (down.status_code, detail(down)[0]) == (503, "overloaded_error")
    engine.reset(lambda request: Script([], finish="error", error="boom"))
    broken = refusal(client)
    assert (broken.status_code, *detail(broken)) == (500, "api_error", "boom")
    engine.reset(lambda request: Script([], fault=ValueError("secret")))
    bug = refusal(client)
    assert (bug.status_code, detail(bug)[0]) == (500, "api_error")
    assert "secret" not in detail(bug)[1]


def test_a_body_too_large() -> None:
    with serving(FakeEngine(), max_body_bytes=2000) as running:
        opened = anthropic.Anthropic(base_url=running.url, api_key="none", max_retries=0)
        error = refusal(opened, messages=[{"role": "user", "content": "x" * 3000}])
    assert (error.status_code, detail(error)[0]) == (413, "request_too_large")


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v1/messages", 405),
        ("GET", "/v1/messages/count_tokens", 405),
        ("POST", "/v1/messages/x", 404),
    ],
)
def test_wrong_methods_and_paths_are_told_in_anthropics_shape(
    server: Server, method: str, path: str, status: int
) -> None:
    answer = httpx2.request(method, server.url + path)
    assert answer.status_code == status
    assert answer.json()["type"] == "error"
    assert answer.json()["error"]["type"] == ("not_found_error" if status == 404 else "invalid_request_error")
    assert ("allow" in answer.headers) == (status == 405)
