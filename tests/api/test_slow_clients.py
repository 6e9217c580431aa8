"""Clients that send or read too slowly, and what they are told; the settings' times are made short."""

from __future__ import annotations

import json
import re
import socket
import threading
import time
from collections.abc import Iterator

import pytest
from fake_engine import FakeEngine, Script, Server, fake_info, serving, wait_until
from test_api_limits import refuses_data
from test_api_raw import CHAT, HI, Reply, get, post, send

from gqa_serve.api.outlet import Outlet

STREAM = post(CHAT, json.dumps({**HI, "stream": True}).encode())


@pytest.fixture(scope="module")
def impatient() -> Iterator[Server]:
    with serving(FakeEngine(), read_timeout=0.4) as server:
        yield server


def drip(connection: socket.socket, data: bytes, pause_s: float) -> None:
    """Send byte by byte until the other end has enough."""
    for byte in data:
        try:
            connection.sendall(bytes([byte]))
        except ConnectionError:
            return
        connection.settimeout(pause_s)
        try:
            connection.recv(1, socket.MSG_PEEK)
            return
        except TimeoutError:
            pass
        finally:
            connection.settimeout(90)
    raise AssertionError("the whole of it was read")


def read(connection: socket.socket) -> Reply:
    with connection.makefile("rb") as stream:
        reply = Reply(stream)
        assert stream.read() == b""  # and then the connection closes
    return reply


@pytest.mark.parametrize("data", [b"P", b"POST / HTTP/1.1\r\nHost: test\r\n", b"GET / HTTP/1.1\r\nX: xx"])
def test_half_a_head(impatient: Server, data: bytes) -> None:
    with impatient.connect() as connection:
        connection.sendall(data)
        reply = read(connection)
    assert (reply.status, reply.error["code"]) == (408, "read_timeout")
    assert reply.headers["connection"] == "close"
    assert "--read-timeout" in reply.error["message"]


def test_a_head_that_drips(impatient: Server) -> None:
    with impatient.connect() as connection:
        drip(connection, b"GET /health HTTP/1.1\r\n" + b"X: y\r\n" * 50, 0.05)
        assert read(connection).status == 408


@pytest.mark.parametrize("data", [b"", b"\r\n"])
def test_a_client_that_says_nothing(impatient: Server, data: bytes) -> None:
    """It asked for nothing, so it is answered nothing."""
    with impatient.connect() as connection:
        connection.sendall(data)
        assert connection.recv(1) == b""


@pytest.mark.parametrize("framing", ["Content-Length: 1000", "Transfer-Encoding: chunked"])
def test_half_a_body(impatient: Server, framing: str) -> None:
    with impatient.connect() as connection:
        connection.sendall(f"POST {CHAT} HTTP/1.1\r\nHost: test\r\n{framing}\r\n\r\n".encode() + b"5\r\n{")
        reply = read(connection)
    assert (reply.status, reply.error["code"]) == (408, "read_timeout")
    assert impatient.engine.num_running == 0


def test_a_body_that_drips(impatient: Server) -> None:
    with impatient.connect() as connection:
        connection.sendall(f"POST {CHAT} HTTP/1.1\r\nHost: test\r\nContent-Length: 1000\r\n\r\n".encode())
        drip(connection, b" " * 300, 0.05)
        assert read(connection).status == 408


def test_a_large_body_earns_its_time() -> None:
    """It takes longer than the read timeout, at more than 16 KiB/s."""
    body = json.dumps({**HI, "user": "x" * 160_000}).encode()
    with serving(FakeEngine(), read_timeout=1.0) as server, server.connect() as connection:
        started = time.monotonic()
        data = post(CHAT, body)
        step = len(data) // 8
        for start in range(0, len(data), step):
            connection.sendall(data[start : start + step])
            time.sleep(0.2)
        assert time.monotonic() - started > 1.0
        with connection.makefile("rb") as stream:
            assert Reply(stream).status == 200


def test_a_slow_answer_is_not_a_slow_client(impatient: Server) -> None:
    """Nor is half a pipelined head, or an empty line after a body, a reason to end the answer before it."""
    engine = impatient.engine
    for more in (b"", b"\r\n", b"GET /hea"):
        engine.reset(lambda request: Script(["a", "b"], hold_at=1))
        with impatient.connect() as connection:
            connection.sendall(STREAM + more)
            threading.Timer(1.0, engine.release.set).start()
            with connection.makefile("rb") as stream:
                assert Reply(stream).body.endswith(b"[DONE]\n\n")
                if more != b"GET /hea":
                    connection.sendall(get("/health"))
                assert Reply(stream).status == (408 if more == b"GET /hea" else 200)


def test_idle_between_requests_is_not_slow(impatient: Server) -> None:
    with impatient.connect() as connection, connection.makefile("rb") as stream:
        for _ in range(2):
            connection.sendall(get("/health"))
            assert Reply(stream).status == 200
            time.sleep(0.9)


def test_no_limit() -> None:
    with serving(FakeEngine(), read_timeout=0) as server, server.connect() as connection:
        time.sleep(0.3)
        data = get("/health")
        connection.sendall(data[:9])
        time.sleep(0.5)
        connection.sendall(data[9:])
        with connection.makefile("rb") as stream:
            assert Reply(stream).status == 200


# --- answers that nobody reads -----------------------------------------------------------------------------


def unread(server: Server, data: bytes) -> socket.socket:
    """A client that asks with `data` and has little room for the answer."""
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.connect((server.host, server.port))
    connection.sendall(data)
    return connection


