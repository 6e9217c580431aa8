"""Requests that mean harm: smuggled heads, addresses to fetch, text for logs and pages."""

from __future__ import annotations

import contextlib
import json
import logging
import re
import socket
from collections.abc import Iterator
from typing import Any

import httpx2
import pytest
from fake_engine import FakeEngine, Server, serving, wait_until
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_api_raw import CHAT, TEXT, send
from tool_templates import HERMES

BODY = b'{"prompt":"a"}'
CHUNKS = b"e\r\n" + BODY + b"\r\n0\r\n\r\n"
NEXT = b"GET /version HTTP/1.1\r\nHost: test\r\nX-Request-Id: second\r\n\r\n"
HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: test\r\n"
SMUGGLED = {
    "length and chunks": b"Content-Length: 14\r\nTransfer-Encoding: chunked\r\n\r\n" + CHUNKS,
    "chunks and length": b"Transfer-Encoding: chunked\r\nContent-Length: 3\r\n\r\n" + CHUNKS,
    "two lengths": b"Content-Length: 14\r\nContent-Length: 3\r\n\r\n" + BODY,
    "a list of lengths": b"Content-Length: 14, 14\r\n\r\n" + BODY,
    "a signed length": b"Content-Length: +14\r\n\r\n" + BODY,
    "a negative length": b"Content-Length: -1\r\n\r\n" + BODY,
    "a length in hex": b"Content-Length: 0xe\r\n\r\n" + BODY,
    "a length that overflows": b"Content-Length: 99999999999999999999\r\n\r\n" + BODY,
    "an encoding nobody knows": b"Transfer-Encoding: xchunked\r\n\r\n" + CHUNKS,
    "chunks inside another encoding": b"Transfer-Encoding: chunked, identity\r\n\r\n" + CHUNKS,
    "a blank before the colon": b"Transfer-Encoding : chunked\r\n\r\n" + CHUNKS,
    "a NUL": b"X-A: b\0c\r\nContent-Length: 14\r\n\r\n" + BODY,
    "a negative chunk": b"Transfer-Encoding: chunked\r\n\r\n-e\r\n" + BODY + b"\r\n0\r\n\r\n",
    "a chunk that overflows": b"Transfer-Encoding: chunked\r\n\r\nfffffffffffffffffff\r\n"
    + BODY
    + b"\r\n0\r\n\r\n",
    "a chunk that does not end": b"Transfer-Encoding: chunked\r\n\r\ne\r\n" + BODY + b"XX0\r\n\r\n",
}


def exchange(server: Server, data: bytes) -> bytes:
    """All that the server says to these bytes until it closes, or says no more."""
    answer = b""
    with server.connect() as connection:
        connection.settimeout(90)
        with contextlib.suppress(OSError):  # it may have closed
            connection.sendall(data)
            connection.shutdown(socket.SHUT_WR)
        with contextlib.suppress(OSError):
            while part := connection.recv(65536):
                answer += part
    return answer


@pytest.mark.parametrize("name", SMUGGLED)
def test_a_request_that_two_servers_would_read_differently(
    server: Server, engine: FakeEngine, name: str
) -> None:
    """Nothing after it is read either: it may be meant as another client's request."""
    answer = exchange(server, HEAD + SMUGGLED[name] + NEXT)
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert b'"code":"invalid_http"' in answer
    assert b"second" not in answer
    wait_until(lambda: engine.num_running == 0)


def test_what_is_compared_with(server: Server) -> None:
    for fields in (b"Content-Length: 14\r\n\r\n" + BODY, b"Transfer-Encoding: chunked\r\n\r\n" + CHUNKS):
        with server.connect() as connection:
            connection.sendall(HEAD + fields + NEXT)
            answer = b""
            while b"second" not in answer:
                answer += connection.recv(65536)
            assert answer.startswith(b"HTTP/1.1 200 ")


