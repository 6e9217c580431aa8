"""Traces as a collector receives them, and serving while none is there."""

from __future__ import annotations

import gzip
import http.server
import json
import logging
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from fake_engine import MODEL, FakeEngine, Script, Server, serving, wait_until
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from test_api_raw import CHAT, chat, complete, post, send

from gqa_serve.api import tracing
from gqa_serve.api.tracing import Tracing, check_endpoint
from gqa_serve.errors import ConfigError

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


class Collector:
    """OTLP over HTTP with protobuf, on loopback."""

    def __init__(self) -> None:
        self.spans: list[Any] = []
        self.services: set[str] = set()
        collector = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                if self.headers.get("content-encoding") == "gzip":
                    body = gzip.decompress(body)
                assert self.path == "/v1/traces"
                for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
                    collector.services |= {
                        one.value.string_value
                        for one in resource.resource.attributes
                        if one.key == "service.name"
                    }
                    for scope in resource.scope_spans:
                        collector.spans += scope.spans
                self.send_response(200)
                self.send_header("content-length", "0")
                self.end_headers()

            def log_message(self, *args: object) -> None: ...

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def roots(self) -> list[Any]:
        return [span for span in self.spans if span.kind == span.SPAN_KIND_SERVER]

    def below(self, root: Any) -> dict[str, Any]:
        return {span.name: span for span in self.spans if span.parent_span_id == root.span_id}


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    running = Collector()
    yield running
    running.server.shutdown()
    running.server.server_close()


@pytest.fixture(scope="module")
def traced_server(collector: Collector) -> Iterator[Server]:
    with serving(FakeEngine(), otlp_endpoint=collector.url + "/") as server:
        yield server


@pytest.fixture
def traced(traced_server: Server, collector: Collector) -> Server:
    traced_server.engine.reset()
    collector.spans.clear()
    return traced_server


def attributes(span: Any) -> dict[str, Any]:
    def value(one: Any) -> Any:
        kind = one.WhichOneof("value")
        return (
            [value(item) for item in one.array_value.values] if kind == "array_value" else getattr(one, kind)
        )

    return {one.key: value(one.value) for one in span.attributes}


@pytest.mark.parametrize("stream", [False, True])
def test_a_span_for_each_request(traced: Server, collector: Collector, stream: bool) -> None:
    traced.engine.script = lambda request: Script(num_cached_tokens=16, queue_s=0.0)
    body = {
        "messages": [{"role": "user", "content": "a secret"}],
        "stream": stream,
        "temperature": 0.5,
        "n": 2,
    }
    send(traced, post(CHAT, json.dumps(body).encode(), f"traceparent: {PARENT}", "x-request-id: mine"))
    wait_until(lambda: bool(collector.roots()))
    (root,) = collector.roots()
    assert collector.services == {"gqa-serve"}
    assert root.name == f"chat {MODEL}"
    assert root.trace_id.hex() == PARENT.split("-")[1]
    assert root.parent_span_id.hex() == PARENT.split("-")[2]
    found = attributes(root)
    expected = {
        "gen_ai.operation.name": "chat", "gen_ai.provider.name": "gqa_serve", "gen_ai.request.model": MODEL,
        "gen_ai.response.model": MODEL, "gen_ai.request.temperature": 0.5, "gen_ai.request.choice.count": 2,
        "gen_ai.request.stream": stream, "gen_ai.response.finish_reasons": ["stop", "stop"],
        "gen_ai.usage.output_tokens": 24, "gen_ai.usage.cache_read.input_tokens": 16,
        "gqa_serve.request_id": "mine", "http.request.method": "POST", "url.path": CHAT,
    }  # fmt: skip
    assert found.items() >= expected.items()
    assert found["gen_ai.response.id"].startswith("chatcmpl-")
    assert found["gen_ai.response.time_to_first_chunk"] > 0
    stages = collector.below(root)
    assert list(stages) == ["queue", "prefill", "decode"]
    moments = [root.start_time_unix_nano]
    for span in stages.values():
        moments += [span.start_time_unix_nano, span.end_time_unix_nano]
        assert span.trace_id == root.trace_id
    assert [*moments, root.end_time_unix_nano] == sorted([*moments, root.end_time_unix_nano])
    assert "secret" not in str(collector.spans)


def test_a_trace_of_its_own_without_a_parent(
    traced: Server, collector: Collector, caplog: pytest.LogCaptureFixture
) -> None:
    body = json.dumps({"prompt": "x"}).encode()
    with caplog.at_level(logging.INFO, "gqa_serve.api.account"):
        send(traced, post("/v1/completions", body, "traceparent: 00-nonsense"))
        wait_until(lambda: bool(collector.roots()))
    (root,) = collector.roots()
    assert root.parent_span_id == b""
    assert attributes(root)["gen_ai.operation.name"] == "text_completion"
    (fields,) = [record.fields for record in caplog.records if hasattr(record, "fields")]
    assert fields["trace_id"] == root.trace_id.hex()


def test_what_went_wrong_is_said(traced: Server, collector: Collector) -> None:
    traced.engine.script = lambda request: Script(["a"], finish="error", error="x")
    chat(traced)
    wait_until(lambda: bool(collector.roots()))
    (root,) = collector.roots()
    assert root.status.code == root.status.STATUS_CODE_ERROR
    assert attributes(root)["error.type"] == "engine_error"


@pytest.mark.parametrize("silent", [False, True])
def test_without_a_collector_all_is_served(monkeypatch: pytest.MonkeyPatch, silent: bool) -> None:
    """Nothing listens there, or what listens never answers; spans beyond the queue are dropped."""
    monkeypatch.setattr(tracing, "MAX_QUEUED_SPANS", 512)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        if not silent:
            listener.close()
            address = "http://127.0.0.1:9"
        else:
            address = f"http://127.0.0.1:{listener.getsockname()[1]}"
        with serving(FakeEngine(), otlp_endpoint=address) as server:
            for _ in range(150):  # four spans each
                assert complete(server, max_tokens=2).status == 200
            streamed = send(server, post("/v1/completions", b'{"prompt": "x", "stream": true}'))
            assert b"[DONE]" in streamed.body


@pytest.mark.parametrize("endpoint", ["", "127.0.0.1:4318", "grpc://x:4317", "http://", "file:///x"])
def test_an_endpoint_that_is_none(endpoint: str) -> None:
    with pytest.raises(ConfigError, match="--otlp-endpoint"):
        check_endpoint(endpoint)


def test_the_extra_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    check_endpoint(None)
    with pytest.raises(ConfigError, match=r"pip install 'gqa-serve\[otel\]'"):
        Tracing("http://127.0.0.1:4318")


def test_nothing_of_it_is_imported_unless_wanted() -> None:
    code = "import sys, gqa_serve.server; sys.exit(any('opentelemetry' in name for name in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], timeout=120, check=False).returncode == 0
    assert tracing.PROVIDER == "gqa_serve"
