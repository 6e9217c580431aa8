"""How the Responses API answers: a response object, or the events in which it grows.

Owns the object's fields and the frame of a stream: created, in_progress, what `output.py` tells,
and one of completed, incomplete and failed. Knows no input. Invariant: the object in the last event is the
one that a request without `stream` would have got, ids aside, and the one that is stored.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable
from typing import Any

import msgspec

from gqa_serve.api.answers import Usage
from gqa_serve.api.chat_request import ChatJob
from gqa_serve.api.errors import ErrorBody, error_json
from gqa_serve.api.logprobs import chat_logprobs
from gqa_serve.api.message_parts import TextPart, ToolCallPart, merge_parts
from gqa_serve.api.reasoning import thinking_tokens
from gqa_serve.api.responses.logprobs import PartLogprobs
from gqa_serve.api.responses.output import Event, Output
from gqa_serve.api.responses.protocol import (
    IncompleteDetails,
    InputTokensDetails,
    Item,
    OutputTokensDetails,
    ResponseFailure,
    ResponseObject,
    ResponseUsage,
)
from gqa_serve.api.responses.store import ResponseStore, StoredResponse
from gqa_serve.api.text_stream import TextEvent
from gqa_serve.engine.tokenizer import Tokenizer

_encode = msgspec.json.Encoder().encode


@dataclasses.dataclass(frozen=True)
class Keeping:
    """Where a response is kept when it is complete, and with what."""

    store: ResponseStore
    input: list[Item]
    previous: StoredResponse | None
    num_bytes: int  # of the input


class ResponseReply:
    """A `Reply`; `response` is the object as it begins, `keeping` None for one that is not stored."""

    def __init__(
        self, chat: ChatJob, tokenizer: Tokenizer, response: ResponseObject, keeping: Keeping | None
    ) -> None:
        self.job = chat.job
        self._tokenizer = tokenizer
        self._num_logprobs = chat.num_logprobs
        self._parser = chat.new_parser()
        self._response = response
        self._keeping = keeping
        self._output = Output()
        self._logprobs = PartLogprobs()
        self._finish_reason: str | None = None
        self._sequence_number = 0

    def opening(self, usage: Callable[[], Usage]) -> bytes:
        """The response, empty."""
        names = ("response.created", "response.in_progress")
        return self._frames({"type": name, "response": self._response} for name in names)

    def events(self, event: TextEvent, usage: Callable[[], Usage]) -> bytes:
        """The event's deltas, with the items they begin and end."""
        return self._frames(self._told(event))

    def closing(self, usage: Usage) -> bytes:
        """The end of the last item, and the response, complete."""
        data = self._frames(self._output.finish(self._last_status()))
        self._complete(usage)
        self._store(_encode(self._response))
        name = f"response.{self._response.status}"
        return data + self._frames([{"type": name, "response": self._response}])

    def failure(self, error: Exception) -> bytes:
        """The error as an event of its own, for clients that look for one, and the failed response."""
        detail = msgspec.json.decode(error_json(error), type=ErrorBody).error
        data = self._frames(self._output.end("incomplete"))
        response = self._response
        response.status = "failed"
        response.error = ResponseFailure("server_error", detail.message)
        response.output = self._output.items
        told = {"type": "error", "code": detail.code, "message": detail.message, "param": detail.param}
        return data + self._frames([told, {"type": "response.failed", "response": response}])

    def whole(self, events: list[TextEvent], usage: Usage) -> ResponseObject:
        """The response, complete."""
        for event in events:
            for _ in self._told(event):
                pass
        for _ in self._output.finish(self._last_status()):
            pass
        self._complete(usage)
        self._store(_encode(self._response))
        return self._response

    def _told(self, event: TextEvent) -> Iterable[Event]:
        self._finish_reason = event.finish_reason or self._finish_reason
        if event.logprobs and self._num_logprobs is not None:
            entries = chat_logprobs(event.logprobs, self._num_logprobs, self._tokenizer)
            self._logprobs.add(entries.content)
        for part in merge_parts(self._parser.feed(event.text, final=event.finish_reason is not None)):
            taken = [] if isinstance(part, ToolCallPart) else self._logprobs.take(part.text)
            yield from self._output.add(part, taken if isinstance(part, TextPart) else [])

    def _last_status(self) -> Any:
        return "incomplete" if self._finish_reason == "length" else "completed"

    def _complete(self, usage: Usage) -> None:
        response = self._response
        response.output = self._output.items
        response.usage = self._usage(usage)
        if self._finish_reason == "length":
            response.status = "incomplete"
            response.incomplete_details = IncompleteDetails("max_output_tokens")
        else:
            response.status = "completed"
            response.completed_at = int(time.time())

    def _usage(self, usage: Usage) -> ResponseUsage:
        num_thinking = thinking_tokens(usage, self._output.reasoning_text(), self._tokenizer)
        return ResponseUsage(
            usage.prompt_tokens,
            InputTokensDetails(usage.prompt_tokens_details.cached_tokens),
            usage.completion_tokens,
            OutputTokensDetails(num_thinking),
            usage.total_tokens,
        )

    def _store(self, body: bytes) -> None:
        keeping, response = self._keeping, self._response
        if keeping is None:
            return
        output: list[Item] = list(response.output)
        size = keeping.num_bytes + len(body)
        keeping.store.put(StoredResponse(response.id, body, keeping.input, output, keeping.previous, size))

    def _frames(self, events: Iterable[Event]) -> bytes:
        data = b""
        for event in events:
            event["sequence_number"] = self._sequence_number
            self._sequence_number += 1
            data += b"event: " + event["type"].encode() + b"\ndata: " + _encode(event) + b"\n\n"
        return data
