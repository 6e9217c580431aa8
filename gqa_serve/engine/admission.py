"""Admission: how much may wait for the engine, and when it is worth coming back.

Owns the account of what has been submitted and not ended: all of it counts as a request held, and its prompt
counts as waiting until the engine says that it has begun to compute it. Knows no sockets, no streams and no
HTTP. Invariant: what is submitted together enters together or not at all, and one who finds nobody waiting
always gets in as far as tokens go.

`Retry-After` is what the last half minute or so of work says: the time in which as many requests end, or as
many prompt tokens are begun, as stand between the newcomer and a place.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence

from gqa_serve.engine.request import EngineRequest
from gqa_serve.errors import QueueFullError

MIN_RETRY_S, MAX_RETRY_S = 1, 60
_MEMORY_S = 30.0  # how long the rates remember, in seconds of work


class Rate:
    """Amounts per second, the latest counting most."""

    def __init__(self) -> None:
        self._amount = self._seconds = 0.0

    def add(self, amount: float) -> None:
        """So much was done now."""
        self._amount += amount

    def let_pass(self, seconds: float) -> None:
        """So much time was worked."""
        kept = math.exp(-seconds / _MEMORY_S)
        self._amount *= kept
        self._seconds = self._seconds * kept + _MEMORY_S * (1 - kept)

    def seconds_for(self, amount: float) -> int:
        """How long `amount` takes, from MIN_RETRY_S to MAX_RETRY_S.

        As long as less than 1 has been done, it is taken for 1: what began longer ago takes longer.
        """
        estimate = math.ceil(amount * self._seconds / max(self._amount, 1.0))
        return min(max(MIN_RETRY_S, estimate), MAX_RETRY_S)


class Admission:
    """The account of one engine."""

    def __init__(
        self, max_requests: int, max_waiting_tokens: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._max_requests = max_requests
        self._max_waiting_tokens = max_waiting_tokens
        self._clock = clock
        self._held: set[str] = set()
        self._waiting: dict[str, int] = {}  # id -> prompt tokens
        self.num_waiting_tokens = 0
        self._ends = Rate()
        self._starts = Rate()  # of prompt tokens
        self._last = clock()

    def check_room(self, num_requests: int) -> None:
        """Raises QueueFullError if there is no room for so many, however short they are."""
        self._advance()
        missing = len(self._held) + num_requests - self._max_requests
        if missing > 0:
            raise QueueFullError(
                f"The engine is computing or holding {len(self._held)} of at most {self._max_requests} "
                "requests; try again later.",
                retry_after_s=self._ends.seconds_for(missing),
            )

    def check(self, requests: Sequence[EngineRequest]) -> None:
        """Raises QueueFullError if they may not come in together."""
        self.check_room(len(requests))
        tokens = sum(len(request.prompt) for request in requests)
        excess = self.num_waiting_tokens + tokens - self._max_waiting_tokens
        if self._waiting and excess > 0:
            raise QueueFullError(
                f"Prompts of {self.num_waiting_tokens} tokens are waiting already, and at most "
                f"{self._max_waiting_tokens} may; try again later, or send shorter ones.",
                retry_after_s=self._starts.seconds_for(min(excess, self.num_waiting_tokens)),
            )

    def retry_after_s(self) -> int:
        """When a request may have ended."""
        self._advance()
        return self._ends.seconds_for(1)

    def enter(self, request: EngineRequest) -> None:
        """It was submitted."""
        self._advance()
        self._held.add(request.request_id)
        self._waiting[request.request_id] = len(request.prompt)
        self.num_waiting_tokens += len(request.prompt)

    def begun(self, request_ids: Iterable[str]) -> None:
        """The engine is computing these now; some may have left."""
        self._advance()
        for request_id in request_ids:
            self._starts.add(self._stop_waiting(request_id))

    def leave(self, request_id: str) -> None:
        """It ended."""
        self._advance()
        self._held.discard(request_id)
        self._stop_waiting(request_id)
        self._ends.add(1)

    def _stop_waiting(self, request_id: str) -> int:
        num_tokens = self._waiting.pop(request_id, 0)
        self.num_waiting_tokens -= num_tokens
        return num_tokens

    def _advance(self) -> None:
        """Time in which nothing was asked of the engine says nothing of how fast it is."""
        now = self._clock()
        if self._held:
            self._ends.let_pass(now - self._last)
            self._starts.let_pass(now - self._last)
        self._last = now
