"""`Turns`: requests that come at once begin one after the other, and streams under way go on between them.

Reading a request, rendering its template and encoding its prompt take about 2 ms of the event loop, between
two points where anything else can run. When a thousand clients connect at once, all would come before
the next token of those who are served already: a second's pause. Owns the order of beginnings; knows nothing
of what is asked. Invariant: first come, first served, and no request waits while the event loop is idle.
"""

from __future__ import annotations

import asyncio
from collections import deque

from starlette.types import ASGIApp, Receive, Scope, Send

PER_PASS = 4  # requests that begin in one pass of the event loop


class Turns:
    """Around the application: a POST begins when it is its turn; anything else, probes for one, at once."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._left = PER_PASS
        self._renews = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] == "POST":
            await self._turn()
        await self._app(scope, receive, send)

    async def _turn(self) -> None:
        loop = asyncio.get_running_loop()
        if not self._renews:
            self._renews = True
            loop.call_soon(self._next_pass, loop)
        if self._left and not self._waiting:
            self._left -= 1
            return
        turn = loop.create_future()
        self._waiting.append(turn)
        await turn

    def _next_pass(self, loop: asyncio.AbstractEventLoop) -> None:
        """A pass later: let the next ones begin, and come again while any are left."""
        self._left = PER_PASS
        while self._left and self._waiting:
            turn = self._waiting.popleft()
            if not turn.done():  # else its task was cancelled
                turn.set_result(None)
                self._left -= 1
        self._renews = bool(self._waiting)
        if self._renews:
            loop.call_soon(self._next_pass, loop)
