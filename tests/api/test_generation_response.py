"""The SSE response against hostile ASGI peers: a generation always ends with it."""

from __future__ import annotations

import asyncio
import types
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from fake_engine import FakeEngine, Script, fake_info, fake_tokenizer
from starlette.types import Message

from gqa_serve.api import serving as module
from gqa_serve.api.chat import ChatReply
from gqa_serve.api.chat_request import ChatJob
from gqa_serve.api.message_parts import PlainParser
from gqa_serve.api.metrics import Metrics
from gqa_serve.api.protocol import ChatRequest
from gqa_serve.api.rate_limits import RateLimits
from gqa_serve.api.serving import GenerationResponse, Job, fingerprint, submit
from gqa_serve.config import ServerConfig
from gqa_serve.engine.request import SamplingParams
from gqa_serve.engine.stop_strings import StopStrings

TOKENIZER = fake_tokenizer()
SCOPE: dict[str, Any] = {"type": "http", "method": "POST", "path": "/", "headers": []}


def respond(
    engine: FakeEngine,
    receive: Callable[[], Awaitable[Message]],
    send: Callable[[Message], Awaitable[None]],
    drain_timeout_s: float = 0.0,
) -> None:
    """Serve one stream to the given peer."""

    async def main() -> None:
        metrics = Metrics(engine)
        context: Any = types.SimpleNamespace(
            engine=engine,
            tokenizer=TOKENIZER,
            metrics=metrics,
            tracing=None,
            config=ServerConfig(),
            rate_limits=RateLimits(None, None),
        )
        job = Job.new(
            "chatcmpl",
            kind="chat",
            model="m",
            fingerprint=fingerprint(fake_info()),
            fields=ChatRequest(messages=[]),
            prompts=[[1]],
            params=[SamplingParams(max_tokens=99)],
            n=1,
        )
        generation = submit(context, job, StopStrings([]), dict(SCOPE))
        response = GenerationResponse(
            generation, ChatReply(context, ChatJob(job, PlainParser, None)), {}, drain_timeout_s, metrics
        )
        await asyncio.wait_for(response(dict(SCOPE), receive, send), 90)  # type: ignore[arg-type]

    asyncio.run(main())


async def never() -> Message:
    await asyncio.Event().wait()
    raise AssertionError("unreachable")


async def gone() -> Message:
    return {"type": "http.disconnect"}


def test_client_gone_before_the_first_byte() -> None:
    """The body iterator is never started, so its own finally cannot help."""
    engine = FakeEngine(lambda request: Script(hold_at=0))

    async def send(message: Message) -> None:
        await asyncio.sleep(0.01)

    respond(engine, gone, send)
    assert engine.ends() == ["abort"]


def test_a_send_that_fails() -> None:
    engine = FakeEngine(lambda request: Script(["a"] * 50, hold_at=40))

    async def send(message: Message) -> None:
        if message.get("body"):
            raise OSError("broken pipe")

    with pytest.raises(OSError, match="broken pipe"):
        respond(engine, never, send)
    assert engine.ends() == ["abort"]


@pytest.mark.parametrize(("drain_timeout_s", "end"), [(10.0, "stop"), (0.0, "abort")])
def test_a_stopping_server_lets_streams_finish(
    monkeypatch: pytest.MonkeyPatch, drain_timeout_s: float, end: str
) -> None:
    stopping = types.SimpleNamespace(should_exit=True)
    monkeypatch.setattr(module, "SHUTDOWN_MARGIN_S", 0.0)
    monkeypatch.setattr("sse_starlette.sse._get_uvicorn_server", lambda: stopping)
    engine = FakeEngine(lambda request: Script(["a", "b"], hold_at=1))
    sent = b""

    async def send(message: Message) -> None:
        nonlocal sent
        sent += message.get("body", b"")
        if b'"content":"a"' in sent:
            asyncio.get_running_loop().call_later(0.1, engine.release.set)
            if not drain_timeout_s:
                await asyncio.Event().wait()

    respond(engine, never, send, drain_timeout_s)
    assert engine.ends() == [end]
    assert sent.endswith(b"data: [DONE]\n\n") == (end == "stop")
