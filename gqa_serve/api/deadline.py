"""`Deadlines`: `--request-timeout`, for whatever a request is busy with.

Owns the moment by which a request must have been answered, noted in its scope, and the 504 of a request for
which nothing was sent by then: its work is cancelled, and if that takes time (a thread cannot be
interrupted), nobody waits for it. Once an endpoint generates, `Generation` looks at the same moment by
itself, because only it can end a stream in the endpoint's own words. Knows no endpoint. Invariant: a request
gets one answer, and its client is told not to try again what takes too long.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any

from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gqa_serve.errors import RequestError

_KEY = "gqa_serve.deadline"
_MARGIN_S = 0.25  # for the endpoint to say it in its own words

logger = logging.getLogger(__name__)


class RequestTimeoutError(RequestError):
    """The request took longer than `--request-timeout`."""

    status = 504
    type = "timeout_error"

    def __init__(self, timeout_s: float) -> None:
        super().__init__(
            f"The request took longer than {timeout_s:g} s (--request-timeout). Ask for fewer tokens.",
            code="request_timeout",
        )
        self.headers = {"X-Should-Retry": "false"}  # OpenAI's and Anthropic's clients would repeat it at once


class Deadline:
    """The end of one request's time, by the event loop's clock."""

    def __init__(self, at: float, timeout_s: float) -> None:
        self.at = at
        self._timeout_s = timeout_s

    def error(self) -> RequestTimeoutError:
        """What to tell the client."""
        return RequestTimeoutError(self._timeout_s)


def deadline_of(scope: Scope) -> Deadline | None:
    """The deadline of a request, if there is one."""
    deadline: Deadline | None = scope.get(_KEY)
    return deadline


class Deadlines:
    """`app`, with a deadline on each of its requests; `respond` words the error for a path's clients."""

    def __init__(
        self, app: ASGIApp, timeout_s: float, respond: Callable[[Scope, RequestError], Response]
    ) -> None:
        self._app = app
        self._timeout_s = timeout_s
        self._respond = respond
        self._abandoned: set[asyncio.Task[Any]] = set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        deadline = Deadline(asyncio.get_running_loop().time() + self._timeout_s, self._timeout_s)
        answering = late = False

        async def send_in_time(message: Message) -> None:
            nonlocal answering
            if not late:
                answering = True
                await send(message)

        scope = {**scope, _KEY: deadline}
        task = asyncio.ensure_future(self._app(scope, receive, send_in_time))
        try:
            await asyncio.wait((task,), timeout=self._timeout_s + _MARGIN_S)
            if task.done() or answering:
                await task
                return
        finally:
            if not task.done():
                late = True
                task.cancel()
                self._abandoned.add(task)  # the event loop alone would forget it
                task.add_done_callback(self._ended)
        await self._respond(scope, deadline.error())(scope, receive, send)

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._abandoned.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.error("A request that had taken too long failed, too.", exc_info=error)
