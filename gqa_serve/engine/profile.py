"""`StepProfile`: a torch profile of some engine steps, as a trace that Perfetto and chrome://tracing show.

Owns the profiler and the names of what it shows: the parts of a step get a range of their own, put around the
engine's methods only while a profile runs, so that none costs nothing. Knows no messages. Invariant: computes
nothing itself, and leaves engine and profiler as it found them.
"""

from __future__ import annotations

import functools
import gzip
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

if TYPE_CHECKING:
    from gqa_serve.engine.core import Engine


class StepProfile:
    """Runs from its creation to `finish`."""

    def __init__(self, engine: Engine, num_steps: int) -> None:
        self._num_wanted = num_steps
        self.num_steps = 0
        """Steps so far that computed something."""
        activities = [ProfilerActivity.CPU]
        if torch.cuda.is_available() and engine.info.device.startswith("cuda"):
            activities.append(ProfilerActivity.CUDA)
        self._profiler = profile(activities=activities)
        self._wrapped: list[tuple[Any, str]] = []
        self._profiler.start()  # may raise, and nothing is wrapped yet
        try:
            self._wrap_steps(engine)
        except BaseException:
            self.discard()  # torch's profiler is one per process, and a process that ends under it crashes
            raise

    def _wrap_steps(self, engine: Engine) -> None:
        for owner, name, shown in (
            (engine, "step", "step"),
            (engine.scheduler, "schedule", "schedule"),
            (engine.runner, "execute", "forward"),
            (engine.runner, "logits", "logits"),
            (engine.sampler, "launch", "sample"),
            (engine, "_collect", "collect"),
        ):
            self._wrap(owner, name, shown)

    def _wrap(self, owner: Any, name: str, shown: str) -> None:
        method: Callable[..., Any] = getattr(owner, name)

        @functools.wraps(method)
        def ranged(*args: Any, **options: Any) -> Any:
            with record_function(f"gqa_serve.{shown}"):
                return method(*args, **options)

        setattr(owner, name, ranged)
        self._wrapped.append((owner, name))

    def stepped(self, num_requests: int) -> bool:
        """A step of so many requests is done; whether it was the last."""
        self.num_steps += num_requests > 0
        return self.num_steps >= self._num_wanted

    def finish(self) -> bytes:
        """End it; the trace as JSON, packed with gzip. The engine stands still meanwhile."""
        self.discard()
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "trace.json"
            self._profiler.export_chrome_trace(str(path))
            return gzip.compress(path.read_bytes(), compresslevel=1)

    def discard(self) -> None:
        """End it; nobody wants the trace."""
        for owner, name in self._wrapped:
            delattr(owner, name)  # what the class has is there again
        self._wrapped = []
        self._profiler.stop()
