"""The tables of docs/api.md, row by row: they name every field there is, and each does what its row says.

To walk the table of another endpoint, add a line to `WALKS`; what the endpoint knows comes from its operation
in `openapi/operations.py`.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
import re
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import anthropic.types.message_create_params as message_params
import msgspec
import openai.types.chat.completion_create_params as chat_params
import openai.types.completion_create_params as completion_params
import openai.types.responses.response_create_params as response_params
import pytest
from fake_engine import MODEL, FakeEngine, Script, Server
from openai.types.embedding_create_params import EmbeddingCreateParams
from test_api_raw import Reply, post, send

from gqa_serve.api.openapi.operations import operations
from gqa_serve.api.params import FieldRules

PAGE = Path(__file__).parents[2] / "docs" / "api.md"
CLASSES = ("honoured", "no-op", "refused")
WRONG = ({"no": ["such", "value"]}, [[["x"]]], 0.5)  # each field has a type that one of them is not of


@dataclasses.dataclass(frozen=True)
class Walk:
    """How to walk one section: where to send, which fields its clients document, what to send."""

    path: str
    documented: frozenset[str]
    needed: Mapping[str, Any]
    probes: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # values, or what makes them
    together: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)  # what a field needs
    also: str = ""  # another path of the same endpoint
    untyped: frozenset[str] = frozenset()  # honoured fields of which no value is of a wrong type

    @property
    def rules(self) -> FieldRules:
        (operation,) = [one for one in operations() if one.path == self.path and one.method == "post"]
        assert operation.rules is not None
        return operation.rules


def fields_of(*params: type) -> frozenset[str]:
    """The names in the parameter types of a client library."""
    return frozenset(name for one in params for name in typing.get_type_hints(one))


def stored_response(server: Server) -> str:
    """The id of a response to go on from."""
    reply = send(server, post("/v1/responses", b'{"input": "Hi"}'))
    server.engine.reset(server.engine.script)
    return str(json.loads(reply.body)["id"])


# What chat knows and other endpoints refuse.
CHAT_ONLY = {
    "continue_final_message": True,
    "skip_special_tokens": False,
    "logprobs": True,
    "top_logprobs": 2,
}


# Values for fields of the same meaning everywhere. Of refused fields: one that is refused.
PROBES: dict[str, Any] = {
    "model": MODEL, "stream": True, "stream_options": {"include_usage": True}, "n": 2, "max_tokens": 5,
    "max_completion_tokens": 5, "min_tokens": 1, "temperature": 0.5, "top_p": 0.5, "top_k": 5, "min_p": 0.1,
    "repetition_penalty": 1.5, "presence_penalty": 1, "frequency_penalty": 1, "logit_bias": {"65": 5},
    "seed": 7, "stop": ["x"], "stop_token_ids": [65], "include_stop_str_in_output": True, "ignore_eos": True,
    "skip_special_tokens": False, "priority": 3, "cache_salt": "s", "add_special_tokens": True, "echo": True,
    "user": "u", "metadata": {"a": "b"}, "store": True, "service_tier": "flex", "safety_identifier": "s",
    "prompt_cache_key": "k", "prompt_cache_retention": "24h", "prompt_cache_options": {"ttl": 3600},
    "parallel_tool_calls": False, "reasoning_effort": "none", "best_of": 3, "suffix": "s",
    "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}],
    "tool_choice": "required", "functions": [{"name": "f"}], "function_call": {"name": "f"},
    "response_format": {"type": "json_object"},
    "repeat_penalty": 1.5, "spaces_between_special_tokens": True, "structural_tag": "x",
    "modalities": ["text", "audio"],
    "audio": {"voice": "alloy", "format": "wav"}, "prediction": {"type": "content", "content": "x"},
    "web_search_options": {}, "verbosity": "high", "moderation": {"model": "m"}, "chat_template": "{{ 1 }}",
    "documents": [{"title": "t", "text": "x"}], "structured_outputs": {"regex": "a"}, "guided_json": {},
    "guided_regex": "a", "guided_choice": ["a"], "guided_grammar": 'root ::= "a"',
    "guided_decoding_backend": "x", "guided_whitespace_pattern": " ", "json_schema": {}, "regex": "a",
    "ebnf": 'root ::= "a"', "grammar": 'root ::= "a"', "prompt_logprobs": 1, "prompt_embeds": "AAAA",
    "use_beam_search": True, "length_penalty": 2.0, "bad_words": ["x"], "allowed_token_ids": [65],
    "truncate_prompt_tokens": 5, "return_token_ids": True, "return_tokens_as_token_ids": True,
    "logits_processors": ["x"], "messages": [{"role": "user", "content": "Hello!"}], "prompt": "Hello",
    "chat_template_kwargs": {"a": 1}, "add_generation_prompt": False,
}  # fmt: skip

CHAT = Walk(
    "/v1/chat/completions",
    fields_of(chat_params.CompletionCreateParamsNonStreaming),
    needed={"messages": [{"role": "user", "content": "Hi"}]},
    probes={"logprobs": True, "top_logprobs": 2, "continue_final_message": True},
    together={
        "top_logprobs": {"logprobs": True},
        "continue_final_message": {"messages": [{"role": "assistant", "content": "Hi"}]},
        "echo": {"messages": [{"role": "assistant", "content": "Hi"}]},
        "tool_choice": {"tools": PROBES["tools"]},
    },
)
COMPLETIONS = Walk(
    "/v1/completions",
    fields_of(completion_params.CompletionCreateParamsNonStreaming),
    needed={"prompt": "p"},
    probes={"logprobs": 2, "top_logprobs": 2, "reasoning_effort": "low"},
)
RESPONSES = Walk(
    "/v1/responses",
    fields_of(response_params.ResponseCreateParamsNonStreaming),
    needed={"input": "Hi"},
    probes={
        **CHAT_ONLY, "instructions": "Be short.", "max_output_tokens": 5,
        "text": {"format": {"type": "text"}},
        "input": "Hello", "include": ["reasoning.encrypted_content"], "truncation": "auto",
        "tool_choice": "none", "previous_response_id": stored_response,
        "reasoning": {"effort": "none"}, "max_tool_calls": 3, "store": False, "background": True,
        "tools": [{"type": "function", "name": "f", "parameters": {"type": "object"}, "strict": False}],
        "background_options": {}, "conversation": "c", "context_management": [{"type": "compaction"}],
        "access_programs": ["x"], "image": {}, "prompt": {"id": "p"}, "logprobs": True, "top_logprobs": 2,
    },
    together={"top_logprobs": {"include": ["message.output_text.logprobs"]}},
)  # fmt: skip
MESSAGES = Walk(
    "/v1/messages",
    fields_of(message_params.MessageCreateParamsNonStreaming),
    needed={"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 20},
    also="/v1/messages/count_tokens",
    probes={
        **CHAT_ONLY, "system": "Be short.", "stop_sequences": ["x"], "thinking": {"type": "disabled"},
        "tools": [{"name": "f", "input_schema": {"type": "object"}}], "tool_choice": {"type": "none"},
        "output_config": {"effort": "high"},
        "output_format": {"type": "json_schema", "schema": {"type": "object"}},
        "container": "c", "mcp_servers": [{"type": "url"}], "context_management": {"edits": [{"type": "x"}]},
        "diagnostics": {}, "inference_geo": "us", "speed": "fast", "cache_control": {"type": "ephemeral"},
        "user_profile_id": "u", "workspace_id": "w", "metadata": {"user_id": "u"}, "service_tier": "auto",
    },
)  # fmt: skip
EMBEDDINGS = Walk(
    "/v1/embeddings",
    fields_of(EmbeddingCreateParams),
    needed={"input": "Hi"},
    probes={
        "input": ["Hello", "you"], "encoding_format": "base64", "dimensions": 2, "pooling": "mean",
        "normalize": False, "embed_dtype": "float16", "endianness": "big",
    },
)  # fmt: skip
TOKENIZE = Walk(
    "/tokenize",
    frozenset({"prompt", "messages"}),
    needed={"prompt": "Hi"},
    probes={**CHAT.probes, "return_token_strs": True},
    together={
        **{name: {"prompt": None, **CHAT.needed, **more} for name, more in CHAT.together.items()},
        "messages": {"prompt": None},
        "top_logprobs": {"logprobs": True},
    },
    also="/v1/tokenize",
)
WALKS = {
    "Chat completions": CHAT,
    "Completions": COMPLETIONS,
    "Responses": RESPONSES,
    "Anthropic messages": MESSAGES,
    "Embeddings": EMBEDDINGS,
    "Tokenize": TOKENIZE,
    "Detokenize": Walk(
        "/detokenize", frozenset({"tokens"}), {"tokens": [72]}, {"tokens": [73]}, also="/v1/detokenize"
    ),
}


# --- the page ----------------------------------------------------------------------------------------------


class Row(typing.NamedTuple):
    name: str
    kind: str
    text: str


@functools.cache
def tables() -> dict[str, list[Row]]:
    """The rows of each section's field tables."""
    result: dict[str, list[Row]] = {}
    for section in re.split(r"^## ", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]:
        heading, _, text = section.partition("\n")
        for table in re.findall(
            r"^\| field \| what happens \|\n\|[-|]+\|\n((?:\|.*\|\n)+)", text, re.MULTILINE
        ):
            for line in table.splitlines():
                cell, _, meaning = line.strip("|").partition("|")
                for name in re.findall(r"`([^`]+)`", cell):
                    kind = re.split(r"[ ,;:]", meaning.strip(), maxsplit=1)[0]
                    result.setdefault(heading, []).append(Row(name, kind, meaning.strip()))
    return result


