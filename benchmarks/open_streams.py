"""Many streams open at once: does the server hold them, and what does one cost its event loop?

Starts a server of the demo model, opens `--streams` completions over raw sockets and reads them all to the
end. Reported are how each ended, tokens per second, the time to the first token and between tokens, the CPU
time and memory of both server processes, and how late the API process's event loop was, told twice: by a
timer inside it, and by GET /ping on a connection of its own, from a process of its own, every 20 ms.

    python benchmarks/open_streams.py --streams 1000
    python benchmarks/open_streams.py -- --max-num-seqs 1000 --max-num-batched-tokens 2048
    python benchmarks/open_streams.py --against ../other-checkout --rounds 3

What follows `--` goes to the server. With `--against` each round runs both source trees in turn, and the
report ends with the medians of the rounds' ratios. The client shares the server's cores; `--client-nice` says
how politely.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import multiprocessing
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, cast
from urllib.parse import urlsplit

import psutil
import uvloop

_TICK_S = 0.01
_PING_EVERY_S = 0.02
_STOP_S = 60
_DONE = b"data: [DONE]"


# --- the server --------------------------------------------------------------------------------------------


def serve_measured(lag_file: str, profile: str, flags: Sequence[str]) -> None:
    """Run the server with a timer in its event loop; SIGUSR1 clears what was measured, the end writes it.

    This runs in the server's process, from the source tree that is measured.
    """
    import cProfile

    from gqa_serve import server
    from gqa_serve.cli import main

    lags: list[float] = []
    profiler = cProfile.Profile(time.process_time)  # wall time would count what the engine takes

    async def measure() -> None:
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGUSR1, lags.clear)
        while True:
            due = time.perf_counter() + _TICK_S
            await asyncio.sleep(_TICK_S)
            lags.append(max(0.0, time.perf_counter() - due))

    plain = server._serve

    async def measured(*args: Any) -> None:
        timer = asyncio.create_task(measure())
        try:
            await plain(*args)
        finally:
            timer.cancel()

    server._serve = measured
    if profile:
        profiler.enable()
    try:
        main([*flags])
    finally:
        profiler.disable()
        if profile:
            profiler.dump_stats(profile)
        Path(lag_file).write_text(json.dumps(lags), encoding="ascii")


@contextmanager
def running_server(
    source: Path, lag_file: Path, args: Any
) -> Iterator[tuple[str, int, subprocess.Popen[str]]]:
    """A measured server from `source`, on a free port: host, port and process."""
    flags = ["--model", "demo", "--port", "0", "--log-level", "warning", *args.server]
    command = [sys.executable, str(Path(__file__).resolve()), "--serve", str(lag_file), args.profile, *flags]
    path = os.pathsep.join(
        [str(source), *(entry for entry in os.environ.get("PYTHONPATH", "").split(":") if entry)]
    )
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": path}, cwd=source
    )
    try:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("Ready: "):
                break
        else:
            raise RuntimeError("the server did not start; its words are above")
        url = urlsplit(line.split()[1])
        assert url.hostname is not None
        assert url.port is not None
        yield url.hostname, url.port, process
    finally:
        process.terminate()
        try:
            process.communicate(timeout=_STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()


# --- the clients -------------------------------------------------------------------------------------------


class StreamClient(asyncio.Protocol):
    """One stream, read as cheaply as can be: events are counted and timed, not parsed."""

    def __init__(self, request: bytes) -> None:
        self._request = request
        self._tail = b""
        self._last_s: float | None = None
        self.began_s = time.perf_counter()
        self.ttft_s: float | None = None
        self.gaps_s: list[float] = []
        self.num_tokens = 0
        self.status = 0
        self.failed = False
        self.ended: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # uvloop's is none by inheritance
        self._transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        now = time.perf_counter()
        if not self.status:
            self.status = int(data[9:12])
        if b'"error":{' in data:
            self.failed = True
        if b"data: {" in data:
            if self._last_s is None:
                self.ttft_s = now - self.began_s
            else:
                self.gaps_s.append(now - self._last_s)
            self._last_s = now
        self._tail = (self._tail + data)[-600:]
        if _DONE in self._tail or self.status != 200:
            self._end()

    def _end(self) -> None:
        if self.ended.done():
            return
        _, found, usage = self._tail.rpartition(b'"completion_tokens":')
        if found:
            self.num_tokens = int(usage.split(b",")[0].split(b"}")[0])
        kind = str(self.status) if self.status != 200 else "error event" if self.failed else "complete"
        self.ended.set_result(kind)
        self._transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.ended.done():
            self.ended.set_result("connection lost")


def request_bytes(host: str, port: int, number: int, args: Any) -> bytes:
    """Its own prompt for each stream, of about `--prompt` tokens."""
    words = " ".join(f"{number * 31 + word}" for word in range(max(1, args.prompt // 4)))
    body = json.dumps(
        {
            "model": "demo",
            "prompt": words,
            "max_tokens": args.tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
    ).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode() + body


async def open_all(host: str, port: int, args: Any) -> tuple[list[StreamClient], Counter[str], float]:
    """Every stream to its end: the clients, how they ended, and the seconds it took."""
    loop = asyncio.get_running_loop()
    clients = []
    began = time.perf_counter()
    for number in range(args.streams):
        request = request_bytes(host, port, number, args)
        _, client = await loop.create_connection(lambda request=request: StreamClient(request), host, port)
        clients.append(client)
        if args.stagger:
            await asyncio.sleep(args.stagger)
    ends = Counter(await asyncio.gather(*(client.ended for client in clients)))
    return clients, ends, time.perf_counter() - began


def ping_process(host: str, port: int, results: Connection) -> None:
    """GET /ping every 20 ms on one connection until told to stop; then send all round trips, in seconds."""
    request = f"GET /ping HTTP/1.1\r\nHost: {host}:{port}\r\n\r\n".encode()
    seconds = []
    with socket.create_connection((host, port)) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        while not results.poll(_PING_EVERY_S):
            began = time.perf_counter()
            connection.sendall(request)
            answer = b""
            while not answer.endswith(b"}"):
                if not (data := connection.recv(65536)):
                    raise RuntimeError("the connection of /ping was closed")
                answer += data
            seconds.append(time.perf_counter() - began)
    results.send(seconds)


# --- one run and its report --------------------------------------------------------------------------------


@dataclasses.dataclass
class Figures:
    """What one run showed; times in milliseconds, memory in MiB."""

    ends: dict[str, int]
    seconds: float
    tokens_per_s: float
    ttft: list[float]
    gaps: list[float]
    loop_lag: list[float]
    ping: list[float]
    api_cpu_per_1000: float
    engine_cpu_per_1000: float
    client_cpu_s: float
    api_mib: float
    engine_mib: float


def quantile(values: Sequence[float], share: float) -> float:
    """The value that `share` of all do not exceed; 0 of none."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else 0.0


