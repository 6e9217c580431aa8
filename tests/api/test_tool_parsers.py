"""Tool calls and thinking in the text of models: transcripts of each family, cut at every place."""

from __future__ import annotations

import itertools
import json
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gqa_serve.api.message_parts import (
    ArgumentsPart,
    MessageParser,
    Part,
    PlainParser,
    ReasoningPart,
    TextPart,
    ToolCallPart,
    merge_parts,
)
from gqa_serve.api.reasoning import ReasoningParser
from gqa_serve.api.tools.parsers import HermesParser, Llama3Parser, MistralParser, ToolParser

Call = tuple[str, str]
NAMES = frozenset({"get_weather", "add"})
FAMILIES: dict[str, type[ToolParser]] = {
    "hermes": HermesParser,
    "llama3": Llama3Parser,
    "mistral": MistralParser,
}
CALL_THEN_FILL = '<tool_call>{"name": "add", "arguments": {}}'


def new_parser(family: str) -> ToolParser:
    numbers = itertools.count()
    return FAMILIES[family](lambda: f"id{next(numbers)}", NAMES)


def parse(parser: MessageParser, *pieces: str) -> list[Part]:
    parts = [part for piece in pieces for part in parser.feed(piece)]
    return merge_parts(parts + parser.feed("", final=True))


def told(parts: list[Part]) -> tuple[str, list[Call]]:
    """The text, and the calls with their arguments; fails if arguments come before their call."""
    text, calls = "", []
    for part in parts:
        match part:
            case TextPart(more):
                text += more
            case ToolCallPart(index, _, name):
                assert index == len(calls)
                calls.append((name, ""))
            case ArgumentsPart(index, more):
                assert index == len(calls) - 1
                calls[index] = (calls[index][0], calls[index][1] + more)
            case _:
                raise AssertionError(part)
    return text, calls


