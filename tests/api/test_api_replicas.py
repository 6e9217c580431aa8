"""Several engines behind the API: what its probes, metrics, page and profiles say of each."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Iterator

import httpx2
import pytest
from fake_engine import FakeEngine, FakeReplicas, Server, fake_info, serving
from scraped import Scraped, scrape
from test_api_raw import chat

from gqa_serve.api.metrics import Metrics
from gqa_serve.engine.metrics import EngineSnapshot, RequestSnapshot, StepStats
from gqa_serve.engine.wire import Profiled


@pytest.fixture
def engines() -> FakeReplicas:
    return FakeReplicas()


@pytest.fixture
def server(engines: FakeReplicas) -> Iterator[Server]:
    with serving(engines) as running:
        yield running


# --- probes ------------------------------------------------------------------------------------------------


def test_one_that_is_ready_is_enough(server: Server, engines: FakeReplicas) -> None:
    engines.engines[1].state = "restarting"
    for path in ("/health", "/ready", "/ping"):
        reply = httpx2.get(server.url + path)
        assert reply.status_code == 200
        assert reply.json() == {"status": "ok", "replicas": ["ready", "restarting", "ready"]}
    assert chat(server).status == 200


def test_none_that_is_ready_is_a_503_that_names_each(server: Server, engines: FakeReplicas) -> None:
    engines.state = engines.engines[0].state = engines.engines[2].state = "restarting"
    engines.engines[1].state = "failed"
    for path in ("/health", "/ready"):
        reply = httpx2.get(server.url + path)
        assert reply.status_code == 503
        message = reply.json()["error"]["message"]
        assert message == "The engine is restarting. Replicas: restarting, failed, restarting."


def test_a_server_of_one_engine_says_what_it_always_said() -> None:
    with serving(FakeEngine()) as single:
        assert httpx2.get(single.url + "/health").json() == {"status": "ok"}
        assert not any("replica" in dict(labels) for _, labels in scrape(single.url).samples)


# --- metrics -----------------------------------------------------------------------------------------------


def by_replica(found: Scraped, name: str, **labels: str) -> list[float]:
    return [found.get(name, replica=str(number), **labels) for number in range(3)]


def test_each_engine_has_series_of_its_own_that_add_up(server: Server, engines: FakeReplicas) -> None:
    for number, engine in enumerate(engines.engines, 1):
        engine.on_step(
            StepStats(
                num_running=number, num_waiting=2, num_free_blocks=64 - 16 * number, num_requests=number,
                num_prompt_tokens=10 * number, num_queried_tokens=100, num_hit_tokens=number, step_s=0.5,
            )
        )  # fmt: skip
    engines.engines[2].num_restarts = 4
    engines.engines[2].state = "restarting"
    engines.engines[1].model_info = fake_info(num_blocks=128)
    found = scrape(server.url)
    assert by_replica(found, "num_requests_running") == [1, 2, 0], "the third is gone"
    assert by_replica(found, "kv_cache_usage_perc") == [0.25, 0.75, 0]
    assert by_replica(found, "kv_blocks", state="active") == [16, 96, 0]
    assert by_replica(found, "prefix_cache_queries_total") == [100, 100, 100]
    assert by_replica(found, "prefix_cache_hits_total") == [1, 2, 3]
    assert by_replica(found, "iteration_tokens_total_sum") == [10, 20, 30]
    assert by_replica(found, "step_seconds_count", phase="prefill", part="other") == [1, 1, 1]
    assert by_replica(found, "engine_restarts_total") == [0, 0, 4]
    assert by_replica(found, "engine_state", state="ready") == [1, 1, 0]
    assert by_replica(found, "weight_bytes") == [1024] * 3
    # What is not of one engine has no such label.
    assert found.get("tokens_total", kind="prompt_computed") == 60
    assert found.get("tokens_total", kind="prompt_cached") == 6
    assert len(found.all("model_info")) == 1
    assert found.get("kv_bytes_per_token") == 64


def test_every_engine_process_is_watched(server: Server, engines: FakeReplicas) -> None:
    engines.engines[0].pid = engines.engines[2].pid = os.getpid()
    found = scrape(server.url)
    processes = {tuple(sorted(labels)) for labels in found.all("process_resident_memory_bytes")}
    assert processes == {
        (("process", "api"), ("replica", "")),
        (("process", "engine"), ("replica", "0")),
        (("process", "engine"), ("replica", "2")),
    }


def test_an_engine_that_ends_while_it_is_asked_for_is_not_taken_for_the_api() -> None:
    class Ending(FakeEngine):
        asked = 0

        @property
        def pid(self) -> int | None:  # type: ignore[override]
            self.asked += 1
            return os.getpid() if self.asked == 1 else None

        @pid.setter
        def pid(self, pid: int | None) -> None:
            pass

    engine = Ending()
    (family,) = (
        family
        for family in Metrics(engine).registry.collect()
        if family.name.endswith("process_resident_memory_bytes")
    )
    assert [sample.labels["process"] for sample in family.samples] == ["api", "engine"]
    assert engine.asked == 1


def test_requests_are_counted_once_for_all(server: Server) -> None:
    chat(server)
    found = scrape(server.url)
    assert found.get("request_success_total", finished_reason="stop") == 1
    assert found.get("time_to_first_token_seconds_count") == 1


# --- looking inside ----------------------------------------------------------------------------------------


def test_the_page_is_told_each_state_and_who_holds_what(server: Server, engines: FakeReplicas) -> None:
    engines.engines[2].state = "restarting"
    engines.picture = EngineSnapshot(
        bytes(3 * 64), [RequestSnapshot("r", "running", 1.5, 10, 3, 12, 0, 1, replica=1)]
    )
    state = httpx2.get(server.url + "/ui/state").json()
    assert (state["engine"], state["replicas"]) == ("ready", ["ready", "ready", "restarting"])
    assert state["picture"]["requests"][0]["replica"] == 1
    assert state["picture"]["blocks"]["num_free"] == 3 * 64


def test_a_profile_is_of_the_engine_that_was_asked_for(server: Server, engines: FakeReplicas) -> None:
    for engine in engines.engines:
        engine.profiled = Profiled(1, 3, gzip.compress(b"{}"))
    asked = {"num_steps": 3, "timeout_s": 5}
    for body in ({**asked, "replica": 2}, asked):
        assert server.post("/debug/profile", body).status_code == 200
    assert [engine.profiles for engine in engines.engines] == [[(3, 5.0)], [], [(3, 5.0)]]
    for wrong in (3, -1, "x"):
        reply = server.post("/debug/profile", {"replica": wrong})
        assert (reply.status_code, json.loads(reply.content)["error"]["param"]) == (400, "replica")
