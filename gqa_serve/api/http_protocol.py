"""`HttpProtocol`: uvicorn's HTTP/1.1 connection, with what an application cannot do for itself.

Owns the answer to bytes that are no HTTP request (JSON, like every other error), to heads without an end and
to connections beyond the limit; what happens to clients that send or read too slowly (`ReadClock`, `Outlet`);
streams to HTTP/1.0 clients, which know no chunks; offers to upgrade the protocol, which are declined; that
every pipelined request learns when its client leaves, and why. Knows no routes. Pass what `http_protocol`
returns as `uvicorn.Config(http=...)`. Invariant: no client holds a connection for ever, but by sending and
reading what it asked for; and an answer is not lost because its client was still sending.
"""

from __future__ import annotations

import asyncio
import http
import logging
import re
import uuid
from typing import Any, cast

import httptools
from starlette.types import Scope
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from gqa_serve.api.connection_limits import REFUSED_AT_ONCE, ConnectionLimits
from gqa_serve.api.errors import error_json
from gqa_serve.api.outlet import Outlet
from gqa_serve.api.read_clock import ReadClock
from gqa_serve.errors import RequestError

MAX_HEAD_BYTES = 64 * 1024  # of a request's first line and headers; the parser itself has no limit
CONNECTIONS_EXTENSION = "gqa_serve.connections"  # all that are open, and what of them was refused
MAX_PIPELINED = 64  # requests of one connection that are not answered yet
MAX_SKIPPED_BYTES = 2**20  # of a body that nobody reads, as that of a request without a key
IDLE_S = 1.0  # a connection without a request for this long makes room for another one
REFUSED_S = 2.0  # for a refused client to say something, and again to read why it was refused
RETRY_AFTER_S = 5
_REASONS = {400: "bad_request", 408: "timeout", 431: "too_large"}  # for the metrics
_LOST_EXTENSION = "gqa_serve.lost"  # in the ASGI scope's extensions: why the connection was dropped
_UPGRADE_HEADERS = (b"connection", b"upgrade", b"http2-settings")
_CLOSE = re.compile(rb"(?:^|,)\s*close\s*(?:,|$)", re.IGNORECASE)

logger = logging.getLogger(__name__)


class ReadTimeoutError(RequestError):
    """The client took too long to send its request."""

    status = 408


class TooManyConnectionsError(RequestError):
    """There are `--max-connections` connections."""

    status = 503
    type = "service_unavailable_error"


