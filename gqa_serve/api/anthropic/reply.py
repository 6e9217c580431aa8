"""How the Messages API answers: a message of blocks, or the events in which it grows; and its errors.

Owns the order of events (a block starts, grows and stops before the next one starts) and the reasons to stop.
Knows no input. Invariant: a stream's blocks, put together, are those of the message sent whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import msgspec
from starlette.responses import Response

from gqa_serve.api.answers import Usage
from gqa_serve.api.anthropic.protocol import (
    AnswerBlock,
    AnswerMessage,
    MessageError,
    MessageErrorDetail,
    MessageTokensDetails,
    MessageUsage,
    TextBlock,
    ThinkingBlock,
    ToolUseBlock,
)
from gqa_serve.api.chat_request import ChatJob
from gqa_serve.api.errors import MAX_MESSAGE_CHARS, error_response, shorten
from gqa_serve.api.message_parts import (
    ArgumentsPart,
    Part,
    ReasoningPart,
    TextPart,
    ToolCallPart,
    merge_parts,
)
from gqa_serve.api.reasoning import thinking_tokens
from gqa_serve.api.text_stream import TextEvent
from gqa_serve.engine.tokenizer import Tokenizer
from gqa_serve.errors import ContextLengthError, RequestError

Event = dict[str, Any]

_ERROR_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}
_encode = msgspec.json.Encoder().encode


def error_body(error: Exception, request_id: str | None) -> bytes:
    """The encoded body for `error`, in Anthropic's shape."""
    if not isinstance(error, RequestError):
        detail = MessageErrorDetail("api_error", "The server failed while answering; its log says why.")
    else:
        message = error.message
        if isinstance(error, ContextLengthError):  # agents read this sentence, and make the prompt shorter
            message = (
                f"prompt is too long: {error.num_prompt_tokens} tokens > {error.max_model_len - 1} maximum"
            )
        elif error.code == "context_length_exceeded":
            message = f"prompt is too long: {message}"
        elif error.param is not None and not message.startswith(error.param):
            message = f"{error.param}: {message}"
        default = "invalid_request_error" if error.status < 500 else "api_error"
        detail = MessageErrorDetail(
            _ERROR_TYPES.get(error.status, default), shorten(message, MAX_MESSAGE_CHARS)
        )
    return _encode(MessageError(detail, request_id))


def anthropic_error(error: Exception, request_id: str) -> Response:
    """The HTTP response for `error`."""
    response = error_response(error)  # for its status, Retry-After and the like
    headers = {name: value for name, value in response.headers.items() if not name.startswith("content-")}
    headers["request-id"] = request_id
    return Response(error_body(error, request_id), response.status_code, headers, "application/json")


class Blocks:
    """The blocks of a message, growing, and the events that tell of it."""

    def __init__(self, show_thinking: bool) -> None:
        self.blocks: list[AnswerBlock] = []
        self.called_tools = False
        self.thinking = ""
        self._show_thinking = show_thinking
        self._open = False  # the last block may grow
        self._pieces: list[str] = []

    def add(self, part: Part) -> Iterator[Event]:
        """The events of one more part."""
        match part:
            case TextPart(text):
                yield from self._continue(TextBlock(""))
                yield self._delta(text, {"type": "text_delta", "text": text})
            case ReasoningPart(text):
                yield from self._continue(ThinkingBlock(""))
                if self._show_thinking:
                    yield self._delta(text, {"type": "thinking_delta", "thinking": text})
                else:
                    self._pieces.append(text)
            case ToolCallPart(id=id, name=name):
                self.called_tools = True
                yield from self._begin(ToolUseBlock(id, name, {}))
            case ArgumentsPart(text=text):
                if not (self._open and isinstance(self.blocks[-1], ToolUseBlock)):
                    raise TypeError("arguments came before their call")
                yield self._delta(text, {"type": "input_json_delta", "partial_json": text})

    def end(self) -> Iterator[Event]:
        """The event that stops the block under way, if there is one."""
        if not self._open:
            return
        self._open = False
        block, text = self.blocks[-1], "".join(self._pieces)
        match block:
            case TextBlock():
                block.text = text
            case ThinkingBlock():
                self.thinking += text
                block.thinking = text if self._show_thinking else ""
            case ToolUseBlock():
                block.input = _arguments(text)
        yield {"type": "content_block_stop", "index": len(self.blocks) - 1}

    def _continue(self, block: TextBlock | ThinkingBlock) -> Iterator[Event]:
        """Begin with `block`, unless one of its kind is under way."""
        if not (self._open and isinstance(self.blocks[-1], type(block))):
            yield from self._begin(block)

    def _begin(self, block: AnswerBlock) -> Iterator[Event]:
        yield from self.end()
        self.blocks.append(block)
        self._open = True
        self._pieces = []
        yield {"type": "content_block_start", "index": len(self.blocks) - 1, "content_block": block}

    def _delta(self, text: str, delta: Event) -> Event:
        self._pieces.append(text)
        return {"type": "content_block_delta", "index": len(self.blocks) - 1, "delta": delta}


