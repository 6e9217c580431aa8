"""AsyncEngine: what the API process holds of the engine process, and the supervisor that keeps one alive.

Owns the child process, the socket to it and one `TokenStream` per request under way. Knows no text.
Invariant: every submitted stream ends exactly once: with a `finish_reason`, or by its own `abort`.

    loading --> ready --> stopping          failed: the first load went wrong
                 |  ^
       crash     v  |  back-off, load anew
               restarting
"""

from __future__ import annotations

import asyncio
import logging
import socket
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

from gqa_serve.config import EngineConfig, engine_environment
from gqa_serve.engine.request import EngineRequest, FinishReason, ModelInfo, TokenOutput
from gqa_serve.engine.wire import (
    LENGTH,
    Abort,
    Add,
    Failed,
    Loading,
    Outputs,
    Ready,
    Start,
    Stop,
    ToEngine,
    frame,
    from_engine_decoder,
)
from gqa_serve.errors import EngineUnavailableError, ModelError, QueueFullError

logger = logging.getLogger(__name__)

State = Literal["loading", "ready", "restarting", "stopping", "failed"]

_FIRST_BACKOFF_S = 0.5
_MAX_BACKOFF_S = 30.0
_HEALTHY_AFTER_S = 60.0  # a process that lived this long restarts the back-off
_EXIT_TIMEOUT_S = 5.0
_DIED = "The engine process died while computing this request. It is being restarted; try again."


class TokenStream:
    """Async iterator over the outputs of one request; the last has a `finish_reason`.

    What has piled up since the last read comes as one merged output.
    """

    def __init__(self, engine: AsyncEngine, request_id: str) -> None:
        self._engine = engine
        self._request_id = request_id
        self._outputs: deque[TokenOutput] = deque()
        self._arrived = asyncio.Event()
        self._ended = False

    def __aiter__(self) -> TokenStream:
        return self

    async def __anext__(self) -> TokenOutput:
        while not self._outputs:
            if self._ended:
                raise StopAsyncIteration
            self._arrived.clear()
            await self._arrived.wait()
        merged = self._outputs.popleft()
        while self._outputs:
            merged = _merge(merged, self._outputs.popleft())
        return merged

    def abort(self) -> None:
        """End the request now, freeing its blocks. Does nothing if it has ended."""
        if not self._ended:
            self._end()
            self._engine._send(Abort(self._request_id))

    def _put(self, output: TokenOutput) -> None:
        self._outputs.append(output)
        if output.finish_reason is not None:
            self._end()
        self._arrived.set()

    def _end(self) -> None:
        self._ended = True
        self._engine._streams.pop(self._request_id, None)
        self._arrived.set()


def _merge(first: TokenOutput, then: TokenOutput) -> TokenOutput:
    """Two consecutive outputs as one. `prompt_logprobs` comes with the first only."""
    logprobs = None
    if first.logprobs is not None or then.logprobs is not None:
        logprobs = (first.logprobs or []) + (then.logprobs or [])
    return TokenOutput(
        request_id=first.request_id,
        token_ids=first.token_ids + then.token_ids,
        logprobs=logprobs,
        prompt_logprobs=first.prompt_logprobs or then.prompt_logprobs,
        pooled=first.pooled or then.pooled,
        num_cached_tokens=first.num_cached_tokens,
        finish_reason=then.finish_reason,
        stop_token_id=then.stop_token_id,
        error=then.error,
    )


