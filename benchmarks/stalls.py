"""What hostile requests cost others: the longest gap in a stream beside each, and the longest wait of
/version.

A process of its own streams one answer and asks for /version every 10 ms; the attack comes from another, so
that the client's work is not taken for the server's. Each attack is compared with the seconds before it. The
figures are those of one run: gaps of tens of milliseconds come from the machine as well.

    python benchmarks/stalls.py [--only NAME ...] [--seconds 2] [-- flags of gqa-serve]
"""

from __future__ import annotations

import argparse
import http.client
import json
import multiprocessing
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import Any, NamedTuple
from urllib.parse import urlsplit

CHAT, TEXT, TOKENIZE, DETOKENIZE = "/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize"
LIMIT_MS = 250
_TIMEOUT_S = 120
Call = tuple[str, bytes]


class Gaps(NamedTuple):
    """Milliseconds: the longest between two tokens of the probe, the longest answer of /version."""

    token: float
    version: float


# --- attacks -----------------------------------------------------------------------------------------------


def chat(content: str = "Hi", **fields: Any) -> Call:
    """A chat request that wants few tokens."""
    return CHAT, _json({"messages": [{"role": "user", "content": content}], "max_tokens": 4, **fields})


def text(prompt: Any = "Hi", **fields: Any) -> Call:
    """A completion that wants few tokens."""
    return TEXT, _json({"prompt": prompt, "max_tokens": 4, **fields})


def _json(body: dict[str, Any]) -> bytes:
    return json.dumps(body, ensure_ascii=False).encode()


def _schema(schema: dict[str, Any], **fields: Any) -> Call:
    format = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    return chat(response_format=format, **fields)


def _object(number: int) -> dict[str, Any]:
    names = [f"field_{number}_{n}" for n in range(20)]
    return {
        "type": "object",
        "properties": {name: {"type": "string", "maxLength": 40} for name in names},
        "required": names,
        "additionalProperties": False,
    }


def _tools(count: int) -> list[dict[str, Any]]:
    parameters = {"type": "object", "properties": {f"p{n}": {"type": "string"} for n in range(10)}}
    return [
        {"type": "function", "function": {"name": f"f{n}", "parameters": parameters}} for n in range(count)
    ]


