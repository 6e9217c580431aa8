"""`Tracing`: each generation as a span of OpenTelemetry, with its waiting, prefill and decoding below it.

Owns the names in a trace: those of the semantic conventions for generative AI where there is one. Knows jobs
and generations once they are over: a span is made from the times that were noted anyway, in a fraction of a
millisecond, and sent by a thread of the library's. Invariants: nothing waits for the collector, and what it
cannot take is dropped; no prompt and no answer is in a span. The library is an extra, imported if wanted.
"""

from __future__ import annotations

import atexit
import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from starlette.types import Scope

from gqa_serve import __version__
from gqa_serve.api.text_stream import Choice, Generation
from gqa_serve.errors import ConfigError

if TYPE_CHECKING:
    from gqa_serve.api.serving import Job

EXPORT_TIMEOUT_S = 3.0  # also what a stopping server waits for the collector, at most
MAX_QUEUED_SPANS = 4096
PROVIDER = "gqa_serve"

_OPERATIONS = {"completion": "text_completion", "embedding": "embeddings"}  # the rest is chat
_CONTEXT_HEADERS = (b"traceparent", b"tracestate")


def check_endpoint(endpoint: str | None) -> None:
    """Raises ConfigError if traces cannot be sent there, or if the library is not installed."""
    if endpoint is None:
        return
    parts = urlsplit(endpoint)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigError(
            f"--otlp-endpoint {endpoint!r} is not a URL like http://127.0.0.1:4318, where a collector takes "
            "OTLP over HTTP."
        )
    try:
        import opentelemetry.exporter.otlp.proto.http.trace_exporter
        import opentelemetry.sdk.trace  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            "--otlp-endpoint needs the OpenTelemetry SDK: pip install 'gqa-serve[otel]'"
        ) from error


class Tracing:
    """Sends to the collector at `endpoint`, e.g. http://127.0.0.1:4318. Raises ConfigError."""

    def __init__(self, endpoint: str) -> None:
        check_endpoint(endpoint)
        from opentelemetry import trace
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._trace = trace
        # A collector that is down would be told of again and again; once a batch is enough.
        logging.getLogger("opentelemetry").setLevel(logging.ERROR)
        exporter = OTLPSpanExporter(endpoint.rstrip("/") + "/v1/traces", timeout=EXPORT_TIMEOUT_S)
        self._processor = BatchSpanProcessor(
            exporter, max_queue_size=MAX_QUEUED_SPANS, schedule_delay_millis=1000
        )
        resource = Resource.create({"service.name": "gqa-serve", "service.version": __version__})
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(self._processor)
        atexit.register(self.close)
        self._tracer = self._provider.get_tracer("gqa_serve", __version__)
        self._extract: Callable[[Mapping[str, str]], Any] = TraceContextTextMapPropagator().extract

    def record(
        self,
        job: Job,
        generation: Generation,
        scope: Scope,
        facts: Mapping[str, Any],
        arrived_s: float,
        ended_s: float,
    ) -> str:
        """A generation is over; `facts` are the fields of its log line. Returns the trace's id."""
        clock = time.time_ns() - int(time.monotonic() * 1e9)

        def at(moment_s: float) -> int:
            return clock + int(moment_s * 1e9)

        carrier = {
            name.decode(): value.decode("latin-1")
            for name, value in scope["headers"]
            if name in _CONTEXT_HEADERS
        }
        operation = _OPERATIONS.get(job.kind, "chat")
        span = self._tracer.start_span(
            f"{operation} {job.model}",
            context=self._extract(carrier),
            kind=self._trace.SpanKind.SERVER,
            attributes=_attributes(job, generation, operation, scope, facts),
            start_time=at(arrived_s),
        )
        if facts["abort"] is not None:
            span.set_attribute("error.type", facts["abort"])
            span.set_status(self._trace.Status(self._trace.StatusCode.ERROR, facts["abort"]))
        below = self._trace.set_span_in_context(span)
        for name, begin_s, end_s in _stages(generation.choices, generation.started):
            self._tracer.start_span(name, context=below, start_time=at(begin_s)).end(at(end_s))
        span.end(at(ended_s))
        return f"{span.get_span_context().trace_id:032x}"

    def close(self) -> None:
        """Send what is queued, for `EXPORT_TIMEOUT_S` at most; the library would wait for each batch."""
        sending = threading.Thread(target=self._provider.shutdown, daemon=True)
        sending.start()
        sending.join(EXPORT_TIMEOUT_S)


def _stages(choices: Sequence[Choice], submitted_s: float) -> list[tuple[str, float, float]]:
    """What the first choice that was computed went through: names and moments on the monotonic clock."""
    for choice in choices:
        if choice.first_s is not None:
            computed_s = min(submitted_s + (choice.queue_s or 0.0), choice.first_s)
            return [
                ("queue", submitted_s, computed_s),
                ("prefill", computed_s, choice.first_s),
                ("decode", choice.first_s, choice.last_s),
            ]
    return []


def _attributes(
    job: Job, generation: Generation, operation: str, scope: Scope, facts: Mapping[str, Any]
) -> dict[str, Any]:
    params = job.params[0]
    values = {
        "gen_ai.operation.name": operation,
        "gen_ai.provider.name": PROVIDER,
        "gen_ai.request.model": job.model,
        "gen_ai.request.choice.count": job.n,
        "gen_ai.request.max_tokens": params.max_tokens,
        "gen_ai.request.temperature": params.temperature,
        "gen_ai.request.top_p": params.top_p,
        "gen_ai.request.top_k": params.top_k,
        "gen_ai.request.seed": params.seed,
        "gen_ai.request.stream": facts["stream"],
        "gen_ai.response.id": job.id,
        "gen_ai.response.model": job.model,
        "gen_ai.response.finish_reasons": [
            choice.finish_reason or "cancelled" for choice in generation.choices
        ],
        "gen_ai.response.time_to_first_chunk": facts["ttft_s"],
        "gen_ai.usage.input_tokens": facts["prompt"],
        "gen_ai.usage.cache_read.input_tokens": facts["cached"],
        "gen_ai.usage.output_tokens": facts["output"],
        "gen_ai.usage.reasoning.output_tokens": facts["thinking"],
        "gqa_serve.request_id": facts["request_id"],
        "gqa_serve.queue_time": facts["queue_s"],
        "http.request.method": scope["method"],
        "url.path": scope["path"],
    }
    return {name: value for name, value in values.items() if value is not None}
