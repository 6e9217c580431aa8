"""`RateLimits`: how much each API key may ask for, at once and in a minute.

Owns a count of requests and a bucket of tokens for each key. The bucket holds a minute's tokens and fills
evenly; a prompt is taken out when its request is admitted, its output when it has ended. So the bucket may be
overdrawn, by what was under way, and then its key waits until it is filled again: nobody is refused for what
a request might generate. A prompt larger than the bucket is admitted when the bucket is full.

Knows keys by their index only. Invariant: what is refused costs nothing, and every admission is closed.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Mapping

from starlette.types import Scope

from gqa_serve.errors import RequestError

KEY_INDEX = "gqa_serve.key_index"  # in the ASGI scope: which of the server's keys was shown
RATE_LIMIT_HEADERS = tuple(
    f"X-RateLimit-{what}-{of}" for of in ("Requests", "Tokens") for what in ("Limit", "Remaining", "Reset")
)
_BUSY_RETRY_AFTER_S = 1  # nobody knows when one of the requests under way will end


class RateLimitError(RequestError):
    """A key asks for more than it may."""

    status = 429
    type = "rate_limit_error"

    def __init__(self, message: str, retry_after_s: int, headers: Mapping[str, str]) -> None:
        super().__init__(message, code="rate_limit_exceeded")
        self.headers = {"Retry-After": str(retry_after_s), **headers}


@dataclasses.dataclass
class _Use:
    """What one key has of its limits: `tokens` left at `then`, negative while it is overdrawn."""

    tokens: float
    then: float
    num_requests: int = 0


class Admission:
    """One admitted request, by default of nobody's; close it when it ends."""

    def __init__(
        self, limits: RateLimits | None = None, use: _Use | None = None, num_prompt_tokens: int = 0
    ) -> None:
        self._limits = limits
        self._use = use
        self._num_prompt_tokens = num_prompt_tokens

    def headers(self) -> dict[str, str]:
        """What is left to the key, in OpenAI's `x-ratelimit-*` headers."""
        return {} if self._limits is None or self._use is None else self._limits.headers(self._use)

    def close(self, num_output_tokens: int) -> None:
        """The request has ended. Idempotent."""
        use, self._use = self._use, None
        if self._limits is not None and use is not None:
            use.num_requests -= 1
            self._limits.spend(use, num_output_tokens)

    def cancel(self) -> None:
        """The request was not taken after all."""
        self.close(-self._num_prompt_tokens)


class RateLimits:
    """The limits of every key; None is no limit. `clock` counts seconds."""

    def __init__(
        self,
        max_requests: int | None,
        tokens_per_minute: int | None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._max_requests = max_requests
        self._capacity = tokens_per_minute
        self._clock = clock
        self._uses: dict[int, _Use] = {}

    def admit(self, scope: Scope, num_prompt_tokens: int) -> Admission:
        """Count a request of this scope's key in. Raises RateLimitError."""
        key: int | None = scope.get(KEY_INDEX)
        if key is None or (self._max_requests is None and self._capacity is None):
            return Admission()
        use = self._uses.setdefault(key, _Use(float(self._capacity or 0), self._clock()))
        if self._max_requests is not None and use.num_requests >= self._max_requests:
            raise RateLimitError(
                f"This API key has {use.num_requests} requests under way, as many as it may (limit: "
                f"{self._max_requests}). Send the next one when one of them has ended.",
                _BUSY_RETRY_AFTER_S,
                self.headers(use),
            )
        if self._capacity is not None:
            left = self._refill(use)
            missing = min(num_prompt_tokens, self._capacity) - left
            if missing > 0:
                wait_s = max(1, math.ceil(missing * 60 / self._capacity))
                raise RateLimitError(
                    f"This API key may use {self._capacity} tokens per minute; {max(0, int(left))} are left, "
                    f"and this prompt has {num_prompt_tokens}. Try again in {wait_s} s.",
                    wait_s,
                    self.headers(use),
                )
        use.num_requests += 1
        self.spend(use, num_prompt_tokens)
        return Admission(self, use, num_prompt_tokens)

    def spend(self, use: _Use, num_tokens: int) -> None:
        """Take tokens from a key, or give them back."""
        if self._capacity is not None:
            use.tokens = min(self._refill(use) - num_tokens, float(self._capacity))

    def _refill(self, use: _Use) -> float:
        """The key's tokens by now."""
        capacity = float(self._capacity or 0)
        now = self._clock()
        use.tokens = min(use.tokens + (now - use.then) * capacity / 60, capacity)
        use.then = now
        return use.tokens

    def headers(self, use: _Use) -> dict[str, str]:
        """OpenAI's headers; "reset" is the time until all of a limit is available again, like 1m30s."""
        headers = {}
        if self._max_requests is not None:
            headers["X-RateLimit-Limit-Requests"] = str(self._max_requests)
            headers["X-RateLimit-Remaining-Requests"] = str(max(0, self._max_requests - use.num_requests))
            headers["X-RateLimit-Reset-Requests"] = _duration(_BUSY_RETRY_AFTER_S if use.num_requests else 0)
        if self._capacity is not None:
            left = self._refill(use)
            headers["X-RateLimit-Limit-Tokens"] = str(self._capacity)
            headers["X-RateLimit-Remaining-Tokens"] = str(max(0, int(left)))
            headers["X-RateLimit-Reset-Tokens"] = _duration((self._capacity - left) * 60 / self._capacity)
        return headers


def _duration(seconds: float) -> str:
    """As Go spells it and OpenAI sends it, in whole milliseconds below a second: 6m0s, 1s, 12ms."""
    if seconds < 1:
        return f"{math.ceil(seconds * 1000)}ms" if seconds > 0 else "0s"
    minutes, rest = divmod(math.ceil(seconds), 60)
    return f"{minutes}m{rest}s" if minutes else f"{rest}s"
