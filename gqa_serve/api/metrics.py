"""`Metrics`: what the server counts about itself, and how Prometheus reads it.

Owns every metric's name, meaning and buckets (docs/observability.md lists them; a test compares). Is told
what happens by the rest of the API process; knows neither HTTP nor how anything is computed. Names that
vLLM's dashboards use mean the same here, with our prefix. A *request* of these metrics is what the engine
computes: one choice of one prompt. What steps add is in `engine_meter.py`. Invariants: everything is told on
the event loop's thread; no label holds what a client wrote; gauges say how things stand, so they are 0 when
nothing is under way, also when the engine process has died.
"""

from __future__ import annotations

from collections.abc import Sequence, Sized
from typing import Protocol

from prometheus_client import CollectorRegistry, Counter

from gqa_serve.api.engine_meter import EngineFamilies, EngineMeter
from gqa_serve.api.exposition import PREFIX, TOKEN_KINDS, Moment, WatchedEngine
from gqa_serve.api.histograms import Histogram, Series, steps_1_2_5
from gqa_serve.api.loop_lag import LoopLag
from gqa_serve.api.text_stream import Choice
from gqa_serve.engine.request import FinishReason, ModelInfo

FINISHED: tuple[FinishReason, ...] = ("stop", "length", "abort", "error")

_SECONDS = steps_1_2_5(0.001, 1000)
_SHORT_SECONDS = steps_1_2_5(0.0001, 20)
_TOKENS = steps_1_2_5(1, 200_000)


class WatchedEngines(Protocol):
    """What is read of the engines as a whole."""

    @property
    def replicas(self) -> Sequence[WatchedEngine]: ...

    @property
    def model_info(self) -> ModelInfo | None: ...