def rows() -> list[Any]:
    return [
        pytest.param(heading, row, id=f"{heading}-{row.name}")
        for heading in WALKS
        for row in tables().get(heading, ())
    ]


def test_every_section_with_a_table_is_walked() -> None:
    assert set(tables()) == set(WALKS)
    described = {one.path for one in operations() if one.rules is not None}
    assert {path for walk in WALKS.values() for path in (walk.path, walk.also) if path} == described


@pytest.mark.parametrize("heading", WALKS)
def test_the_table_names_what_the_code_and_the_clients_know(heading: str) -> None:
    walk = WALKS[heading]
    names = [row.name for row in tables()[heading]]
    assert sorted(names) == sorted(set(names)), "a field has two rows"
    assert {row.kind for row in tables()[heading]} <= set(CLASSES)
    rules = walk.rules
    known = rules.fields | rules.refused.keys() | rules.no_ops
    known |= {name for name in ("best_of",) if rules.covers(name) and name in names}
    assert set(names) == known
    assert walk.documented <= set(names)


# --- each row ----------------------------------------------------------------------------------------------


def ask(server: Server, walk: Walk, name: str, value: Any) -> Reply:
    body = {**walk.needed, **walk.together.get(name, {}), name: value}
    return send(server, post(walk.path, json.dumps(body).encode()))


