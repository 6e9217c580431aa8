"""`EngineMeter`: what one engine's steps add to /metrics, and how that engine stands.

Owns the names of what steps count; `EngineFamilies` makes them once, whatever the number of engines. With
several engines (--data-parallel-size) each series has the label `replica`; one alone has none, so that its
series stay what they were. Knows the engine by its state and sizes. Invariants: counters go on when an engine
process is replaced; an engine that is gone stands idle.
"""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter

from gqa_serve.api.exposition import PREFIX, WatchedEngine
from gqa_serve.api.histograms import Histogram, steps_1_2_5
from gqa_serve.engine.metrics import StepStats

PHASES = ("prefill", "decode", "mixed")
PARTS = ("schedule", "forward", "sample", "other")

_STEP_SECONDS = steps_1_2_5(0.0001, 20)
_STEP_TOKENS = steps_1_2_5(1, 20_000)
_COUNTERS = (
    ("num_queried_tokens", "prefix_cache_queries", "Prompt tokens looked up in the prefix cache."),
    ("num_hit_tokens", "prefix_cache_hits", "Prompt tokens found in the prefix cache."),
    ("num_preemptions", "num_preemptions", "Requests that lost their KV blocks to others."),
    ("num_discarded_tokens", "discarded_tokens", "Tokens computed for requests that had ended by then."),
    ("num_failed_steps", "failed_steps", "Engine steps that raised an exception."),
    ("num_shrunk", "step_cuts", "Times memory ran out in an engine step, which was cut up."),
)
"""Field of `StepStats`, name, meaning."""


class EngineFamilies:
    """The metrics of steps, with a series for each of `num_replicas` engines."""

    def __init__(self, registry: CollectorRegistry, num_replicas: int) -> None:
        several = num_replicas > 1
        names = ("replica",) if several else ()
        self.labels = [(str(number),) if several else () for number in range(num_replicas)]
        self.counters = {
            field: Counter(PREFIX + name, documentation, names, registry=registry)
            for field, name, documentation in _COUNTERS
        }
        self.tokens = Histogram(
            PREFIX + "iteration_tokens_total",
            "Tokens computed in one engine step.",
            _STEP_TOKENS,
            labels=names,
            values=self.labels,
        )
        self.seconds = Histogram(
            PREFIX + "step_seconds",
            "Time of one engine step, by what it computes and where the time goes.",
            _STEP_SECONDS,
            labels=(*names, "phase", "part"),
            values=[(*one, phase, part) for one in self.labels for phase in PHASES for part in PARTS],
        )
        registry.register(self.tokens)
        registry.register(self.seconds)


class EngineMeter:
    """Of engine number `replica`; what its prompts cost is added to `num_tokens`, which all engines share."""

    def __init__(
        self, engine: WatchedEngine, families: EngineFamilies, replica: int, num_tokens: dict[str, int]
    ) -> None:
        self.engine = engine
        self._num_tokens = num_tokens
        self._last_step: StepStats | None = None
        self._restarts_at_last_step = 0
        labels = families.labels[replica]
        self._counters = [
            (field, counter.labels(*labels) if labels else counter)
            for field, counter in families.counters.items()
        ]
        self._tokens = families.tokens.series(*labels)
        self._seconds = {
            phase: [families.seconds.series(*labels, phase, part) for part in PARTS] for phase in PHASES
        }

    def step(self, stats: StepStats) -> None:
        """What one step of the engine did."""
        self._last_step, self._restarts_at_last_step = stats, self.engine.num_restarts
        for field, counter in self._counters:
            if count := getattr(stats, field):
                counter.inc(count)
        self._num_tokens["prompt_computed"] += stats.num_prompt_tokens
        self._num_tokens["prompt_cached"] += stats.num_hit_tokens
        phase = stats.phase
        if phase == "idle":
            return
        self._tokens.observe(stats.num_prompt_tokens + stats.num_decode_tokens)
        known = (stats.schedule_s, stats.forward_s, stats.sample_s)
        for series, seconds in zip(
            self._seconds[phase], (*known, max(0.0, stats.step_s - sum(known))), strict=True
        ):
            series.observe(seconds)

    @property
    def last_step(self) -> StepStats:
        """How the engine stood after its last step; an idle one if that engine process is gone."""
        info, stats = self.engine.model_info, self._last_step
        gone = self.engine.state not in ("ready", "stopping") or (
            self._restarts_at_last_step != self.engine.num_restarts
        )
        if stats is None or gone:
            return StepStats(num_free_blocks=0 if info is None else info.num_blocks)
        return stats
