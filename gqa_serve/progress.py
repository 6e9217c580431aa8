"""The progress bar of a loading model."""

from __future__ import annotations

import sys

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn


class LoadingBar:
    """A bar on standard error, shown only on a terminal."""

    def __init__(self) -> None:
        columns = (TextColumn("Loading weights"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self._bar = Progress(*columns, console=Console(file=sys.stderr), disable=not sys.stderr.isatty())
        self._task = self._bar.add_task("load")

    def update(self, done: int, total: int) -> None:
        """`done` of `total` tensors are loaded."""
        if done == 1:
            self._bar.start()
        self._bar.update(self._task, completed=done, total=total)
        if done == total:
            self._bar.stop()