def probe(server: Server, walk: Walk, name: str) -> Any:
    value = walk.probes[name] if name in walk.probes else PROBES[name]
    return value(server) if callable(value) else value


def blamed(reply: Reply) -> str:
    """The field that an error names: OpenAI's `param`, or what Anthropic's message begins with."""
    error = json.loads(reply.body)["error"]
    return str(error.get("param", error["message"]))


@pytest.mark.parametrize(("heading", "row"), rows())
def test_each_field_does_what_its_row_says(
    server: Server, engine: FakeEngine, caplog: pytest.LogCaptureFixture, heading: str, row: Row
) -> None:
    walk = WALKS[heading]
    engine.script = lambda request: Script(["Hello"])
    with caplog.at_level(logging.WARNING, "gqa_serve.api.params"):
        reply = ask(server, walk, row.name, probe(server, walk, row.name))
    depends = row.text.startswith("honoured where")  # on the model; what it cannot do is refused
    if row.kind == "refused" or (depends and reply.status != 200):
        assert reply.status == 400, reply.body
        assert re.match(rf"{row.name}\b", blamed(reply))
        assert engine.requests == []
        return
    assert reply.status == 200, reply.body
    assert "unknown request field" not in caplog.text
    given = [seen(request) for request in engine.requests]
    if row.kind == "no-op":
        engine.reset(engine.script)
        send(server, post(walk.path, json.dumps({**walk.needed}).encode()))
        assert given == [seen(request) for request in engine.requests]
    elif row.name not in walk.untyped:
        replies = [ask(server, walk, row.name, value) for value in WRONG]
        wrong = [reply for reply in replies if reply.status == 400]
        assert wrong, "values of wrong types went unnoticed"
        assert all(re.match(rf"{row.name}\b", blamed(reply)) for reply in wrong)


def seen(request: Any) -> dict[str, Any]:
    """What the engine gets, but for what every request has of its own."""
    values: dict[str, Any] = msgspec.structs.asdict(request)
    return {name: value for name, value in values.items() if name not in ("request_id", "group")}


@pytest.mark.parametrize(("heading", "row"), rows())
def test_null_is_the_same_as_nothing(server: Server, heading: str, row: Row) -> None:
    walk = WALKS[heading]
    body = json.dumps({**walk.needed, row.name: None}).encode()
    reply = send(server, post(walk.path, body))
    if row.name in walk.needed:
        assert reply.status == 400
        assert re.match(rf"{row.name}\b", blamed(reply))
    else:
        assert reply.status == 200, reply.body


@pytest.mark.parametrize("heading", WALKS)
def test_values_that_a_refused_field_may_have(server: Server, heading: str) -> None:
    walk = WALKS[heading]
    for name, values in walk.rules.refused.items():
        for value in values:
            reply = ask(server, walk, name, value)
            assert reply.status == 200, (name, value, reply.body)
