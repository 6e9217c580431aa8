"""A progress bar for work whose size is known: loading weights, generating for many prompts."""

from __future__ import annotations

import sys

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)


class ProgressBar:
    """A labelled bar on standard error, shown only on a terminal, from the first update to the last."""

    def __init__(self, label: str) -> None:
        times = (TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
        columns = (TextColumn(label), BarColumn(), MofNCompleteColumn(), *times)
        self._bar = Progress(*columns, console=Console(file=sys.stderr), disable=not sys.stderr.isatty())
        self._task = self._bar.add_task(label)

    def update(self, done: int, total: int) -> None:
        """`done` of `total` parts of the work are done."""
        if not self._bar.live.is_started:
            self._bar.start()
        self._bar.update(self._task, completed=done, total=total)
        if done == total:
            self._bar.stop()

    def close(self) -> None:
        """Leave the terminal as it was, if the work ended early."""
        self._bar.stop()
