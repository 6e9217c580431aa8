"""What `/metrics` says beyond what was counted: how things stand at this moment, and under which names.

Owns the gauges, which are read when somebody asks, and the label that every sample gets. Knows engines by
their states and sizes, and all processes by what the system says of them. What there is once for each engine
has the label `replica` if there are several. Invariant: reading changes nothing, and may happen in another
thread than the event loop's.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
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
    """What is read of an engine."""

    @property
    def state(self) -> str: ...

    @property
    def model_info(self) -> ModelInfo | None: ...

    @property
    def num_restarts(self) -> int: ...

    @property
    def pid(self) -> int | None: ...


class Meter(Protocol):
    """What is read of an `EngineMeter`."""

    engine: WatchedEngine

    @property
    def last_step(self) -> StepStats: ...


class Standing(Protocol):
    """What is read of `Metrics`."""

    num_exchanges: int
    num_streams: int
    connections: Sized
    refusals: dict[str, int]
    num_tokens: dict[str, int]

    @property
    def meters(self) -> Sequence[Meter]: ...

    @property
    def model_info(self) -> ModelInfo | None: ...


class Moment(Collector):
    """What is read when somebody asks."""

    def __init__(self, standing: Standing) -> None:
        self._standing = standing

    def collect(self) -> Iterator[Metric]:
        """Every gauge, and the counters that are kept as plain numbers."""
        yield from self._http()
        yield from self._engines()
        yield from self._tokens()
        yield from self._facts()
        yield from self._processes()

    def _http(self) -> Iterator[Metric]:
        standing = self._standing
        others = max(0, standing.num_exchanges - 1)
        yield _gauge("http_requests_open", "HTTP requests not answered yet, but for this one.", others)
        yield _gauge("open_streams", "Answers being streamed.", standing.num_streams)
        yield _gauge("open_connections", "Connections of clients.", len(standing.connections))
        yield _counters("refusals", "Requests refused, by reason.", "reason", standing.refusals)

    def _engines(self) -> Iterator[Metric]:
        meters = self._standing.meters
        found = [_standing_of(meter) for meter in meters]
        for name, documentation in _ENGINE_GAUGES.items():
            yield _each(name, documentation, [numbers[name] for numbers in found])
        yield _each_by("kv_blocks", "KV blocks, by what they hold.", "state", list(map(_blocks_of, meters)))
        states = [{state: int(state == meter.engine.state) for state in STATES} for meter in meters]
        yield _each_by("engine_state", "1 for the state the engine is in.", "state", states)
        restarts = [meter.engine.num_restarts for meter in meters]
        told = "Engine processes started because one had died."
        yield _each("engine_restarts", told, restarts, CounterMetricFamily)

    def _tokens(self) -> Iterator[Metric]:
        tokens = self._standing.num_tokens
        yield _counter("generation_tokens", "Tokens generated.", tokens["output"])
        yield _counters("tokens", "Tokens, by what they are.", "kind", tokens)

    def _facts(self) -> Iterator[Metric]:
        yield _info("build_info", "Always 1; what runs.", {"version": __version__})
        info = self._standing.model_info
        if info is None:
            return
        facts = {name: str(getattr(info, name)) for name in _MODEL_FACTS}
        yield _info("model_info", "Always 1; what is served, and its heads.", facts)
        yield _gauge("kv_bytes_per_token", "Memory for K and V of one token.", info.kv_bytes_per_token)
        saved = info.kv_bytes_per_token * info.num_heads // info.num_kv_heads
        yield _gauge("kv_bytes_per_token_mha", "The same if each query head had a KV head.", saved)

    def _processes(self) -> Iterator[Metric]:
        meters = self._standing.meters
        pids = [(("api", ""), os.getpid())]  # a label that is empty is none to Prometheus
        pids += [
            (("engine", str(number)), pid)
            for number, meter in enumerate(meters)
            if (pid := meter.engine.pid) is not None  # asked once: in another thread it may end meanwhile
        ]
        names = ["process", "replica"] if len(meters) > 1 else ["process"]
        memory = GaugeMetricFamily(
            PREFIX + "process_resident_memory_bytes", "Resident memory, of each process.", labels=names
        )
        cpu = CounterMetricFamily(
            PREFIX + "process_cpu_seconds", "CPU time used, by each process.", labels=names
        )
        for labels, pid in pids:
            try:
                process = psutil.Process(pid)
                times = process.cpu_times()
                memory.add_metric(labels[: len(names)], process.memory_info().rss)
                cpu.add_metric(labels[: len(names)], times.user + times.system)
            except psutil.Error:  # it ended just now
                continue
        yield memory
        yield cpu


_ENGINE_GAUGES = {
    "num_requests_running": "Requests being computed.",
    "num_requests_waiting": "Requests waiting to be computed.",
    "num_waiting_tokens": "Prompt tokens of waiting requests.",
    "kv_cache_usage_perc": "Part of the KV blocks in use, 0 to 1.",
    "weight_bytes": "Memory for the weights.",
}


def _standing_of(meter: Meter) -> dict[str, float]:
    """Values of `_ENGINE_GAUGES`."""
    stats, info = meter.last_step, meter.engine.model_info
    num_blocks = 0 if info is None else info.num_blocks
    return {
        "num_requests_running": stats.num_running,
        "num_requests_waiting": stats.num_waiting,
        "num_waiting_tokens": stats.num_waiting_tokens,
        "kv_cache_usage_perc": (num_blocks - stats.num_free_blocks) / max(1, num_blocks),
        "weight_bytes": 0 if info is None else info.weight_bytes,
    }


def _blocks_of(meter: Meter) -> dict[str, float]:
    stats, info = meter.last_step, meter.engine.model_info
    num_blocks = 0 if info is None else info.num_blocks
    free, cached = stats.num_free_blocks, stats.num_cached_blocks
    return {"active": num_blocks - free, "cached": cached, "free": free - cached}


Family = Callable[..., GaugeMetricFamily | CounterMetricFamily]


def _each(
    name: str, documentation: str, values: Sequence[float], family: Family = GaugeMetricFamily
) -> Metric:
    """A sample for each engine; one alone has no label."""
    if len(values) == 1:
        return family(PREFIX + name, documentation, value=values[0])
    made = family(PREFIX + name, documentation, labels=["replica"])
    for number, value in enumerate(values):
        made.add_metric([str(number)], value)
    return made


def _each_by(name: str, documentation: str, label: str, values: Sequence[Mapping[str, float]]) -> Metric:
    """Samples by a label of theirs for each engine."""
    several = len(values) > 1
    made = GaugeMetricFamily(PREFIX + name, documentation, labels=["replica", label] if several else [label])
    for number, samples in enumerate(values):
        for key, value in samples.items():
            made.add_metric([str(number), key] if several else [key], value)
    return made


def _gauge(name: str, documentation: str, value: float) -> Metric:
    return GaugeMetricFamily(PREFIX + name, documentation, value=value)


def _counter(name: str, documentation: str, value: float) -> Metric:
    return CounterMetricFamily(PREFIX + name, documentation, value=value)


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
