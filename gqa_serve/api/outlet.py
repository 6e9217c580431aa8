"""`Outlet`: the writing end of a connection, for clients that do not read, or not yet.

A client that takes no byte of what waits for it for `timeout_s` is cut off, whatever else it is sent. One
that is still sending when its answer is complete must not be cut off: if a socket is closed with bytes
unread, the system takes back the answer, too. So the connection lingers, reading and forgetting, until the
client has closed its end. Knows no HTTP. Invariant: a closed outlet's socket is gone when its client has
taken all, and at the latest `timeout_s` after it took the last.
"""

from __future__ import annotations

import asyncio
import sys
from array import array
from collections.abc import Callable
from typing import Any

LINGER_S = 10.0
_LOOKS = 4  # at the write buffer in each `timeout_s`


class Outlet(asyncio.Transport):
    """A transport around uvloop's or asyncio's. `stalled` is called once, right before the connection is
    dropped because its client reads nothing."""

    def __init__(
        self,
        transport: asyncio.Transport,
        loop: asyncio.AbstractEventLoop,
        timeout_s: float,
        stalled: Callable[[], None],
    ) -> None:
        super().__init__()
        self._transport = transport
        self._loop = loop
        self._timeout_s = timeout_s
        self._stalled = stalled
        self._timer: asyncio.TimerHandle | None = None
        self._end_timer: asyncio.TimerHandle | None = None
        self._written = 0  # bytes since the connection was made, of which the client took `_taken` or more
        self._taken = 0
        self._took_at = 0.0
        self.lingers = False
        """Whether `close` shall wait for a client that is still sending."""
        self.lingering = False
        """Whether it does: what arrives is to be forgotten."""

    def write(self, data: Any) -> None:
        """Send `data`; what the client does not take yet is kept."""
        self._written += len(data)
        self._transport.write(data)
        if self._timer is None:
            self._took_at = self._loop.time()
            self._timer = self._loop.call_later(self._timeout_s / _LOOKS, self._look)

    def _look(self) -> None:
        unsent = self._transport.get_write_buffer_size()
        self._timer = None
        if not unsent:
            return
        now = self._loop.time()
        if (taken := self._written - unsent - self._unread()) > self._taken:
            self._taken, self._took_at = taken, now
        if now - self._took_at >= self._timeout_s:
            self._stalled()
            self.abort()
        else:
            self._timer = self._loop.call_later(self._timeout_s / _LOOKS, self._look)

    def _unread(self) -> int:
        """Bytes that the system took, but the client's system did not, where it tells: without, slow readers
        seem to read nothing until they have read a good part of the system's buffer."""
        if sys.platform != "linux":
            return 0
        import fcntl
        import termios

        count = array("i", [0])
        fcntl.ioctl(self._transport.get_extra_info("socket").fileno(), termios.TIOCOUTQ, count)
        return count[0]

    def get_write_buffer_size(self) -> int:
        """Bytes that the system has not taken yet."""
        return self._transport.get_write_buffer_size()

    def is_closing(self) -> bool:
        """Whether nothing more is to be written."""
        return self.lingering or self._transport.is_closing()

    def close(self) -> None:
        """Close when everything is sent, and not before a client that is still sending has read it."""
        if self.lingering or not self.lingers or self._transport.is_closing():
            self._transport.close()
        else:
            self.linger(LINGER_S)

    def linger(self, seconds: float) -> None:
        """Say that there is no more, and close when the client does, or after `seconds`."""
        self.lingering = True
        self._transport.write_eof()
        self._transport.resume_reading()
        self.end_after(seconds)

    def end_after(self, seconds: float) -> None:
        """Drop the connection then, if it still is."""
        if self._end_timer is None:
            self._end_timer = self._loop.call_later(seconds, self.abort)

    def abort(self) -> None:
        """Drop the connection, and what was not sent."""
        self._transport.abort()

    def lost(self) -> None:
        """The connection is gone."""
        for timer in (self._timer, self._end_timer):
            if timer is not None:
                timer.cancel()
