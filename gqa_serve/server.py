"""`gqa-serve serve`: the API process. Binds, loads the engine (or several), serves, drains.

Owns the order of start and stop. The port answers (503) while the model loads, so that a supervisor sees a
live process; a signal stops new requests, lets those under way finish, then ends the engine process.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import math
import signal
import socket
import sys
from collections.abc import Coroutine, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import uvicorn

from gqa_serve.api.access import load_keys
from gqa_serve.api.app import create_app
from gqa_serve.api.connection_limits import SEND_BUFFER_BYTES, ConnectionLimits, with_files_for
from gqa_serve.api.http_protocol import HttpProtocol, http_protocol
from gqa_serve.api.tracing import check_endpoint
from gqa_serve.config import EngineConfig, ServerConfig
from gqa_serve.engine.chat_template import ChatTemplate
from gqa_serve.engine.chat_template_files import load_chat_template
from gqa_serve.engine.client import AsyncEngine
from gqa_serve.engine.grammars import warm_up
from gqa_serve.engine.replicas import EngineReplicas
from gqa_serve.engine.request import ModelInfo
from gqa_serve.engine.tokenizer import Tokenizer, load_tokenizer
from gqa_serve.engine.weights.hub import resolve_model
from gqa_serve.errors import ConfigError
from gqa_serve.malloc import limit_arenas
from gqa_serve.progress import ProgressBar

logger = logging.getLogger(__name__)

Engines = AsyncEngine | EngineReplicas

# Longer than proxies and clients keep an idle connection (60 s at most, as a rule): if it is the server that
# closes it, a request that was just sent is lost.
_KEEP_ALIVE_S = 75
_SWITCH_S = 0.001  # the loop waits for this each time it wants to go on beside them; Python's own is 5 ms
_LAST_WORDS_S = 3  # after the drain timeout, for the errors of what did not finish to reach their clients


def serve(engine_config: EngineConfig, server_config: ServerConfig) -> None:
    """Serve until a signal ends it. Raises GqaServeError for whatever prevents that."""
    limit_arenas()
    load_keys(server_config)  # whatever is wrong with them should not wait for a download
    check_endpoint(server_config.otlp_endpoint)
    with _listen(server_config) as listener:
        path = resolve_model(
            engine_config.model,
            revision=engine_config.revision,
            download_dir=engine_config.download_dir,
            offline=engine_config.offline,
        )
        logger.info("Loading %s.", path)
        tokenizer = load_tokenizer(path)
        template = load_chat_template(path, server_config.chat_template, tokenizer.special_texts)
        logger.info("Chat template: %s.", template.source_name)
        bar = ProgressBar("Loading weights")
        engine = _create_engines(path, engine_config, server_config, bar)
        try:
            _run(_serve(engine, tokenizer, template, server_config, listener))
        finally:
            bar.close()


def _create_engines(path: Path, config: EngineConfig, server: ServerConfig, bar: ProgressBar) -> Engines:
    """Not started yet. Where there is one engine, nothing stands between it and the API."""
    if server.data_parallel_size == 1:
        return AsyncEngine(
            path, config, log_level=server.log_level, log_format=server.log_format, on_load=bar.update
        )
    return EngineReplicas(
        path,
        config,
        server.data_parallel_size,
        log_level=server.log_level,
        log_format=server.log_format,
        on_load=bar.update,
    )


def _run(main: Coroutine[Any, Any, None]) -> None:
    """As asyncio.run, on uvloop's event loop where there is one: a token costs the API process less.

    Work in other threads (large bodies, templates, schemas) gives the interpreter back after a millisecond.
    """
    sys.setswitchinterval(_SWITCH_S)
    if sys.platform == "win32":
        asyncio.run(main)
    else:
        import uvloop

        uvloop.run(main)


def _listen(config: ServerConfig) -> socket.socket:
    try:
        family, kind, proto, _, address = socket.getaddrinfo(
            config.host, config.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, proto)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
        listener.bind(address)
    except OSError as error:
        raise ConfigError(
            f"Cannot listen on {config.host}:{config.port}: {error.strerror}. "
            "Choose another --port or --host, or stop what uses it."
        ) from error
    return listener


class _Server(uvicorn.Server):
    """Uvicorn, telling the engine of a signal at once, and exiting with 0 after one.

    The port goes on answering (with 503, what a load balancer understands) until `drained` is set.
    """

    def __init__(
        self, config: uvicorn.Config, engine: Engines, limits: ConnectionLimits, drain_timeout_s: float
    ) -> None:
        super().__init__(config)
        self.signalled = asyncio.Event()
        self.drained = asyncio.Event()
        self._limits = limits
        self._drain_timeout_s = drain_timeout_s
        self._engine = engine
        self._loop = asyncio.get_running_loop()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal drains, a second one does not wait."""
        if self.should_exit:
            self.force_exit = True
            return
        self.should_exit = True
        self._engine.refuse_new()
        self._loop.call_soon_threadsafe(self.signalled.set)
        # Not from here: a signal may come while the log is being written.
        self._loop.call_soon_threadsafe(
            logger.info, "Stopping: waiting for running requests; once more to quit now."
        )

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Close idle connections, wait for the engine, then close the port, then the other connections."""
        deadline = self._loop.time() + self._drain_timeout_s
        self._limits.closing = True
        for connection in list(self.server_state.connections):
            if isinstance(connection, HttpProtocol):
                connection.close_if_idle()
        await self.drained.wait()
        # What is left now are answers on their way to their clients.
        left_s = max(0.0, deadline - self._loop.time())
        self.config.timeout_graceful_shutdown = math.ceil(left_s) + _LAST_WORDS_S
        await super().shutdown(sockets)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Handle signals while serving. Unlike the base class, do not raise them again afterwards."""
        previous = {sig: signal.signal(sig, self.handle_exit) for sig in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for sig, handler in previous.items():
                signal.signal(sig, handler)


async def _serve(
    engine: Engines,
    tokenizer: Tokenizer,
    template: ChatTemplate,
    config: ServerConfig,
    listener: socket.socket,
) -> None:
    warming = asyncio.create_task(asyncio.to_thread(warm_up, tokenizer))  # while the engine loads
    limits = ConnectionLimits(
        config.read_timeout, config.send_timeout, with_files_for(config.max_connections)
    )
    app = create_app(engine, tokenizer, template, config, limits=limits)
    options = uvicorn.Config(
        app,
        http=http_protocol(limits),
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=_KEEP_ALIVE_S,
    )
    server = _Server(options, engine, limits, config.drain_timeout)
    serving = asyncio.create_task(server.serve(sockets=[listener]))  # first, since it handles signals
    loading = asyncio.create_task(engine.start())
    draining = asyncio.create_task(_drain(server, engine, loading, config.drain_timeout))
    try:
        await asyncio.wait({serving, loading}, return_when=asyncio.FIRST_COMPLETED)
        if loading.done() and not server.should_exit:
            loading.result()
            gc.freeze()  # a collection that looks at all that was loaded, too, stops the event loop for 0.3 s
            _announce(engine.model_info, listener, config)
        await serving
    finally:
        server.should_exit = True
        server.signalled.set()
        await asyncio.gather(serving, return_exceptions=True)
        await draining
        await asyncio.wait({warming})


async def _drain(server: _Server, engine: Engines, loading: asyncio.Task[None], timeout_s: float) -> None:
    """After the signal: wait for requests under way, at most `timeout_s`, then end the rest and the engine.

    What is ended here still reaches its clients: the server closes their connections later.
    """
    await server.signalled.wait()
    loop = asyncio.get_running_loop()
    deadline = loop.time() + timeout_s
    try:
        loading.cancel()  # a model that is still loading is not waited for
        await asyncio.gather(loading, return_exceptions=True)
        while engine.num_requests and not server.force_exit and loop.time() < deadline:
            await asyncio.sleep(0.02)
        await engine.stop()
    finally:
        server.drained.set()


def _announce(info: ModelInfo | None, listener: socket.socket, config: ServerConfig) -> None:
    """The ready line: what is served, what it can hold, and a request to try."""
    if info is None:
        return
    host, port = listener.getsockname()[:2]
    name = config.served_model_name[0] if config.served_model_name else info.model
    shown = f"[{host}]" if ":" in host else host
    logger.info(
        "%s (%s): %d query heads over %d KV heads; %s weights; %s KV cache of %d tokens (%.1f GiB); "
        "context %d; %s backend on %s%s%s.",
        name,
        info.architecture,
        info.num_heads,
        info.num_kv_heads,
        info.dtype,
        info.kv_dtype,
        info.num_blocks * info.block_size,
        info.num_blocks * info.block_size * info.kv_bytes_per_token / 2**30,
        info.max_model_len,
        info.backend,
        info.device,
        f" with {info.instruction_set}" if info.instruction_set else "",
        f"; {config.data_parallel_size} such engines" if config.data_parallel_size > 1 else "",
    )
    body = f'{{"model": "{name}", "temperature": 0, "messages": [{{"role": "user", "content": "Hello!"}}]}}'
    key = ' -H "Authorization: Bearer $API_KEY"' if config.api_key or config.api_key_file else ""
    print(
        f"Ready: http://{shown}:{port}/v1 - try: curl http://{shown}:{port}/v1/chat/completions "
        f"-H 'Content-Type: application/json'{key} -d '{body}'",
        flush=True,
    )
