"""/metrics against what happened, number by number."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest
from fake_engine import FakeEngine, Script, Server, serving, wait_until
from scraped import Scraped, scrape
from test_api_raw import CHAT, TEXT, chat, complete, get, post, send

from gqa_serve.api.exposition import VLLM_NAMES
from gqa_serve.api.histograms import Histogram, steps_1_2_5
from gqa_serve.api.loop_lag import INTERVAL_S, LoopLag
from gqa_serve.engine.metrics import StepStats
from gqa_serve.errors import QueueTimeoutError


@pytest.fixture
def metered() -> Iterator[Server]:
    """A server of its own: its counts begin at 0."""
    with serving(FakeEngine()) as running:
        yield running


def settled(server: Server, requests: int) -> Scraped:
    """/metrics when so many requests for the engine have ended."""

    def ended() -> float:
        return sum(scrape(server.url).all("request_success_total").values())

    wait_until(lambda: ended() == requests)
    return scrape(server.url)


# --- requests ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
def test_tokens_and_times_are_counted_exactly(metered: Server, stream: bool) -> None:
    """Output tokens: "Hello world" in bytes and the end-of-sequence token, in pieces of 3, 2, 6 and 1."""
    metered.engine.script = lambda request: Script(num_cached_tokens=16, queue_s=0.25)
    for _ in range(3):
        chat(metered, stream=stream)
    found = settled(metered, 3)
    assert found.get("request_success_total", finished_reason="stop") == 3
    assert found.get("generation_tokens_total") == found.get("tokens_total", kind="output") == 36
    assert found.get("time_to_first_token_seconds_count") == 3
    assert found.get("inter_token_latency_seconds_count") == 3 * (12 - 1)
    assert found.get("request_time_per_output_token_seconds_count") == 3
    assert found.get("prompt_tokens_total") == 3 * 21
    assert found.get("prompt_tokens_cached_total") == 3 * 16
    for name in ("e2e_request_latency", "request_prefill_time", "request_decode_time", "request_queue_time"):
        assert found.get(f"{name}_seconds_count") == 3
    assert found.get("request_queue_time_seconds_sum") == 0.75
    assert found.get("request_queue_time_seconds_bucket", le="0.2") == 0
    assert found.get("request_queue_time_seconds_bucket", le="0.5") == 3
    assert found.get("request_prompt_tokens_sum") == 3 * 21
    assert found.get("request_generation_tokens_sum") == 36
    assert found.get("request_params_n_sum") == 3
    # The gaps of a request add up to its decoding time, and that is part of its whole time.
    gaps, decode = (found.get(f"{n}_seconds_sum") for n in ("inter_token_latency", "request_decode_time"))
    assert gaps == pytest.approx(decode)
    assert decode <= found.get("e2e_request_latency_seconds_sum")
    assert found.all("aborts_total") == found.all("refusals_total") == {}


def test_a_prompt_is_counted_with_the_first_output(metered: Server) -> None:
    metered.engine.script = lambda request: Script(["a", "b"], hold_at=1, num_cached_tokens=16)
    with metered.connect() as connection:
        connection.sendall(post(CHAT, json.dumps({"messages": [{"role": "user", "content": "x"}]}).encode()))
        wait_until(lambda: scrape(metered.url).get("prompt_tokens_total") > 16)
        found = scrape(metered.url)
        assert found.get("prompt_tokens_cached_total") == 16
        assert sum(found.all("request_success_total").values()) == 0
    counted = found.get("prompt_tokens_total")
    found = settled(metered, 1)
    assert (found.get("prompt_tokens_total"), found.get("prompt_tokens_cached_total")) == (counted, 16)


def test_each_choice_is_a_request_to_the_engine(metered: Server) -> None:
    complete(metered, n=3, max_tokens=2)
    found = settled(metered, 3)
    assert found.get("request_success_total", finished_reason="length") == 3
    assert found.get("inter_token_latency_seconds_count") == 3
    assert found.get("request_params_n_count") == 1
    assert found.get("request_params_n_sum") == 3
    assert found.get("request_params_max_tokens_sum") == 2
    assert found.get("http_requests_total", route=TEXT, method="POST", status="200") == 1


def test_what_generates_nothing_has_no_first_token(metered: Server) -> None:
    send(metered, post("/v1/embeddings", json.dumps({"input": ["a", "b"]}).encode()))
    found = settled(metered, 2)
    assert found.get("request_success_total", finished_reason="length") == 2
    assert found.get("time_to_first_token_seconds_count") == 0
    assert found.get("inter_token_latency_seconds_count") == 0
    assert found.get("prompt_tokens_total") == 2


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves(metered: Server, stream: bool) -> None:
    metered.engine.script = lambda request: Script(["a", "b"], hold_at=1)
    with metered.connect() as connection:
        body = {"messages": [{"role": "user", "content": "x"}], "stream": stream}
        connection.sendall(post(CHAT, json.dumps(body).encode()))
        if stream:
            connection.recv(1)
            wait_until(lambda: scrape(metered.url).get("open_streams") == 1)
        wait_until(lambda: scrape(metered.url).get("http_requests_open") == 1)
    found = settled(metered, 1)
    assert found.get("request_success_total", finished_reason="abort") == 1
    assert found.get("aborts_total", reason="client_left") == 1
    assert found.get("e2e_request_latency_seconds_count") == 0
    assert found.get("open_streams") == 0
    assert found.get("http_requests_open") == 0
    wait_until(lambda: scrape(metered.url).get("open_connections") == 1)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("script", "finish", "reason"),
    [
        (Script(["a"], finish="error", error="x"), "error", "engine_error"),
        (Script(["a"], finish="abort"), "abort", "shutdown"),
        (Script(["a"], fault=QueueTimeoutError("x")), "abort", "queue_timeout"),
        (Script(["a"], fault=ValueError("secret")), "abort", "internal_error"),
    ],
)
def test_what_the_engine_ends_early(
    metered: Server, stream: bool, script: Script, finish: str, reason: str
) -> None:
    metered.engine.script = lambda request: script
    chat(metered, stream=stream)
    found = settled(metered, 1)
    assert found.get("request_success_total", finished_reason=finish) == 1
    assert {dict(labels)["reason"]: n for labels, n in found.all("aborts_total").items()} == {reason: 1}
    assert found.all("refusals_total") == {}


# --- HTTP --------------------------------------------------------------------------------------------------


def test_refusals_by_reason(metered: Server) -> None:
    send(metered, post(CHAT, b"{"))
    send(metered, post("/v1/messages", b"{"))
    send(metered, b"nonsense\r\n\r\n")
    send(metered, f"POST {TEXT} HTTP/1.1\r\nhost: evil.example\r\ncontent-length: 0\r\n\r\n".encode())
    send(metered, f"POST {TEXT} HTTP/1.1\r\nhost: localhost\r\ncontent-length: 99999999\r\n\r\n".encode())
    metered.engine.capacity = 0
    chat(metered)
    metered.engine.state = "restarting"
    chat(metered)
    metered.engine.state, metered.engine.capacity = "ready", None
    chat(metered, model="other")
    # A count follows its answer, which the client may have read before.
    wait_until(lambda: sum(scrape(metered.url).all("refusals_total").values()) == 8)
    found = scrape(metered.url)
    assert {dict(labels)["reason"]: n for labels, n in found.all("refusals_total").items()} == {
        "bad_request": 3, "not_found": 1, "too_large": 1, "queue_full": 1, "unavailable": 1, "forbidden": 1,
    }  # fmt: skip
    assert found.get("http_requests_total", route=CHAT, method="POST", status="429") == 1


def test_probes_and_scanners_are_no_refused_requests(metered: Server) -> None:
    metered.engine.state = "loading"
    for path in ("/ready", "/health", "/ping", "/v1/models/m", "/.env", CHAT):
        send(metered, get(path))
    send(metered, post("/wp-login.php", b"{}"))
    wait_until(lambda: sum(scrape(metered.url).all("http_requests_total").values()) > 7)
    found = scrape(metered.url)
    assert found.all("refusals_total") == {}
    assert found.get("http_requests_total", route="none", method="GET", status="404") == 1
    assert found.get("http_requests_total", route="/ready", method="GET", status="503") == 1
    assert found.get("http_requests_total", route=CHAT, method="GET", status="405") == 1


def test_clients_make_up_no_labels(metered: Server) -> None:
    before = len(scrape(metered.url).samples)
    for number in range(20):
        send(metered, f"M{number} /a{number} HTTP/1.1\r\nhost: x\r\n\r\n".encode())
        send(metered, get(f"/v1/models/m{number}"))
        send(metered, get(f"/v1/responses/r{number}"))
        chat(metered, model=f"m{number}")
    found = scrape(metered.url)
    assert len(found.samples) < before + 12
    assert all("m1" not in str(sample) for sample in found.samples)


def test_connections_beyond_the_limit_are_refusals() -> None:
    with serving(FakeEngine(), max_connections=2) as server, server.connect() as first, server.connect():
        with server.connect() as third:
            third.sendall(get("/health"))
            assert third.recv(100).startswith(b"HTTP/1.1 503")
        first.sendall(b"GET /metrics HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n")
        text = b"".join(iter(lambda: first.recv(65536), b"")).decode().partition("\r\n\r\n")[2]
    assert 'gqa_serve_refusals_total{model_name="fake/model",reason="connections"} 1.0' in text


def test_the_page_counts_like_any_route(metered: Server) -> None:
    send(metered, get("/ui/state"))
    found = scrape(metered.url)
    assert found.get("http_requests_total", route="/ui/state", method="GET", status="200") == 1


def test_a_key_is_needed_unless_told_otherwise() -> None:
    with serving(FakeEngine(), api_key=("k",)) as server:
        assert send(server, get("/metrics")).status == 401
        chat(server)
        found = scrape(server.url, headers={"x-api-key": "k"})
        assert found.get("refusals_total", reason="unauthorized") == 1
    with serving(FakeEngine(), api_key=("k",), open_metrics=True) as server:
        assert scrape(server.url).get("open_connections") == 1
        assert send(server, get("/load")).status == 401


def test_both_formats_and_vllms_names(metered: Server) -> None:
    chat(metered)
    settled(metered, 1)
    plain = httpx2.get(metered.url + "/metrics")
    assert plain.headers["content-type"].startswith("text/plain; version=0.0.4")
    newer = httpx2.get(metered.url + "/metrics", headers={"accept": "application/openmetrics-text"})
    assert newer.headers["content-type"].startswith("application/openmetrics-text")
    assert newer.text.endswith("# EOF\n")
    assert 'model_name="fake/model"' in plain.text
    vllm = httpx2.get(metered.url + "/metrics?names=vllm").text
    families = {line.split()[2] for line in vllm.splitlines() if line.startswith("# TYPE")}
    assert {name.removeprefix("vllm:").removesuffix("_total") for name in families} == {
        name.removesuffix("_total") for name in VLLM_NAMES
    }
    assert 'vllm:generation_tokens_total{model_name="fake/model"} 12.0' in vllm
    assert "gqa_serve_" not in vllm
    refused = httpx2.get(metered.url + "/metrics?names=sglang")
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "names")


# --- the engine --------------------------------------------------------------------------------------------


def test_steps_and_gauges(metered: Server) -> None:
    step = metered.engine.on_step
    standing = {"num_running": 2, "num_waiting": 3, "num_waiting_tokens": 40, "num_requests": 2,
                "num_free_blocks": 48, "num_cached_blocks": 8}  # fmt: skip
    step(StepStats(**standing, num_prompt_tokens=30, num_queried_tokens=46, num_hit_tokens=16,
                   schedule_s=0.25, forward_s=0.5, sample_s=1.0, step_s=2.0))  # fmt: skip
    step(StepStats(**standing, num_decode_tokens=2, num_preemptions=1, step_s=0.5))
    found = scrape(metered.url)
    assert found.get("num_requests_running") == 2
    assert found.get("num_requests_waiting") == 3
    assert found.get("num_waiting_tokens") == 40
    assert found.get("kv_cache_usage_perc") == 0.25
    assert [found.get("kv_blocks", state=state) for state in ("active", "cached", "free")] == [16, 8, 40]
    assert found.get("prefix_cache_queries_total") == 46
    assert found.get("prefix_cache_hits_total") == found.get("tokens_total", kind="prompt_cached") == 16
    assert found.get("tokens_total", kind="prompt_computed") == 30
    assert found.get("num_preemptions_total") == 1
    assert (found.get("iteration_tokens_total_count"), found.get("iteration_tokens_total_sum")) == (2, 32)
    parts = [
        found.get("step_seconds_sum", phase="prefill", part=part)
        for part in ("schedule", "forward", "sample", "other")
    ]
    assert parts == [0.25, 0.5, 1.0, 0.25]
    assert found.get("step_seconds_count", phase="decode", part="other") == 1
    assert found.get("step_seconds_count", phase="mixed", part="other") == 0


@pytest.mark.parametrize("also_restarted", [False, True])
def test_the_gauges_of_a_dead_engine_are_0(metered: Server, also_restarted: bool) -> None:
    metered.engine.on_step(StepStats(num_running=2, num_waiting=3, num_free_blocks=4, num_requests=2))
    assert scrape(metered.url).get("kv_cache_usage_perc") == 60 / 64
    metered.engine.state = "restarting"
    if also_restarted:
        metered.engine.state, metered.engine.num_restarts = "ready", 1
    found = scrape(metered.url)
    for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"):
        assert found.get(name) == 0
    assert found.get("kv_blocks", state="free") == 64
    assert found.get("engine_restarts_total") == also_restarted
    states = {dict(labels)["state"]: value for labels, value in found.all("engine_state").items()}
    assert sum(states.values()) == 1
    assert states["ready" if also_restarted else "restarting"] == 1


def test_facts_and_processes(metered: Server) -> None:
    found = scrape(metered.url)
    (labels,) = (dict(labels) for labels in found.all("model_info"))
    assert (labels["num_heads"], labels["num_kv_heads"], labels["backend"]) == ("8", "2", "reference")
    assert (found.get("kv_bytes_per_token"), found.get("kv_bytes_per_token_mha")) == (64, 256)
    assert found.get("process_resident_memory_bytes", process="api") > 2**20
    assert found.get("process_cpu_seconds_total", process="api") > 0
    metered.engine.model_info = None  # while it loads
    assert scrape(metered.url).all("model_info") == {}


def test_the_lag_of_the_loop_is_observed() -> None:
    lags: list[float] = []

    async def main() -> None:
        lag = LoopLag(lags.append)
        lag.start()
        lag.start()
        await asyncio.sleep(0)
        time.sleep(INTERVAL_S * 3)
        deadline = time.monotonic() + 20
        while len(lags) < 2 and time.monotonic() < deadline:
            await asyncio.sleep(0.01)

    asyncio.run(main())
    assert lags[0] > INTERVAL_S
    assert len(lags) >= 2


# --- histograms --------------------------------------------------------------------------------------------


def test_bounds() -> None:
    assert steps_1_2_5(0.001, 0.1) == (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1)
    assert steps_1_2_5(1, 30) == (1, 2, 5, 10, 20, 50)


def test_a_value_on_a_bound_belongs_below_it() -> None:
    histogram = Histogram("h", "", (1, 2))
    for value, times in ((1, 2), (1.5, 1), (2, 1), (9, 3)):
        histogram.series().observe(value, times)
    (family,) = histogram.collect()
    buckets = [sample.value for sample in family.samples if sample.name == "h_bucket"]
    assert buckets == [2, 4, 7]
    values = {sample.name: sample.value for sample in family.samples}
    assert (values["h_count"], values["h_sum"]) == (7, 2 + 1.5 + 2 + 27)


def test_the_page_has_a_row_for_each_metric(metered: Server) -> None:
    page = (Path(__file__).parents[2] / "docs" / "observability.md").read_text(encoding="utf-8")
    rows = {
        line.split("|")[1].strip().strip("`").split("{")[0]
        for line in page.splitlines()
        if line.startswith("| `gqa_serve_")
    }
    chat(metered)
    found = settled(metered, 1)
    kinds = {name: family.type for name, family in found.families.items()}
    names = {name + ("_total" if kind == "counter" else "") for name, kind in kinds.items()}
    assert rows == names