class AsyncEngine:
    """The engine process, seen from an event loop."""

    command: Sequence[str] = (sys.executable, "-m", "gqa_serve.engine.process")
    """What to run, before the socket's number; tests put a process with planted faults here."""

    def __init__(
        self,
        path: Path,
        config: EngineConfig,
        *,
        log_level: str = "info",
        on_load: Callable[[int, int], None] | None = None,
    ) -> None:
        self.state: State = "loading"
        self.model_info: ModelInfo | None = None
        self._path = path
        self._config = config
        self._log_level = log_level
        self._on_load = on_load
        self._streams: dict[str, TokenStream] = {}
        self._process: asyncio.subprocess.Process | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._supervisor: asyncio.Task[None] | None = None

    @property
    def num_requests(self) -> int:
        """Requests under way."""
        return len(self._streams)

    async def start(self) -> None:
        """Start the process and load the model. Raises ModelError with the engine's own words if it can't."""
        try:
            reader = await self._spawn()
            await self._load(reader)
        except OSError as error:
            self.state = "failed"
            await self._reap()
            raise ModelError(f"The engine process could not be started: {error}.") from error
        except BaseException:
            self.state = "failed"
            await self._reap()
            raise
        if self.state == "loading":
            self.state = "ready"
        self._supervisor = asyncio.create_task(self._supervise(reader))

    def submit(self, request: EngineRequest) -> TokenStream:
        """Send a request to the engine. Raises EngineUnavailableError or QueueFullError at once."""
        if self.state != "ready":
            raise EngineUnavailableError(f"The engine is {self.state}; try again in a moment.")
        limit = self._config.max_num_seqs + self._config.max_waiting
        if len(self._streams) >= limit:
            raise QueueFullError(
                f"The server is computing or holding {limit} requests already; try again later."
            )
        stream = self._streams[request.request_id] = TokenStream(self, request.request_id)
        self._send(Add(request))
        return stream

    def refuse_new(self) -> None:
        """Take no more requests; those under way go on."""
        self.state = "stopping"

    async def stop(self) -> None:
        """End the requests under way with "abort", then the process."""
        self.refuse_new()
        if self._supervisor is not None:
            self._supervisor.cancel()
            await asyncio.gather(self._supervisor, return_exceptions=True)
        self._end_streams("abort", "The server is shutting down.")
        self._send(Stop())
        await self._reap()

    def _send(self, message: ToEngine) -> None:
        if self._writer is not None and not self._writer.is_closing():
            self._writer.write(frame(message))

    def _end_streams(self, reason: FinishReason, message: str) -> None:
        for request_id, stream in list(self._streams.items()):
            stream._put(TokenOutput(request_id=request_id, finish_reason=reason, error=message))

    async def _spawn(self) -> asyncio.StreamReader:
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = await asyncio.create_subprocess_exec(
                *self.command,
                str(theirs.fileno()),
                pass_fds=[theirs.fileno()],
                stdin=asyncio.subprocess.DEVNULL,
                env=engine_environment(),
            )
        reader, self._writer = await asyncio.open_connection(sock=ours)
        self._send(Start(str(self._path), self._config, self._log_level))
        return reader

    async def _load(self, reader: asyncio.StreamReader) -> None:
        """Read messages until Ready."""
        while True:
            try:
                message = await _read(reader)
            except (asyncio.IncompleteReadError, ConnectionError) as error:
                raise ModelError(
                    "The engine process died while loading the model; its last words are above. "
                    "If there are none, the system may have run out of memory."
                ) from error
            if isinstance(message, Loading) and self._on_load is not None:
                self._on_load(message.done, message.total)
            elif isinstance(message, Failed):
                raise ModelError(message.message)
            elif isinstance(message, Ready):
                self.model_info = message.info
                return

    async def _supervise(self, reader: asyncio.StreamReader) -> None:
        """Deliver outputs; when the process dies, fail what it held and start another, for ever."""
        backoff = _FIRST_BACKOFF_S
        try:
            while True:
                started = time.monotonic()
                await self._deliver(reader)
                self._end_streams("error", _DIED)
                if self.state == "stopping":
                    return
                self.state = "restarting"
                status = await self._reap()
                if time.monotonic() - started > _HEALTHY_AFTER_S:
                    backoff = _FIRST_BACKOFF_S
                logger.error("The engine process ended (status %s); starting another.", status)
                reader, backoff = await self._restart(backoff)
                if self.state == "restarting":
                    self.state = "ready"
                    logger.info("The engine is ready again.")
        except Exception:
            logger.exception("The engine's supervisor failed; no requests can be taken until a restart.")
            self.state = "failed"
            self._end_streams("error", "The server can no longer reach its engine.")

    async def _restart(self, backoff: float) -> tuple[asyncio.StreamReader, float]:
        """Start processes, waiting longer each time, until one has loaded the model."""
        while True:
            await asyncio.sleep(backoff)
            backoff = min(backoff * 2, _MAX_BACKOFF_S)
            try:
                reader = await self._spawn()
                await self._load(reader)
                return reader, backoff
            except (ModelError, OSError) as error:
                await self._reap()
                logger.error("The engine could not be restarted: %s Next try in %.1f s.", error, backoff)

    async def _deliver(self, reader: asyncio.StreamReader) -> None:
        """Hand outputs to their streams until the process's end of the socket closes."""
        while True:
            try:
                message = await _read(reader)
            except (asyncio.IncompleteReadError, ConnectionError):
                return
            if isinstance(message, Outputs):
                for output in message.outputs:
                    # A stream that was aborted while this output was on its way is gone.
                    if (stream := self._streams.get(output.request_id)) is not None:
                        stream._put(output)

    async def _reap(self) -> int | None:
        """Close the socket and wait for the process, killing it if it lingers. Returns its status."""
        writer, self._writer = self._writer, None
        process, self._process = self._process, None
        if writer is not None:
            writer.close()
        if process is None:
            return None
        try:
            status = await asyncio.wait_for(process.wait(), _EXIT_TIMEOUT_S)
        except asyncio.TimeoutError:
            process.kill()
            status = await process.wait()
        if writer is not None:
            writer.transport.abort()  # a process that stopped reading left bytes that close() waits for
        return status


async def _read(reader: asyncio.StreamReader) -> Loading | Ready | Failed | Outputs:
    (length,) = LENGTH.unpack(await reader.readexactly(LENGTH.size))
    message: Loading | Ready | Failed | Outputs = from_engine_decoder.decode(await reader.readexactly(length))
    return message