class Metrics:
    """Told what happens; `exposition` says it all."""

    def __init__(self, engine: WatchedEngines) -> None:
        self._engine = engine
        self.registry = CollectorRegistry(auto_describe=False)
        self._requests()
        replicas = engine.replicas
        families = EngineFamilies(self.registry, len(replicas))
        self.meters = [
            EngineMeter(replica, families, number, self.num_tokens) for number, replica in enumerate(replicas)
        ]
        self._http()
        self.registry.register(Moment(self))

    @property
    def model_info(self) -> ModelInfo | None:
        """The loaded model."""
        return self._engine.model_info

    def _counter(self, name: str, documentation: str, labels: Sequence[str] = ()) -> Counter:
        return Counter(PREFIX + name, documentation, labels, registry=self.registry)

    def _histogram(self, name: str, documentation: str, bounds: Sequence[float]) -> Series:
        histogram = Histogram(PREFIX + name, documentation, bounds)
        self.registry.register(histogram)
        return histogram.series()

    # --- requests ------------------------------------------------------------------------------------------

    def _requests(self) -> None:
        self._success = self._counter("request_success", "Requests that ended, by how.", ["finished_reason"])
        for reason in FINISHED:
            self._success.labels(reason)
        self._prompt = self._counter("prompt_tokens", "Prompt tokens of requests, cached ones too.")
        self._cached = self._counter("prompt_tokens_cached", "Those found in the prefix cache.")
        self.num_tokens = dict.fromkeys(TOKEN_KINDS, 0)  # no counter: it would take a lock for each token
        seconds = self._seconds
        self._ttft = seconds("time_to_first_token", "From the request's arrival to its first token.")
        self._gaps = seconds("inter_token_latency", "From one token to the next.", _SHORT_SECONDS)
        self._tpot = seconds(
            "request_time_per_output_token", "The mean of these gaps in a request.", _SHORT_SECONDS
        )
        self._e2e = seconds("e2e_request_latency", "From the request's arrival to its end.")
        self._queue = seconds("request_queue_time", "Waiting to be computed.")
        self._inference = seconds("request_inference_time", "From first being computed to the last token.")
        self._prefill = seconds("request_prefill_time", "From first being computed to the first token.")
        self._decode = seconds("request_decode_time", "From the first token to the last.")
        sizes = self._histogram
        self._prompts = sizes("request_prompt_tokens", "Prompt tokens of a request.", _TOKENS)
        self._outputs = sizes("request_generation_tokens", "Tokens generated in a request.", _TOKENS)
        self._max_tokens = sizes("request_params_max_tokens", "What max_tokens was.", _TOKENS)
        self._n = sizes("request_params_n", "What n was.", (1, 2, 5, 10, 20, 50))
        self.refusals: dict[str, int] = {}
        self._aborted = self._counter(
            "aborts", "Accepted requests that ended early, by what ended them.", ["reason"]
        )

    def _seconds(self, name: str, documentation: str, bounds: Sequence[float] = _SECONDS) -> Series:
        return self._histogram(name + "_seconds", documentation, bounds)

    def prompt_computed(self, num_tokens: int, num_cached: int) -> None:
        """A request's prompt has been computed; `num_cached` of its tokens were in the prefix cache."""
        self._prompt.inc(num_tokens)
        self._cached.inc(num_cached)

    def first_tokens(self, ttft_s: float, num_tokens: int) -> None:
        """A request has its first token, `ttft_s` after its arrival, and maybe more at the same time."""
        self.num_tokens["output"] += num_tokens
        self._ttft.observe(ttft_s)
        if num_tokens > 1:
            self._gaps.observe(0.0, num_tokens - 1)

    def tokens(self, num_tokens: int, gap_s: float) -> None:
        """So many tokens of a request came, `gap_s` each."""
        self.num_tokens["output"] += num_tokens
        self._gaps.observe(gap_s, num_tokens)

    def finished(self, choice: Choice, arrived_s: float, submitted_s: float, ended_s: float) -> None:
        """A request is over; one that was cut off counts as "abort", and its times are not observed."""
        self._success.labels(choice.finish_reason or "abort").inc()
        num_prompt, num_output = len(choice.request.prompt), choice.num_tokens
        self.num_tokens["thinking"] += choice.num_thinking_tokens
        if choice.first_s is None or choice.finish_reason not in ("stop", "length"):
            return
        queue_s = choice.queue_s or 0.0
        computed_s = submitted_s + queue_s
        self._e2e.observe(ended_s - arrived_s)
        self._queue.observe(queue_s)
        self._prefill.observe(max(0.0, choice.first_s - computed_s))
        self._decode.observe(choice.decode_s)
        self._inference.observe(max(0.0, choice.last_s - computed_s))
        self._prompts.observe(num_prompt)
        self._outputs.observe(num_output)
        if num_output > 1:
            self._tpot.observe(choice.decode_s / (num_output - 1))

    def params(self, n: int, max_tokens: int | None) -> None:
        """What an accepted HTTP request asked for."""
        self._n.observe(n)
        if max_tokens is not None:
            self._max_tokens.observe(max_tokens)

    def refused(self, reason: str) -> None:
        """A request for work was not taken; `reason` is one of a few words of ours.

        `Observed` tells what is refused inside the application, `ConnectionLimits` what never gets there.
        """
        self.refusals[reason] = self.refusals.get(reason, 0) + 1

    def aborted(self, reason: str) -> None:
        """A request that had been taken did not come to its end; `reason` is one of a few words of ours.

        `Account` tells it of every generation, by its error or its `abort_reason`.
        """
        self._aborted.labels(reason).inc()

    # --- HTTP ----------------------------------------------------------------------------------------------

    def _http(self) -> None:
        self._exchanges = self._counter(
            "http_requests", "HTTP requests answered.", ["route", "method", "status"]
        )
        self.num_exchanges = 0
        self.num_streams = 0
        self.connections: Sized = ()
        lags = self._seconds("event_loop_lag", "How late the event loop runs a timer.", _SHORT_SECONDS)
        self.loop_lag = LoopLag(lags.observe)

    def exchange_began(self, connections: Sized) -> None:
        """An HTTP request came, over one of `connections`: all there are, now and later."""
        self.loop_lag.start()
        self.connections = connections
        self.num_exchanges += 1

    def exchange_over(self, route: str, method: str, status: int) -> None:
        """It is answered, or its client left. `route` is a template, `method` one of the usual ones."""
        self.num_exchanges -= 1
        self._exchanges.labels(route, method, str(status)).inc()
