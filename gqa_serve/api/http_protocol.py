"""`HttpProtocol`: uvicorn's HTTP/1.1 connection, with what an application cannot do for itself.

Owns the answer to bytes that are no HTTP request (JSON, like every other error) and to heads without an end;
streams to HTTP/1.0 clients, which know no chunks; offers to upgrade the protocol, which are declined; that
every pipelined request learns when its client leaves; and the way for a response to drop its connection at
once: closing waits until the client has read what was written, which one that stopped reading never does.
Knows no routes. Pass it as `uvicorn.Config(http=HttpProtocol)`. Invariant: under any other server
`abort_connection` does nothing and says so.
"""

from __future__ import annotations

import http
import re
import uuid
from typing import Any

import httptools
from starlette.types import Receive, Scope
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from gqa_serve.api.errors import error_json
from gqa_serve.errors import RequestError

MAX_HEAD_BYTES = 64 * 1024  # of a request's first line and headers; the parser itself has no limit
ABORT_EXTENSION = "gqa_serve.abort"  # in the ASGI scope's extensions
_UPGRADE_HEADERS = (b"connection", b"upgrade", b"http2-settings")
_CLOSE = re.compile(rb"(?:^|,)\s*close\s*(?:,|$)", re.IGNORECASE)


class HttpProtocol(HttpToolsProtocol):
    """One connection of uvicorn's httptools implementation."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._cycles: list[RequestResponseCycle] = []  # whose responses are not complete, pipelined ones too
        self._head_bytes: int | None = None  # since the read in which the head began; None outside of heads

    def connection_lost(self, exc: Exception | None) -> None:
        """The client left: everything it asked for learns of it, not only the last request of a pipeline."""
        super().connection_lost(exc)
        for cycle in self._cycles:
            if not cycle.response_complete:
                cycle.disconnected = True
            cycle.message_event.set()

    def on_message_begin(self) -> None:
        """A request begins: its scope learns how to abort the connection."""
        super().on_message_begin()
        self._head_bytes = 0
        self.scope["extensions"] = {ABORT_EXTENSION: {"abort": self.transport.abort}}

    def on_headers_complete(self) -> None:
        """The application starts, unless the request must be read again without its offer to upgrade."""
        self._head_bytes = None
        if self._offers_upgrade():
            return
        super().on_headers_complete()
        close_delimited = self.parser.get_http_version() == "1.0"
        cycle = self.cycle
        self._cycles = [cycle, *(other for other in self._cycles if not other.response_complete)]
        plain_send = cycle.send

        async def send(message: Any) -> None:
            if message["type"] == "http.response.start":
                _prepare_head(cycle, message, close_delimited)
            elif close_delimited and cycle.chunked_encoding is False and not cycle.expected_content_length:
                cycle.expected_content_length = len(message.get("body", b""))
            await plain_send(message)

        cycle.send = send  # type: ignore[method-assign]

    def on_message_complete(self) -> None:
        """The body is there; of a request that is to be read again there is nothing to complete."""
        if not self._offers_upgrade():
            super().on_message_complete()

    def _offers_upgrade(self) -> bool:
        """`Upgrade: h2c`, which Java's client sends first of all, or websocket; CONNECT is another matter."""
        upgrade: bool = self.parser.should_upgrade()
        return upgrade and self.parser.get_method() != b"CONNECT"

    def data_received(self, data: bytes) -> None:
        """Bytes from the client.

        The parser takes what follows an offer to upgrade for another protocol, the body included. We go on in
        HTTP/1.1, so a new parser reads the request without the offer, then its body.
        """
        self._unset_keepalive_if_required()
        known = self._head_bytes
        self._head_bytes = None if known is None else known + len(data)  # unless the head ends or one begins
        rest: memoryview | None = memoryview(data)  # slices of it copy nothing, however many offers it holds
        try:
            while rest is not None:
                rest = self._feed(rest)
        except httptools.HttpParserError:
            self.send_400_response("Invalid HTTP request received.")
        else:
            if self._head_bytes is not None and self._head_bytes > MAX_HEAD_BYTES:
                large = RequestError(
                    f"The head is larger than {MAX_HEAD_BYTES} bytes.", code="head_too_large"
                )
                self._refuse(large, http.HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE)

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
        self._refuse(RequestError(f"{msg} Send HTTP/1.1.", code="invalid_http"), http.HTTPStatus.BAD_REQUEST)

    def _refuse(self, error: RequestError, status: http.HTTPStatus) -> None:
        under_way = [cycle for cycle in self._cycles if not cycle.response_complete]
        broken = self.cycle is not None and self.cycle.more_body and not self.cycle.response_started
        if not under_way or (broken and under_way == [self.cycle]):
            if under_way:  # a request whose body went wrong: what waits for it has nobody to answer
                self.cycle.disconnected = True
                self.cycle.message_event.set()
            body = error_json(error)
            head = (
                f"HTTP/1.1 {status.value} {status.phrase}\r\ncontent-type: application/json\r\n"
                f"x-request-id: req-{uuid.uuid4().hex}\r\n"
                f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
            )
            self.transport.write(head.encode("ascii") + body)
        # Else the answer to an earlier request is being written: a second head inside it would corrupt it.
        self.transport.close()


def _prepare_head(cycle: RequestResponseCycle, message: Any, close_delimited: bool) -> None:
    """Leave the word on the connection's life to uvicorn, and 1.0 clients without chunks.

    Server-sent events say keep-alive even on a connection that closes after them. Without chunks a body of
    unknown length ends with the connection; uvicorn is told the length of each piece as it comes.
    """
    headers = [(name, value) for name, value in message.get("headers", []) if name != b"connection"]
    message["headers"] = headers
    if close_delimited and all(name != b"content-length" for name, _ in headers):
        cycle.chunked_encoding = False


async def abort_connection(scope: Scope, receive: Receive) -> bool:
    """Drop the connection without waiting for what is still unsent; returns whether the server can."""
    extension = scope.get("extensions", {}).get(ABORT_EXTENSION)
    if extension is None:
        return False
    extension["abort"]()
    while (await receive())["type"] != "http.disconnect":  # then uvicorn knows, and expects no more of us
        pass
    return True
