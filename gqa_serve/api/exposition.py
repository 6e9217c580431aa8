"""What `/metrics` says beyond what was counted: how things stand at this moment, and under which names.

Owns the gauges, which are read when somebody asks, and the label that every sample gets. Knows the engine by
its state and sizes, and both processes by what the system says of them. Invariant: reading changes nothing,
and may happen in another thread than the event loop's.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sized
from typing import Protocol

import psutil
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector
from prometheus_client.samples import Sample

from gqa_serve import __version__
from gqa_serve.engine.metrics import StepStats
from gqa_serve.engine.request import ModelInfo

PREFIX = "gqa_serve_"
STATES = ("loading", "ready", "restarting", "stopping", "failed")
TOKEN_KINDS = ("prompt_computed", "prompt_cached", "output", "thinking")

VLLM_NAMES = frozenset(
    {
        "num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "prefix_cache_queries",
        "prefix_cache_hits", "num_preemptions", "prompt_tokens", "prompt_tokens_cached", "generation_tokens",
        "request_success", "time_to_first_token_seconds", "inter_token_latency_seconds",
        "request_time_per_output_token_seconds", "e2e_request_latency_seconds", "request_queue_time_seconds",
        "request_inference_time_seconds", "request_prefill_time_seconds", "request_decode_time_seconds",
        "request_prompt_tokens", "request_generation_tokens", "iteration_tokens_total",
        "request_params_max_tokens", "request_params_n",
    }
)  # fmt: skip
"""Names (without prefix, and without the `_total` of counters) that mean here what they mean in vLLM."""

_MODEL_FACTS = (
    "architecture", "backend", "device", "instruction_set", "dtype", "quantization", "kv_dtype", "num_heads",
    "num_kv_heads", "block_size", "max_model_len",
)  # fmt: skip


class WatchedEngine(Protocol):
    """What is read of the engine."""

    @property
    def state(self) -> str: ...

    @property
    def model_info(self) -> ModelInfo | None: ...

    @property
    def num_restarts(self) -> int: ...

    @property
    def pid(self) -> int | None: ...


class Standing(Protocol):
    """What is read of `Metrics`."""

    engine: WatchedEngine
    num_exchanges: int
    num_streams: int
    connections: Sized
    refusals: dict[str, int]
    num_tokens: dict[str, int]

    @property
    def last_step(self) -> StepStats: ...


class Moment(Collector):
    """What is read when somebody asks."""

    def __init__(self, standing: Standing) -> None:
        self._standing = standing

    def collect(self) -> Iterator[Metric]:
        """Every gauge, and the counters that are kept as plain numbers."""
        yield from self._http()
        yield from self._engine()
        yield from self._tokens()
        yield from self._facts()
        yield from _processes({"api": os.getpid(), "engine": self._standing.engine.pid})

    def _http(self) -> Iterator[Metric]:
        standing = self._standing
        others = max(0, standing.num_exchanges - 1)
        yield _gauge("http_requests_open", "HTTP requests not answered yet, but for this one.", others)
        yield _gauge("open_streams", "Answers being streamed.", standing.num_streams)
        yield _gauge("open_connections", "Connections of clients.", len(standing.connections))
        yield _counters("refusals", "Requests refused, by reason.", "reason", standing.refusals)

    def _engine(self) -> Iterator[Metric]:
        stats, engine = self._standing.last_step, self._standing.engine
        total = 0 if engine.model_info is None else engine.model_info.num_blocks
        active = total - stats.num_free_blocks
        yield _gauge("num_requests_running", "Requests being computed.", stats.num_running)
        yield _gauge("num_requests_waiting", "Requests waiting to be computed.", stats.num_waiting)
        yield _gauge("num_waiting_tokens", "Prompt tokens of waiting requests.", stats.num_waiting_tokens)
        yield _gauge("kv_cache_usage_perc", "Part of the KV blocks in use, 0 to 1.", active / max(1, total))
        free = stats.num_free_blocks - stats.num_cached_blocks
        blocks = {"active": active, "cached": stats.num_cached_blocks, "free": free}
        yield _gauges("kv_blocks", "KV blocks, by what they hold.", "state", blocks)
        states = {state: int(state == engine.state) for state in STATES}
        yield _gauges("engine_state", "1 for the state the engine is in.", "state", states)
        restarts = engine.num_restarts
        yield _counter("engine_restarts", "Engine processes started because one had died.", restarts)

    def _tokens(self) -> Iterator[Metric]:
        tokens = self._standing.num_tokens
        yield _counter("generation_tokens", "Tokens generated.", tokens["output"])
        yield _counters("tokens", "Tokens, by what they are.", "kind", tokens)

    def _facts(self) -> Iterator[Metric]:
        yield _info("build_info", "Always 1; what runs.", {"version": __version__})
        info = self._standing.engine.model_info
        if info is None:
            return
        facts = {name: str(getattr(info, name)) for name in _MODEL_FACTS}
        yield _info("model_info", "Always 1; what is served, and its heads.", facts)
        yield _gauge("kv_bytes_per_token", "Memory for K and V of one token.", info.kv_bytes_per_token)
        saved = info.kv_bytes_per_token * info.num_heads // info.num_kv_heads
        yield _gauge("kv_bytes_per_token_mha", "The same if each query head had a KV head.", saved)
        yield _gauge("weight_bytes", "Memory for the weights.", info.weight_bytes)


def _processes(pids: Mapping[str, int | None]) -> Iterator[Metric]:
    memory = GaugeMetricFamily(
        PREFIX + "process_resident_memory_bytes", "Resident memory, of each process.", labels=["process"]
    )
    cpu = CounterMetricFamily(
        PREFIX + "process_cpu_seconds", "CPU time used, by each process.", labels=["process"]
    )
    for name, pid in pids.items():
        if pid is None:
            continue
        try:
            process = psutil.Process(pid)
            times = process.cpu_times()
            memory.add_metric([name], process.memory_info().rss)
            cpu.add_metric([name], times.user + times.system)
        except psutil.Error:  # it ended just now
            continue
    yield memory
    yield cpu


def _gauge(name: str, documentation: str, value: float) -> Metric:
    return GaugeMetricFamily(PREFIX + name, documentation, value=value)


def _counter(name: str, documentation: str, value: float) -> Metric:
    return CounterMetricFamily(PREFIX + name, documentation, value=value)


def _gauges(name: str, documentation: str, label: str, values: Mapping[str, float]) -> Metric:
    family = GaugeMetricFamily(PREFIX + name, documentation, labels=[label])
    for key, value in values.items():
        family.add_metric([key], value)
    return family


def _counters(name: str, documentation: str, label: str, values: Mapping[str, float]) -> Metric:
    family = CounterMetricFamily(PREFIX + name, documentation, labels=[label])
    for key, value in values.items():
        family.add_metric([key], value)
    return family


def _info(name: str, documentation: str, labels: Mapping[str, str]) -> Metric:
    family = GaugeMetricFamily(PREFIX + name, documentation, labels=list(labels))
    family.add_metric(list(labels.values()), 1)
    return family


class Exposition(Collector):
    """A registry's metrics, each with the label `model_name`; under vLLM's prefix those of its names only."""

    def __init__(self, registry: Collector, model_name: str, prefix: str = PREFIX) -> None:
        self._registry = registry
        self._labels = {"model_name": model_name}
        self._prefix = prefix

    def collect(self) -> Iterator[Metric]:
        """Families under their last names."""
        for family in self._registry.collect():
            name = family.name.removeprefix(PREFIX)
            if self._prefix != PREFIX and name not in VLLM_NAMES:
                continue
            family.name = self._prefix + name
            # When a series began would be one more for each; a restart shows as its fall to 0.
            kept = (sample for sample in family.samples if not sample.name.endswith("_created"))
            family.samples = [self._labelled(sample) for sample in kept]
            yield family

    def _labelled(self, sample: Sample) -> Sample:
        name = self._prefix + sample.name.removeprefix(PREFIX)
        return sample._replace(name=name, labels={**self._labels, **sample.labels})
