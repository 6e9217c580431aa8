"""Connections: too many of them, too large bodies, and answers that come before a request is sent."""

from __future__ import annotations

import contextlib
import http.client
import json
import resource
import select
import shutil
import socket
import subprocess
import sys
import threading
from pathlib import Path

import httpx2
import openai
import pytest
from fake_engine import MODEL, FakeEngine, Script, Server, serving, wait_until
from test_api_raw import CHAT, HI, Reply, chat, get, post, send

from gqa_serve.api.body_budget import FREE_BYTES, BodiesTooLargeError, BodyBudget
from gqa_serve.api.connection_limits import OTHER_FILES, REFUSED_AT_ONCE, with_files_for
from gqa_serve.api.http_protocol import MAX_HEAD_BYTES

LARGE = 40 * 2**20  # far more than all socket buffers between two processes hold


# --- too large ---------------------------------------------------------------------------------------------


def test_a_client_that_waits_for_100_continue_gets_its_413_instead(server: Server) -> None:
    with server.connect() as connection, connection.makefile("rb") as stream:
        head = (
            f"POST {CHAT} HTTP/1.1\r\nHost: test\r\nExpect: 100-continue\r\nContent-Length: {LARGE}\r\n\r\n"
        )
        connection.sendall(head.encode())
        reply = Reply(stream)
        assert (reply.status, reply.error["code"]) == (413, "request_too_large")
        assert stream.read() == b""


def test_100_continue_comes_before_a_body_that_fits(server: Server) -> None:
    body = json.dumps(HI).encode()
    with server.connect() as connection, connection.makefile("rb") as stream:
        connection.sendall(post(CHAT, body, "Expect: 100-continue")[: -len(body)])
        assert stream.readline().startswith(b"HTTP/1.1 100")
        assert stream.readline() == b"\r\n"
        connection.sendall(body)
        assert Reply(stream).status == 200


def test_httpx_reads_the_413_of_a_body_it_was_still_sending(server: Server) -> None:
    body = b"x" * LARGE
    assert httpx2.post(server.url + CHAT, content=body).status_code == 413
    chunks = (body[start : start + 2**20] for start in range(0, LARGE, 2**20))
    assert httpx2.post(server.url + CHAT, content=chunks).json()["error"]["code"] == "request_too_large"


def test_openai_reads_the_413_of_a_body_it_was_still_sending(client: openai.OpenAI) -> None:
    with pytest.raises(openai.APIStatusError) as caught:
        client.chat.completions.create(
            model=MODEL, messages=[{"role": "user", "content": "x" * LARGE}], max_tokens=1
        )
    assert caught.value.status_code == 413


@pytest.mark.skipif(shutil.which("curl") is None, reason="no curl")
@pytest.mark.parametrize("header", ["Content-Type: application/json", "Transfer-Encoding: chunked"])
def test_curl_reads_the_413_of_a_body_it_was_still_sending(
    server: Server, tmp_path: Path, header: str
) -> None:
    file = tmp_path / "body"
    file.write_bytes(b"x" * LARGE)
    command = ["curl", "-s", "-H", header, "-H", "Expect:", "--data-binary", f"@{file}", server.url + CHAT]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert json.loads(result.stdout)["error"]["code"] == "request_too_large"


def test_urllib_reads_the_413_of_a_body_it_was_still_sending(server: Server) -> None:
    """Which sends all of it before it looks for an answer, as requests does."""
    connection = http.client.HTTPConnection(server.host, server.port, timeout=30)
    connection.request("POST", CHAT, body=b"x" * LARGE)
    assert connection.getresponse().status == 413
    connection.close()


def test_all_bodies_together_are_bounded(server: Server) -> None:
    """17 bodies of almost the largest size, none of them complete: the last is told to come back."""
    with serving(FakeEngine(), max_body_bytes=200_000) as small:
        held: list[socket.socket] = []
        try:
            for _ in range(17 + 8):
                connection = small.connect()
                held.append(connection)
                connection.sendall(post(CHAT, b"x" * 199_999)[:-1])
            reply = None
            for connection in held:
                connection.settimeout(0.2)
                try:
                    connection.recv(1, socket.MSG_PEEK)
                except TimeoutError:
                    continue
                with connection.makefile("rb") as stream:
                    reply = Reply(stream)
                    break
            assert reply is not None
            assert (reply.status, reply.error["code"]) == (503, "server_overloaded")
            assert int(reply.headers["retry-after"]) >= 1
            assert chat(small).status == 200  # a small one is always taken
        finally:
            for connection in held:
                connection.close()
        body = json.dumps({**HI, "user": "x" * 150_000}).encode()
        wait_until(lambda: send(small, post(CHAT, body)).status == 200)


