"""From engine tokens to text events, for all choices of one HTTP request, streamed or not.

Owns the life of a generation: one pump task per choice feeds tokens through its `TextAssembler` and drops
text events into a shared buffer; the consumer takes whatever is there, so a slow client gets fewer, larger
events instead of a growing backlog of small ones. Knows nothing of HTTP or JSON. Invariants: normal end, stop
string, disconnect and exception all end in `abort`, which is idempotent and frees the engine's blocks; what
is handed on at once is bounded, however much has piled up.
"""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Literal, Protocol

from gqa_serve.api.rate_limits import Admission
from gqa_serve.engine.detokenizer import TextDelta
from gqa_serve.engine.request import EngineRequest, TokenLogprobs, TokenOutput
from gqa_serve.errors import EngineStepError, EngineUnavailableError, RequestError

MAX_UNMERGED = 64  # events of each choice that wait as they came, one for each step
MAX_MERGED_TOKENS = 256
"""Merged events have no more tokens: with all logprobs, so many are hundreds of kilobytes of JSON, and while
they are spelled nobody else's stream goes on."""


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


def merge_up(events: Sequence[TextEvent]) -> list[TextEvent]:
    """Consecutive events of one choice as few, none of which was made larger than MAX_MERGED_TOKENS."""
    merged: list[TextEvent] = []
    group: list[TextEvent] = []
    num_tokens = 0
    for event in events:
        if group and num_tokens + len(event.token_ids) > MAX_MERGED_TOKENS:
            merged.append(merge_events(group))
            group, num_tokens = [], 0
        group.append(event)
        num_tokens += len(event.token_ids)
    if group:
        merged.append(merge_events(group))
    return merged


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
        self.queue_s: float | None = None
        """How long it waited to be computed; None before its first output."""
        self.first_s: float | None = None
        """When its first output came, on the monotonic clock, and its last tokens."""
        self.last_s = 0.0
        self.kept = ""
        """How its text begins, as far as the meter wants it."""

    @property
    def decode_s(self) -> float:
        """From its first output to its last tokens."""
        return 0.0 if self.first_s is None else self.last_s - self.first_s


class Meter(Protocol):
    """Whoever wants to know when tokens come, one call for each output, and when all is over."""

    kept_chars: int

    def began(self, choice: Choice, num_tokens: int) -> None: ...

    def tokens(self, num_tokens: int, gap_s: float) -> None: ...

    def end(self, generation: Generation) -> None: ...


