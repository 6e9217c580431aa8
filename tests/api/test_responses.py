"""POST /v1/responses as the official `openai` client sees it: whole answers, conversations, the store."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import openai
import pydantic
import pytest
from fake_engine import (
    IM_END,
    IM_START,
    MAX_MODEL_LEN,
    MODEL,
    FakeEngine,
    Script,
    Server,
    serving,
    wait_until,
)
from openai.types.responses import Response, ResponseItemList
from tool_model import call, think, tool_server

from gqa_serve.engine.request import EngineRequest

TOOL = {
    "type": "function",
    "name": "weather",
    "description": "The weather somewhere.",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    "strict": False,
}


@pytest.fixture(scope="module")
def shared_server() -> Iterator[Server]:
    with tool_server() as running:
        yield running


def prompt_text(request: EngineRequest) -> str:
    """The prompt, control tokens spelled out."""
    special = {IM_START: b"<|im_start|>", IM_END: b"<|im_end|>"}
    return b"".join(special.get(token) or bytes([token]) for token in request.prompt).decode()


def says(engine: FakeEngine, *texts: str) -> None:
    """One text per request, in order."""
    left = iter(texts)
    engine.script = lambda request: Script([next(left)])


def valid(response: Response) -> Response:
    """The response, if its JSON is valid in the strict sense."""
    return Response.model_validate_json(response.to_json(), strict=True)


def test_a_string_in_a_message_out(client: openai.OpenAI, engine: FakeEngine) -> None:
    answer = valid(client.responses.create(model=MODEL, input="Hi", instructions="Be brief."))
    assert (answer.object, answer.status, answer.model) == ("response", "completed", MODEL)
    assert answer.id.startswith("resp_")
    assert answer.output_text == "Hello world"
    (item,) = answer.output
    assert item.type == "message"
    assert item.id.startswith("msg_")
    assert (item.role, item.status) == ("assistant", "completed")
    assert answer.usage is not None
    assert answer.usage.input_tokens == len(engine.requests[0].prompt)
    assert answer.usage.output_tokens == len("Hello world") + 1
    assert answer.usage.total_tokens == answer.usage.input_tokens + answer.usage.output_tokens
    assert answer.instructions == "Be brief."
    assert answer.incomplete_details is None
    assert answer.error is None
    assert answer.completed_at is not None
    assert prompt_text(engine.requests[0]) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )


def test_cached_tokens_are_told(client: openai.OpenAI, engine: FakeEngine) -> None:
    engine.script = lambda request: Script(num_cached_tokens=16)
    answer = client.responses.create(model=MODEL, input="Hi")
    assert answer.usage is not None
    assert answer.usage.input_tokens_details.cached_tokens == 16


def test_options_reach_the_engine_and_are_repeated(client: openai.OpenAI, engine: FakeEngine) -> None:
    answer = valid(
        client.responses.create(
            model=MODEL,
            input="Hi",
            temperature=0.5,
            top_p=0.9,
            max_output_tokens=7,
            metadata={"a": "b"},
            user="me",
            safety_identifier="s",
            prompt_cache_key="k",
            service_tier="auto",
            truncation="disabled",
            max_tool_calls=3,
            extra_body={"seed": 5, "stop": ["x"], "top_k": 3, "priority": 2, "cache_salt": "salt"},
        )
    )
    (request,) = engine.requests
    params = request.params
    assert (params.temperature, params.top_p, params.max_tokens) == (0.5, 0.9, 7)
    assert (params.seed, params.top_k, request.priority, request.cache_salt) == (5, 3, 2, "salt")
    assert (answer.temperature, answer.top_p, answer.max_output_tokens) == (0.5, 0.9, 7)
    assert answer.metadata == {"a": "b"}
    assert (answer.user, answer.safety_identifier, answer.prompt_cache_key) == ("me", "s", "k")
    assert (answer.service_tier, answer.max_tool_calls) == ("default", 3)


def test_an_answer_cut_by_its_limit_is_incomplete(client: openai.OpenAI) -> None:
    answer = valid(client.responses.create(model=MODEL, input="Hi", max_output_tokens=3))
    assert answer.status == "incomplete"
    assert answer.incomplete_details is not None
    assert answer.incomplete_details.reason == "max_output_tokens"
    assert answer.output[0].status == "incomplete"  # type: ignore[union-attr]
    assert answer.output_text == "Hel"
    assert answer.completed_at is None


def test_an_answer_without_text_is_an_empty_message(client: openai.OpenAI, engine: FakeEngine) -> None:
    says(engine, "")
    answer = valid(client.responses.create(model=MODEL, input="Hi"))
    assert [item.type for item in answer.output] == ["message"]
    assert answer.output_text == ""


def test_logprobs_are_included_when_asked_for(client: openai.OpenAI) -> None:
    answer = valid(
        client.responses.create(
            model=MODEL, input="Hi", include=["message.output_text.logprobs"], top_logprobs=2
        )
    )
    part = answer.output[0].content[0]  # type: ignore[union-attr,index]
    assert part.type == "output_text"
    assert part.logprobs is not None
    tokens = [entry.token for entry in part.logprobs]
    assert "".join(tokens) == "Hello world"
    assert all(len(entry.top_logprobs) == 2 for entry in part.logprobs)


# --- items -------------------------------------------------------------------------------------------------


def test_items_of_every_kind_become_a_conversation(client: openai.OpenAI, engine: FakeEngine) -> None:
    client.responses.create(
        model=MODEL,
        input=[
            {"role": "developer", "content": "Be brief."},
            {"role": "user", "content": [{"type": "input_text", "text": "Hi"}]},
            {
                "type": "message",
                "role": "assistant",
                "id": "msg_1",
                "status": "completed",
                "content": [{"type": "output_text", "text": "Ho", "annotations": []}],
            },
            {
                "type": "reasoning",
                "id": "rs_1",
                "summary": [],
                "encrypted_content": "opaque",
                "content": None,
            },
            {"role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]},  # type: ignore[list-item]
            {"type": "message", "role": "user", "content": "Why?"},
        ],
    )
    assert prompt_text(engine.requests[0]) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\nHo<|im_end|>\n<|im_start|>assistant\nNo.<|im_end|>\n"
        "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n"
    )


@pytest.mark.parametrize(
    ("input", "param"),
    [
        (
            [{"role": "user", "content": [{"type": "input_image", "image_url": "http://x/"}]}],
            "input[0].content[0]",
        ),
        ([{"role": "user", "content": [{"type": "input_file", "file_id": "f"}]}], "input[0].content[0]"),
        ([{"role": "user", "content": "a"}, {"type": "web_search_call", "id": "w"}], "input[1].type"),
        ([{"role": "tool", "content": "a"}], "input[0].role"),
        ([{"role": "user"}], "input[0].content"),
        ([{"type": "function_call_output", "call_id": "c", "output": "x"}], "input[0].call_id"),
        ([{"type": "function_call", "call_id": "c", "arguments": "{}"}], "input[0].name"),
        ([{"type": "function_call_output", "call_id": "c"}], "input[0].output"),
        ([{"type": "item_reference", "id": "msg_nowhere"}], "input[0].id"),
        ([{"role": "user", "content": 5}], "input[0].content"),
        ([], "input"),
        (None, "input"),
        ("x" * 600, "input"),
    ],
)
def test_input_that_cannot_be_read_is_refused_by_its_path(
    client: openai.OpenAI, engine: FakeEngine, input: object, param: str
) -> None:
    with pytest.raises(openai.APIStatusError) as caught:
        client.responses.create(model=MODEL, input=input)  # type: ignore[call-overload]
    assert caught.value.status_code == (404 if "nowhere" in str(input) else 400)
    assert caught.value.param == param
    assert not engine.requests


def test_a_tool_loop(client: openai.OpenAI, engine: FakeEngine) -> None:
    says(engine, think("Hmm.") + "Let me see." + call("weather", '{"city": "Rome"}'), "Sunny.")
    conversation: list[object] = [{"role": "user", "content": "Weather in Rome?"}]
    first = valid(
        client.responses.create(model=MODEL, input=conversation, tools=[TOOL], store=False)  # type: ignore[call-overload]
    )
    assert [item.type for item in first.output] == ["reasoning", "message", "function_call"]
    reasoning, _, wanted = first.output
    assert reasoning.id.startswith("rs_")  # type: ignore[union-attr]
    assert reasoning.content[0].text == "Hmm."  # type: ignore[union-attr,index]
    assert first.usage is not None
    assert first.usage.output_tokens_details.reasoning_tokens == 4
    assert wanted.type == "function_call"
    assert wanted.id is not None
    assert wanted.id.startswith("fc_")
    assert (wanted.name, wanted.arguments) == ("weather", '{"city": "Rome"}')
    assert first.status == "completed"
    conversation += first.output
    conversation.append({"type": "function_call_output", "call_id": wanted.call_id, "output": "25 C"})
    second = client.responses.create(model=MODEL, input=conversation, tools=[TOOL], store=False)  # type: ignore[call-overload]
    assert second.output_text == "Sunny."
    told = "<|im_start|>assistant\n<think>Hmm.</think>Let me see." + call("weather", '{"city": "Rome"}')
    assert f"{told}<|im_end|>\n<|im_start|>tool\n25 C<|im_end|>" in prompt_text(engine.requests[1])


def test_a_call_cut_by_the_limit_is_incomplete(client: openai.OpenAI, engine: FakeEngine) -> None:
    says(engine, call("weather", '{"city": "Rome"}'))
    limit = len('<tool_call>{"name": "weather", "arguments": {"c')
    answer = client.responses.create(model=MODEL, input="Hi", tools=[TOOL], max_output_tokens=limit)  # type: ignore[list-item]
    (item,) = answer.output
    assert item.type == "function_call"
    assert (item.status, item.arguments) == ("incomplete", '{"c')


# --- conversations -----------------------------------------------------------------------------------------


def test_a_conversation_continues_by_id(client: openai.OpenAI, engine: FakeEngine) -> None:
    says(engine, "One.", "Two.", "Three.")
    first = client.responses.create(model=MODEL, input="A", instructions="Be brief.")
    second = client.responses.create(model=MODEL, input="B", previous_response_id=first.id)
    client.responses.delete(first.id)
    client.responses.create(model=MODEL, input="C", previous_response_id=second.id)
    assert second.previous_response_id == first.id
    # Instructions are those of each request alone.
    assert prompt_text(engine.requests[2]) == (
        "<|im_start|>user\nA<|im_end|>\n<|im_start|>assistant\nOne.<|im_end|>\n"
        "<|im_start|>user\nB<|im_end|>\n<|im_start|>assistant\nTwo.<|im_end|>\n"
        "<|im_start|>user\nC<|im_end|>\n<|im_start|>assistant\n"
    )
    with pytest.raises(openai.NotFoundError) as caught:
        client.responses.create(model=MODEL, input="D", previous_response_id=first.id)
    assert caught.value.param == "previous_response_id"
    assert "memory only" in str(caught.value.message)


def test_function_outputs_answer_calls_of_the_previous_response(
    client: openai.OpenAI, engine: FakeEngine
) -> None:
    says(engine, call("weather", "{}"), "Sunny.")
    first = client.responses.create(model=MODEL, input="A", tools=[TOOL])  # type: ignore[list-item]
    result = {
        "type": "function_call_output",
        "call_id": first.output[0].call_id,  # type: ignore[union-attr]
        "output": [{"type": "input_text", "text": "25"}],
    }
    second = client.responses.create(model=MODEL, input=[result], previous_response_id=first.id)  # type: ignore[list-item]
    assert second.output_text == "Sunny."
    assert "<|im_start|>tool\n25<|im_end|>" in prompt_text(engine.requests[1])


def test_a_response_can_be_read_and_deleted(client: openai.OpenAI) -> None:
    created = client.responses.create(model=MODEL, input="Hi")
    read = client.responses.retrieve(created.id)
    assert read.to_dict() == created.to_dict()
    client.responses.delete(created.id)
    for attempt in (client.responses.retrieve, client.responses.delete):
        with pytest.raises(openai.NotFoundError):
            attempt(created.id)


def test_input_items_come_in_pages(client: openai.OpenAI) -> None:
    first = client.responses.create(model=MODEL, input="A")
    items = [{"role": "user", "content": letter} for letter in "BCD"]
    second = client.responses.create(model=MODEL, input=items, previous_response_id=first.id)  # type: ignore[arg-type]
    raw = client.responses.input_items.with_raw_response.list(second.id, order="asc", limit=2)
    page = ResponseItemList.model_validate_json(raw.text, strict=True)
    assert page.has_more
    assert page.first_id == page.data[0].id
    assert page.last_id == page.data[-1].id
    everything = list(client.responses.input_items.list(second.id, order="asc", limit=2))  # follows the pages
    texts = [item.content[0].text for item in everything]  # type: ignore[union-attr,index]
    assert texts == ["A", "Hello world", "B", "C", "D"]
    newest = client.responses.input_items.list(second.id)
    assert newest.data[0].content[0].text == "D"  # type: ignore[union-attr,index]


def test_items_can_be_referred_to(client: openai.OpenAI, engine: FakeEngine) -> None:
    first = client.responses.create(model=MODEL, input="A")
    reference = {"type": "item_reference", "id": first.output[0].id}
    client.responses.create(model=MODEL, input=[reference, {"role": "user", "content": "B"}])  # type: ignore[list-item]
    assert prompt_text(engine.requests[1]).startswith("<|im_start|>assistant\nHello world<|im_end|>\n")


def test_what_is_not_to_be_stored_is_not(client: openai.OpenAI) -> None:
    answer = client.responses.create(model=MODEL, input="Hi", store=False)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(answer.id)


@pytest.fixture
def storeless() -> Iterator[openai.OpenAI]:
    with serving(FakeEngine(), max_stored_responses=0) as running:
        yield openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0)


def test_a_server_that_stores_nothing_says_so(storeless: openai.OpenAI) -> None:
    answer = storeless.responses.create(model=MODEL, input="Hi")
    assert answer.output_text == "Hello world"
    for options in ({"previous_response_id": answer.id}, {"store": True}):
        with pytest.raises(openai.BadRequestError, match="--max-stored-responses 0") as caught:
            storeless.responses.create(model=MODEL, input="Hi", **options)  # type: ignore[call-overload]
        assert caught.value.param in options


def test_truncation_drops_the_oldest_turns(client: openai.OpenAI, engine: FakeEngine) -> None:
    turns: list[object] = [{"role": "system", "content": "Rules."}]
    for number in range(20):
        turns += [
            {"role": "user", "content": f"Question {number} " + "x" * 30},
            {"role": "assistant", "content": "A"},
        ]
    turns.append({"role": "user", "content": "The last."})
    with pytest.raises(openai.BadRequestError) as caught:
        client.responses.create(model=MODEL, input=turns)  # type: ignore[arg-type]
    assert caught.value.code == "context_length_exceeded"
    answer = client.responses.create(model=MODEL, input=turns, truncation="auto", max_output_tokens=100)  # type: ignore[arg-type]
    assert answer.truncation == "auto"
    (request,) = engine.requests
    text = prompt_text(request)
    assert text.startswith("<|im_start|>system\nRules.<|im_end|>\n<|im_start|>user\nQuestion ")
    assert text.endswith("The last.<|im_end|>\n<|im_start|>assistant\n")
    # As much as fits: one turn more would not leave the room asked for.
    assert len(request.prompt) <= MAX_MODEL_LEN - 100 < len(request.prompt) + 75
    # One turn that does not fit alone cannot be helped.
    with pytest.raises(openai.BadRequestError):
        client.responses.create(model=MODEL, input="x" * 600, truncation="auto")


def test_a_long_conversation_with_references(client: openai.OpenAI, engine: FakeEngine) -> None:
    first = client.responses.create(model=MODEL, input="A")
    turns: list[Any] = []
    for number in range(300):
        turns += [{"role": "user", "content": f"{number} " + "x" * 80}, {"role": "assistant", "content": "B"}]
    turns += [{"role": "user", "content": "C"}, {"type": "item_reference", "id": first.output[0].id}]
    turns.append({"role": "user", "content": "D"})
    client.responses.create(model=MODEL, input=turns, truncation="auto")
    assert prompt_text(engine.requests[1]).endswith(
        "<|im_start|>user\nC<|im_end|>\n<|im_start|>assistant\nHello world<|im_end|>\n"
        "<|im_start|>user\nD<|im_end|>\n<|im_start|>assistant\n"
    )


# --- structured output -------------------------------------------------------------------------------------


class City(pydantic.BaseModel):
    name: str
    rivers: list[str]


def test_parse_asks_for_a_schema_and_reads_the_answer(client: openai.OpenAI, engine: FakeEngine) -> None:
    says(engine, '{"name": "Rome", "rivers": ["Tiber"]}')
    answer = client.responses.parse(model=MODEL, input="Hi", text_format=City)
    assert answer.output_parsed == City(name="Rome", rivers=["Tiber"])
    grammar = engine.requests[0].params.grammar
    assert grammar is not None
    assert "rivers" in grammar
    assert answer.text is not None
    assert answer.text.format is not None
    assert (answer.text.format.type, answer.text.format.name) == ("json_schema", "City")  # type: ignore[union-attr]


def test_json_objects_are_asked_for_by_their_type(client: openai.OpenAI, engine: FakeEngine) -> None:
    valid(client.responses.create(model=MODEL, input="Hi", text={"format": {"type": "json_object"}}))
    assert engine.requests[0].params.grammar is not None


def test_a_schema_that_cannot_be_enforced_is_refused(client: openai.OpenAI, engine: FakeEngine) -> None:
    schema = {"type": "object", "properties": {"a": {"not": {"type": "string"}}}}
    text = {"format": {"type": "json_schema", "name": "n", "schema": schema}}
    with pytest.raises(openai.BadRequestError) as caught:
        client.responses.create(model=MODEL, input="Hi", text=text)  # type: ignore[arg-type]
    assert caught.value.param == "text.format.schema"
    assert not engine.requests


# --- fields ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"background": True}, "background"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"prompt": {"id": "p"}}, "prompt"),
        ({"n": 2}, "n"),
        ({"max_tokens": 5}, "max_tokens"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"moderation": {"model": "m"}}, "moderation"),
        ({"include": ["everything"]}, "include[0]"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"top_logprobs": 30, "include": ["message.output_text.logprobs"]}, "top_logprobs"),
        ({"truncation": "some"}, "truncation"),
        ({"text": {"verbosity": "chatty"}}, "text.verbosity"),
        ({"text": {"format": {"type": "xml"}}}, "text.format.type"),
        ({"text": {"format": {"type": "json_schema", "name": "n"}}}, "text.format.schema"),
        ({"reasoning": {"summary": "rhyming"}}, "reasoning.summary"),
        ({"reasoning": {"effort": "high"}}, "reasoning.effort"),
        ({"reasoning": {"effort": "enormous"}}, "reasoning.effort"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"max_tool_calls": 0}, "max_tool_calls"),
        ({"metadata": {"k": "v" * 600}}, "metadata"),
        ({"tools": [{"type": "function"}]}, "tools[0].name"),
        ({"tools": [TOOL], "tool_choice": {"type": "web_search_preview"}}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": {"type": "function"}}, "tool_choice.name"),
        ({"tools": [TOOL], "tool_choice": {"type": "function", "name": "x"}}, "tool_choice.name"),
        (
            {
                "tools": [TOOL],
                "tool_choice": {
                    "type": "allowed_tools",
                    "mode": "auto",
                    "tools": [{"type": "function", "name": "weather"}, {"type": "function", "name": "x"}],
                },
            },
            "tool_choice.tools[1].name",
        ),
        ({"tools": [{"type": "web_search"}], "tool_choice": "required"}, "tool_choice"),
        (
            {"tools": [{"type": "web_search"}, {**TOOL, "parameters": {"type": "array"}}]},
            "tools[1].parameters.type",
        ),
        ({"temperature": 3}, "temperature"),
        ({"store": "yes"}, "store"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(
    client: openai.OpenAI, engine: FakeEngine, fields: dict[str, object], param: str
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.responses.create(model=MODEL, input="Hi", extra_body=fields)
    assert caught.value.param == param
    assert not engine.requests


def test_what_coding_agents_send_is_taken(client: openai.OpenAI) -> None:
    answer = valid(
        client.responses.create(
            model=MODEL,
            input="Hi",
            stream=False,
            background=False,
            tool_choice="auto",
            parallel_tool_calls=False,
            reasoning={"summary": "detailed"},
            include=["reasoning.encrypted_content"],
            text={"verbosity": "low", "format": {"type": "text"}},
            tools=[
                {"type": "web_search"},
                {"type": "custom", "name": "apply_patch"},
                {"type": "local_shell"},
            ],  # type: ignore[list-item]
            extra_body={"client_metadata": {"x": "y"}, "max_tokens": None},
        )
    )
    assert answer.tools == []  # passed over
    assert answer.parallel_tool_calls is False
    assert answer.text is not None
    assert answer.text.verbosity == "medium"  # what happened, not what was asked
    assert answer.reasoning is not None
    assert answer.reasoning.summary == "auto"


def test_an_unknown_model_and_a_full_queue(client: openai.OpenAI, engine: FakeEngine) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        client.responses.create(model="gpt-6", input="Hi")
    assert missing.value.code == "model_not_found"
    engine.capacity = 0
    with pytest.raises(openai.RateLimitError):
        client.responses.create(model=MODEL, input="Hi")


@pytest.mark.parametrize(
    "query", ["?stream=true", "?include=x", "/input_items?limit=0", "/input_items?order=up"]
)
def test_queries_are_checked(client: openai.OpenAI, query: str) -> None:
    created = client.responses.create(model=MODEL, input="Hi")
    with pytest.raises(openai.BadRequestError):
        client.get(f"/responses/{created.id}{query}", cast_to=object)


def test_an_engine_that_fails_is_a_500(client: openai.OpenAI, engine: FakeEngine) -> None:
    engine.script = lambda request: Script([], finish="error", error="boom")
    with pytest.raises(openai.InternalServerError) as caught:
        client.responses.create(model=MODEL, input="Hi")
    assert json.loads(caught.value.response.text)["error"]["code"] == "engine_error"


def test_a_whole_response_is_given_up_when_its_client_leaves(server: Server, engine: FakeEngine) -> None:
    engine.script = lambda request: Script(hold_at=0)
    body = json.dumps({"model": MODEL, "input": "Hi"}).encode()
    with server.connect() as connection:
        head = (
            f"POST /v1/responses HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n".encode()
        )
        connection.sendall(head + body)
        wait_until(lambda: bool(engine.streams))
    # The fixture waits for the engine to be idle, and fails if it never is.


def test_other_methods_are_told_which_there_are(client: openai.OpenAI) -> None:
    with pytest.raises(openai.APIStatusError) as caught:
        client.put("/responses/resp_x", cast_to=object)
    assert caught.value.status_code == 405
    assert set(caught.value.response.headers["allow"].split(", ")) == {"DELETE", "GET", "HEAD"}
