"""Names a server goes by, and pages that may make it work: what a browser can be led to send."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import suppress

import anthropic
import pytest
from fake_engine import FakeEngine, Server, serving
from hypothesis import given
from hypothesis import strategies as st
from test_api_raw import CHAT, Reply, chat, send

from gqa_serve.api.hosts import ForeignRequestError, HostCheck, host_name, is_loopback
from gqa_serve.config import ServerConfig
from gqa_serve.errors import ConfigError

PAGE = "https://chat.example.org"
BODY = json.dumps({"messages": [{"role": "user", "content": "Hi"}]}).encode()


def call(server: Server, *headers: str, method: str = "POST", path: str = CHAT, body: bytes = BODY) -> Reply:
    """A request with exactly these headers: a client adds a Host of its own."""
    head = [
        f"{method} {path} HTTP/1.1",
        *headers,
        f"Content-Length: {len(body)}",
        "Connection: close",
        "",
        "",
    ]
    return send(server, "\r\n".join(head).encode() + body)


def code(reply: Reply) -> str | None:
    return None if reply.status == 200 else str(json.loads(reply.body)["error"]["code"])


@pytest.fixture(scope="module")
def plain() -> Iterator[Server]:
    """As with no settings at all."""
    with serving(FakeEngine(), allowed_hosts=()) as server:
        yield server


@pytest.fixture(scope="module")
def named() -> Iterator[Server]:
    settings = {"allowed_hosts": ("llm.example.org", "*.Lab.example"), "api_key": ("sk-a",)}
    with serving(FakeEngine(), **settings) as server:
        yield server


@pytest.fixture(scope="module")
def called_by_a_page() -> Iterator[Server]:
    with serving(FakeEngine(), cors_origins=(PAGE,)) as server:
        yield server


# --- names -------------------------------------------------------------------------------------------------

ALWAYS = [
    "localhost",
    "LOCALHOST:8000",
    "localhost.",
    "a.localhost:1",
    "127.0.0.1:8000",
    "10.0.0.7",
    "[::1]:8000",
]


@pytest.mark.parametrize("host", ALWAYS)
def test_localhost_and_addresses_always_pass(plain: Server, named: Server, host: str) -> None:
    assert call(plain, f"Host: {host}").status == 200
    assert call(named, f"Host: {host}", "Authorization: Bearer sk-a").status == 200


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "evil.example:8000",
        "localhost.evil.example",
        "127.0.0.1.evil.example",
        "[::1].evil.example",
        "[::1",
        "127.0.0.1%.evil.example",
        "127.0.0.1@evil.example",
        "1.2.3",
        "",
        "a b",
    ],
)
@pytest.mark.parametrize("path", [CHAT, "/health", "/v1/models", "/nothing"])
def test_another_name_is_refused_on_loopback(plain: Server, host: str, path: str) -> None:
    reply = call(plain, f"Host: {host}", path=path, method="POST" if path == CHAT else "GET")
    assert (reply.status, code(reply)) == (403, "host_not_allowed")
    assert "--allowed-hosts" in reply.body.decode()


def test_names_that_are_allowed(named: Server) -> None:
    key = "Authorization: Bearer sk-a"
    for host in ("llm.example.org", "LLM.example.org.:443", "x.lab.example", "a.b.lab.example"):
        assert call(named, f"Host: {host}", key).status == 200
    for host in ("lab.example", "xlab.example", "llm.example.org.evil.example", "other.example.org"):
        assert code(call(named, f"Host: {host}", key)) == "host_not_allowed"


def test_a_request_without_a_name_comes_from_no_browser(plain: Server) -> None:
    reply = send(plain, b"GET /health HTTP/1.0\r\n\r\n")
    assert reply.status == 200


def test_every_host_header_counts(server: Server) -> None:
    assert code(call(server, "Host: localhost", "Host: evil.example")) == "host_not_allowed"


@pytest.mark.parametrize(
    "settings",
    [
        {"host": "0.0.0.0", "allowed_hosts": ()},
        {"host": "::", "allowed_hosts": ()},
        {"api_key": ("sk-a",), "allowed_hosts": ()},
        {"allowed_hosts": ("*",)},
    ],
)
def test_any_name_where_names_cannot_be_known_or_keys_guard(settings: dict[str, object]) -> None:
    with serving(FakeEngine(), **settings) as server:
        assert call(server, "Host: any.example", "Authorization: Bearer sk-a").status == 200


def test_the_name_it_listens_on_is_its_own() -> None:
    HostCheck(("my-box", "lan.example")).check({"headers": [(b"host", b"my-box:8000")]})
    assert all(map(is_loopback, ("127.0.0.2", "::1", "localhost")))
    assert not any(map(is_loopback, ("my-box", "0.0.0.0", "::")))


def test_anthropics_clients_read_the_refusal(server: Server) -> None:
    with (
        anthropic.Anthropic(base_url=server.url, api_key="x", max_retries=0) as client,
        pytest.raises(anthropic.PermissionDeniedError, match="--cors-origins"),
    ):
        client.messages.create(
            model="alias",
            max_tokens=1,
            messages=[{"role": "user", "content": "Hi"}],
            extra_headers={"Origin": "https://evil.example"},
        )


@pytest.mark.parametrize("name", ["http://a.example", "a.example:80", "", "*.", "a b", "*x.example", "a..b"])
def test_names_that_are_none(name: str) -> None:
    with pytest.raises(ConfigError, match="--allowed-hosts"):
        ServerConfig(allowed_hosts=(name,))


@given(st.binary(max_size=40))
def test_any_bytes_as_a_name_are_refused_or_known(value: bytes) -> None:
    host_name(value)
    with suppress(ForeignRequestError):
        HostCheck(("x.example",)).check({"headers": [(b"host", value)]})


# --- pages -------------------------------------------------------------------------------------------------

OWN = "Host: localhost:8000"
FOREIGN = [
    ("Origin: https://evil.example",),
    ("Origin: null",),
    ("Origin: http://localhost:3000",),  # another program of this machine
    ("Sec-Fetch-Site: cross-site",),
    ("Sec-Fetch-Site: same-site", "Origin: http://localhost:8000"),
    ("Sec-Fetch-Site: cross-site", "Origin: http://localhost:8000"),
]


@pytest.mark.parametrize("headers", FOREIGN)
def test_a_foreign_page_cannot_make_the_model_work(
    server: Server, engine: FakeEngine, headers: tuple[str, ...]
) -> None:
    """Text that is JSON is a request that browsers send without asking first."""
    reply = call(server, OWN, *headers, "Content-Type: text/plain")
    assert (reply.status, code(reply)) == (403, "origin_not_allowed")
    assert not engine.requests


@pytest.mark.parametrize(
    "headers",
    [
        (),
        ("Origin: http://localhost:8000",),
        ("Sec-Fetch-Site: same-origin", "Origin: https://behind.a.proxy.example"),
        ("Sec-Fetch-Site: none",),
    ],
)
def test_the_servers_own_page_and_programs_may(server: Server, headers: tuple[str, ...]) -> None:
    assert call(server, OWN, *headers).status == 200


def test_a_page_that_cors_allows_may(called_by_a_page: Server) -> None:
    headers = (OWN, "Sec-Fetch-Site: cross-site")
    assert call(called_by_a_page, *headers, f"Origin: {PAGE}").status == 200
    assert code(call(called_by_a_page, *headers, "Origin: https://evil.example")) == "origin_not_allowed"


def test_reading_is_for_cors_to_refuse(server: Server) -> None:
    """The browser keeps the answer to itself; nothing was computed for it."""
    reply = call(server, OWN, "Origin: https://evil.example", method="GET", path="/v1/models", body=b"")
    assert reply.status == 200
    assert "access-control-allow-origin" not in reply.headers


def test_a_foreign_page_has_no_key(named: Server) -> None:
    reply = call(named, OWN, "Origin: https://evil.example")
    assert (reply.status, code(reply)) == (401, "invalid_api_key")
    assert call(named, OWN, "Origin: https://evil.example", "Authorization: Bearer sk-a").status == 200


def test_browsers_do_not_guess_types(server: Server) -> None:
    for path in ("/health", "/docs", "/nothing"):
        reply = call(server, OWN, method="GET", path=path, body=b"")
        assert reply.headers["x-content-type-options"] == "nosniff"
    assert chat(server).headers["x-content-type-options"] == "nosniff"
