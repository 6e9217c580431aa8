"""One measurement from warm-up to the last record, with a live line, ended early by Ctrl-C.

Owns the order of things and what the client itself cost. Knows neither flags nor reports.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import secrets
import signal
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

from gqa_serve.errors import ConfigError
from gqa_serve.workbench.bench.live import live_progress
from gqa_serve.workbench.bench.load import Load, Monitor, Prompts, Run
from gqa_serve.workbench.bench.target import Target
from gqa_serve.workbench.bench.words import Words
from gqa_serve.workbench.trace import TraceRequest


@dataclass(frozen=True)
class Measurement:
    """A run, and the part of one core that the load generator itself used meanwhile."""

    run: Run
    client_cpu: float


async def measure(
    target: Target,
    words: Words,
    requests: Sequence[TraceRequest],
    *,
    concurrency: int | None,
    stop: asyncio.Event,
    label: str = "requests",
) -> Measurement:
    """Send the requests, all prompts unlike those of any run before (but for the user's own texts)."""
    load = Load(target, requests, Prompts(words, secrets.token_hex(8)), concurrency=concurrency)
    began, used = time.perf_counter(), time.process_time()
    async with live_progress(label, load.monitor):
        run = await load.run(stop)
    return Measurement(run, (time.process_time() - used) / max(1e-9, time.perf_counter() - began))


async def warm_up(
    target: Target, words: Words, requests: Sequence[TraceRequest], stop: asyncio.Event
) -> None:
    """Send these at once, each alone, and forget them. Raises ConfigError if none is answered."""
    alone = [
        dataclasses.replace(request, arrival_s=0.0, conversation=None, turn=0, think_s=0.0)
        for request in requests
    ]
    if not alone:
        return
    monitor = Monitor(len(alone))
    load = Load(target, alone, Prompts(words, secrets.token_hex(8)), monitor=monitor)
    async with live_progress("warm-up", monitor):
        run = await load.run(stop)
    errors = [record.error for record in run.records if record.error is not None]
    if len(errors) == len(alone):
        raise ConfigError(f"No request of the warm-up was answered: {errors[0]}")


@contextlib.asynccontextmanager
async def interruptible() -> AsyncIterator[asyncio.Event]:
    """An event that the first Ctrl-C sets; the second one ends the program as usual."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()

    def interrupt() -> None:
        stop.set()
        loop.remove_signal_handler(signal.SIGINT)

    try:
        loop.add_signal_handler(signal.SIGINT, interrupt)
        installed = True
    except (NotImplementedError, RuntimeError, ValueError):  # no such signals here, or not the main thread
        installed = False
    try:
        yield stop
    finally:
        if installed:
            loop.remove_signal_handler(signal.SIGINT)


def first_turns(requests: Sequence[TraceRequest], count: int) -> list[TraceRequest]:
    """What to warm up with."""
    return [request for request in requests if request.turn == 0][:count]
