"""What all endpoints that generate share: admission, submission, and answering whole or as a stream.

Owns the HTTP life of a generation: nothing is sent before the first token (so an early failure is a plain
HTTP status), a client that leaves is noticed at any time, and `Generation.abort` runs whatever happens.
Knows the endpoints only through `Reply`. Invariant: every submitted engine request is aborted or has ended
when the response is over.
"""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import hashlib
import logging
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any, Protocol, TypeVar

import anyio.to_thread
import msgspec
from sse_starlette import EventSourceResponse, ServerSentEvent
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from gqa_serve import __version__
from gqa_serve.api.access import AccessConfig
from gqa_serve.api.account import Account
from gqa_serve.api.answers import CompletionTokensDetails, PromptTokensDetails, Usage
from gqa_serve.api.body_budget import BodyBudget
from gqa_serve.api.chat_format import TEXT_ONLY, ChatFormat
from gqa_serve.api.deadline import deadline_of
from gqa_serve.api.errors import shorten
from gqa_serve.api.exposition import WatchedEngine
from gqa_serve.api.metrics import Metrics
from gqa_serve.api.protocol import SamplingFields
from gqa_serve.api.rate_limits import RateLimits
from gqa_serve.api.reasoning import ThinkingCounter
from gqa_serve.api.request_ids import client_request_id
from gqa_serve.api.text_stream import Choice, Generation, TextEvent, TokenStream
from gqa_serve.api.tracing import Tracing
from gqa_serve.engine.chat_template import ChatTemplate
from gqa_serve.engine.detokenizer import TextAssembler
from gqa_serve.engine.metrics import EngineSnapshot, StepStats
from gqa_serve.engine.request import EngineRequest, ModelInfo, Pooling, SamplingParams
from gqa_serve.engine.stop_strings import StopStrings
from gqa_serve.engine.tokenizer import Tokenizer
from gqa_serve.engine.wire import Profiled
from gqa_serve.errors import EngineUnavailableError, NotFoundError, RequestError

PING_INTERVAL_S = 15  # proxies cut idle connections after 60
FIRST_TOKEN_PATIENCE_S = 15.0  # then the stream starts without one, so that pings can keep it alive
SHUTDOWN_MARGIN_S = 2.0  # after the drain timeout, for the errors that end what is left
LARGE_TEXT_CHARS = 16 * 1024  # above this, tokenizing and templates move to a worker thread

logger = logging.getLogger(__name__)
T = TypeVar("T")


class ServingReplica(WatchedEngine, Protocol):
    """What the API needs of each engine: with --data-parallel-size there are several."""

    on_step: Callable[[StepStats], None]

    async def profile(self, num_steps: int, timeout_s: float) -> Profiled: ...


class ServingEngine(Protocol):
    """What the API needs of `AsyncEngine`, or of several as `EngineReplicas`."""

    @property
    def replicas(self) -> Sequence[ServingReplica]: ...

    @property
    def state(self) -> str: ...

    @property
    def model_info(self) -> ModelInfo | None: ...

    @property
    def num_requests(self) -> int: ...

    async def snapshot(self) -> EngineSnapshot: ...

    def check_room(self) -> None: ...

    def submit_all(self, requests: Sequence[EngineRequest]) -> Sequence[TokenStream]: ...


class ServingConfig(AccessConfig, Protocol):
    """What the API needs of `ServerConfig`."""

    @property
    def served_model_name(self) -> Sequence[str]: ...

    @property
    def max_body_bytes(self) -> int: ...

    @property
    def drain_timeout(self) -> float: ...

    @property
    def request_timeout(self) -> float | None: ...

    @property
    def key_max_requests(self) -> int | None: ...

    @property
    def key_tokens_per_minute(self) -> int | None: ...

    @property
    def max_stored_responses(self) -> int: ...

    @property
    def pooling(self) -> str: ...

    @property
    def tool_call_parser(self) -> str: ...

    @property
    def reasoning_parser(self) -> str: ...

    @property
    def ui(self) -> bool: ...

    @property
    def log_prompts(self) -> bool: ...

    @property
    def otlp_endpoint(self) -> str | None: ...