def test_the_budget_is_given_back_whatever_happens() -> None:
    budget = BodyBudget(100_000)
    with contextlib.suppress(KeyError), budget.held() as held:
        held.grow(FREE_BYTES)
        assert budget.num_bytes == 0
        held.grow(FREE_BYTES + 10)
        held.grow(FREE_BYTES + 30)
        assert budget.num_bytes == 30
        raise KeyError
    assert budget.num_bytes == 0
    with budget.held() as held, pytest.raises(BodiesTooLargeError):
        held.grow(FREE_BYTES + 1_600_001)
    assert budget.num_bytes == 0


@pytest.mark.parametrize("end", [b"", b"\r\n\r\n"])
@pytest.mark.parametrize("size", [MAX_HEAD_BYTES, 200_000])
def test_a_large_head_is_refused_however_it_arrives(server: Server, size: int, end: bytes) -> None:
    """Complete or not, in one read or in many, on a connection that served a request before."""
    with server.connect() as connection, connection.makefile("rb") as stream:
        connection.sendall(get("/health"))
        assert Reply(stream).status == 200
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: test\r\nX-Large: " + b"x" * size + end)
        reply = Reply(stream)
        assert (reply.status, reply.error["code"]) == (431, "head_too_large")
        assert stream.read() == b""


def test_a_head_may_follow_a_large_body_at_once(server: Server) -> None:
    body = json.dumps({**HI, "user": "x" * 300_000}).encode()
    head = b"GET /health HTTP/1.1\r\nHost: test\r\nX: " + b"x" * (MAX_HEAD_BYTES - 1000) + b"\r\n\r\n"
    with server.connect() as connection, connection.makefile("rb") as stream:
        connection.sendall(post(CHAT, body) + head)
        assert [Reply(stream).status for _ in range(2)] == [200, 200]


# --- too many ----------------------------------------------------------------------------------------------


