"""The files of the page at `/`: their bytes, types and tags, and the headers they are sent with.

Owns what a browser may load from here and what the page may do there: everything it uses comes from this
table, which is read once, so no path is ever built from a request. Knows no engine. Invariant: the page runs
no script but these files, and no script here can turn text into markup (Trusted Types are required, and no
policy may make any).
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from importlib import resources

PAGE = "index.html"
FILES = (
    "api.js",
    "blocks.js",
    "chart.js",
    "chat.css",
    "chat.js",
    "connection.js",
    "conversation.js",
    "dashboard.css",
    "dashboard.js",
    "dom.js",
    "facts.js",
    "icon.svg",
    "main.js",
    "markdown.js",
    "message.js",
    "metrics.js",
    "requests.js",
    "settings.js",
    "style.css",
    "theme.js",
    "tokens.js",
)
"""What lies under `/ui/`. Named one by one, so that a file left in the folder by accident is not served."""

_TYPES = {"html": "text/html", "js": "text/javascript", "css": "text/css", "svg": "image/svg+xml"}
HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
        "require-trusted-types-for 'script'; trusted-types 'none'"
    ),
    "Permissions-Policy": "camera=(), geolocation=(), microphone=(), payment=(), usb=(), clipboard-read=()",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-cache",  # asked for again each time, and answered with 304 while it is the same
}


@dataclasses.dataclass(frozen=True)
class PageFile:
    """One file, ready to be sent."""

    data: bytes
    media_type: str
    etag: str


@functools.cache
def page_files() -> dict[str, PageFile]:
    """All of them, by name."""
    folder = resources.files("gqa_serve.api").joinpath("web")
    return {name: _read(folder.joinpath(name).read_bytes(), name) for name in (PAGE, *FILES)}


def _read(data: bytes, name: str) -> PageFile:
    etag = f'"{hashlib.sha256(data).hexdigest()[:20]}"'
    return PageFile(data, _TYPES[name.rpartition(".")[2]], etag)
