"""POST /debug/profile: a torch profile of the next engine steps, as a trace for Perfetto or chrome://tracing.

Owns who may ask: whoever has a key where keys are set, else only a program on this machine. Knows the profile
as packed bytes. Invariant: without keys, a request that came through a proxy or from a web page is refused,
whatever address it seems to come from.
"""

from __future__ import annotations

import gzip
import ipaddress
from typing import Annotated

import anyio.to_thread
import msgspec
from starlette.requests import Request
from starlette.responses import Response

from gqa_serve.api.access import load_keys
from gqa_serve.api.json_guard import read_request
from gqa_serve.api.serving import ServingContext, unless_gone
from gqa_serve.errors import RequestError

MAX_STEPS = 100
MAX_TIMEOUT_S = 300.0
# What proxies add, and browsers: without a key, the address alone would let their clients in.
_FROM_ELSEWHERE = (
    "forwarded", "x-forwarded-for", "x-forwarded-host", "x-forwarded-proto", "x-real-ip", "via", "origin",
)  # fmt: skip


class ProfileRequest(msgspec.Struct, forbid_unknown_fields=True):
    """What to record: so many steps that compute something, or those within `timeout_s` seconds.

    `replica`: of which engine, with --data-parallel-size.
    """

    num_steps: Annotated[int, msgspec.Meta(ge=1, le=MAX_STEPS)] = 10
    timeout_s: Annotated[float, msgspec.Meta(gt=0, le=MAX_TIMEOUT_S)] = 30.0
    replica: Annotated[int, msgspec.Meta(ge=0)] = 0


class NotAllowedError(RequestError):
    """Only a client on this machine may ask."""

    status = 403
    type = "permission_error"


class NoStepsError(RequestError):
    """Nothing was computed while the profile ran."""

    status = 504
    type = "timeout_error"


class Profiler:
    """The endpoint."""

    def __init__(self, context: ServingContext) -> None:
        self._context = context
        self._has_keys = bool(load_keys(context.config))

    async def post(self, request: Request) -> Response:
        """Record and answer; a client that leaves ends the recording. Raises RequestError."""
        if not self._has_keys:
            _check_local(request)
        fields, _ = await read_request(request, self._context.bodies, ProfileRequest)
        replicas = self._context.engine.replicas
        if fields.replica >= len(replicas):
            raise RequestError(
                f"replica must be less than {len(replicas)}, the number of engines.", param="replica"
            )
        recording = replicas[fields.replica].profile(fields.num_steps, fields.timeout_s)
        profile = await unless_gone(request, recording)
        if not profile.num_steps:
            raise NoStepsError(
                f"The engine computed nothing within {fields.timeout_s:g} s. Send requests while the profile "
                "runs, or raise timeout_s.",
                param="timeout_s",
                code="no_steps",
            )
        headers = {"X-Profiled-Steps": str(profile.num_steps), "Vary": "Accept-Encoding"}
        body = profile.trace
        if "gzip" in request.headers.get("accept-encoding", ""):
            headers["Content-Encoding"] = "gzip"
        else:
            body = await anyio.to_thread.run_sync(gzip.decompress, body)
        return Response(body, headers=headers, media_type="application/json")


def _check_local(request: Request) -> None:
    """Raises NotAllowedError unless the client is a program on this machine."""
    elsewhere = [name for name in _FROM_ELSEWHERE if name in request.headers]
    if request.client is not None and not elsewhere:
        try:
            if ipaddress.ip_address(request.client.host).is_loopback:
                return
        except ValueError:
            pass  # no address: a Unix socket, or a name that a proxy made up
    raise NotAllowedError(
        "Without API keys, profiles are for programs on the server's own machine. Ask from there and not "
        "through a proxy, or set --api-key-file.",
        code="not_local",
    )
