"""A server that computes nothing: every answer is a prepared stream of chunks, as fast or as slow as asked.

`python -m gqa_serve.workbench.bench.replay_server [PORT]` prints its address. What `bench selftest` measures
the load generator against. A request asks for `max_tokens` events; its fields `replay_interval_s` (time from
one event to the next; 0: all at once) is the server's own.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from typing import Any

_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
_PIECE = 64
"""Events in one write where no interval is asked for."""


def event(text: str, finish_reason: str | None = None) -> bytes:
    """One chunk of a completion, framed as an event and as a chunk of HTTP."""
    chunk = {
        "id": "cmpl-0123456789abcdef0123456789abcdef",
        "object": "text_completion",
        "created": 1700000000,
        "model": "replay",
        "choices": [{"index": 0, "text": text, "logprobs": None, "finish_reason": finish_reason}],
    }
    return _framed(json.dumps(chunk).encode())


def _framed(data: bytes) -> bytes:
    body = b"data: " + data + b"\n\n"
    return b"%x\r\n%b\r\n" % (len(body), body)


def _ending(prompt_tokens: int, num_tokens: int) -> bytes:
    usage = {"prompt_tokens": prompt_tokens, "completion_tokens": num_tokens}
    return _framed(json.dumps({"choices": [], "usage": usage}).encode()) + _framed(b"[DONE]") + b"0\r\n\r\n"


async def _handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Requests of one connection, to its end."""
    try:
        while True:
            head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
            lengths = [line[15:] for line in head.split("\r\n") if line.lower().startswith("content-length:")]
            body = await reader.readexactly(int(lengths[0]) if lengths else 0)
            if head.startswith("POST /v1/completions"):
                await _stream(writer, json.loads(body))
            else:
                await _answer(writer, head, body)
    except (asyncio.IncompleteReadError, ConnectionError):
        writer.close()  # the client has gone


async def _answer(writer: asyncio.StreamWriter, head: str, body: bytes) -> None:
    known: dict[str, Any] = {"data": [{"id": "replay"}]}
    status = "200 OK"
    if head.startswith("POST /tokenize"):
        known = {"tokens": json.loads(body)["prompt"].split()}
    elif not head.startswith("GET /v1/models"):
        status = "404 Not Found"
    data = json.dumps(known).encode()
    writer.write(f"HTTP/1.1 {status}\r\nContent-Length: {len(data)}\r\n\r\n".encode() + data)
    await writer.drain()


async def _stream(writer: asyncio.StreamWriter, request: dict[str, Any]) -> None:
    count, interval_s = request["max_tokens"], request.get("replay_interval_s", 0.0)
    events = [event(" word") for _ in range(count - 1)] + [event(" word", "length")]
    writer.write(_HEAD)
    if interval_s:
        start = time.perf_counter()
        for index, one in enumerate(events, 1):
            await asyncio.sleep(start + index * interval_s - time.perf_counter())
            writer.write(one)
    else:
        for begin in range(0, count, _PIECE):
            writer.write(b"".join(events[begin : begin + _PIECE]))
            await writer.drain()
    writer.write(_ending(len(str(request["prompt"]).split()), count))
    await writer.drain()


async def _serve(port: int) -> None:
    server = await asyncio.start_server(_handle, "127.0.0.1", port)
    print(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", flush=True)
    async with server:
        await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(_serve(int(sys.argv[1]) if len(sys.argv) > 1 else 0))
