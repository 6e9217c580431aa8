"""The dashboard of the page at `/`, in Chromium: its numbers are those of /metrics and of the engine."""

from __future__ import annotations

import re
from typing import Any

import msgspec
import pytest
from actions import ask, metrics, nameless, number, probe, until
from demo_server import RunningServer
from fake_engine import FakeEngine, FakeReplicas, Server, fake_info, serving, wait_until

from gqa_serve.engine.metrics import BlockState, EngineSnapshot, RequestSnapshot, StepStats

FREE, CACHED, ACTIVE, SHARED = BlockState.FREE, BlockState.CACHED, BlockState.ACTIVE, BlockState.SHARED
HOSTILE = '<img src=x onerror="document.title=1">'


def busy(engine: FakeEngine) -> None:
    """An engine in the middle of things: 100 blocks, three requests."""
    engine.model_info = fake_info(num_blocks=100)
    states = [FREE] * 50 + [CACHED] * 20 + [ACTIVE] * 25 + [SHARED] * 5
    requests = [
        RequestSnapshot("chatcmpl-1", "running", 75.2, 1200, 34, 1233, 1024, 77),
        RequestSnapshot(HOSTILE, "waiting", 0.05, 8, 0, 0, 0, 0),
        RequestSnapshot("chatcmpl-3", "preparing", 2.5, 9, 0, 0, 0, 0),
    ]
    engine.picture = EngineSnapshot(bytes(states), requests)
    engine.on_step(
        StepStats(
            num_running=1, num_waiting=1, num_free_blocks=70, num_cached_blocks=20, num_requests=1,
            num_prompt_tokens=176, num_queried_tokens=1200, num_hit_tokens=1024, num_preemptions=2,
            forward_s=0.01, step_s=0.01,
        )
    )  # fmt: skip


def dashboard(page: Any) -> None:
    """Go there and wait for the first numbers."""
    page.click("#to-dashboard")
    until(page, "document.getElementById('tile-running').textContent !== '–'")
    until(page, "document.querySelector('#legend strong').textContent !== ''")


def legend(page: Any) -> dict[str, float]:
    texts = page.locator("#legend li").all_inner_texts()
    return {text.split()[0]: number(text.split()[1]) for text in texts}


def test_numbers_equal_metrics_on_the_demo_model(demo_server: RunningServer, open_page: Any) -> None:
    page = open_page(demo_server.url)
    page.fill("#max_tokens", "12")
    ask(page, "Say something about memory, please, in your own words.")
    dashboard(page)
    wait_until(lambda: metrics(demo_server.url)["gqa_serve_num_requests_running"] == 0)
    for _ in range(2):  # the first may have been under way when all came to rest
        with page.expect_response("**/metrics"):
            pass
    page.wait_for_timeout(200)
    told = metrics(demo_server.url)
    shown = {
        name: number(page.locator(f"#tile-{name}").inner_text())
        for name in ("running", "waiting", "usage", "hits", "prompt", "output", "preempted")
    }
    assert shown == {
        "running": told["gqa_serve_num_requests_running"],
        "waiting": told["gqa_serve_num_requests_waiting"],
        "usage": round(told["gqa_serve_kv_cache_usage_perc"] * 100, 1),
        "hits": round(
            told["gqa_serve_prefix_cache_hits_total"] / told["gqa_serve_prefix_cache_queries_total"] * 100, 1
        ),
        "prompt": told["gqa_serve_prompt_tokens_total"],
        "output": told["gqa_serve_generation_tokens_total"],
        "preempted": told["gqa_serve_num_preemptions_total"],
    }
    assert shown["output"] >= 12
    blocks = legend(page)
    assert blocks["free"] == told['gqa_serve_kv_blocks{state="free"}']
    assert blocks["cached"] == told['gqa_serve_kv_blocks{state="cached"}'] > 0
    assert blocks["active"] + blocks["shared"] == told['gqa_serve_kv_blocks{state="active"}']
    facts = page.locator("#facts").inner_text()
    assert "9 query heads share 3 KV heads" in facts
    with demo_server.client() as client:
        longest = client.models.list().data[0].model_dump()["max_model_len"]
    assert f"Requests of the whole context ({longest:,})" in facts


