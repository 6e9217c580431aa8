"""Answer types that msgspec encodes but would not describe get the schema of what is encoded."""

from __future__ import annotations

import json
from typing import Any

import jsonschema_rs
import msgspec
import pytest

from gqa_serve.api.openapi.describable import Describer

REF = "#/$defs/{name}"


class Text(msgspec.Struct):
    text: str
    type: str = "text"


class Call(msgspec.Struct):
    name: str
    inner: Plain | None = None


class Holder(msgspec.Struct, kw_only=True):
    """Holds parts."""

    parts: list[Text | Call]
    by_name: dict[str, Text | Call | None] = {}
    one: Text | None = None


class Plain(msgspec.Struct):
    text: Text
    again: Plain | None = None


def described(hint: Any) -> dict[str, Any]:
    describer = Describer(REF)
    replaced = describer.replace(hint)
    (schema, *_), components = msgspec.json.schema_components([replaced, *describer.found], ref_template=REF)
    return {**schema, "$defs": components}


def test_a_union_of_structs() -> None:
    validator = jsonschema_rs.Draft202012Validator(described(list[Holder]))
    value = [Holder(parts=[Text("a"), Call("b")], by_name={"c": Call("d"), "e": None}, one=Text("f"))]
    validator.validate(json.loads(msgspec.json.encode(value)))
    assert not validator.is_valid([{"parts": [{"neither": 1}]}])
    assert not validator.is_valid([{}])


@pytest.mark.parametrize("hint", [Plain, list[Plain], dict[str, int] | None, str, Text | None])
def test_what_can_be_described_stays(hint: Any) -> None:
    describer = Describer(REF)
    assert describer.replace(hint) is hint
    assert describer.found == []
