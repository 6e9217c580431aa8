"""`BodyBudget`: how much of all requests' bodies is held in memory while they are read and decoded.

Owns the one number that bounds them together; each alone is bounded by `--max-body-bytes`. Knows no HTTP.
Invariant: a small body is always taken, so that clients that send huge ones slowly cannot keep others out.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from gqa_serve.errors import RequestError

FREE_BYTES = 64 * 1024  # of each body; --max-connections bounds how many there are
LARGEST_AT_ONCE = 16  # bodies of the largest size that fit in


class BodiesTooLargeError(RequestError):
    """All bodies together take too much memory; later this one may be taken."""

    status = 503
    type = "service_unavailable_error"

    def __init__(self) -> None:
        super().__init__(
            "The server is reading too many large request bodies at once; try again later.",
            code="server_overloaded",
        )
        self.headers = {"Retry-After": "5"}


class Held:
    """What one body takes of the budget."""

    def __init__(self, budget: BodyBudget) -> None:
        self._budget = budget
        self.num_bytes = 0

    def grow(self, num_bytes: int) -> None:
        """The body has `num_bytes` by now. Raises BodiesTooLargeError."""
        more = max(0, num_bytes - FREE_BYTES) - self.num_bytes
        if more > 0:
            self._budget.take(more)
            self.num_bytes += more


class BodyBudget:
    """Bytes that all bodies may take beyond their first `FREE_BYTES`."""

    def __init__(self, max_body_bytes: int) -> None:
        self.max_body_bytes = max_body_bytes
        self._limit = max_body_bytes * LARGEST_AT_ONCE
        self.num_bytes = 0

    @contextmanager
    def held(self) -> Iterator[Held]:
        """For the time that a body is read and decoded."""
        held = Held(self)
        try:
            yield held
        finally:
            self.num_bytes -= held.num_bytes

    def take(self, num_bytes: int) -> None:
        """Raises BodiesTooLargeError."""
        if self.num_bytes + num_bytes > self._limit:
            raise BodiesTooLargeError
        self.num_bytes += num_bytes
