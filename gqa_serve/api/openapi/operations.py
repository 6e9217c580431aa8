"""The table of routes as `/openapi.json` describes them: what goes in, what comes out, what may go wrong.

Owns one `Operation` for each method of each route in `app.routes`; tests compare the two, and walk the tables
of docs/api.md by this one. Knows endpoints only by their types and field rules.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from gqa_serve.api.answers import (
    ChatChunk,
    ChatCompletion,
    Detokenized,
    EmbeddingList,
    ModelCard,
    ModelList,
    TextCompletion,
    Tokenized,
    TokenizerInfo,
)
from gqa_serve.api.anthropic import request as anthropic_request
from gqa_serve.api.anthropic.protocol import (
    AnswerMessage,
    CountRequest,
    MessageError,
    MessagesRequest,
    TokenCount,
)
from gqa_serve.api.openapi.document import Operation
from gqa_serve.api.params import FieldRules
from gqa_serve.api.profile import ProfileRequest
from gqa_serve.api.protocol import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    EmbeddingRequest,
    TokenizeRequest,
)
from gqa_serve.api.responses import request as responses_request
from gqa_serve.api.responses.protocol import DeletedResponse, ItemList, ResponseObject, ResponsesRequest
from gqa_serve.api.system import ServerLoad, Status, Version
from gqa_serve.api.ui import UiState

_GENERATES = (400, 404, 413, 429, 500, 503, 504)  # what any route that runs the model may answer


def operations(*, ui: bool = True) -> tuple[Operation, ...]:
    """The table of routes; without `ui`, as the server has them with --no-ui."""
    hello = {"messages": [{"role": "user", "content": "Hello!"}], "max_tokens": 32}
    return (
        Operation(
            method="post", path="/v1/chat/completions", tag="OpenAI", summary="Chat, whole or streamed",
            request=ChatRequest, response=ChatCompletion, stream=ChatChunk, rules=FieldRules.chat(),
            errors=_GENERATES, example=hello,
        ),
        Operation(
            method="post", path="/v1/completions", tag="OpenAI", summary="Continue text or token ids",
            request=CompletionRequest, response=TextCompletion, stream=TextCompletion,
            rules=FieldRules.completion(), errors=_GENERATES,
            example={"prompt": "Once upon a time", "max_tokens": 32},
        ),
        *_responses(),
        Operation(
            method="post", path="/v1/embeddings", tag="OpenAI", summary="Texts as vectors",
            request=EmbeddingRequest, response=EmbeddingList, rules=FieldRules.embedding(),
            errors=_GENERATES, example={"input": ["one text", "another"]},
        ),
        *_messages(),
        *_tokenizer(),
        Operation(
            method="get", path="/v1/models", tag="OpenAI", summary="The names this server answers to",
            response=ModelList, errors=(503,),
        ),
        Operation(
            method="get", path="/v1/models/{id:path}", tag="OpenAI", summary="One of these names",
            response=ModelCard, errors=(404, 503),
        ),
        Operation(
            method="get", path="/health", tag="Server", summary="Is the engine alive?", response=Status,
            errors=(503,),
        ),
        Operation(
            method="get", path="/ping", tag="Server", summary="The same as /health", response=Status,
            errors=(503,),
        ),
        Operation(
            method="get", path="/ready", tag="Server", summary="Are requests taken?", response=Status,
            errors=(503,),
        ),
        Operation(
            method="get", path="/load", tag="Server", summary="How many choices are under way",
            response=ServerLoad,
        ),
        Operation(
            method="get", path="/version", tag="Server", summary="The version of gqa-serve", response=Version
        ),
        Operation(
            method="get", path="/metrics", tag="Server", summary="What the server counts, for Prometheus",
            response=str, media_type="text/plain", errors=(400,),
            query={"names": {"enum": ["gqa_serve", "vllm"]}},
        ),
        Operation(
            method="post", path="/debug/profile", tag="Server", summary="A torch profile of engine steps",
            request=ProfileRequest, response=dict[str, Any],
            errors=(400, 403, 409, 413, 500, 503, 504), example={"num_steps": 10, "timeout_s": 30},
        ),
        Operation(
            method="get", path="/openapi.json", tag="Server", summary="This description",
            response=dict[str, Any],
        ),
        Operation(
            method="get", path="/docs", tag="Server", summary="This description as a page to read",
            response=str, media_type="text/html",
        ),
        *(_page() if ui else ()),
    )  # fmt: skip


def _page() -> tuple[Operation, ...]:
    return (
        Operation(
            method="get", path="/", tag="Page", summary="A chat and a dashboard, to use in a browser",
            response=str, media_type="text/html",
        ),
        Operation(
            method="get", path="/ui/state", tag="Page", summary="What the dashboard shows: the engine now",
            response=UiState,
        ),
        Operation(
            method="get", path="/ui/{file}", tag="Page", summary="A file of the page", response=str,
            media_type="text/*", errors=(404,),
        ),
    )  # fmt: skip


def _responses() -> tuple[Operation, ...]:
    include = {"type": "array", "items": {"enum": list(responses_request.INCLUDABLE)}}
    return (
        Operation(
            method="post", path="/v1/responses", tag="OpenAI", summary="A response, whole or as events",
            request=ResponsesRequest, response=ResponseObject, stream=dict[str, Any], done=False,
            rules=responses_request.field_rules(), errors=_GENERATES,
            example={"input": "Hello!", "max_output_tokens": 32},
        ),
        Operation(
            method="get", path="/v1/responses/{id}", tag="OpenAI", summary="A stored response",
            response=ResponseObject, errors=(400, 404),
            query={"include": include, "stream": {"const": False}},
        ),
        Operation(
            method="delete", path="/v1/responses/{id}", tag="OpenAI", summary="Forget a stored response",
            response=DeletedResponse, errors=(404,),
        ),
        Operation(
            method="get", path="/v1/responses/{id}/input_items", tag="OpenAI",
            summary="What a stored response answered", response=ItemList, errors=(400, 404),
            query={
                "limit": {"type": "integer", "minimum": 1, "maximum": 100},
                "order": {"enum": ["asc", "desc"]}, "after": {"type": "string"}, "include": include,
            },
        ),
    )  # fmt: skip


def _messages() -> tuple[Operation, ...]:
    hello = {"messages": [{"role": "user", "content": "Hello!"}]}
    return (
        Operation(
            method="post", path="/v1/messages", tag="Anthropic", summary="A message, whole or as events",
            request=MessagesRequest, response=AnswerMessage, stream=dict[str, Any], done=False,
            rules=anthropic_request.field_rules(MessagesRequest), errors=_GENERATES,
            error=MessageError, example={**hello, "max_tokens": 32},
        ),
        Operation(
            method="post", path="/v1/messages/count_tokens", tag="Anthropic", summary="Count tokens",
            request=CountRequest, response=TokenCount, rules=anthropic_request.field_rules(CountRequest),
            errors=(400, 404, 413, 503), error=MessageError, example=hello,
        ),
    )  # fmt: skip


def _tokenizer() -> tuple[Operation, ...]:
    errors = (400, 404, 413, 503)
    both = [
        (prefix, operation)
        for prefix in ("", "/v1")
        for operation in (
            Operation(
                method="post", path="/tokenize", tag="Tokenizer", summary="The tokens of a prompt or a chat",
                request=TokenizeRequest, response=Tokenized, rules=FieldRules.tokenize(), errors=errors,
                example={"prompt": "Hello!"},
            ),
            Operation(
                method="post", path="/detokenize", tag="Tokenizer", summary="The text of tokens",
                request=DetokenizeRequest, response=Detokenized, rules=FieldRules.detokenize(),
                errors=errors, example={"tokens": [1, 2, 3]},
            ),
        )
    ]  # fmt: skip
    info = Operation(
        method="get", path="/tokenizer_info", tag="Tokenizer", summary="The tokenizer's special tokens",
        response=TokenizerInfo, errors=(503,),
    )  # fmt: skip
    return (*(dataclasses.replace(one, path=prefix + one.path) for prefix, one in both), info)
