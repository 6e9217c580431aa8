"""JSON schemas by keyword: those that are enforced, with schemas to try each, and those that are refused.

`docs/structured_output.md` lists the same keywords; `test_structured_output.py` compares.
"""

from __future__ import annotations

from typing import Any

Schema = dict[str, Any]

INT: Schema = {"type": "integer", "minimum": -99, "maximum": 99}
TEXT: Schema = {"type": "string", "maxLength": 6}
FORMATS = ("date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uri", "uuid")
LONG_FORMATS = ("email", "hostname", "uri", "duration")


def obj(properties: Schema, **more: Any) -> Schema:
    return {"type": "object", "properties": properties, "additionalProperties": False, **more}


def array(items: Any, **more: Any) -> Schema:
    return {"type": "array", "items": items, "maxItems": 3, **more}


def chain(anchor: str, ref: str) -> Schema:
    """A list of at most a few links, by reference."""
    link = obj({"v": INT, "next": {"anyOf": [{"type": "null"}, INT]}}, required=["v"])
    return {"$defs": {"link": {anchor: "link", **link} if anchor else link}, **array({"$ref": ref})}


_TREE = {"$ref": "#/$defs/t", "$defs": {"t": {"anyOf": [INT, array({"$ref": "#/$defs/t"}, maxItems=1)]}}}
_KINDS = [obj({"kind": {"const": kind}, kind: INT}, required=["kind"]) for kind in ("a", "b")]
_MAP: Schema = {"type": "object", "patternProperties": {"^[a-c]{2}$": INT}, "additionalProperties": False}

ENFORCED: dict[str, list[Schema]] = {
    "type": [{"type": ["boolean", "null"]}, {"type": ["integer", "null"], "maximum": 9, "minimum": -9}],
    "enum": [{"enum": [1, "a b", None, {"x": [1]}, -2.5, "é\n"]}],
    "const": [{"const": {"a": [1, "x", None], "b": {}}}, {"const": '\\"/\t'}],
    "properties": [
        obj({"a": INT, "b": TEXT, "c": {"type": "boolean"}}),
        obj({"ab": INT}, patternProperties={"^b": INT}),
    ],
    "required": [obj({"a": INT, "b": TEXT, "c": INT}, required=["c", "a"])],
    "additionalProperties": [
        {
            "type": "object",
            "properties": {"a": INT},
            "additionalProperties": {"const": 1},
            "maxProperties": 2,
            "required": ["a"],
        }
    ],
    "patternProperties": [{**_MAP, "maxProperties": 3}],
    "minProperties": [
        {**_MAP, "minProperties": 1, "maxProperties": 3},
        {**_MAP, "properties": {"x": INT}, "required": ["x"], "minProperties": 2, "maxProperties": 3},
    ],
    "maxProperties": [{**_MAP, "maxProperties": 0}, {**_MAP, "maxProperties": 2}],
    "items": [array(INT), array({"enum": ["x", 1]})],
    "prefixItems": [
        {"type": "array", "prefixItems": [INT, TEXT], "items": False},
        {"type": "array", "prefixItems": [TEXT], "items": INT, "maxItems": 3},
    ],
    "minItems": [array(INT, minItems=2)],
    "maxItems": [array(INT, maxItems=1), array(INT, maxItems=0)],
    "minLength": [{"type": "string", "minLength": 5, "maxLength": 7}],
    "maxLength": [{"type": "string", "maxLength": 3}, {"type": "string", "maxLength": 0}],
    "pattern": [
        {"type": "string", "pattern": pattern, "maxLength": 9}
        for pattern in (
            "^a+b?$",
            "[0-9]{3}$",
            "^(x|yz){2}",
            r"\d{2}",
            r"^\w{3}$",
            r"^\S{1,5}$",
            '^[^"]{3}$',
            r"\.(py|c)$",
        )
    ],
    "format": [
        {"type": "string", "format": name} | ({"maxLength": 20} if name in LONG_FORMATS else {})
        for name in FORMATS
    ],
    "minimum": [
        {"type": "integer", "minimum": 7, "maximum": 12},
        {"type": "number", "minimum": -0.5, "maximum": 0.5, "multipleOf": 0.125},
    ],
    "maximum": [{"type": "integer", "minimum": -1000, "maximum": -998}],
    "exclusiveMinimum": [{"type": "integer", "exclusiveMinimum": 7, "maximum": 9}],
    "exclusiveMaximum": [{"type": "integer", "minimum": 7, "exclusiveMaximum": 9}],
    "multipleOf": [
        {"type": "integer", "multipleOf": 7, "minimum": 0, "maximum": 100},
        {"type": "number", "multipleOf": 0.25, "minimum": 0, "maximum": 3},
    ],
    "anyOf": [{"anyOf": [INT, obj({"a": INT}, required=["a"]), array({"type": "boolean"})]}],
    "allOf": [
        {
            "allOf": [
                {"type": "object", "properties": {"a": INT}, "required": ["a"]},
                {"properties": {"b": {"const": 1}}, "required": ["b"], "maxProperties": 2},
            ]
        },
        {"allOf": [{"type": "integer", "minimum": 3}, {"maximum": 6}]},
    ],
    "oneOf": [{"oneOf": [TEXT, INT]}, {"oneOf": _KINDS}],
    "$ref": [_TREE, {"$ref": "#/$defs/x", "minimum": 5, "maximum": 9, "$defs": {"x": {"type": "integer"}}}],
    "$defs": [chain("", "#/$defs/link")],
    "$anchor": [chain("$anchor", "#link")],
    "$id": [chain("$id", "link")],
}

