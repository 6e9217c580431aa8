"""HTTP/1.1 for the load generator: keep-alive connections, bodies as they arrive.

Owns sockets, framing (httptools parses) and connection reuse. Knows neither server-sent events nor OpenAI.
A general client spends more time on an event than a fast server takes between two; this does nothing per
piece but parse it and hand it on.
Invariant: a connection goes back to the pool only after a whole response; every failure is an HttpError.
"""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import Callable
from dataclasses import dataclass, field
from urllib.parse import urlsplit

import httptools

from gqa_serve.errors import ConfigError, GqaServeError

CONNECT_TIMEOUT_S = 10.0
_READ_BYTES = 2**16
_MAX_KEPT_BYTES = 2**20
"""Of a body that nobody takes piece by piece."""


class HttpError(GqaServeError):
    """No whole response came; the message says what happened."""


@dataclass
class _Response:
    """What httptools calls while it parses one response."""

    on_body_piece: Callable[[bytes], None] | None
    status: int = 0
    body: bytearray = field(default_factory=bytearray)
    complete: bool = False
    keep_alive: bool = False
    framed: bool = False
    """Whether the head tells where the body ends; else the end of the connection does."""
    parser: httptools.HttpResponseParser = field(init=False)

    def __post_init__(self) -> None:
        self.parser = httptools.HttpResponseParser(self)

    def on_header(self, name: bytes, value: bytes) -> None:
        if name.lower() == b"content-length" or (
            name.lower() == b"transfer-encoding" and b"chunked" in value.lower()
        ):
            self.framed = True

    def on_headers_complete(self) -> None:
        self.status = self.parser.get_status_code()

    def on_body(self, data: bytes) -> None:
        if self.on_body_piece is not None and self.status == 200:
            self.on_body_piece(data)
        elif len(self.body) < _MAX_KEPT_BYTES:
            self.body += data

    def on_message_complete(self) -> None:
        self.complete = self.status >= 200
        self.keep_alive = self.parser.should_keep_alive()  # the parser forgets it after this call


class HttpClient:
    """Requests to one server. `url` may lack http://, and end in /v1 or not."""

    def __init__(self, url: str, *, api_key: str | None = None) -> None:
        text = url.strip() if "://" in url else f"http://{url.strip()}"
        try:
            parts = urlsplit(text.rstrip("/"))
            port = parts.port
            (parts.hostname or "").encode("idna")
            f"{parts.netloc}{parts.path}".encode("ascii")
        except ValueError as error:
            raise ConfigError(f"--url {url}: {error}.") from error
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
            raise ConfigError(
                f"--url must be the address of a server, e.g. http://127.0.0.1:8000; got {url!r}."
            )
        self._tls = ssl.create_default_context() if parts.scheme == "https" else None
        self._host, self._port = parts.hostname, port or (443 if self._tls else 80)
        self._path = parts.path.removesuffix("/v1")
        self.base = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{self._path}"
        if api_key and not (api_key.isascii() and api_key.isprintable()):
            raise ConfigError("The API key holds a character that no HTTP header can have.")
        key = f"Authorization: Bearer {api_key}\r\n" if api_key else ""
        host = parts.netloc.rpartition("@")[2]
        self._head = f"Host: {host}\r\nUser-Agent: gqa-serve-bench\r\nAccept: */*\r\n{key}"
        self._idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []

    async def exchange(
        self, method: str, path: str, body: bytes = b"", on_body_piece: Callable[[bytes], None] | None = None
    ) -> tuple[int, bytes]:
        """Status and body; the body of a 200 goes to `on_body_piece`, if given, as it arrives.

        Raises HttpError when there is no connection, or it ends before the response does.
        """
        kind = "Content-Type: application/json\r\n" if body else ""
        head = (
            f"{method} {self._path}{path} HTTP/1.1\r\n{self._head}{kind}Content-Length: {len(body)}\r\n\r\n"
        )
        message = head.encode("latin-1") + body
        while self._idle:  # a server may have closed it: then nothing of the request was answered, try again
            answer = await self._send(*self._idle.pop(), message, on_body_piece, reused=True)
            if answer is not None:
                return answer
        answer = await self._send(*await self._connect(), message, on_body_piece, reused=False)
        if answer is None:
            raise HttpError("The server closed the connection without an answer.")
        return answer

    async def _connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        opening = asyncio.open_connection(self._host, self._port, ssl=self._tls, limit=_READ_BYTES)
        try:
            return await asyncio.wait_for(opening, CONNECT_TIMEOUT_S)
        except asyncio.TimeoutError as error:
            raise HttpError(f"No connection within {CONNECT_TIMEOUT_S:g} s.") from error
        except OSError as error:
            reason = error.strerror or str(error)
            raise HttpError(f"No connection to {self._host}:{self._port}: {reason}.") from error

    async def _send(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        message: bytes,
        on_body_piece: Callable[[bytes], None] | None,
        *,
        reused: bool,
    ) -> tuple[int, bytes] | None:
        """The response; None if the connection ended before its first byte."""
        response = _Response(on_body_piece)
        kept = False
        try:
            writer.write(message)
            data = await reader.read(_READ_BYTES)
            if not data:
                return None
            while data:
                response.parser.feed_data(data)
                if response.complete:
                    kept = response.keep_alive
                    return response.status, bytes(response.body)
                data = await reader.read(_READ_BYTES)
            if response.status and not response.framed:  # the end of the connection is the end of the body
                return response.status, bytes(response.body)
            raise HttpError("The connection was cut in the middle of the answer.")
        except OSError as error:
            if reused and not response.status:
                return None
            raise HttpError(f"The connection broke: {error.strerror or error}.") from error
        except httptools.HttpParserError as error:
            raise HttpError(f"The answer is not HTTP ({error}).") from error
        finally:
            if kept:
                self._idle.append((reader, writer))
            else:
                writer.close()

    async def close(self) -> None:
        """Close the connections that are not in use."""
        for _, writer in self._idle:
            writer.close()
        for _, writer in self._idle:
            with contextlib.suppress(OSError):  # it is gone, which is what was wanted
                await writer.wait_closed()
        self._idle.clear()
        await asyncio.sleep(0)  # those that were closed before go now