def cpu_s(process: psutil.Process) -> float:
    """CPU seconds of a process so far, its threads included."""
    times = process.cpu_times()
    return float(times.user + times.system)


def run_once(source: Path, args: Any) -> Figures:
    """Start a server, hold the streams, stop it."""
    with tempfile.TemporaryDirectory() as folder:
        lag_file = Path(folder) / "lags.json"
        with running_server(source, lag_file, args) as (host, port, process):
            api = psutil.Process(process.pid)
            (engine,) = api.children()
            warm = argparse.Namespace(**{**vars(args), "streams": min(32, args.streams), "tokens": 8})
            uvloop.run(open_all(host, port, warm))
            ours, theirs = multiprocessing.Pipe()
            prober = multiprocessing.Process(target=ping_process, args=(host, port, theirs), daemon=True)
            prober.start()
            theirs.close()
            before = [cpu_s(api), cpu_s(engine), time.process_time()]
            process.send_signal(signal.SIGUSR1)
            clients, ends, seconds = uvloop.run(open_all(host, port, args))
            after = [cpu_s(api), cpu_s(engine), time.process_time()]
            memory = [api.memory_info().rss / 2**20, engine.memory_info().rss / 2**20]
            ours.send("stop")
            pings = ours.recv()
            prober.join()
        lags = json.loads(lag_file.read_text(encoding="ascii"))
    num_tokens = sum(client.num_tokens for client in clients)
    used = [then - first for first, then in zip(before, after, strict=True)]
    per_1000 = 1000 / max(1, num_tokens)
    return Figures(
        ends=dict(ends),
        seconds=seconds,
        tokens_per_s=num_tokens / seconds,
        ttft=[client.ttft_s * 1000 for client in clients if client.ttft_s is not None],
        gaps=[gap * 1000 for client in clients for gap in client.gaps_s],
        loop_lag=[lag * 1000 for lag in lags],
        ping=[ping * 1000 for ping in pings],
        api_cpu_per_1000=used[0] * per_1000,
        engine_cpu_per_1000=used[1] * per_1000,
        client_cpu_s=used[2],
        api_mib=memory[0],
        engine_mib=memory[1],
    )


