"""The server on a real Ray cluster of one machine: load, caches, streams, clients and replicas that go."""

from __future__ import annotations

import json
import re
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx2
import psutil
import pytest

pytest.importorskip("ray", reason="Ray is not installed; pip install 'gqa-serve[ray]'")

from ray_cluster import DEADLINE_S, Cluster, cluster, wait_until

pytestmark = pytest.mark.timeout(900)

LONG = {"max_tokens": 1000, "ignore_eos": True, "temperature": 0}


@pytest.fixture(scope="module")
def two() -> Iterator[Cluster]:
    """Two engines."""
    with cluster() as started:
        started.deploy(min_replicas=2)
        yield started


def chat(text: str, **fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text}], "max_tokens": 8, "temperature": 0, **fields}


def requests_by_replica(client: httpx2.Client) -> dict[str, float]:
    """Requests that have ended, by replica."""
    found: dict[str, float] = {}
    text = client.get("/metrics").raise_for_status().text
    for replica, count in re.findall(r'gqa_serve_request_success_total\{replica="(\w+)".*\} (\S+)', text):
        found[replica] = found.get(replica, 0) + float(count)
    return found


def test_it_is_the_server_that_gqa_serve_is(two: Cluster) -> None:
    with two.client() as client:
        assert [model["id"] for model in client.get("/v1/models").json()["data"]] == ["demo"]
        assert client.get("/health").json() == {"status": "ok"}
        unknown = client.get("/nope", headers={"x-request-id": "mine"})
        assert (unknown.status_code, unknown.json()["error"]["code"]) == (404, "unknown_url")
        assert unknown.headers.get_list("x-request-id") == ["mine"]
        wrong = client.post("/v1/messages", json={"messages": []})
        assert (wrong.status_code, wrong.json()["type"]) == (400, "error")
        large = client.post("/v1/completions", content=b"x" * (16 * 2**20 + 1))
        assert (large.status_code, large.json()["error"]["code"]) == (413, "request_too_large")
        foreign = client.get("/v1/models", headers={"host": "evil.example"})
        assert (foreign.status_code, foreign.json()["error"]["code"]) == (403, "host_not_allowed")


def test_a_stream_comes_as_it_is_computed_and_in_order(two: Cluster) -> None:
    body = chat("Count to ten.", max_tokens=60, ignore_eos=True)
    with two.client() as client:
        whole = client.post("/v1/chat/completions", json=body).json()["choices"][0]["message"]["content"]
        text, moments = "", []
        with client.stream("POST", "/v1/chat/completions", json=body | {"stream": True}) as response:
            assert response.headers["content-type"].startswith("text/event-stream")
            lines = [(line, moments.append(time.monotonic())) for line in response.iter_lines() if line]
        data = [line.removeprefix("data: ") for line, _ in lines]
        assert data[-1] == "[DONE]"
        text = "".join(json.loads(each)["choices"][0]["delta"].get("content") or "" for each in data[:-1])
        assert text == whole
        assert len(set(moments)) > 20  # not all at once


def test_load_is_spread(two: Cluster) -> None:
    with two.client() as client:
        before = requests_by_replica(client)
        with ThreadPoolExecutor(24) as pool:
            answers = list(
                pool.map(
                    lambda number: client.post("/v1/chat/completions", json=chat(f"Hello, number {number}!")),
                    range(24),
                )
            )
        assert {answer.status_code for answer in answers} == {200}
        counts = {name: count - before[name] for name, count in requests_by_replica(client).items()}
    assert sum(counts.values()) == 24
    assert min(counts.values()) >= 8, counts


def test_equal_beginnings_meet_in_one_cache(two: Cluster) -> None:
    stories = [f"Story {number}: " + "The fox jumps over the lazy dog. " * 30 for number in range(4)]
    with two.client() as client:
        for story in stories:
            client.post("/v1/chat/completions", json=chat(story)).raise_for_status()
        for _ in range(3):
            for story in stories:
                usage = client.post("/v1/chat/completions", json=chat(story + "Why?")).json()["usage"]
                assert usage["prompt_tokens_details"]["cached_tokens"] > 200


def test_a_client_that_leaves_frees_its_blocks(two: Cluster) -> None:
    with (
        two.client() as client,
        client.stream(
            "POST", "/v1/chat/completions", json=chat("Tell me everything.", stream=True, **LONG)
        ) as response,
    ):
        lines = response.iter_lines()
        next(lines)
        assert sum(each["requests"] for each in two.status()) == 1
    wait_until(lambda: all(each["requests"] == each["kv_use"] == 0 for each in two.status()))


