"""What the fields that ask for structured output mean: one grammar, or none.

Owns OpenAI's `response_format` and the names other servers have for the same: vLLM's `structured_outputs` and
`guided_*`, SGLang's `json_schema`, `regex` and `ebnf`, llama.cpp's `json_schema` and `grammar`. Knows no
engine and no sampling. Invariant: a request asks in one way only, and what it asks for is enforced or
refused, with `strict` and without.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import anyio
import anyio.to_thread
import msgspec

from gqa_serve.api.errors import shorten
from gqa_serve.api.protocol import ResponseFormat, SamplingFields
from gqa_serve.engine.grammars import (
    blaming,
    check_grammar,
    choice_grammar,
    json_object_grammar,
    json_schema_grammar,
    lark_grammar,
    regex_grammar,
)
from gqa_serve.engine.tokenizer import Tokenizer
from gqa_serve.errors import RequestError

T = TypeVar("T")

_limiter = anyio.CapacityLimiter(4)

RESPONSE_FORMATS = ("text", "json_object", "json_schema")

Asked = tuple[str, Callable[[], str]]
"""The name of what asks for structured output, and what makes the grammar."""


async def structured_grammar(fields: SamplingFields, tokenizer: Tokenizer) -> str | None:
    """The grammar that the request asks for, checked; None if it asks for none. Raises RequestError."""
    asked = [*_response_format(fields.response_format), *_structured_outputs(fields), *_aliases(fields)]
    if not asked:
        return None
    if len(asked) > 1:
        raise RequestError(
            f"{asked[0][0]} and {asked[1][0]} both ask for structured output; send one of them.",
            param=asked[1][0],
        )
    ((param, make),) = asked
    return await compiling(lambda: make_grammar(param, make, tokenizer))


async def compiling(work: Callable[[], T]) -> T:
    """`work()`, which checks grammars, in a worker thread: in few at a time, since it may take seconds and
    other work (bodies, templates, tokenizing) needs threads too."""
    return await anyio.to_thread.run_sync(work, limiter=_limiter)


def make_grammar(param: str, make: Callable[[], str], tokenizer: Tokenizer) -> str:
    """`make()`, which can be enforced. Raises RequestError naming `param`. Takes up to seconds."""
    with blaming(param):
        grammar = make()
    check_grammar(grammar, tokenizer, param=param)
    return grammar


def _response_format(value: ResponseFormat | None) -> list[Asked]:
    if value is None or value.type == "text":
        return []
    if value.type == "json_schema":
        if value.json_schema is None or value.json_schema.schema in (None, msgspec.UNSET):
            where = "response_format.json_schema"
            where += "" if value.json_schema is None else ".schema"
            raise RequestError(f"Missing required field: {where}.", param=where)
        return [_schema("response_format.json_schema.schema", value.json_schema.schema)]
    if value.type == "json_object":
        if value.schema not in (None, msgspec.UNSET):  # llama.cpp's way to say which object
            return [_schema("response_format.schema", value.schema)]
        return [("response_format", json_object_grammar)]
    raise RequestError(
        f"response_format.type must be one of {', '.join(RESPONSE_FORMATS)}; got {shorten(value.type)!r}.",
        param="response_format.type",
    )


def _structured_outputs(fields: SamplingFields) -> list[Asked]:
    value = fields.structured_outputs
    if value is None:
        return []
    where = "structured_outputs."
    asked = [
        *_texts(where, json=value.json, regex=value.regex, grammar=value.grammar),
        *_choice(where + "choice", value.choice),
    ]
    if value.json_object:
        asked.append((where + "json_object", json_object_grammar))
    if len(asked) != 1:
        raise RequestError(
            "structured_outputs must hold exactly one of json, regex, choice, grammar and json_object: true.",
            param="structured_outputs",
        )
    return asked


def _aliases(fields: SamplingFields) -> list[Asked]:
    return [
        *_texts("guided_", json=fields.guided_json, regex=fields.guided_regex, grammar=fields.guided_grammar),
        *_choice("guided_choice", fields.guided_choice),
        *_texts("", json_schema=fields.json_schema, regex=fields.regex),
        *_texts("", ebnf=fields.ebnf, grammar=fields.grammar),
    ]


_MAKERS: dict[str, Callable[[str], str]] = {
    "regex": regex_grammar,
    "grammar": lark_grammar,
    "ebnf": lark_grammar,
}


def _texts(prefix: str, **values: Any) -> list[Asked]:
    asked: list[Asked] = []
    for name, value in values.items():
        if value in (None, msgspec.UNSET):
            continue
        param = prefix + name
        if name in _MAKERS:
            asked.append((param, lambda name=name, value=value: _MAKERS[name](value)))  # type: ignore[misc]
        else:
            asked.append(_schema(param, value))
    return asked


def _choice(param: str, choices: list[str] | None) -> list[Asked]:
    return [] if choices is None else [(param, lambda: choice_grammar(choices))]


def _schema(param: str, schema: object) -> Asked:
    return param, lambda: json_schema_grammar(_decoded(schema))


def _decoded(schema: object) -> object:
    """A schema may come as JSON text."""
    if not isinstance(schema, str):
        return schema
    try:
        return msgspec.json.decode(schema)
    except (msgspec.DecodeError, RecursionError, UnicodeEncodeError) as error:
        raise RequestError(f"The JSON schema is not valid JSON: {error}.") from error
