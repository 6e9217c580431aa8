"""Running the cases of `bench engine` on one or several loaded engines, by turns.

Owns which cases there are by default, which of them fit, and the results. Knows no flags and no tables.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gqa_serve.errors import ConfigError
from gqa_serve.workbench.bench.case_progress import CaseProgress
from gqa_serve.workbench.bench.engine_cases import (
    Case,
    CaseRunner,
    DecodeCase,
    MixedCase,
    PrefillCase,
    Timing,
    require_room,
)
from gqa_serve.workbench.bench.loaded_engine import LoadedEngine
from gqa_serve.workbench.bench.measured import Measured, num_runs, rounds_of
from gqa_serve.workbench.step_samples import StepSample


@dataclass(frozen=True)
class Grid:
    """Which cases to measure: every batch size at every context, every prompt, and prompts beside batches."""

    batch_sizes: Sequence[int]
    context_lens: Sequence[int]
    prompt_lens: Sequence[int]
    num_prompts: Sequence[int] = (1,)
    mixed_batch_sizes: Sequence[int] = (8,)
    mixed_prompt_lens: Sequence[int] = (256,)

    def cases(self, parts: Sequence[str]) -> list[Case]:
        """The decoding ones, then prompts, then both at once, as far as `parts` names them."""
        return [case for part in ("decode", "prefill", "mixed") if part in parts for case in self._part(part)]

    def _part(self, part: str) -> Iterator[Case]:
        if part == "decode":
            for context_len in self.context_lens:
                for batch_size in self.batch_sizes:
                    yield DecodeCase(batch_size, context_len)
        elif part == "prefill":
            for count in self.num_prompts:
                for prompt_len in self.prompt_lens:
                    yield PrefillCase(count, prompt_len)
        else:
            for batch_size in self.mixed_batch_sizes:
                for prompt_len in self.mixed_prompt_lens:
                    yield MixedCase(batch_size, self.context_lens[0], prompt_len)


DEFAULT = Grid((1, 4, 16), (256, 2048), (128, 512, 2048))
QUICK = Grid((1, 8), (512,), (512,))
FIT = Grid(
    (1, 2, 4, 8, 16, 32),
    (64, 512, 2048),
    (20, 75, 230, 1000, 3000),
    (1,),
    (2, 8, 16),
    (30, 110, 250),
)
"""For `--steps`: what a cost model needs to tell apart, batch size from context from tokens of prompts.

Prompts have no round lengths: matrix kernels compute whole tiles of rows, so that the multiples of a tile,
which real prompts seldom are, cost less for each token than all others.
"""


@dataclass(frozen=True)
class CaseResult:
    """A case on one engine, `variant`, in every round."""

    variant: str
    case: Case
    timings: tuple[Timing, ...]

    def step_s(self) -> Measured:
        """The middle one of each round's steps."""
        return Measured(tuple(timing.step_s for timing in self.timings))

    def seconds(self) -> Measured:
        """All steps of each round."""
        return Measured(tuple(timing.seconds for timing in self.timings))

    def alone_s(self) -> Measured:
        """Of a mixed case: the middle one of each round's steps before the prompt came."""
        return Measured(tuple(timing.alone_s for timing in self.timings))

    def to_json(self) -> dict[str, Any]:
        """Every round, for programs."""
        return {
            "variant": self.variant,
            "case": str(self.case),
            "step_s": list(self.step_s().values),
            "seconds": list(self.seconds().values),
        }

    def samples(self) -> list[StepSample]:
        return [sample for timing in self.timings for sample in (*timing.alone, *timing.samples)]


def fitting(
    cases: Sequence[Case], *, max_model_len: int, kv_tokens: int, max_num_seqs: int
) -> tuple[list[Case], list[Case]]:
    """Those that an engine with such a context and cache can hold, and those that it can't."""
    fits, too_large = [], []
    for case in cases:
        try:
            require_room(case, max_model_len, kv_tokens, max_num_seqs)
        except ConfigError:
            too_large.append(case)
        else:
            fits.append(case)
    return fits, too_large


def measure(
    engines: Mapping[str, LoadedEngine],
    cases: Sequence[Case],
    rounds: int,
    progress: CaseProgress,
    *,
    compute_prompts: bool = False,
    warm_up: bool = True,
) -> list[CaseResult]:
    """Every case on every engine, once a round; a case runs on all engines before the next begins."""
    runners = {
        name: CaseRunner(loaded.recorder, loaded.config, compute_prompts=compute_prompts)
        for name, loaded in engines.items()
    }
    pairs = [(name, case) for case in cases for name in runners]

    def run(name: str, case: Case) -> Timing:
        progress.label(f"{name}: {case}" if len(engines) > 1 else str(case))
        return runners[name].run(case)

    work: list[Callable[[], Timing]] = [functools.partial(run, name, case) for name, case in pairs]
    total = num_runs(len(work), rounds, warm_up=warm_up)
    with progress.task("Measuring") as update:
        timings = rounds_of(work, rounds, warm_up=warm_up, on_done=lambda done: update(done, total))
    return [CaseResult(name, case, tuple(of)) for (name, case), of in zip(pairs, timings, strict=True)]
