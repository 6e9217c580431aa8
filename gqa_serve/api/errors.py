"""OpenAI error bodies: `{"error": {"message", "type", "param", "code"}}`, all four keys, everywhere.

Owns how an exception becomes an HTTP response, or an SSE event once a stream has begun. Knows nothing of
requests, engines or text. Invariant: whatever a client sends back to itself through a message is shortened,
so an error is never larger than about a kilobyte.
"""

from __future__ import annotations

import logging

import msgspec
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import ExceptionHandler

from gqa_serve.api.exchange import exchange_of
from gqa_serve.errors import EngineUnavailableError, QueueFullError, QueueTimeoutError, RequestError

MAX_MESSAGE_CHARS = 800
ENGINE_RETRY_AFTER_S = 5  # an engine restart takes seconds; the OpenAI client retries by itself

logger = logging.getLogger(__name__)


class PayloadTooLargeError(RequestError):
    """The body exceeds `--max-body-bytes`."""

    status = 413

    def __init__(self, limit_bytes: int) -> None:
        super().__init__(
            f"The request body is larger than {limit_bytes} bytes. Send less, or raise --max-body-bytes.",
            code="request_too_large",
        )


class MethodNotAllowedError(RequestError):
    """The route exists, for other methods."""

    status = 405


class ErrorDetail(msgspec.Struct):
    """The four keys of an OpenAI error."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(msgspec.Struct):
    """The whole JSON body of an error."""

    error: ErrorDetail


def shorten(text: str, limit: int = 80) -> str:
    """`text`, at most `limit` characters, its middle replaced by an ellipsis; for echoing user input."""
    if len(text) <= limit:
        return text
    half = (limit - 1) // 2
    return f"{text[:half]}…{text[-half:]}"


def error_json(error: Exception) -> bytes:
    """The encoded body for `error`; anything but a RequestError is reported as an internal error."""
    if isinstance(error, RequestError):
        param = None if error.param is None else shorten(error.param, 200)
        detail = ErrorDetail(shorten(error.message, MAX_MESSAGE_CHARS), error.type, param, error.code)
    else:
        detail = ErrorDetail(
            "The server failed while answering; its log says why.", "server_error", None, "internal_error"
        )
    return msgspec.json.encode(ErrorBody(detail))


def error_response(error: Exception, headers: dict[str, str] | None = None) -> Response:
    """The HTTP response for `error`, with Retry-After where trying again can help."""
    headers = dict(headers or {})
    if isinstance(error, RequestError):
        headers.update(error.headers)
    if isinstance(error, QueueFullError | QueueTimeoutError):
        headers["Retry-After"] = str(error.retry_after_s)
    elif isinstance(error, EngineUnavailableError):
        headers["Retry-After"] = str(ENGINE_RETRY_AFTER_S)
    status = error.status if isinstance(error, RequestError) else 500
    return Response(error_json(error), status, headers, "application/json")


async def _on_request_error(request: Request, error: Exception) -> Response:
    exchange_of(request.scope).error = error
    return error_response(error)


def http_error(request: Request, error: Exception) -> RequestError:
    """Starlette's own 404 and 405 (and whatever else it raises)."""
    if not isinstance(error, HTTPException):
        raise TypeError(f"expected an HTTPException, got {type(error).__name__}")
    where = f"{request.method} {shorten(request.url.path)}"
    mapped: RequestError
    if error.status_code == 404:
        mapped = RequestError(f"Unknown route: {where}.", code="unknown_url")
    elif error.status_code == 405:
        allow = (error.headers or {}).get("Allow", "")
        mapped = MethodNotAllowedError(f"{where} is not possible; use {allow}.", code="method_not_allowed")
    else:
        mapped = RequestError(f"{where}: {error.detail}")
    mapped.status = error.status_code
    return mapped


async def on_http_exception(request: Request, error: Exception) -> Response:
    """An unknown path or method, in OpenAI's shape."""
    return error_response(http_error(request, error), dict(getattr(error, "headers", None) or {}))


async def _on_disconnect(request: Request, error: Exception) -> Response:
    """The client left; nobody reads this. 499 is what nginx logs for it."""
    return Response(status_code=499)


async def _on_exception(request: Request, error: Exception) -> Response:
    """A bug. Starlette raises it again after this answer, so that the server logs the traceback."""
    return error_response(error)


EXCEPTION_HANDLERS: dict[int | type[Exception], ExceptionHandler] = {
    RequestError: _on_request_error,
    HTTPException: on_http_exception,
    ClientDisconnect: _on_disconnect,
    Exception: _on_exception,
}