def test_blocks_and_requests_are_the_engines(server: Server, open_page: Any) -> None:
    busy(server.engine)
    page = open_page(server.url)
    dashboard(page)
    assert legend(page) == {"free": 50, "cached": 20, "active": 25, "shared": 5}
    pixels = probe(page, "cellsByColour")
    smallest = pixels["shared"] / 5  # a cell, all of which are about as large
    for name, cells in {"free": 50, "cached": 20, "active": 25}.items():
        assert pixels[name] / smallest == pytest.approx(cells, rel=0.1)
    assert "100 blocks of 16 tokens" in page.locator("#blocks-text").inner_text()
    rows = [row.split("\t") for row in page.locator("#requests tbody tr").all_inner_texts()]
    assert [[cell.strip() for cell in row] for row in rows] == [
        ["chatcmpl-1", "running", "1 min 15 s", "1,200", "1,024", "34", "77"],
        [HOSTILE, "waiting", "50 ms", "8", "0", "0", "0"],
        ["chatcmpl-3", "preparing", "2.50 s", "9", "0", "0", "0"],
    ]
    assert page.locator("#requests img").count() == 0
    told = metrics(server.url)
    assert told["gqa_serve_num_requests_running"] == number(page.locator("#tile-running").inner_text()) == 1
    assert number(page.locator("#tile-usage").inner_text()) == 30
    assert number(page.locator("#tile-hits").inner_text()) == 85.3
    assert number(page.locator("#tile-preempted").inner_text()) == told["gqa_serve_num_preemptions_total"]
    assert nameless(page) == []


def test_what_grouped_queries_save(server: Server, open_page: Any) -> None:
    server.engine.model_info = fake_info(
        num_heads=32, num_kv_heads=8, kv_bytes_per_token=131072, num_blocks=4096, block_size=16,
        max_model_len=8192,
    )  # fmt: skip
    page = open_page(f"{server.url}/#dashboard")
    page.wait_for_selector(".compare")
    rows = {
        cells[0].strip(): [cell.strip() for cell in cells[1:]]
        for row in page.locator(".compare tbody tr").all_inner_texts()
        if (cells := row.split("\t"))
    }
    assert rows == {
        "KV heads": ["8", "32"],
        "KV cache per token": ["128 KiB", "512 KiB"],
        "KV cache of 65,536 tokens": ["8.0 GiB", "32.0 GiB"],
        "Tokens that fit in 8.0 GiB": ["65,536", "16,384"],
        "Requests of the whole context (8,192)": ["8", "2"],
    }
    assert "read by a group of 4" in page.locator("#facts").inner_text()
    assert page.locator(".heads .query").count() == 32
    assert page.locator(".heads .kv").count() == 8


def test_a_cache_of_many_blocks(server: Server, open_page: Any) -> None:
    states = bytes([FREE, CACHED, ACTIVE, SHARED] * 25_000)
    server.engine.model_info = fake_info(num_blocks=len(states))
    server.engine.picture = EngineSnapshot(states, [])
    page = open_page(server.url)
    with page.expect_response("**/ui/state") as got:
        dashboard(page)
    assert legend(page) == dict.fromkeys(("free", "cached", "active", "shared"), 25_000)
    assert len(got.value.body()) < 40_000
    assert "each cell is" in page.locator("#blocks-text").inner_text()
    assert page.locator("#requests-text").inner_text() == "None under way."


def test_charts_follow_the_histograms(server: Server, open_page: Any) -> None:
    page = open_page(server.url)
    dashboard(page)
    page.evaluate("document.querySelector('#to-chat').click()")
    ask(page, "Hi")
    page.evaluate("document.querySelector('#to-dashboard').click()")
    until(page, "document.querySelectorAll('.chart .legend')[2].textContent.match(/half within [0-9.]+ m?s/)")
    summary = page.locator(".chart p.hidden").nth(2).text_content()
    assert re.match(
        r"Time to first token, half within: now [\d.]+ m?s; 95 % within: now .*; highest", summary
    )
    assert page.locator(".chart .line").nth(4).get_attribute("d").startswith("M")


