"""AsyncEngine: what the API process holds of the engine process, and the supervisor that keeps one alive.

Owns the child process, the socket to it and one `TokenStream` per request under way. Knows no text.
Invariant: every submitted stream ends exactly once: with a `finish_reason`, by raising QueueTimeoutError, or
by its own `abort`.

    loading --> ready --> stopping          failed: the first load went wrong
                 |  ^
 crash or hang   v  |  back-off, load anew
               restarting

Nothing here ever waits for the engine to read: what is sent to it piles up in this process, within bounds
that `submit` keeps, so that an engine which is sending can always be read from.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import socket
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import msgspec

from gqa_serve.config import EngineConfig, engine_environment
from gqa_serve.engine.admission import Admission
from gqa_serve.engine.metrics import EngineSnapshot, StepStats
from gqa_serve.engine.placement import ALONE, Placement
from gqa_serve.engine.profiling import Profiles
from gqa_serve.engine.request import EngineRequest, FinishReason, ModelInfo, TokenOutput
from gqa_serve.engine.token_stream import TokenStream
from gqa_serve.engine.watchdog import Watchdog
from gqa_serve.engine.wire import (
    LENGTH,
    Abort,
    Add,
    Begun,
    Failed,
    FromEngine,
    Inspect,
    Loading,
    Outputs,
    Profiled,
    Ready,
    Snapshot,
    Start,
    Stop,
    ToEngine,
    frame,
    from_engine_decoder,
)
from gqa_serve.errors import EngineUnavailableError, ModelError, QueueFullError, QueueTimeoutError

logger = logging.getLogger(__name__)

State = Literal["loading", "ready", "restarting", "stopping", "failed"]

_FIRST_BACKOFF_S = 0.5
_MAX_BACKOFF_S = 30.0
_HEALTHY_AFTER_S = 60.0  # a process that lived this long restarts the back-off
_EXIT_TIMEOUT_S = 5.0
_MAX_UNREAD_BYTES = 64 * 2**20  # sent to an engine that has not read it yet; no more is accepted then
_LISTED = 4  # of the oldest requests, and of the newest, are named in a log line
_SLICE = 16  # outputs given to streams in one pass of the event loop, which takes about 2 ms then
# The socket closed, or what comes makes no sense any more.
_GONE = (asyncio.IncompleteReadError, ConnectionError, msgspec.DecodeError)
_DIED = "The engine process died while computing this request. It is being restarted; try again."
_HUNG = (
    "The engine process hung while it held this request, and was killed. It is being restarted; try again."
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
        log_format: str = "text",
        on_load: Callable[[int, int], None] | None = None,
        placement: Placement = ALONE,
    ) -> None:
        self.state: State = "loading"
        self.model_info: ModelInfo | None = None
        self._path = path
        self._config = config
        self._log_level = log_level
        self._log_format = log_format
        self._on_load = on_load
        self._placement = placement
        self._of = f" of replica {placement.replica}" if placement.num_replicas > 1 else ""
        self.name = f"The engine process{self._of}"
        self.on_step: Callable[[StepStats], None] = _ignore
        """Called with what each step of the engine did."""
        self.num_restarts = 0
        """Engine processes that were started because one had died."""
        self._streams: dict[str, TokenStream] = {}
        self._admission = Admission(config.max_num_seqs + config.max_waiting, config.max_waiting_tokens)
        self._asked: dict[int, asyncio.Future[EngineSnapshot]] = {}
        self._next_ask_id = 0
        self._profiles = Profiles(self._send)
        self._process: asyncio.subprocess.Process | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._supervisor: asyncio.Task[None] | None = None
        self._watchdog = Watchdog(self, config.engine_timeout)
        self._watcher: asyncio.Task[None] | None = None
        self._load_s = 0.0
        self._last_step = StepStats()
        self._death = _DIED
        """What is said to the requests of a process that is gone."""

    @property
    def replicas(self) -> tuple[AsyncEngine]:
        """The engines there are: this one; see `EngineReplicas`."""
        return (self,)

    @property
    def num_requests(self) -> int:
        """Requests under way."""
        return len(self._streams)

    @property
    def pid(self) -> int | None:
        """Of the engine process, if there is one."""
        return None if self._process is None else self._process.pid

    async def start(self) -> None:
        """Start the process and load the model. Raises ModelError with the engine's own words if it can't."""
        self._watcher = asyncio.create_task(self._watchdog.watch())
        began = time.monotonic()
        try:
            reader = await self._spawn()
            await self._load(reader)
        except OSError as error:
            await self._give_up()
            raise ModelError(f"The engine process could not be started: {error}.") from error
        except BaseException:
            await self._give_up()
            raise
        self._load_s = time.monotonic() - began
        if self.state == "loading":
            self.state = "ready"
        self._supervisor = asyncio.create_task(self._supervise(reader))

    async def _give_up(self) -> None:
        """The first load went wrong."""
        self.state = "failed"
        if self._watcher is not None:
            self._watcher.cancel()
        await self._reap()

    def check_room(self) -> None:
        """Raises QueueFullError if no request could be taken now: worth knowing before one is read.

        An engine that is not ready is another matter, which `submit_all` tells.
        """
        if self.state == "ready":
            self._admission.check_room(1)

    def submit(self, request: EngineRequest) -> TokenStream:
        """As `submit_all`, for one request."""
        return self.submit_all([request])[0]

    def submit_all(self, requests: Sequence[EngineRequest]) -> list[TokenStream]:
        """Send requests to the engine, all or none. Raises EngineUnavailableError or QueueFullError at once.

        Unless one of them is computed within `queue_timeout`, all their streams raise QueueTimeoutError.
        """
        if self.state != "ready":
            raise EngineUnavailableError(f"The engine is {self.state}; try again in a moment.")
        if self._writer is not None and self._writer.transport.get_write_buffer_size() > _MAX_UNREAD_BYTES:
            # Requests that were aborted at once hold no place, yet have to be read.
            raise QueueFullError(
                "The engine is behind with reading what was sent to it; try again later.",
                retry_after_s=self._admission.retry_after_s(),
            )
        self._admission.check(requests)
        messages = [frame(Add(request)) for request in requests]  # before any is held: this may raise
        streams = []
        for request, message in zip(requests, messages, strict=True):
            stream = self._streams[request.request_id] = TokenStream(request.request_id, self._left)
            self._admission.enter(request)
            self._write(message)
            streams.append(stream)
        if (timeout := self._config.queue_timeout) is not None:
            timer = asyncio.get_running_loop().call_later(timeout, self._overdue, streams)
            for stream in streams:
                stream.timer = timer
        return streams

    def _overdue(self, streams: Sequence[TokenStream]) -> None:
        """None of these requests, which came together, was computed in time."""
        retry_after_s = self._admission.retry_after_s()
        for stream in streams:
            stream.fail(
                QueueTimeoutError(
                    f"The request waited {self._config.queue_timeout:g} s and was not begun; the server has "
                    "more to do than it can. Try again later.",
                    retry_after_s=retry_after_s,
                )
            )

    def _left(self, request_id: str, tell: bool) -> None:
        """A stream ended; `tell` the engine if it is not the engine that ended it."""
        self._streams.pop(request_id, None)
        self._admission.leave(request_id)
        if tell:
            self._send(Abort(request_id))

    def _begun(self, request_ids: Sequence[str]) -> None:
        """The engine is computing these now."""
        self._admission.begun(request_ids)
        for request_id in request_ids:
            stream = self._streams.get(request_id)
            if stream is not None and stream.timer is not None:
                stream.timer.cancel()

    async def snapshot(self) -> EngineSnapshot:
        """The engine at this moment. Raises EngineUnavailableError if there is none, or if it goes away."""
        if self.state not in ("ready", "stopping") or self._writer is None:
            raise EngineUnavailableError(f"The engine is {self.state}; try again in a moment.")
        self._next_ask_id += 1
        ask_id = self._next_ask_id
        answer: asyncio.Future[EngineSnapshot] = asyncio.get_running_loop().create_future()
        self._asked[ask_id] = answer
        try:
            self._send(Inspect(ask_id))
            return await answer
        finally:
            self._asked.pop(ask_id, None)

    async def profile(self, num_steps: int, timeout_s: float) -> Profiled:
        """See `Profiles.record`. Raises EngineUnavailableError if there is no engine."""
        if self.state not in ("ready", "stopping"):
            raise EngineUnavailableError(f"The engine is {self.state}; try again in a moment.")
        return await self._profiles.record(num_steps, timeout_s)

    def refuse_new(self) -> None:
        """Take no more requests; those under way go on."""
        self.state = "stopping"

    async def stop(self) -> None:
        """End the requests under way with "abort", then the process."""
        self.refuse_new()
        tasks = [task for task in (self._watcher, self._supervisor) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._end_streams("abort", "The server is shutting down.")
        self._send(Stop())
        await self._reap()

    def _send(self, message: ToEngine) -> None:
        self._write(frame(message))

    def _write(self, data: bytes) -> None:
        if self._writer is not None and not self._writer.is_closing():
            self._writer.write(data)

    def _end_streams(self, reason: FinishReason, message: str) -> None:
        for answer in self._asked.values():
            if not answer.done():
                answer.set_exception(EngineUnavailableError(message))
        self._profiles.fail(message)
        for request_id, stream in list(self._streams.items()):
            stream.put(TokenOutput(request_id=request_id, finish_reason=reason, error=message))

    async def _spawn(self) -> asyncio.StreamReader:
        self._death = _DIED
        self._watchdog.heard()
        ours, theirs = socket.socketpair()
        try:
            with theirs:
                spawning = asyncio.ensure_future(
                    asyncio.create_subprocess_exec(
                        *self.command,
                        str(theirs.fileno()),
                        pass_fds=[theirs.fileno()],
                        stdin=asyncio.subprocess.DEVNULL,
                        env=engine_environment(),
                    )
                )
                try:
                    self._process = await asyncio.shield(spawning)
                except asyncio.CancelledError:
                    self._process = await spawning  # somebody has to wait for its end
                    raise
            reader, self._writer = await asyncio.open_connection(sock=ours)
        except BaseException:
            ours.close()
            raise
        path, place = str(self._path), self._placement
        num_blocks = None if self.model_info is None else self.model_info.num_blocks
        self._send(Start(path, self._config, self._log_level, self._log_format, place, num_blocks))
        return reader

    async def _load(self, reader: asyncio.StreamReader) -> None:
        """Read messages until Ready."""
        while True:
            try:
                message = await self._read(reader)
            except _GONE as error:
                if self._death == _HUNG:
                    raise ModelError("The engine process hung while loading the model.") from error
                raise ModelError(
                    "The engine process died while loading the model; its last words are above. "
                    "If there are none, the system may have run out of memory."
                ) from error
            if isinstance(message, Loading) and self._on_load is not None and self.state == "loading":
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
                held, self._last_step = self.doing, StepStats()
                self._end_streams("error", self._death)
                if self.model_info is not None:  # nothing is left of what the last step told
                    self.on_step(StepStats(num_free_blocks=self.model_info.num_blocks))
                if self.state == "stopping":
                    return
                self.state = "restarting"
                status = await self._reap()
                if time.monotonic() - started > _HEALTHY_AFTER_S:
                    backoff = _FIRST_BACKOFF_S
                # A request that kills its engine is mostly among the newest.
                logger.error("%s ended (status %s) %s; starting another.", self.name, status, held)
                reader, backoff = await self._restart(backoff)
                if self.state == "restarting":
                    self.state = "ready"
                    logger.info("The engine%s is ready again.", self._of)
        except Exception:
            logger.exception(
                "The supervisor of the engine%s failed; it takes no requests until a restart.", self._of
            )
            self.state = "failed"
            self._end_streams("error", "The server can no longer reach its engine.")

    async def _restart(self, backoff: float) -> tuple[asyncio.StreamReader, float]:
        """Start processes, waiting longer each time, until one has loaded the model."""
        while True:
            await asyncio.sleep(backoff)
            backoff = min(backoff * 2, _MAX_BACKOFF_S)
            self.num_restarts += 1
            try:
                reader = await self._spawn()
                await self._load(reader)
                return reader, backoff
            except (ModelError, OSError) as error:
                await self._reap()
                logger.error(
                    "The engine%s could not be restarted: %s Next try in %.1f s.", self._of, error, backoff
                )

    async def _deliver(self, reader: asyncio.StreamReader) -> None:
        """Hand outputs to their streams until the process's end of the socket closes."""
        while True:
            try:
                message = await self._read(reader)
            except _GONE:
                return
            if isinstance(message, Outputs):
                for number, output in enumerate(message.outputs, 1):
                    if number % _SLICE == 0:
                        await asyncio.sleep(0)  # let what these outputs cause be done before the next
                    # A stream that was aborted while this output was on its way is gone.
                    if (stream := self._streams.get(output.request_id)) is not None:
                        stream.put(output)
                self._last_step = message.stats
                self.on_step(message.stats)
            elif isinstance(message, Profiled):
                self._profiles.deliver(message)
            elif isinstance(message, Begun):
                self._begun(message.request_ids)
            elif isinstance(message, Snapshot):
                answer = self._asked.get(message.ask_id)
                if answer is not None and not answer.done():
                    answer.set_result(message.snapshot)

    async def _read(self, reader: asyncio.StreamReader) -> FromEngine:
        (length,) = LENGTH.unpack(await reader.readexactly(LENGTH.size))
        message: FromEngine = from_engine_decoder.decode(await reader.readexactly(length))
        self._watchdog.heard()
        return message

    @property
    def owes_answer(self) -> bool:
        """Whether the process would say something if it were well."""
        if self._process is None:
            return False
        return bool(self._streams or self._asked) or self.state in ("loading", "restarting")

    @property
    def patience_s(self) -> float:
        """How long the process may be silent.

        Nobody knows how long the first load takes, and somebody looks on; later ones may take twice as long.
        """
        if self.state == "loading":
            return math.inf
        return max(self._config.engine_timeout, 2 * self._load_s if self.state == "restarting" else 0.0)

    @property
    def doing(self) -> str:
        """What the process is at, for the log."""
        if self.state in ("loading", "restarting"):
            return "while loading the model"
        if not self._streams:
            return "while it holds no request"
        listed = list(self._streams)
        if len(listed) > 2 * _LISTED:
            listed = [*listed[:_LISTED], "...", *listed[-_LISTED:]]
        names = ", ".join(listed)
        last = self._last_step
        return (
            f"while it holds {len(self._streams)} requests ({names}); its last step: {last.phase}, "
            f"{last.num_requests} requests, {last.num_prompt_tokens} + {last.num_decode_tokens} tokens"
        )

    def kill_hung(self) -> None:
        """End the process, and its requests with an error that says so; it is replaced."""
        if self._process is not None and self._writer is not None:
            self._death = _HUNG
            _kill(self._process)
            self._writer.transport.abort()  # a process that cannot be killed now holds up nobody either

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
        except (asyncio.TimeoutError, asyncio.CancelledError) as error:
            _kill(process)
            status = await process.wait()
            if isinstance(error, asyncio.CancelledError):
                raise
        if writer is not None:
            writer.transport.abort()  # a process that stopped reading left bytes that close() waits for
        return status


def _kill(process: asyncio.subprocess.Process) -> None:
    with contextlib.suppress(ProcessLookupError):  # it has just ended by itself
        process.kill()


def _ignore(stats: StepStats) -> None:
    """Nobody counts."""
