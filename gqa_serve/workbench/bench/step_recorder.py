"""What each step of an engine computed and how long it took, as `StepSample`s.

Owns a runner that stands between the engine and the real one: it notes the shape of every plan and, when it
is told to, leaves the computing out. Engine, scheduler and sampler are the server's own and notice nothing.
Invariant: a sample is of a step that was really computed, in one piece.

Prompts that only set the scene (a batch that decodes over a long context) needn't be computed, because how
long a step takes depends on how much K and V it reads, not on what they say: `leave_out` skips them, over a
cache that `kv_fill.py` has filled with random numbers.
"""

from __future__ import annotations

import collections
import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gqa_serve.engine.batch import PlanRow, StepPlan
from gqa_serve.engine.core import Engine, Runner
from gqa_serve.engine.request import ModelInfo, TokenOutput
from gqa_serve.workbench.step_samples import StepSample

if TYPE_CHECKING:
    import torch

    from gqa_serve.engine.sampler import RowOperations


@dataclass(frozen=True)
class StepShape:
    """A plan without its tokens: (query_len, context_len) of each row, new tokens included, and how many
    rows got a token."""

    lens: tuple[tuple[int, int], ...]
    num_sampled: int

    @classmethod
    def of(cls, rows: Sequence[PlanRow]) -> StepShape:
        lens = tuple((len(row.token_ids), row.start + len(row.token_ids)) for row in rows)
        return cls(lens, sum(row.num_logits > 0 for row in rows))

    def sample(self, seconds: float, forward_s: float) -> StepSample:
        decoded = [context_len for query_len, context_len in self.lens if query_len == 1]
        return StepSample(
            num_decode=len(decoded),
            decode_context_tokens=sum(decoded),
            chunks=tuple((query, context) for query, context in self.lens if query > 1),
            num_sampled=self.num_sampled,
            seconds=seconds,
            forward_s=forward_s,
        )


class StepRecorder:
    """A `Runner` that passes plans on and notes their shapes, in order, in `shapes`."""

    def __init__(self, runner: Runner) -> None:
        self.runner = runner
        self.shapes: list[StepShape] = []
        self.computes = True
        # A row that the sampler can work with where nothing is computed: of the right type, on the device.
        hidden = runner.execute(StepPlan([PlanRow([0], 0, [0], 1)]))
        self._blank = hidden[:1].clone()

    @property
    def info(self) -> ModelInfo:
        return self.runner.info

    @property
    def eos_token_ids(self) -> Sequence[int]:
        return self.runner.eos_token_ids

    @property
    def row_operations(self) -> RowOperations | None:
        return self.runner.row_operations

    @property
    def lookahead(self) -> bool:
        return self.runner.lookahead

    def execute(self, plan: StepPlan, previous: torch.Tensor | None = None) -> torch.Tensor:
        self.shapes.append(StepShape.of(plan.rows))
        if self.computes:
            return self.runner.execute(plan, previous)
        num_rows = sum(row.num_logits for row in plan.rows)
        return self._blank.expand(num_rows, *self._blank.shape[1:])

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.runner.logits(hidden)


class StepTimer:
    """Steps an engine over a `StepRecorder`, one sample a step. `now` is the clock, in seconds."""

    def __init__(
        self, engine: Engine, recorder: StepRecorder, now: Callable[[], float] = time.perf_counter
    ) -> None:
        self.engine = engine
        self._recorder = recorder
        self._now = now
        self._in_flight: collections.deque[StepShape] = collections.deque()
        self.last: StepSample | None = None
        """Of the last step; None if it computed nothing, or in pieces because memory ran out."""

    def step(self) -> list[TokenOutput]:
        """One step; the engine's outputs."""
        self._recorder.shapes.clear()
        began = self._now()
        outputs = self.engine.step()
        seconds = self._now() - began
        self.last = self._sample(seconds)
        return outputs

    def _sample(self, seconds: float) -> StepSample | None:
        """Over a device that works on its own, a call launches one step and waits for the one before: its
        time is that one's, and the device works all the while."""
        shapes, stats = list(self._recorder.shapes), self.engine.stats
        if not self._recorder.lookahead:
            return shapes[0].sample(seconds, stats.forward_s) if len(shapes) == 1 else None
        if len(shapes) > 1:
            self._in_flight.clear()
            return None
        earlier = self._in_flight.popleft() if self._in_flight else None
        self._in_flight.extend(shapes)
        return None if earlier is None else earlier.sample(seconds, seconds)

    @contextlib.contextmanager
    def leave_out(self) -> Iterator[None]:
        """Steps inside compute nothing, though the engine takes them for real; and take no time, so that the
        scheduler, which learns from it what tokens cost, isn't told."""
        scheduler = self.engine.scheduler
        self._recorder.computes = False
        setattr(scheduler, "took", lambda scheduled, seconds: None)  # noqa: B010 - for this instance alone
        try:
            yield
        finally:
            self._recorder.computes = True
            delattr(scheduler, "took")
