"""A client that leaves, at every point of its request's life, by FIN, by RST and by half-closing.

The real application over a real engine process with the demo model, in this process, so that tests can look
at the engine's requests and blocks. After each: the engine holds nothing of the one who left, a stream beside
it goes on with the text it would have had alone, no block is lost, and the server answers.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import struct
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from demo_model import demo_path

from gqa_serve.api.app import create_app
from gqa_serve.api.connection_limits import ConnectionLimits
from gqa_serve.api.http_protocol import http_protocol
from gqa_serve.config import EngineConfig, ServerConfig
from gqa_serve.engine.chat_template_files import load_chat_template
from gqa_serve.engine.client import AsyncEngine
from gqa_serve.engine.metrics import BlockState, EngineSnapshot
from gqa_serve.engine.tokenizer import load_tokenizer

PATIENCE_S = 90
WITNESS = {"model": "demo", "prompt": "The sea", "temperature": 0, "max_tokens": 1500, "ignore_eos": True}
ENDLESS = {**WITNESS, "prompt": "The moon", "stream": True}
WORDS = " ".join(str(number) for number in range(100, 350))  # about 1,000 tokens


class Live:
    """The server's address, and its engine from the outside of the event loop it lives in."""

    def __init__(self, engine: AsyncEngine) -> None:
        self.engine = engine
        self.loop: asyncio.AbstractEventLoop | None = None
        self.port = 0

    def snapshot(self) -> EngineSnapshot:
        assert self.loop is not None
        asked: Future[EngineSnapshot] = asyncio.run_coroutine_threadsafe(self.engine.snapshot(), self.loop)
        return asked.result(PATIENCE_S)

    def states(self) -> list[str]:
        return [request.state for request in self.snapshot().requests]

    def until(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while not condition():
            assert time.monotonic() < deadline, f"it did not come about: {self.snapshot().requests}"
            time.sleep(0.01)

    def until_idle(self) -> None:
        """Nothing is under way on either side, and every block is free."""
        self.until(lambda: self.engine.num_requests == 0 and self.states() == [])
        assert set(self.snapshot().blocks) <= {BlockState.FREE, BlockState.CACHED}
        status, body = Peer(self).request("GET", "/load").answer()
        assert (status, json.loads(body)) == (200, {"server_load": 0})


@pytest.fixture(scope="module")
def live() -> Iterator[Live]:
    path = demo_path()
    config = EngineConfig(
        model="demo",
        quantization="none",
        kv_cache_memory=256 * 2**20,
        max_num_seqs=2,
        max_num_batched_tokens=128,
        max_model_len=2048,
    )
    engine = AsyncEngine(path, config)
    engine.command = (sys.executable, str(Path(__file__).with_name("slow_grammar_process.py")))
    running = Live(engine)

    @contextlib.asynccontextmanager
    async def lifespan(app: object) -> AsyncIterator[None]:
        running.loop = asyncio.get_running_loop()
        await engine.start()
        yield
        await engine.stop()

    tokenizer = load_tokenizer(path)
    template = load_chat_template(path, None, tokenizer.special_texts)
    limits = ConnectionLimits()
    app = create_app(engine, tokenizer, template, ServerConfig(), lifespan=lifespan, limits=limits)
    listener = socket.create_server(("127.0.0.1", 0))
    running.port = listener.getsockname()[1]
    protocol = http_protocol(limits)
    options = uvicorn.Config(app, log_config=None, ws="none", lifespan="on", http=protocol)
    server = uvicorn.Server(options)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    deadline = time.monotonic() + PATIENCE_S
    while not server.started:
        assert thread.is_alive(), "the server did not start"
        assert time.monotonic() < deadline
        time.sleep(0.05)
    yield running
    server.should_exit = True
    thread.join(PATIENCE_S)
    listener.close()


class Peer:
    """A client that does with its connection what it likes."""

    def __init__(self, live: Live, receive_bytes: int | None = None) -> None:
        self.socket = socket.socket()
        if receive_bytes is not None:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
        self.socket.settimeout(PATIENCE_S)
        self.socket.connect(("127.0.0.1", live.port))
        self.seen = b""
        self.leaves_after: Peer | None = None

    def send(self, data: bytes) -> Peer:
        self.socket.sendall(data)
        return self

    def request(self, method: str, path: str, body: Any = None) -> Peer:
        return self.send(encode(method, path, body))

    def read_until(self, mark: bytes, count: int = 1) -> Peer:
        while self.seen.count(mark) < count:
            data = self.socket.recv(65536)
            assert data, f"the connection ended: {self.seen[-300:]!r}"
            self.seen += data
        return self

    def answer(self) -> tuple[int, bytes]:
        """Status and body, of an answer with a known length."""
        self.read_until(b"\r\n\r\n")
        head, _, body = self.seen.partition(b"\r\n\r\n")
        length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
        while len(body) < length:
            body += self.socket.recv(65536)
        self.socket.close()
        return int(head.split()[1]), body

    def leave(self, by: str) -> None:
        """By closing, by a reset, or by saying that nothing more will come, and waiting for the server."""
        if by == "rst":
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        elif by == "half":
            self.socket.shutdown(socket.SHUT_WR)
            with contextlib.suppress(ConnectionError):
                while self.socket.recv(65536):
                    pass
        self.socket.close()


def encode(method: str, path: str, body: Any = None) -> bytes:
    data = b"" if body is None else json.dumps(body).encode()
    head = f"{method} {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data


def completion(body: dict[str, Any]) -> bytes:
    return encode("POST", "/v1/completions", body)


def stream_text(seen: bytes) -> str:
    """The text of the whole events in what a stream sent so far."""
    lines = [line for line in seen.split(b"\n")[:-1] if line.startswith(b'data: {"id"')]
    return "".join(choice["text"] for line in lines for choice in json.loads(line[6:])["choices"])


@pytest.fixture(scope="module")
def witness_text(live: Live) -> str:
    """What the stream beside says when it is alone."""
    status, body = Peer(live).send(completion({**WITNESS, "max_tokens": 60})).answer()
    assert status == 200
    text: str = json.loads(body)["choices"][0]["text"]
    return text


# Each brings a client to its point.
def connected(live: Live) -> Peer:
    return Peer(live)


def in_the_head(live: Live) -> Peer:
    return Peer(live).send(completion(ENDLESS)[:40])


def in_the_body(live: Live) -> Peer:
    return Peer(live).send(completion(ENDLESS)[:-10])


def waiting(live: Live) -> Peer:
    other = Peer(live).send(completion({**ENDLESS, "prompt": "Rain"})).read_until(b"data: ")
    peer = Peer(live).send(completion(ENDLESS))
    peer.leaves_after = other
    live.until(lambda: live.states() == ["running", "running", "waiting"])
    return peer


def compiling(live: Live) -> Peer:
    peer = Peer(live).send(completion({**ENDLESS, "guided_regex": f"slow {time.monotonic_ns()}"}))
    live.until(lambda: "preparing" in live.states())
    return peer


def before_the_first_token(live: Live) -> Peer:
    peer = Peer(live).send(completion({**ENDLESS, "prompt": f"{time.monotonic_ns()} {WORDS}"}))
    live.until(lambda: len(live.states()) == 2)
    assert live.snapshot().requests[-1].num_output_tokens == 0
    return peer


def whole_before_the_end(live: Live) -> Peer:
    peer = Peer(live).send(completion({**ENDLESS, "stream": False}))
    live.until(lambda: any(request.num_output_tokens > 3 for request in live.snapshot().requests[1:]))
    return peer


def in_the_stream(live: Live) -> Peer:
    return Peer(live).send(completion(ENDLESS)).read_until(b"data: ", 3)


def with_many_choices(live: Live) -> Peer:
    body = {**ENDLESS, "prompt": ["Snow", "Hail"], "n": 2, "temperature": 1, "seed": 1}
    return Peer(live).send(completion(body)).read_until(b"data: ")


def while_the_body_is_written(live: Live) -> Peer:
    scored = {"prompt": WORDS[:1000], "max_tokens": 1, "prompt_logprobs": 20}
    peer = Peer(live, receive_bytes=2048).send(completion({**WITNESS, **scored}))
    assert peer.socket.recv(16).startswith(b"HTTP/1.1 200")
    return peer


def between_pipelined_requests(live: Live) -> Peer:
    first = completion({**WITNESS, "prompt": "One", "max_tokens": 2, "stream": True})
    peer = Peer(live).send(first + completion(ENDLESS) + completion(ENDLESS))
    peer.read_until(b"data: [DONE]")
    return peer


def at_the_end(live: Live) -> Peer:
    body = {**ENDLESS, "max_tokens": 3}
    return Peer(live).send(completion(body)).read_until(b"data: [DONE]")


POINTS = [
    connected, in_the_head, in_the_body, waiting, compiling, before_the_first_token, whole_before_the_end,
    in_the_stream, with_many_choices, while_the_body_is_written, between_pipelined_requests, at_the_end,
]  # fmt: skip


@pytest.mark.parametrize(
    ("point", "by"),
    [(point, by) for point in POINTS for by in ("fin", "rst")]
    + [(point, "half") for point in (waiting, whole_before_the_end, in_the_stream)],
)
def test_a_client_gone(live: Live, witness_text: str, point: Callable[[Live], Peer], by: str) -> None:
    witness = Peer(live).send(completion({**WITNESS, "stream": True})).read_until(b"data: ", 2)
    peer = point(live)
    peer.leave(by)
    if peer.leaves_after is not None:
        live.until(lambda: live.states() == ["running", "running"])
        peer.leaves_after.leave(by)
    live.until(lambda: live.engine.num_requests == 1 and live.states() == ["running"])
    before = witness.seen.count(b"data: ")
    witness.read_until(b"data: ", max(before, 5) + 3)
    text = stream_text(witness.seen)
    assert text
    assert text.startswith(witness_text) or witness_text.startswith(text)
    witness.leave("fin")
    live.until_idle()
    status, body = Peer(live).send(completion({**WITNESS, "max_tokens": 4})).answer()
    assert status == 200
    assert witness_text.startswith(json.loads(body)["choices"][0]["text"])


def test_all_leave_at_once(live: Live) -> None:
    peers = [Peer(live).send(completion({**ENDLESS, "prompt": f"{number}"})) for number in range(40)]
    live.until(lambda: len(live.states()) == 40)
    for number, peer in enumerate(peers):
        peer.leave(("fin", "rst", "half")[number % 3])
    live.until_idle()
