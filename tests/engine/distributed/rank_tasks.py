"""What ranks do in tests, as tasks for a `RankPool`."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np
import torch
from backend_choice import exact_backend
from paged import PagedRun

from gqa_serve.config import EngineConfig
from gqa_serve.engine.backends import BackendOptions, create_backend
from gqa_serve.engine.backends.base import Backend
from gqa_serve.engine.batch import PlanRow, StepPlan
from gqa_serve.engine.distributed.group import RankGroup
from gqa_serve.engine.distributed.members import Members
from gqa_serve.engine.distributed.orders import Execute, Logits, Order
from gqa_serve.engine.distributed.rank import follow
from gqa_serve.engine.distributed.replica import ReplicaRunner
from gqa_serve.engine.distributed.shard import Shard
from gqa_serve.engine.model_config import ModelConfig
from gqa_serve.engine.model_runner import ModelRunner
from gqa_serve.engine.models.decoder import Decoder
from gqa_serve.engine.models.loader import load_model
from gqa_serve.engine.placement import Placement
from gqa_serve.engine.weights.checkpoint import open_checkpoint

if TYPE_CHECKING:
    from gqa_serve.engine.distributed.orders import Reader
    from gqa_serve.engine.distributed.replica import OtherRanks

CPU = torch.device("cpu")


def _interpreted() -> Backend:
    from gqa_serve.engine.backends.cuda import CudaBackend

    return CudaBackend(CPU, torch.float32, deterministic=True)


def _as_stored() -> Backend:
    options = BackendOptions(backend="native", quantization="auto", kv_cache_dtype="float32", threads=1)
    return create_backend(CPU, options)


BACKENDS: dict[str, Callable[[], Backend]] = {
    "reference": lambda: exact_backend("reference"),
    "native": lambda: exact_backend("native"),
    "native as stored": _as_stored,
    "cuda": _interpreted,
}


def load(path: Path, backend: str, group: RankGroup | None = None) -> Decoder:
    """The model, or this rank's part of it."""
    checkpoint = open_checkpoint(path)
    config = ModelConfig.from_hf(checkpoint.raw_config, checkpoint.generation_config)
    members = None if group is None else Members(group, Shard(config, group.rank, group.size))
    return load_model(checkpoint, config, device=CPU, backend=BACKENDS[backend](), members=members)


def logits_of(
    group: RankGroup | None, path: Path, backend: str, prompts: list[list[int]], ragged: bool
) -> list[np.ndarray]:
    """Per prompt, the logits [length, V], as this rank has them after all ranks have told theirs."""
    run = PagedRun(load(path, backend, group), prompts, block_size=16)
    results = run.finish_ragged(11) if ragged else run.finish_in_one_step()
    return [logits.numpy() for logits in results]


def num_parameters(group: RankGroup, path: Path) -> tuple[int, int]:
    """(numbers held by this rank, bytes of its KV block)"""
    decoder = load(path, "reference", group)
    return decoder.weight_bytes // 4, decoder.backend.block_bytes(decoder.config, 16)


def sums(group: RankGroup, rows: int, seed: int) -> tuple[np.ndarray, list[int]]:
    """Random [rows, 8] of each rank added up, and every rank's number."""
    x = torch.randn(64, 8, generator=torch.Generator().manual_seed(seed + group.rank))[:rows].contiguous()
    group.add_up(x)
    return x.numpy(), group.gather_numbers(group.rank * 10)


class Script:
    """Orders as they would come from the first rank."""

    def __init__(self, *orders: Order) -> None:
        self._orders = iter(orders)

    def next(self) -> Order | None:
        return next(self._orders, None)


class NoProcesses:
    """`OtherRanks` of a replica whose ranks a pool has started."""

    def tell(self, order: Order) -> None:
        """They have a script."""

    def needed(self, purpose: str) -> contextlib.nullcontext[None]:
        return contextlib.nullcontext()


def two_steps(group: RankGroup, path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Logits of a second step: from tokens that the first rank alone was given, and from known ones."""
    config = EngineConfig(
        model="tiny", device="cpu", backend="reference", kv_cache_memory=1 << 20,
        tensor_parallel_size=group.size,
    )  # fmt: skip
    placement = Placement(rank=group.rank, num_ranks=group.size)
    runner = ModelRunner(path, config, placement=placement, group=group)
    prompts = StepPlan([PlanRow([5, 6, 7], 0, [0], 1), PlanRow([9], 0, [1], 1)])
    unknown = StepPlan([PlanRow([0], 3, [0], 1, previous_row=1), PlanRow([0], 1, [1], 1, previous_row=0)])
    known = StepPlan([PlanRow([31], 3, [0], 1), PlanRow([17], 1, [1], 1)])
    logits = Logits(2, "float32")
    if group.rank > 0:
        script = Script(Execute(prompts, 0), Execute(unknown, 2), logits, Execute(known, 0), logits)
        follow(runner, cast("Reader[Order]", script))
        return np.zeros(0), np.zeros(0)
    replica = ReplicaRunner.__new__(ReplicaRunner)
    replica._others, replica._group, replica._local = cast("OtherRanks", NoProcesses()), group, runner
    replica.execute(prompts)
    first = replica.logits(replica.execute(unknown, torch.tensor([17, 31]))).numpy().copy()
    return first, replica.logits(replica.execute(known, torch.tensor([1, 2]))).numpy()
