"""A client's JSON schema as llguidance takes it, made exact where llguidance alone is not.

Owns what is said to the schema compiler beside the schema: white space, strictness, and additions to some
keywords. Knows no grammar and no tokenizer. Invariant: what the result describes satisfies the schema that
was given; a schema for which that cannot be had is refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from gqa_serve.errors import RequestError

MAX_SCHEMA_DEPTH = 64

_OPTIONS_KEY = "x-guidance"
_OPTIONS = {
    "whitespace_flexible": False,
    "item_separator": ", ?",
    "key_separator": ": ?",
    "lenient": False,
    "coerce_one_of": False,
}
# Where schemas are in a schema.
_SCHEMAS = ("items", "additionalProperties")
_LISTS = ("allOf", "anyOf", "oneOf", "prefixItems")
_MAPS = ("properties", "patternProperties", "$defs", "definitions")
# What a format leaves out: no leap seconds, which are right only in some minutes; no local part of an address
# that is too long.
_FORMAT_PATTERNS = {
    "time": "^[0-9]{2}:[0-9]{2}:[0-5]",
    "date-time": "^[^:]*:[0-9]{2}:[0-5]",
    "email": "^[^@]{1,64}@",
}


def enforceable(schema: Any) -> dict[str, Any]:
    """`schema` (an object, or a boolean) with what makes the compiler keep to it.

    Raises RequestError, naming the keyword; the compiler refuses many more.
    """
    if schema is True:
        schema = {}
    if schema is False:
        raise RequestError("The JSON schema is false, which nothing satisfies.")
    if not isinstance(schema, dict):
        raise RequestError("A JSON schema is an object.")
    if _OPTIONS_KEY in schema:
        raise RequestError(f"{_OPTIONS_KEY} is not a keyword of JSON schemas; leave it out.")
    _check_depth(schema)
    return {**_exact(schema), _OPTIONS_KEY: _OPTIONS}


def _check_depth(schema: dict[str, Any]) -> None:
    level: list[Any] = [schema]
    for _ in range(MAX_SCHEMA_DEPTH):
        level = [
            inner
            for value in level
            for inner in (value.values() if isinstance(value, dict) else value)
            if isinstance(inner, dict | list)
        ]
        if not level:
            return
    raise RequestError(f"The JSON schema is nested more than {MAX_SCHEMA_DEPTH} levels deep.")


def _exact(schema: Any) -> Any:
    """A schema, and those in it, with their own additions."""
    if not isinstance(schema, dict):
        return schema
    _check(schema)
    result = {name: _exact_part(name, value) for name, value in schema.items()}
    if result.get("uniqueItems") is False:
        del result["uniqueItems"]  # says nothing
    name = result.get("format")
    if isinstance(name, str) and name in _FORMAT_PATTERNS:
        others = result.get("allOf")
        pattern = {"pattern": _FORMAT_PATTERNS[name]}
        result["allOf"] = [*others, pattern] if isinstance(others, list) else [pattern]
    return result


def _exact_part(name: str, value: Any) -> Any:
    if name in _SCHEMAS:
        return _exact(value)
    if name in _LISTS and isinstance(value, list):
        return [_exact(inner) for inner in value]
    if name in _MAPS and isinstance(value, dict):
        return {key: _exact(inner) for key, inner in value.items()}
    return value


def _check(schema: dict[str, Any]) -> None:
    for problem in _problems(schema):
        raise RequestError(f"The JSON schema cannot be enforced: {problem}.")


def _problems(schema: dict[str, Any]) -> Iterator[str]:
    if isinstance(schema.get("items"), list):
        yield "items is one schema; a list of schemas for the first items is called prefixItems"
    if "additionalItems" in schema:
        yield "additionalItems is called items, beside prefixItems"
    least, required = schema.get("minProperties"), schema.get("required")
    # A property without a schema of its own may come twice, and counts once.
    surely = len(set(map(str, required))) if isinstance(required, list) else 0
    if isinstance(least, int | float) and least > surely + 1:
        yield f"minProperties is {least}, but only {surely} properties are required; name more in required"
