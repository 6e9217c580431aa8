"""`ChunkReply`: server-sent chunks as OpenAI's two completion endpoints send them.

Owns the framing (`data:` lines without event names, `[DONE]` last), and when a chunk carries usage. What a
chunk holds, a subclass knows. Invariant: `[DONE]` ends every stream, also one that failed.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import Any

import msgspec

from gqa_serve.api.answers import Usage
from gqa_serve.api.errors import error_json
from gqa_serve.api.serving import Job
from gqa_serve.api.text_stream import TextEvent

_DONE = b"data: [DONE]\n\n"
_encode = msgspec.json.Encoder().encode


class ChunkReply(ABC):
    """A `Reply` whose stream is a series of chunks: msgspec structs with a `usage` field."""

    def __init__(self, job: Job) -> None:
        self.job = job
        options = job.fields.stream_options
        self._with_usage = options is not None and bool(options.include_usage)
        self._running_usage = (
            self._with_usage and options is not None and bool(options.continuous_usage_stats)
        )

    def first_chunks(self) -> list[Any]:
        """Chunks before any text."""
        return []

    @abstractmethod
    def chunks(self, event: TextEvent) -> list[Any]:
        """Chunks for one event; none if it says nothing a client can see."""

    @abstractmethod
    def usage_chunk(self) -> Any:
        """The chunk with no choices that carries the usage."""

    def opening(self, usage: Callable[[], Usage]) -> bytes:
        """The first chunks."""
        return self._frames(self.first_chunks(), usage)

    def events(self, event: TextEvent, usage: Callable[[], Usage]) -> bytes:
        """The event's chunks."""
        return self._frames(self.chunks(event), usage)

    def closing(self, usage: Usage) -> bytes:
        """The usage, if asked for, and the end."""
        if not self._with_usage:
            return _DONE
        last = self.usage_chunk()
        last.usage = usage
        return _frame(last) + _DONE

    def failure(self, error: Exception) -> bytes:
        """The error's body as an event, and the end."""
        return b"data: " + error_json(error) + b"\n\n" + _DONE

    def _frames(self, chunks: Iterable[Any], usage: Callable[[], Usage]) -> bytes:
        data = b""
        for chunk in chunks:
            if self._with_usage:
                chunk.usage = usage() if self._running_usage else None
            data += _frame(chunk)
        return data


def _frame(chunk: Any) -> bytes:
    return b"data: " + _encode(chunk) + b"\n\n"