lines = st.sampled_from(
    [
        b"Host: test",
        b"Host: a",
        b"Content-Length: 14",
        b"Content-Length: 0",
        b"Transfer-Encoding: chunked",
        b"Expect: 100-continue",
        b"Upgrade: websocket",
        b"Upgrade: h2c",
        b"Connection: Upgrade",
        b"Connection: close",
        b"HTTP2-Settings: x",
        b"X: \xff",
        b" folded",
        b":",
        b"",
        b"Origin: null",
        b"Content-Type: text/plain",
        b"Trailer: X",
    ]
)
starts = st.sampled_from(
    [
        b"POST /v1/completions HTTP/1.1",
        b"GET /version HTTP/1.1",
        b"GET /version HTTP/1.0",
        b"GET /version",
        b"PRI * HTTP/2.0",
        b"CONNECT a:1 HTTP/1.1",
        b"OPTIONS * HTTP/1.1",
        b"GET http://a/version HTTP/1.1",
        b"GET /%00%ff/../ HTTP/1.1",
        b"POST / HTTP/9.9",
    ]
)
bodies = st.sampled_from(
    [
        b"",
        BODY,
        CHUNKS,
        b"0\r\n\r\n",
        b"ffffffff\r\n",
        BODY[:5],
        b"\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01",
        NEXT,
    ]
)
requests = st.builds(
    lambda start, fields, body: b"\r\n".join([start, *fields, b"", b""]) + body,
    starts,
    st.lists(lines, max_size=5),
    bodies,
)