@dataclasses.dataclass(frozen=True)
class ServingContext:
    """What every endpoint holds."""

    engine: ServingEngine
    tokenizer: Tokenizer
    chat_template: ChatTemplate
    config: ServingConfig
    metrics: Metrics
    tracing: Tracing | None = None
    started: int = dataclasses.field(default_factory=lambda: int(time.time()))
    chat_format: ChatFormat = TEXT_ONLY
    end_of_turn_ids: tuple[int, ...] = ()  # the control token that the chat template writes after an answer

    @functools.cached_property
    def bodies(self) -> BodyBudget:
        """What requests' bodies may take of the memory."""
        return BodyBudget(self.config.max_body_bytes)

    @functools.cached_property
    def rate_limits(self) -> RateLimits:
        """What each API key may ask for."""
        return RateLimits(self.config.key_max_requests, self.config.key_tokens_per_minute)

    @property
    def model_names(self) -> Sequence[str]:
        """The names clients may use, the first one canonical."""
        if self.config.served_model_name:
            return self.config.served_model_name
        info = self.engine.model_info
        return () if info is None else (info.model,)

    def check_model(self, name: str | None) -> str:
        """The model name to answer with; none given means the one there is.

        Raises NotFoundError, or EngineUnavailableError while the name is not known yet.
        """
        names = self.model_names or (self.ready_info().model,)
        if name is None:
            return names[0]
        if name in names:
            return name
        raise NotFoundError(
            f"The model {shorten(name)!r} is not served here; GET /v1/models lists what is.",
            param="model",
            code="model_not_found",
        )

    def ready_info(self) -> ModelInfo:
        """The loaded model. Raises EngineUnavailableError while there is none that answers."""
        state, info = self.engine.state, self.engine.model_info
        if state != "ready" or info is None:
            raise EngineUnavailableError(f"The engine is {state}; try again in a few seconds.")
        return info


def fingerprint(info: ModelInfo) -> str:
    """`system_fingerprint`: changes when the same seed may give other text."""
    computed = (info.device, info.backend, info.instruction_set, info.kv_dtype)
    parts = (__version__, info.model, info.dtype, *computed, info.weight_bytes)
    return "fp_" + hashlib.blake2b(repr(parts).encode(), digest_size=5).hexdigest()


async def off_loop(size: int, work: Callable[[], T]) -> T:
    """`work()`, in a worker thread if its input of `size` characters is large enough to stall others."""
    return work() if size < LARGE_TEXT_CHARS else await anyio.to_thread.run_sync(work)


@dataclasses.dataclass(frozen=True)
class Job:
    """One HTTP request, ready for the engine: prompt-major choices, `n` for each prompt."""

    id: str
    created: int
    kind: str  # what the log calls it
    model: str
    fingerprint: str
    fields: SamplingFields
    prompts: Sequence[Sequence[int]]
    params: Sequence[SamplingParams]  # one per prompt
    n: int
    pooling: Pooling | None = None
    shown_ids: frozenset[int] = frozenset()  # control tokens that are shown, for a parser to see
    end_ids: tuple[int, ...] = ()  # end an answer as the model's own end-of-sequence tokens do
    new_counter: Callable[[], ThinkingCounter] | None = None  # None: nothing tells thinking from answers

    @classmethod
    def new(cls, prefix: str, **values: Any) -> Job:
        """A job with a fresh id that starts with `prefix`."""
        return cls(id=f"{prefix}-{uuid.uuid4().hex}", created=int(time.time()), **values)

    def engine_requests(self) -> list[EngineRequest]:
        """One per choice; those of one prompt form a group, which shares the prompt's blocks.

        Stop strings stay here: the engine never reads text.
        """
        silent = [msgspec.structs.replace(params, stop=[]) for params in self.params]
        return [
            EngineRequest(
                request_id=f"{self.id}-{number * self.n + choice}",
                prompt=list(prompt),
                params=params.for_choice(choice),
                priority=self.fields.priority or 0,
                group=f"{self.id}-{number}" if self.n > 1 else None,
                cache_salt=self.fields.cache_salt,
                pooling=self.pooling,
                end_token_ids=self.end_ids,
            )
            for number, (prompt, params) in enumerate(zip(self.prompts, silent, strict=True))
            for choice in range(self.n)
        ]

    def usage(self, generation: Generation) -> Usage:
        """Counts so far: a prompt once, however many choices it has."""
        num_prompt = sum(len(prompt) for prompt in self.prompts)
        num_output = sum(choice.num_tokens for choice in generation.choices)
        cached = sum(choice.num_cached_tokens for choice in generation.choices[:: self.n])
        usage = Usage(num_prompt, num_output, num_prompt + num_output, PromptTokensDetails(cached))
        if self.new_counter is not None:
            num_thinking = sum(choice.num_thinking_tokens for choice in generation.choices)
            usage.completion_tokens_details = CompletionTokensDetails(num_thinking)
        return usage


class Reply(Protocol):
    """How one endpoint spells its answer: as one JSON value, or as the bytes of server-sent events."""

    job: Job

    def opening(self, usage: Callable[[], Usage]) -> bytes:
        """What comes before any text."""

    def events(self, event: TextEvent, usage: Callable[[], Usage]) -> bytes:
        """What `event` adds; empty if it says nothing a client can see. `usage()` counts so far."""

    def closing(self, usage: Usage) -> bytes:
        """What comes after the last event of every choice, when all went well."""

    def failure(self, error: Exception) -> bytes:
        """What ends a stream that went wrong."""

    def whole(self, events: list[TextEvent], usage: Usage) -> Any:
        """The answer of a request that does not stream, for msgspec to encode; one event per choice."""


