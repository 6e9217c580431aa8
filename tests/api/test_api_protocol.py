"""HTTP itself: old clients, offers of other protocols, methods, connections that live on or end."""

from __future__ import annotations

import contextlib
import json
import re
import threading
import time
from typing import Any

import openai
import pytest
from fake_engine import FakeEngine, Script, Server, wait_until
from test_api_raw import CHAT, HI, TEXT, Reply, get, post, send

from gqa_serve.api.http_protocol import MAX_PIPELINED
from gqa_serve.chat import HttpSource

STREAM = json.dumps({**HI, "stream": True}).encode()
WHOLE = json.dumps(HI).encode()
H2C = ("Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c", "HTTP2-Settings: AAEAAEAAAAIAAAAB")


def read_to_end(server: Server, data: bytes) -> tuple[bytes, bytes]:
    """Head and body of a response that ends with its connection."""
    received = b""
    with server.connect() as connection:
        connection.sendall(data)
        while more := connection.recv(65536):
            received += more
    head, _, body = received.partition(b"\r\n\r\n")
    return head.lower(), body


def as_1_0(data: bytes) -> bytes:
    return data.replace(b" HTTP/1.1\r\n", b" HTTP/1.0\r\n", 1)


# --- HTTP/1.0 ----------------------------------------------------------------------------------------------


def test_a_stream_to_an_old_client_ends_with_its_connection(server: Server) -> None:
    head, body = read_to_end(server, as_1_0(post(CHAT, STREAM)))
    assert head.startswith(b"http/1.1 200")
    assert b"transfer-encoding" not in head
    assert b"content-length" not in head
    assert re.findall(rb"\r\nconnection: (.*)", head) == [b"close"]
    assert body.startswith(b"data: {")
    assert body.endswith(b"data: [DONE]\n\n")
    texts = [json.loads(event)["choices"][0]["delta"] for event in re.findall(rb"data: (\{.*)\n\n", body)]
    assert "".join(delta.get("content", "") for delta in texts) == "Hello world"


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (post(CHAT, WHOLE), 200),
        (post(CHAT, b"{"), 400),
        (get("/nowhere"), 404),
        (get("/health", "HEAD"), 200),
    ],
)
def test_a_whole_answer_to_an_old_client_has_its_length(server: Server, data: bytes, status: int) -> None:
    head, body = read_to_end(server, as_1_0(data))
    assert head.startswith(b"http/1.1 %d " % status)
    length = re.search(rb"content-length: (\d+)", head)
    assert length is not None
    assert len(body) == (0 if data.startswith(b"HEAD") else int(length[1]))
    assert b"transfer-encoding" not in head


def test_an_old_client_that_leaves(server: Server, engine: FakeEngine) -> None:
    engine.script = lambda request: Script(["a"] * 50, hold_at=1)
    with server.connect() as connection:
        connection.sendall(as_1_0(post(CHAT, STREAM)))
        assert connection.recv(4096)
    wait_until(lambda: engine.ends() == ["abort"])


# --- offers of other protocols -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "headers", [H2C, ("Connection: Upgrade", "Upgrade: websocket", "Sec-WebSocket-Version: 13")]
)
@pytest.mark.parametrize("cut", [0, 10, len(WHOLE), len(WHOLE) + 20, 10_000])
def test_an_offer_to_upgrade_is_declined_and_the_body_read(
    server: Server, headers: tuple[str, ...], cut: int, caplog: pytest.LogCaptureFixture
) -> None:
    """Java's HttpClient offers h2c with its first request, body and all; `cut` bytes come a little later."""
    offered = post(CHAT, WHOLE, *headers)
    with server.connect() as connection, connection.makefile("rb") as stream:
        for _ in range(2):
            connection.sendall(offered[: -cut or None])
            time.sleep(0.02)
            connection.sendall(offered[len(offered[: -cut or None]) :])
            reply = Reply(stream)
            assert reply.status == 200
            assert "upgrade" not in reply.headers
        connection.sendall(post(TEXT, b'{"prompt": "p"}') + post(CHAT, STREAM, *H2C) + get("/version"))
        assert [Reply(stream).status for _ in range(3)] == [200, 200, 200]
    assert "websocket" not in caplog.text.lower()


def test_a_chunked_body_after_an_offer_to_upgrade(server: Server) -> None:
    body = b"%x\r\n%s\r\n0\r\n\r\n" % (len(WHOLE), WHOLE)
    assert send(server, post(CHAT, body, *H2C, "Transfer-Encoding: chunked")).status == 200


def test_an_offer_of_an_old_client_is_answered_as_to_an_old_client(server: Server) -> None:
    head, body = read_to_end(server, as_1_0(post(CHAT, STREAM, *H2C)))
    assert b"transfer-encoding" not in head
    assert body.endswith(b"data: [DONE]\n\n")