def test_a_newcomer_takes_the_place_of_the_longest_idle(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gqa_serve.api.http_protocol.IDLE_S", 0.0)
    engine = FakeEngine(lambda request: Script(hold_at=0))
    with (
        serving(engine, max_connections=3) as server,
        server.connect() as busy,
        server.connect() as second,
        server.connect() as first,
    ):
        for connection in (busy, first, second):
            connection.sendall(get("/health"))
            with connection.makefile("rb") as stream:
                assert Reply(stream).status == 200
        busy.sendall(post(CHAT, json.dumps(HI).encode()))
        wait_until(lambda: engine.num_running == 1)
        with server.connect() as newcomer, newcomer.makefile("rb") as stream:
            newcomer.sendall(get("/health"))
            assert Reply(stream).status == 200
            assert first.recv(1) == b""
            second.sendall(post(CHAT, json.dumps(HI).encode()))
            newcomer.sendall(post(CHAT, json.dumps(HI).encode()))
            wait_until(lambda: engine.num_running == 3)
            assert send(server, get("/health")).status == 503  # nobody is idle now
        engine.release.set()
        for connection in (busy, second):
            with connection.makefile("rb") as stream:
                assert Reply(stream).status == 200


def test_connections_beyond_the_limit_are_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gqa_serve.api.http_protocol.IDLE_S", 1e9)
    with serving(FakeEngine(), max_connections=2) as server:
        with server.connect() as first, server.connect() as second:
            for connection in (first, second):
                connection.sendall(get("/health"))
                with connection.makefile("rb") as stream:
                    assert Reply(stream).status == 200
            for request in (get("/health"), post(CHAT, b"x" * 5_000_000)):
                reply = send(server, request)
                assert (reply.status, reply.error["code"]) == (503, "too_many_connections")
                assert int(reply.headers["retry-after"]) >= 1
                assert reply.headers["connection"] == "close"
            with server.connect() as silent:
                assert silent.recv(1) == b""  # after a while, without a word
            first.sendall(get("/health"))
            with first.makefile("rb") as stream:
                assert Reply(stream).status == 200
        wait_until(lambda: send(server, get("/health")).status == 200)


def test_most_refused_connections_are_closed_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gqa_serve.api.http_protocol.REFUSED_AT_ONCE", 0)
    monkeypatch.setattr("gqa_serve.api.http_protocol.IDLE_S", 1e9)
    with serving(FakeEngine(), max_connections=1) as server, server.connect() as first:
        first.sendall(get("/health"))
        with first.makefile("rb") as stream:
            assert Reply(stream).status == 200
        with server.connect() as refused, refused.makefile("rb") as stream:
            assert Reply(stream).status == 503


def test_too_many_pipelined_requests_end_the_connection(server: Server, engine: FakeEngine) -> None:
    engine.script = lambda request: Script(hold_at=0)
    with server.connect() as connection:
        connection.sendall(post(CHAT, json.dumps(HI).encode()) + get("/health") * 100)
        assert connection.recv(1) == b""
    wait_until(lambda: engine.ends() == ["abort"])


def test_pipelined_requests_are_answered_in_order(server: Server) -> None:
    with server.connect() as connection, connection.makefile("rb") as stream:
        connection.sendall(get("/health") + get("/nothing") + get("/version") * 40)
        assert [Reply(stream).status for _ in range(42)] == [200, 404] + [200] * 40


@pytest.mark.parametrize(("hard", "expected"), [(100_000, 5000), (1000, 1000 - 384), (10, 1)])
def test_open_files_are_allowed_or_fewer_connections(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, hard: int, expected: int
) -> None:
    assert REFUSED_AT_ONCE + OTHER_FILES == 384
    limits = [(10, hard)]
    monkeypatch.setattr(resource, "getrlimit", lambda what: limits[-1])
    monkeypatch.setattr(resource, "setrlimit", lambda what, pair: limits.append(pair))
    assert with_files_for(5000) == expected
    assert limits[-1] == (min(5384, hard), hard)
    assert ("--max-connections 5000" in caplog.text) == (expected < 5000)


FEW_FILES = """
import resource, sys, time
sys.path[:0] = sys.argv[1:]
from fake_engine import FakeEngine, serving
from test_api_raw import get, send
with serving(FakeEngine()) as server:
    send(server, get("/health"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (60, 60))
    print(server.port, flush=True)
    sys.stdin.readline()
    before = time.process_time()
    time.sleep(2)
    print(time.process_time() - before, flush=True)
    sys.stdin.readline()
"""


def answers(server: Server) -> bool:
    """Whether it has a file for a connection again; until then it closes them unread."""
    with server.connect() as connection:
        try:
            connection.sendall(get("/health"))
            return connection.recv(12) == b"HTTP/1.1 200"
        except ConnectionError:
            return False


def test_running_out_of_files_neither_spins_nor_ends_the_server() -> None:
    """In a process of its own: a number that somebody else there takes is one that libuv keeps in reserve."""
    here = Path(__file__).parent
    command = [sys.executable, "-c", FEW_FILES, str(here), str(here.parent)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        server = Server(FakeEngine(), "127.0.0.1", int(process.stdout.readline()))
        held = [server.connect() for _ in range(80)]
        print("measure", file=process.stdin, flush=True)
        busy = float(process.stdout.readline())
        for one in held:
            one.close()
        wait_until(lambda: answers(server))
    assert process.returncode == 0
    assert busy < 1.0, "it spins: so much of two seconds"


# --- a burst -----------------------------------------------------------------------------------------------


def test_a_burst_is_refused_at_once_and_what_is_taken_finishes() -> None:
    """The engine makes no step until every refusal has been read."""
    engine = FakeEngine(lambda request: Script(hold_at=0))
    engine.capacity = 58  # 8 running, 50 waiting
    count, threads_count = 1000, 20
    refused: list[Reply] = []
    connections: list[socket.socket] = []
    lock = threading.Lock()
    data = post(CHAT, json.dumps(HI).encode())
    with serving(engine) as server:

        def burst() -> None:
            mine = []
            for _ in range(count // threads_count):
                connection = server.connect()
                connection.sendall(data)
                mine.append(connection)
            with lock:
                connections.extend(mine)

        threads = [threading.Thread(target=burst) for _ in range(threads_count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        wait_until(lambda: len(engine.requests) == 58)
        pending = {connection.fileno(): connection for connection in connections}
        poll = select.poll()
        for number in pending:
            poll.register(number, select.POLLIN)
        while len(refused) < count - 58:
            ready = poll.poll(90_000)
            assert ready, f"only {len(refused)} refusals came"
            for number, _ in ready:
                poll.unregister(number)
                with pending.pop(number) as connection, connection.makefile("rb") as stream:
                    refused.append(Reply(stream))
        assert {reply.status for reply in refused} == {429}
        assert all(int(reply.headers["retry-after"]) >= 1 for reply in refused)
        assert engine.ends() == [None] * 58
        engine.release.set()
        for connection in pending.values():
            connection.settimeout(90)
            with connection, connection.makefile("rb") as stream:
                assert Reply(stream).status == 200


@pytest.mark.parametrize("path", [CHAT, "/v1/completions", "/v1/responses", "/v1/messages", "/v1/embeddings"])
def test_a_full_queue_refuses_before_it_reads(server: Server, engine: FakeEngine, path: str) -> None:
    """A client that waits for 100 Continue never sends what nobody could take."""
    engine.capacity = 0
    body = b"{" + b" " * 100_000
    with server.connect() as connection, connection.makefile("rb") as stream:
        connection.sendall(post(path, body, "Expect: 100-continue")[: -len(body)])
        reply = Reply(stream)
        assert reply.status == 429
        assert reply.headers["retry-after"] == "3"
    assert send(server, post("/tokenize", b'{"prompt": "x"}')).status == 200
