"""`--data-parallel-size 2` for real: two engine processes of the demo model behind one port."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx2
import openai
import pytest
from api.scraped import Scraped, scrape
from demo_server import RunningServer, running

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
ANSWER = "The capital of France is Paris."
SHORT = {"model": "demo", "prompt": "The sea", "temperature": 0, "max_tokens": 16, "logprobs": 2}
STORY = " ".join(f"On day {day} the ship sailed {day * 7} miles." for day in range(1, 40))
ENDLESS = {"temperature": 0, "max_tokens": 600, "extra_body": {"ignore_eos": True}}


@pytest.fixture(scope="module")
def server() -> Iterator[RunningServer]:
    with running("--data-parallel-size", "2") as started:
        yield started
        assert started.stop() == 0


def eventually(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.05)


def states(server: RunningServer) -> list[str]:
    reply = httpx2.get(f"{server.url}/health")
    assert reply.status_code == 200, reply.text
    found: list[str] = reply.json()["replicas"]
    return found


def looked_up(server: RunningServer) -> list[float]:
    """Prompt tokens that each engine has been given."""
    found: Scraped = scrape(server.url)
    return [found.get("prefix_cache_queries_total", replica=str(number)) for number in range(2)]


def complete(server: RunningServer, **fields: Any) -> dict[str, Any]:
    reply = httpx2.post(f"{server.url}/v1/completions", json={**SHORT, **fields}, timeout=120)
    assert reply.status_code == 200, reply.text
    answer: dict[str, Any] = reply.json()
    return answer


def test_it_is_ready_when_both_are(server: RunningServer) -> None:
    assert states(server) == ["ready", "ready"]
    assert len(server.engines) == 2
    assert any("2 such engines" in line for line in server.lines)


def test_requests_at_once_go_to_both_and_answer_as_each_does_alone(server: RunningServer) -> None:
    prompts = [f"Say something about {topic}." for topic in ("Mars", "rain", "bread", "Rome", "cats", "gold")]

    async def ask_all() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="x", max_retries=0) as client:
            asked = [
                client.completions.create(model="demo", prompt=prompt, temperature=0, max_tokens=24)
                for prompt in prompts
            ]
            return [answer.choices[0].text for answer in await asyncio.gather(*asked)]

    before = looked_up(server)
    together = asyncio.run(ask_all())
    assert all(now > then for now, then in zip(looked_up(server), before, strict=True))
    alone = [complete(server, prompt=prompt, max_tokens=24)["choices"][0]["text"] for prompt in prompts]
    assert together == alone


@pytest.mark.parametrize("how", [{}, {"temperature": 1, "seed": 7}])
def test_the_same_bytes_from_either(server: RunningServer, how: dict[str, Any]) -> None:
    before = looked_up(server)
    first, second = (complete(server, **how)["choices"] for _ in range(2))
    assert all(now > then for now, then in zip(looked_up(server), before, strict=True)), "one each, in turn"
    assert first == second


def test_a_prefix_is_found_again(server: RunningServer) -> None:
    complete(server, prompt=STORY)
    for end in (" Then it rained.", " Then it stopped.", " Then the wind came."):
        usage = complete(server, prompt=STORY + end)["usage"]
        assert usage["prompt_tokens_details"]["cached_tokens"] > 0.8 * usage["prompt_tokens"]


def test_one_that_is_killed_takes_only_its_own_along(server: RunningServer) -> None:
    async def read(client: openai.AsyncOpenAI, begun: asyncio.Event, prompt: str) -> int:
        """How many chunks came with text; raises what the stream ended with."""
        stream = await client.completions.create(model="demo", prompt=prompt, stream=True, **ENDLESS)
        count = 0
        async for _ in stream:
            count += 1
            begun.set()
        return count

    async def main() -> None:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="x", max_retries=0) as client:
            begun = [asyncio.Event(), asyncio.Event()]
            reading = [
                asyncio.create_task(read(client, event, f"The {thing}"))
                for event, thing in zip(begun, ("moon", "sun"), strict=True)
            ]
            for event in begun:
                await event.wait()
            server.engines[0].kill()
            died, _ = await asyncio.wait(reading, return_when=asyncio.FIRST_COMPLETED)
            (one,) = died
            with pytest.raises(openai.APIError, match="died"):
                one.result()
            assert "ready" in await asyncio.to_thread(states, server)
            meanwhile = await client.chat.completions.create(model="demo", temperature=0, messages=QUESTION)
            assert meanwhile.choices[0].message.content == ANSWER
            (other,) = set(reading) - died
            assert await other > 100

    asyncio.run(main())
    eventually(lambda: states(server) == ["ready", "ready"])
    assert any("The engine process of replica " in line and "ended" in line for line in server.lines)
    before = looked_up(server)
    first, second = (complete(server)["choices"] for _ in range(2))
    assert first == second
    assert all(now > then for now, then in zip(looked_up(server), before, strict=True)), "it works again"