class Generation:
    """All choices of one request. Create it inside a running event loop; call `end` in a finally."""

    def __init__(
        self,
        choices: Sequence[Choice],
        admission: Admission | None = None,
        meter: Meter | None = None,
    ) -> None:
        self.choices = list(choices)
        self.admission = admission or Admission()
        self.started = time.monotonic()
        self.abort_reason: str | None = None
        """Set by whoever ends it early, in a word for the metrics."""
        self._meter = meter
        self._buffer: list[TextEvent] = []
        self._num_unmerged = 0  # events in it that are as they came
        self._error: Exception | None = None
        self._wakeup = asyncio.Event()
        self._open = len(self.choices)
        self._timer: asyncio.TimerHandle | None = None
        self._tasks = [asyncio.create_task(self._pump(choice)) for choice in self.choices]

    @property
    def error(self) -> Exception | None:
        """What went wrong, if something did."""
        return self._error

    async def _pump(self, choice: Choice) -> None:
        """Drive one choice to its end; whatever goes wrong is raised to the consumer."""
        is_first = True
        try:
            async for output in choice.stream:
                event = self._event(choice, output, is_first)
                is_first = False
                self._buffer.append(event)
                self._num_unmerged += 1
                if self._num_unmerged >= MAX_UNMERGED * len(self.choices):
                    # Whoever reads slowly costs no more than the answer itself.
                    self._buffer = [event for events in self._take().values() for event in events]
                self._wakeup.set()
                if event.finish_reason is not None:
                    return
            raise EngineStepError("The engine ended this answer without saying why. Send the request again.")
        except Exception as error:
            self._error = self._error or error
            self._wakeup.set()
        finally:
            choice.stream.abort()

    def _event(self, choice: Choice, output: TokenOutput, is_first: bool) -> TextEvent:
        delta = choice.assembler.feed(output)
        choice.finish_reason = delta.finish_reason
        if delta.finish_reason == "error":
            if output.refused:
                raise RequestError(delta.error or "This request cannot be computed.", code="not_computable")
            raise EngineStepError(delta.error or "The engine failed while computing this answer.")
        if delta.finish_reason == "abort":
            raise EngineUnavailableError(
                delta.error or "The server stopped this answer before it was complete."
            )
        choice.num_tokens += len(delta.token_ids)  # the stop token included, tokens after a stop string not
        if choice.counter is not None:
            choice.num_thinking_tokens += choice.counter.count(delta.token_ids)
        choice.num_cached_tokens = max(choice.num_cached_tokens, output.num_cached_tokens)
        if self._meter is not None:
            _measure(self._meter, choice, output, delta)
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

    def end_at(self, when: float, error: Callable[[], Exception]) -> None:
        """Fail with `error()` at that time of the event loop's clock, if it has not ended before."""
        self._timer = asyncio.get_running_loop().call_at(when, lambda: self._fail(error()))

    def _fail(self, error: Exception) -> None:
        if any(not task.done() for task in self._tasks):
            self._error = self._error or error
            self.abort()
            self._wakeup.set()

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
        """What has arrived since the last batch, one event per choice; what has piled up, in several batches.

        Raises what the engine raised.
        """
        while self._open:
            await self._wakeup.wait()
            self._wakeup.clear()
            taken = list(self._take().values())
            for number in range(max(map(len, taken), default=0)):
                if number:
                    await asyncio.sleep(0)  # others go on, and a client that is gone ends this here
                events = [of_choice[number] for of_choice in taken if number < len(of_choice)]
                self._open -= sum(event.finish_reason is not None for event in events)
                yield events
            if self._error is not None:
                raise self._error

    def _take(self) -> dict[int, list[TextEvent]]:
        """Everything in the buffer, merged, by choice."""
        arrived, self._buffer = self._buffer, []
        self._num_unmerged = 0
        return {index: merge_up(events) for index, events in _by_choice(arrived).items()}

    async def collect(self) -> list[TextEvent]:
        """Every choice, complete, in order of index. Raises what the engine raised."""
        arrived: list[TextEvent] = []
        async for events in self.batches():
            arrived += events
        whole = _by_choice(arrived)
        return [merge_events(whole[choice.index]) for choice in self.choices]

    def abort(self) -> None:
        """End every choice now. Idempotent; harmless after the normal end."""
        if self._timer is not None:
            self._timer.cancel()
        for task in self._tasks:
            task.cancel()
        for choice in self.choices:
            choice.stream.abort()

    def end(self) -> None:
        """Abort what is still running; the generation is over. To be called once."""
        self.abort()
        self.admission.close(sum(choice.num_tokens for choice in self.choices))
        if self._meter is not None:
            self._meter.end(self)


def _measure(meter: Meter, choice: Choice, output: TokenOutput, delta: TextDelta) -> None:
    """Note when the tokens of `output` came, and tell."""
    now, num_tokens = time.monotonic(), len(delta.token_ids)
    if choice.first_s is None:
        choice.first_s = choice.last_s = now
        choice.queue_s = output.queue_s
        meter.began(choice, num_tokens)
    elif num_tokens:
        meter.tokens(num_tokens, now - choice.last_s)
        choice.last_s = now
    if len(choice.kept) < meter.kept_chars:
        choice.kept = (choice.kept + delta.text)[: meter.kept_chars]


def _by_choice(events: Sequence[TextEvent]) -> dict[int, list[TextEvent]]:
    groups: dict[int, list[TextEvent]] = {}
    for event in events:
        groups.setdefault(event.index, []).append(event)
    return groups
