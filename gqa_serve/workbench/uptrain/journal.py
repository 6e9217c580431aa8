"""What a run says while it goes: a progress bar, and one line of JSON per step in a file.

Owns the file's format and the display. Knows no tensors.
Invariant: the file tells the history of the weights that are: a resumed run first drops the lines of steps
that it does again.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from gqa_serve.errors import ModelError

_PLAIN_SECONDS = 30.0  # between lines where there is no terminal to draw a bar on


class Journal:
    """Lines {"step", "tokens", "loss", ...}, one per step. `after`: the step that the run goes on from."""

    def __init__(self, path: Path, after: int) -> None:
        self.path = path
        kept = [entry for entry in read_journal(path) if entry["step"] <= after] if path.exists() else []
        partial = path.with_suffix(".partial")
        partial.write_text("".join(json.dumps(entry) + "\n" for entry in kept), encoding="utf-8")
        os.replace(partial, path)
        self.stream = path.open("a", encoding="utf-8")

    def write(self, entry: Mapping[str, Any]) -> None:
        self.stream.write(
            json.dumps({key: value for key, value in entry.items() if value is not None}) + "\n"
        )
        self.stream.flush()

    def close(self) -> None:
        self.stream.close()


def read_journal(path: Path) -> list[dict[str, Any]]:
    """All lines; a last one that a kill cut short is left out. Raises ModelError for other damage."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    entries = []
    for number, line in enumerate(lines, start=1):
        try:
            entries.append(json.loads(line))
        except ValueError as error:
            if number == len(lines) and not line.endswith("\n"):
                break
            raise ModelError(
                f"{path}, line {number} is damaged; delete the line, or use --restart."
            ) from error
    return entries


class Display:
    """The bar on a terminal; elsewhere a line every half minute. All on standard error."""

    def __init__(self, num_steps: int, tokens_per_step: int, done: int) -> None:
        self.num_steps = num_steps
        self.tokens_per_step = tokens_per_step
        self.began = time.monotonic()
        self.began_at = done
        self.printed = self.began
        self.console = Console(file=sys.stderr)
        columns = (
            TextColumn("step {task.completed:.0f}/{task.total:.0f}"),
            BarColumn(),
            TextColumn("{task.fields[said]}"),
            TimeElapsedColumn(),
        )
        self.bar = Progress(*columns, console=self.console, disable=not self.console.is_terminal)
        self.task = self.bar.add_task("", total=num_steps, completed=done, said="")
        self.validation = ""
        self.bar.start()

    def step(self, done: int, loss: float) -> None:
        """`done` steps are done."""
        now = time.monotonic()
        seconds = max(1e-9, (now - self.began) / max(1, done - self.began_at))
        speed = self.tokens_per_step / seconds
        left = _duration((self.num_steps - done) * seconds)
        said = f"loss {loss:.4f}{self.validation}  {speed:,.0f} tokens/s  {left} left"
        self.bar.update(self.task, completed=done, said=said)
        if not self.console.is_terminal and (now - self.printed >= _PLAIN_SECONDS or done == self.num_steps):
            self.printed = now
            self.say(f"step {done}/{self.num_steps}  {said}")

    def validated(self, loss: float) -> None:
        self.validation = f"  validation {loss:.4f}"

    def say(self, text: str) -> None:
        """A line that stays."""
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def close(self) -> None:
        self.bar.stop()


def _duration(seconds: float) -> str:
    """3:25:09, 25:09, 0:09."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"
