"""GET / and what the page there asks for: its files, and how things stand, for the dashboard.

Owns the picture of the engine as the page draws it: one is taken when somebody looks, at most one in
`INTERVAL_S`, and all who look share it. Knows nothing of how it is drawn; the numbers over time are those of
/metrics. Invariant: a picture holds no text of anyone, and its size is bounded: two bits for each block and
`MAX_REQUESTS` requests.
"""

from __future__ import annotations

import asyncio
import base64
import dataclasses
import time
from collections import Counter
from collections.abc import Sequence

import msgspec
import numpy as np
from starlette.requests import Request
from starlette.responses import Response

from gqa_serve import __version__
from gqa_serve.api.errors import shorten
from gqa_serve.api.exchange import Route
from gqa_serve.api.serving import ServingContext
from gqa_serve.api.ui_files import HEADERS, PAGE, page_files
from gqa_serve.engine.metrics import BlockState, EngineSnapshot, RequestSnapshot
from gqa_serve.engine.request import ModelInfo
from gqa_serve.errors import EngineUnavailableError, NotFoundError

INTERVAL_S = 0.8  # pages ask once a second
PATIENCE_S = 2.0  # an engine in a long step answers after it; until then the last picture counts
MAX_REQUESTS = 256  # shown; all are counted


class ModelFacts(msgspec.Struct):
    """What of the loaded model decides how much fits into memory, of each engine's; see `ModelInfo`."""

    name: str
    architecture: str
    num_heads: int
    num_kv_heads: int
    kv_bytes_per_token: int
    kv_dtype: str
    num_blocks: int
    block_size: int
    max_model_len: int
    max_num_seqs: int
    weight_bytes: int
    dtype: str
    quantization: str
    device: str
    backend: str


class Blocks(msgspec.Struct):
    """Every KV block: two bits each (`BlockState`), the first in the lowest of the first byte; base64."""

    num_free: int
    num_cached: int
    num_active: int
    num_shared: int
    states: str


class Picture(msgspec.Struct):
    """The engine at one moment; `requests` are the first `MAX_REQUESTS` of the counted ones."""

    blocks: Blocks
    num_running: int
    num_waiting: int
    num_preparing: int
    requests: list[RequestSnapshot]


class UiState(msgspec.Struct):
    """Answer of GET /ui/state. No picture: the engine has none to give, and `engine`, its state, says why.

    `replicas` are the states of the engines, of which there may be several; the picture is of all of them.
    """

    version: str
    engine: str
    replicas: list[str]
    model: ModelFacts | None
    picture: Picture | None
    picture_age_s: float | None


class Ui:
    """The endpoints."""

    def __init__(self, context: ServingContext) -> None:
        self._context = context
        self._pictures = Pictures(context)

    def routes(self) -> list[Route]:
        """Those of the page; none with `--no-ui`."""
        if not self._context.config.ui:
            return []
        return [
            Route("/", self.page),
            Route("/ui/state", self.state),
            Route("/ui/{file}", self.file),
        ]

    async def page(self, request: Request) -> Response:
        """The page."""
        return _file(request, PAGE)

    async def file(self, request: Request) -> Response:
        """One of its files. Raises NotFoundError."""
        name = request.path_params["file"]
        if name == PAGE or name not in page_files():
            raise NotFoundError(
                f"The page at / has no file {shorten(name)!r}; reload it.", code="unknown_url"
            )
        return _file(request, name)

    async def state(self, request: Request) -> Response:
        """How things stand, the engine being gone included."""
        context = self._context
        taken = await self._pictures.latest()
        state = UiState(
            version=__version__,
            engine=context.engine.state,
            replicas=[replica.state for replica in context.engine.replicas],
            model=_facts(context.engine.model_info, context.model_names),
            picture=None if taken is None else taken.picture,
            picture_age_s=None if taken is None else round(time.monotonic() - taken.at_s, 3),
        )
        return Response(
            msgspec.json.encode(state), 200, {"Cache-Control": "no-store"}, media_type="application/json"
        )


def _file(request: Request, name: str) -> Response:
    file = page_files()[name]
    headers = {**HEADERS, "ETag": file.etag}
    if file.etag in request.headers.get("if-none-match", ""):
        return Response(None, 304, headers)
    return Response(file.data, 200, headers, file.media_type)


def _facts(info: ModelInfo | None, names: Sequence[str]) -> ModelFacts | None:
    if info is None:
        return None
    shown = names[0] if names else info.model
    same = {field.name: getattr(info, field.name) for field in msgspec.structs.fields(ModelFacts)[1:]}
    return ModelFacts(name=shown, **same)


# --- pictures ----------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Taken:
    """A picture and when it was taken (`time.monotonic`)."""

    picture: Picture
    at_s: float


class Pictures:
    """The engine's latest picture, for however many pages look at it."""

    def __init__(self, context: ServingContext) -> None:
        self._context = context
        self._last: Taken | None = None
        self._taking: asyncio.Task[Taken | None] | None = None

    async def latest(self) -> Taken | None:
        """A picture not much older than `INTERVAL_S`, or the last there was if the engine is busy.

        None if the engine is not there, or has not answered yet.
        """
        last = self._last
        if last is not None and time.monotonic() - last.at_s < INTERVAL_S:
            return last if self._is_there() else None
        if self._taking is None or self._taking.done():
            self._taking = asyncio.create_task(self._take())
        taking = self._taking
        await asyncio.wait({taking}, timeout=PATIENCE_S)  # one who leaves does not cancel it for the others
        if taking.done():
            return taking.result()
        return self._last if self._is_there() else None

    def _is_there(self) -> bool:
        return self._context.engine.state in ("ready", "stopping")

    async def _take(self) -> Taken | None:
        try:
            snapshot = await self._context.engine.snapshot()
        except EngineUnavailableError:  # the state says so, too
            self._last = None
            return None
        self._last = Taken(picture_of(snapshot), time.monotonic())
        return self._last


def picture_of(snapshot: EngineSnapshot) -> Picture:
    """A snapshot as the page gets it."""
    states = np.frombuffer(snapshot.blocks, np.uint8)
    counts = np.bincount(states, minlength=4)
    by_state = Counter(request.state for request in snapshot.requests)
    return Picture(
        blocks=Blocks(
            num_free=int(counts[BlockState.FREE]),
            num_cached=int(counts[BlockState.CACHED]),
            num_active=int(counts[BlockState.ACTIVE]),
            num_shared=int(counts[BlockState.SHARED]),
            states=base64.b64encode(_two_bits_each(states)).decode(),
        ),
        num_running=by_state["running"],
        num_waiting=by_state["waiting"],
        num_preparing=by_state["preparing"],
        requests=snapshot.requests[:MAX_REQUESTS],
    )


def _two_bits_each(states: np.ndarray) -> bytes:
    """Four blocks to a byte, in their order from its lowest bits up; missing ones are free."""
    whole = np.zeros(-(-len(states) // 4) * 4, np.uint8)
    whole[: len(states)] = states
    quads = whole.reshape(-1, 4)
    packed: bytes = (quads[:, 0] | quads[:, 1] << 2 | quads[:, 2] << 4 | quads[:, 3] << 6).tobytes()
    return packed
