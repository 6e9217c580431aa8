"""One request over a raw connection, by a client that may leave at any point, or read slowly.

Knows HTTP/1.1 as far as the server speaks it and nothing of what is asked. Invariant: an exchange ends within
`PATIENCE_S`; what it ended by is one word in `Answer.ended`.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import random
import socket
import struct
import time
from typing import Literal

PATIENCE_S = 180.0
Point = Literal["connected", "head", "body", "sent", "waiting", "first bytes", "middle"]
POINTS: tuple[Point, ...] = ("connected", "head", "body", "sent", "waiting", "first bytes", "middle")
Ended = Literal["whole", "left", "cut", "refused", "hung"]


@dataclasses.dataclass
class Manner:
    """How the client behaves: the point at which it leaves, if it does, by FIN, RST or half-closing."""

    leaves: Point | None = None
    by: Literal["fin", "rst", "half"] = "fin"
    slow: bool = False


@dataclasses.dataclass
class Answer:
    """What came back. `ended`: all of it; we left; the server cut it; it took no connection; no end."""

    ended: Ended = "cut"
    status: int = 0
    body: bytes = b""
    first_s: float | None = None
    gaps_s: list[float] = dataclasses.field(default_factory=list)
    total_s: float = 0.0


class _Left(Exception):
    """The client goes away here, as planned."""


class _Exchange:
    def __init__(self, request: bytes, manner: Manner, rng: random.Random) -> None:
        self._request = request
        self._manner = manner
        self._rng = rng
        self._began_s = time.monotonic()
        self._last_s = 0.0
        self.answer = Answer()

    async def run(self, host: str, port: int) -> None:
        try:
            reader, writer = await asyncio.open_connection(host, port, limit=2**22)
        except OSError:
            self.answer.ended = "refused"
            return
        try:
            await self._send(writer)
            await self._read(reader)
            self.answer.ended = "whole"
        except _Left:
            self.answer.ended = "left"
            await self._leave(reader, writer)
        except (asyncio.IncompleteReadError, ConnectionError, ValueError):
            self.answer.ended = "cut"
        finally:
            self.answer.total_s = time.monotonic() - self._began_s
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()

    def _maybe_leave(self, point: Point) -> None:
        if self._manner.leaves == point:
            raise _Left

    async def _send(self, writer: asyncio.StreamWriter) -> None:
        head, blank, body = self._request.partition(b"\r\n\r\n")
        self._maybe_leave("connected")
        if self._manner.leaves == "head":
            writer.write(head[: self._rng.randrange(1, len(head))])
            await writer.drain()
            raise _Left
        writer.write(head + blank)
        if self._manner.leaves == "body":
            writer.write(body[: self._rng.randrange(0, max(1, len(body)))])
            await writer.drain()
            raise _Left
        writer.write(body)
        await writer.drain()
        self._maybe_leave("sent")
        if self._manner.leaves == "waiting":
            await asyncio.sleep(self._rng.uniform(0.0, 1.0))
            raise _Left

    async def _read(self, reader: asyncio.StreamReader) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        self.answer.status = int(head[9:12])
        self._maybe_leave("first bytes")
        lower = head.lower()
        if b"transfer-encoding: chunked" in lower:
            await self._read_chunks(reader)
        else:
            _, _, rest = lower.partition(b"content-length:")
            await self._take(reader, int(rest.split(b"\r\n")[0]))

    async def _read_chunks(self, reader: asyncio.StreamReader) -> None:
        leave_after = self._rng.randrange(1, 12)
        number = 0
        while True:
            size = int((await reader.readuntil(b"\r\n"))[:-2], 16)
            if size:
                await self._take(reader, size)
            await reader.readexactly(2)
            if size == 0:
                return
            number += 1
            if number >= leave_after:
                self._maybe_leave("middle")

    async def _take(self, reader: asyncio.StreamReader, size: int) -> None:
        self.answer.body += await reader.readexactly(size)
        now = time.monotonic()
        if self.answer.first_s is None:
            self.answer.first_s = now - self._began_s
        else:
            self.answer.gaps_s.append(now - self._last_s)
        self._last_s = now
        if self._manner.slow:
            await asyncio.sleep(self._rng.uniform(0.0, 0.2))

    async def _leave(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        sock: socket.socket = writer.get_extra_info("socket")
        if self._manner.by == "rst":
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        elif self._manner.by == "half" and writer.can_write_eof():
            with contextlib.suppress(OSError):  # the server may be faster
                writer.write_eof()
                await reader.read(2**20)
        writer.transport.abort()


async def exchange(host: str, port: int, request: bytes, manner: Manner, rng: random.Random) -> Answer:
    """Send the request and read its answer, in that manner."""
    under_way = _Exchange(request, manner, rng)
    try:
        await asyncio.wait_for(under_way.run(host, port), PATIENCE_S)
    except asyncio.TimeoutError:
        under_way.answer.ended = "hung"
    return under_way.answer