@pytest.mark.parametrize("value", ["Upgrade, close", "close,Upgrade", "Upgrade\r\nConnection: Close"])
def test_an_offer_to_upgrade_may_ask_for_the_end_of_the_connection(server: Server, value: str) -> None:
    head, body = read_to_end(server, post(CHAT, WHOLE, f"Connection: {value}", "Upgrade: h2c"))
    assert b"\r\nconnection: close" in head
    assert json.loads(body)["choices"]


def test_any_number_of_offers_in_one_read(server: Server) -> None:
    """Each is parsed anew; as many as a connection may have unanswered are answered."""
    count = MAX_PIPELINED
    offers = b"GET /version HTTP/1.1\r\nConnection:Upgrade\r\nUpgrade:x\r\n\r\n" * count
    with server.connect() as connection, connection.makefile("rb") as stream:
        connection.sendall(offers)
        assert [Reply(stream).status for _ in range(count)] == [200] * count


@pytest.mark.parametrize(
    "rest",
    [b"Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n", b"Transfer-Encoding: chunked\r\n\r\nno size\r\n"],
)
def test_a_body_that_is_no_http_gets_an_answer(server: Server, engine: FakeEngine, rest: bytes) -> None:
    head, body = read_to_end(server, f"POST {CHAT} HTTP/1.1\r\nHost: x\r\n".encode() + rest)
    assert head.startswith(b"http/1.1 400 ")
    assert json.loads(body)["error"]["code"] == "invalid_http"
    assert not engine.requests


