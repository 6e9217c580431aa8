"""`LoopLag`: how late the event loop runs what is due, ten times a second.

Owns one timer. A loop that is late by 50 ms delays every stream by that much; whatever blocks it shows up
here. Knows nothing of metrics. Invariant: one timer per loop, which ends with it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

INTERVAL_S = 0.1


class LoopLag:
    """Tells `observe` how many seconds late each tick came."""

    def __init__(self, observe: Callable[[float], None]) -> None:
        self._observe = observe
        self._loop: asyncio.AbstractEventLoop | None = None
        self._due_s = 0.0

    def start(self) -> None:
        """Begin on the running loop; nothing if that has been done."""
        loop = asyncio.get_running_loop()
        if loop is not self._loop:
            self._loop = loop
            self._schedule(loop)

    def _schedule(self, loop: asyncio.AbstractEventLoop) -> None:
        self._due_s = time.monotonic() + INTERVAL_S
        loop.call_later(INTERVAL_S, self._tick, loop)

    def _tick(self, loop: asyncio.AbstractEventLoop) -> None:
        self._observe(max(0.0, time.monotonic() - self._due_s))
        if loop is self._loop:
            self._schedule(loop)
