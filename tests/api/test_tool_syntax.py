"""Grammars of tool calls: what they let through, for each family, with markers as text and as tokens."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest
import tokenizers
from tokenizers import decoders, pre_tokenizers

from gqa_serve.api.message_parts import ArgumentsPart, TextPart, ToolCallPart, merge_parts
from gqa_serve.api.protocol import (
    ChatMessage,
    ChatRequest,
    FunctionDefinition,
    FunctionName,
    Tool,
    ToolChoice,
)
from gqa_serve.api.reasoning import after_thinking
from gqa_serve.api.tools.choice import ToolPlan, read_tools
from gqa_serve.api.tools.syntax import HERMES, LLAMA3, MISTRAL, MISTRAL_ARGS, ToolSyntax
from gqa_serve.engine.grammar_compiler import compiler_for
from gqa_serve.engine.grammars import json_schema_grammar
from gqa_serve.engine.token_pieces import byte_alphabet
from gqa_serve.engine.tokenizer import Tokenizer

MARKERS = ["<tool_call>", "</tool_call>", "<|python_tag|>", "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]", "</think>"]
CITY = {"type": "object", "properties": {"city": {"type": "string", "enum": ["Paris", "Rome"]}}}
SCHEMA: dict[str, Any] = {**CITY, "required": ["city"], "additionalProperties": False}
SYNTAXES = {"hermes": HERMES, "llama3": LLAMA3, "mistral": MISTRAL, "mistral-args": MISTRAL_ARGS}
GOOD = '{"city": "Paris"}'


def byte_tokenizer(special: bool) -> Tokenizer:
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=byte_alphabet(), merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<|im_end|>", *(MARKERS if special else [])])
    return Tokenizer(backend, special_tokens={"eos_token": "<|im_end|>"})


TOKENIZERS = {"text": byte_tokenizer(special=False), "control": byte_tokenizer(special=True)}


def allows(grammar: str, text: str, tokenizer: Tokenizer) -> bool:
    """Whether `text`, its markers read as control tokens where they are, is a whole answer."""
    ids = tokenizer.encode(text, add_special_tokens=False, parse_special=True)
    matcher = compiler_for(tokenizer).compile(grammar)
    return all(matcher.consume_token(id) for id in ids) and matcher.is_accepting()


def plan(*, choice: Any = "required", parallel: bool = True, strict: bool = False) -> ToolPlan:
    function = FunctionDefinition("get_weather", parameters=SCHEMA, strict=strict)
    fields = ChatRequest(
        messages=[ChatMessage("user", "x")],
        tools=[Tool("function", function), Tool("function", FunctionDefinition("now"))],
        tool_choice=choice,
        parallel_tool_calls=parallel,
    )
    made = read_tools(fields)
    assert made is not None
    return made


def two(syntax: ToolSyntax, first: str, second: str) -> str:
    """Two calls in the family's spelling."""
    calls = syntax.separator.join(
        syntax.begin % name + body + syntax.end for name, body in (("get_weather", first), ("now", second))
    )
    return syntax.trigger + syntax.opening + calls + syntax.closing


@pytest.mark.parametrize("tokenizer", TOKENIZERS.values(), ids=TOKENIZERS)
@pytest.mark.parametrize("syntax", SYNTAXES.values(), ids=SYNTAXES)
def test_required(syntax: ToolSyntax, tokenizer: Tokenizer) -> None:
    grammar = syntax.grammar(plan(), tokenizer)
    assert allows(grammar, syntax.spell("get_weather", GOOD), tokenizer)
    assert allows(grammar, syntax.spell("now", "{}"), tokenizer)
    assert allows(grammar, two(syntax, GOOD, "{}"), tokenizer)
    for wrong in (
        "",
        "Hello",
        syntax.trigger,
        syntax.spell("get_weather", "{}"),
        syntax.spell("other", "{}"),
        syntax.spell("get_weather", '{"city": "Oslo"}'),
        two(syntax, GOOD, '{"x": 1}'),
    ):
        assert not allows(grammar, wrong, tokenizer), wrong
    single = syntax.grammar(plan(parallel=False), tokenizer)
    assert allows(single, syntax.spell("get_weather", GOOD), tokenizer)
    assert not allows(single, two(syntax, GOOD, "{}"), tokenizer)


