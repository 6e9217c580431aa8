"""`ReadClock`: by when a client must have sent what it began to send.

Owns one timer, armed only while something is being read. Knows no HTTP. Invariant: whoever keeps sending at
`MIN_BYTES_PER_S` or faster is never cut off, and whoever sends less is, however it spreads its bytes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

MIN_BYTES_PER_S = 16 * 1024


class ReadClock:
    """`expired` is called once, after `timeout_s` and what the bytes received since `start` have earned; or
    after `timeout_s` without a byte. A timeout of 0 never expires."""

    def __init__(
        self, loop: asyncio.AbstractEventLoop, timeout_s: float, expired: Callable[[], None]
    ) -> None:
        self._loop = loop
        self._timeout_s = timeout_s
        self._expired = expired
        self._timer: asyncio.TimerHandle | None = None
        self._started = self._last = 0.0
        self._num_bytes = 0

    def start(self) -> None:
        """Something begins; what was counted before is forgotten."""
        self.stop()
        if self._timeout_s:
            self._started = self._last = self._loop.time()
            self._num_bytes = 0
            self._timer = self._loop.call_later(self._timeout_s, self._look)

    def count(self, num_bytes: int) -> None:
        """So many bytes of it arrived."""
        if self._timer is not None:
            self._num_bytes += num_bytes
            self._last = self._loop.time()

    def stop(self) -> None:
        """It is complete."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _look(self) -> None:
        # Bytes that arrive move no timer: it looks again when it fires.
        earned = self._started + self._num_bytes / MIN_BYTES_PER_S
        left = min(earned, self._last) + self._timeout_s - self._loop.time()
        if left > 0:
            self._timer = self._loop.call_later(left, self._look)
        else:
            self._timer = None
            self._expired()
