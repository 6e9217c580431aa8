"""POST /v1/chat/completions: messages in, one assistant message (or `n`) out.

Owns the shape of chat answers; `chat_request.py` reads the request and `serving.py` runs the generation.
Knows no engine and no model's syntax. Invariant: chunks of a stream, put together, are the message that is
sent whole.
"""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response

from gqa_serve.api.answers import (
    AnswerFunction,
    AnswerToolCall,
    ApiFinishReason,
    AssistantMessage,
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatLogprobs,
    Delta,
    DeltaFunction,
    DeltaToolCall,
    Usage,
)
from gqa_serve.api.chat_request import ChatJob, prepare_chat
from gqa_serve.api.chunks import ChunkReply
from gqa_serve.api.json_guard import read_request
from gqa_serve.api.logprobs import chat_logprobs, prompt_logprobs
from gqa_serve.api.message_parts import (
    ArgumentsPart,
    Part,
    ReasoningPart,
    TextPart,
    ToolCallPart,
    finish_reason,
    merge_parts,
)
from gqa_serve.api.params import FieldRules
from gqa_serve.api.protocol import ChatRequest
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
        context.engine.check_room()
        fields, raw = await read_request(request, context.bodies, ChatRequest)
        context.check_model(fields.model)
        self._rules.check(raw)
        size = sum(memoryview(raw[name]).nbytes for name in ("messages", "tools", "documents") if name in raw)
        chat = await prepare_chat(context, fields, size)
        return await answer(request, context, ChatReply(context, chat))


class ChatReply(ChunkReply):
    """Chat answers, whole and in chunks."""

    def __init__(self, context: ServingContext, chat: ChatJob) -> None:
        super().__init__(chat.job)
        self._tokenizer = context.tokenizer
        self._chat = chat
        self._parsers = [chat.new_parser() for _ in range(chat.job.n)]
        self._has_calls = [False] * chat.job.n

    def _logprobs(self, entries: list[TokenLogprobs] | None) -> ChatLogprobs | None:
        if self._chat.num_logprobs is None:
            return None
        as_ids = bool(self.job.fields.return_tokens_as_token_ids)
        return chat_logprobs(entries or [], self._chat.num_logprobs, self._tokenizer, as_ids=as_ids)

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
        """The role, once per choice; with tools there may be no content, and null stays null."""
        delta = Delta(role="assistant", content=None if self._chat.tools else "")
        deltas = [delta, Delta(content=self._chat.echo)] if self._chat.echo else [delta]
        chunks = [
            self._chunk([ChatChunkChoice(index, delta)]) for index in range(self.job.n) for delta in deltas
        ]
        if self._chat.shows_ids:
            chunks[0].prompt_token_ids = list(self.job.prompts[0])
        return chunks

    def chunks(self, event: TextEvent) -> list[ChatChunk]:
        """New parts (or logprobs of text that is still held back), then the end."""
        deltas = [_delta(part) for part in self._parts(event)]
        logprobs = self._logprobs(event.logprobs) if event.logprobs else None
        shows_ids = self._chat.shows_ids and bool(event.token_ids)
        if (logprobs is not None or shows_ids) and not deltas:
            deltas = [Delta() if self._chat.tools else Delta(content="")]
        choices = [ChatChunkChoice(event.index, delta) for delta in deltas]
        if choices:
            choices[0].logprobs = logprobs
        if choices and shows_ids:
            choices[0].token_ids = event.token_ids
        if event.finish_reason is not None:
            end = ChatChunkChoice(event.index, Delta(), finish_reason=self._finish(event))
            end.stop_reason = event.stop_reason
            choices.append(end)
        return [self._chunk([choice]) for choice in choices]

    def _parts(self, event: TextEvent) -> list[Part]:
        parser = self._parsers[event.index]
        parts = merge_parts(parser.feed(event.text, final=event.finish_reason is not None))
        if any(isinstance(part, ToolCallPart) for part in parts):
            self._has_calls[event.index] = True
        return parts

    def _finish(self, event: TextEvent) -> ApiFinishReason | None:
        """Only to be asked when the event's parts are known."""
        return finish_reason(
            event.finish_reason,
            has_calls=self._has_calls[event.index],
            names_tool=self._chat.names_tool,
            is_cut=self._parsers[event.index].is_cut,
        )

    def usage_chunk(self) -> ChatChunk:
        """No choices: clients must not look for text here."""
        return self._chunk([])

    def whole(self, events: list[TextEvent], usage: Usage) -> ChatCompletion:
        """All choices at once."""
        job, chat = self.job, self._chat
        completion = ChatCompletion(
            id=job.id,
            created=job.created,
            model=job.model,
            choices=[self._choice(event) for event in events],
            usage=usage,
            system_fingerprint=job.fingerprint,
        )
        prompt, scores = job.prompts[0], events[0].prompt_logprobs
        if chat.shows_ids:
            completion.prompt_token_ids = list(prompt)
        if chat.num_prompt_logprobs is not None and scores is not None:
            completion.prompt_logprobs = prompt_logprobs(
                prompt,
                scores,
                chat.num_prompt_logprobs,
                self._tokenizer,
                as_ids=bool(job.fields.return_tokens_as_token_ids),
            )
        return completion

    def _choice(self, event: TextEvent) -> ChatChoice:
        parts = self._parts(event)
        if self._chat.echo:
            parts = [TextPart(self._chat.echo), *parts]
        message = _message(parts)
        if self._chat.tools and not message.content:
            message.content = None
        choice = ChatChoice(event.index, message, self._logprobs(event.logprobs), self._finish(event))
        choice.stop_reason = event.stop_reason
        if self._chat.shows_ids:
            choice.token_ids = event.token_ids
        return choice


def _delta(part: Part) -> Delta:
    """What a part adds to the message, as OpenAI's clients put it together."""
    match part:
        case TextPart(text):
            return Delta(content=text)
        case ReasoningPart(text):
            return Delta(reasoning_content=text)
        case ToolCallPart(index, id, name):
            return Delta(tool_calls=[DeltaToolCall(index, id, "function", DeltaFunction(name, ""))])
        case ArgumentsPart(index, text):
            return Delta(tool_calls=[DeltaToolCall(index, function=DeltaFunction(arguments=text))])


def _message(parts: list[Part]) -> AssistantMessage:
    """All parts of a choice, merged, as one message."""
    message = AssistantMessage(
        content="".join(part.text for part in parts if isinstance(part, TextPart)),
    )
    if reasoning := "".join(part.text for part in parts if isinstance(part, ReasoningPart)):
        message.reasoning_content = reasoning
    calls = [part for part in parts if isinstance(part, ToolCallPart)]
    if calls:
        arguments = {part.index: part.text for part in parts if isinstance(part, ArgumentsPart)}
        message.tool_calls = [
            AnswerToolCall(id=call.id, function=AnswerFunction(call.name, arguments.get(call.index, "")))
            for call in calls
        ]
    return message