class HttpProtocol(HttpToolsProtocol):
    """One connection of uvicorn's httptools implementation."""

    limits = ConnectionLimits()

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._cycles: list[RequestResponseCycle] = []  # whose responses are not complete, pipelined ones too
        self._head_bytes: int | None = None  # since the read in which the head began; None outside of heads
        self._num_heads = 0  # that began
        self._in_body = False
        self._clock = ReadClock(self.loop, self.limits.read_timeout_s, self._sends_too_slowly)
        self._clocked: tuple[int, str] | None = (0, "head")  # which request, and which part of it
        self._lost: dict[str, str] = {}
        self._refusal: bytes | None = None  # what a connection beyond the limit is told when it asks

    # --- the connection's beginning and end

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A client is here, maybe one too many."""
        outlet = Outlet(transport, self.loop, self.limits.send_timeout_s, self._reads_too_slowly)
        if len(self.connections) < self.limits.max_connections or self._replaces_an_idle_one():
            super().connection_made(transport)
            self.transport = self._outlet = outlet
            self._clock.start()
            return
        self.transport = self._outlet = outlet
        if self.limits.num_refused == 0:
            logger.warning("There are %d connections; more are refused.", self.limits.max_connections)
        self.limits.num_refused += 1
        self.limits.on_refusal("connections")
        error = TooManyConnectionsError(
            "This server has as many connections as it may have (--max-connections); try again later.",
            code="too_many_connections",
        )
        self._refusal = _answer(error, f"retry-after: {RETRY_AFTER_S}\r\n")
        if self.limits.num_refused > REFUSED_AT_ONCE:
            outlet.write(self._refusal)
            outlet.close()
        else:
            outlet.end_after(REFUSED_S)  # most clients do not expect to be spoken to first

    def connection_lost(self, exc: Exception | None) -> None:
        """The client left: everything it asked for learns of it, not only the last request of a pipeline."""
        self._outlet.lost()
        self._clock.stop()
        if self._refusal is not None:
            self.limits.num_refused -= 1
            return
        self.limits.idle.pop(self, None)
        super().connection_lost(exc)
        for cycle in self._cycles:
            if not cycle.response_complete:
                cycle.disconnected = True
            cycle.message_event.set()

    def _replaces_an_idle_one(self) -> bool:
        """Close the connection that has been idle the longest, if one has been for a while."""
        idle = self.limits.idle
        oldest = next(iter(idle), None)
        if not isinstance(oldest, HttpProtocol) or self.loop.time() - idle[oldest] < IDLE_S:
            return False
        del idle[oldest]
        oldest.transport.close()
        return True

    def close_if_idle(self) -> None:
        """The server is about to stop. A client that has begun to ask, or never did, may still do so."""
        if self._num_heads and self._head_bytes is None and self.cycle.response_complete:
            self.transport.close()

    def shutdown(self) -> None:
        """The server stops: close, now or after the response."""
        if self._outlet.lingering:
            self.transport.close()
        else:
            super().shutdown()

    def _reads_too_slowly(self) -> None:
        """The client takes nothing of what is written; its connection is about to be dropped."""
        logger.warning(
            "A client read nothing for %g s; its connection was dropped.", self.limits.send_timeout_s
        )
        self._lost["reason"] = "slow_reader"

    def _sends_too_slowly(self) -> None:
        """A head or a body has not come in time."""
        in_body = self._head_bytes is None
        if not self._num_heads or (in_body and self.cycle.response_complete):
            self.transport.close()  # nothing was asked, nothing is answered; or all is
            return
        under_way = [cycle for cycle in self._cycles if not cycle.response_complete]
        if under_way != ([self.cycle] if in_body else []) or self.flow.read_paused:
            self._clock.start()  # it is we who let it wait
            return
        what = "The body was" if in_body else "The head was"
        slow = ReadTimeoutError(
            f"{what} not received in time (--read-timeout {self.limits.read_timeout_s:g} s).",
            code="read_timeout",
        )
        self._refuse(slow)

    # --- requests

    def on_message_begin(self) -> None:
        """A request begins; its scope will say why its connection was lost."""
        if sum(not cycle.response_complete for cycle in self._cycles) >= MAX_PIPELINED:
            raise _TooManyPipelinedError  # to stop the parser
        self.limits.idle.pop(self, None)
        super().on_message_begin()
        self._unset_keepalive_if_required()
        self._num_heads += 1
        self._head_bytes = 0
        self.scope["extensions"] = {
            _LOST_EXTENSION: cast("dict[object, object]", self._lost),
            CONNECTIONS_EXTENSION: {"open": self.connections},
        }

    def on_headers_complete(self) -> None:
        """The application starts, unless the request must be read again without its offer to upgrade."""
        self._head_bytes = len(self.url) + sum(len(name) + len(value) for name, value in self.headers)
        if self._head_bytes > MAX_HEAD_BYTES:
            raise _HeadTooLargeError  # to stop the parser
        self._head_bytes = None
        if self._offers_upgrade():
            return
        super().on_headers_complete()
        self._unset_keepalive_if_required()  # which the response before this request may have set
        self._in_body = True
        close_delimited = self.parser.get_http_version() == "1.0"
        cycle = self.cycle
        self._cycles = [cycle, *(other for other in self._cycles if not other.response_complete)]
        plain_send = cycle.send

        async def send(message: Any) -> None:
            if message["type"] == "http.response.start":
                _prepare_head(cycle, message, close_delimited)
                if self.limits.closing:
                    cycle.keep_alive = False
                if cycle.more_body and not self._skips_body(cycle):
                    cycle.keep_alive = False
                    self._outlet.lingers = True
            elif close_delimited and cycle.chunked_encoding is False and not cycle.expected_content_length:
                cycle.expected_content_length = len(message.get("body", b""))
            await plain_send(message)

        cycle.send = send  # type: ignore[method-assign]

    @staticmethod
    def _skips_body(cycle: RequestResponseCycle) -> bool:
        """Whether the connection may live on after a request of whose body nobody will read the rest."""
        length = dict(cycle.scope["headers"]).get(b"content-length", b"")
        small = length.isdigit() and len(length) < 10 and int(length) <= MAX_SKIPPED_BYTES
        return small and not cycle.waiting_for_100_continue

    def on_body(self, body: bytes) -> None:
        """A piece of the body."""
        super().on_body(body)
        self._clock.count(len(body))

    def on_message_complete(self) -> None:
        """The body is there; of a request that is to be read again there is nothing to complete."""
        if not self._offers_upgrade():
            self._in_body = False
            super().on_message_complete()

    def on_response_complete(self) -> None:
        """An answer is written; if nothing else was asked, the connection is idle."""
        super().on_response_complete()
        busy = self._in_body or self._head_bytes is not None or not self.cycle.response_complete
        if not busy and not self.transport.is_closing():
            self.limits.idle[self] = self.loop.time()

    def _offers_upgrade(self) -> bool:
        """`Upgrade: h2c`, which Java's client sends first of all, or websocket; CONNECT is another matter."""
        upgrade: bool = self.parser.should_upgrade()
        return upgrade and self.parser.get_method() != b"CONNECT"

    def data_received(self, data: bytes) -> None:
        """Bytes from the client.

        The parser takes what follows an offer to upgrade for another protocol, the body included. We go on in
        HTTP/1.1, so a new parser reads the request without the offer, then its body.
        """
        if self._refusal is not None or self._outlet.lingering:
            self._forget()
            return
        known, in_body, num_heads = self._head_bytes, self._in_body, self._num_heads
        self._head_bytes = None if known is None else known + len(data)  # unless the head ends or one begins
        rest: memoryview | None = memoryview(data)  # slices of it copy nothing, however many offers it holds
        try:
            while rest is not None:
                rest = self._feed(rest)
        except httptools.HttpParserError as error:
            if isinstance(error.__context__, _HeadTooLargeError):
                self._refuse_head()
            else:
                self.send_400_response("Invalid HTTP request received.")
        else:
            if self._head_bytes == 0 and not in_body and self._num_heads == num_heads + 1:
                self._head_bytes = len(data)  # nothing else was read
            if self._head_bytes is not None and self._head_bytes > MAX_HEAD_BYTES:
                self._refuse_head()
            self._watch()

    def _refuse_head(self) -> None:
        large = RequestError(f"The head is larger than {MAX_HEAD_BYTES} bytes.", code="head_too_large")
        large.status = http.HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE
        self._refuse(large)

    def _watch(self) -> None:
        """Set the clock by what is being read now, if anything is."""
        part = None
        if self._outlet.is_closing():
            self._clock.stop()
            return
        if self._head_bytes is not None:
            part = "head"
        elif self._in_body:
            part = "body"
        elif not self._num_heads:
            return  # the clock runs since the connection was made
        reading = None if part is None else (self._num_heads, part)
        if reading != self._clocked:
            self._clocked = reading
            if reading is None:
                self._clock.stop()
            else:
                self._clock.start()

    def _forget(self) -> None:
        """What a client says whose answer is written, or one that is refused."""
        if self._refusal is not None and not self._outlet.lingering:
            self._outlet.write(self._refusal)
            self._outlet.linger(REFUSED_S)

    def _feed(self, data: memoryview) -> memoryview | None:
        """Parse `data`; after an offer to upgrade, what follows its head. Raises HttpParserError."""
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as error:
            if not self._offers_upgrade():
                return None  # CONNECT: nothing after it can be understood
            version = self.parser.get_http_version().encode()
            head = [self.parser.get_method() + b" " + self.url + b" HTTP/" + version]
            head += [name + b": " + value for name, value in self.headers if name not in _UPGRADE_HEADERS]
            if any(name == b"connection" and _CLOSE.search(value) for name, value in self.headers):
                head.append(b"connection: close")
            self.parser = httptools.HttpRequestParser(self)
            self.parser.feed_data(b"\r\n".join(head) + b"\r\n\r\n")
            return data[error.args[0] :]
        return None

    def send_400_response(self, msg: str) -> None:
        """The answer to malformed HTTP; nothing after it can be understood, so the connection closes."""
        self._refuse(RequestError(f"{msg} Send HTTP/1.1.", code="invalid_http"))

    def _refuse(self, error: RequestError) -> None:
        self._clock.stop()
        self.limits.on_refusal(_REASONS[error.status])
        under_way = [cycle for cycle in self._cycles if not cycle.response_complete]
        broken = self.cycle is not None and self.cycle.more_body and not self.cycle.response_started
        if not under_way or (broken and under_way == [self.cycle]):
            if under_way:  # a request whose body went wrong: what waits for it has nobody to answer
                self.cycle.disconnected = True
                self.cycle.message_event.set()
            self.transport.write(_answer(error))
            self._outlet.lingers = True
        # Else the answer to an earlier request is being written: a second head inside it would corrupt it.
        self.transport.close()


