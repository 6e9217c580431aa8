"""Who may ask: API keys, names and origins that browsers may call by, and the path prefix of a proxy.

Owns the checks that come before any route, as plain ASGI around the application, so that streams pass through
untouched. Knows no endpoint but by its path. Invariant: with keys set, a path is guarded unless `OPEN_PATHS`
(or `--open-metrics`) names it; keys are compared as digests, all of them, in constant time.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import msgspec
from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import RedirectResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from gqa_serve.api.errors import error_response
from gqa_serve.api.exchange import exchange_of
from gqa_serve.api.hosts import ForeignRequestError, HostCheck, OriginCheck, is_loopback
from gqa_serve.api.rate_limits import KEY_INDEX, RATE_LIMIT_HEADERS
from gqa_serve.api.ui_files import FILES
from gqa_serve.errors import ConfigError, RequestError

# The page asks for a key itself; it shows nothing before it has one.
PAGE_PATHS = frozenset({"/", *(f"/ui/{name}" for name in FILES)})
# Probes and the description of the API: what a load balancer or a person needs before having a key.
OPEN_PATHS = frozenset({"/health", "/ready", "/ping", "/version", "/docs", "/openapi.json"}) | PAGE_PATHS
ANTHROPIC_PATHS = "/v1/messages"  # and below: their clients read errors in a shape of their own
EXPOSED_HEADERS = (
    "X-Request-Id",
    "Retry-After",
    *RATE_LIMIT_HEADERS,
)
CORS_METHODS = ("GET", "HEAD", "POST", "DELETE")
MAX_KEY_FILE_BYTES = 2**20


class AccessConfig(Protocol):
    """What this module needs of `ServerConfig`."""

    @property
    def host(self) -> str: ...

    @property
    def allowed_hosts(self) -> Sequence[str]: ...

    @property
    def api_key(self) -> Sequence[str]: ...

    @property
    def api_key_file(self) -> str | None: ...

    @property
    def cors_origins(self) -> Sequence[str]: ...

    @property
    def root_path(self) -> str: ...

    @property
    def open_metrics(self) -> bool: ...


class InvalidKeyError(RequestError):
    """No key came with the request, or none that is known."""

    status = 401


def with_access(app: ASGIApp, config: AccessConfig) -> ASGIApp:
    """`app` behind what `config` asks for. Raises ConfigError if the key file cannot be used.

    Preflight requests are answered before keys are looked at, because browsers send none with them; a 401
    carries the CORS headers, or a page could not read it.
    """
    if keys := load_keys(config):
        app = ApiKeys(app, keys, OPEN_PATHS | {"/metrics"} if config.open_metrics else OPEN_PATHS)
    if config.cors_origins:
        app = Cors(app, config.cors_origins)
    if checks := _checks(config, has_keys=bool(keys)):
        app = NoForeignRequests(app, checks)
    return RootPath(app, config.root_path) if config.root_path else app


# --- keys --------------------------------------------------------------------------------------------------


def load_keys(config: AccessConfig) -> tuple[str, ...]:
    """The keys of the settings and of the key file. Raises ConfigError, which shows no key."""
    keys = tuple(config.api_key)
    for number, key in enumerate(keys, 1):
        _check_key(key, f"--api-key: key {number}")
    return keys if config.api_key_file is None else keys + _keys_in(Path(config.api_key_file))


def _keys_in(path: Path) -> tuple[str, ...]:
    where = f"--api-key-file {path}"
    try:
        with path.open("rb") as file:
            data = file.read(MAX_KEY_FILE_BYTES + 1)
        lines = data.decode("utf-8").splitlines()
    except OSError as error:
        raise ConfigError(f"{where}: {error.strerror}.") from error
    except UnicodeDecodeError:
        raise ConfigError(f"{where} is not a text file in UTF-8.") from None  # its repr shows the bytes
    if len(data) > MAX_KEY_FILE_BYTES:
        raise ConfigError(f"{where} is larger than {MAX_KEY_FILE_BYTES} bytes; is it the right file?")
    keys = []
    for number, line in enumerate(lines, 1):
        key = line.strip()
        if key and not key.startswith("#"):
            _check_key(key, f"{where}: line {number}")
            keys.append(key)
    if not keys:  # which would leave the server open to everyone
        raise ConfigError(f"{where} holds no keys; write one on each line.")
    return tuple(keys)


def _check_key(key: str, where: str) -> None:
    if not (key.isascii() and key.isprintable()) or " " in key or not key:
        raise ConfigError(f"{where} must be printable ASCII without spaces, as HTTP headers carry it.")


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


class ApiKeys:
    """Lets a request pass if it shows one of the keys, as OpenAI's clients or as Anthropic's do."""

    def __init__(self, app: ASGIApp, keys: Sequence[str], open_paths: frozenset[str] = OPEN_PATHS) -> None:
        self._app = app
        self._open_paths = open_paths
        self._digests = tuple(_digest(key.encode("ascii")) for key in keys)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or self._open(scope):
            await self._app(scope, receive, send)
            return
        if (index := self._index(shown := _shown_keys(scope))) is not None:
            await self._app({**scope, KEY_INDEX: index}, receive, send)
            return
        message = "This API key is not known here." if shown else "This server wants an API key."
        error = InvalidKeyError(
            f"{message} Send it as the header 'Authorization: Bearer KEY' or 'x-api-key: KEY'.",
            code="invalid_api_key",
        )
        response = _refusal(scope, error)
        response.headers["WWW-Authenticate"] = "Bearer"
        await response(scope, receive, send)

    def _open(self, scope: Scope) -> bool:
        """OPTIONS does nothing on any route but tell a browser what it may send, which shows no key yet."""
        return scope["method"] == "OPTIONS" or route_path(scope) in self._open_paths

    def _index(self, shown: Sequence[bytes]) -> int | None:
        """Which of the server's keys was shown; None if none of them was."""
        found = None
        for key in shown:
            given = _digest(key)
            for index, digest in enumerate(self._digests):  # all, so that time does not tell which was near
                if hmac.compare_digest(digest, given):
                    found = index
        return found


