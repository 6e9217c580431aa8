"""`EngineReplica`: one engine and the application around it, as a deployment of Ray Serve.

Owns the order of start and stop in a replica, its health, and the figures it reports. The application is the
one that `gqa-serve` serves; its requests come as `HttpRequest`s from the ingress. Ray starts it, drains it
(no new requests, then waiting for those under way) and calls `__del__` when that is done. Invariant: Ray
sends requests only after the model has been loaded, since that is what the constructor waits for.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import time
from collections.abc import AsyncGenerator
from typing import Any

from ray import serve
from ray.serve.metrics import Gauge
from starlette.types import Message

from gqa_serve.api.app import create_app
from gqa_serve.config import EngineConfig, ServerConfig
from gqa_serve.deploy.asgi_stream import answer_messages, whole_answer
from gqa_serve.deploy.http_request import DECLINED_BY, HttpRequest
from gqa_serve.deploy.ray_autoscaling import KV_USE, READY, REQUESTS, WAITING_TOKENS
from gqa_serve.engine.chat_template_files import load_chat_template
from gqa_serve.engine.client import AsyncEngine
from gqa_serve.engine.grammars import warm_up
from gqa_serve.engine.metrics import StepStats
from gqa_serve.engine.tokenizer import load_tokenizer
from gqa_serve.engine.weights.hub import resolve_model
from gqa_serve.logs import configure_logging
from gqa_serve.malloc import limit_arenas


class EngineReplica:
    """A whole engine on the machine that Ray chose. Raises GqaServeError for whatever prevents that."""

    async def __init__(  # type: ignore[misc]  # Ray awaits it, on the replica's event loop
        self, engine: EngineConfig, server: ServerConfig, restart_timeout_s: float
    ) -> None:
        self._engine: AsyncEngine | None = None  # for __del__, should anything below fail
        self._restart_timeout_s = restart_timeout_s
        self._well_at = time.monotonic()
        self._last_step = StepStats()
        limit_arenas()
        configure_logging(server.log_level, server.log_format)
        path = await asyncio.to_thread(
            resolve_model,
            engine.model,
            revision=engine.revision,
            download_dir=engine.download_dir,
            offline=engine.offline,
        )
        tokenizer = await asyncio.to_thread(load_tokenizer, path)
        template = load_chat_template(path, server.chat_template, tokenizer.special_texts)
        self._engine = AsyncEngine(path, engine, log_level=server.log_level, log_format=server.log_format)
        self._app = create_app(self._engine, tokenizer, template, server)
        self._count_step, self._engine.on_step = self._engine.on_step, self._stepped
        self._gauges = {
            name: Gauge(f"gqa_serve_{name}", text)
            for name, text in (
                (REQUESTS, "Requests in the engine, computed or queued."),
                (WAITING_TOKENS, "Prompt tokens of the queued ones."),
                (KV_USE, "Share of the KV blocks that requests hold."),
                (READY, "1 while the engine takes requests."),
            )
        }
        await asyncio.gather(self._engine.start(), asyncio.to_thread(warm_up, tokenizer))
        gc.freeze()  # a collection that looks at all that was loaded, too, stops the event loop for 0.3 s

    async def __del__(self) -> None:
        """Ray's word for the end: awaited when the last request is over."""
        if self._engine is not None:
            await self._engine.stop()

    def _stepped(self, stats: StepStats) -> None:
        self._last_step = stats
        self._count_step(stats)

    # --- what the ingress calls ----------------------------------------------------------------------------

    async def answer(self, request: HttpRequest) -> AsyncGenerator[list[Message], None]:
        """The application's answer as it comes; see `answer_messages`.

        While the engine is not ready, the request is declined instead, once: another replica may have an
        engine. If it comes again none has, and the application says what there is to say.
        """
        if self._running.state != "ready" and (name := _name()) not in request.declined_by:
            yield [{DECLINED_BY: name}]
            return
        async with contextlib.aclosing(answer_messages(self._app, request)) as batches:
            async for batch in batches:
                yield batch

    async def whole_answer(self, request: HttpRequest) -> tuple[str, int, list[tuple[bytes, bytes]], bytes]:
        """This replica's name, and the application's answer at once: for what is asked of every replica."""
        return (_name(), *await whole_answer(self._app, request))

    async def status(self) -> dict[str, Any]:
        """Who this is and how it fares, for whoever looks after a deployment."""
        engine = self._running
        ids = {"replica": _name(), "pid": os.getpid(), "engine_pid": engine.pid, "state": engine.state}
        return {**ids, "num_restarts": engine.num_restarts, **self._load()}

    # --- what Ray calls ------------------------------------------------------------------------------------

    async def check_health(self) -> None:
        """Raises RuntimeError if the engine will not come back by itself, or does not for too long."""
        now = time.monotonic()
        state = self._running.state
        if state == "failed":
            raise RuntimeError("The engine has failed and cannot be restarted.")
        if state != "restarting":
            self._well_at = now
        elif now - self._well_at > self._restart_timeout_s:
            raise RuntimeError(
                f"The engine process has not come back for {now - self._well_at:.0f} s; its log says why."
            )

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """Figures for `EngineLoadPolicy`."""
        return self._load()

    async def record_routing_stats(self) -> dict[str, Any]:
        """Figures for the ingress's router; tells them to Ray's metrics, too."""
        load, ready = self._load(), self._running.state == "ready"
        for name, value in {**load, READY: float(ready)}.items():
            self._gauges[name].set(value)
        return {READY: ready, REQUESTS: int(load[REQUESTS])}

    def _load(self) -> dict[str, float]:
        """The last step may be long ago: an engine without requests has no load, whatever it said."""
        engine, stats = self._running, self._last_step
        if not engine.num_requests or engine.model_info is None:
            return {REQUESTS: 0.0, WAITING_TOKENS: 0.0, KV_USE: 0.0}
        num_blocks = engine.model_info.num_blocks
        return {
            REQUESTS: float(engine.num_requests),
            WAITING_TOKENS: float(stats.num_waiting_tokens),
            KV_USE: (num_blocks - stats.num_free_blocks) / num_blocks,
        }

    @property
    def _running(self) -> AsyncEngine:
        if self._engine is None:
            raise RuntimeError("The replica has not been started.")
        return self._engine


def _name() -> str:
    """Of this replica, as Ray's dashboard, logs and metrics have it."""
    name: str = serve.get_replica_context().replica_id.unique_id
    return name
