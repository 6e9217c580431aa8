"""What ranks do in tests, as tasks for a `RankPool`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from backend_choice import exact_backend
from paged import PagedRun

from gqa_serve.engine.backends import BackendOptions, create_backend
from gqa_serve.engine.backends.base import Backend
from gqa_serve.engine.distributed.group import RankGroup
from gqa_serve.engine.distributed.members import Members
from gqa_serve.engine.distributed.shard import Shard
from gqa_serve.engine.model_config import ModelConfig
from gqa_serve.engine.models.decoder import Decoder
from gqa_serve.engine.models.loader import load_model
from gqa_serve.engine.weights.checkpoint import open_checkpoint

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
