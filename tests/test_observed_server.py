"""A real server watched: its metrics, a profile of its steps, its whole log with keys and prompts sent."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import psutil
import pytest
from demo_server import RunningServer, running
from test_server import eventually

sys.path.insert(0, str(Path(__file__).parent / "api"))
from scraped import Scraped, scrape

KEY = "sk-observed-0123456789"
PROMPT = "Kakapos cannot fly"
BODY = {"messages": [{"role": "user", "content": PROMPT}], "temperature": 0, "max_tokens": 24}
AUTH = {"authorization": f"Bearer {KEY}"}
CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    keys = tmp_path_factory.mktemp("keys") / "keys.txt"
    keys.write_text(KEY + "\n")
    with running("--log-format", "json", "--log-level", "debug", "--api-key-file", str(keys)) as server:
        yield server


def post(server: RunningServer, path: str, body: Any, **headers: str) -> httpx2.Response:
    return httpx2.post(server.url + path, json=body, headers={**AUTH, **headers}, timeout=60)


def numbers(server: RunningServer) -> Scraped:
    return scrape(server.url, headers=AUTH)


def test_metrics_of_a_real_engine(watched: RunningServer) -> None:
    before = numbers(watched)
    whole = post(watched, CHAT, BODY).json()
    streamed = post(watched, CHAT, {**BODY, "stream": True}).text
    assert streamed.endswith("data: [DONE]\n\n")
    eventually(lambda: sum(numbers(watched).all("request_success_total").values())
               == sum(before.all("request_success_total").values()) + 2)  # fmt: skip
    after = numbers(watched)

    def more(name: str, **labels: str) -> float:
        return after.get(name, **labels) - before.get(name, **labels)

    output, prompt = whole["usage"]["completion_tokens"], whole["usage"]["prompt_tokens"]
    assert more("generation_tokens_total") == 2 * output
    assert more("prompt_tokens_total") == 2 * prompt
    assert more("inter_token_latency_seconds_count") == 2 * (output - 1)
    assert more("time_to_first_token_seconds_count") == 2
    assert more("prefix_cache_queries_total") == 2 * prompt
    cached = more("tokens_total", kind="prompt_cached")
    assert cached == more("prefix_cache_hits_total") > 0
    assert more("tokens_total", kind="prompt_computed") == 2 * prompt - cached
    assert more("step_seconds_count", phase="decode", part="forward") > 0
    assert more("iteration_tokens_total_sum") >= 2 * (prompt + output - 1) - cached
    for name in ("num_requests_running", "num_requests_waiting", "open_streams", "kv_cache_usage_perc"):
        assert after.get(name) == 0, name
    assert after.get("kv_blocks", state="cached") > 0
    (facts,) = (dict(labels) for labels in after.all("model_info"))
    assert (facts["num_heads"], facts["num_kv_heads"]) == ("9", "3")
    assert after.get("process_resident_memory_bytes", process="engine") > 50 * 2**20
    assert after.get("event_loop_lag_seconds_count") > 0


def test_a_profile_changes_nothing_and_shows_the_steps(watched: RunningServer) -> None:
    plain = post(watched, CHAT, BODY).json()["choices"]
    replies: list[httpx2.Response] = []
    options = {"num_steps": 5, "timeout_s": 60}
    thread = threading.Thread(target=lambda: replies.append(post(watched, "/debug/profile", options)))
    thread.start()
    # Whether it has begun is not to be seen; requests are sent until it has all its steps.
    while thread.is_alive():
        assert post(watched, CHAT, BODY).json()["choices"] == plain
    (reply,) = replies
    assert reply.status_code == 200, reply.text
    assert reply.headers["x-profiled-steps"] == "5"
    names = [event.get("name") for event in reply.json()["traceEvents"]]
    for part in ("step", "schedule", "forward", "sample"):
        assert names.count(f"gqa_serve.{part}") >= 5, part
    idle = post(watched, "/debug/profile", {"num_steps": 5, "timeout_s": 0.2})
    assert (idle.status_code, idle.json()["error"]["code"]) == (504, "no_steps")
    assert post(watched, CHAT, BODY).json()["choices"] == plain


def test_the_api_process_has_no_torch(watched: RunningServer) -> None:
    libraries = {Path(one.path).name for one in psutil.Process(watched.process.pid).memory_maps()}
    assert not any(name.startswith("libtorch") for name in libraries)


def test_no_key_and_no_prompt_in_the_whole_log(watched: RunningServer) -> None:
    answer = post(watched, CHAT, {**BODY, "stream": True}, **{"x-request-id": "last-words"})
    assert answer.headers["x-request-id"] == "last-words"
    text = post(watched, CHAT, BODY).json()["choices"][0]["message"]["content"]
    for body in (b"{" + KEY.encode(), json.dumps({**BODY, "model": KEY}).encode(), PROMPT.encode()):
        assert httpx2.post(watched.url + CHAT, content=body, headers=AUTH).status_code in (400, 404)
    assert httpx2.post(watched.url + CHAT, json=BODY, headers={"x-api-key": KEY + "x"}).status_code == 401
    assert httpx2.get(f"{watched.url}/v1/models/x?api_key={KEY}", headers=AUTH).status_code == 404
    eventually(lambda: '"reason": "not_found"' in "".join(watched.lines))
    watched.engine.kill()
    eventually(lambda: numbers(watched).get("engine_restarts_total") == 1)
    eventually(lambda: post(watched, CHAT, BODY).status_code == 200)
    assert watched.stop() == 0
    log = [line for line in watched.lines if not line.startswith("Ready: ")]
    records = [json.loads(line) for line in log]
    whole = "".join(log)
    assert KEY not in whole
    assert PROMPT not in whole
    assert text[:12] not in whole
    assert all(record["process"] in ("api", "engine") for record in records)
    assert any(record.get("request_id") == "last-words" and record["stream"] for record in records)
    assert any(record.get("status") == 401 for record in records)
    assert any("engine process ended" in record["message"] for record in records)
    assert any(record["message"].startswith("Stopping") for record in records)
