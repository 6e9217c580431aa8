"""The cases of `bench engine`: decoding, prompts, and both at once, each run once by one call.

Owns what a case does with an engine and what it measures. An engine is the server's own: requests go through
its scheduler, KV manager and sampler. Knows no reports and no files.
Invariant: a case leaves the engine empty, and raises rather than measure something other than it says.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from gqa_serve.config import EngineConfig
from gqa_serve.engine.core import Engine
from gqa_serve.engine.request import EngineRequest, SamplingParams
from gqa_serve.errors import ConfigError, EngineStepError
from gqa_serve.workbench.bench.step_recorder import StepRecorder, StepTimer
from gqa_serve.workbench.step_samples import StepSample

DECODE_STEPS = 8  # timed at once
WARM_UP_STEPS = 2
_ANY = 1 << 40  # tokens in a step
_SLACK = 4  # steps more than are timed: the first token comes with the prompt, a step may be in flight


@dataclass(frozen=True)
class DecodeCase:
    """`batch_size` requests that decode; the middle of the timed steps is at `context_len` tokens."""

    batch_size: int
    context_len: int

    @property
    def growth(self) -> int:
        """Tokens that each request gets."""
        return WARM_UP_STEPS + DECODE_STEPS + _SLACK

    @property
    def prompt_len(self) -> int:
        return max(1, self.context_len - WARM_UP_STEPS - DECODE_STEPS // 2)

    def longest(self) -> int:
        """Tokens of its longest request."""
        return self.prompt_len + self.growth

    def kv_tokens(self) -> int:
        """KV slots it needs, but for the last blocks that are not full."""
        return self.batch_size * self.longest()

    def requests(self) -> int:
        return self.batch_size

    def __str__(self) -> str:
        return f"decode, batch {self.batch_size}, context {self.context_len:,}"


@dataclass(frozen=True)
class PrefillCase:
    """`num_prompts` prompts of `prompt_len` tokens that arrive together, up to their first tokens."""

    num_prompts: int
    prompt_len: int

    def longest(self) -> int:
        return self.prompt_len + 1

    def kv_tokens(self) -> int:
        return self.num_prompts * self.longest()

    def requests(self) -> int:
        return self.num_prompts

    def __str__(self) -> str:
        prompts = "one prompt" if self.num_prompts == 1 else f"{self.num_prompts} prompts"
        return f"{prompts} of {self.prompt_len:,}"


@dataclass(frozen=True)
class MixedCase:
    """One prompt of `prompt_len` tokens that arrives while `batch_size` requests decode at `context_len`.

    How much of it goes into a step is the scheduler's decision, as in the server.
    """

    batch_size: int
    context_len: int
    prompt_len: int

    @property
    def growth(self) -> int:
        """Tokens that each decoding request may get: a step may compute as few as 16 of a prompt."""
        return WARM_UP_STEPS + DECODE_STEPS + -(-self.prompt_len // 16) + _SLACK

    def longest(self) -> int:
        return max(self.context_len + self.growth, self.prompt_len + 1)

    def kv_tokens(self) -> int:
        return self.batch_size * (self.context_len + self.growth) + self.prompt_len + 1

    def requests(self) -> int:
        return self.batch_size + 1

    def __str__(self) -> str:
        return f"prompt of {self.prompt_len:,} beside {self.batch_size} decoding"


Case = DecodeCase | PrefillCase | MixedCase


@dataclass(frozen=True)
class Timing:
    """One run of a case: its timed steps; `alone` are those of a mixed case before the prompt came."""

    samples: tuple[StepSample, ...]
    alone: tuple[StepSample, ...] = ()

    @property
    def seconds(self) -> float:
        """All timed steps together."""
        return sum(sample.seconds for sample in self.samples)

    @property
    def step_s(self) -> float:
        """The middle one of the steps."""
        return statistics.median(sample.seconds for sample in self.samples)

    @property
    def alone_s(self) -> float:
        """The middle one of the steps before the prompt came."""
        return statistics.median(sample.seconds for sample in self.alone)


class CaseRunner:
    """Runs cases over one recorder, each on a fresh engine: nothing is in its prefix cache, and its scheduler
    has learned nothing of another case. `now` is the clock."""

    def __init__(
        self,
        recorder: StepRecorder,
        config: EngineConfig,
        *,
        compute_prompts: bool = False,
        now: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._recorder = recorder
        self._config = config
        self._compute_prompts = compute_prompts
        self._now = now
        self._numbers = random.Random(0)
        self._names = itertools.count()
        self._start()

    def run(self, case: Case) -> Timing:
        """Raises ConfigError where the engine can't hold the case."""
        info = self._recorder.info
        require_room(case, info.max_model_len, info.num_blocks * info.block_size, self._config.max_num_seqs)
        self._start(whole_prompts=not isinstance(case, PrefillCase))
        try:
            if isinstance(case, DecodeCase):
                return self._decode(case)
            if isinstance(case, PrefillCase):
                return self._prefill(case)
            return self._mixed(case)
        finally:
            self._empty()

    def _start(self, *, whole_prompts: bool = False) -> None:
        """An engine; `whole_prompts`: that takes all prompts at once into its first step."""
        config = self._config
        if whole_prompts:
            config = dataclasses.replace(config, max_num_batched_tokens=_ANY)
        self._engine = Engine(self._recorder, config)
        self._timer = StepTimer(self._engine, self._recorder, self._now)

    def _decode(self, case: DecodeCase) -> Timing:
        self._begin(case.batch_size, case.prompt_len, case.growth)
        return Timing(self._decode_steps(case.batch_size))

    def _decode_steps(self, batch_size: int) -> tuple[StepSample, ...]:
        """After the warm-up, steps in which all requests decode and nothing else happens."""
        for _ in range(WARM_UP_STEPS):
            self._advance()
        samples = tuple(self._step() for _ in range(DECODE_STEPS))
        for sample in samples:
            if sample.num_decode != batch_size or sample.chunks:
                raise RuntimeError(f"A step was to decode {batch_size} requests, but it computed {sample}.")
        return samples

    def _prefill(self, case: PrefillCase) -> Timing:
        waiting = set(self._add(case.num_prompts, case.prompt_len, max_tokens=1))
        samples = []
        while waiting:
            waiting -= self._advance()
            if self._timer.last is not None:
                samples.append(self._timer.last)
        if (
            sum(query for sample in samples for query, _ in lens_of(sample))
            != case.num_prompts * case.prompt_len
        ):
            raise RuntimeError(f"{case}: the steps computed something else: {samples}.")
        return Timing(tuple(samples))

    def _mixed(self, case: MixedCase) -> Timing:
        self._run_alone(min(case.prompt_len, self._config.max_num_batched_tokens))
        self._begin(case.batch_size, case.context_len, case.growth)
        alone = self._decode_steps(case.batch_size)
        (prompt,) = self._add(1, case.prompt_len, max_tokens=1)
        samples = []
        arrived = False
        while not arrived:
            arrived = prompt in self._advance()
            last = self._timer.last
            if last is not None and last.num_decode + len(last.chunks) > case.batch_size:
                samples.append(last)
        return Timing(tuple(samples), alone)

    def _run_alone(self, prompt_len: int) -> None:
        """A prompt with nothing beside it, untimed, from which the scheduler learns what its tokens cost."""
        self._until_first_tokens(set(self._add(1, prompt_len, max_tokens=1)))

    def _begin(self, count: int, prompt_len: int, max_tokens: int) -> None:
        """Requests that all decode; their prompts are a single step, computed or left out."""
        waiting = set(self._add(count, prompt_len, max_tokens))
        with contextlib.nullcontext() if self._compute_prompts else self._timer.leave_out():
            self._until_first_tokens(waiting)
        # From the step after the next on, which warms up, the user's budget holds.
        self._engine.scheduler.limits.max_num_batched_tokens = self._config.max_num_batched_tokens

    def _until_first_tokens(self, waiting: set[str]) -> None:
        while waiting:
            waiting -= self._advance()

    def _advance(self) -> set[str]:
        """One step; who got a token. Raises EngineStepError if it failed, which would be a fast one."""
        outputs = self._timer.step()
        for output in outputs:
            if output.error is not None:
                raise EngineStepError(output.error)
        return {output.request_id for output in outputs}

    def _step(self) -> StepSample:
        self._advance()
        if self._timer.last is None:
            raise RuntimeError("A step computed nothing, or not in one piece.")
        return self._timer.last

    def _add(self, count: int, prompt_len: int, max_tokens: int) -> list[str]:
        """Queue greedy requests that don't stop early; their ids."""
        params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
        vocab_size = self._engine.info.vocab_size
        names = []
        for _ in range(count):
            names.append(f"bench-{next(self._names)}")
            prompt = [self._numbers.randrange(vocab_size) for _ in range(prompt_len)]
            self._engine.add(EngineRequest(request_id=names[-1], prompt=prompt, params=params))
        return names

    def _empty(self) -> None:
        """End all requests, and collect what is in flight."""
        for request in [*self._engine.scheduler.running, *self._engine.scheduler.waiting]:
            self._engine.abort(request.request_id)
        while self._engine.has_work:
            self._timer.step()


def lens_of(sample: StepSample) -> Sequence[tuple[int, int]]:
    """(query_len, context_len) of every row; decoding ones at their mean context."""
    mean = sample.decode_context_tokens // max(1, sample.num_decode)
    return [(1, mean)] * sample.num_decode + list(sample.chunks)


def require_room(case: Case, max_model_len: int, kv_tokens: int, max_num_seqs: int) -> None:
    """Raise ConfigError, telling what to change, if such an engine can't hold the case."""
    if case.requests() > max_num_seqs:
        raise ConfigError(
            f"{case}: {case.requests()} requests at once need --max-num-seqs {case.requests()}."
        )
    if case.longest() > max_model_len:
        raise ConfigError(
            f"{case}: its longest request has {case.longest():,} tokens, but the model's context is "
            f"{max_model_len:,}; measure at a shorter one."
        )
    need = case.kv_tokens() + 16 * case.requests()  # a last block of each that is not full
    if need > kv_tokens:
        raise ConfigError(
            f"{case}: it needs a KV cache of {need:,} tokens, but there are "
            f"{kv_tokens:,}; raise --kv-cache-memory, or measure a smaller batch or context."
        )