def test_a_killed_replica_breaks_its_streams_at_once_and_is_replaced(two: Cluster) -> None:
    ends: dict[int, BaseException | str] = {}
    begun = threading.Barrier(5)

    def stream(number: int) -> None:
        with two.client() as client:
            try:
                body = chat(f"Number {number}.", stream=True, **(LONG | {"max_tokens": 300}))
                with client.stream("POST", "/v1/chat/completions", json=body) as response:
                    lines = response.iter_lines()
                    next(lines)
                    begun.wait(DEADLINE_S)
                    ends[number] = [line for line in lines if line][-1]
            except httpx2.HTTPError as error:
                ends[number] = error

    threads = [threading.Thread(target=stream, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    begun.wait(DEADLINE_S)
    before = two.status()
    assert all(each["requests"] for each in before)
    victim, other = before
    engine = psutil.Process(victim["engine_pid"])
    psutil.Process(victim["pid"]).send_signal(signal.SIGKILL)
    for thread in threads:
        thread.join(DEADLINE_S)
    broken = [end for end in ends.values() if isinstance(end, httpx2.HTTPError)]
    assert len(broken) == victim["requests"]
    assert [end for end in ends.values() if end not in broken] == ["data: [DONE]"] * int(other["requests"])
    engine.wait(60)  # nobody is left to tell it anything
    wait_until(lambda: len(two.status()) == 2)
    assert victim["pid"] not in [each["pid"] for each in two.status()]
    with two.client() as client:
        assert client.post("/v1/chat/completions", json=chat("Still there?")).status_code == 200


def test_a_dead_engine_costs_only_what_it_held(two: Cluster) -> None:
    """From the moment it is dead, long before the routers are told, new requests go to the other one."""
    victim = two.status()[0]["replica"]

    def of_victim(what: str) -> Any:
        return next(each[what] for each in two.status() if each["replica"] == victim)

    psutil.Process(of_victim("engine_pid")).send_signal(signal.SIGKILL)
    wait_until(lambda: of_victim("state") != "ready" or of_victim("num_restarts"))
    with two.client() as client:
        answers = [client.post("/v1/chat/completions", json=chat(f"Hello {number}!")) for number in range(12)]
    assert [answer.status_code for answer in answers] == [200] * 12
    wait_until(lambda: of_victim("state") == "ready")
    assert of_victim("num_restarts") == 1


@pytest.mark.slow
def test_an_update_loses_no_request(two: Cluster) -> None:
    over = threading.Event()
    statuses: list[int] = []
    ends: list[str] = []

    def ask(number: int) -> None:
        with two.client() as client:
            while not over.is_set():
                body = chat(f"I am number {number}.", max_tokens=20, stream=True)
                with client.stream("POST", "/v1/chat/completions", json=body) as response:
                    statuses.append(response.status_code)
                    ends.append([line for line in response.iter_lines() if line][-1])

    before = {each["pid"] for each in two.status()}
    with ThreadPoolExecutor(4) as pool:
        asking = [pool.submit(ask, number) for number in range(4)]
        try:
            two.deploy(min_replicas=2, served_model_name="renamed")
        finally:
            over.set()
        for each in asking:
            each.result(DEADLINE_S)
    assert len(statuses) > 4
    assert set(statuses) == {200}
    assert set(ends) == {"data: [DONE]"}
    assert not before & {each["pid"] for each in two.status()}
    with two.client() as client:
        assert [model["id"] for model in client.get("/v1/models").json()["data"]] == ["renamed"]


@pytest.mark.slow
def test_load_adds_replicas_and_its_end_takes_them_away() -> None:
    with cluster() as one:
        scaling = {"upscale_delay": 1, "downscale_delay": 2, "look_back": 2, "target_requests": 2}
        one.deploy(min_replicas=1, max_replicas=2, **scaling)
        assert len(one.status()) == 1
        over = threading.Event()

        def ask() -> None:
            with one.client() as client:
                while not over.is_set():
                    response = client.post("/v1/chat/completions", json=chat("Go on.", max_tokens=50))
                    assert response.status_code == 200

        with ThreadPoolExecutor(4) as pool:
            asking = [pool.submit(ask) for _ in range(4)]
            try:
                wait_until(lambda: len(one.status()) == 2)
            finally:
                over.set()
            for each in asking:
                each.result(DEADLINE_S)
        wait_until(lambda: len(one.status()) == 1)
