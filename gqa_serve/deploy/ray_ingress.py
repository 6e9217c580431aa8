"""`Ingress`: what stands between Ray's proxies and the engines.

Owns reading a request whole, handing it to one engine through `PrefixRouter`, and passing its answer on as it
comes. It is needed because Ray's proxies choose a replica before they have seen a body. Computes nothing and
checks nothing: keys, limits and errors are the application's, in the replica. Invariants: a request that a
replica without an engine declines goes to another one; one that no engine takes in time gets a 503; an answer
that breaks off breaks the connection, so that nobody takes it for a whole one; when the client leaves, the
engine is told.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
from collections.abc import AsyncGenerator, Iterable

import anyio.to_thread
from ray.exceptions import RayActorError
from ray.serve.exceptions import DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from gqa_serve.api.access import is_anthropic, route_path
from gqa_serve.api.anthropic.reply import anthropic_error
from gqa_serve.api.errors import error_response
from gqa_serve.api.responses.protocol import new_id
from gqa_serve.deploy.http_request import DECLINED_BY, HttpRequest, portable_scope, read_body
from gqa_serve.deploy.merged_metrics import merged_metrics
from gqa_serve.deploy.prefix_keys import prefix_keys
from gqa_serve.errors import EngineUnavailableError, RequestError

logger = logging.getLogger(__name__)

_LARGE_BODY_BYTES = 256 * 1024  # from here on, keys are made in a thread
_ATTEMPTS = 3  # of one request, whose replicas decline it, or die before they have said anything
_REQUEST_ID = b"x-request-id"
_METRICS_TIMEOUT_S = 10.0
_METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class _DeclinedError(Exception):
    """A replica has no engine for the request just now."""

    def __init__(self, replica: str) -> None:
        super().__init__(replica)
        self.replica = replica


class Ingress:
    """An ASGI application. `engines` is Ray's handle of the `EngineReplica` deployment."""

    def __init__(self, engines: DeploymentHandle, *, max_body_bytes: int, replica_timeout_s: float) -> None:
        self._engines = engines.options(stream=True, method_name="answer")
        self._every_engine = engines
        self._max_body_bytes = max_body_bytes
        self._replica_timeout_s = replica_timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] == "lifespan":
            await _lifespan(receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1000})
        elif scope["method"] == "GET" and route_path(scope) == "/metrics":
            try:
                response = await self._metrics(scope)
            except (TimeoutError, DeploymentUnavailableError):
                await _refuse(scope, receive, send, "The engines do not answer; try again later.")
            else:
                await response(scope, receive, send)
        else:
            await self._forward(scope, receive, send)

    async def _forward(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            body = await read_body(scope, receive, self._max_body_bytes)
        except ClientDisconnect:
            return
        keys: tuple[bytes, ...] = ()
        if len(body) >= _LARGE_BODY_BYTES:
            keys = await anyio.to_thread.run_sync(prefix_keys, body)
        elif body:
            keys = prefix_keys(body)
        request = HttpRequest(portable_scope(scope), body, keys)
        for attempt in range(1, _ATTEMPTS + 1):
            began = False
            try:
                async with contextlib.aclosing(self._answer(request)) as messages:
                    async for message in messages:
                        began = True
                        await send(_without_request_id(message))
                return
            except _DeclinedError as error:
                request = dataclasses.replace(request, declined_by=(*request.declined_by, error.replica))
                if attempt == _ATTEMPTS:
                    await _refuse(scope, receive, send, "The engines are restarting; try again.")
            except RayActorError as error:
                logger.warning("An engine replica died while it answered: %s", error)
                if began:
                    raise  # Ray's proxy closes the connection
                if attempt == _ATTEMPTS:
                    await _refuse(scope, receive, send, "Several engines died while they held this request.")
            except (asyncio.TimeoutError, DeploymentUnavailableError):
                if began:
                    raise  # a TimeoutError of the application's own
                await _refuse(scope, receive, send, "No engine is free to take the request; try again later.")
                return

    async def _answer(self, request: HttpRequest) -> AsyncGenerator[Message, None]:
        """The messages of one replica.

        Raises asyncio.TimeoutError if none takes the request in time, _DeclinedError if it has no engine.
        """
        batches = self._engines.remote(request)
        is_over = False
        try:
            first = await asyncio.wait_for(anext(batches), self._replica_timeout_s)
            if first:  # an empty one says that it was taken
                raise _DeclinedError(first[0][DECLINED_BY])
            async for batch in batches:
                for message in batch:
                    yield message
            is_over = True
        finally:
            if not is_over:
                batches.cancel()

    async def _metrics(self, scope: Scope) -> Response:
        """Every replica's metrics, told apart by a label; what one of them refuses is refused.

        Raises TimeoutError, or DeploymentUnavailableError where there is no replica.
        """
        headers = _without(b"accept", scope["headers"])  # there is one format that can be merged
        request = HttpRequest({**portable_scope(scope), "headers": headers}, b"")
        asked = self._every_engine.broadcast("whole_answer", request)
        answers = await asked.results_async(timeout_s=_METRICS_TIMEOUT_S, return_exceptions=True)
        texts: dict[str, str] = {}
        for answer in answers:
            if isinstance(answer, BaseException):  # it died just now
                logger.warning("A replica did not tell its metrics: %s", answer)
                continue
            name, status, headers, body = answer
            if status != 200:
                refusal = Response(body, status)
                refusal.raw_headers = _without(_REQUEST_ID, headers)
                return refusal
            texts[name] = body.decode()
        return Response(merged_metrics(texts), headers={"content-type": _METRICS_TYPE})


def _without_request_id(message: Message) -> Message:
    """Ray's proxy puts the request's id, which it chose or passed on to the application, on every answer."""
    if message["type"] != "http.response.start":
        return message
    return {**message, "headers": _without(_REQUEST_ID, message["headers"])}


def _without(name: bytes, headers: Iterable[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    return [header for header in headers if header[0].lower() != name]


async def _refuse(scope: Scope, receive: Receive, send: Send, message: str) -> None:
    error: RequestError = EngineUnavailableError(message)
    respond = (
        anthropic_error(error, new_id("msg_")) if is_anthropic(route_path(scope)) else error_response(error)
    )
    await respond(scope, receive, send)


async def _lifespan(receive: Receive, send: Send) -> None:
    """Nothing is to be done at start and end, but the server asks."""
    while True:
        message = await receive()
        await send({"type": f"{message['type']}.complete"})
        if message["type"] == "lifespan.shutdown":
            return
