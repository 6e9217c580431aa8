"""A line about the run while it goes on: how far it is, how fast, and when it ends. On a terminal only.

Owns its looks. Reads a `Monitor` a few times a second and changes nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import statistics
import sys
import time
from collections import deque
from collections.abc import AsyncIterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from gqa_serve.workbench.bench.load import Monitor

_EVERY_S = 0.25
_RATE_WINDOW_S = 5.0


@contextlib.asynccontextmanager
async def live_progress(label: str, monitor: Monitor) -> AsyncIterator[None]:
    """Shows the monitor on standard error as long as the context lasts."""
    console = Console(file=sys.stderr)
    progress = Progress(
        TextColumn(label),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TextColumn("{task.fields[now]}"),
        TextColumn("ETA"),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    )
    task = progress.add_task(label, total=monitor.total, now="")

    async def refresh() -> None:
        counts = deque([(time.monotonic(), monitor.output_tokens)])
        while True:
            await asyncio.sleep(_EVERY_S)
            counts.append((time.monotonic(), monitor.output_tokens))
            while counts[-1][0] - counts[0][0] > _RATE_WINDOW_S:
                counts.popleft()
            progress.update(task, completed=monitor.done, now=status(monitor, _rate(counts)))

    with progress:
        refreshing = asyncio.ensure_future(refresh())
        try:
            yield
        finally:
            refreshing.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await refreshing
            progress.update(task, completed=monitor.done)


def status(monitor: Monitor, tokens_per_s: float) -> str:
    """The words between the bar and the ETA."""
    parts = [f"{monitor.running} running", f"{tokens_per_s:,.0f} tokens/s"]
    if monitor.recent_ttft_s:
        parts.append(f"TTFT p50 {statistics.median(monitor.recent_ttft_s) * 1e3:,.0f} ms")
    if monitor.failed:
        parts.append(f"[red]{monitor.failed} failed[/red]")
    return ", ".join(parts)


def _rate(counts: deque[tuple[float, int]]) -> float:
    (begin, first), (end, last) = counts[0], counts[-1]
    return (last - first) / (end - begin) if end > begin else 0.0
