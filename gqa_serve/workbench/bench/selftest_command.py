"""`gqa-serve bench selftest`: what the load generator itself costs here, and how exact its clock is.

Two loads from a server process that replays prepared streams: events one by one at a fixed pace, as a model
sends them (each costs a wake-up, a read and a parse), and events as fast as they can be taken.
Owns these loads. Invariant: everything is measured through the code that measures servers.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from gqa_serve.command_line import make_parser
from gqa_serve.errors import ConfigError
from gqa_serve.workbench.report import (
    Cell,
    Column,
    Report,
    Table,
    add_output_flags,
    check_output_flags,
    number,
    percent,
    scaled,
)
from gqa_serve.workbench.trace import TraceRequest

_STOP_S = 10.0


@dataclass(frozen=True)
class _Result:
    """`gap_error_s`: how much later than its pace each event was seen, from the one before it."""

    num_events: int
    seconds: float
    cpu_s: float
    gap_error_s: list[float]


def run(words: list[str]) -> None:
    """Parse, measure, report. Raises ConfigError."""
    parser = make_parser(
        "gqa-serve bench selftest",
        "Measure the load generator itself: events per second and core, exactness of its times.",
        usage="gqa-serve bench selftest [options]",
    )
    add = parser.add_argument
    add("--streams", type=int, default=64, metavar="N", help="streams at once; default 64")
    add("--events", type=int, default=300, metavar="N", help="events of a stream; default 300")
    add("--interval", type=float, default=0.02, metavar="S", help="from event to event; default 0.02")
    add_output_flags(parser)
    args = parser.parse(words)
    check_output_flags(args)
    if args.streams < 1 or args.events < 2 or not 0 < args.interval < 10:
        raise ConfigError("--streams must be 1 or more, --events 2 or more, --interval above 0 and below 10.")
    with replay_server() as url:
        paced = asyncio.run(_load(url, args, args.interval))
        burst = asyncio.run(_load(url, args, 0.0))
    report = _report(paced, burst, args)
    report.command = shlex.join(["gqa-serve", "bench", "selftest", *words])
    report.deliver(args)


@contextlib.contextmanager
def replay_server() -> Iterator[str]:
    """The address of a replay server in a process of its own."""
    command = [sys.executable, "-m", "gqa_serve.workbench.bench.replay_server"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        if process.stdout is None or not (line := process.stdout.readline()):
            raise ConfigError("The replay server did not start.")
        yield line.strip()
    finally:
        process.terminate()
        process.communicate(timeout=_STOP_S)


async def _load(url: str, args: argparse.Namespace, interval_s: float) -> _Result:
    from gqa_serve.workbench.bench.connection import HttpClient
    from gqa_serve.workbench.bench.load import Load, Prompts
    from gqa_serve.workbench.bench.target import Target
    from gqa_serve.workbench.bench.words import WORDS, Words

    client = HttpClient(url)
    target = Target(client, "completions", "replay", {"replay_interval_s": interval_s}, 600.0)
    requests = [TraceRequest(prompt_tokens=8, output_tokens=args.events) for _ in range(args.streams)]
    prompts = Prompts(Words(WORDS), "selftest")
    try:
        await Load(target, requests, prompts).run()  # opens the connections
        began, used = time.perf_counter(), time.process_time()
        run = await Load(target, requests, prompts).run()
        seconds, cpu_s = time.perf_counter() - began, time.process_time() - used
    finally:
        await client.close()
    errors = [record.error for record in run.records if record.error is not None]
    num_events = sum(len(record.token_s) for record in run.records)
    if errors or num_events != args.streams * args.events:
        raise ConfigError(f"The load generator lost events: {num_events} came, {errors[:1] or 'no error'}.")
    gaps = [gap - interval_s for record in run.records for gap in np.diff(record.token_s).tolist()]
    return _Result(num_events, seconds, cpu_s, gaps)


def _report(paced: _Result, burst: _Result, args: argparse.Namespace) -> Report:
    rows: list[dict[str, Cell]] = []
    for name, result in (("one by one", paced), ("as fast as they come", burst)):
        rows.append(
            {
                "name": name,
                "rate": result.num_events / result.seconds,
                "cpu": result.cpu_s / result.seconds,
                "per_core": result.num_events / max(1e-6, result.cpu_s),
            }
        )
    errors = np.abs(paced.gap_error_s)
    rows[0] |= {"error_p50": float(np.percentile(errors, 50)), "error_p99": float(np.percentile(errors, 99))}
    table = Table(
        "The load generator on this machine",
        [
            Column("name", "events"),
            Column("rate", "events/s", number()),
            Column("cpu", "of one core, %", percent()),
            Column("per_core", "events/s per core", number()),
            Column("error_p50", "gap error p50, ms", scaled(1e3, 2)),
            Column("error_p99", "gap error p99, ms", scaled(1e3, 2)),
        ],
        rows,
        f"{args.streams} streams of {args.events} events, {args.interval * 1e3:g} ms apart where one by one. "
        "The error of a gap is the server's and the client's together. A server that sends more events a "
        "second than a core can take needs several load generators.",
    )
    return Report("bench selftest", "The load generator itself", "", [table])
