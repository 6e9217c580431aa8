"""What each API key may ask for: at once, and in a minute."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from fake_engine import FakeEngine, Script, Server, serving, wait_until
from test_api_raw import CHAT, HI, TEXT, Reply, post, send

from gqa_serve.api.rate_limits import KEY_INDEX, RateLimitError, RateLimits
from gqa_serve.config import ServerConfig
from gqa_serve.errors import ConfigError

KEYS = ("sk-one", "sk-two")


@pytest.fixture(scope="module")
def limited() -> Iterator[Server]:
    with serving(FakeEngine(), api_key=KEYS, key_max_requests=2, key_tokens_per_minute=120) as server:
        yield server


def ask(server: Server, key: str, path: str = TEXT, **fields: Any) -> Reply:
    body = {"prompt": "p" * 10, **fields} if path == TEXT else {**HI, **fields}
    return send(server, post(path, json.dumps(body).encode(), f"Authorization: Bearer {key}"))


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def scope(key: int) -> dict[str, Any]:
    return {KEY_INDEX: key}


def test_tokens_come_back_evenly() -> None:
    clock = Clock()
    limits = RateLimits(None, 600, clock)
    limits.admit(scope(0), 500).close(100)
    with pytest.raises(RateLimitError) as caught:
        limits.admit(scope(0), 30)
    assert caught.value.headers["Retry-After"] == "3"
    assert "Try again in 3 s" in caught.value.message
    limits.admit(scope(1), 600).close(0)  # another key's bucket
    clock.now += 3
    admission = limits.admit(scope(0), 30)
    assert admission.headers()["X-RateLimit-Remaining-Tokens"] == "0"
    assert admission.headers()["X-RateLimit-Reset-Tokens"] == "1m0s"
    admission.close(0)
    clock.now += 1000
    assert limits.admit(scope(0), 0).headers()["X-RateLimit-Remaining-Tokens"] == "600"


def test_an_overdrawn_key_waits_until_it_has_tokens_again() -> None:
    clock = Clock()
    limits = RateLimits(None, 60, clock)
    admission = limits.admit(scope(0), 10)
    admission.close(100)
    admission.close(100)  # once is enough
    with pytest.raises(RateLimitError) as caught:
        limits.admit(scope(0), 1)
    assert caught.value.headers["Retry-After"] == "51"
    clock.now += 51
    limits.admit(scope(0), 1)


def test_a_prompt_larger_than_the_bucket_waits_for_a_full_one() -> None:
    clock = Clock()
    limits = RateLimits(None, 60, clock)
    limits.admit(scope(0), 300).close(0)
    with pytest.raises(RateLimitError) as caught:
        limits.admit(scope(0), 300)
    assert caught.value.headers["Retry-After"] == "300"
    clock.now += 300
    limits.admit(scope(0), 300)


def test_what_the_engine_did_not_take_costs_nothing() -> None:
    limits = RateLimits(1, 60, Clock())
    limits.admit(scope(0), 60).cancel()
    assert limits.admit(scope(0), 60).headers()["X-RateLimit-Remaining-Requests"] == "0"
    with pytest.raises(RateLimitError, match="1 requests under way"):
        limits.admit(scope(0), 0)


def test_without_limits_nothing_is_said() -> None:
    limits = RateLimits(None, None, Clock())
    assert limits.admit(scope(0), 10**9).headers() == {}
    assert RateLimits(1, 1, Clock()).admit({}, 10**9).headers() == {}


@pytest.mark.parametrize("fields", [{"key_max_requests": 1}, {"key_tokens_per_minute": 1}])
def test_limits_of_keys_need_keys(fields: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match="--api-key-file"):
        ServerConfig(**fields)  # type: ignore[arg-type]
    ServerConfig(**fields, api_key=("sk-x",))  # type: ignore[arg-type]


def test_requests_at_once(limited: Server) -> None:
    engine = limited.engine
    engine.reset(lambda request: Script(["a"], hold_at=0))
    held = [limited.connect() for _ in range(2)]
    body = json.dumps({"prompt": "p", "max_tokens": 1}).encode()
    for connection in held:
        connection.sendall(post(TEXT, body, "x-api-key: sk-one"))
    wait_until(lambda: engine.num_running == 2)
    reply = ask(limited, "sk-one")
    assert (reply.status, reply.error["code"]) == (429, "rate_limit_exceeded")
    assert reply.error["type"] == "rate_limit_error"
    assert int(reply.headers["retry-after"]) >= 1
    assert reply.headers["x-ratelimit-limit-requests"] == "2"
    assert reply.headers["x-ratelimit-remaining-requests"] == "0"
    assert engine.num_running == 2
    held.pop().close()  # a client that leaves makes room
    wait_until(lambda: engine.num_running == 1)
    engine.release.set()
    wait_until(lambda: ask(limited, "sk-one", max_tokens=1).status == 200)
    held.pop().close()


def test_tokens_in_a_minute_over_http(limited: Server) -> None:
    engine = limited.engine
    engine.reset(lambda request: Script(["x" * 60]))
    first = ask(limited, "sk-two", max_tokens=60)
    assert first.status == 200
    assert first.headers["x-ratelimit-limit-tokens"] == "120"
    assert int(first.headers["x-ratelimit-remaining-tokens"]) <= 110
    assert first.headers["x-ratelimit-reset-tokens"].endswith("s")
    for stream in (True, False):
        reply = ask(limited, "sk-two", prompt="p" * 100, stream=stream)
        assert (reply.status, reply.error["code"]) == (429, "rate_limit_exceeded")
        assert 1 <= int(reply.headers["retry-after"]) <= 60
    body = json.dumps({**HI, "messages": [{"role": "user", "content": "x" * 100}], "max_tokens": 1}).encode()
    reply = send(limited, post("/v1/messages", body, "x-api-key: sk-two"))
    assert reply.status == 429
    assert json.loads(reply.body)["error"]["type"] == "rate_limit_error"
    assert int(reply.headers["retry-after"]) >= 1
    assert len(engine.requests) == 1


def test_a_full_queue_takes_nothing_from_a_key() -> None:
    with serving(FakeEngine(), api_key=KEYS, key_max_requests=1, key_tokens_per_minute=20) as server:
        server.engine.capacity = 0
        for _ in range(3):
            assert ask(server, "sk-one").error["code"] == "queue_full"
        server.engine.capacity = None
        assert ask(server, "sk-one", max_tokens=1).status == 200


def test_choices_that_the_queue_has_no_room_for_take_nothing_from_a_key() -> None:
    """One place is free, so the request is read, admitted, and only then refused by the engine."""
    with serving(FakeEngine(), api_key=KEYS, key_max_requests=1, key_tokens_per_minute=20) as server:
        server.engine.capacity = 1
        for _ in range(3):
            assert ask(server, "sk-one", n=2).error["code"] == "queue_full"
        reply = ask(server, "sk-one", max_tokens=1)
        assert reply.status == 200
        assert reply.headers["x-ratelimit-remaining-tokens"] == "10"


def test_a_stream_carries_the_headers(limited: Server) -> None:
    with serving(FakeEngine(), api_key=KEYS, key_max_requests=5) as server:
        reply = ask(server, "sk-one", CHAT, stream=True)
        assert reply.headers["x-ratelimit-remaining-requests"] == "4"
        assert "x-ratelimit-limit-tokens" not in reply.headers
        wait_until(
            lambda: ask(server, "sk-one", CHAT).headers["x-ratelimit-remaining-requests"] == "4"
        )  # the stream is over
