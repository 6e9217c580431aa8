"""Signals at every moment of a server's life: what is told to whom, the port, the exit status, no orphans."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

import httpx2
import psutil
import pytest
from demo_server import RunningServer, running

ENDLESS = {"model": "demo", "prompt": "x", "max_tokens": 8000, "ignore_eos": True}


def eventually(condition: Callable[[], bool], timeout_s: float = 60) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.05)


def address(server: RunningServer) -> tuple[str, int]:
    parts = urlsplit(server.url)
    assert parts.hostname
    assert parts.port
    return parts.hostname, parts.port


def stream(
    server: RunningServer, **fields: Any
) -> tuple[http.client.HTTPConnection, http.client.HTTPResponse]:
    """A stream whose first event has come."""
    connection = http.client.HTTPConnection(*address(server), timeout=300)
    body = json.dumps({**ENDLESS, "stream": True, **fields})
    connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
    response = connection.getresponse()
    assert response.readline().startswith(b"data: ")
    return connection, response


def test_a_draining_server_answers_503_and_then_frees_its_port() -> None:
    with running("--drain-timeout", "600") as server:
        idle = http.client.HTTPConnection(*address(server), timeout=120)
        idle.request("GET", "/health")
        assert idle.getresponse().read()
        half = socket.create_connection(address(server), timeout=120)
        half.sendall(b"GET /ready HTTP/1.1\r\nHost: localhost\r\n")
        connection, response = stream(server, max_tokens=400)
        engine = server.engine
        server.process.send_signal(signal.SIGTERM)
        server.wait_for("Stopping")
        assert idle.sock.recv(1) == b""  # an idle connection is closed
        idle.close()
        refused = httpx2.post(f"{server.url}/v1/completions", json=ENDLESS)
        assert refused.status_code == 503
        assert int(refused.headers["retry-after"]) >= 1
        assert refused.headers["connection"] == "close"
        assert refused.json()["error"]["code"] == "engine_unavailable"
        assert httpx2.get(f"{server.url}/ready").status_code == 503
        assert httpx2.get(f"{server.url}/health").status_code == 200
        half.sendall(b"\r\n")  # one that has begun to ask is still answered
        assert half.recv(100).startswith(b"HTTP/1.1 503")
        half.close()
        lines = response.read().splitlines()
        assert lines[-2] == b"data: [DONE]"
        last = json.loads(lines[-4].removeprefix(b"data: "))
        assert last["choices"][0]["finish_reason"] == "length"
        connection.close()
        assert server.process.wait(timeout=300) == 0
        assert not engine.is_running()
        with socket.socket() as again:
            again.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            again.bind(address(server))
            again.listen()
        assert "Traceback" not in "".join(server.lines)


def test_a_second_signal_ends_streams_with_an_error_and_the_engine() -> None:
    with running("--drain-timeout", "300") as server:
        connection, response = stream(server)
        engine = server.engine
        server.process.send_signal(signal.SIGINT)
        server.wait_for("Stopping")
        server.process.send_signal(signal.SIGTERM)
        lines = response.read().splitlines()
        connection.close()
        assert b"engine_unavailable" in lines[-4]
        assert server.process.wait(timeout=120) == 0  # not the 300 s
        assert not engine.is_running()


@pytest.mark.parametrize("delay_s", [0.0, 1.2])
def test_a_signal_while_the_engine_restarts(delay_s: float) -> None:
    """In the back-off before it, and while its process starts or loads the model."""
    with running() as server:
        server.engine.kill()
        eventually(lambda: httpx2.get(f"{server.url}/ready").status_code == 503)
        time.sleep(delay_s)
        api = psutil.Process(server.process.pid)
        seen = set(api.children())
        assert server.stop() == 0
        psutil.wait_procs(seen, timeout=60)
        assert not any(child.is_running() for child in seen)
        group = [each for each in psutil.process_iter() if _group(each) == server.process.pid]
        assert group == []  # started by it or not seen by us
        assert "Traceback" not in "".join(server.lines)


def _group(process: psutil.Process) -> int | None:
    try:
        return os.getpgid(process.pid)
    except ProcessLookupError:
        return None


def test_a_signal_with_slow_and_silent_clients_does_not_wait_for_them() -> None:
    """Nor for a client that reads nothing of a stream, nor for one that is half-way through a body."""
    with running("--drain-timeout", "1", "--read-timeout", "600", "--send-timeout", "600") as server:
        silent = socket.create_connection(address(server), timeout=120)
        sending = socket.create_connection(address(server), timeout=120)
        sending.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\n{")
        connection, _ = stream(server, logprobs=5)
        done = threading.Event()
        threading.Timer(110, lambda: done.is_set() or server.process.kill()).start()
        assert server.stop() == 0
        done.set()
        for each in (silent, sending, connection):
            each.close()
