"""The server over HTTP against the engine in process: the same requests, at several numbers of streams.

The server is a process of its own; the client here writes and reads raw sockets, so that it takes little of
the cores they share. Each round runs both, one after the other; ratios are taken within a round.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

from cpu_engine import load_engine, random_prompts, run_to_end
from cpu_limits import Report, Result
from cpu_models import FORMATS, model_path

_STOP_S = 60


@contextmanager
def running_server(form: str, args: Any) -> Iterator[tuple[str, int]]:
    """A server of the demo on a free port: its host and port."""
    settings = {
        **FORMATS[form][0],
        "model": "demo",
        "backend": "native",
        "threads": args.threads,
        "kv-cache-dtype": args.kv_cache_dtype,
        "kv-cache-memory": "1GiB",
        "port": 0,
    }
    flags = [str(part) for name, value in settings.items() for part in (f"--{name}", value)]
    command = [sys.executable, "-m", "gqa_serve.cli", *flags, "--no-prefix-caching"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        assert process.stdout is not None
        lines = []
        for line in process.stdout:
            lines.append(line)
            if line.startswith("Ready: "):
                break
        else:
            raise RuntimeError(f"the server did not start:\n{''.join(lines)}")
        url = urlsplit(line.split()[1])
        assert url.hostname is not None
        assert url.port is not None
        yield url.hostname, url.port
    finally:
        process.terminate()
        try:
            process.communicate(timeout=_STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()


async def stream(host: str, port: int, prompt: Sequence[int], max_tokens: int) -> int:
    """Stream one completion to its end; the number of tokens that its usage tells."""
    body = json.dumps(
        {
            "model": "demo",
            "prompt": prompt,
            "max_tokens": max_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
    ).encode()
    reader, writer = await asyncio.open_connection(host, port, limit=2**20)
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Type: application/json\r\n"
    writer.write(f"{head}Content-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode() + body)
    answer = await reader.read()
    writer.close()
    await writer.wait_closed()
    if b" 200 " not in answer.split(b"\r\n", 1)[0] or b"data: [DONE]" not in answer:
        raise RuntimeError(f"the request failed: {answer[:1000]!r}")
    usage = answer.rsplit(b'"completion_tokens":', 1)[1]
    return int(usage.split(b",")[0].split(b"}")[0])


async def http_rate(host: str, port: int, prompts: Sequence[Sequence[int]], max_tokens: int) -> float:
    """Output tokens per second of concurrent streams, prefill included."""
    start = time.perf_counter()
    counts = await asyncio.gather(*(stream(host, port, prompt, max_tokens) for prompt in prompts))
    seconds = time.perf_counter() - start
    if counts != [max_tokens] * len(prompts):
        raise RuntimeError(f"streams of {max_tokens} tokens gave {counts}")
    return sum(counts) / seconds


def bench_http(report: Report, form: str, args: Any) -> None:
    """The demo in one format, every number of streams."""
    engine = load_engine(
        model_path("demo", args.cache_dir), form, threads=args.threads, kv_cache_dtype=args.kv_cache_dtype
    )
    results = []
    with running_server(form, args) as (host, port):
        for streams in sorted(set(args.batches)):
            prompts = random_prompts(engine, streams, args.http_prompt)
            alone, served = [], []
            for _ in range(args.rounds + 1):
                alone.append(run_to_end(engine, prompts, args.http_output))
                served.append(asyncio.run(http_rate(host, port, prompts, args.http_output)))
            results.append(_result(form, streams, alone[1:], served[1:]))  # the first round warms up
    report.section(
        f"HTTP: demo {form}, prompts of {args.http_prompt} tokens, outputs of {args.http_output}; "
        "output tokens, prefill included"
    )
    report.add(results)


def _result(form: str, streams: int, alone: list[float], served: list[float]) -> Result:
    """The limit that gives the median of the rounds' ratios."""
    result = Result("http", f"demo {form}", f"{streams} streams", "tokens/s", served)
    ratio = statistics.median(theirs / ours for ours, theirs in zip(alone, served, strict=True))
    result.limits = {"the engine in process": result.median / ratio}
    return result
