"""--request-timeout: whatever a request is busy with, it ends in time and in its endpoint's own words."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from fake_engine import MODEL, FakeEngine, Script, Server, serving, wait_until
from test_api_raw import CHAT, HI, TEXT, Reply, chat, get, post, send

from gqa_serve.engine.chat_template import ChatTemplate

MESSAGES = "/v1/messages"
RESPONSES = "/v1/responses"
BODIES: dict[str, dict[str, Any]] = {
    CHAT: HI,
    TEXT: {"model": MODEL, "prompt": "p"},
    RESPONSES: {"model": MODEL, "input": "Hi"},
    MESSAGES: {**HI, "max_tokens": 50},
}


@pytest.fixture(scope="module")
def hasty() -> Iterator[Server]:
    with serving(FakeEngine(), request_timeout=0.4) as server:
        yield server


def ask(server: Server, path: str, **fields: Any) -> Reply:
    return send(server, post(path, json.dumps({**BODIES[path], **fields}).encode()))


def error_of(path: str, body: bytes) -> dict[str, Any]:
    error: dict[str, Any] = json.loads(body)["error"]
    assert "--request-timeout" in error["message"]
    if path == MESSAGES:
        assert error["type"] == "timeout_error"
    else:
        assert error["code"] == "request_timeout"
    return error


@pytest.mark.parametrize("path", [*BODIES, "/v1/embeddings"])
@pytest.mark.parametrize("hold_at", [0, 1])
def test_whole_answers(hasty: Server, path: str, hold_at: int) -> None:
    hasty.engine.reset(lambda request: Script(["a", "b"], hold_at=0 if request.pooling else hold_at))
    fields = {"model": MODEL, "input": "x"} if path == "/v1/embeddings" else BODIES[path]
    reply = send(hasty, post(path, json.dumps(fields).encode()))
    assert reply.status == 504
    error_of(path, reply.body)
    assert reply.headers["x-should-retry"] == "false"
    assert "retry-after" not in reply.headers
    assert reply.headers["x-request-id"]
    assert hasty.engine.ends() == ["abort"]


@pytest.mark.parametrize("path", BODIES)
def test_streams_end_with_an_error_event(hasty: Server, path: str) -> None:
    hasty.engine.reset(lambda request: Script(["a", "b"], hold_at=1))
    reply = ask(hasty, path, stream=True)
    assert reply.status == 200
    assert b"a" in reply.body
    events = reply.body.decode().strip().split("\n\n")
    if path in (CHAT, TEXT):
        assert events.pop() == "data: [DONE]"
    name, _, data = events[-1].rpartition("data: ")
    if path == RESPONSES:
        assert name.startswith(("event: response.failed", "event: error"))
        assert "--request-timeout" in data
    else:
        error_of(path, data.encode())
    assert hasty.engine.ends() == ["abort"]


def test_a_stream_without_a_first_token(hasty: Server) -> None:
    hasty.engine.reset(lambda request: Script(["a"], hold_at=0))
    reply = ask(hasty, CHAT, stream=True)
    assert reply.status == 504
    assert reply.error["code"] == "request_timeout"


def test_openais_client_does_not_try_again(hasty: Server) -> None:
    hasty.engine.reset(lambda request: Script(["a"], hold_at=0))
    with (
        openai.OpenAI(base_url=f"{hasty.url}/v1", api_key="x", max_retries=5) as client,
        pytest.raises(openai.InternalServerError) as caught,
    ):
        client.chat.completions.create(model=MODEL, messages=HI["messages"])
    assert caught.value.status_code == 504
    assert len(hasty.engine.requests) == 1


@pytest.mark.parametrize("path", [CHAT, MESSAGES])
def test_work_that_cannot_be_interrupted_is_not_waited_for(
    hasty: Server, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    """A thread renders until the 504 has been read; what it makes then goes nowhere."""
    answered = threading.Event()
    rendered = threading.Event()
    render = ChatTemplate.render

    def slow_render(self: ChatTemplate, *args: Any, **options: Any) -> str:
        assert answered.wait(20)
        rendered.set()
        return render(self, *args, **options)

    hasty.engine.reset()
    monkeypatch.setattr(ChatTemplate, "render", slow_render)
    try:
        reply = ask(hasty, path, messages=[{"role": "user", "content": ""}] * 100)
        assert reply.status == 504
        error_of(path, reply.body)
    finally:
        answered.set()
    assert rendered.wait(20)
    monkeypatch.undo()
    assert send(hasty, get("/health")).status == 200
    assert hasty.engine.requests == []


def test_a_body_that_never_comes(hasty: Server) -> None:
    with hasty.connect() as connection, connection.makefile("rb") as stream:
        connection.sendall(post(CHAT, json.dumps(HI).encode())[:-1])
        reply = Reply(stream)
    assert (reply.status, reply.error["code"]) == (504, "request_timeout")


def test_what_ends_in_time_is_left_alone(hasty: Server) -> None:
    hasty.engine.reset()
    assert chat(hasty).status == 200
    with hasty.connect() as connection, connection.makefile("rb") as stream:
        for _ in range(2):
            connection.sendall(post(CHAT, json.dumps({**HI, "stream": True}).encode()))
            assert Reply(stream).body.endswith(b"[DONE]\n\n")
    assert hasty.engine.ends() == ["stop"] * 3


def test_a_client_that_leaves_is_noticed_before_the_deadline() -> None:
    engine = FakeEngine(lambda request: Script(["a"], hold_at=0))
    with serving(engine, request_timeout=60.0) as server:
        with server.connect() as connection:
            connection.sendall(post(CHAT, json.dumps(HI).encode()))
            wait_until(lambda: engine.num_running == 1)
        wait_until(lambda: engine.ends() == ["abort"])