WEATHER = '{"city": "Paris"}'
TRANSCRIPTS: list[tuple[str, str, str, list[Call]]] = [
    ("hermes", "Just text, a < b.", "Just text, a < b.", []),
    (
        "hermes",
        '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>',
        "",
        [("get_weather", WEATHER)],
    ),
    (
        "hermes",
        'Let me look.\n<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>\n'
        '<tool_call>\n{"name":"add","arguments":{"a":[1,{"b":"}"}]}}\n</tool_call>\n',
        "Let me look.",
        [("get_weather", WEATHER), ("add", '{"a":[1,{"b":"}"}]}')],
    ),
    (  # arguments first; text after the call
        "hermes",
        '<tool_call>{"arguments": {"city": "Paris"}, "name": "get_weather"}</tool_call> Done.',
        " Done.",
        [("get_weather", WEATHER)],
    ),
    (  # arguments as a string that holds the object
        "hermes",
        '<tool_call>{"name": "get_weather", "arguments": "{\\"city\\": \\"Paris\\"}"}</tool_call>',
        "",
        [("get_weather", WEATHER)],
    ),
    ("hermes", '<tool_call>{"name": "add"}</tool_call>', "", [("add", "{}")]),
    ("hermes", '<tool_call>{"name": "add", "arguments": null}</tool_call>', "", [("add", "{}")]),
    (  # markers inside strings are characters
        "hermes",
        '<tool_call>{"name": "add", "arguments": {"x": "</tool_call> \\" <tool_call>"}}</tool_call>',
        "",
        [("add", '{"x": "</tool_call> \\" <tool_call>"}')],
    ),
    (  # no closing marker; a brace too many; a brace too few
        "hermes",
        '<tool_call>{"name": "add", "arguments": {}}\n<tool_call>{"name": "add", "arguments": {"a":1}}}'
        '</tool_call><tool_call>{"name": "add", "arguments": {"a":2}</tool_call>',
        "",
        [("add", "{}"), ("add", '{"a":1}'), ("add", '{"a":2}')],
    ),
    ("hermes", "<tool_call>oops</tool_call>", "<tool_call>oops</tool_call>", []),
    (
        "hermes",
        'a <tool_call> b <tool_call>{"name": "add", "arguments": {}}</tool_call>',
        "a <tool_call> b",
        [("add", "{}")],
    ),
    ("hermes", 'x\n<tool_call>{"na', 'x\n<tool_call>{"na', []),
    ("hermes", "x\n<tool_ca", "x\n<tool_ca", []),
    ("hermes", '<tool_call>{"name": "add", "arguments": {"a": 1', "", [("add", '{"a": 1')]),
    (
        "hermes",
        '<tool_call>{"name": 5, "arguments": {}}</tool_call>',
        '<tool_call>{"name": 5, "arguments": {}}</tool_call>',
        [],
    ),
    ("hermes", "<<tool_call>{}</tool_call>", "<<tool_call>{}</tool_call>", []),
    (
        "llama3",
        '{"name": "get_weather", "parameters": {"city": "Paris"}}',
        "",
        [("get_weather", WEATHER)],
    ),
    (
        "llama3",
        '\n\n<|python_tag|>{"name": "get_weather", "parameters": {"city": "Paris"}}; '
        '{"name": "add", "parameters": {"a": 1}}',
        "",
        [("get_weather", WEATHER), ("add", '{"a": 1}')],
    ),
    (
        "llama3",
        'Sure: <|python_tag|>{"type": "function", "name": "get_weather", "parameters": {"city": "Paris"}}\n',
        "Sure:",
        [("get_weather", WEATHER)],
    ),
    ("llama3", '{"name": "Bob", "parameters": {}}', '{"name": "Bob", "parameters": {}}', []),
    ("llama3", '{"name": "add", "age": 3}', '{"name": "add", "age": 3}', []),
    ("llama3", '{"city": "Paris"} is it', '{"city": "Paris"} is it', []),
    ("llama3", "<|python_tag|>print(1)", "<|python_tag|>print(1)", []),
    ("llama3", "Text {not a call}; \n", "Text {not a call}; \n", []),
    ("llama3", '{"name": "add", "parameters": {}} and more', " and more", [("add", "{}")]),
    (
        "mistral",
        '[TOOL_CALLS] [{"name": "get_weather", "arguments": {"city": "Paris"}, "id": "abcdefghi"}, '
        '{"name": "add", "arguments": {"a": 1}}]',
        "",
        [("get_weather", WEATHER), ("add", '{"a": 1}')],
    ),
    (
        "mistral",
        'Look: [TOOL_CALLS]get_weather[ARGS]{"city": "Paris"}[TOOL_CALLS]add[CALL_ID]abcdefghi[ARGS]{"a": 1}',
        "Look:",
        [("get_weather", WEATHER), ("add", '{"a": 1}')],
    ),
    ("mistral", '[TOOL_CALLS]add{"a": 1} done', " done", [("add", '{"a": 1}')]),
    ("mistral", '[TOOL_CALLS]{"name": "add", "arguments": {}}', "", [("add", "{}")]),
    ("mistral", '[TOOL_CALLS]a.b:c/d-e[ARGS]{"a": 1}', "", [("a.b:c/d-e", '{"a": 1}')]),
    ("mistral", "[TOOL_CALLS] means calls.", "[TOOL_CALLS] means calls.", []),
    ("mistral", "[TOOL_CALLS][", "[TOOL_CALLS][", []),
    ("mistral", '[TOOL_CALLS][{"a": 1}] x', '[TOOL_CALLS][{"a": 1}] x', []),
    ("mistral", "[1, 2] [[TOOL_CALLS", "[1, 2] [[TOOL_CALLS", []),
]


@pytest.mark.parametrize(("family", "written", "text", "calls"), TRANSCRIPTS)
def test_transcripts_cut_at_every_place(family: str, written: str, text: str, calls: list[Call]) -> None:
    whole = parse(new_parser(family), written)
    assert told(whole) == (text, calls)
    assert len({part.id for part in whole if isinstance(part, ToolCallPart)}) == len(calls)
    assert parse(new_parser(family), *written) == whole
    for cut in range(len(written)):
        assert parse(new_parser(family), written[:cut], written[cut:]) == whole
    assert merge_parts(new_parser(family).feed(written, final=True)) == whole


def test_arguments_come_in_pieces_while_they_are_written() -> None:
    parser = new_parser("hermes")
    parts = parser.feed('<tool_call>{"name": "add", "arguments": {"a"')
    assert parts[0] == ToolCallPart(0, "id0", "add")
    assert told(parts)[1] == [("add", '{"a"')]
    assert told([ToolCallPart(0, "", "add"), *parser.feed(": 12")])[1] == [("add", ": 12")]


def test_text_is_not_held_back_longer_than_it_must() -> None:
    for family in FAMILIES:
        assert told(new_parser(family).feed("Hello wor"))[0] == "Hello wor"
    assert told(new_parser("hermes").feed("a <tool"))[0] == "a"
    assert told(new_parser("hermes").feed("a <tools"))[0] == "a <tools"


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("before", ["", "a", CALL_THEN_FILL, "<think>", "<think>a", "<think>a</think>"])
def test_endless_blanks_take_linear_time(family: str, before: str) -> None:
    parser = ReasoningParser(new_parser(family), is_open=False)
    started = time.process_time()
    parts = parse(parser, *before, *["\n\n  "] * 30_000, "x")
    assert time.process_time() - started < 4  # looking at all blanks again for each piece: 10 and more
    assert merge_parts(parts)[-1].text.endswith("x")  # type: ignore[union-attr]


