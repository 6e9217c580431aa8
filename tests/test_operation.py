"""What docs/operation.md promises of a server in trouble, of the real one."""

from __future__ import annotations

import fcntl
import os
import queue
import re
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import openai
import psutil
import pytest
from demo_model import demo_path
from demo_server import START_S, RunningServer, running

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
ANSWER = "The capital of France is Paris."
BODY = {"model": "demo", "messages": QUESTION, "temperature": 0}
SCHEMA = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object"}, "strict": False}}


def eventually(condition: Callable[[], bool], timeout_s: float = 120) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.05)


def ask(url: str, **more: Any) -> httpx2.Response:
    return httpx2.post(f"{url}/v1/chat/completions", json={**BODY, **more}, timeout=120)


def answers(url: str) -> bool:
    return ask(url).json()["choices"][0]["message"]["content"] == ANSWER


def is_idle(url: str) -> bool:
    """Whether every gauge is back at 0."""
    metrics = httpx2.get(f"{url}/metrics").text
    gauges = re.findall(r"^gqa_serve_num_requests_(?:running|waiting)\S* (\S+)$", metrics, re.MULTILINE)
    assert len(gauges) == 2
    load = httpx2.get(f"{url}/load").json()["server_load"]
    return load == 0 and all(float(value) == 0 for value in gauges)


@contextmanager
def endless_stream(server: RunningServer) -> Iterator[Iterator[object]]:
    """A stream that has begun, read by whoever wants to."""
    with server.client() as client:
        stream = client.chat.completions.create(
            model="demo", messages=QUESTION, max_tokens=4000, stream=True, extra_body={"ignore_eos": True}
        )
        chunks = iter(stream)
        next(chunks)
        try:
            yield chunks
        finally:
            stream.close()


def test_waiting_too_long_full_queues_and_a_hung_engine() -> None:
    flags = ("--max-num-seqs", "1", "--queue-timeout", "5", "--max-waiting-tokens", "10")
    with running(*flags, "--engine-timeout", "10") as server:
        assert answers(server.url)
        with endless_stream(server):
            waiting: list[httpx2.Response] = []
            # Both choices wait for their grammar, then for a place.
            more = {"n": 2, "response_format": SCHEMA}
            thread = threading.Thread(target=lambda: waiting.append(ask(server.url, **more)))
            thread.start()
            eventually(lambda: httpx2.get(f"{server.url}/load").json()["server_load"] == 3)
            full = ask(server.url)
            assert (full.status_code, full.json()["error"]["code"]) == (429, "queue_full")
            assert 1 <= int(full.headers["retry-after"]) <= 60
            thread.join()
            (late,) = waiting
            assert (late.status_code, late.json()["error"]["code"]) == (503, "queue_timeout")
            assert 1 <= int(late.headers["retry-after"]) <= 60
        eventually(lambda: is_idle(server.url))
        assert answers(server.url)
        with endless_stream(server) as chunks:
            server.engine.suspend()
            with pytest.raises(openai.APIError, match="hung"):
                for _ in chunks:
                    pass
        eventually(lambda: httpx2.get(f"{server.url}/ready").status_code == 200)
        assert is_idle(server.url)
        assert answers(server.url)
        assert server.stop() == 0
    assert any("Killing it" in line for line in server.lines)


def test_a_model_that_vanishes_and_comes_back(tmp_path: Path) -> None:
    model = tmp_path / "model.gguf"
    model.symlink_to(demo_path())
    with running("--model", str(model), "--served-model-name", "demo") as server:
        assert answers(server.url)
        with endless_stream(server) as chunks:
            model.unlink()
            server.engine.kill()
            with pytest.raises(openai.APIError, match="died"):
                for _ in chunks:
                    pass
        eventually(lambda: any("could not be restarted" in line for line in server.lines))
        assert any(str(model) in line for line in server.lines if "could not be restarted" in line)
        assert httpx2.get(f"{server.url}/ready").status_code == 503
        refused = ask(server.url)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "engine_unavailable")
        assert int(refused.headers["retry-after"]) >= 1
        assert is_idle(server.url)
        model.symlink_to(demo_path())
        eventually(lambda: httpx2.get(f"{server.url}/ready").status_code == 200)
        assert answers(server.url)
        eventually(lambda: is_idle(server.url))
        assert server.stop() == 0


@contextmanager
def server_with(stderr: int, limit_bytes: int) -> Iterator[tuple[str, psutil.Popen]]:
    """A server that logs much to `stderr`, and may write files of `limit_bytes` only: its url, and it."""
    demo_path()
    command = [sys.executable, "-m", "gqa_serve.cli", "--model", "demo", "--port", "0"]
    process = psutil.Popen(
        [*command, "--log-level", "debug", "--quantization", "none", "--kv-cache-memory", "256MiB"],
        stdout=subprocess.PIPE,
        stderr=stderr,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, limit_bytes)),
        start_new_session=True,
    )
    lines: queue.Queue[str] = queue.Queue()

    def read() -> None:
        with process.stdout as pipe:
            for line in pipe:
                lines.put(line)

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    try:
        ready = lines.get(timeout=START_S)
        yield ready.split()[1].removesuffix("/v1"), process
    finally:
        if process.poll() is None:
            children = process.children()
            process.kill()
            process.wait()
            psutil.wait_procs(children, timeout=30)
        reader.join(timeout=10)


def test_nobody_reads_standard_error_then_it_is_gone_and_no_file_can_be_written() -> None:
    """A limit on the size of files stands for a full disk."""
    read, write = os.pipe()
    fcntl.fcntl(write, fcntl.F_SETPIPE_SZ, 4096)  # a page: full after some lines
    with server_with(write, limit_bytes=100) as (url, process):
        os.close(write)
        for _ in range(30):
            assert ask(url, max_tokens=1).status_code == 200
        assert ask(url, response_format=SCHEMA, max_tokens=20).status_code == 200
        os.close(read)  # from now on writing is an error
        assert answers(url)
        (engine,) = process.children()
        engine.kill()
        eventually(lambda: httpx2.get(f"{url}/ready").status_code == 503)
        eventually(lambda: httpx2.get(f"{url}/ready").status_code == 200)
        assert answers(url)
        eventually(lambda: is_idle(url))
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
