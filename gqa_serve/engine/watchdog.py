"""Watchdog: how long the engine process has owed an answer and said nothing.

Owns the count of silent seconds and when it is too much. Knows no processes and no messages: it is told of
signs of life, asks whether any are due, and says when to give up. Invariant: only time in which a sign would
have been heard counts. When this process itself stood still (a suspended machine, SIGSTOP, a debugger), the
gap in its clock counts for next to nothing, so that what the engine said meanwhile is heard first.
"""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Protocol

logger = logging.getLogger(__name__)

_TICK_S = 1.0


class Watched(Protocol):
    """The engine, as its watchdog sees it."""

    @property
    def name(self) -> str:
        """What the log calls its process, as the subject of a sentence."""

    @property
    def owes_answer(self) -> bool:
        """Whether it would say something if it were well."""

    @property
    def patience_s(self) -> float:
        """How long it may be silent now."""

    @property
    def doing(self) -> str:
        """What it is at, for the log: "while ..."."""

    def kill_hung(self) -> None:
        """It is taken for hung."""


class Watchdog:
    """Over one engine, which is expected to speak every `timeout_s` seconds; 0: watch nothing."""

    def __init__(self, engine: Watched, timeout_s: float) -> None:
        self._engine = engine
        self._timeout_s = timeout_s
        self._silent_s = 0.0
        self._has_warned = False

    def heard(self) -> None:
        """A sign of life came."""
        self._silent_s = 0.0
        self._has_warned = False

    async def watch(self) -> None:
        """Until cancelled."""
        tick = min(_TICK_S, self._timeout_s / 10)
        while self._timeout_s:
            before = time.monotonic()
            await asyncio.sleep(tick)
            if self._engine.owes_answer:
                self._count(min(time.monotonic() - before, 2 * tick))

    def _count(self, seconds: float) -> None:
        self._silent_s += seconds
        engine, timeout = self._engine, self._timeout_s
        if self._silent_s >= timeout / 2 and not self._has_warned:
            self._has_warned = True
            logger.warning(
                "%s has given no sign of life for %.0f s %s. If its steps take that long, raise "
                "--engine-timeout (%g s) or lower --max-num-batched-tokens.",
                engine.name,
                self._silent_s,
                engine.doing,
                timeout,
            )
        if self._silent_s >= engine.patience_s:
            logger.error(
                "%s has given no sign of life for %.0f s %s. Killing it.",
                engine.name,
                self._silent_s,
                engine.doing,
            )
            engine.kill_hung()
            self.heard()
