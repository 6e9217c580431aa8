"""Engine: add, abort, step. Synchronous, no I/O, no text.

Owns the life of a request inside the engine: from `add`, through steps, to exactly one TokenOutput with a
`finish_reason` (or none, after `abort`). `Scheduler` decides, the runner computes, `Sampler` chooses.

A step is launched and later collected. Over a runner that computes when it is called, at once. Over one that
only tells its device what to do (`Runner.lookahead`), after the next has been launched, so that the device
never waits for the host:

    step()    launch 1
    step()    launch 2   collect 1     2 continues from tokens that only the device knows
    step()    launch 3   collect 2     what 2 computed for a request that ended in 1 is dropped

A request with a grammar waits outside the scheduler until its constraint is there. From then on the host must
know its last token before its next step is launched; that token given, the constraint names the tokens that
must follow, which are computed like a piece of prompt, and another thread computes the mask of the one after
them: beside the sending of outputs and the planning of the next step, and on a GPU beside that step itself.

The device works in the order it is told. Blocks freed while a step in flight still writes to them may thus be
handed out at once: whoever gets them writes later.

A step that raises fails only the requests of its plan, and of one launched on top of it: they end with
"error", their blocks are freed, and the engine goes on. If memory runs out while it is launched, nothing has
changed yet, and its plan is launched in parts, down to one token of one request. An exception of the
scheduler itself is not caught: its state can't be trusted then, and whoever runs the engine must replace it.
Nor is RanksLostError, for the same reason.
"""

from __future__ import annotations

import logging
import random
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np

from gqa_serve.engine.batch import StepPlan
from gqa_serve.engine.block_pool import BlockPool
from gqa_serve.engine.constrained import ConstrainedRequests, with_masks
from gqa_serve.engine.constraints import ConstraintError, ConstraintService
from gqa_serve.engine.endings import Ending, Endings
from gqa_serve.engine.hidden_rows import PooledStates, PromptScores, fetch_states, last_rows, score_prompts
from gqa_serve.engine.kv_manager import KVManager
from gqa_serve.engine.metrics import EngineSnapshot, StepStats
from gqa_serve.engine.out_of_memory import is_out_of_memory
from gqa_serve.engine.pace import Pace
from gqa_serve.engine.request import EngineRequest, ModelInfo, Request, TokenOutput
from gqa_serve.engine.sampler import Pending, RowOperations, Sample, Sampler
from gqa_serve.engine.scheduler import Scheduled, Scheduler, SchedulerLimits
from gqa_serve.engine.stock import StockTaker
from gqa_serve.engine.transfer import select_rows
from gqa_serve.errors import ContextLengthError, RanksLostError, RequestError

if TYPE_CHECKING:
    import torch

    from gqa_serve.config import EngineConfig

logger = logging.getLogger(__name__)

_NOT_FINITE = "The hidden states of this request are not finite."
_FEW_REQUESTS = 8
_NO_TOKEN = "The logits of this request are not finite, or its parameters leave no token to choose."