def summary(figures: Figures) -> dict[str, float]:
    """The figures that are compared."""
    return {
        "tokens/s": figures.tokens_per_s,
        "TTFT p50 ms": quantile(figures.ttft, 0.5),
        "TTFT p99 ms": quantile(figures.ttft, 0.99),
        "ITL p50 ms": quantile(figures.gaps, 0.5),
        "ITL p99 ms": quantile(figures.gaps, 0.99),
        "loop lag p50 ms": quantile(figures.loop_lag, 0.5),
        "loop lag p99 ms": quantile(figures.loop_lag, 0.99),
        "loop lag max ms": max(figures.loop_lag, default=0.0),
        "ping p50 ms": quantile(figures.ping, 0.5),
        "ping p99 ms": quantile(figures.ping, 0.99),
        "ping max ms": max(figures.ping, default=0.0),
        "API CPU s / 1000 tokens": figures.api_cpu_per_1000,
        "engine CPU s / 1000 tokens": figures.engine_cpu_per_1000,
        "API RSS MiB": figures.api_mib,
        "engine RSS MiB": figures.engine_mib,
    }


def report(name: str, figures: Figures) -> None:
    """One run in words."""
    opened = sum(figures.ends.values())
    kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(figures.ends.items()))
    print(
        f"{name}: {opened} streams opened, ended: {kinds}; {figures.seconds:.1f} s, "
        f"client CPU {figures.client_cpu_s:.1f} s"
    )
    for label, value in summary(figures).items():
        print(f"    {label:<28}{value:10.2f}")
    sys.stdout.flush()


def compare(ours: Sequence[Figures], theirs: Sequence[Figures]) -> None:
    """The medians of the rounds' ratios."""
    print("this tree / the other, median of the rounds:")
    for label in summary(ours[0]):
        pairs = [(summary(a)[label], summary(b)[label]) for a, b in zip(ours, theirs, strict=True)]
        ratios = [mine / other for mine, other in pairs if other]
        if ratios:
            print(f"    {label:<28}{statistics.median(ratios):10.3f}")


def main() -> int:
    """0 if every stream was complete or refused with 429."""
    if sys.argv[1:2] == ["--serve"]:
        serve_measured(sys.argv[2], sys.argv[3], sys.argv[4:])
        return 0
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--streams", type=int, default=1000)
    parser.add_argument("--tokens", type=int, default=64, help="output tokens of each stream")
    parser.add_argument("--prompt", type=int, default=16, help="prompt tokens of each stream, about")
    parser.add_argument("--stagger", type=float, default=0.0, help="seconds between two openings")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--against", type=Path, help="another source tree to alternate with")
    parser.add_argument("--client-nice", type=int, default=0)
    parser.add_argument("--profile", default="", help="write a cProfile of the API process there")
    parser.add_argument("--json", type=Path, help="write the figures there")
    parser.add_argument("server", nargs="*", help="flags of the server, after --")
    args = parser.parse_args()
    here = Path(__file__).resolve().parents[1]
    os.nice(args.client_nice)
    runs: dict[str, list[Figures]] = {"this tree": []}
    if args.against:
        runs["the other"] = []
    for _ in range(args.rounds):
        for name, done in runs.items():
            source = here if name == "this tree" else args.against.resolve()
            done.append(run_once(source, args))
            report(name, done[-1])
    if args.against:
        compare(runs["this tree"], runs["the other"])
    if args.json:
        figures = {name: [{"ends": run.ends, **summary(run)} for run in done] for name, done in runs.items()}
        args.json.write_text(json.dumps(figures, indent=1), encoding="utf-8")
    good = all(set(run.ends) <= {"complete", "429"} for done in runs.values() for run in done)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
