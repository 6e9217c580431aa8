"""GET /health, /ping, /ready, /load, /version, /metrics and /v1/models: what the server is and how it fares.

Owns the meaning of alive and ready. Knows engines only by their states. Invariant: /health is 200 only while
an engine can work (also while it finishes its last requests), /ready only while one takes new ones.
"""

from __future__ import annotations

import anyio.to_thread
import msgspec
from prometheus_client.exposition import choose_encoder
from starlette.requests import Request
from starlette.responses import Response

from gqa_serve import __version__
from gqa_serve.api.answers import ModelCard, ModelList
from gqa_serve.api.exposition import PREFIX, Exposition
from gqa_serve.api.serving import ServingContext
from gqa_serve.errors import EngineUnavailableError, NotFoundError, RequestError

_ALIVE = ("ready", "stopping")
_PREFIXES = {"gqa_serve": PREFIX, "vllm": "vllm:"}


class Status(msgspec.Struct, omit_defaults=True):
    """All is well; anything else is an error. `replicas`: the state of each engine, if there are several."""

    status: str
    replicas: list[str] = []


class ServerLoad(msgspec.Struct):
    """Answer of GET /load."""

    server_load: int


class Version(msgspec.Struct):
    """Answer of GET /version."""

    version: str


class System:
    """The endpoints."""

    def __init__(self, context: ServingContext) -> None:
        self._context = context

    async def health(self, request: Request) -> Response:
        """Alive? Restart the server if this stays 503."""
        return self._status(_ALIVE)

    async def ready(self, request: Request) -> Response:
        """Taking requests? Send traffic elsewhere while this is 503."""
        return self._status(("ready",))

    def _status(self, good: tuple[str, ...]) -> Response:
        engine = self._context.engine
        states = [replica.state for replica in engine.replicas]
        if engine.state not in good:
            each = f" Replicas: {', '.join(states)}." if len(states) > 1 else ""
            raise EngineUnavailableError(f"The engine is {engine.state}.{each}")
        return _json(Status("ok", states if len(states) > 1 else []))

    async def load(self, request: Request) -> Response:
        """How many choices the engine computes or holds in its queue, as load balancers for vLLM read it."""
        return _json(ServerLoad(self._context.engine.num_requests))

    async def version(self, request: Request) -> Response:
        """The package's version."""
        return _json(Version(__version__))

    async def metrics(self, request: Request) -> Response:
        """For Prometheus, as text or in its newer form; `names=vllm` gives those of vLLM that mean the same.

        Encoded in a thread: it takes milliseconds that streams would wait for.
        """
        names = request.query_params.get("names", "gqa_serve")
        if names not in _PREFIXES:
            raise RequestError("names must be gqa_serve or vllm.", param="names")
        model = next(iter(self._context.model_names), "")
        everything = Exposition(self._context.metrics.registry, model, _PREFIXES[names])
        accept = (
            request.headers.get("accept", "") if names == "gqa_serve" else ""
        )  # OpenMetrics has no colons
        encode, content_type = choose_encoder(accept)
        body = await anyio.to_thread.run_sync(encode, everything)
        return Response(body, headers={"content-type": content_type})

    async def models(self, request: Request) -> Response:
        """Every name clients may use. Raises EngineUnavailableError while there is none yet.

        A 503 makes clients try again; an empty list would tell them that nothing is served here.
        """
        if not self._context.model_names:
            self._context.ready_info()
        return _json(ModelList([self._card(name) for name in self._context.model_names]))

    async def model(self, request: Request) -> Response:
        """One name; ids may hold slashes. Raises NotFoundError."""
        name = request.path_params["id"]
        if not name:
            raise NotFoundError(
                "GET /v1/models/ needs a model's id after the slash; GET /v1/models lists them.",
                code="unknown_url",
            )
        return _json(self._card(self._context.check_model(name)))

    def _card(self, name: str) -> ModelCard:
        info = self._context.engine.model_info
        return ModelCard(
            id=name,
            created=self._context.started,
            root=None if info is None else info.model,
            max_model_len=None if info is None else info.max_model_len,
        )


def _json(value: object) -> Response:
    return Response(msgspec.json.encode(value), media_type="application/json")