def submit(context: ServingContext, job: Job, stops: StopStrings, scope: Scope) -> Generation:
    """Hand every choice to the engine; all or none. `stops` is the job's `stop`, compiled.

    `scope` is that of the HTTP request: whose it is, and by when it must have ended. Whoever gets the
    generation calls its `end`. Raises RateLimitError, QueueFullError, EngineUnavailableError.
    """
    admission = context.rate_limits.admit(scope, sum(map(len, job.prompts)))
    choices: list[Choice] = []
    requests = job.engine_requests()
    streams: Sequence[TokenStream] = ()
    try:
        streams = context.engine.submit_all(requests)
        for index, (request, stream) in enumerate(zip(requests, streams, strict=True)):
            assembler = TextAssembler(
                context.tokenizer,
                job.params[index // job.n],
                request.prompt,
                stops=stops,
                shown_ids=job.shown_ids,
            )
            counter = job.new_counter and job.new_counter()
            choices.append(Choice(index, request, stream, assembler, counter))
    except BaseException:
        for stream in streams:
            stream.abort()
        admission.cancel()
        raise
    generation = Generation(choices, admission, Account(context, job, scope))
    if (deadline := deadline_of(scope)) is not None:
        generation.end_at(deadline.at, deadline.error)
    return generation


async def answer(request: Request, context: ServingContext, reply: Reply) -> Response:
    """Run the job and answer the request, as a stream if it asked for one. Raises RequestError."""
    stop = reply.job.params[0].stop  # the same for all prompts
    stops = await off_loop(sum(map(len, stop)), lambda: StopStrings(stop))
    generation = submit(context, reply.job, stops, request.scope)
    request_id = client_request_id(request.scope) or reply.job.id
    headers = {"x-request-id": request_id, **generation.admission.headers()}
    streaming = False
    try:
        if not reply.job.fields.stream:
            events = await unless_gone(request, generation.collect())
            body = msgspec.json.encode(reply.whole(events, reply.job.usage(generation)))
            return Response(body, 200, headers, "application/json")
        await unless_gone(request, generation.first_event(FIRST_TOKEN_PATIENCE_S))
        response = GenerationResponse(
            generation, reply, headers, context.config.drain_timeout, context.metrics
        )
        streaming = True
        return response
    finally:
        if not streaming:
            generation.end()


async def unless_gone(request: Request, work: Awaitable[T]) -> T:
    """The result of `work`. Raises ClientDisconnect, and cancels `work`, as soon as the client leaves."""
    task = asyncio.ensure_future(work)
    watcher = asyncio.create_task(_client_left(request))
    try:
        await asyncio.wait((task, watcher), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        task.cancel()
        watcher.cancel()
        await asyncio.gather(task, watcher, return_exceptions=True)


async def _client_left(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


class GenerationResponse(EventSourceResponse):
    """An SSE response that ends its generation when it ends, for whatever reason."""

    def __init__(
        self,
        generation: Generation,
        reply: Reply,
        headers: dict[str, str],
        drain_timeout_s: float,
        metrics: Metrics,
    ) -> None:
        self._generation = generation
        self._metrics = metrics
        super().__init__(
            sse_events(generation, reply),
            headers={"Cache-Control": "no-cache", **headers},
            ping=PING_INTERVAL_S,
            ping_message_factory=lambda: ServerSentEvent(comment="keep-alive", sep="\n"),
            sep="\n",
            # A stopping server lets streams finish, as it does other requests, then ends them with an error.
            shutdown_grace_period=drain_timeout_s + SHUTDOWN_MARGIN_S,
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._metrics.num_streams += 1
        try:
            await super().__call__(scope, receive, send)
        finally:
            # The iterator's own finally never runs if it was never started.
            self._metrics.num_streams -= 1
            self._generation.end()


async def sse_events(generation: Generation, reply: Reply) -> AsyncIterator[bytes]:
    """The stream's bytes, as `reply` spells them; an error replaces what is left."""

    def usage() -> Usage:
        return reply.job.usage(generation)

    try:
        if opening := reply.opening(usage):
            yield opening
        async for events in generation.batches():
            if data := b"".join(reply.events(event, usage) for event in events):
                yield data
        last = reply.closing(usage())
    except Exception as error:
        if not isinstance(error, RequestError):
            logger.exception("Streaming %s failed.", reply.job.id)
            generation.abort_reason = "internal_error"
        last = reply.failure(error)
    finally:
        generation.abort()
    yield last
