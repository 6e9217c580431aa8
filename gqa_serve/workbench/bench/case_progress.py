"""Progress of long measuring on standard error: what runs now, how far it is, and when it will be done.

Owns the bar. On a terminal it is drawn, elsewhere nothing is.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)


class CaseProgress:
    """Bars one after the other, each with its own label and the time that is left."""

    def __init__(self) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=Console(file=sys.stderr),
            disable=not sys.stderr.isatty(),
            speed_estimate_period=600,
        )

    @contextlib.contextmanager
    def task(self, label: str) -> Iterator[Callable[[int, int], None]]:
        """A bar that the function it gives moves: (done, total). It is gone when the work is over."""
        task = self._progress.add_task(label, total=None)

        def update(done: int, total: int) -> None:
            self._progress.update(task, completed=done, total=total)

        self._progress.start()
        try:
            yield update
        finally:
            self._progress.remove_task(task)
            self._progress.stop()

    def label(self, text: str) -> None:
        """Another label for the bar that is shown."""
        for task in self._progress.tasks:
            self._progress.update(task.id, description=text)