FRAGMENTS = st.sampled_from(
    [
        *("<tool_call>", "</tool_call>", "<|python_tag|>", "[TOOL_CALLS]", "[ARGS]", "<think>", "</think>"),
        *("[", "]", "{", "}", '"', "\\", '{"name": "add", ', '"arguments": ', '"parameters": {}', '{"a": 1}'),
        *('"}', ",", ":", ";", " ", "\n", "add", "text", "<", "é\u00a0", "null", "</", "<tool"),
    ]
)
WRITTEN = st.lists(FRAGMENTS, max_size=14).map("".join)


@given(family=st.sampled_from(sorted(FAMILIES)), written=WRITTEN, data=st.data())
@settings(max_examples=400, deadline=None)
def test_pieces_make_no_difference(family: str, written: str, data: st.DataObject) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(written)), max_size=6)))
    pieces = [written[a:b] for a, b in itertools.pairwise([0, *cuts, len(written)])]
    is_open = data.draw(st.booleans())

    def new() -> MessageParser:
        return ReasoningParser(new_parser(family), is_open=is_open)

    whole = merge_parts(new().feed(written, final=True))
    assert parse(new(), *pieces) == whole
    assert parse(new(), *written) == whole
    plain = parse(new_parser(family), *pieces)
    if not any(isinstance(part, ToolCallPart) for part in plain):
        assert told(plain) == (written, [])


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(
    arguments=st.dictionaries(st.text(), JSON, max_size=4),
    family=st.sampled_from(sorted(FAMILIES)),
    indent=st.sampled_from([None, 2]),
    ascii_only=st.booleans(),
)
@settings(max_examples=200, deadline=None)
def test_any_arguments_come_out_as_written(
    arguments: dict[str, object], family: str, indent: int | None, ascii_only: bool
) -> None:
    body = json.dumps(arguments, indent=indent, ensure_ascii=ascii_only)
    spelled = {
        "hermes": f'<tool_call>\n{{"name": "add", "arguments": {body}}}\n</tool_call>',
        "llama3": f'{{"name": "add", "parameters": {body}}}',
        "mistral": f"[TOOL_CALLS]add[ARGS]{body}",
    }[family]
    assert told(parse(new_parser(family), *spelled)) == ("", [("add", body)])


def think(is_open: bool, *pieces: str) -> tuple[str, str]:
    parts = parse(ReasoningParser(PlainParser(), is_open=is_open), *pieces)
    reasoning = "".join(part.text for part in parts if isinstance(part, ReasoningPart))
    return reasoning, "".join(part.text for part in parts if isinstance(part, TextPart))


@pytest.mark.parametrize(
    ("is_open", "written", "reasoning", "answer"),
    [
        (
            False,
            "<think>\nHm. 1 < 2\n\nyes\n</think>\n\nHello </think>",
            "Hm. 1 < 2\n\nyes",
            "Hello </think>",
        ),
        (True, "Hm.\n</think>\n\nHello", "Hm.", "Hello"),
        (True, "<think>\nHm.</think>Hello", "Hm.", "Hello"),
        (False, "<think>\n\n</think>\n\nHello", "", "Hello"),
        (True, "never ends </th", "never ends </th", ""),
        (False, "  Hello <think>x</think>", "", "  Hello <think>x</think>"),
        (False, "<thin", "", "<thin"),
        (True, "", "", ""),
    ],
)
def test_thinking_is_separated(is_open: bool, written: str, reasoning: str, answer: str) -> None:
    assert think(is_open, written) == (reasoning, answer)
    assert think(is_open, *written) == (reasoning, answer)
    for cut in range(len(written)):
        assert think(is_open, written[:cut], written[cut:]) == (reasoning, answer)


def test_thinking_streams() -> None:
    parser = ReasoningParser(PlainParser(), is_open=True)
    assert parser.feed("Let me ") == [ReasoningPart("Let me")]
    assert parser.feed("think</th") == [ReasoningPart(" think")]
    assert parser.feed("ink>\n") == []
    assert parser.feed("Yes") == [TextPart("Yes")]


def test_every_parser_is_a_message_parser() -> None:
    parsers: list[MessageParser] = [new_parser(family) for family in FAMILIES]
    assert all(parser.feed("", final=True) == [] for parser in parsers)