MB = 2**20
ATTACKS: dict[str, Callable[[], list[Call]]] = {
    "1 MB prompt, text": lambda: [text("word " * (MB // 5))],
    "1 MB prompt, chat": lambda: [chat("word " * (MB // 5))],
    "1 MB of one letter": lambda: [text("a" * MB), chat("a" * MB)],
    "1 MB of blanks": lambda: [text(" " * MB), chat(" " * MB)],
    "1 MB of combining marks": lambda: [text("e" + "\u0301" * (MB // 2))],
    "300 kB of one letter, tokenize": lambda: [(TOKENIZE, _json({"prompt": "a" * 300_000}))] * 4,
    "300 kB of one word, tokenize": lambda: [(TOKENIZE, _json({"prompt": "abcdefghij" * 30_000}))] * 4,
    "200 kB of marks, tokenize": lambda: [(TOKENIZE, _json({"prompt": "e\u0301\u0300" * 50_000}))] * 4,
    "300 kB of control tokens": lambda: [chat("<|im_end|>" * 30_000)] * 2,
    "16 MB of small strings": lambda: [
        (TEXT, b'{"prompt":"a","metadata":[' + b'"a",' * 4_000_000 + b'"a"]}')
    ],
    "16 MB of numbers": lambda: [text([1] * 5_000_000)],
    "16 MB of brackets in strings": lambda: [(TEXT, b'{"prompt":"' + b"[" * (15 * MB) + b'"}')],
    "16 MB of escapes": lambda: [(TEXT, b'{"prompt":"' + b"\\n" * (7 * MB) + b'"}')],
    "16 MB of small keys": lambda: [
        (TEXT, b'{"prompt":"a","x":{' + b",".join(b'"%d":1' % n for n in range(1_000_000)) + b"}}")
    ],
    "16 MB, not JSON at its end": lambda: [(TEXT, b'{"prompt":"a","x":[' + b'"a",' * 4_000_000)],
    "16 MB of deep lists": lambda: [(TEXT, b'{"x":' + b"[" * (15 * MB))],
    "10,000 stop strings": lambda: [text("Once", stop=[f"stop {n}" for n in range(10_000)], max_tokens=64)],
    "stop strings of 1 MB": lambda: [text("Once", stop=["a" * 250_000 + str(n) for n in range(4)])],
    "ids out of range": lambda: [text([49151 + n for n in range(100_000)]), text([-1]), text([2**63])],
    "128 choices, 20 logprobs": lambda: [text("Once", n=128, logprobs=20, max_tokens=16)],
    "logprobs of a long prompt": lambda: [text([5] * 4000, echo=True, logprobs=20)],
    "200,000 messages": lambda: [
        (
            CHAT,
            b'{"messages":['
            + b'{"role":"user","content":"a"},' * 199_999
            + b'{"role":"user","content":"a"}]}',
        )
    ],
    "10,000 messages": lambda: [
        (CHAT, _json({"messages": [{"role": "user", "content": ""}] * 10_000, "max_tokens": 1}))
    ],
    "5,000 tools": lambda: [chat(tools=_tools(5000))],
    "128 tools": lambda: [chat(tools=_tools(128), tool_choice="required")],
    "100 schemas": lambda: [_schema(_object(n), max_tokens=8) for n in range(100)],
    "a large enum": lambda: [_schema({"enum": [f"value {n}" for n in range(8000)]})],
    "nested repeats": lambda: [chat(regex="((a{1,1000}){1,1000}){1,1000}", max_tokens=32)],
    "an expression with 2^n states": lambda: [chat(regex="[ab]*a[ab]{20}c", max_tokens=64)],
    "alternatives": lambda: [
        chat(regex="(" + "|".join(f"a{{{n}}}b*" for n in range(1, 300)) + ")*", max_tokens=64)
    ],
    "slow masks": lambda: (
        [chat(grammar='start: a+\na: "x" | "x" a | a a | "xx" a a', ignore_eos=True, max_tokens=64)] * 4
    ),
    "any object": lambda: [chat(response_format={"type": "json_object"}, max_tokens=200, temperature=2)] * 4,
    "2 MB of ids to detokenize": lambda: [(DETOKENIZE, _json({"tokens": [1000] * 400_000}))],
}


# --- the probe ---------------------------------------------------------------------------------------------


class _Watch(threading.Thread):
    """Times at which something happened, on a connection of its own."""

    def __init__(self, host: str, port: int) -> None:
        super().__init__(daemon=True)
        self.connection = http.client.HTTPConnection(host, port, timeout=_TIMEOUT_S)
        self.times: list[tuple[float, float]] = []  # when, and how long since the one before or the question

    def longest(self, start: float, end: float) -> float:
        """Milliseconds, of what ended in that time or began in it."""
        spans = [span for when, span in list(self.times) if when > start and when - span < end]
        return 1000 * max(spans, default=float("inf"))


class _Stream(_Watch):
    """Streams answers, one after the other."""

    def run(self) -> None:
        while True:
            body = {"prompt": "Once upon a time", "max_tokens": 4000, "ignore_eos": True, "stream": True}
            self.connection.request("POST", TEXT, _json(body), {"Content-Type": "application/json"})
            reply = self.connection.getresponse()
            last = time.perf_counter()
            while line := reply.readline():
                if line.startswith(b"data: {"):
                    now = time.perf_counter()
                    self.times.append((now, now - last))
                    last = now
            reply.read()


class _Version(_Watch):
    """Asks for what needs no engine."""

    def run(self) -> None:
        while True:
            start = time.perf_counter()
            self.connection.request("GET", "/version")
            self.connection.getresponse().read()
            now = time.perf_counter()
            self.times.append((now, now - start))
            time.sleep(0.01)


def _probe(host: str, port: int, pipe: Connection) -> None:
    """In a process of its own: answers ("start", "end") with the gaps between these times."""
    watches = _Stream(host, port), _Version(host, port)
    for watch in watches:
        watch.start()
    while span := pipe.recv():
        pipe.send(Gaps(*(watch.longest(*span) for watch in watches)))


# --- a run -------------------------------------------------------------------------------------------------


@contextmanager
def _server(flags: list[str]) -> Iterator[tuple[str, int]]:
    command = [sys.executable, "-m", "gqa_serve.cli", "--model", "demo", "--port", "0", *flags]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        assert process.stdout is not None
        line = next((line for line in process.stdout if line.startswith("Ready: ")), None)
        if line is None:
            raise RuntimeError("the server did not start")
        threading.Thread(target=process.stdout.read, daemon=True).start()
        url = urlsplit(line.split()[1])
        yield url.hostname or "", url.port or 0
    finally:
        process.terminate()
        process.wait()


def _send(host: str, port: int, calls: list[Call]) -> tuple[list[int], float]:
    """The statuses of all calls made at once, and the seconds until the last was answered."""
    statuses: list[int] = []

    def one(path: str, body: bytes) -> None:
        connection = http.client.HTTPConnection(host, port, timeout=_TIMEOUT_S)
        connection.request("POST", path, body, {"Content-Type": "application/json"})
        reply = connection.getresponse()
        reply.read()
        statuses.append(reply.status)
        connection.close()

    threads = [threading.Thread(target=one, args=call) for call in calls]
    start = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return statuses, time.perf_counter() - start


def _wait(pipe: Connection, start: float, end: float) -> Gaps:
    pipe.send((start, end))
    gaps: Gaps = pipe.recv()
    return gaps


def main() -> None:
    """Run the attacks that are asked for, and print a line for each."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", metavar="NAME", help="attacks whose names contain one of these")
    parser.add_argument("--seconds", type=float, default=2.0, help="undisturbed time before each attack")
    parser.add_argument("flags", nargs="*", help="flags of gqa-serve, after --")
    args = parser.parse_args()
    chosen = {
        name: make for name, make in ATTACKS.items() if not args.only or any(o in name for o in args.only)
    }
    here, there = multiprocessing.Pipe()
    with _server(args.flags) as (host, port):
        probe = multiprocessing.get_context("spawn").Process(
            target=_probe, args=(host, port, there), daemon=True
        )
        probe.start()
        time.sleep(2)
        print(f"{'':34} {'token gap, ms':>20} {'/version, ms':>20}   {'answers':24} took")
        print(f"{'attack':34} {'before':>10} {'beside':>9} {'before':>10} {'beside':>9}")
        for name, make in chosen.items():
            calls = make()
            start = time.perf_counter()
            time.sleep(args.seconds)
            before = _wait(here, start + 0.3, time.perf_counter())
            start = time.perf_counter()
            statuses, took = _send(host, port, calls)
            time.sleep(0.5)
            beside = _wait(here, start, start + took)
            shown = " ".join(f"{status}:{statuses.count(status)}" for status in sorted(set(statuses)))
            mark = "  <--" if max(beside) > LIMIT_MS else ""
            print(
                f"{name:34} {before.token:10.0f} {beside.token:9.0f} {before.version:10.0f} "
                f"{beside.version:9.0f}   {shown:24} {took:.1f} s{mark}",
                flush=True,
            )
        here.send(None)  # the probe ends before the server
        probe.join()


if __name__ == "__main__":
    main()
