"""/v1/responses: items in, items out, conversations that this server remembers for a while.

Owns the endpoints and their store; `input.py`, `request.py` and `reply.py` say
what goes in and comes out. Knows no model's syntax. Invariant: a response is stored when it is complete,
before its client learns so, and otherwise not at all.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from gqa_serve.api.chat_request import ChatJob, prepare_chat
from gqa_serve.api.errors import shorten
from gqa_serve.api.json_guard import read_request
from gqa_serve.api.protocol import ChatRequest
from gqa_serve.api.responses.input import Conversation, is_reference, read_input, turn_starts, without_oldest
from gqa_serve.api.responses.protocol import (
    DeletedResponse,
    FunctionTool,
    Item,
    ItemList,
    ResponsesRequest,
    new_id,
)
from gqa_serve.api.responses.reply import Keeping, ResponseReply
from gqa_serve.api.responses.request import (
    Tools,
    chat_request,
    check_fields,
    check_include,
    field_rules,
    response_object,
)
from gqa_serve.api.responses.store import ResponseStore, StoredResponse
from gqa_serve.api.serving import ServingContext, answer, off_loop
from gqa_serve.errors import NotFoundError, RequestError

DEFAULT_PAGE, MAX_PAGE = 20, 100

PathItems = list[tuple[str, Item]]
T = TypeVar("T")


class Responses:
    """The endpoints."""

    def __init__(self, context: ServingContext) -> None:
        self._context = context
        self._rules = field_rules()
        self._tools = Tools()
        self._store = ResponseStore(context.config.max_stored_responses)

    async def post(self, request: Request) -> Response:
        """Create a response. Raises RequestError."""
        context = self._context
        context.engine.check_room()
        fields, raw = await read_request(request, context.bodies, ResponsesRequest)
        context.check_model(fields.model)
        self._rules.check(raw)
        check_fields(fields)
        keep = self._wants_storing(fields)
        previous = self._previous(fields)
        own_bytes = sum(memoryview(raw[name]).nbytes for name in ("input", "tools") if name in raw)
        size = own_bytes + (0 if previous is None else previous.chain_bytes())
        known = self._referenced(fields)
        items, own = await off_loop(size, lambda: self._items(fields, previous, known))
        tools = self._tools.usable(fields)
        chat, chat_fields = await self._prepare(fields, items, tools, size)
        job = dataclasses.replace(chat.job, id=new_id("resp_"))
        response = response_object(
            fields,
            chat_fields,
            tools,
            id=job.id,
            created_at=job.created,
            model=job.model,
            store=keep,
            temperature=job.params[0].temperature,
            top_p=job.params[0].top_p,
        )
        keeping = Keeping(self._store, own, previous, own_bytes) if keep else None
        chat = dataclasses.replace(chat, job=job)
        return await answer(request, context, ResponseReply(chat, context.tokenizer, response, keeping))

    async def stored(self, request: Request) -> Response:
        """A stored response, as it was answered; or forget it. Raises NotFoundError."""
        id = request.path_params["id"]
        if request.method == "DELETE":
            self._store.delete(id)
            return _json_bytes(msgspec.json.encode(DeletedResponse(id)))
        if request.query_params.get("stream", "false") != "false":
            raise RequestError(
                "A stored response is not streamed again; leave stream out.",
                param="stream",
                code="unsupported_parameter",
            )
        check_include(_query_list(request, "include"))
        return _json_bytes(self._store.get(id).body)

    async def input_items(self, request: Request) -> Response:
        """What a response answered, in pages. Raises NotFoundError, RequestError."""
        check_include(_query_list(request, "include"))
        items = self._store.get(request.path_params["id"]).inputs()
        order = request.query_params.get("order", "desc")
        if order not in ("asc", "desc"):
            raise RequestError('order must be "asc" or "desc".', param="order")
        if order == "desc":
            items.reverse()
        after = request.query_params.get("after")
        if after is not None:
            ids = [item.id for item in items]
            if after not in ids:
                raise NotFoundError(f"This response has no input item {shorten(after)!r}.", param="after")
            items = items[ids.index(after) + 1 :]
        limit = _limit(request.query_params.get("limit"))
        page = items[:limit]
        first, last = (page[0].id, page[-1].id) if page else ("", "")
        answered = ItemList(data=page, first_id=first, last_id=last, has_more=len(items) > limit)
        return _json_bytes(msgspec.json.encode(answered))

    def _wants_storing(self, fields: ResponsesRequest) -> bool:
        if fields.store and not self._store.enabled:
            raise RequestError(
                "This server stores no responses (--max-stored-responses 0); leave store out, or send false.",
                param="store",
                code="store_disabled",
            )
        return self._store.enabled and fields.store is not False

    def _previous(self, fields: ResponsesRequest) -> StoredResponse | None:
        id = fields.previous_response_id
        return None if id is None else self._store.get(id, param="previous_response_id")

    def _referenced(self, fields: ResponsesRequest) -> dict[str, Item]:
        """What the request's items may refer to; to be called on the event loop, where the store changes."""
        value = fields.input
        if value is None or isinstance(value, str) or not any(map(is_reference, value)):
            return {}
        return self._store.items()

    def _items(
        self, fields: ResponsesRequest, previous: StoredResponse | None, known: dict[str, Item]
    ) -> tuple[PathItems, list[Item]]:
        """The whole conversation with the paths of its items, and the request's own part of it."""

        def resolve(id: str, param: str) -> Item:
            if id not in known:
                raise self._store.missing_item(id, param)
            return known[id]

        own = read_input(fields.input, resolve)
        if not own and previous is None and not fields.instructions:
            raise RequestError("input is missing: send text or items.", param="input")
        single = isinstance(fields.input, str)
        paths = [("input" if single else f"input[{number}]", item) for number, item in enumerate(own)]
        before = [] if previous is None else previous.history()
        return [("previous_response_id", item) for item in before] + paths, own

    async def _prepare(
        self, fields: ResponsesRequest, items: PathItems, tools: list[tuple[str, FunctionTool]], size: int
    ) -> tuple[ChatJob, ChatRequest]:
        """A job for the conversation, or for what fits of it if `truncation` is "auto"."""

        async def prepare(items: PathItems) -> tuple[ChatJob, ChatRequest]:
            conversation = await off_loop(size, lambda: Conversation.of(items))
            chat, names = chat_request(fields, conversation, tools)
            with names.translating():
                job = await prepare_chat(self._context, chat, size, kind="responses", prefix="resp")
            return job, chat

        if fields.truncation != "auto":
            return await prepare(items)
        max_model_len = self._context.ready_info().max_model_len
        room = min(fields.max_output_tokens or max_model_len // 8, max_model_len // 2)

        async def fits(start: int) -> tuple[ChatJob, ChatRequest] | None:
            try:
                chat, request = await prepare(without_oldest(items, start))
            except RequestError as error:
                if error.code == "context_length_exceeded":
                    return None
                raise
            return (chat, request) if len(chat.job.prompts[0]) + room <= max_model_len else None

        starts = turn_starts([item for _, item in items])
        return await _first_that_fits(starts[:-1], fits) or await prepare(without_oldest(items, starts[-1]))


async def _first_that_fits(starts: Sequence[int], fits: Callable[[int], Awaitable[T | None]]) -> T | None:
    """What the lowest start gives that fits, by bisection: dropping more never makes it longer."""
    low, high = 0, len(starts)
    best: T | None = None
    while low < high:
        # The whole conversation first: it usually fits.
        middle = 0 if low == 0 and best is None else (low + high) // 2
        found = await fits(starts[middle])
        if found is None:
            low = middle + 1
        else:
            best, high = found, middle
    return best


def _query_list(request: Request, name: str) -> list[str]:
    """A list in the query, spelled with or without brackets."""
    return [*request.query_params.getlist(name), *request.query_params.getlist(f"{name}[]")]


def _limit(text: str | None) -> int:
    if text is None:
        return DEFAULT_PAGE
    if not (text.isascii() and text.isdecimal() and len(text) <= 3 and 1 <= int(text) <= MAX_PAGE):
        raise RequestError(f"limit must be a number between 1 and {MAX_PAGE}.", param="limit")
    return int(text)


def _json_bytes(body: bytes) -> Response:
    return Response(body, media_type="application/json")