@settings(
    max_examples=120,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(st.lists(requests | st.binary(max_size=30), min_size=1, max_size=3))
def test_any_bytes_get_answers_below_500(server: Server, engine: FakeEngine, data: list[bytes]) -> None:
    answer = exchange(server, b"".join(data))
    statuses = [int(status) for status in re.findall(rb"HTTP/1\.1 (\d{3}) ", answer)]
    assert all(status < 500 for status in statuses)
    assert not answer or answer.startswith(b"HTTP/1.1 ")
    wait_until(lambda: engine.num_running == 0)


# --- addresses ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def with_tools() -> Iterator[Server]:
    with serving(FakeEngine(), template=HERMES) as server:
        yield server


def test_no_address_in_a_request_is_ever_fetched(with_tools: Server) -> None:
    with socket.create_server(("127.0.0.1", 0)) as trap:
        trap.setblocking(False)
        url = f"http://127.0.0.1:{trap.getsockname()[1]}/x.png"
        image = {"type": "image_url", "image_url": {"url": url}}
        schema = {"$schema": url, "$id": url, "$ref": url, "type": "object"}
        call: dict[str, Any] = {
            "type": "function",
            "function": {"name": "f", "description": url, "parameters": schema},
        }
        said = {"role": "user", "content": url}
        for path, body in [
            (CHAT, {"messages": [{"role": "user", "content": [image]}]}),
            (CHAT, {"messages": [said], "tools": [call]}),
            (
                CHAT,
                {
                    "messages": [said],
                    "response_format": {
                        "type": "json_schema",
                        "json_schema": {"name": "x", "schema": schema},
                    },
                },
            ),
            (CHAT, {"messages": [said], "documents": [{"url": url}], "chat_template": url, "model": url}),
            (
                CHAT,
                {
                    "messages": [
                        {
                            "role": "user",
                            "content": [{"type": "file", "file": {"file_id": url, "file_data": url}}],
                        }
                    ]
                },
            ),
            (CHAT, {"messages": [said], "web_search_options": {"url": url}, "metadata": {"url": url}}),
            (TEXT, {"prompt": url, "grammar": f'start: "a"\n%import {url}', "structured_outputs": None}),
            (
                "/v1/responses",
                {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": url}]}]},
            ),
            (
                "/v1/responses",
                {"input": [{"role": "user", "content": [{"type": "input_file", "file_url": url}]}]},
            ),
            (
                "/v1/responses",
                {"input": "a", "tools": [{"type": "mcp", "server_label": "a", "server_url": url}]},
            ),
            (
                "/v1/responses",
                {"input": "a", "tools": [{"type": "web_search"}], "background": True, "prompt": {"id": url}},
            ),
            (
                "/v1/messages",
                {
                    "max_tokens": 1,
                    "messages": [
                        {
                            "role": "user",
                            "content": [{"type": "image", "source": {"type": "url", "url": url}}],
                        }
                    ],
                },
            ),
            (
                "/v1/messages",
                {
                    "max_tokens": 1,
                    "messages": [said],
                    "mcp_servers": [{"type": "url", "url": url, "name": "a"}],
                },
            ),
            ("/v1/embeddings", {"input": url}),
        ]:
            status = with_tools.post(path, body).status_code
            assert status < 500, (path, body)
        with pytest.raises(BlockingIOError):
            trap.accept()


@pytest.mark.parametrize(
    "path",
    [
        "/v1/models/../../../etc/passwd",
        "/v1/models/%2e%2e%2f%2e%2e%2fetc%2fpasswd",
        "/%2e%2e/%2e%2e/etc/passwd",
        "/docs/../../etc/passwd",
        "/v1/responses/..%2f..%2fetc%2fpasswd",
        "/v1/models//etc/passwd",
        "/v1/models/%00",
        "/static/..%5c..%5cetc",
        "//etc/passwd",
        "/ui/../x",
    ],
)
def test_no_path_leads_to_a_file(server: Server, path: str) -> None:
    reply = send(server, f"GET {path} HTTP/1.1\r\nHost: test\r\n\r\n".encode())
    assert reply.status in (404, 405)
    assert reply.headers["content-type"] == "application/json"
    assert b"root:" not in reply.body


# --- logs and pages ----------------------------------------------------------------------------------------

EVIL = "a\r\nINFO fake line\x1b[31m\u2028</script><script>alert(1)</script>"


def test_nothing_a_client_says_begins_a_line_of_the_log(
    server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.DEBUG):
        for body in (
            {"model": EVIL, "prompt": "a"},
            {"prompt": "a", EVIL: 1, "user": EVIL, "cache_salt": EVIL},
            {"prompt": EVIL, "metadata": {EVIL: EVIL}, "stop": [EVIL], "response_format": {"type": EVIL}},
        ):
            assert server.post(TEXT, body).status_code < 500
        httpx2.get(server.url + "/" + "a%0d%0aINFO fake%1b[31m", verify=False)
        headers = {
            "X-Request-Id": "a\tINFO fake line",
            "User-Agent": "\x7f\x80",
            "X-Forwarded-For": "INFO fake line",
        }
        exchange(
            server,
            b"GET /nothing HTTP/1.1\r\nHost: test\r\n"
            + b"".join(f"{name}: {value}\r\n".encode("latin-1") for name, value in headers.items())
            + b"\r\n",
        )
    for record in caplog.records:
        if record.name.startswith("gqa_serve"):
            line = record.getMessage()
            assert not re.search(r"[\x00-\x1f\x7f\u2028]", line), line
            assert "fake line" not in line or record.name.endswith("params")


def test_answers_that_repeat_a_client_are_json(server: Server) -> None:
    """Which browsers do not take for a page, whatever it holds: the type is said and not to be guessed."""
    for path in (
        "/v1/models/" + "%3Cscript%3Ealert(1)%3C/script%3E",
        "/%3Cscript%3E",
        "/v1/responses/%3Cscript%3E",
    ):
        reply = send(server, f"GET {path} HTTP/1.1\r\nHost: test\r\n\r\n".encode())
        assert reply.headers["content-type"] == "application/json"
        assert reply.headers["x-content-type-options"] == "nosniff"
    reply = server.post(TEXT, {"prompt": "a", "model": EVIL})
    assert reply.status_code == 404
    assert json.loads(reply.content)["error"]["code"] == "model_not_found"
    assert reply.headers["content-type"] == "application/json"