_ANNOTATIONS: Schema = {
    "title": "t",
    "description": "d",
    "default": "x",
    "examples": [1],
    "deprecated": True,
    "readOnly": True,
    "writeOnly": False,
    "$comment": "c",
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    "$vocabulary": {},
    "contentEncoding": "base64",
    "contentMediaType": "text/plain",
    "contentSchema": {},
}
ANNOTATIONS: dict[str, Schema] = {name: {name: value, **INT} for name, value in _ANNOTATIONS.items()}

REFUSED: dict[str, Schema] = {
    "not": {"not": {"type": "string"}},
    "if": {"if": {"type": "string"}},
    "then": {"then": {"minLength": 1}},
    "else": {"else": {"minLength": 1}},
    "contains": {"type": "array", "contains": {"const": 1}},
    "minContains": {"type": "array", "minContains": 1},
    "maxContains": {"type": "array", "maxContains": 1},
    "uniqueItems": {"type": "array", "uniqueItems": True},
    "propertyNames": {"propertyNames": {"pattern": "^a"}},
    "dependentRequired": {"dependentRequired": {"a": ["b"]}},
    "dependentSchemas": {"dependentSchemas": {"a": {"required": ["b"]}}},
    "unevaluatedItems": {"unevaluatedItems": False},
    "unevaluatedProperties": {"unevaluatedProperties": False},
    "$dynamicRef": {"$dynamicRef": "#x"},
    "$dynamicAnchor": {"$dynamicAnchor": "x"},
}

BEYOND_LIMITS: list[tuple[Schema, str]] = [
    ({"type": "string", "format": "idn-email"}, "idn-email"),
    ({"type": "string", "pattern": "(?=a)b"}, "look"),
    ({"type": "integer", "multipleOf": 99_999_999_999}, "multipleOf"),
    ({"oneOf": [{"type": "string"}, {"type": "string", "maxLength": 3}]}, "oneOf"),
    ({"type": "object", "patternProperties": {"^a": INT, "^ab": INT}}, "disjoint"),
    ({"type": "object", "properties": {"a": INT, "b": INT}, "maxProperties": 1}, "maxProperties"),
    ({**_MAP, "minProperties": 2}, "minProperties"),
    ({"type": "array", "items": [INT]}, "prefixItems"),
    ({"type": "array", "prefixItems": [INT], "additionalItems": False}, "additionalItems"),
    ({"$ref": "https://example.com/schema"}, "https://example.com/schema"),
    ({"$ref": "#/$defs/none"}, "/$defs/none"),
    ({"type": "integer", "minimum": 3, "maximum": 2}, "minimum"),
    ({"enum": []}, "Unsatisfiable"),
    ({"type": "strin"}, "strin"),
    ({"pattern": 5}, "pattern"),
]
