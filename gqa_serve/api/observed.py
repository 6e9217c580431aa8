"""The outermost layer of the application: each exchange is counted, timed, and logged if it was refused.

Owns when `Metrics` hears of HTTP requests, and the log's line about refusals. Knows no endpoint. Invariants:
an exchange is counted once, by the route's template, a method and a status, so that nothing a client made up
becomes a label; a refusal is told to `Metrics` here: whoever refuses inside the application only raises.
"""

from __future__ import annotations

import logging
import time

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gqa_serve.api.errors import shorten
from gqa_serve.api.exchange import KEY, NO_ROUTE, Exchange
from gqa_serve.api.http_protocol import CONNECTIONS_EXTENSION
from gqa_serve.api.metrics import Metrics
from gqa_serve.errors import QueueFullError

METHODS = frozenset({"GET", "HEAD", "POST", "DELETE", "OPTIONS", "PUT", "PATCH"})
REFUSAL_LINES = 20  # in each of the periods of so many seconds; more of them are counted only
REFUSAL_PERIOD_S = 10.0

_REASONS = {
    400: "bad_request", 401: "unauthorized", 403: "forbidden", 404: "not_found", 405: "not_found",
    408: "timeout", 413: "too_large", 421: "forbidden", 429: "rate_limited", 431: "too_large",
    499: "client_left", 500: "failed", 503: "unavailable",
    504: "request_timeout",
}  # fmt: skip

logger = logging.getLogger(__name__)


class Observed:
    """The outermost layer of the application."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics
        self._refusals = _Refusals()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        exchange = scope[KEY] = Exchange()

        async def noting(message: Message) -> None:
            if message["type"] == "http.response.start":
                exchange.status = message["status"]
                ids = [value for name, value in message["headers"] if name == b"x-request-id"]
                exchange.request_id = ids[0].decode("latin-1") if ids else ""
            await send(message)

        outside = scope.get("extensions", {}).get(CONNECTIONS_EXTENSION, {})
        self._metrics.exchange_began(outside.get("open", ()))
        try:
            await self._app(scope, receive, noting)
        finally:
            self._over(exchange, scope)

    def _over(self, exchange: Exchange, scope: Scope) -> None:
        method = scope["method"] if scope["method"] in METHODS else "other"
        # Without an answer the client left, or a failure left it without one.
        self._metrics.exchange_over(exchange.route, method, exchange.status or 499)
        if exchange.status >= 400 and not exchange.is_accepted:
            reason = _reason(exchange)
            if _asks_for_work(exchange, method):
                self._metrics.refused(reason)
            self._refusals.log(exchange, scope, reason)


def _asks_for_work(exchange: Exchange, method: str) -> bool:
    """Neither a probe, which is answered 503 while the model loads, nor a scanner that tries paths."""
    return method == "POST" and not (exchange.route == NO_ROUTE and exchange.status == 404)


def _reason(exchange: Exchange) -> str:
    if isinstance(exchange.error, QueueFullError) and exchange.error.code == "queue_full":
        return "queue_full"
    return _REASONS.get(exchange.status, "failed" if exchange.status >= 500 else "bad_request")


class _Refusals:
    """A line for each refused request, but few in a period: who hammers must not fill the disk."""

    def __init__(self) -> None:
        self._period_began_s = 0.0
        self._num_logged = 0
        self._num_left_out = 0

    def log(self, exchange: Exchange, scope: Scope, reason: str) -> None:
        """Of prompts and keys nothing is shown: not the error's message, which may quote them."""
        now = time.monotonic()
        if now - self._period_began_s > REFUSAL_PERIOD_S:
            self._period_began_s, self._num_logged = now, 0
        if self._num_logged == REFUSAL_LINES:
            self._num_left_out += 1
            return
        self._num_logged += 1
        left_out, self._num_left_out = self._num_left_out, 0
        fields = {
            "request_id": exchange.request_id,
            "method": shorten(scope["method"]),
            "path": shorten(scope["path"]) if exchange.route == NO_ROUTE else exchange.route,
            "status": exchange.status,
            "reason": reason,
            "param": shorten(getattr(exchange.error, "param", None) or "") or None,
            "code": getattr(exchange.error, "code", None),
            "e2e_s": round(now - exchange.began_s, 4),
            "left_out": left_out,
        }
        logger.info(
            "%s refused: %s %s %d %s%s%s",
            fields["request_id"],
            fields["method"],
            ascii(fields["path"])[1:-1],
            exchange.status,
            reason,
            f" param={ascii(fields['param'])[1:-1]}" if fields["param"] else "",
            f" ({left_out} more left out before this line)" if left_out else "",
            extra={"fields": fields},
        )
