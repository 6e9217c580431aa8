"""From the bytes of a request body to a typed request, refusing what no client means to send.

Owns the body size limit and the JSON rules: UTF-8, one object, at most `MAX_DEPTH` levels and so many
objects, lists, strings, values and fields (`json_scan.py` counts), no NaN, Infinity, numbers of absurd size
or lone surrogates, in unknown fields neither (msgspec's decoder enforces some of that where it decodes; this
module looks at the rest, and words the errors).
Knows field types only through the msgspec struct it is given. Invariant: any input ends in a value of that
struct or in a RequestError whose `param` is the path of the offending field.
"""

from __future__ import annotations

import re
from typing import TypeVar

import anyio.to_thread
import msgspec
from starlette.requests import Request

from gqa_serve.api.body_budget import BodyBudget, Held
from gqa_serve.api.errors import PayloadTooLargeError, shorten
from gqa_serve.api.json_scan import Counts, scan
from gqa_serve.errors import RequestError

MAX_DEPTH = 64
# Decoding millions of anything would stop all else for seconds: it holds the interpreter's lock.
MAX_CONTAINERS = 200_000
MAX_STRINGS = 400_000  # keys included
MAX_VALUES = 2_000_000
MAX_BACKSLASHES = 2_000_000
MAX_FIELDS = 1000
MAX_EXPONENTS = 1000
_SMALL_BYTES = 16 * 1024  # cannot hold too many of anything
LARGE_BODY_BYTES = 128 * 1024  # above this, decoding takes milliseconds and moves to a worker thread

T = TypeVar("T")
RawFields = dict[str, msgspec.Raw]

_ESCAPE = re.compile(  # a surrogate pair, a lone surrogate (captured), or any other escape
    rb"\\(?:u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}|(u[dD][89a-fA-F][0-9a-fA-F]{2})|.)",
    re.DOTALL,
)
_ODD_NUMBER = re.compile(rb"\d{100}|\d[eE]")
_AROUND_BYTES = 256  # of a place in the body that is looked at to word an error
_PAIR_BYTES = 12  # of two escapes that are one character
_BYTE = re.compile(r"\(byte (\d+)\)")
_WHERE = re.compile(r"^(?P<what>.*?)(?: - at (?:`key` in )?`\$\.?(?P<path>.*)`)?$", re.DOTALL)
_MISSING = re.compile(r"missing required field `([^`]*)`")


async def read_request(request: Request, budget: BodyBudget, type: type[T]) -> tuple[T, RawFields]:
    """The decoded body and its top-level fields as they came. Raises RequestError (400, 413, 503)."""
    with budget.held() as held:
        body = await _read_body(request, budget.max_body_bytes, held)
        if len(body) < LARGE_BODY_BYTES:
            return decode_body(body, type)
        return await anyio.to_thread.run_sync(decode_body, body, type)


async def _read_body(request: Request, limit_bytes: int, held: Held) -> bytes:
    """Reads no more than the limit, whether the client announced the length or sends chunks."""
    announced = request.headers.get("content-length", "")
    if announced.isdecimal() and (len(announced) > 18 or int(announced) > limit_bytes):
        raise PayloadTooLargeError(limit_bytes)  # before a client that waits for 100 Continue sends it
    parts: list[bytes] = []
    size = 0
    async for part in request.stream():
        size += len(part)
        if size > limit_bytes:
            raise PayloadTooLargeError(limit_bytes)
        held.grow(size)
        parts.append(part)
    return b"".join(parts)


