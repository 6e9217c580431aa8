"""The JSON guard alone: depth, and the paths of errors."""

from __future__ import annotations

import json
import math
import re
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gqa_serve.api import json_scan
from gqa_serve.api.errors import error_json, shorten
from gqa_serve.api.json_guard import (
    MAX_CONTAINERS,
    MAX_DEPTH,
    MAX_FIELDS,
    MAX_STRINGS,
    MAX_VALUES,
    decode_body,
    decode_field,
)
from gqa_serve.api.json_scan import scan
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


def counts(value: Any) -> tuple[int, int, int]:
    """Containers, strings and values but the first of each container, by recursion."""
    if isinstance(value, str):
        return 0, 1, 0
    if not isinstance(value, dict | list):
        return 0, 0, 0
    inner = [*value, *value.values()] if isinstance(value, dict) else value
    sums = [sum(numbers) for numbers in zip((0, 0, 0), *map(counts, inner), strict=True)]
    return sums[0] + 1, sums[1], sums[2] + max(0, len(value) - 1)


@given(tree=trees, indent=st.none() | st.integers(0, 2), piece=st.sampled_from([1, 2, 3, 7, 64, 2**18]))
def test_everything_is_counted_as_by_recursion(tree: Any, indent: int | None, piece: int) -> None:
    body = json.dumps(tree, indent=indent).encode()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_scan, "_PIECE_BYTES", piece)
        found = scan(body)
    assert found.depth == depth(tree)
    assert (found.containers, found.strings, found.values) == counts(tree)
    assert found.fields == (max(0, len(tree) - 1) if isinstance(tree, dict | list) else 0)


numbers = st.one_of(
    st.integers(),
    st.floats(allow_nan=False, allow_infinity=False),
    st.builds(lambda n, e: f"{'1' * n}e{e}", st.integers(1, 309), st.integers(-400, 400)),
    st.builds(lambda n, e: f"0.{'0' * n}1E+{e:04}", st.integers(0, 300), st.integers(0, 700)),
    st.builds(lambda n: "-" + "9" * n, st.integers(1, 320)),
    st.sampled_from(["1e308", "1.8e308", "-2e+308", "1e-999", "12345678901e298", "12345678901e297"]),
)


@given(st.lists(numbers, min_size=1, max_size=4), st.sampled_from([1, 5, 100, 2**18]))
def test_numbers_that_are_too_large_are_found(values: list[object], piece: int) -> None:
    texts = list(map(str, values))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_scan, "_PIECE_BYTES", piece)
        found = scan(("[" + ", ".join(texts) + "]").encode()).has_too_large_number
    long = any(len(digits) > json_scan.MAX_DIGITS for text in texts for digits in re.findall(r"\d+", text))
    assert found == (long or any(math.isinf(float(text)) for text in texts))


@given(st.binary(max_size=60), st.sampled_from([1, 4, 2**18]))
def test_what_is_no_json_is_scanned_too(text: bytes, piece: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_scan, "_PIECE_BYTES", piece)
        scan(text)


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
    ("body", "what"),
    [
        (b'{"extra":[' + b'"",' * MAX_STRINGS + b'""]}', f"{MAX_STRINGS} strings"),
        (b'{"extra":[' + b"1," * (MAX_VALUES + 1) + b"1]}", f"{MAX_VALUES} values"),
        (b"{" + b",".join(b'"%d":1' % n for n in range(5 * MAX_FIELDS)) + b"}", f"{MAX_FIELDS} fields"),
        (b'{"extra":"' + b"\\n" * 2_000_001 + b'"}', "2000000 backslashes"),
        (b'{"extra":[' + b"1e100," * 1001 + b"1]}", "1000 numbers with exponents"),
    ],
)
def test_what_would_hold_the_interpreter_for_long_is_not_decoded(
    body: bytes, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(msgspec.json, "decode", lambda *args, **options: pytest.fail("decoded"))
    with pytest.raises(RequestError, match=f"more than {what}"):
        decode_body(body, Body)


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
