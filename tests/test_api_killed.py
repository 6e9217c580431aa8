"""The API process is killed, and cannot tell its engine to stop: that ends by itself, loading, idle or in a
step, and another server starts on the same port at once.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable

import httpx2
import psutil
from demo_server import RunningServer, running

QUESTION = {"model": "demo", "prompt": "The sea", "max_tokens": 4, "temperature": 0}
ENDS_WITHIN_S = 60


def kill(server: RunningServer) -> None:
    """SIGKILL to the API process, and proof that the engine process is gone soon after."""
    engine = server.engine
    server.process.kill()
    server.process.wait()
    engine.wait(ENDS_WITHIN_S)  # raises if it stays
    assert not engine.is_running()


def while_loading(server: RunningServer) -> None:
    server.wait_for("Loading")
    deadline = time.monotonic() + ENDS_WITHIN_S
    while not psutil.Process(server.process.pid).children():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def while_idle(server: RunningServer) -> None:
    assert httpx2.post(f"{server.ready().url}/v1/completions", json=QUESTION, timeout=60).status_code == 200


def while_computing(server: RunningServer) -> None:
    body = {**QUESTION, "max_tokens": 1500, "ignore_eos": True, "stream": True}
    with httpx2.stream("POST", f"{server.ready().url}/v1/completions", json=body, timeout=60) as stream:
        lines = stream.iter_lines()
        assert next(lines)
        kill(server)


def test_the_engine_ends_and_the_port_is_free_again() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    points: list[Callable[[RunningServer], None]] = [while_loading, while_idle, while_computing]
    for reach in points:
        with running("--port", port, "--log-level", "info", wait=False) as server:
            try:
                reach(server)
            except httpx2.RemoteProtocolError:
                assert reach is while_computing  # the stream was cut with its server
            if server.process.poll() is None:
                kill(server)
    with running("--port", port) as server:
        answer = httpx2.post(f"{server.url}/v1/completions", json=QUESTION, timeout=60)
        assert answer.json()["usage"]["completion_tokens"] == 4