def decode_body(body: bytes, type: type[T]) -> tuple[T, RawFields]:
    """`body` as a `type` (a msgspec struct) and as raw top-level fields. Raises RequestError."""
    if not body.strip():
        raise RequestError("The request body is empty; send a JSON object.")
    try:
        body.decode("utf-8")
    except UnicodeDecodeError as error:
        raise RequestError(f"The request body is not valid UTF-8 (byte {error.start}).") from error
    too_deep = RequestError(f"The request body is nested more than {MAX_DEPTH} levels deep.")
    counts = _counts(body)
    _check_counts(counts)
    try:
        raw = msgspec.json.decode(body, type=RawFields)
        if counts.depth > MAX_DEPTH:
            raise too_deep
        fields = msgspec.json.decode(body, type=type)
    except RecursionError as error:
        raise too_deep from error
    except msgspec.ValidationError as error:
        raise _validation_error(str(error)) from error
    except msgspec.DecodeError as error:
        raise _syntax_error(str(error), body) from error
    if counts.has_too_large_number:  # in fields that nobody decodes, too
        odd = (name for name, value in raw.items() if _counts(bytes(value)).has_too_large_number)
        raise _number_error(next(odd, None))
    return fields, raw


def _counts(body: bytes) -> Counts:
    """What `body` holds; for most small ones a look tells that it is nothing worth counting."""
    small = len(body) < _SMALL_BYTES and body.count(b"[") + body.count(b"{") <= MAX_DEPTH
    return Counts() if small and not _ODD_NUMBER.search(body) else scan(body, most_exponents=MAX_EXPONENTS)


def _check_counts(counts: Counts) -> None:
    for what, number, most in (
        ("objects and lists", counts.containers, MAX_CONTAINERS),
        ("strings", counts.strings, MAX_STRINGS),
        ("values", counts.values, MAX_VALUES),
        ("fields", counts.fields, MAX_FIELDS),
        ("backslashes", counts.backslashes, MAX_BACKSLASHES),
        ("numbers with exponents of three digits", counts.large_exponents, MAX_EXPONENTS),
    ):
        if number > most:
            raise RequestError(f"The request body holds more than {most} {what}.")


def _number_error(name: str | None) -> RequestError:
    where = "The request body" if name is None else shorten(name, 200)
    return RequestError(f"{where} holds a number that is too large.", param=name)


def decode_field(name: str, raw: msgspec.Raw) -> object:
    """One raw field as plain Python values. Raises RequestError naming it."""
    try:
        value: object = msgspec.json.decode(raw)
    except msgspec.DecodeError as error:  # of well-formed JSON, only numbers can fail to be Python values
        raise _number_error(name) from error
    return value


def _validation_error(text: str) -> RequestError:
    """msgspec's "Expected `str`, got `int` - at `$.messages[0].role`", with the path as `param`."""
    match = _WHERE.match(text)
    what, path = (match["what"], match["path"] or "") if match else (text, "")
    if missing := _MISSING.search(what):
        param = f"{path}.{missing[1]}" if path else missing[1]
        return RequestError(f"Missing required field: {shorten(param, 200)}.", param=param)
    path = path.partition("[...]")[0]  # msgspec's word for a key it does not name
    what = what.replace("`str", "`string").replace("| str", "| string")
    if not path:
        return RequestError(f"The request body must be a JSON object: {what[:1].lower() + what[1:]}.")
    return RequestError(f"Invalid {shorten(path, 200)}: {what[:1].lower() + what[1:]}.", param=path)


def _syntax_error(text: str, body: bytes) -> RequestError:
    reason = text.removeprefix("JSON is malformed: ")
    place = _BYTE.search(text)
    near = int(place[1]) if place else len(body)
    start = max(0, near - _AROUND_BYTES)
    start += (
        len(body[:start]) - len(body[:start].rstrip(b"\\"))
    ) % 2  # not between a backslash and its letter
    around = body[start : near + _AROUND_BYTES]
    if any(
        match[1] for match in _ESCAPE.finditer(around) if abs(start + match.end() - near) < _PAIR_BYTES * 2
    ):
        return RequestError(
            "The request body holds a lone surrogate, which is not valid Unicode: an escape such as \\ud800 "
            "must be one half of a pair.",
            code="invalid_json",
        )
    hint = ""
    if re.search(rb"[:,\[]\s*-?(NaN|Infinity)", around):
        hint = " NaN and Infinity are not JSON."
    return RequestError(f"The request body is not valid JSON: {reason}.{hint}", code="invalid_json")
