"""The fields that ask for structured output: what reaches the engine, what is refused and in which words."""

from __future__ import annotations

import json
from typing import Any

import openai
import pydantic
import pytest
from fake_engine import MODEL, FakeEngine, Script, Server
from test_api_raw import chat, complete

from gqa_serve.engine.grammars import (
    choice_grammar,
    json_object_grammar,
    json_schema_grammar,
    lark_grammar,
    regex_grammar,
)

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
GBNF = 'root ::= "a" | "b" root'
LARK = 'start: "a"'


def format_of(schema: object, **more: object) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, **more}}


WAYS: list[tuple[dict[str, Any], str | None]] = [
    ({"response_format": None}, None),
    ({"response_format": {"type": "text"}}, None),
    ({"response_format": {"type": "json_object"}}, json_object_grammar()),
    ({"response_format": {"type": "json_object", "schema": SCHEMA}}, json_schema_grammar(SCHEMA)),
    ({"response_format": format_of(SCHEMA)}, json_schema_grammar(SCHEMA)),
    ({"response_format": format_of(SCHEMA, strict=True)}, json_schema_grammar(SCHEMA)),
    ({"response_format": format_of(SCHEMA, strict=False)}, json_schema_grammar(SCHEMA)),
    ({"response_format": format_of(True)}, json_schema_grammar(True)),
    ({"structured_outputs": {"json": SCHEMA}}, json_schema_grammar(SCHEMA)),
    ({"structured_outputs": {"json": json.dumps(SCHEMA)}}, json_schema_grammar(SCHEMA)),
    ({"structured_outputs": {"json": {}, "regex": None}}, json_schema_grammar({})),
    ({"structured_outputs": {"json_object": True}}, json_object_grammar()),
    ({"structured_outputs": {"regex": "[0-9]+", "json_object": False}}, regex_grammar("[0-9]+")),
    ({"structured_outputs": {"choice": ["a", "b"]}}, choice_grammar(["a", "b"])),
    ({"structured_outputs": {"grammar": LARK}}, lark_grammar(LARK)),
    ({"structured_outputs": {"grammar": GBNF, "disable_any_whitespace": False}}, lark_grammar(GBNF)),
    ({"guided_json": SCHEMA}, json_schema_grammar(SCHEMA)),
    ({"guided_regex": "a|b", "guided_decoding_backend": "auto"}, regex_grammar("a|b")),
    ({"guided_choice": ["a"]}, choice_grammar(["a"])),
    ({"guided_grammar": GBNF}, lark_grammar(GBNF)),
    ({"json_schema": json.dumps(SCHEMA)}, json_schema_grammar(SCHEMA)),
    ({"json_schema": SCHEMA}, json_schema_grammar(SCHEMA)),
    ({"regex": "a+"}, regex_grammar("a+")),
    ({"ebnf": GBNF}, lark_grammar(GBNF)),
    ({"grammar": GBNF}, lark_grammar(GBNF)),
]


@pytest.mark.parametrize(("fields", "grammar"), WAYS, ids=[json.dumps(fields)[:60] for fields, _ in WAYS])
@pytest.mark.parametrize("ask", [chat, complete])
def test_every_way_to_ask_gives_the_engine_a_grammar(
    server: Server, engine: FakeEngine, fields: dict[str, Any], grammar: str | None, ask: Any
) -> None:
    reply = ask(server, **fields)
    assert reply.status == 200, reply.body
    assert [request.params.grammar for request in engine.requests] == [grammar]


