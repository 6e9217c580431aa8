"""The JSON guard alone: depth, and the paths of errors."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gqa_serve.api.errors import error_json, shorten
from gqa_serve.api.json_guard import MAX_CONTAINERS, MAX_DEPTH, _deeper_than, decode_body, decode_field
from gqa_serve.errors import RequestError


class Inner(msgspec.Struct):
    name: str
    values: dict[str, float] | None = None


class Body(msgspec.Struct):
    items: list[Inner] = []
    extra: Any = None


def depth(value: Any) -> int:
    if isinstance(value, dict):
        return 1 + max(map(depth, value.values()), default=0)
    if isinstance(value, list):
        return 1 + max(map(depth, value), default=0)
    return 0


trees = st.recursive(
    st.text(alphabet='[]{}"\\,:a\u00e9', max_size=6) | st.integers() | st.none(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(alphabet='[{"\\', max_size=3), inner, max_size=3)
    ),
    max_leaves=30,
)


@given(tree=trees, limit=st.integers(0, 8), indent=st.none() | st.integers(0, 2))
def test_depth_as_counted_by_recursion(tree: Any, limit: int, indent: int | None) -> None:
    body = json.dumps(tree, indent=indent).encode()
    assert _deeper_than(body, limit) == (depth(tree) > limit)


@pytest.mark.parametrize(("levels", "fits"), [(MAX_DEPTH - 1, True), (MAX_DEPTH, False)])
def test_depth_limit_counts_the_body_itself(levels: int, fits: bool) -> None:
    body = b'{"extra":' + b"[" * levels + b"]" * levels + b"}"
    if fits:
        decode_body(body, Body)
    else:
        with pytest.raises(RequestError, match="nested more than 64"):
            decode_body(body, Body)


@pytest.mark.parametrize("item", [b"[1]", b"{}", b'{"role":"user"}'])
def test_the_number_of_objects_and_lists_is_limited(item: bytes) -> None:
    """Millions fit into a body, and decoding them holds the interpreter, so every stream, for seconds."""
    fitting = MAX_CONTAINERS - 2  # beside the body and the list
    decode_body(b'{"extra":[' + b",".join([item] * fitting) + b"]}", Body)
    decode_body(json.dumps({"extra": "[{" * MAX_CONTAINERS}).encode(), Body)
    with pytest.raises(RequestError, match="more than 200000 objects and lists"):
        decode_body(b'{"extra":[' + b",".join([item] * (fitting + 1)) + b"]}", Body)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"items": 3}, "items"),
        ({"items": [{}]}, "items[0].name"),
        ({"items": [{"name": "a"}, {"name": 1}]}, "items[1].name"),
        ({"items": [{"name": "a", "values": {"k": "v"}}]}, "items[0].values"),
    ],
)
def test_error_paths(body: Any, param: str) -> None:
    with pytest.raises(RequestError) as caught:
        decode_body(json.dumps(body).encode(), Body)
    assert caught.value.param == param
    assert param in caught.value.message


def test_raw_fields_keep_what_the_struct_drops() -> None:
    body, raw = decode_body(b'{"items": [], "other": {"a": [1, 2]}}', Body)
    assert body == Body()
    assert decode_field("other", raw["other"]) == {"a": [1, 2]}


def test_a_raw_field_that_cannot_be_decoded_names_itself() -> None:
    for decode in (
        lambda: decode_field("other", msgspec.Raw(b"1e999")),
        lambda: decode_body(b'{"fine": 1e3, "other": 1e999}', Body),
    ):
        with pytest.raises(RequestError, match=r"^other holds a number that is too large") as caught:
            decode()
        assert caught.value.param == "other"


@pytest.mark.parametrize(
    ("body", "lone"),
    [
        (rb'{"a":"\ud83d\ude00"', False),
        (rb'{"a":"\\ud800"', False),
        (rb'{"a":"\ud800"', True),
        (rb'{"a":"\ud83d\ude00\ude00"}', True),
        (rb'{"a":"\\\udc00"}', True),
        (rb'{"a":"\ud800', True),
    ],
)
def test_a_lone_surrogate_is_named_only_where_there_is_one(body: bytes, lone: bool) -> None:
    with pytest.raises(RequestError) as caught:
        decode_body(body, Body)
    assert ("lone surrogate" in caught.value.message) == lone
    assert ("truncated" in caught.value.message) == (not lone)


@given(text=st.text(), limit=st.integers(3, 50))
def test_shorten(text: str, limit: int) -> None:
    short = shorten(text, limit)
    assert len(short) <= limit
    assert short == text or len(text) > limit


def test_error_bodies_are_bounded() -> None:
    body = error_json(RequestError("m" * 10**6, param="p" * 10**6, code="c"))
    assert len(body) < 1200
    assert json.loads(body)["error"]["code"] == "c"
