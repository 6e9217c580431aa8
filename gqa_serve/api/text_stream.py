"""From engine tokens to text events, for all choices of one HTTP request, streamed or not.

Owns the life of a generation: one pump task per choice feeds tokens through its `TextAssembler` and drops
text events into a shared buffer; the consumer takes whatever is there, so a slow client gets fewer, larger
events instead of a growing backlog of small ones. Knows nothing of HTTP or JSON. Invariant: normal end, stop
string, disconnect and exception all end in `abort`, which is idempotent and frees the engine's blocks.
"""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import AsyncIterator, Sequence
from typing import Literal, Protocol

from gqa_serve.engine.detokenizer import TextDelta
from gqa_serve.engine.request import EngineRequest, TokenLogprobs, TokenOutput
from gqa_serve.errors import EngineStepError, EngineUnavailableError


class TokenStream(Protocol):
    """What the engine returns for one request: its outputs, the last of them with a finish reason."""

    def __aiter__(self) -> AsyncIterator[TokenOutput]: ...

    def abort(self) -> None: ...


class Assembler(Protocol):
    """`TextAssembler` as used here."""

    def feed(self, output: TokenOutput) -> TextDelta: ...


@dataclasses.dataclass(slots=True)
class TextEvent:
    """Something new of one choice: text, the tokens it accounts for (a stop token too), maybe logprobs, maybe
    its end: "stop" or "length", and then which stop string or stop token it was."""

    index: int
    text: str = ""
    token_ids: list[int] = dataclasses.field(default_factory=list)
    logprobs: list[TokenLogprobs] | None = None
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    finish_reason: Literal["stop", "length"] | None = None
    stop_reason: str | int | None = None
    is_first: bool = False
    stop_logprobs: TokenLogprobs | None = None
    """Of the token that ended the text and is not shown in it; `logprobs` has no entry for that one."""
    pooled: bytes | None = None
    """What a request for pooled hidden states gave (`TokenOutput.pooled`)."""


def merge_events(events: Sequence[TextEvent]) -> TextEvent:
    """Consecutive events of one choice as one."""
    first, last = events[0], events[-1]
    if len(events) == 1:
        return first
    logprobs = [entry for event in events if event.logprobs is not None for entry in event.logprobs]
    return dataclasses.replace(
        first,
        text="".join(event.text for event in events),
        token_ids=[token for event in events for token in event.token_ids],
        logprobs=logprobs if any(event.logprobs is not None for event in events) else None,
        finish_reason=last.finish_reason,
        stop_reason=last.stop_reason,
        stop_logprobs=last.stop_logprobs,
    )


class Counter(Protocol):
    """`ThinkingCounter` as used here."""

    def count(self, token_ids: Sequence[int]) -> int: ...


class Choice:
    """One engine request under way, with its text; `counter` says which tokens are thinking."""

    def __init__(
        self,
        index: int,
        request: EngineRequest,
        stream: TokenStream,
        assembler: Assembler,
        counter: Counter | None = None,
    ) -> None:
        self.index = index
        self.request = request
        self.stream = stream
        self.assembler = assembler
        self.counter = counter
        self.num_tokens = 0
        self.num_thinking_tokens = 0
        self.num_cached_tokens = 0
        self.finish_reason: str | None = None
        """Also "abort" and "error"; None while the engine works (or if the client left before the end)."""


class Generation:
    """All choices of one request. Create it inside a running event loop; call `abort` in a finally."""

    def __init__(self, choices: Sequence[Choice]) -> None:
        self.choices = list(choices)
        self.started = time.monotonic()
        self._buffer: list[TextEvent] = []
        self._error: Exception | None = None
        self._wakeup = asyncio.Event()
        self._open = len(self.choices)
        self._tasks = [asyncio.create_task(self._pump(choice)) for choice in self.choices]

    async def _pump(self, choice: Choice) -> None:
        """Drive one choice to its end; whatever goes wrong is raised to the consumer."""
        is_first = True
        try:
            async for output in choice.stream:
                event = self._event(choice, output, is_first)
                is_first = False
                self._buffer.append(event)
                self._wakeup.set()
                if event.finish_reason is not None:
                    return
            raise EngineStepError("The engine ended this answer without saying why. Send the request again.")
        except Exception as error:
            self._error = self._error or error
            self._wakeup.set()
        finally:
            choice.stream.abort()

    @staticmethod
    def _event(choice: Choice, output: TokenOutput, is_first: bool) -> TextEvent:
        delta = choice.assembler.feed(output)
        choice.finish_reason = delta.finish_reason
        if delta.finish_reason == "error":
            raise EngineStepError(delta.error or "The engine failed while computing this answer.")
        if delta.finish_reason == "abort":
            raise EngineUnavailableError(
                delta.error or "The server stopped this answer before it was complete."
            )
        choice.num_tokens += len(delta.token_ids)  # the stop token included, tokens after a stop string not
        if choice.counter is not None:
            choice.num_thinking_tokens += choice.counter.count(delta.token_ids)
        choice.num_cached_tokens = max(choice.num_cached_tokens, output.num_cached_tokens)
        return TextEvent(
            choice.index,
            delta.text,
            delta.token_ids,
            delta.logprobs,
            output.prompt_logprobs,
            delta.finish_reason,
            delta.stop_reason,
            is_first,
            delta.stop_logprobs,
            output.pooled,
        )

    async def first_event(self, timeout_s: float) -> None:
        """Wait until there is something to say, or `timeout_s` have passed. Raises what the engine raised.

        An error raised here can still become a plain HTTP status, since no byte has been sent.
        """
        try:
            await asyncio.wait_for(self._wakeup.wait(), timeout_s)
        except asyncio.TimeoutError:
            return
        if self._error is not None and not self._buffer:
            raise self._error

    async def batches(self) -> AsyncIterator[list[TextEvent]]:
        """What has arrived since the last batch, one event per choice. Raises what the engine raised."""
        while self._open:
            await self._wakeup.wait()
            self._wakeup.clear()
            events = self._take()
            self._open -= sum(event.finish_reason is not None for event in events)
            if events:
                yield events
            if self._error is not None:
                raise self._error

    def _take(self) -> list[TextEvent]:
        arrived, self._buffer = self._buffer, []
        return [merge_events(events) for events in _by_choice(arrived).values()]

    async def collect(self) -> list[TextEvent]:
        """Every choice, complete, in order of index. Raises what the engine raised."""
        arrived: list[TextEvent] = []
        async for events in self.batches():
            arrived += events
        whole = _by_choice(arrived)
        return [merge_events(whole[choice.index]) for choice in self.choices]

    def abort(self) -> None:
        """End every choice now. Idempotent; harmless after the normal end."""
        for task in self._tasks:
            task.cancel()
        for choice in self.choices:
            choice.stream.abort()


def _by_choice(events: Sequence[TextEvent]) -> dict[int, list[TextEvent]]:
    groups: dict[int, list[TextEvent]] = {}
    for event in events:
        groups.setdefault(event.index, []).append(event)
    return groups