def long_engine(**script: object) -> FakeEngine:
    engine = FakeEngine(lambda request: Script(["x" * 250] * 10, **script))  # type: ignore[arg-type]
    engine.model_info = fake_info(max_model_len=20_000)
    return engine


LONG = {**HI, "logprobs": True, "top_logprobs": 20}


def watch_buffers(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of connections' write buffers, after each time that one was written to."""
    sizes: list[int] = []

    def measure(self: Outlet, data: object) -> None:
        write(self, data)
        sizes.append(self.get_write_buffer_size())

    write = Outlet.write
    monkeypatch.setattr(Outlet, "write", measure)
    return sizes


@pytest.mark.parametrize("closes", [False, True])
def test_a_whole_answer_that_nobody_reads(closes: bool, caplog: pytest.LogCaptureFixture) -> None:
    """The engine is done with it long before; what is left is a socket and the bytes that wait for it."""
    more = ("Connection: close",) if closes else ()
    with serving(long_engine(), send_timeout=0.4) as server:
        with unread(server, post(CHAT, json.dumps(LONG).encode(), *more)) as connection:
            wait_until(lambda: server.engine.ends() == ["stop"])
            wait_until(lambda: "read nothing for 0.4 s" in caplog.text)
            wait_until(lambda: refuses_data(connection))
        assert send(server, get("/health")).status == 200


def test_pipelined_answers_that_nobody_reads(caplog: pytest.LogCaptureFixture) -> None:
    with serving(long_engine(), send_timeout=0.4) as server:
        with unread(server, post(CHAT, json.dumps({**LONG, "stream": True}).encode()) * 5) as connection:
            wait_until(lambda: "read nothing" in caplog.text)
            wait_until(lambda: refuses_data(connection))
        wait_until(lambda: server.engine.num_running == 0)
        assert len(server.engine.requests) < 5  # the others were not even begun


def test_a_slow_reader_gets_it_all() -> None:
    with serving(long_engine(), send_timeout=1.0) as server:
        data = b""
        with unread(server, post(CHAT, json.dumps(LONG).encode(), "Connection: close")) as connection:
            while more := connection.recv(65536):
                data += more
                if len(data) < 100_000:
                    time.sleep(0.05)
    head, _, body = data.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200")
    assert json.loads(body)["usage"]["completion_tokens"] == 2501


def test_one_who_reads_on_after_a_pause_gets_it_in_portions(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the engine made meanwhile is neither spelled nor buffered all at once."""
    sizes = watch_buffers(monkeypatch)
    engine = FakeEngine(lambda request: Script(["x" * 50] * 200))
    engine.model_info = fake_info(max_model_len=200_000)
    with serving(engine) as server:
        asked = json.dumps({**LONG, "stream": True}).encode()
        with unread(server, post(CHAT, asked, "Connection: close")) as connection:
            wait_until(lambda: engine.ends() == ["stop"])
            data = b"".join(iter(lambda: connection.recv(1 << 20), b""))
    assert data.count(b'"top_logprobs"') == 10_000
    assert b"data: [DONE]" in data
    assert 0 < max(sizes) < 2_000_000 < len(data)


def test_pings_keep_no_slow_reader(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr("gqa_serve.api.serving.PING_INTERVAL_S", 0.05)
    engine = long_engine(hold_at=9)
    with serving(engine, send_timeout=0.5) as server:
        with unread(server, post(CHAT, json.dumps({**LONG, "stream": True}).encode())) as connection:
            wait_until(lambda: "read nothing" in caplog.text)
            wait_until(lambda: refuses_data(connection))
        wait_until(lambda: engine.ends() == ["abort"])


def test_what_waits_for_a_slow_reader_is_bounded(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The write buffer stays near uvicorn's mark, whatever the engine generates."""
    sizes = watch_buffers(monkeypatch)
    engine = FakeEngine(lambda request: Script(["x" * 50] * 200))
    engine.model_info = fake_info(max_model_len=200_000)
    with serving(engine, send_timeout=3.0) as server:
        with unread(server, post(CHAT, json.dumps({**LONG, "stream": True}).encode())) as connection:
            wait_until(lambda: "read nothing" in caplog.text)
            wait_until(lambda: refuses_data(connection))
        wait_until(lambda: engine.num_running == 0)
    assert 0 < max(sizes) < 1_000_000


def test_the_operator_sees_them(caplog: pytest.LogCaptureFixture) -> None:
    def count(name: str, reason: str) -> float:
        text = send(server, get("/metrics")).body.decode()
        values = re.findall(rf'^gqa_serve_{name}_total\{{.*reason="{reason}".*\}} (\S+)$', text, re.MULTILINE)
        return sum(map(float, values))

    with serving(long_engine(hold_at=9), read_timeout=0.3, send_timeout=0.3, max_connections=3) as server:
        with server.connect() as connection:
            connection.sendall(b"GET /half")
            assert read(connection).status == 408
        with unread(server, post(CHAT, json.dumps({**LONG, "stream": True}).encode())):
            wait_until(lambda: "read nothing" in caplog.text)
        wait_until(lambda: count("aborts", "slow_reader") == 1)
        assert count("refusals", "timeout") == 1
        held = [server.connect() for _ in range(3)]
        with server.connect() as refused:
            refused.sendall(get("/health"))
            assert read(refused).status == 503
        for connection in held:
            connection.close()
        wait_until(lambda: send(server, get("/metrics")).status == 200)
        assert count("refusals", "connections") >= 1
        assert count("aborts", "client_left") == 0
