"""POST /v1/messages and /v1/messages/count_tokens: Anthropic's Messages API over the chat core.

Owns the endpoints; `request.py` and `reply.py` say what goes in and comes out. Knows no
model's syntax. Invariant: whatever goes wrong on these paths is told in Anthropic's shape.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Awaitable, Callable

import msgspec
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from gqa_serve.api.anthropic.protocol import CountRequest, MessagesRequest, TokenCount
from gqa_serve.api.anthropic.reply import MessagesReply, anthropic_error
from gqa_serve.api.anthropic.request import chat_request, field_rules
from gqa_serve.api.chat_request import ChatJob, prepare_chat
from gqa_serve.api.exchange import exchange_of
from gqa_serve.api.json_guard import RawFields, read_request
from gqa_serve.api.responses.protocol import new_id
from gqa_serve.api.serving import ServingContext, answer, off_loop
from gqa_serve.errors import ContextLengthError, RequestError

_LARGE_FIELDS = ("messages", "system", "tools")

logger = logging.getLogger(__name__)


class AnthropicMessages:
    """The endpoints."""

    def __init__(self, context: ServingContext) -> None:
        self._context = context
        self._rules = field_rules(MessagesRequest)
        self._count_rules = field_rules(CountRequest)

    async def post(self, request: Request) -> Response:
        """Create a message."""
        return await self._in_anthropics_words(request, self._create)

    async def count(self, request: Request) -> Response:
        """Count the tokens of a prompt."""
        return await self._in_anthropics_words(request, self._count)

    async def _in_anthropics_words(
        self, request: Request, work: Callable[[Request, str], Awaitable[Response]]
    ) -> Response:
        """What `work` answers, or the error it raised, in Anthropic's shape, with a `request-id`."""
        id = new_id("msg_")
        try:
            response = await work(request, id)
        except ClientDisconnect:
            raise
        except Exception as error:
            if not isinstance(error, RequestError):
                logger.exception("Answering %s failed.", id)
            exchange_of(request.scope).error = error
            return anthropic_error(error, id)
        response.headers["request-id"] = id
        return response

    async def _create(self, request: Request, id: str) -> Response:
        context = self._context
        context.engine.check_room()
        fields, raw = await read_request(request, context.bodies, MessagesRequest)
        context.check_model(fields.model)
        self._rules.check(raw)
        chat = await self._prepare(fields, raw)
        chat = dataclasses.replace(chat, job=dataclasses.replace(chat.job, id=id))
        reply = MessagesReply(
            chat,
            context.tokenizer,
            max_tokens=fields.max_tokens,
            stop_sequences=fields.stop_sequences or [],
            show_thinking=fields.thinking is None or fields.thinking.display != "omitted",
        )
        return await answer(request, context, reply)

    async def _count(self, request: Request, id: str) -> Response:
        context = self._context
        fields, raw = await read_request(request, context.bodies, CountRequest)
        context.check_model(fields.model)
        self._count_rules.check(raw)
        try:
            chat = await self._prepare(fields, raw)
            count = TokenCount(len(chat.job.prompts[0]))
        except ContextLengthError as error:  # to know this is what the client counts for
            count = TokenCount(error.num_prompt_tokens)
        return Response(msgspec.json.encode(count), media_type="application/json")

    async def _prepare(self, fields: CountRequest, raw: RawFields) -> ChatJob:
        """The prompt and its parameters. Raises RequestError."""
        context = self._context
        size = sum(memoryview(raw[name]).nbytes for name in _LARGE_FIELDS if name in raw)
        chat, names = await off_loop(size, lambda: chat_request(fields, context.chat_template))
        with names.translating():
            return await prepare_chat(context, chat, size, kind="messages", prefix="msg")
