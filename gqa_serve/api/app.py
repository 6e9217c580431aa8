"""The ASGI application: every route, and the one place that wires the API's parts together.

Owns the route table. Does not start or stop the engine (the caller does, or passes a `lifespan` that does).
Invariant: every response but an SSE stream is JSON, errors in OpenAI's shape included.
"""

from __future__ import annotations

from starlette.applications import Starlette
from starlette.routing import Route
from starlette.types import Lifespan

from gqa_serve.api.anthropic import AnthropicMessages
from gqa_serve.api.chat import ChatCompletions
from gqa_serve.api.completions import Completions
from gqa_serve.api.errors import EXCEPTION_HANDLERS
from gqa_serve.api.responses import Responses
from gqa_serve.api.serving import ServingConfig, ServingContext, ServingEngine
from gqa_serve.api.system import System
from gqa_serve.engine.chat_template import ChatTemplate
from gqa_serve.engine.tokenizer import Tokenizer

__all__ = ["ServingConfig", "ServingEngine", "create_app"]


def create_app(
    engine: ServingEngine,
    tokenizer: Tokenizer,
    chat_template: ChatTemplate,
    config: ServingConfig,
    *,
    lifespan: Lifespan[Starlette] | None = None,
) -> Starlette:
    """The application. It may serve before the engine is ready: requests then get a 503."""
    context = ServingContext(engine, tokenizer, chat_template, config)
    _ = context.chat_format  # found out, and logged, now
    system = System(context)
    responses = Responses(context)
    messages = AnthropicMessages(context)
    app = Starlette(
        routes=[
            Route("/v1/chat/completions", ChatCompletions(context).post, methods=["POST"]),
            Route("/v1/completions", Completions(context).post, methods=["POST"]),
            Route("/v1/responses", responses.post, methods=["POST"]),
            Route("/v1/responses/{id}", responses.stored, methods=["GET", "DELETE"]),
            Route("/v1/responses/{id}/input_items", responses.input_items, methods=["GET"]),
            Route("/v1/messages", messages.post, methods=["POST"]),
            Route("/v1/messages/count_tokens", messages.count, methods=["POST"]),
            Route("/v1/models", system.models),
            Route("/v1/models/{id:path}", system.model),
            Route("/health", system.health),
            Route("/ready", system.ready),
            Route("/version", system.version),
        ],
        exception_handlers=EXCEPTION_HANDLERS,
        lifespan=lifespan,
    )
    app.router.redirect_slashes = False  # a redirect would answer a typing error with an HTML-less 307
    return app
