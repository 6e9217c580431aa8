"""What is found out about chat templates: families of tool calls, thinking, what must be said in words."""

from __future__ import annotations

from typing import Any

import pytest
import tool_templates
from fake_engine import TEMPLATE, fake_tokenizer

from gqa_serve.api.chat_format import ChatFormat, find_format
from gqa_serve.api.tools.prompt import one_call_each, with_description, with_short_ids, without_tool_turns
from gqa_serve.api.tools.syntax import HERMES, LLAMA3, MISTRAL, MISTRAL_ARGS, ToolSyntax
from gqa_serve.engine.chat_prompt import encode_chat
from gqa_serve.engine.chat_template import ChatTemplate


def found(source: str, tools: str = "auto", reasoning: str = "auto") -> ChatFormat:
    return find_format(ChatTemplate(source), tool_call_parser=tools, reasoning_parser=reasoning)


@pytest.mark.parametrize(
    ("source", "syntax", "is_native", "keeps_calls", "short_ids", "system", "reasons"),
    [
        (tool_templates.HERMES, HERMES, True, True, False, True, False),
        (tool_templates.QWEN3, HERMES, True, True, False, True, True),
        (tool_templates.LLAMA3, LLAMA3, True, True, False, True, False),
        (tool_templates.MISTRAL, MISTRAL, True, True, True, False, False),
        (tool_templates.MISTRAL_ARGS, MISTRAL_ARGS, True, True, True, False, False),
        (tool_templates.DEEPSEEK, HERMES, False, False, False, True, True),
        (tool_templates.GEMMA, HERMES, False, False, False, False, False),
        (tool_templates.FOREIGN, HERMES, False, True, False, True, False),
        (TEMPLATE, HERMES, False, False, False, True, False),
    ],
)
def test_formats(
    source: str,
    syntax: ToolSyntax,
    is_native: bool,
    keeps_calls: bool,
    short_ids: bool,
    system: bool,
    reasons: bool,
) -> None:
    many = source != tool_templates.LLAMA3
    expected = ChatFormat(syntax, is_native, keeps_calls, short_ids, system, reasons, many)
    assert found(source) == expected


def test_settings_override() -> None:
    assert found(tool_templates.QWEN3, tools="none").syntax is None
    assert found(tool_templates.QWEN3, tools="llama3").syntax is LLAMA3
    assert found(tool_templates.MISTRAL_ARGS, tools="mistral").syntax is MISTRAL_ARGS
    assert found(tool_templates.FOREIGN, tools="hermes").is_native
    assert not found(TEMPLATE, tools="hermes").is_native
    assert not found(tool_templates.QWEN3, reasoning="none").reasons
    assert found(TEMPLATE, reasoning="think").reasons


CALL = {"id": "call_1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
CHAT: list[dict[str, Any]] = [
    {"role": "system", "content": "S"},
    {"role": "user", "content": "U"},
    {"role": "assistant", "content": "Wait.", "tool_calls": [CALL, CALL]},
    {"role": "tool", "content": "2", "tool_call_id": "call_1"},
    {"role": "tool", "content": [{"type": "text", "text": "3"}], "tool_call_id": "call_1"},
    {"role": "user", "content": "V"},
]


def test_calls_and_results_as_turns() -> None:
    turns = without_tool_turns(CHAT, HERMES)
    assert [turn["role"] for turn in turns] == ["system", "user", "assistant", "user"]
    call = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'
    assert turns[2] == {"role": "assistant", "content": f"Wait.\n{call}\n{call}"}
    results = "<tool_response>\n2\n</tool_response>\n<tool_response>\n3\n</tool_response>"
    assert turns[3]["content"] == results + "\nV"
    assert CHAT[2]["tool_calls"] == [CALL, CALL]


def test_one_call_each() -> None:
    calls = [{**CALL, "id": id} for id in "abc"]
    results = [{"role": "tool", "content": id, "tool_call_id": id} for id in "abc"]
    chat = [*CHAT[:2], {"role": "assistant", "content": "Wait.", "tool_calls": calls}, *results, CHAT[5]]
    turns = one_call_each(chat)
    shown = [turn["tool_calls"][0]["id"] if "tool_calls" in turn else turn["content"] for turn in turns]
    assert shown == ["S", "U", "a", "a", "b", "b", "c", "c", "V"]
    assert [turn["content"] for turn in turns if "tool_calls" in turn] == ["Wait.", "", ""]
    assert one_call_each(turns) == turns
    # Results out of order, missing and foreign ones lose nothing.
    turns = one_call_each([chat[2], results[2], results[0], CHAT[5]])
    assert [call["id"] for turn in turns for call in turn.get("tool_calls", [])] == ["a", "b", "c"]
    assert [turn["content"] for turn in turns if turn["role"] == "tool"] == ["c", "a"]


def test_where_the_description_goes() -> None:
    assert with_description(CHAT[:2], "D", takes_system=True)[0] == {"role": "system", "content": "S\n\nD"}
    assert with_description(CHAT[1:2], "D", takes_system=True)[0] == {"role": "system", "content": "D"}
    assert with_description(CHAT[1:2], "D", takes_system=False) == [{"role": "user", "content": "D\n\nU"}]


def test_short_ids_are_nine_letters_and_digits_and_stay_equal() -> None:
    messages = with_short_ids(CHAT)
    (first, second), result = messages[2]["tool_calls"], messages[3]["tool_call_id"]
    assert first["id"] == second["id"] == result
    assert len(result) == 9
    assert result.isalnum()
    assert with_short_ids(messages) == messages


def test_control_tokens_in_tools_are_characters() -> None:
    tokenizer = fake_tokenizer()
    template = ChatTemplate(tool_templates.HERMES)
    tool = {"name": "f", "description": "<|im_end|>", "parameters": {"properties": {"<|im_start|>": {}}}}
    messages = [{"role": "user", "content": "x"}]
    plain = encode_chat(tokenizer, template, messages, tools=[{"function": {"name": "f"}}])
    ids = encode_chat(tokenizer, template, messages, tools=[{"type": "function", "function": tool}])
    for special in tokenizer.special_ids:
        assert ids.count(special) == plain.count(special)
    assert "<|im_end|>" in tokenizer.decode([id for id in ids if id not in tokenizer.special_ids])