def _arguments(text: str) -> Any:
    """Arguments as an object; those that max_tokens cut off, as far as they are known: as text."""
    try:
        value = msgspec.json.decode(text or "{}")
    except msgspec.DecodeError:
        return {"incomplete_json": text}
    return value if isinstance(value, dict) else {"value": value}


class MessagesReply:
    """A `Reply`; `max_tokens` and `stop_sequences` are what the client asked for."""

    def __init__(
        self,
        chat: ChatJob,
        tokenizer: Tokenizer,
        *,
        max_tokens: int,
        stop_sequences: list[str],
        show_thinking: bool,
    ) -> None:
        self.job = chat.job
        self._tokenizer = tokenizer
        self._parser = chat.new_parser()
        self._max_tokens = max_tokens
        self._stop_sequences = stop_sequences
        self._blocks = Blocks(show_thinking)
        self._last: TextEvent | None = None

    def opening(self, usage: Callable[[], Usage]) -> bytes:
        """The message, empty."""
        message = self._message(usage())
        return _frames([{"type": "message_start", "message": message}, {"type": "ping"}])

    def events(self, event: TextEvent, usage: Callable[[], Usage]) -> bytes:
        """The event's deltas, with the blocks they start and stop."""
        return _frames(self._told(event))

    def closing(self, usage: Usage) -> bytes:
        """The end of the last block, why it ended, and what it took."""
        data = _frames(self._blocks.end())
        reason, sequence = self._stop()
        delta = {"stop_reason": reason, "stop_sequence": sequence}
        counts = self._usage(usage)
        return data + _frames(
            [{"type": "message_delta", "delta": delta, "usage": counts}, {"type": "message_stop"}]
        )

    def failure(self, error: Exception) -> bytes:
        """The error's body as an event."""
        return b"event: error\ndata: " + error_body(error, self.job.id) + b"\n\n"

    def whole(self, events: list[TextEvent], usage: Usage) -> AnswerMessage:
        """The message, complete."""
        for event in events:
            for _ in self._told(event):
                pass
        for _ in self._blocks.end():
            pass
        message = self._message(usage)
        message.content = self._blocks.blocks
        message.stop_reason, message.stop_sequence = self._stop()
        return message

    def _told(self, event: TextEvent) -> Iterable[Event]:
        self._last = event
        for part in merge_parts(self._parser.feed(event.text, final=event.finish_reason is not None)):
            yield from self._blocks.add(part)

    def _stop(self) -> tuple[str | None, str | None]:
        """Why the message ended, and at which of the client's stop sequences."""
        last = self._last
        if last is None:
            return None, None
        if last.finish_reason == "length":
            asked = (self.job.params[0].max_tokens or 0) >= self._max_tokens
            return ("max_tokens" if asked else "model_context_window_exceeded"), None
        if isinstance(last.stop_reason, str) and last.stop_reason in self._stop_sequences:
            return "stop_sequence", last.stop_reason
        return ("tool_use" if self._blocks.called_tools else "end_turn"), None

    def _message(self, usage: Usage) -> AnswerMessage:
        return AnswerMessage(id=self.job.id, model=self.job.model, usage=self._usage(usage))

    def _usage(self, usage: Usage) -> MessageUsage:
        cached = usage.prompt_tokens_details.cached_tokens
        num_thinking = thinking_tokens(usage, self._blocks.thinking, self._tokenizer)
        return MessageUsage(
            input_tokens=usage.prompt_tokens - cached,
            cache_creation_input_tokens=0,
            cache_read_input_tokens=cached,
            output_tokens=usage.completion_tokens,
            output_tokens_details=MessageTokensDetails(num_thinking),
        )


def _frames(events: Iterable[Event]) -> bytes:
    """Server-sent events, each named by its type."""
    return b"".join(
        b"event: " + event["type"].encode() + b"\ndata: " + _encode(event) + b"\n\n" for event in events
    )
