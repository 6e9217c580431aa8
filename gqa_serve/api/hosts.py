"""Which requests a web page smuggled in: names this server does not go by, and calls from foreign pages.

A server on loopback is safe from the network, but not from the browser beside it. A page may point a name of
its own at 127.0.0.1 and then talk to us as to itself (DNS rebinding); the `Host` header tells. And any page
may send a POST that needs no leave (plain text that happens to be JSON): it never sees the answer, but the
model computes it; `Sec-Fetch-Site` or `Origin` tells. Knows no keys and no routes. Invariant: what no browser
sends (no `Origin`, no `Sec-Fetch-Site`, an IP address or localhost as `Host`) always passes.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Sequence

from starlette.types import Scope

from gqa_serve.api.errors import shorten
from gqa_serve.errors import RequestError

_PORT = re.compile(r":\d*$")
_BRACKETED = re.compile(r"\[([^\[\]]*)\](?::\d*)?")
_OWN_PAGE = (b"same-origin", b"none")  # what a browser says of our own page, and of what a person typed
_SAFE_METHODS = ("GET", "HEAD", "OPTIONS")


class ForeignRequestError(RequestError):
    """The request came under a wrong name or from a page that may not call."""

    status = 403


def is_loopback(host: str) -> bool:
    """Whether `--host` is an address that only this machine reaches."""
    address = _address(host)
    return host == "localhost" if address is None else address.is_loopback


class HostCheck:
    """Refuses `Host` headers that are neither `allowed` names, nor IP addresses, nor localhost."""

    def __init__(self, allowed: Sequence[str]) -> None:
        names = [name.lower().rstrip(".") for name in allowed]
        self._all = "*" in names
        self._names = frozenset(name for name in names if not name.startswith("*."))
        self._suffixes = tuple(name[1:] for name in names if name.startswith("*."))

    def check(self, scope: Scope) -> None:
        """Raises ForeignRequestError. HTTP/1.0 clients may send no Host at all."""
        for name, value in scope["headers"]:
            if name == b"host" and not self._passes(host_name(value)):
                shown = shorten(value.decode("latin-1"))
                raise ForeignRequestError(
                    f"This server does not go by the name {shown!r}. If it should, start it with "
                    "--allowed-hosts and that name.",
                    code="host_not_allowed",
                )

    def _passes(self, host: str) -> bool:
        if self._all or host in self._names or (bool(self._suffixes) and host.endswith(self._suffixes)):
            return True
        return host == "localhost" or host.endswith(".localhost") or _address(host) is not None


class OriginCheck:
    """Refuses what changes or computes something for a page that `--cors-origins` does not name."""

    def __init__(self, origins: Sequence[str]) -> None:
        self._all = "*" in origins
        self._origins = frozenset(origin.lower().encode() for origin in origins)

    def check(self, scope: Scope) -> None:
        """Raises ForeignRequestError."""
        if self._all or scope["method"] in _SAFE_METHODS:
            return
        headers = dict(scope["headers"])
        origin, site = headers.get(b"origin"), headers.get(b"sec-fetch-site")
        if site is not None:
            own = site in _OWN_PAGE
        else:  # an old browser, or a page without TLS: compare what its origin says with our name
            own = origin is None or origin.partition(b"://")[2].lower() == headers.get(b"host", b"").lower()
        if own or (origin is not None and origin.lower() in self._origins):
            return
        page = "a page of another site" if origin is None else repr(shorten(origin.decode("latin-1")))
        raise ForeignRequestError(
            f"A browser sent this for {page}, which may not call this server. If it should, start the server "
            "with --cors-origins and that page's origin.",
            code="origin_not_allowed",
        )


def host_name(value: bytes) -> str:
    """The name or address of a Host header, without port, brackets and the dot at its end."""
    text = value.decode("latin-1").strip().lower()
    if bracketed := _BRACKETED.fullmatch(text):
        return bracketed[1]
    return _PORT.sub("", text).rstrip(".")


def _address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(host)  # a zone only after an IPv6 address
    except ValueError:
        return None
