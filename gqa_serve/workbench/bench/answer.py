"""A streamed answer of a completions endpoint as it comes: when tokens arrived, and what they say.

Owns the reading of chunks, also of servers that spell things differently (text or delta, reasoning_content or
reasoning, usage in every chunk or in the last), and which endings are errors. Knows no sockets.
Invariant: after `end`, either `error` says what went wrong, or the answer is whole.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import msgspec

from gqa_serve.workbench.bench.sse import EventParser

_DONE = b"[DONE]"


class _Delta(msgspec.Struct):
    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: msgspec.Raw = msgspec.Raw(b"")


class _Choice(msgspec.Struct):
    text: str | None = None
    delta: _Delta | None = None
    finish_reason: str | None = None


class _PromptDetails(msgspec.Struct):
    cached_tokens: int | None = None


class Usage(msgspec.Struct):
    """Token counts as the server tells them."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    prompt_tokens_details: _PromptDetails | None = None


class _Chunk(msgspec.Struct):
    choices: list[_Choice] | None = None
    usage: Usage | None = None
    error: Any = None


_decode = msgspec.json.Decoder(_Chunk).decode


class Answer:
    """Take the pieces of a body with `feed`; then `end`. Times are `clock()` less `start`."""

    def __init__(
        self,
        start: float,
        *,
        clock: Callable[[], float] = time.perf_counter,
        on_tokens: Callable[[int], None] | None = None,
    ) -> None:
        self._start = start
        self._clock = clock
        self._on_tokens = on_tokens
        self._parser = EventParser()
        self._text: list[str] = []
        self._done = False
        self._counted = 0
        """Tokens that the running usage has told so far."""
        self.event_s: list[float] = []
        """When each event with tokens arrived."""
        self.event_tokens: list[int] = []
        """How many it brought, by the running usage; 1 where there is none."""
        self.usage: Usage | None = None
        self.finish_reason: str | None = None
        self.error: str | None = None

    @property
    def text(self) -> str:
        """The answer, without its reasoning."""
        return "".join(self._text)

    @property
    def has_running_usage(self) -> bool:
        """Whether the server told with every chunk how many tokens there were."""
        return self._counted > 0

    def feed(self, piece: bytes) -> None:
        """Bytes of the body, cut anywhere."""
        events = self._parser.feed(piece)
        if not events:
            return
        now = self._clock() - self._start
        for data in events:
            if self.error is None and not self._done:
                self._event(data, now)

    def end(self) -> None:
        """The body is complete: finds out whether the answer is."""
        if self.error is None and self.finish_reason is None:
            self.error = (
                "The stream ended in the middle of an event."
                if self._parser.pending
                else "The stream ended without a finish_reason."
            )

    def _event(self, data: bytes, now: float) -> None:
        if data.strip() == _DONE:
            self._done = True
            return
        try:
            chunk = _decode(data)
        except msgspec.MsgspecError as error:
            self.error = f"An event is no chunk of an answer ({error}): {data[:120].decode(errors='replace')}"
            return
        if chunk.error is not None:
            self.error = error_text(chunk.error)
            return
        shown = False
        for choice in chunk.choices or ():
            shown |= self._choice(choice)
        tokens = 1
        if chunk.usage is not None:
            self.usage = chunk.usage
            # Not the one after the last token, nor that of a server which tells it with the finish_reason.
            if chunk.choices and (self._counted or not self.event_s):
                tokens = chunk.usage.completion_tokens - self._counted
                self._counted = chunk.usage.completion_tokens
                shown = tokens > 0
        if shown:
            self.event_s.append(now)
            self.event_tokens.append(tokens)
            if self._on_tokens is not None:
                self._on_tokens(tokens)

    def _choice(self, choice: _Choice) -> bool:
        """Whether it brings anything of the answer."""
        if choice.finish_reason is not None:
            self.finish_reason = choice.finish_reason
        if choice.text:
            self._text.append(choice.text)
            return True
        delta = choice.delta
        if delta is None:
            return False
        if delta.content:
            self._text.append(delta.content)
        called = bytes(delta.tool_calls) not in (b"", b"null", b"[]")
        return bool(delta.content or delta.reasoning_content or delta.reasoning or called)

    def token_times(self, num_tokens: int) -> list[float]:
        """When each of the answer's `num_tokens` tokens arrived.

        Tokens that came in one event have one time. Where the server doesn't tell which tokens an event
        brought, they are dealt out evenly over the events, the first to the first and the last to the last.
        """
        events = self.event_s
        if not events or num_tokens < 1:
            return []
        if self.has_running_usage and sum(self.event_tokens) == num_tokens:
            counts = self.event_tokens
            return [at for at, tokens in zip(events, counts, strict=True) for _ in range(tokens)]
        if num_tokens == 1:
            return events[:1]
        step = (len(events) - 1) / (num_tokens - 1)
        return [events[int(index * step + 0.5)] for index in range(num_tokens)]


def error_text(error: object) -> str:
    """The message of an error body, of whatever shape."""
    if isinstance(error, Mapping):
        inner = error.get("error", error.get("message", error.get("detail")))
        return error_text(inner) if inner is not None else str(dict(error))
    return str(error)


def refusal(status: int, body: bytes) -> str:
    """A response that is no 200, as one sentence."""
    try:
        message = error_text(msgspec.json.decode(body))
    except msgspec.MsgspecError:
        message = body[:200].decode(errors="replace").strip()
    return f"HTTP {status}: {message}" if message else f"HTTP {status}"