class Runner(Protocol):
    """What the engine needs of a model runner."""

    @property
    def info(self) -> ModelInfo:
        """Sizes and names of the loaded model."""

    @property
    def eos_token_ids(self) -> Sequence[int]:
        """Tokens that end a sequence."""

    @property
    def row_operations(self) -> RowOperations | None:
        """What the sampler computes rows of logits with; None for plain torch."""

    @property
    def lookahead(self) -> bool:
        """Whether `execute` and `logits` return before the device has computed."""

    def execute(self, plan: StepPlan, previous: torch.Tensor | None = None) -> torch.Tensor:
        """Compute the plan; hidden states [R, E] of the rows whose logits it asks for.

        `previous` [R'] int64: what the step in flight samples, for rows that have a `previous_row`.
        """

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[R, E] -> [R, V] float32, which the next call may overwrite."""


@dataclass
class _Step:
    """A step in flight: its rows, who gets a token from it or ends with its prompt, and where tokens, prompt
    log-probabilities and hidden states to be pooled (with the row they are of) will be."""

    scheduled: Scheduled
    sampling: list[Request]
    prompt_only: list[Request]
    samples: Pending | None
    prompt_scores: list[PromptScores]
    pooled: list[PooledStates]


class Engine:
    """One model, one KV cache, many requests."""

    def __init__(
        self, runner: Runner, config: EngineConfig, constraints: ConstraintService | None = None
    ) -> None:
        self.runner = runner
        self._constrained = ConstrainedRequests(constraints)
        self.info = runner.info
        limits = SchedulerLimits(config.max_num_seqs, config.max_num_batched_tokens)
        kv = KVManager(BlockPool(self.info.num_blocks, self.info.block_size))
        pace = None if runner.lookahead else Pace()
        self.scheduler = Scheduler(kv, limits, prefix_caching=config.prefix_caching, pace=pace)
        self.sampler = Sampler(runner.eos_token_ids, runner.row_operations)
        self._endings = Endings(runner.eos_token_ids)
        self._seeds = random.Random(config.seed)
        self._arrivals = 0
        self._in_flight: deque[_Step] = deque()
        self.num_failed_steps = 0
        """Steps that failed since the last that succeeded."""
        self.num_discarded_tokens = 0
        self._stock = StockTaker(self.scheduler)
        self.stats = StepStats()
        """What the last step did."""
        self.on_begin: Callable[[list[str]], None] = _ignore
        """Called with the ids of requests before the step that computes them first."""

    @property
    def num_requests(self) -> int:
        """Requests that have not ended."""
        return len(self.scheduler) + len(self._constrained)

    @property
    def has_work(self) -> bool:
        """Whether a step would compute or collect something, or wait for a constraint."""
        return self.num_requests > 0 or len(self._in_flight) > 0

    def add(self, spec: EngineRequest) -> None:
        """Queue a request. Raises RequestError (and queues nothing) if it can't be computed."""
        self._check(spec)
        seed = self._seeds.getrandbits(63) if spec.params.seed is None else spec.params.seed
        request = Request(spec, self._arrivals, seed, self.info.max_model_len)
        self._arrivals += 1
        if not self._constrained.add(request):
            self.scheduler.add(request)

    def abort(self, request_id: str) -> bool:
        """End a request at once, freeing its blocks, without an output. False if it has ended already."""
        if self._constrained.discard(request_id):
            return True
        self.sampler.forget(request_id)
        return self.scheduler.remove(request_id) is not None

    def snapshot(self) -> EngineSnapshot:
        """The engine at this moment: its blocks, and its requests in the order in which they are computed."""
        return self._stock.snapshot(self._constrained.requests)

    def step(self) -> list[TokenOutput]:
        """Launch a step and collect one; the outputs of the requests that got tokens or ended in that.

        `stats` then says what it did.
        """
        stats = self.stats = self._stock.begin()
        with stats.timing("step_s"):
            outputs = self._step()
        self._stock.complete(self._constrained.requests)
        return outputs

    def _step(self) -> list[TokenOutput]:
        outputs = self._admit_constrained()
        if any(request.needs_last_token for step in self._in_flight for request in step.sampling):
            outputs += self._collect()
        self._constrained.prepare_masks()
        with self.stats.timing("schedule_s"):
            scheduled = self.scheduler.schedule()
        if not self.runner.lookahead:  # the model computes on the cores that the masks need
            scheduled = with_masks(scheduled)
        self._begin([request for request, _ in scheduled if request.queue_s is None])
        if scheduled:
            outputs += self._compute(scheduled)
        else:
            outputs += self._collect_but(0)
        self._constrained.prepare_masks()
        return outputs

    def _begin(self, requests: Sequence[Request]) -> None:
        """These will be computed now for the first time."""
        for request in requests:
            request.queue_s = time.monotonic() - request.added_s
        if requests:
            self.on_begin([request.request_id for request in requests])

    def _compute(self, scheduled: Scheduled) -> list[TokenOutput]:
        """Launch a plan, in parts if memory runs out, and collect what need not stay in flight."""
        outputs: list[TokenOutput] = []
        parts = [scheduled]
        while parts:
            part = parts.pop()
            began = time.perf_counter()
            try:
                self._in_flight.append(self._launch(part))
            except RanksLostError:
                raise  # whoever runs the engine must replace it
            except Exception as error:
                outputs += self._collect_but(0)
                smaller = self.scheduler.halves(part) if is_out_of_memory(error) else []
                if not smaller:
                    outputs += self._fail(part, error)
                elif not self.stats.num_shrunk:
                    logger.warning(
                        "Memory ran out in a step of %d requests; computing it in parts.", len(part)
                    )
                    self.scheduler.shrink(part)
                self.stats.num_shrunk += bool(smaller)
                parts += reversed(smaller)
            else:
                self._stock.computing(part)
                outputs += self._collect_but(1 if self.runner.lookahead else 0)
                self.scheduler.took(part, time.perf_counter() - began)
        return outputs

    def _collect_but(self, ahead: int) -> list[TokenOutput]:
        """Collect the steps in flight, all but the last `ahead`."""
        outputs = []
        while len(self._in_flight) > ahead:
            outputs += self._collect()
        return outputs

    def _check(self, spec: EngineRequest) -> None:
        if self.scheduler.get(spec.request_id) is not None or spec.request_id in self._constrained:
            raise RequestError(f"Request id {spec.request_id!r} is in use.")
        if not spec.prompt:
            raise RequestError("The prompt is empty.", param="prompt")
        spec.params.validate(self.info.vocab_size)
        self._constrained.check(spec.params)
        if spec.pooling is not None and spec.params.max_tokens != 0:
            raise RequestError("A request for pooling generates nothing: max_tokens must be 0.")
        if min(spec.prompt) < 0 or max(spec.prompt) >= self.info.vocab_size:
            raise RequestError("The prompt holds a token id outside the vocabulary.", param="prompt")
        if not all(0 <= token < self.info.vocab_size for token in spec.end_token_ids):
            raise RequestError("end_token_ids holds a token id outside the vocabulary.")
        scoring_only = spec.params.max_tokens == 0
        if len(spec.prompt) + (not scoring_only) > self.info.max_model_len:
            raise ContextLengthError(len(spec.prompt), self.info.max_model_len, param="prompt")

    def _admit_constrained(self) -> list[TokenOutput]:
        """Hand requests to the scheduler whose constraints are there; outputs of those that end by it."""
        outputs = []
        for request, error in self._constrained.take(idle=len(self.scheduler) == 0 and not self._in_flight):
            self.scheduler.add(request)
            end: Ending | None
            try:
                end = self._follow(request) if error is None else Ending.of_constraint(error)
            except ConstraintError as failure:
                end = Ending.of_constraint(failure)
            if end is not None:
                outputs.append(self._end(request, end))
        return outputs

    def _follow(self, request: Request) -> Ending | None:
        """After the last known token: append those that must come next, and tell whether that is the end.

        They are computed in the next step, as a chunk. Raises ConstraintError.
        """
        constraint = request.constraint
        assert constraint is not None
        if self._takes_forced_tokens(request) and not constraint.finished:
            forced = []
            for token in constraint.forced():
                if self._endings.bans(request, token):
                    break  # there will be no token to choose
                forced.append(token)
                request.tokens.append(token)
                request.num_tokens += 1
                if self._endings.of(request, token) is not None:
                    break
            request.unsent += forced
            constraint.append(forced)
            if forced and (end := self._endings.of(request, forced[-1])) is not None:
                return end
        if constraint.finished:
            return Ending("stop")
        params = request.params
        avoid_end = params.ignore_eos or len(request.tokens) - request.num_prompt_tokens < params.min_tokens
        self._constrained.moved_on(constraint, avoid_end=avoid_end)
        return None

    def _takes_forced_tokens(self, request: Request) -> bool:
        """Whether to append tokens that must come next; which changes no token, only when it is computed.

        With few requests a step's time is that of reading the weights, and a token more costs nothing. With
        many a CPU computes all the time, and is slower over an odd number of rows.
        """
        few = self.runner.lookahead or len(self.scheduler.running) <= _FEW_REQUESTS
        return request.takes_forced_tokens and (few or request.num_output_tokens == 0)

    def _launch(self, scheduled: Scheduled) -> _Step:
        """Tell the device to run the model over the plan and to sample. Changes no request if it raises."""
        previous = self._in_flight[-1].samples if self._in_flight else None
        plan = StepPlan([row for _, row in scheduled])
        tokens = None if previous is None or len(previous.tokens) == 0 else previous.tokens
        with self.stats.timing("forward_s"):
            hidden = self.runner.execute(plan, tokens)
        prompt_scores = score_prompts(scheduled, hidden, self.runner.logits, self.sampler)
        pooled = fetch_states(scheduled, hidden, self.sampler)
        ends = last_rows(scheduled)
        sampling = [request for request, _ in ends if request.params.max_tokens != 0]
        samples = None
        if sampling:
            rows = [row for request, row in ends if request.params.max_tokens != 0]
            with self.stats.timing("forward_s"):
                logits = self.runner.logits(select_rows(hidden, rows))
            with self.stats.timing("sample_s"):
                samples = self.sampler.launch(logits, sampling)
        elif not prompt_scores and not pooled:
            samples = self.sampler.nothing(hidden)
        for request, row in scheduled:
            self.scheduler.launched(request, row)
        for index, request in enumerate(sampling):
            request.num_tokens += 1
            request.sample_row = index
        prompt_only = [request for request, _ in ends if request.params.max_tokens == 0]
        return _Step(scheduled, sampling, prompt_only, samples, prompt_scores, pooled)

    def _collect(self) -> list[TokenOutput]:
        """Wait for the step that was launched first, and hand out what it gave."""
        step = self._in_flight.popleft()
        try:
            with self.stats.timing("sample_s"):
                samples = step.samples.result() if step.samples is not None else []
                scores = [
                    [entry for part in parts for entry in part.result()] for *_, parts in step.prompt_scores
                ]
                states = [pending.result() for *_, pending in step.pooled]
        except Exception as error:
            # What was launched on top of it read its tokens and its blocks.
            failed = [pair for failing in (step, *self._in_flight) for pair in failing.scheduled]
            self._in_flight.clear()
            return self._fail(failed, error)
        self.num_failed_steps = 0
        for (request, row, _), entries in zip(step.prompt_scores, scores, strict=True):
            request.add_prompt_logprobs(row.start, entries)
        for (request, row, _), hidden in zip(step.pooled, states, strict=True):
            request.pool.add(row.start, hidden)
        for request, row in step.scheduled:
            if self.scheduler.holds(request):
                self.scheduler.collected(request, row)
        outputs = []
        for request, sample in zip(step.sampling, samples, strict=True):
            if self.scheduler.holds(request):
                outputs.append(self._accept(request, sample))
            else:
                self.num_discarded_tokens += 1
                self.stats.num_discarded_tokens += 1
        return outputs + [self._end_prompt(r) for r in step.prompt_only if self.scheduler.holds(r)]

    def _end_prompt(self, request: Request) -> TokenOutput:
        """End a request that wanted nothing but its prompt computed: scored, pooled, or for the cache."""
        if request.spec.pooling is None:
            return self._end(request, Ending("length"))
        vector = request.pool.mean() if request.spec.pooling == "mean" else request.pool.last()
        if not np.isfinite(vector).all():
            return self._end(request, Ending("error", error=_NOT_FINITE))
        output = self._end(request, Ending("length"))
        output.pooled = vector.astype("<f4").tobytes()
        return output

    def _fail(self, scheduled: Scheduled, error: Exception) -> list[TokenOutput]:
        """End the requests of a plan that could not be computed, those that have not ended since."""
        self.num_failed_steps += 1
        self.stats.num_failed_steps += 1
        failed = {request: None for request, _ in scheduled if self.scheduler.holds(request)}
        logger.error("A step of %d requests failed; ending them.", len(failed), exc_info=error)
        message = f"The engine failed to compute this request ({type(error).__name__})."
        if is_out_of_memory(error):
            message = "There is not enough memory to compute this request. Try again later, or send less."
        return [self._end(request, Ending("error", error=message)) for request in failed]

    def _accept(self, request: Request, sample: Sample) -> TokenOutput:
        """Append a sampled token, with those that must follow it, and end the request if that ends it."""
        constraint = request.constraint
        if sample.token_id is None:
            error = constraint.error if constraint is not None else None
            refused = error is not None or request.params.allowed_token_ids is not None
            return self._end(request, Ending("error", error=error or _NO_TOKEN, refused=refused))
        token = sample.token_id
        request.tokens.append(token)
        request.unsent.append(token)
        end = self._endings.of(request, token)
        if constraint is not None and end is None:
            try:
                constraint.append([token])
                end = self._follow(request)
            except ConstraintError as failure:
                end = Ending.of_constraint(failure)
        if end is None:
            return self._output(request, sample)
        return self._end(request, end, sample)

    def _output(self, request: Request, sample: Sample | None = None) -> TokenOutput:
        output = TokenOutput(request_id=request.request_id, num_cached_tokens=request.num_cached_tokens)
        output.token_ids, request.unsent = request.unsent, []
        if sample is not None and sample.logprobs is not None:
            output.logprobs = [sample.logprobs]
        if request.scores_prompt:
            output.prompt_logprobs = list(request.prompt_logprobs)
        if not request.has_output:
            output.queue_s = request.queue_s
        request.has_output = True
        return output

    def _end(self, request: Request, end: Ending, sample: Sample | None = None) -> TokenOutput:
        output = self._output(request, sample)
        output.finish_reason, output.stop_token_id, output.error, output.refused = end
        self.abort(request.request_id)
        return output


def _ignore(request_ids: list[str]) -> None:
    """Nobody wants to know."""
