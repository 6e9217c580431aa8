"""Which replica a request goes to, by what the replicas have computed and how busy they are."""

from __future__ import annotations

import json

from gqa_serve.deploy.affinity import Affinity
from gqa_serve.deploy.prefix_keys import prefix_keys

IDLE = {"a": 0, "b": 0, "c": 0}


def keys(*contents: str, **fields: object) -> tuple[bytes, ...]:
    """Of a conversation, a message after the other."""
    messages = [{"role": "user", "content": content} for content in contents]
    return prefix_keys(json.dumps({"model": "demo", **fields, "messages": messages}).encode())


SYSTEM = "You are a helpful assistant. " * 40
STORY = "Once upon a time there was a fox. " * 40


def test_a_conversation_returns_to_where_it_was() -> None:
    affinity = Affinity(imbalance=2)
    affinity.sent(keys(SYSTEM), "b")
    affinity.sent(keys(SYSTEM, STORY), "c")
    assert affinity.ranked(keys(SYSTEM, STORY, "And then?"), IDLE)[0] == ["c"]
    assert affinity.ranked(keys(SYSTEM, "Something else."), IDLE)[0] == ["b", "c"]


def test_of_two_that_have_it_the_less_busy_one_comes_first() -> None:
    affinity = Affinity(imbalance=5)
    for name in ("a", "b"):
        affinity.sent(keys(STORY), name)
    assert affinity.ranked(keys(STORY), {"a": 3, "b": 1, "c": 0}) == [["b", "a"], ["c"]]


def test_a_cache_is_worth_only_so_much_waiting() -> None:
    affinity = Affinity(imbalance=2)
    affinity.sent(keys(STORY), "a")
    assert affinity.ranked(keys(STORY), {"a": 2, "b": 0, "c": 1})[0] == ["a"]
    assert affinity.ranked(keys(STORY), {"a": 3, "b": 0, "c": 1}) == [["b"], ["b", "c"], ["a"]]


def test_what_nobody_knows_goes_to_the_least_busy_and_the_same_one_in_every_router() -> None:
    choices = set()
    for number in range(50):
        story = keys(f"Story {number}. " + STORY)
        ranks = [Affinity(imbalance=2).ranked(story, IDLE) for _ in range(2)]
        assert ranks[0] == ranks[1]
        choices.update(ranks[0][0])
        assert Affinity(imbalance=2).ranked(story, {"a": 1, "b": 0, "c": 2})[0] == ["b"]
    assert choices == {"a", "b", "c"}


def test_requests_without_a_prompt_are_spread_by_load() -> None:
    assert Affinity(imbalance=2).ranked((), {"a": 4, "b": 1})[0] == ["b"]
    assert Affinity(imbalance=2).ranked((), {}) == []


def test_memory_is_bounded_and_replicas_that_are_gone_are_forgotten() -> None:
    affinity = Affinity(imbalance=2, max_keys=10)
    for number in range(20):
        affinity.sent(keys(f"{number} " + STORY), "a")
    assert len(affinity) == 10
    affinity.sent(keys(STORY), "b")
    affinity.keep_only({"b", "c"})
    assert affinity.ranked(keys(STORY), IDLE)[0] == ["b"]
    assert len(affinity) == len(keys(STORY))


def test_keys_are_those_of_equal_beginnings() -> None:
    short, long = keys(SYSTEM), keys(SYSTEM, STORY)
    assert short
    assert long[: len(short)] == short
    assert len(long) > len(short)
    assert keys("X" + SYSTEM)[0] != short[0]
    assert keys(SYSTEM, cache_salt="mine")[0] != short[0]
    tools = [{"type": "function", "function": {"name": "look_up"}}]
    assert keys(SYSTEM, tools=tools)[0] != short[0]
    assert keys(SYSTEM, temperature=0.5) == short


def test_every_endpoint_has_keys() -> None:
    for body in (
        {"prompt": STORY},
        {"prompt": list(range(500))},
        {"input": STORY, "instructions": "Be brief."},
        {"system": SYSTEM, "messages": []},
    ):
        assert prefix_keys(json.dumps(body).encode()), body


def test_long_prompts_have_few_keys() -> None:
    assert len(prefix_keys(json.dumps({"prompt": "x" * 10_000_000}).encode())) < 120


def test_bodies_that_cannot_be_read_have_none() -> None:
    for body in (
        b"",
        b"{",
        b"[]",
        b"17",
        b"\xff\xfe",
        b'{"prompt": ' + b"[" * 100_000,
        b'{"prompt": "short"}',
    ):
        assert prefix_keys(body) == ()
