"""`Exchange`: what is known of one HTTP request and its answer, for whoever counts or logs it afterwards.

Travels in the ASGI scope, so that each layer can note what it learns: the route, the error, that a generation
began. Owns nothing but these notes; `observed.py` reads them. Knows no endpoint.
"""

from __future__ import annotations

import dataclasses
import time

import starlette.routing
from starlette.types import Receive, Scope, Send

KEY = "gqa_serve.exchange"
NO_ROUTE = "none"  # refused before the routes, or none of them


@dataclasses.dataclass(slots=True)
class Exchange:
    """What is known of one request and its answer so far."""

    began_s: float = dataclasses.field(default_factory=time.monotonic)
    route: str = NO_ROUTE
    error: Exception | None = None
    """What the client was told, if it was an error."""
    is_accepted: bool = False
    """A generation began: how that ended is the account's to say."""
    status: int = 0
    request_id: str = ""
    """As in the answer's X-Request-Id."""


def exchange_of(scope: Scope) -> Exchange:
    """The exchange that `scope` belongs to; a new one where no `Observed` is around the application."""
    exchange: Exchange = scope.setdefault(KEY, Exchange())
    return exchange


class Route(starlette.routing.Route):
    """A route that notes its template, which is what requests are counted by."""

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        exchange_of(scope).route = self.path
        await super().handle(scope, receive, send)
