"""POST /v1/chat/completions: messages in, one assistant message (or `n`) out.

Owns the shape of chat answers; `chat_request.py` reads the request and `serving.py` runs the generation.
Knows no engine and no model's syntax. Invariant: chunks of a stream, put together, are the message that is
sent whole.
"""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response

from gqa_serve.api.chat_request import ChatJob, prepare_chat
from gqa_serve.api.chunks import ChunkReply
from gqa_serve.api.json_guard import read_request
from gqa_serve.api.logprobs import chat_logprobs
from gqa_serve.api.message_parts import Part, TextPart, merge_parts
from gqa_serve.api.params import FieldRules, choice_count
from gqa_serve.api.protocol import (
    AssistantMessage,
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatLogprobs,
    ChatRequest,
    Delta,
    Usage,
)
from gqa_serve.api.serving import ServingContext, answer
from gqa_serve.api.text_stream import TextEvent
from gqa_serve.engine.request import TokenLogprobs


class ChatCompletions:
    """The endpoint."""

    def __init__(self, context: ServingContext) -> None:
        self._context = context
        self._rules = FieldRules.chat()

    async def post(self, request: Request) -> Response:
        """Decode, check, render, tokenize, generate. Raises RequestError."""
        context = self._context
        fields, raw = await read_request(request, context.config.max_body_bytes, ChatRequest)
        context.check_model(fields.model)
        self._rules.check(raw, choice_count(fields))
        chat = await prepare_chat(context, fields, memoryview(raw["messages"]).nbytes)
        return await answer(request, context, ChatReply(context, chat))


class ChatReply(ChunkReply):
    """Chat answers, whole and in chunks."""

    def __init__(self, context: ServingContext, chat: ChatJob) -> None:
        super().__init__(chat.job)
        self._tokenizer = context.tokenizer
        self._num_logprobs = chat.num_logprobs
        self._parsers = [chat.new_parser() for _ in range(chat.job.n)]

    def _logprobs(self, entries: list[TokenLogprobs] | None) -> ChatLogprobs | None:
        if self._num_logprobs is None:
            return None
        return chat_logprobs(entries or [], self._num_logprobs, self._tokenizer)

    def _chunk(self, choices: list[ChatChunkChoice]) -> ChatChunk:
        job = self.job
        return ChatChunk(
            id=job.id,
            created=job.created,
            model=job.model,
            system_fingerprint=job.fingerprint,
            choices=choices,
        )

    def first_chunks(self) -> list[ChatChunk]:
        """The role, once per choice."""
        delta = Delta(role="assistant", content="")
        return [self._chunk([ChatChunkChoice(index, delta)]) for index in range(self.job.n)]

    def chunks(self, event: TextEvent) -> list[ChatChunk]:
        """New parts (or logprobs of text that is still held back), then the end."""
        ended = event.finish_reason is not None
        deltas = [_delta(part) for part in self._parts(event)]
        logprobs = self._logprobs(event.logprobs) if event.logprobs else None
        if logprobs is not None and not deltas:
            deltas = [Delta(content="")]
        choices = [ChatChunkChoice(event.index, delta) for delta in deltas]
        if choices:
            choices[0].logprobs = logprobs
        if ended:
            choices.append(ChatChunkChoice(event.index, Delta(), finish_reason=event.finish_reason))
        return [self._chunk([choice]) for choice in choices]

    def _parts(self, event: TextEvent) -> list[Part]:
        parser = self._parsers[event.index]
        return merge_parts(parser.feed(event.text, final=event.finish_reason is not None))

    def usage_chunk(self) -> ChatChunk:
        """No choices: clients must not look for text here."""
        return self._chunk([])

    def whole(self, events: list[TextEvent], usage: Usage) -> ChatCompletion:
        """All choices at once."""
        choices = [
            ChatChoice(
                event.index,
                _message(self._parts(event)),
                self._logprobs(event.logprobs),
                event.finish_reason,
            )
            for event in events
        ]
        job = self.job
        return ChatCompletion(
            id=job.id,
            created=job.created,
            model=job.model,
            choices=choices,
            usage=usage,
            system_fingerprint=job.fingerprint,
        )


def _delta(part: Part) -> Delta:
    """What a part adds to the message, as OpenAI's clients put it together."""
    match part:
        case TextPart(text):
            return Delta(content=text)
        case _:
            raise NotImplementedError(f"a chat chunk for {part}")


def _message(parts: list[Part]) -> AssistantMessage:
    """All parts of a choice as one message."""
    return AssistantMessage(content="".join(part.text for part in parts if isinstance(part, TextPart)))
