"""Engine: add, abort, step. Synchronous, no I/O, no text.

Owns the life of a request inside the engine: from `add`, through steps, to exactly one TokenOutput with a
`finish_reason` (or none, after `abort`). `Scheduler` decides, the runner computes, `Sampler` chooses.

A step that raises fails only the requests of its plan: they end with "error", their blocks are freed, and
the engine goes on. An exception of the scheduler itself is not caught: its state can't be trusted then,
and whoever runs the engine must replace it.
"""

from __future__ import annotations

import logging
import math
import random
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from gqa_serve.engine.batch import PlanRow, StepPlan
from gqa_serve.engine.block_pool import BlockPool
from gqa_serve.engine.kv_manager import KVManager
from gqa_serve.engine.request import EngineRequest, FinishReason, ModelInfo, Request, TokenOutput
from gqa_serve.engine.sampler import RowOperations, Sample, Sampler, token_logprobs
from gqa_serve.engine.scheduler import Scheduler, SchedulerLimits
from gqa_serve.errors import ContextLengthError, RequestError

if TYPE_CHECKING:
    import torch

    from gqa_serve.config import EngineConfig

logger = logging.getLogger(__name__)

# Rows of prompt logits turned into log-probabilities at a time: bounds [rows, V] temporaries.
_SCORING_ROWS = 256
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

    def execute(self, plan: StepPlan) -> torch.Tensor:
        """Compute the plan; hidden states [R, E] of the rows whose logits it asks for."""

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[R, E] -> [R, V] float32, which the next call may overwrite."""


class Engine:
    """One model, one KV cache, many requests."""

    def __init__(self, runner: Runner, config: EngineConfig) -> None:
        self.runner = runner
        self.info = runner.info
        limits = SchedulerLimits(config.max_num_seqs, config.max_num_batched_tokens)
        kv = KVManager(BlockPool(self.info.num_blocks, self.info.block_size))
        self.scheduler = Scheduler(kv, limits, prefix_caching=config.prefix_caching)
        self.sampler = Sampler(runner.eos_token_ids, runner.row_operations)
        self._eos = frozenset(runner.eos_token_ids)
        self._seeds = random.Random(config.seed)
        self._arrivals = 0
        self.num_failed_steps = 0
        """Steps that failed since the last that succeeded."""

    @property
    def has_work(self) -> bool:
        """Whether a step would compute something."""
        return len(self.scheduler) > 0

    def add(self, spec: EngineRequest) -> None:
        """Queue a request. Raises RequestError (and queues nothing) if it can't be computed."""
        self._check(spec)
        seed = self._seeds.getrandbits(63) if spec.params.seed is None else spec.params.seed
        self.scheduler.add(Request(spec, self._arrivals, seed))
        self._arrivals += 1

    def abort(self, request_id: str) -> bool:
        """End a request at once, freeing its blocks, without an output. False if it has ended already."""
        self.sampler.forget(request_id)
        return self.scheduler.remove(request_id) is not None

    def step(self) -> list[TokenOutput]:
        """Compute one step; the outputs of the requests that got tokens or ended in it."""
        scheduled = self.scheduler.schedule()
        if not scheduled:
            return []
        ends = _last_logit_rows(scheduled)
        sampling = [(request, end) for request, end in ends if request.params.max_tokens != 0]
        try:
            samples = self._compute(scheduled, sampling)
        except Exception as error:
            self.num_failed_steps += 1
            logger.exception("A step of %d requests failed; ending them.", len(scheduled))
            message = f"The engine failed to compute this request ({type(error).__name__})."
            return [self._end(request, "error", error=message) for request, _ in scheduled]
        self.num_failed_steps = 0
        for request, row in scheduled:
            self.scheduler.advance(request, len(row.token_ids))
        outputs = [self._accept(r, s) for (r, _), s in zip(sampling, samples, strict=True)]
        scored = [request for request, _ in ends if request.params.max_tokens == 0]
        return outputs + [self._end(request, "length") for request in scored]

    def _check(self, spec: EngineRequest) -> None:
        if self.scheduler.get(spec.request_id) is not None:
            raise RequestError(f"Request id {spec.request_id!r} is in use.")
        if not spec.prompt:
            raise RequestError("The prompt is empty.", param="prompt")
        spec.params.validate(self.info.vocab_size)
        if not all(0 <= token < self.info.vocab_size for token in spec.prompt):
            raise RequestError("The prompt holds a token id outside the vocabulary.", param="prompt")
        scoring_only = spec.params.max_tokens == 0
        if len(spec.prompt) + (not scoring_only) > self.info.max_model_len:
            raise ContextLengthError(len(spec.prompt), self.info.max_model_len, param="prompt")

    def _compute(
        self, scheduled: list[tuple[Request, PlanRow]], sampling: list[tuple[Request, int]]
    ) -> list[Sample]:
        """Run the model over the plan and sample; changes no request but its prompt log-probabilities."""
        hidden = self.runner.execute(StepPlan([row for _, row in scheduled]))
        self._score_prompts(scheduled, hidden)
        if not sampling:
            return []
        ends = [end for _, end in sampling]
        logits = self.runner.logits(hidden if len(ends) == len(hidden) else hidden[ends])
        return self.sampler.sample(logits, [request for request, _ in sampling])

    def _score_prompts(self, scheduled: list[tuple[Request, PlanRow]], hidden: torch.Tensor) -> None:
        """Log-probabilities of the prompt tokens whose predecessors this step computed."""
        import torch

        begin = 0
        for request, row in scheduled:
            if request.scores_prompt:
                prompt = request.tokens[: request.num_prompt_tokens]
                targets = prompt[row.start + 1 : row.start + 1 + len(row.token_ids)]
                if row.start == 0:
                    request.prompt_logprobs.append(None)
                for first in range(0, len(targets), _SCORING_ROWS):
                    part = targets[first : first + _SCORING_ROWS]
                    logits = self.runner.logits(hidden[begin + first : begin + first + len(part)])
                    count = request.params.prompt_logprobs or 0
                    request.prompt_logprobs += token_logprobs(torch.log_softmax(logits, -1), part, count)
            begin += row.num_logits

    def _accept(self, request: Request, sample: Sample) -> TokenOutput:
        """Append a sampled token and end the request if that ends it."""
        if sample.token_id is None:
            return self._end(request, "error", error=_NO_TOKEN)
        params, token = request.params, sample.token_id
        request.tokens.append(token)
        is_stop = token in params.stop_token_ids or (token in self._eos and not params.ignore_eos)
        if is_stop and request.num_output_tokens > params.min_tokens:
            return self._end(request, "stop", sample, stop_token_id=token)
        full = request.num_tokens >= self.info.max_model_len
        if full or request.num_output_tokens >= (params.max_tokens or math.inf):
            return self._end(request, "length", sample)
        return self._output(request, sample)

    def _output(self, request: Request, sample: Sample | None = None) -> TokenOutput:
        output = TokenOutput(request_id=request.request_id, num_cached_tokens=request.num_cached_tokens)
        if sample is not None and sample.token_id is not None:
            output.token_ids = [sample.token_id]
            output.logprobs = [sample.logprobs] if sample.logprobs is not None else None
        if request.scores_prompt:
            output.prompt_logprobs = list(request.prompt_logprobs)
        request.has_output = True
        return output

    def _end(
        self,
        request: Request,
        reason: FinishReason,
        sample: Sample | None = None,
        *,
        stop_token_id: int | None = None,
        error: str | None = None,
    ) -> TokenOutput:
        output = self._output(request, sample)
        output.finish_reason = reason
        output.stop_token_id = stop_token_id
        output.error = error
        self.abort(request.request_id)
        return output


def _last_logit_rows(scheduled: list[tuple[Request, PlanRow]]) -> list[tuple[Request, int]]:
    """Requests that caught up in this step, with the row of `hidden` that predicts their next token."""
    result, end = [], 0
    for request, row in scheduled:
        end += row.num_logits
        if row.start + len(row.token_ids) == request.num_tokens:
            result.append((request, end - 1))
    return result