class _HeadTooLargeError(Exception):
    """A head that came whole is larger than `MAX_HEAD_BYTES`."""


class _TooManyPipelinedError(Exception):
    """More than `MAX_PIPELINED` requests came before the first was answered."""


def http_protocol(limits: ConnectionLimits) -> type[HttpProtocol]:
    """The protocol of a server whose connections share `limits`."""
    return type("LimitedHttpProtocol", (HttpProtocol,), {"limits": limits})


def lost_reason(scope: Scope) -> str | None:
    """Why we dropped the connection of a request whose client seems to have left; None if it left."""
    reason: str | None = scope.get("extensions", {}).get(_LOST_EXTENSION, {}).get("reason")
    return reason


def _answer(error: RequestError, *more_headers: str) -> bytes:
    """An answer from outside the application, after which the connection closes."""
    status = http.HTTPStatus(error.status)
    body = error_json(error)
    head = (
        f"HTTP/1.1 {status.value} {status.phrase}\r\ncontent-type: application/json\r\n"
        f"x-request-id: req-{uuid.uuid4().hex}\r\n{''.join(more_headers)}"
        f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
    )
    return head.encode("ascii") + body


def _prepare_head(cycle: RequestResponseCycle, message: Any, close_delimited: bool) -> None:
    """Leave the word on the connection's life to uvicorn, and 1.0 clients without chunks.

    Server-sent events say keep-alive even on a connection that closes after them. Without chunks a body of
    unknown length ends with the connection; uvicorn is told the length of each piece as it comes.
    """
    headers = [(name, value) for name, value in message.get("headers", []) if name != b"connection"]
    message["headers"] = headers
    if close_delimited and all(name != b"content-length" for name, _ in headers):
        cycle.chunked_encoding = False