@pytest.mark.parametrize("syntax", SYNTAXES.values(), ids=SYNTAXES)
def test_named(syntax: ToolSyntax) -> None:
    tokenizer = TOKENIZERS["text"]
    named = plan(choice=ToolChoice("function", FunctionName("now")))
    grammar = syntax.grammar(named, tokenizer)
    assert allows(grammar, syntax.spell("now", "{}"), tokenizer)
    assert not allows(grammar, syntax.spell("get_weather", GOOD), tokenizer)
    assert not allows(grammar, two(syntax, GOOD, "{}"), tokenizer)


@pytest.mark.parametrize("tokenizer", TOKENIZERS.values(), ids=TOKENIZERS)
@pytest.mark.parametrize("syntax", SYNTAXES.values(), ids=SYNTAXES)
def test_strict_tools_leave_text_free(syntax: ToolSyntax, tokenizer: Tokenizer) -> None:
    grammar = syntax.grammar(plan(choice="auto", strict=True), tokenizer)
    for text in (
        "",
        "Hello <tool\nworld",
        "x {not} [a] call",
        syntax.spell("get_weather", GOOD),
        syntax.spell("now", '{"any": [1]}'),
        two(syntax, GOOD, "{}"),
    ):
        assert allows(grammar, text, tokenizer), text
    if syntax.trigger:
        assert allows(grammar, "Look:\n" + syntax.spell("get_weather", GOOD), tokenizer)
        assert not allows(grammar, "Look: " + syntax.trigger + "oops", tokenizer)
    assert not allows(grammar, syntax.spell("get_weather", '{"city": "Oslo"}'), tokenizer)
    single = syntax.grammar(plan(choice="auto", parallel=False), tokenizer)
    assert allows(single, syntax.spell("get_weather", '{"city": "Oslo"}'), tokenizer)
    assert not allows(single, two(syntax, GOOD, "{}"), tokenizer)
    assert allows(single, "Hello", tokenizer)


@pytest.mark.parametrize("syntax", SYNTAXES.values(), ids=SYNTAXES)
def test_text_that_has_a_form_or_calls(syntax: ToolSyntax) -> None:
    tokenizer = TOKENIZERS["text"]
    answer = json_schema_grammar(
        {
            "type": "object",
            "properties": {"ok": {"type": "boolean"}},
            "required": ["ok"],
            "additionalProperties": False,
        }
    )
    grammar = syntax.grammar(plan(choice="auto"), tokenizer, answer)
    assert allows(grammar, '{"ok": true}', tokenizer)
    assert allows(grammar, syntax.tag + syntax.spell("now", "{}"), tokenizer)
    assert not allows(grammar, "Hello", tokenizer)
    assert not allows(grammar, '{"ok": 1}', tokenizer)


@pytest.mark.parametrize("tokenizer", TOKENIZERS.values(), ids=TOKENIZERS)
def test_after_thinking(tokenizer: Tokenizer) -> None:
    inner = HERMES.grammar(plan(), tokenizer)
    call = HERMES.spell("now", "{}")
    grammar = after_thinking(inner, tokenizer, is_open=True)
    assert allows(grammar, "a < b\n</think>\n\n" + call, tokenizer)
    assert allows(grammar, "</think>" + call, tokenizer)
    assert not allows(grammar, call, tokenizer)
    grammar = after_thinking(inner, tokenizer, is_open=False)
    assert allows(grammar, "<think>\nHm\n</think>\n\n" + call, tokenizer)
    assert allows(grammar, call, tokenizer)
    assert not allows(grammar, "Hm\n</think>\n\n" + call, tokenizer)


@pytest.mark.parametrize("syntax", SYNTAXES.values(), ids=SYNTAXES)
def test_what_the_grammar_allows_the_parser_reads(syntax: ToolSyntax) -> None:
    numbers = itertools.count()
    parser = syntax.parser(lambda: f"id{next(numbers)}", frozenset({"get_weather", "now"}))
    parts = merge_parts(parser.feed(two(syntax, GOOD, "{}"), final=True))
    assert not any(isinstance(part, TextPart) for part in parts)
    assert [part.name for part in parts if isinstance(part, ToolCallPart)] == ["get_weather", "now"]
    assert [json.loads(part.text) for part in parts if isinstance(part, ArgumentsPart)] == [
        {"city": "Paris"},
        {},
    ]


def test_control_tokens_of_a_spelling_are_shown() -> None:
    tokenizer = TOKENIZERS["control"]
    shown = MISTRAL_ARGS.shown_ids(tokenizer)
    assert shown == {tokenizer.token_id(marker) for marker in ("[TOOL_CALLS]", "[ARGS]", "[CALL_ID]")}
    assert HERMES.shown_ids(TOKENIZERS["text"]) == frozenset()
