"""From the bytes of a request body to a typed request, refusing what no client means to send.

Owns the body size limit and the JSON rules: UTF-8, one object, at most `MAX_DEPTH` levels and
`MAX_CONTAINERS` objects and lists, no NaN, Infinity, numbers of absurd size or lone surrogates, in unknown
fields neither (msgspec's decoder enforces most of that where it decodes; this module looks at the rest, and
words the errors).
Knows field types only through the msgspec struct it is given. Invariant: any input ends in a value of that
struct or in a RequestError whose `param` is the path of the offending field.
"""

from __future__ import annotations

import re
from typing import TypeVar

import anyio.to_thread
import msgspec
from starlette.requests import Request

from gqa_serve.api.errors import PayloadTooLargeError, shorten
from gqa_serve.errors import RequestError

MAX_DEPTH = 64
MAX_CONTAINERS = 200_000  # objects and lists; decoding millions of them would stop all else for seconds
LARGE_BODY_BYTES = 128 * 1024  # above this, decoding takes milliseconds and moves to a worker thread

T = TypeVar("T")
RawFields = dict[str, msgspec.Raw]

_STRING = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"')
_NOT_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))
_ESCAPE = re.compile(  # a surrogate pair, a lone surrogate (captured), or any other escape
    rb"\\(?:u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}|(u[dD][89a-fA-F][0-9a-fA-F]{2})|.)",
    re.DOTALL,
)
# Numbers beyond 64-bit floats have this many digits or an exponent. The look-behind keeps the search linear.
_MAX_DIGITS = 308
_LONG_NUMBER = re.compile(rb"(?<!\d)\d{%d}" % (_MAX_DIGITS + 1))
_SUSPICIOUS_NUMBER = re.compile(rb"(?<!\d)\d{%d}|\d[eE]" % (_MAX_DIGITS + 1))
_WHERE = re.compile(r"^(?P<what>.*?)(?: - at (?:`key` in )?`\$\.?(?P<path>.*)`)?$", re.DOTALL)
_MISSING = re.compile(r"missing required field `([^`]*)`")


async def read_request(request: Request, limit_bytes: int, type: type[T]) -> tuple[T, RawFields]:
    """The decoded body and its top-level fields as they came. Raises RequestError (400, 413)."""
    body = await _read_body(request, limit_bytes)
    if len(body) < LARGE_BODY_BYTES:
        return decode_body(body, type)
    return await anyio.to_thread.run_sync(decode_body, body, type)


async def _read_body(request: Request, limit_bytes: int) -> bytes:
    """Reads no more than the limit, whether the client announced the length or sends chunks."""
    announced = request.headers.get("content-length", "")
    if announced.isdecimal() and (len(announced) > 18 or int(announced) > limit_bytes):
        raise PayloadTooLargeError(limit_bytes)
    parts: list[bytes] = []
    size = 0
    async for part in request.stream():
        size += len(part)
        if size > limit_bytes:
            raise PayloadTooLargeError(limit_bytes)
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
    try:
        raw = msgspec.json.decode(body, type=RawFields)
        if _deeper_than(body, MAX_DEPTH):
            raise too_deep
        if _more_containers_than(body, MAX_CONTAINERS):
            raise RequestError(f"The request body holds more than {MAX_CONTAINERS} objects and lists.")
        fields = msgspec.json.decode(body, type=type)
    except RecursionError as error:
        raise too_deep from error
    except msgspec.ValidationError as error:
        raise _validation_error(str(error)) from error
    except msgspec.DecodeError as error:
        raise _syntax_error(str(error), body) from error
    _check_numbers(body, raw)
    return fields, raw


def _check_numbers(body: bytes, raw: RawFields) -> None:
    """Raises RequestError for numbers that no 64-bit float can hold, in fields that nobody decodes too."""
    if _numbers_fit(body):
        return
    name = next((name for name, value in raw.items() if not _numbers_fit(bytes(value))), None)
    raise _number_error(name)


def _numbers_fit(data: bytes) -> bool:
    """Whether well-formed JSON has only numbers of at most 308 digits that do not overflow."""
    if not _SUSPICIOUS_NUMBER.search(data):
        return True
    plain = _STRING.sub(b'""', data)
    if _LONG_NUMBER.search(plain):
        return False
    if _SUSPICIOUS_NUMBER.search(plain):
        try:
            msgspec.json.decode(plain)
        except msgspec.DecodeError:  # nothing but a number can be wrong with it
            return False
    return True


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


def _deeper_than(body: bytes, limit: int) -> bool:
    """Whether well-formed JSON nests deeper than `limit`, by erasing one level of brackets per round.

    All passes run in C, so a hostile body of many megabytes costs milliseconds, not seconds.
    """
    if body.count(b"[") + body.count(b"{") <= limit:
        return False
    brackets = _STRING.sub(b"", body).translate(None, _NOT_BRACKETS)
    brackets = brackets.replace(b"{", b"[").replace(b"}", b"]")  # well-formed: the kinds cannot mix
    for _ in range(limit):
        if not brackets:
            break
        brackets = brackets.replace(b"[]", b"")
    return bool(brackets)


def _more_containers_than(body: bytes, limit: int) -> bool:
    """Whether well-formed JSON has more than `limit` objects and lists."""
    if body.count(b"[") + body.count(b"{") <= limit:
        return False
    plain = _STRING.sub(b"", body)
    return plain.count(b"[") + plain.count(b"{") > limit


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
    if any(match[1] for match in _ESCAPE.finditer(body)):
        return RequestError(
            "The request body holds a lone surrogate, which is not valid Unicode: an escape such as \\ud800 "
            "must be one half of a pair.",
            code="invalid_json",
        )
    hint = ""
    if re.search(rb"[:,\[]\s*-?(NaN|Infinity)", body):
        hint = " NaN and Infinity are not JSON."
    return RequestError(f"The request body is not valid JSON: {reason}.{hint}", code="invalid_json")
