"""How fast a candidate's steps are on this machine, alternated with the reference's.

Owns the measurement: whole decode steps at a stated context without computing that context first, because a
step's time does not depend on what the cache holds. Invariant: every round runs each model once, so that what
else the machine does at the time meets both.
"""

from __future__ import annotations

import time

from gqa_serve.engine.batch import PlanRow, StepPlan
from gqa_serve.workbench.evaluate.engines import LoadedModel
from gqa_serve.workbench.evaluate.results import Speed

ROUNDS = 9


def measure_speed(
    model: LoadedModel,
    reference: LoadedModel | None,
    *,
    context: int,
    requests: int,
    prefill_tokens: int,
    rounds: int = ROUNDS,
) -> Speed:
    """Time decode and prefill steps, after one of each that does not count."""
    models = [model] if reference is None else [model, reference]
    seconds: list[tuple[list[float], list[float]]] = [([], []) for _ in models]
    decode = [_decode_plan(each, context, requests) for each in models]
    prefill = [_prefill_plan(each, prefill_tokens) for each in models]
    for number in range(rounds + 1):
        order = range(len(models)) if number % 2 else reversed(range(len(models)))
        for index in order:
            times = _time(models[index], decode[index]), _time(models[index], prefill[index])
            if number:
                seconds[index][0].append(times[0])
                seconds[index][1].append(times[1])
    beside = seconds[1] if reference is not None else (None, None)
    return Speed(
        context=context,
        requests=requests,
        prefill_tokens=prefill_tokens,
        decode_s=seconds[0][0],
        prefill_s=seconds[0][1],
        reference_decode_s=beside[0],
        reference_prefill_s=beside[1],
    )


def _decode_plan(model: LoadedModel, context: int, requests: int) -> StepPlan:
    """The step that computes token `context` of each request."""
    rows = [
        PlanRow([_token(model, index)], context - 1, model.blocks(index, context), 1)
        for index in range(requests)
    ]
    return StepPlan(rows)


def _prefill_plan(model: LoadedModel, num_tokens: int) -> StepPlan:
    ids = [_token(model, index) for index in range(num_tokens)]
    return StepPlan([PlanRow(ids, 0, model.blocks(0, num_tokens), 1)])


def _token(model: LoadedModel, index: int) -> int:
    """Tokens that differ: embeddings are read from different places."""
    return (7919 * (index + 1)) % model.info.vocab_size


def _time(model: LoadedModel, plan: StepPlan) -> float:
    """Seconds of a step up to its tokens, as a client waits for them."""
    began = time.perf_counter()
    hidden = model.runner.execute(plan)
    model.likeliest(hidden)
    return time.perf_counter() - began
