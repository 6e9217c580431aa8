"""Progress of a long evaluation: one bar for all candidates with the time left, and a line for each.

Owns what is written to standard error. Knows no models. Invariant: the bar shows only on a terminal, lines
always, so that a log tells how far it came.
"""

from __future__ import annotations

import sys

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)


class Meter:
    """Over `num_candidates` that take `num_tokens` to compute together."""

    def __init__(self, num_candidates: int, num_tokens: int) -> None:
        self._console = Console(file=sys.stderr)
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            TextColumn("left:"),
            TimeRemainingColumn(),
            console=self._console,
            disable=not sys.stderr.isatty(),
        )
        self._num_candidates, self._num_done = num_candidates, 0
        self._task = self._bar.add_task("", total=max(1, num_tokens))
        if num_candidates:
            self._bar.start()

    def loading(self, name: str) -> None:
        """The weights of a candidate are being loaded."""
        self._describe(name, "loading")

    def phase(self, name: str, what: str) -> None:
        """What is being done now."""
        self._describe(name, what)

    def advance(self, num_tokens: int) -> None:
        """So many tokens more have been computed."""
        self._bar.advance(self._task, num_tokens)

    def finished(self, name: str, seconds: float) -> None:
        """A candidate is done."""
        self._num_done += 1
        line = f"{self._num_done} of {self._num_candidates} done: {name} ({seconds:.0f} s)"
        self._console.print(line, highlight=False, markup=False)

    def close(self) -> None:
        """Leave the terminal as it was."""
        self._bar.stop()

    def _describe(self, name: str, what: str) -> None:
        shown = f"{self._num_done + 1}/{self._num_candidates} {name}: {what}"
        self._bar.update(self._task, description=shown.replace("[", r"\["))
