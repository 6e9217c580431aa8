"""The ASGI application: every route, and the one place that wires the API's parts together.

Owns the route table. Does not start or stop the engine (the caller does, or passes a `lifespan` that does).
Invariant: every response but an SSE stream and the pages is JSON, errors included.
"""

from __future__ import annotations

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Lifespan, Scope

from gqa_serve.api.access import is_anthropic, route_path, with_access
from gqa_serve.api.anthropic.endpoint import AnthropicMessages
from gqa_serve.api.anthropic.reply import anthropic_error
from gqa_serve.api.chat import ChatCompletions
from gqa_serve.api.chat_format import find_format
from gqa_serve.api.completions import Completions
from gqa_serve.api.connection_limits import ConnectionLimits
from gqa_serve.api.deadline import Deadlines
from gqa_serve.api.embeddings import Embeddings
from gqa_serve.api.errors import EXCEPTION_HANDLERS, error_response, http_error, on_http_exception
from gqa_serve.api.exchange import Route, exchange_of
from gqa_serve.api.metrics import Metrics
from gqa_serve.api.observed import Observed
from gqa_serve.api.openapi.page import Docs
from gqa_serve.api.profile import Profiler
from gqa_serve.api.request_ids import RequestIds
from gqa_serve.api.responses.endpoint import Responses
from gqa_serve.api.responses.protocol import new_id
from gqa_serve.api.serving import ServingConfig, ServingContext, ServingEngine
from gqa_serve.api.system import System
from gqa_serve.api.tokenize import Tokenize
from gqa_serve.api.tracing import Tracing
from gqa_serve.api.turns import Turns
from gqa_serve.api.ui import Ui
from gqa_serve.engine.chat_prompt import end_of_turn
from gqa_serve.engine.chat_template import ChatTemplate
from gqa_serve.engine.tokenizer import Tokenizer
from gqa_serve.errors import RequestError

__all__ = ["ServingConfig", "ServingEngine", "create_app"]


def create_app(
    engine: ServingEngine,
    tokenizer: Tokenizer,
    chat_template: ChatTemplate,
    config: ServingConfig,
    *,
    lifespan: Lifespan[Starlette] | None = None,
    limits: ConnectionLimits | None = None,
) -> ASGIApp:
    """The application. It may serve before the engine is ready: requests then get a 503.

    What the connections of `limits` refuse is counted with its own refusals.
    Raises ConfigError if the file of API keys cannot be used.
    """
    chat_format = find_format(
        chat_template,
        tool_call_parser=config.tool_call_parser,
        reasoning_parser=config.reasoning_parser,
    )
    end_id = end_of_turn(tokenizer, chat_template)
    metrics = Metrics(engine)
    for replica, meter in zip(engine.replicas, metrics.meters, strict=True):
        replica.on_step = meter.step
    if limits is not None:
        limits.on_refusal = metrics.refused
    context = ServingContext(
        engine,
        tokenizer,
        chat_template,
        config,
        metrics,
        tracing=None if config.otlp_endpoint is None else Tracing(config.otlp_endpoint),
        chat_format=chat_format,
        end_of_turn_ids=() if end_id is None else (end_id,),
    )
    app = Starlette(
        routes=routes(context),
        exception_handlers={**EXCEPTION_HANDLERS, HTTPException: _on_http_exception},
        lifespan=lifespan,
    )
    app.router.redirect_slashes = False  # a redirect would answer a typing error with an HTML-less 307
    inner: ASGIApp = Turns(app)
    if config.request_timeout is not None:
        inner = Deadlines(inner, config.request_timeout, _error_response)
    # Around the application, not inside it: starlette's own answer to a bug comes from its outermost layer.
    return Observed(RequestIds(with_access(inner, config)), metrics)


def _error_response(scope: Scope, error: RequestError) -> Response:
    """An error, in the shape of the API that the path belongs to."""
    exchange_of(scope).error = error
    if is_anthropic(route_path(scope)):
        return anthropic_error(error, new_id("msg_"))
    return error_response(error)


async def _on_http_exception(request: Request, error: Exception) -> Response:
    """An unknown path or method, in the shape of the API that the path belongs to."""
    if not is_anthropic(route_path(request.scope)):
        return await on_http_exception(request, error)
    exchange_of(request.scope).error = error
    response = anthropic_error(http_error(request, error), new_id("msg_"))
    response.headers.update(getattr(error, "headers", None) or {})
    return response


def routes(context: ServingContext) -> list[Route]:
    """Every route; `openapi/operations.py` describes the same ones."""
    system = System(context)
    docs = Docs(context)
    responses = Responses(context)
    messages = AnthropicMessages(context)
    tokenize = Tokenize(context)
    return [
        Route("/v1/chat/completions", ChatCompletions(context).post, methods=["POST"]),
        Route("/v1/completions", Completions(context).post, methods=["POST"]),
        Route("/v1/responses", responses.post, methods=["POST"]),
        Route("/v1/responses/{id}", responses.stored, methods=["GET", "DELETE"]),
        Route("/v1/responses/{id}/input_items", responses.input_items, methods=["GET"]),
        Route("/v1/messages", messages.post, methods=["POST"]),
        Route("/v1/messages/count_tokens", messages.count, methods=["POST"]),
        Route("/v1/embeddings", Embeddings(context).post, methods=["POST"]),
        Route("/tokenize", tokenize.tokenize, methods=["POST"]),
        Route("/v1/tokenize", tokenize.tokenize, methods=["POST"]),
        Route("/detokenize", tokenize.detokenize, methods=["POST"]),
        Route("/v1/detokenize", tokenize.detokenize, methods=["POST"]),
        Route("/tokenizer_info", tokenize.info),
        Route("/v1/models", system.models),
        Route("/v1/models/{id:path}", system.model),
        Route("/health", system.health),
        Route("/ping", system.health),
        Route("/ready", system.ready),
        Route("/load", system.load),
        Route("/version", system.version),
        Route("/metrics", system.metrics),
        Route("/debug/profile", Profiler(context).post, methods=["POST"]),
        Route("/openapi.json", docs.openapi),
        Route("/docs", docs.page),
        *Ui(context).routes(),
    ]
