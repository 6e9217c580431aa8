"""Tools and thinking in chat completions, as the official `openai` client sees them, over real HTTP."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import openai
import pydantic
import pytest
import tool_templates
from fake_engine import (
    IM_END,
    MODEL,
    VOCAB_SIZE,
    FakeEngine,
    Script,
    Server,
    fake_info,
    fake_tokenizer,
    serving,
)
from openai.types.chat import ChatCompletionChunk

USER = [{"role": "user", "content": "Hi"}]
WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>'


@contextmanager
def chatting(template: str, **settings: object) -> Iterator[tuple[FakeEngine, openai.OpenAI, Server]]:
    engine = FakeEngine()
    engine.model_info = fake_info(max_model_len=8192)
    with (
        serving(engine, template=template, **settings) as server,
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client,
    ):
        yield engine, client, server


@pytest.fixture(scope="module")
def shared_qwen() -> Iterator[tuple[FakeEngine, openai.OpenAI, Server]]:
    with chatting(tool_templates.QWEN3) as made:
        yield made


@pytest.fixture
def qwen(shared_qwen: tuple[FakeEngine, openai.OpenAI, Server]) -> tuple[FakeEngine, openai.OpenAI]:
    engine, client, _ = shared_qwen
    engine.reset()
    engine.model_info = fake_info(max_model_len=8192)
    return engine, client


def says(engine: FakeEngine, text: str, size: int = 3) -> None:
    """The engine answers with `text`, in pieces."""
    pieces: list[str | bytes | list[int]] = [text[at : at + size] for at in range(0, len(text), size)]
    engine.script = lambda request: Script(pieces)


def prompt_of(engine: FakeEngine, number: int = 0) -> str:
    return fake_tokenizer().decode(engine.requests[number].prompt, skip_special_tokens=False)


def test_a_call(qwen: tuple[FakeEngine, openai.OpenAI]) -> None:
    engine, client = qwen
    says(engine, "Let me look.\n" + CALL)
    (choice,) = client.chat.completions.create(model=MODEL, messages=USER, tools=[WEATHER]).choices
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content == "Let me look."
    (call,) = choice.message.tool_calls or []
    assert (call.type, call.function.name, call.function.arguments) == (
        "function",
        "get_weather",
        '{"city": "Paris"}',
    )
    assert call.id.startswith("call_")
    assert '"description": "The weather of a city."' in prompt_of(engine)
    assert engine.requests[0].params.grammar is None


def test_only_calls_leave_content_null(qwen: tuple[FakeEngine, openai.OpenAI]) -> None:
    engine, client = qwen
    says(engine, CALL + "\n" + CALL)
    (choice,) = client.chat.completions.create(model=MODEL, messages=USER, tools=[WEATHER]).choices
    assert choice.message.content is None
    assert len({call.id for call in choice.message.tool_calls or []}) == 2
    chunks = list(client.chat.completions.create(model=MODEL, messages=USER, tools=[WEATHER], stream=True))
    assert all(chunk.choices[0].delta.content is None for chunk in chunks)


def test_deltas(qwen: tuple[FakeEngine, openai.OpenAI]) -> None:
    engine, client = qwen
    says(engine, "Hm. " + CALL + CALL)
    chunks = list(
        client.chat.completions.create(
            model=MODEL, messages=USER, tools=[WEATHER], stream=True, logprobs=True, top_logprobs=1
        )
    )
    deltas = [chunk.choices[0].delta for chunk in chunks]
    calls = [call for delta in deltas for call in delta.tool_calls or []]
    first = [call for call in calls if call.id is not None]
    assert [(call.index, call.type, call.function and call.function.name) for call in first] == [
        (0, "function", "get_weather"),
        (1, "function", "get_weather"),
    ]
    for index in (0, 1):
        pieces = [call.function.arguments for call in calls if call.index == index and call.function]
        assert "".join(pieces) == '{"city": "Paris"}'
        assert len(pieces) > 4
    assert "".join(delta.content or "" for delta in deltas) == "Hm."
    assert [chunk.choices[0].finish_reason for chunk in chunks][-1] == "tool_calls"
    tokens = [entry for chunk in chunks if chunk.choices[0].logprobs
              for entry in chunk.choices[0].logprobs.content or []]  # fmt: skip
    assert bytes(byte for entry in tokens for byte in entry.bytes or []).decode() == "Hm. " + CALL + CALL


def test_the_stream_helper_and_the_whole_answer_agree(qwen: tuple[FakeEngine, openai.OpenAI]) -> None:
    engine, client = qwen
    says(engine, "<think>\nHm\n</think>\n\nLook: " + CALL)
    with client.chat.completions.stream(model=MODEL, messages=USER, tools=[WEATHER]) as stream:
        events = list(stream)
        final = stream.get_final_completion()
    assert "tool_calls.function.arguments.done" in {event.type for event in events}
    (streamed,) = final.choices
    (whole,) = client.chat.completions.create(model=MODEL, messages=USER, tools=[WEATHER]).choices
    assert streamed.message.content == whole.message.content == "Look:"
    assert streamed.message.reasoning_content == whole.message.reasoning_content == "Hm"  # type: ignore[attr-defined]
    assert streamed.finish_reason == whole.finish_reason == "tool_calls"
    functions = [(message.tool_calls or [])[0].function for message in (streamed.message, whole.message)]
    assert functions[0].arguments == functions[1].arguments == '{"city": "Paris"}'


class GetWeather(pydantic.BaseModel):
    city: str


def test_parse_with_a_strict_pydantic_tool(qwen: tuple[FakeEngine, openai.OpenAI]) -> None:
    engine, client = qwen
    says(engine, CALL.replace("get_weather", "GetWeather"))
    tool = openai.pydantic_function_tool(GetWeather)
    (choice,) = client.chat.completions.parse(model=MODEL, messages=USER, tools=[tool]).choices
    (call,) = choice.message.tool_calls or []
    assert call.function.parsed_arguments == GetWeather(city="Paris")
    assert engine.requests[0].params.grammar is not None  # strict


def test_results_are_fed_back(qwen: tuple[FakeEngine, openai.OpenAI]) -> None:
    engine, client = qwen
    says(engine, CALL)
    first = client.chat.completions.create(model=MODEL, messages=USER, tools=[WEATHER]).choices[0].message
    (call,) = first.tool_calls or []
    messages: Any = [
        *USER,
        first.model_dump(),
        {"role": "tool", "tool_call_id": call.id, "content": [{"type": "text", "text": "Sunny."}]},
    ]
    says(engine, "It is sunny.")
    last = client.chat.completions.create(model=MODEL, messages=messages, tools=[WEATHER]).choices[0]
    assert (last.message.content, last.finish_reason) == ("It is sunny.", "stop")
    prompt = prompt_of(engine, 1)
    assert CALL in prompt
    assert "<tool_response>\nSunny.\n</tool_response>" in prompt


@pytest.mark.parametrize(
    ("choice", "reason"),
    [
        ("required", "tool_calls"),
        ({"type": "function", "function": {"name": "get_weather"}}, "stop"),
        (
            {
                "type": "allowed_tools",
                "allowed_tools": {
                    "mode": "required",
                    "tools": [{"type": "function", "function": {"name": "get_weather"}}],
                },
            },
            "tool_calls",
        ),
    ],
)
def test_calls_that_must_come(qwen: tuple[FakeEngine, openai.OpenAI], choice: Any, reason: str) -> None:
    engine, client = qwen
    says(engine, CALL)
    other: Any = {"type": "function", "function": {"name": "other"}}
    (answer,) = client.chat.completions.create(
        model=MODEL, messages=USER, tools=[other, WEATHER], tool_choice=choice, stop=["Paris"]
    ).choices
    assert answer.finish_reason == reason
    (call,) = answer.message.tool_calls or []
    assert json.loads(call.function.arguments) == {"city": "Paris"}
    grammar = engine.requests[0].params.grammar
    assert grammar is not None
    assert ("other" in grammar) == (choice == "required")


def test_an_answer_cut_short_says_so(qwen: tuple[FakeEngine, openai.OpenAI]) -> None:
    engine, client = qwen
    says(engine, CALL)
    for size in range(1, len(CALL), 7):
        (answer,) = client.chat.completions.create(
            model=MODEL, messages=USER, tools=[WEATHER], tool_choice="required", max_tokens=size
        ).choices
        assert answer.finish_reason == "length"
    engine.script = lambda request: Script([""])
    (answer,) = client.chat.completions.create(model=MODEL, messages=USER, tools=[WEATHER]).choices
    assert (answer.finish_reason, answer.message.tool_calls) == ("stop", None)


def test_a_stop_string_within_a_call(qwen: tuple[FakeEngine, openai.OpenAI]) -> None:
    engine, client = qwen
    says(engine, "<think>x</think>" + CALL)
    answer = client.chat.completions.create(model=MODEL, messages=USER, tools=[WEATHER], stop="ris").choices[
        0
    ]
    assert answer.finish_reason == "stop"
    assert (answer.message.tool_calls or [])[0].function.arguments == '{"city": "Pa'
    answer = client.chat.completions.create(
        model=MODEL, messages=USER, tools=[WEATHER], stop="</tool"
    ).choices[0]
    assert answer.finish_reason == "tool_calls"
    with chatting(tool_templates.MISTRAL_ARGS) as (other, mistral, _):
        says(other, '[TOOL_CALLS]get_weather[ARGS]{"city": "Paris"}')
        for stop, reason in (("ris", "stop"), ("?", "tool_calls")):
            answer = mistral.chat.completions.create(
                model=MODEL, messages=USER, tools=[WEATHER], stop=stop
            ).choices[0]
            assert answer.finish_reason == reason


def test_a_form_of_the_answer_holds_after_the_thinking(qwen: tuple[FakeEngine, openai.OpenAI]) -> None:
    engine, client = qwen
    says(engine, "<think>Hm</think>{}")
    for thinks in (True, False):
        extra: Any = {"chat_template_kwargs": {"enable_thinking": thinks}}
        answer = client.chat.completions.create(
            model=MODEL, messages=USER, response_format={"type": "json_object"}, extra_body=extra
        )
        assert answer.choices[0].message.content == "{}"
    grammars = [request.params.grammar or "" for request in engine.requests]
    assert ["</think>" in grammar for grammar in grammars] == [True, False]


def test_choices_have_parsers_of_their_own(qwen: tuple[FakeEngine, openai.OpenAI]) -> None:
    engine, client = qwen
    texts = iter([CALL, "No.", CALL + CALL] * 2)

    def script(request: object) -> Script:
        return Script(list(next(texts)))

    engine.script = script
    answer = client.chat.completions.create(model=MODEL, messages=USER, tools=[WEATHER], n=3)
    assert [choice.finish_reason for choice in answer.choices] == ["tool_calls", "stop", "tool_calls"]
    assert [len(choice.message.tool_calls or []) for choice in answer.choices] == [1, 0, 2]
    ids = [call.id for choice in answer.choices for call in choice.message.tool_calls or []]
    assert len(set(ids)) == 3
    chunks: list[ChatCompletionChunk] = list(
        client.chat.completions.create(model=MODEL, messages=USER, tools=[WEATHER], n=3, stream=True)
    )
    reasons = {c.choices[0].index: c.choices[0].finish_reason for c in chunks if c.choices[0].finish_reason}
    assert reasons == {0: "tool_calls", 1: "stop", 2: "tool_calls"}


def test_tool_choice_none_makes_no_calls(qwen: tuple[FakeEngine, openai.OpenAI]) -> None:
    engine, client = qwen
    says(engine, CALL)
    (answer,) = client.chat.completions.create(
        model=MODEL, messages=USER, tools=[WEATHER], tool_choice="none"
    ).choices
    assert (answer.finish_reason, answer.message.content) == ("stop", CALL)
    assert "get_weather" not in prompt_of(engine)


def test_thinking(qwen: tuple[FakeEngine, openai.OpenAI]) -> None:
    engine, client = qwen
    says(engine, "<think>\nTwo.\n</think>\n\nFour.")
    answer = client.chat.completions.create(model=MODEL, messages=USER)
    message: Any = answer.choices[0].message
    assert (message.reasoning_content, message.content) == ("Two.", "Four.")
    deltas: list[Any] = [
        chunk.choices[0].delta
        for chunk in client.chat.completions.create(model=MODEL, messages=USER, stream=True)
    ]
    assert "".join(getattr(delta, "reasoning_content", None) or "" for delta in deltas) == "Two."
    assert "".join(delta.content or "" for delta in deltas) == "Four."
    says(engine, "Four.")
    off: Any = {"chat_template_kwargs": {"enable_thinking": False}}
    switched = client.chat.completions.create(model=MODEL, messages=USER, extra_body=off).choices[0].message
    assert switched.content == "Four."
    assert "reasoning_content" not in switched.model_fields_set
    assert prompt_of(engine, 2).endswith("<think>\n\n</think>\n\n")


def test_reasoning_effort_none_is_the_switch(qwen: tuple[FakeEngine, openai.OpenAI]) -> None:
    engine, client = qwen
    says(engine, "Four.")
    client.chat.completions.create(model=MODEL, messages=USER, reasoning_effort="none")
    assert prompt_of(engine).endswith("<think>\n\n</think>\n\n")
    with pytest.raises(openai.BadRequestError, match="enable_thinking"):
        client.chat.completions.create(model=MODEL, messages=USER, reasoning_effort="low")


def test_thinking_that_is_continued(qwen: tuple[FakeEngine, openai.OpenAI]) -> None:
    engine, client = qwen
    says(engine, " see.</think>Yes.")
    messages: Any = [*USER, {"role": "assistant", "content": "<think>Let me"}]
    extra: Any = {"continue_final_message": True}
    message: Any = (
        client.chat.completions.create(model=MODEL, messages=messages, extra_body=extra).choices[0].message
    )
    assert (message.reasoning_content, message.content) == ("see.", "Yes.")


def test_a_message_that_calls_is_not_continued(qwen: tuple[FakeEngine, openai.OpenAI]) -> None:
    """Templates continue its text and drop the calls, which follow it."""
    engine, client = qwen
    call = {"id": "c", "type": "function", "function": {"name": "get_weather", "arguments": "{}"}}
    messages: Any = [*USER, {"role": "assistant", "content": "Let me", "tool_calls": [call]}]
    with pytest.raises(openai.BadRequestError, match="continues text"):
        client.chat.completions.create(
            model=MODEL, messages=messages, extra_body={"continue_final_message": True}
        )
    assert engine.requests == []


def test_thinking_before_a_call_that_must_come(qwen: tuple[FakeEngine, openai.OpenAI]) -> None:
    engine, client = qwen
    says(engine, "<think>Hm</think>" + CALL)
    for thinks in (True, False):
        extra: Any = {"chat_template_kwargs": {"enable_thinking": thinks}}
        client.chat.completions.create(
            model=MODEL, messages=USER, tools=[WEATHER], tool_choice="required", extra_body=extra
        )
    grammars = [request.params.grammar or "" for request in engine.requests]
    assert ["</think>" in grammar for grammar in grammars] == [True, False]


def test_the_prompt_may_open_the_thinking() -> None:
    with chatting(tool_templates.DEEPSEEK) as (engine, client, _):
        says(engine, "Hm.\n</think>\n\nYes.")
        message: Any = client.chat.completions.create(model=MODEL, messages=USER).choices[0].message
        assert (message.reasoning_content, message.content) == ("Hm.", "Yes.")
        # A message that is continued is past the thinking.
        says(engine, " yes.")
        messages: Any = [*USER, {"role": "assistant", "content": "Well,"}]
        extra: Any = {"continue_final_message": True}
        answer = client.chat.completions.create(model=MODEL, messages=messages, extra_body=extra)
        assert answer.choices[0].message.content == " yes."
    with chatting(tool_templates.DEEPSEEK, reasoning_parser="none") as (engine, client, _):
        says(engine, "Hm.\n</think>\n\nYes.")
        message = client.chat.completions.create(model=MODEL, messages=USER).choices[0].message
        assert message.content == "Hm.\n</think>\n\nYes."


def test_templates_that_know_no_tools_get_them_in_words() -> None:
    with chatting(tool_templates.GEMMA) as (engine, client, _):
        says(engine, CALL)
        first = client.chat.completions.create(model=MODEL, messages=USER, tools=[WEATHER]).choices[0]
        assert first.finish_reason == "tool_calls"
        assert "The weather of a city." in prompt_of(engine)
        (call,) = first.message.tool_calls or []
        messages: Any = [
            *USER,
            first.message.model_dump(),
            {"role": "tool", "tool_call_id": call.id, "content": "Sunny."},
        ]
        says(engine, "Sunny!")
        client.chat.completions.create(model=MODEL, messages=messages, tools=[WEATHER])
        client.chat.completions.create(model=MODEL, messages=messages)
        for number in (1, 2):
            prompt = prompt_of(engine, number)
            assert CALL in prompt
            assert "<tool_response>\nSunny.\n</tool_response>" in prompt
            assert ("The weather of a city." in prompt) == (number == 1)


@pytest.mark.parametrize("template", [tool_templates.MISTRAL, tool_templates.MISTRAL_ARGS])
def test_ids_as_the_template_wants_them(template: str) -> None:
    with chatting(template) as (engine, client, _):
        says(engine, '[TOOL_CALLS]get_weather[ARGS]{"city": "Paris"}')
        message = (
            client.chat.completions.create(model=MODEL, messages=USER, tools=[WEATHER]).choices[0].message
        )
        (call,) = message.tool_calls or []
        assert len(call.id) == 9
        foreign = {**call.model_dump(), "id": "call_of_somebody_else"}
        messages: Any = [
            *USER,
            {"role": "assistant", "content": None, "tool_calls": [foreign]},
            {"role": "tool", "tool_call_id": "call_of_somebody_else", "content": "Sunny."},
        ]
        client.chat.completions.create(model=MODEL, messages=messages, tools=[WEATHER])
        assert '[TOOL_RESULTS]{"content": "Sunny."' in prompt_of(engine, 1)


def test_llama3_calls() -> None:
    with chatting(tool_templates.LLAMA3) as (engine, client, _):
        says(engine, '{"name": "get_weather", "parameters": {"city": "Paris"}}')
        (choice,) = client.chat.completions.create(model=MODEL, messages=USER, tools=[WEATHER]).choices
        assert choice.finish_reason == "tool_calls"
        (choice,) = client.chat.completions.create(model=MODEL, messages=USER).choices
        assert choice.message.content == '{"name": "get_weather", "parameters": {"city": "Paris"}}'


def test_several_calls_go_back_to_a_template_that_takes_one_at_a_time() -> None:
    with chatting(tool_templates.LLAMA3) as (engine, client, _):
        says(engine, "; ".join(['{"name": "get_weather", "parameters": {"city": "Paris"}}'] * 2))
        message = (
            client.chat.completions.create(model=MODEL, messages=USER, tools=[WEATHER]).choices[0].message
        )
        first, second = message.tool_calls or []
        messages: Any = [
            *USER,
            message.to_dict(),
            {"role": "tool", "tool_call_id": first.id, "content": "Sunny."},
            {"role": "tool", "tool_call_id": second.id, "content": "Still sunny."},
        ]
        client.chat.completions.create(model=MODEL, messages=messages, tools=[WEATHER])
        prompt = prompt_of(engine, 1)
        assert prompt.count('{"name": "get_weather", "parameters": {"city": "Paris"}}') == 2
        assert prompt.index("Sunny.") < prompt.rindex('"parameters"') < prompt.index("Still sunny.")


def test_a_server_without_tools_says_so() -> None:
    with chatting(tool_templates.QWEN3, tool_call_parser="none") as (_, client, _):
        with pytest.raises(openai.BadRequestError, match="--tool-call-parser") as caught:
            client.chat.completions.create(model=MODEL, messages=USER, tools=[WEATHER])
        assert caught.value.param == "tools"
        client.chat.completions.create(model=MODEL, messages=USER, tools=[WEATHER], tool_choice="none")


def tool(name: str, parameters: Any = None) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


def test_tools_as_real_clients_write_them(qwen: tuple[FakeEngine, openai.OpenAI]) -> None:
    """Names of MCP servers and agents; Go's empty lists and objects, which are null."""
    engine, client = qwen
    nulls = {"type": "object", "properties": None, "required": None}
    tools: Any = [tool("server.tool"), tool("mcp:a/b", nulls), tool("x" * 128, {"type": None})]
    says(engine, '<tool_call>{"name": "mcp:a/b"}</tool_call>')
    for choice in ("auto", "required"):
        answer = client.chat.completions.create(
            model=MODEL,
            messages=USER,
            tools=tools,
            tool_choice=choice,  # type: ignore[call-overload]
        )
        (call,) = answer.choices[0].message.tool_calls
        assert (call.function.name, call.function.arguments) == ("mcp:a/b", "{}")
    assert "null" not in prompt_of(engine)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"tools": [{"type": "custom", "custom": {"name": "x"}}]}, "tools[0].type"),
        ({"tools": [{"type": "function"}]}, "tools[0].function"),
        ({"tools": [{"type": "function", "function": {}}]}, "tools[0].function.name"),
        ({"tools": [tool("a b")]}, "tools[0].function.name"),
        ({"tools": [tool("x" * 129)]}, "tools[0].function.name"),
        ({"tools": [tool("")]}, "tools[0].function.name"),
        ({"tools": [tool("a"), tool("a")]}, "tools[1].function.name"),
        ({"tools": [tool("a", [])]}, "tools[0].function.parameters"),
        ({"tools": [tool("a", {"type": "array"})]}, "tools[0].function.parameters.type"),
        ({"tools": [tool("a", {"properties": 1})]}, "tools[0].function.parameters.properties"),
        ({"tools": [tool(f"t{n}") for n in range(513)]}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": "any", "tools": [tool("a")]}, "tool_choice"),
        ({"tool_choice": {"type": "custom"}, "tools": [tool("a")]}, "tool_choice.type"),
        ({"tool_choice": {"type": "function"}, "tools": [tool("a")]}, "tool_choice.function"),
        (
            {"tool_choice": {"type": "function", "function": {"name": "b"}}, "tools": [tool("a")]},
            "tool_choice.function.name",
        ),
        (
            {"tool_choice": {"type": "allowed_tools"}, "tools": [tool("a")]},
            "tool_choice.allowed_tools",
        ),
        (
            {
                "tool_choice": {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": []}},
                "tools": [tool("a")],
            },
            "tool_choice.allowed_tools.tools",
        ),
        (
            {"tool_choice": "required", "tools": [tool("a"), tool("b", {"not": {"type": "string"}})]},
            "tools[1].function.parameters",
        ),
        ({"functions": [{"name": "f"}]}, "functions"),
        ({"function_call": {"name": "f"}}, "function_call"),
        ({"documents": [{"text": "x"}]}, "documents"),
        ({"echo": True}, "echo"),
        ({"verbosity": "low"}, "verbosity"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x"}}]}]},
         "messages[0].content[0]"),
        ({"messages": [{"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}]},
         "messages[0].content[0]"),
    ],
)  # fmt: skip
def test_refusals(qwen: tuple[FakeEngine, openai.OpenAI], fields: dict[str, Any], param: str) -> None:
    engine, client = qwen
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model=MODEL, messages=USER, extra_body=fields)  # type: ignore[call-overload]
    assert caught.value.param == param
    assert engine.requests == []


def test_documents_go_to_templates_that_read_them() -> None:
    source = "{% for d in documents or [] %}{{ d.text }};{% endfor %}" + tool_templates.HERMES
    with chatting(source) as (engine, client, _):
        extra: Any = {"documents": [{"text": "One"}, {"text": "Two"}]}
        client.chat.completions.create(model=MODEL, messages=USER, extra_body=extra)
        assert prompt_of(engine).startswith("One;Two;")


def test_echo_puts_the_last_message_first(qwen: tuple[FakeEngine, openai.OpenAI]) -> None:
    engine, client = qwen
    says(engine, " world")
    messages: Any = [*USER, {"role": "assistant", "content": "Hello"}]
    extra: Any = {"echo": True, "continue_final_message": True}
    answer = client.chat.completions.create(model=MODEL, messages=messages, extra_body=extra)
    assert answer.choices[0].message.content == "Hello world"
    stream = client.chat.completions.create(model=MODEL, messages=messages, extra_body=extra, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == "Hello world"


def test_token_ids_and_prompt_logprobs(qwen: tuple[FakeEngine, openai.OpenAI]) -> None:
    engine, client = qwen
    says(engine, CALL)
    extra: Any = {"return_token_ids": True, "prompt_logprobs": 1}
    answer: Any = client.chat.completions.create(
        model=MODEL, messages=USER, tools=[WEATHER], extra_body=extra
    )
    prompt = engine.requests[0].prompt
    assert answer.prompt_token_ids == prompt
    assert answer.choices[0].token_ids == [*CALL.encode(), IM_END]
    assert answer.prompt_logprobs[0] is None
    assert len(answer.prompt_logprobs) == len(prompt)
    assert answer.prompt_logprobs[1][str(prompt[1])]["logprob"] == -0.5
    extra = {"return_token_ids": True}
    chunks: list[Any] = list(
        client.chat.completions.create(
            model=MODEL, messages=USER, tools=[WEATHER], extra_body=extra, stream=True
        )
    )
    assert chunks[0].prompt_token_ids == prompt
    ids = [id for chunk in chunks for id in getattr(chunk.choices[0], "token_ids", None) or []]
    assert ids == [*CALL.encode(), IM_END]


def test_markers_that_are_control_tokens_are_seen_but_not_told() -> None:
    specials = ("[TOOL_CALLS]", "[ARGS]", "<other>")
    with chatting(tool_templates.MISTRAL_ARGS, specials=specials) as (engine, client, _):
        calls, args, other = VOCAB_SIZE, VOCAB_SIZE + 1, VOCAB_SIZE + 2
        pieces: list[str | bytes | list[int]] = [
            "So: ", [other], [calls], "get_weather", [args], '{"city": ', [other], '"Paris"}',
        ]  # fmt: skip
        engine.script = lambda request: Script(pieces)
        for stream in (False, True):
            if stream:
                with client.chat.completions.stream(
                    model=MODEL, messages=USER, tools=[WEATHER], logprobs=True
                ) as events:
                    choice: Any = events.get_final_completion().choices[0]
            else:
                choice = client.chat.completions.create(
                    model=MODEL, messages=USER, tools=[WEATHER], logprobs=True
                ).choices[0]
            assert choice.message.content == "So:"
            (call,) = choice.message.tool_calls
            assert call.function.arguments == '{"city": "Paris"}'
            assert len(choice.logprobs.content) == sum(map(len, pieces))
        # A request without tools is shown no marker.
        (plain,) = client.chat.completions.create(model=MODEL, messages=USER).choices
        assert plain.message.content == 'So: get_weather{"city": "Paris"}'


def test_the_tokens_of_thinking_are_counted() -> None:
    with chatting(tool_templates.QWEN3, specials=("<think>", "</think>")) as (engine, client, _):
        opening, closing = VOCAB_SIZE, VOCAB_SIZE + 1
        engine.script = lambda request: Script(["\n", [opening], "Hm", [closing], "\nYes"])
        answer: Any = client.chat.completions.create(model=MODEL, messages=USER)
        message = answer.choices[0].message
        assert (message.reasoning_content, message.content) == ("Hm", "Yes")
        assert answer.usage.completion_tokens_details.reasoning_tokens == 4
        engine.script = lambda request: Script(["Yes", [closing], "!"])
        answer = client.chat.completions.create(model=MODEL, messages=USER)
        assert answer.usage.completion_tokens_details.reasoning_tokens == 0
