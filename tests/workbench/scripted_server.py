"""An OpenAI-like server on loopback that does what a script says, byte by byte, in the test's own loop."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

CUT = "cut"
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
Step = bytes | float | str
Script = Callable[[dict[str, Any]], list[Step]]
"""Body of a request -> what to do: write bytes, sleep seconds, CUT the connection."""


def framed(body: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(body), body)


def event(**fields: Any) -> bytes:
    return framed(b"data: " + json.dumps(fields).encode() + b"\n\n")


def text_event(text: str, finish_reason: str | None = None) -> bytes:
    return event(choices=[{"index": 0, "text": text, "finish_reason": finish_reason}])


def ending(prompt_tokens: int, completion_tokens: int, **usage: Any) -> bytes:
    counts = {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens, **usage}
    return event(choices=[], usage=counts) + framed(b"data: [DONE]\n\n") + b"0\r\n\r\n"


def plain(status: int, body: bytes) -> bytes:
    return b"HTTP/1.1 %d X\r\nContent-Length: %d\r\n\r\n%b" % (status, len(body), body)


def prompt_of(request: dict[str, Any]) -> str:
    if "prompt" in request:
        return str(request["prompt"])
    return "".join(message["content"] for message in request["messages"])


def obedient(request: dict[str, Any], template_tokens: int = 0) -> list[Step]:
    """max_tokens words; every word is a token, a conversation has `template_tokens` more."""
    count = request["max_tokens"]
    words = [text_event(f" w{index}") for index in range(count - 1)] + [text_event(" end", "length")]
    return [HEAD, *words, ending(len(prompt_of(request).split()) + template_tokens, count)]


@dataclass
class ScriptedServer:
    """`requests`: bodies in order of arrival; `most_at_once`: of streams."""

    script: Script = obedient
    tokenize: bool = True
    requests: list[dict[str, Any]] = field(default_factory=list)
    heads: list[str] = field(default_factory=list)
    connections: int = 0
    running: int = 0
    most_at_once: int = 0
    url: str = ""
    open: dict[asyncio.Task[None] | None, asyncio.StreamWriter] = field(default_factory=dict)

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self.open[asyncio.current_task()] = writer
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode()
                self.heads.append(head)
                lengths = [
                    line[15:] for line in head.split("\r\n") if line.lower().startswith("content-length")
                ]
                body = await reader.readexactly(int(lengths[0]) if lengths else 0)
                if not await self.respond(head, body, writer):
                    break
        del self.open[asyncio.current_task()]
        writer.close()

    async def respond(self, head: str, body: bytes, writer: asyncio.StreamWriter) -> bool:
        if head.startswith("GET /v1/models"):
            writer.write(plain(200, b'{"data": [{"id": "scripted"}]}'))
        elif head.startswith("POST /tokenize") and self.tokenize:
            tokens = list(range(len(json.loads(body)["prompt"].split())))
            writer.write(plain(200, json.dumps({"tokens": tokens}).encode()))
        elif head.startswith("POST /v1/"):
            request = json.loads(body)
            self.requests.append(request)
            self.running += 1
            self.most_at_once = max(self.most_at_once, self.running)
            try:
                return await self.play(self.script(request), writer)
            finally:
                self.running -= 1
        else:
            writer.write(plain(404, b'{"detail": "Not Found"}'))
        await writer.drain()
        return True

    async def play(self, steps: list[Step], writer: asyncio.StreamWriter) -> bool:
        for step in steps:
            if isinstance(step, bytes):
                writer.write(step)
                await writer.drain()
            elif isinstance(step, float):
                await asyncio.sleep(step)
            else:
                return False
        return True


@contextlib.asynccontextmanager
async def scripted(script: Script = obedient, *, tokenize: bool = True) -> AsyncIterator[ScriptedServer]:
    own = ScriptedServer(script, tokenize)
    server = await asyncio.start_server(own.handle, "127.0.0.1", 0)
    own.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    try:
        yield own
    finally:
        server.close()
        tasks = [task for task in own.open if task is not None]
        for writer in list(own.open.values()):
            writer.close()
        for task in tasks:
            task.cancel()  # those that sleep
        await asyncio.gather(*tasks, return_exceptions=True)
        await server.wait_closed()