# --- methods -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/health", "/ready", "/version", "/v1/models", "/v1/models/fake/model"])
def test_head_is_get_without_the_body(server: Server, path: str) -> None:
    whole = send(server, get(path))
    head, body = read_to_end(server, get(path, "HEAD").replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"))
    assert head.startswith(b"http/1.1 200")
    assert b"content-length: %d" % len(whole.body) in head
    assert body == b""


@pytest.mark.parametrize("method", ["HEAD", "OPTIONS", "TRACE", "PUT", "PATCH", "CONNECT", "QUERY"])
def test_methods_that_a_route_does_not_have(server: Server, method: str) -> None:
    close = b"\r\nConnection: close\r\n\r\n"
    head, body = read_to_end(server, get(CHAT, method).replace(b"\r\n\r\n", close))
    assert head.startswith(b"http/1.1 405 ")
    assert b"\r\nallow: post\r\n" in head
    if method == "HEAD":
        assert body == b""
    else:
        assert json.loads(body)["error"]["code"] == "method_not_allowed"


# --- connections -------------------------------------------------------------------------------------------

ERRORS: list[tuple[bytes, int]] = [
    (post(CHAT, b"{"), 400),
    (post(CHAT, b"\xff"), 400),
    (post(CHAT, json.dumps({**HI, "model": "x"}).encode()), 404),
    (get("/nowhere"), 404),
    (get(CHAT), 405),
    (post("/health", b"{}"), 405),
    (post("/nowhere", b"x" * 200_000), 404),  # with a body that nobody reads
    (get(CHAT, "HEAD"), 405),
]


@pytest.mark.parametrize(("data", "status"), ERRORS)
def test_a_connection_lives_on_after_an_error(server: Server, data: bytes, status: int) -> None:
    with server.connect() as connection, connection.makefile("rb") as stream:
        for _ in range(2):
            connection.sendall(data)
            assert int(stream.peek().split()[1]) == status
            if data.startswith(b"HEAD"):
                while stream.readline().strip():
                    pass
            else:
                reply = Reply(stream)
                assert reply.error["message"]
                assert "connection" not in reply.headers
        connection.sendall(post(CHAT, STREAM))
        assert Reply(stream).body.endswith(b"data: [DONE]\n\n")


def test_a_connection_lives_on_after_a_stream_that_failed(server: Server, engine: FakeEngine) -> None:
    engine.script = lambda request: Script(["a"], finish="error", error="It broke.")
    with server.connect() as connection, connection.makefile("rb") as stream:
        for _ in range(2):
            connection.sendall(post(CHAT, STREAM))
            assert Reply(stream).body.endswith(b"data: [DONE]\n\n")
        connection.sendall(post(CHAT, WHOLE))
        assert Reply(stream).status == 500
        connection.sendall(get("/version"))
        assert Reply(stream).status == 200


def test_a_stream_says_once_that_its_connection_closes(server: Server) -> None:
    head, body = read_to_end(server, post(CHAT, STREAM, "Connection: close"))
    assert re.findall(rb"\r\nconnection: (.*)\r\n", head + b"\r\n") == [b"close"]
    assert body.endswith(b"0\r\n\r\n")


def test_a_client_that_leaves_between_pipelined_requests(server: Server, engine: FakeEngine) -> None:
    engine.script = lambda request: Script(["a"] * 50, hold_at=1)
    with server.connect() as connection:
        connection.sendall(post(CHAT, WHOLE) + post(CHAT, STREAM))
        wait_until(lambda: len(engine.streams) == 1)
    wait_until(lambda: engine.num_running == 0)
    assert send(server, get("/health")).status == 200


@pytest.mark.parametrize("part", [1, 30, 80])
def test_a_client_that_leaves_in_the_head(server: Server, part: int) -> None:
    with server.connect() as connection:
        connection.sendall(post(CHAT, WHOLE)[:part])
    assert send(server, get("/health")).status == 200


def test_a_head_without_an_end_is_cut(server: Server) -> None:
    """One that has ended is answered, whatever its size: nothing is kept of it."""
    for start in (
        b"GET /health HTTP/1.1\r\nX: ",
        b"GET /" + b"x" * 50_000,
        b"GET /health HTTP/1.1\r\nHost: t",
    ):
        with server.connect() as connection, connection.makefile("rb") as stream:
            connection.sendall(start)
            with contextlib.suppress(ConnectionError):
                for _ in range(100):
                    connection.sendall(b"\r\nx: y" * 1000 if start.endswith(b"t") else b"x" * 5000)
                    time.sleep(0.001)
            reply = Reply(stream)
            assert (reply.status, reply.error["code"]) == (431, "head_too_large")
            assert reply.headers["connection"] == "close"
    assert (
        send(server, get("/health").replace(b"\r\n\r\n", b"\r\nx: " + b"y" * 8000 + b"\r\n\r\n")).status
        == 200
    )


def test_bodies_are_not_taken_for_heads(server: Server) -> None:
    large = post(CHAT, json.dumps({**HI, "user": "x" * 200_000}).encode())
    with server.connect() as connection, connection.makefile("rb") as stream:
        connection.sendall((large + large + get("/health"))[:-10])
        time.sleep(0.05)
        connection.sendall(get("/health")[-10:])
        assert [Reply(stream).status for _ in range(3)] == [200, 200, 200]


def test_errors_are_small_whatever_was_sent(server: Server) -> None:
    long = "x" * 100_000
    requests: list[tuple[str, Any]] = [
        (CHAT, {**HI, long: float(1)}),
        (CHAT, {**HI, "tools": long}),
        (CHAT, {**HI, "stop": [long] * 65}),
        (CHAT, {**HI, "messages": [{"role": "user", "content": {long: 1}}]}),
        (CHAT, {**HI, "messages": [{"role": long} for _ in range(1000)]}),
        (TEXT, {"prompt": {long: long}}),
        ("/" + long[:60_000], {}),
        (CHAT + "?" + long[:60_000], {}),
    ]
    for path, body in requests:
        reply = send(server, post(path, json.dumps(body).encode()))
        assert sum(len(name) + len(value) for name, value in reply.headers.items()) < 1000
        if reply.status != 200:  # an unknown field is ignored
            assert reply.status < 500
            assert reply.error["message"]


def test_clients_read_over_keep_alive_comments(
    server: Server, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gqa_serve.api.serving.FIRST_TOKEN_PATIENCE_S", 0.01)
    monkeypatch.setattr("gqa_serve.api.serving.PING_INTERVAL_S", 0.01)
    engine.script = lambda request: Script(["Hel", "lo"], hold_at=1)
    threading.Timer(0.2, lambda: engine.release.set()).start()
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="x", max_retries=0) as client:
        chunks = list(client.chat.completions.create(**HI, stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "Hello"
    engine.script = lambda request: Script(["Hel", "lo"], hold_at=1)
    engine.release.clear()
    threading.Timer(0.2, lambda: engine.release.set()).start()
    source = HttpSource(server.url, {})
    with contextlib.closing(source):
        assert "".join(source.stream([{"role": "user", "content": "Hi"}])) == "Hello"
    engine.release.clear()
    threading.Timer(0.2, lambda: engine.release.set()).start()
    assert send(server, post(CHAT, STREAM)).body.count(b": keep-alive\n\n") > 2


# --- probes ------------------------------------------------------------------------------------------------


def test_ping_is_health(server: Server, engine: FakeEngine) -> None:
    assert send(server, get("/ping")).body == send(server, get("/health")).body
    engine.state = "failed"
    assert send(server, get("/ping")).status == send(server, get("/health")).status == 503


def test_load_counts_what_is_under_way(server: Server, engine: FakeEngine) -> None:
    assert json.loads(send(server, get("/load")).body) == {"server_load": 0}
    engine.script = lambda request: Script(hold_at=0)
    with server.connect() as connection:
        connection.sendall(post(CHAT, json.dumps({**HI, "n": 3}).encode()))
        wait_until(lambda: json.loads(send(server, get("/load")).body) == {"server_load": 3})
    wait_until(lambda: json.loads(send(server, get("/load")).body) == {"server_load": 0})