REFUSED: list[tuple[dict[str, Any], str, str]] = [
    ({"response_format": {"type": "xml"}}, "response_format.type", "json_schema"),
    ({"response_format": {"type": "structural_tag"}}, "response_format.type", "json_schema"),
    ({"response_format": {}}, "response_format.type", "Missing"),
    ({"response_format": "json"}, "response_format", "expected"),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "Missing"),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}},
        "response_format.json_schema.schema",
        "Missing",
    ),
    ({"response_format": format_of({"not": {}})}, "response_format.json_schema.schema", '"not"'),
    ({"response_format": format_of({"type": "strin"})}, "response_format.json_schema.schema", "strin"),
    ({"response_format": format_of(False)}, "response_format.json_schema.schema", "false"),
    ({"response_format": format_of([])}, "response_format.json_schema.schema", "object"),
    (
        {"response_format": format_of({"$ref": "http://x/y"})},
        "response_format.json_schema.schema",
        "http://x/y",
    ),
    ({"response_format": format_of({"$ref": "#/$defs/x"})}, "response_format.json_schema.schema", "/$defs/x"),
    (
        {"response_format": format_of({"x-guidance": {"lenient": True}, "not": {}})},
        "response_format.json_schema.schema",
        "x-guidance",
    ),
    (
        {"response_format": format_of({"type": "object", "properties": {"a": {"x-guidance": {}, "if": {}}}})},
        "response_format.json_schema.schema",
        '"if"',
    ),
    ({"structured_outputs": {}}, "structured_outputs", "exactly one"),
    ({"structured_outputs": {"json_object": False}}, "structured_outputs", "exactly one"),
    ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, "structured_outputs", "exactly one"),
    ({"structured_outputs": {"lark": "start: "}}, "structured_outputs", "lark"),
    (
        {"structured_outputs": {"json": {}, "disable_any_whitespace": True}},
        "structured_outputs.disable_any_whitespace",
        "invalid",
    ),
    (
        {"structured_outputs": {"json": {}, "whitespace_pattern": " *"}},
        "structured_outputs.whitespace_pattern",
        "null",
    ),
    ({"structured_outputs": {"choice": []}}, "structured_outputs.choice", "none of them empty"),
    ({"structured_outputs": {"choice": ["a", ""]}}, "structured_outputs.choice", "none of them empty"),
    ({"structured_outputs": {"choice": ["a", 1]}}, "structured_outputs.choice[1]", "string"),
    ({"structured_outputs": {"json": "{"}}, "structured_outputs.json", "not valid JSON"),
    ({"structured_outputs": {"json": 5}}, "structured_outputs.json", "object"),
    ({"guided_json": {"uniqueItems": True, "type": "array"}}, "guided_json", "uniqueItems"),
    ({"guided_regex": "(a"}, "guided_regex", "unclosed group"),
    ({"guided_regex": "(?=a)b"}, "guided_regex", "look"),
    ({"guided_regex": ""}, "guided_regex", "empty"),
    ({"guided_grammar": "root ::= x"}, "guided_grammar", "Rule 'x' not found"),
    ({"guided_grammar": 'start: a\nb: "x"'}, "guided_grammar", 'unknown name: "a"'),
    ({"guided_grammar": 'start: a\na[temperature=0.5]: "x"'}, "guided_grammar", "Line 2"),
    ({"guided_grammar": "start: <|nope|>"}, "guided_grammar", "nope"),
    ({"guided_decoding_backend": "xgrammar"}, "guided_decoding_backend", "not supported"),
    ({"guided_whitespace_pattern": " *"}, "guided_whitespace_pattern", "not supported"),
    ({"regex": "a", "guided_choice": ["a"]}, "regex", "guided_choice"),
    ({"response_format": {"type": "json_object"}, "grammar": GBNF}, "grammar", "response_format"),
    ({"ebnf": "  "}, "ebnf", "empty"),
]


@pytest.mark.parametrize(("fields", "param", "words"), REFUSED, ids=[json.dumps(f)[:70] for f, *_ in REFUSED])
@pytest.mark.parametrize("ask", [chat, complete])
def test_what_cannot_be_enforced_is_refused(
    server: Server, engine: FakeEngine, fields: dict[str, Any], param: str, words: str, ask: Any
) -> None:
    reply = ask(server, **fields)
    assert reply.status == 400
    assert reply.error["param"] == param
    assert words in reply.error["message"]
    assert engine.requests == []


def test_a_streamed_request_is_refused_before_its_stream(server: Server, engine: FakeEngine) -> None:
    reply = chat(server, stream=True, response_format=format_of({"not": {}}))
    assert (reply.status, reply.error["type"]) == (400, "invalid_request_error")


def test_the_openai_client_parses_into_a_model(client: openai.OpenAI, engine: FakeEngine) -> None:
    class City(pydantic.BaseModel):
        name: str
        inhabitants: int

    engine.script = lambda request: Script(['{"name": "Oslo", "inhabitants": 700000}'])
    answer = client.chat.completions.parse(
        model=MODEL, messages=[{"role": "user", "content": "A city?"}], response_format=City
    )
    assert answer.choices[0].message.parsed == City(name="Oslo", inhabitants=700_000)
    (request,) = engine.requests
    assert '"inhabitants"' in (request.params.grammar or "")


def test_every_choice_of_every_prompt_has_the_grammar(server: Server, engine: FakeEngine) -> None:
    assert complete(server, prompt=["a", "b"], n=2, regex="x+").status == 200
    assert [request.params.grammar for request in engine.requests] == [regex_grammar("x+")] * 4
