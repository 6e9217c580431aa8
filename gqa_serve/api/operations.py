"""The table of routes as `/openapi.json` describes them: what goes in, what comes out, what may go wrong.

Owns one `Operation` for each method of each route in `app.routes`; tests compare the two, and walk the tables
of docs/api.md by this one. Knows endpoints only by their types and field rules.
"""

from __future__ import annotations

from typing import Any

from gqa_serve.api.openapi import Operation
from gqa_serve.api.params import FieldRules
from gqa_serve.api.protocol import (
    ChatChunk,
    ChatCompletion,
    ChatRequest,
    CompletionRequest,
    ModelCard,
    ModelList,
    TextCompletion,
)
from gqa_serve.api.system import ServerLoad, Status, Version

_GENERATES = (400, 404, 413, 429, 500, 503)  # what any route that runs the model may answer


def operations() -> tuple[Operation, ...]:
    """The table of routes."""
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
            method="get", path="/openapi.json", tag="Server", summary="This description",
            response=dict[str, Any],
        ),
        Operation(
            method="get", path="/docs", tag="Server", summary="This description as a page to read",
            response=str, media_type="text/html",
        ),
    )  # fmt: skip