def _shown_keys(scope: Scope) -> list[bytes]:
    keys = []
    for name, value in scope["headers"]:
        if name == b"x-api-key":
            keys.append(value.strip())
        elif name == b"authorization":
            kind, _, key = value.strip().partition(b" ")
            if kind.lower() == b"bearer":
                keys.append(key.strip())
    return keys[:4]  # more is an attempt to try many at once


def route_path(scope: Scope) -> str:
    """The path as the routes spell it."""
    path: str = scope["path"]
    return path.removeprefix(scope.get("root_path", ""))


def is_anthropic(path: str) -> bool:
    """Whether errors of this path are told in Anthropic's shape."""
    return path == ANTHROPIC_PATHS or path.startswith(ANTHROPIC_PATHS + "/")


def _refusal(scope: Scope, error: RequestError) -> Response:
    """The answer of `error`, in the shape that the path's clients read."""
    exchange_of(scope).error = error
    if not is_anthropic(route_path(scope)):
        return error_response(error)
    kind = "authentication_error" if error.status == 401 else "permission_error"
    detail = {"type": kind, "message": error.message}
    body = msgspec.json.encode({"type": "error", "error": detail})
    return Response(body, error.status, media_type="application/json")


# --- browsers and proxies ----------------------------------------------------------------------------------


def _checks(config: AccessConfig, *, has_keys: bool) -> list[HostCheck | OriginCheck]:
    """What a page has no key for needs no other check; names are known only on loopback, or when given."""
    checks: list[HostCheck | OriginCheck] = []
    if config.allowed_hosts or (is_loopback(config.host) and not has_keys):
        checks.append(HostCheck((config.host, *config.allowed_hosts)))
    if not has_keys:
        checks.append(OriginCheck(config.cors_origins))
    return checks


class NoForeignRequests:
    """Answers 403 to what `checks` refuse, before anything else looks at it."""

    def __init__(self, app: ASGIApp, checks: Sequence[HostCheck | OriginCheck]) -> None:
        self._app = app
        self._checks = checks

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            try:
                for check in self._checks:
                    check.check(scope)
            except ForeignRequestError as error:
                await _refusal(scope, error)(scope, receive, send)
                return
        await self._app(scope, receive, send)


class Cors(CORSMiddleware):
    """Lets pages of `origins` call; `*` is every page, which then may not send cookies along."""

    def __init__(self, app: ASGIApp, origins: Sequence[str]) -> None:
        super().__init__(
            app,
            allow_origins=origins,
            allow_methods=CORS_METHODS,
            allow_headers=("*",),
            allow_credentials="*" not in origins,
            expose_headers=EXPOSED_HEADERS,
            allow_private_network=True,  # a server at home is what a public chat page is to call
        )

    def preflight_response(self, request_headers: Headers) -> Response:
        """As starlette's, a refusal in JSON as every other error."""
        response = super().preflight_response(request_headers)
        if response.status_code < 400:
            return response
        reason = bytes(response.body).decode()
        headers = {name: value for name, value in response.headers.items() if not name.startswith("content-")}
        error = RequestError(f"{reason}; see --cors-origins.", code="cors_refused")
        return error_response(error, headers)


class RootPath:
    """Serves under a path prefix, whether the proxy in front strips it from what it passes on or not.

    Afterwards the path holds the prefix, as ASGI has it: routes match what follows, and URLs built from the
    request are those that clients see.
    """

    def __init__(self, app: ASGIApp, prefix: str) -> None:
        self._app = app
        self._prefix = prefix

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            path = scope["path"]
            if path == self._prefix and scope["method"] in ("GET", "HEAD"):
                # Without the slash, the page there would look for its files beside the prefix.
                await RedirectResponse(self._prefix + "/")(scope, receive, send)
                return
            if path != self._prefix and not path.startswith(self._prefix + "/"):
                path = self._prefix + path
            scope = {**scope, "root_path": self._prefix, "path": path}
        await self._app(scope, receive, send)
