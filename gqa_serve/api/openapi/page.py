"""GET /openapi.json and /docs: what the server can do, for programs and for people.

Owns the page's delivery: one file of the package, no outside assets, and a content security policy that runs
its own script and style and nothing else. Knows nothing of the routes but their table. Invariant: the page
asks only for `openapi.json` beside itself, so it works under any path prefix.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import re
from importlib import resources

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from gqa_serve.api.openapi.document import document
from gqa_serve.api.openapi.operations import operations
from gqa_serve.api.serving import ServingContext

_INLINE = re.compile(rb"<(script|style)>(.*?)</\1>", re.DOTALL)


class Docs:
    """The endpoints."""

    def __init__(self, context: ServingContext) -> None:
        self._context = context
        self._operations = operations(ui=context.config.ui)
        self._secured = bool(context.config.api_key or context.config.api_key_file)

    async def openapi(self, request: Request) -> Response:
        """The description of every route."""
        names = self._context.model_names
        value = document(
            self._operations,
            root_path=request.scope.get("root_path", ""),
            secured=self._secured,
            model=names[0] if names else None,
        )
        return Response(msgspec.json.encode(value), media_type="application/json")

    async def page(self, request: Request) -> Response:
        """The page that renders it."""
        html, policy = _page()
        headers = {
            "Content-Security-Policy": policy,
            "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "no-referrer",
            "Cache-Control": "no-cache",
        }
        return Response(html, 200, headers, "text/html")


@functools.cache
def _page() -> tuple[bytes, str]:
    """The page, and the policy that names its inline script and style by their hashes."""
    html = resources.files("gqa_serve.api").joinpath("web").joinpath("docs.html").read_bytes()
    hashes = {
        kind.decode(): base64.b64encode(hashlib.sha256(text).digest()).decode()
        for kind, text in _INLINE.findall(html)
    }
    policy = (
        f"default-src 'none'; script-src 'sha256-{hashes['script']}'; style-src 'sha256-{hashes['style']}'; "
        "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return html, policy
