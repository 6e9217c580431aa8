"""TokenStream: the outputs of one request, on their way from the engine to whoever reads them.

Owns what has arrived and not been read, and the one end of a stream. Knows no socket and no process.
Invariant: it ends once, and whoever made it is told so once, in the same moment.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from typing import Protocol

from gqa_serve.engine.request import TokenOutput


class Ticket(Protocol):
    """Whoever keeps an account of requests under way."""

    def answered(self) -> None:
        """The first output came."""

    def ended(self) -> None:
        """It is over."""


class TokenStream:
    """Async iterator over the outputs of one request; the last has a `finish_reason`.

    What has piled up since the last read comes as one merged output. `on_end` is called with the request's
    id, and whether the engine has to be told.
    """

    def __init__(self, request_id: str, on_end: Callable[[str, bool], None]) -> None:
        self.timer: asyncio.TimerHandle | None = None
        """Ends it, with all that was submitted together with it, unless one of them is computed in time."""
        self.ticket: Ticket | None = None
        self._request_id = request_id
        self._on_end = on_end
        self._outputs: deque[TokenOutput] = deque()
        self._arrived = asyncio.Event()
        self._answered = False
        self._ended = False
        self._error: Exception | None = None

    def __aiter__(self) -> TokenStream:
        return self

    async def __anext__(self) -> TokenOutput:
        while not self._outputs:
            if self._error is not None:
                raise self._error
            if self._ended:
                raise StopAsyncIteration
            self._arrived.clear()
            await self._arrived.wait()
        outputs, self._outputs = self._outputs, deque()
        return outputs[0] if len(outputs) == 1 else _merged(outputs)

    def abort(self) -> None:
        """End the request now, freeing its blocks. Does nothing if it has ended."""
        self._end(tell=True)

    def fail(self, error: Exception) -> None:
        """As `abort`, with an exception for whoever reads."""
        if not self._ended:
            self._error = error
            self._end(tell=True)

    def put(self, output: TokenOutput) -> None:
        """An output came."""
        self._outputs.append(output)
        if not self._answered:
            self._answered = True
            if self.ticket is not None:
                self.ticket.answered()
        if output.finish_reason is not None:
            self._end(tell=False)
        self._arrived.set()

    def _end(self, *, tell: bool) -> None:
        if not self._ended:
            self._ended = True
            self._arrived.set()
            self._on_end(self._request_id, tell)
            if self.ticket is not None:
                self.ticket.ended()


def _merged(outputs: Sequence[TokenOutput]) -> TokenOutput:
    """Consecutive outputs as one. The first tells what is told once of a request, the last how it ended."""
    first, last = outputs[0], outputs[-1]
    with_logprobs = any(output.logprobs is not None for output in outputs)
    return TokenOutput(
        request_id=first.request_id,
        token_ids=[token for output in outputs for token in output.token_ids],
        logprobs=[entry for output in outputs for entry in output.logprobs or ()] if with_logprobs else None,
        prompt_logprobs=first.prompt_logprobs,
        pooled=first.pooled,
        queue_s=first.queue_s,
        num_cached_tokens=first.num_cached_tokens,
        finish_reason=last.finish_reason,
        stop_token_id=last.stop_token_id,
        error=last.error,
        refused=last.refused,
    )
