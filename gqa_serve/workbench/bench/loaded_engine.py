"""A model in this process, ready to be measured: the server's engine over a recorder.

Owns the loading: of a checkpoint as it is, or of random weights in its shape with another number of KV heads.
Raises what the server would raise for the same settings.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import torch

from gqa_serve.config import EngineConfig
from gqa_serve.engine.backends.cpu import CpuBackend
from gqa_serve.engine.core import Engine
from gqa_serve.engine.model_config import ModelConfig
from gqa_serve.engine.model_runner import ModelRunner
from gqa_serve.engine.weights.hub import resolve_model
from gqa_serve.workbench.bench.case_progress import CaseProgress
from gqa_serve.workbench.bench.kv_fill import fill_cache
from gqa_serve.workbench.bench.limits import Work
from gqa_serve.workbench.bench.random_weights import RandomCheckpoint
from gqa_serve.workbench.bench.step_recorder import StepRecorder, StepTimer
from gqa_serve.workbench.step_cost import step
from gqa_serve.workbench.step_samples import StepSample

_PRODUCTS = ("qkv", "o", "gate, up", "down", "logits")  # of step_cost.py's parts


@dataclass(frozen=True)
class LoadedEngine:
    """An engine with its runner; `random`: its weights mean nothing."""

    runner: ModelRunner
    recorder: StepRecorder
    config: EngineConfig
    random: bool

    @property
    def threads(self) -> int:
        """Those that the native backend computes with."""
        backend = self.runner.backend
        return backend.threads if isinstance(backend, CpuBackend) else torch.get_num_threads()

    def timer(self) -> StepTimer:
        """An engine of its own, over the same weights and cache, with nothing in its prefix cache."""
        return StepTimer(Engine(self.recorder, self.config), self.recorder)

    def work(self, sample: StepSample) -> Work:
        """What a step must read and compute: each matrix once, K and V that its tokens see once a KV head.

        Of weights it is what is held here, scales included, without an embedding that is only looked up in;
        operations are those of `step_cost.py`, which count no padding.
        """
        return step_work(self.runner, sample)


def model_path(config: EngineConfig) -> Path:
    """Where the model of `config` is, downloaded if need be. Raises ModelError, HubError."""
    return resolve_model(
        config.model, revision=config.revision, download_dir=config.download_dir, offline=config.offline
    )


def load_engine(
    config: EngineConfig, progress: CaseProgress, *, fill: bool, random_config: ModelConfig | None = None
) -> LoadedEngine:
    """The model of `config`, or random weights of `random_config`; `fill`: its KV cache full of random
    numbers. Raises ModelError, ConfigError, CacheCapacityError."""
    if random_config is None:
        path = model_path(config)
        with progress.task("Loading weights") as update:
            runner = ModelRunner(path, config, update)
    else:
        with progress.task(f"Random weights, {random_config.num_kv_heads} KV heads") as update:
            runner = ModelRunner(RandomCheckpoint(random_config), config, update, model_config=random_config)
    if fill:
        with progress.task("Filling the KV cache") as update:
            fill_cache(runner, update)
    return LoadedEngine(runner, StepRecorder(runner), config, random_config is not None)


def step_work(runner: ModelRunner, sample: StepSample) -> Work:
    """See `LoadedEngine.work`."""
    config, info = runner.config, runner.info
    lens = [(1, sample.decode_context_tokens / max(1, sample.num_decode))] * sample.num_decode
    whole = [(query, round(context)) for query, context in [*lens, *sample.chunks]]
    parts = step(config, whole, num_sampled=sample.num_sampled).parts
    attention = sum(part.flops for name, part in parts.items() if "attention" in name)
    product = sum(part.flops for name, part in parts.items() if name in _PRODUCTS)
    layer_bytes = info.kv_bytes_per_token / config.num_layers
    seen = sum(
        min(context, context if window is None else window + query - 1)
        for window in config.windows
        for query, context in whole
    )
    weights = info.weight_bytes
    if not config.tie_embeddings:
        weights -= runner.model.embedding.nbytes
    return Work(weights + seen * layer_bytes, product, attention)


def need_memory(config: ModelConfig, kv_tokens: int, block_size: int, num_requests: int) -> int:
    """Bytes of a KV cache that holds so many tokens in any format: float32 is the largest."""
    tokens = kv_tokens + (num_requests + 2) * block_size
    return tokens * config.kv_bytes_per_token(4)


def with_kv_memory(config: EngineConfig, num_bytes: int) -> EngineConfig:
    """The same settings with a KV cache of that size, unless they say one."""
    if config.kv_cache_memory is not None:
        return config
    return dataclasses.replace(config, kv_cache_memory=num_bytes)