def test_rates_and_quantiles_of_readings(server: Server, open_page: Any) -> None:
    def text(count: int, *buckets: int) -> str:
        bounds = ("0.1", "1.0", "+Inf")
        lines = [f'x_bucket{{le="{le}",a="}} 1"}} {value}' for le, value in zip(bounds, buckets, strict=True)]
        return "\n".join(["# HELP x", *lines, f'c_total{{kind="a"}} {count}', 'c_total{kind="b"} 5'])

    page = open_page(server.url)
    script = """async ([one, other]) => {
      const { Reading, rate, quantiles } = await import(new URL("ui/metrics.js", document.baseURI));
      const [a, b] = [new Reading(one, 10), new Reading(other, 14)];
      return [b.value("c_total"), b.value("none"), rate(a, b, "c_total"), rate(b, a, "c_total"),
        rate(a, b, "c_total", "b"), quantiles(a, b, "x", [0.5, 0.95]), quantiles(a, a, "x", [0.5])];
    }"""
    result = page.evaluate(script, [text(100, 1, 1, 2), text(120, 1, 11, 12)])
    # 10 observations between 0.1 and 1: half of them are reached in the middle, by linear interpolation.
    assert result == [125, None, 5, None, 0, pytest.approx([0.55, 0.955]), [None]]


def test_nothing_is_asked_when_nobody_looks(server: Server, open_page: Any) -> None:
    asked: list[str] = []
    page = open_page(server.url)
    page.on("request", lambda request: asked.append(request.url))
    page.wait_for_timeout(1500)
    assert asked == []
    dashboard(page)
    page.click("#to-chat")
    asked.clear()
    page.wait_for_timeout(1500)
    assert asked == []


def test_the_page_says_that_the_engine_restarts_and_recovers(server: Server, open_page: Any) -> None:
    busy(server.engine)
    page = open_page(server.url, refused=True)
    dashboard(page)
    assert page.locator("#trouble").is_hidden()
    server.engine.state = "restarting"
    page.wait_for_selector("#trouble:not([hidden])")
    assert "restarted" in page.locator("#trouble").inner_text()
    assert page.locator("#requests-text").inner_text() == "None under way."
    assert legend(page) == {"free": 100, "cached": 0, "active": 0, "shared": 0}
    assert page.locator("#connection-text").inner_text() == "The engine is restarting."
    server.engine.state = "ready"
    page.wait_for_selector("#trouble", state="hidden")
    page.wait_for_selector("#connection[data-kind=ready]")
    state = page.evaluate("fetch('ui/state').then((reply) => reply.json())")
    assert msgspec.convert(state["engine"], str) == "ready"


def test_several_engines_are_told_apart_and_added_up(open_page: Any) -> None:
    engines = FakeReplicas()
    for engine in engines.engines:
        busy(engine)
    requests = [RequestSnapshot(f"chatcmpl-{n}", "running", 1.0, 9, 1, 9, 0, 1, replica=n) for n in range(3)]
    engines.picture = EngineSnapshot(bytes([ACTIVE] * 60 + [FREE] * 240), requests)
    with serving(engines) as server:
        page = open_page(server.url)
        for number, engine in enumerate(engines.engines):  # once the server counts them
            engine.on_step(StepStats(num_running=1, num_free_blocks=100 - 20 * number, num_requests=1))
        dashboard(page)
        until(page, "document.getElementById('tile-running').textContent === '3'")
        assert page.locator("#tile-usage").inner_text() == "20.0 %", "of 300 blocks, 60"
        assert legend(page) == {"free": 240, "cached": 0, "active": 60, "shared": 0}
        assert page.locator("#requests thead th").last.inner_text() == "Replica"
        assert page.locator("#requests tbody td:last-child").all_inner_texts() == ["0", "1", "2"]
        assert "3, each with the weights and a KV cache" in page.locator("#facts").inner_text()
        engines.engines[1].state = "restarting"
        page.wait_for_selector("#trouble:not([hidden])")
        assert page.locator("#trouble").inner_text() == (
            "Of 3 engines, replica 1 is restarting; the others go on."
        )
