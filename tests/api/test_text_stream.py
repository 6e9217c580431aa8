"""Generation: exactly one abort path, errors to the consumer, coalescing."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest
from fake_engine import PATIENCE_S, FakeEngine, Script, fake_tokenizer

from gqa_serve.api.text_stream import (
    MAX_MERGED_TOKENS,
    MAX_UNMERGED,
    Choice,
    Generation,
    TextEvent,
    merge_events,
    merge_up,
)
from gqa_serve.engine.detokenizer import TextAssembler
from gqa_serve.engine.request import EngineRequest, SamplingParams, TokenOutput
from gqa_serve.errors import EngineStepError, EngineUnavailableError, RequestError

TOKENIZER = fake_tokenizer()


def start(engine: FakeEngine, count: int = 1, max_tokens: int = 99, **params: object) -> Generation:
    choices = []
    for index in range(count):
        request = EngineRequest(
            request_id=f"r{index}",
            prompt=[1, 2],
            params=SamplingParams(max_tokens=max_tokens, **params),  # type: ignore[arg-type]
        )
        stream = engine.submit(request)
        assembler = TextAssembler(TOKENIZER, request.params, request.prompt)
        choices.append(Choice(index, request, stream, assembler))
    return Generation(choices)


def run(test: Callable[[], Awaitable[None]]) -> None:
    async def main() -> None:
        await asyncio.wait_for(test(), PATIENCE_S)
        others = asyncio.all_tasks() - {asyncio.current_task()}
        _, pending = await asyncio.wait(others, timeout=PATIENCE_S) if others else (set(), set())
        assert not pending, "a pump is still running"

    asyncio.run(main())


def test_what_nobody_takes_is_merged_as_it_comes() -> None:
    """A reader that stopped must not cost an object for each step until the answer is complete."""
    engine = FakeEngine(lambda request: Script(["a"] * 99))

    async def test() -> None:
        generation = start(engine, 2)
        most = 0
        while any(stream.end is None for stream in engine.streams):
            await asyncio.sleep(0)
            most = max(most, len(generation._buffer))
        assert most <= 2 * MAX_UNMERGED
        events = await generation.collect()
        assert [event.text for event in events] == ["a" * 99] * 2
        assert [len(event.token_ids) for event in events] == [99, 99]
        assert [(event.is_first, event.finish_reason) for event in events] == [(True, "length")] * 2
        generation.abort()

    run(test)


def test_what_has_piled_up_comes_in_portions_between_which_others_go_on() -> None:
    """And what a choice says comes in its order, though one has more to say than the other."""
    long, short = 4 * MAX_MERGED_TOKENS + 7, 5
    engine = FakeEngine()
    scripts = iter([Script(["a"] * long, finish="length"), Script(["b"] * short, finish="length")])
    engine.script = lambda request: next(scripts)

    async def test() -> None:
        generation = start(engine, 2, max_tokens=2 * long)
        while any(stream.end is None for stream in engine.streams):
            await asyncio.sleep(0)
        assert len(generation._buffer) <= 6 + 2 * MAX_UNMERGED
        passes = []  # of the event loop, seen by somebody else at each batch
        batches = []

        async def other() -> None:
            while True:
                passes[-1] += 1
                await asyncio.sleep(0)

        passes.append(0)
        beside = asyncio.create_task(other())
        async for events in generation.batches():
            batches.append(events)
            passes.append(0)
        beside.cancel()
        assert all(len(event.token_ids) <= MAX_MERGED_TOKENS for events in batches for event in events)
        assert all(len({event.index for event in events}) == len(events) for events in batches)
        assert all(count > 0 for count in passes[1:-1]), "the loop went on between two of them"
        assert len(batches) in (5, 6)
        for index, text in ((0, "a" * long), (1, "b" * short)):
            said = merge_events([event for events in batches for event in events if event.index == index])
            assert (said.text, len(said.token_ids)) == (text, len(text))
            assert (said.is_first, said.finish_reason) == (True, "length")
        generation.abort()

    run(test)


def test_merging_leaves_alone_what_is_large_already() -> None:
    sizes = [1, 2, MAX_MERGED_TOKENS - 3, 1, 2 * MAX_MERGED_TOKENS, 0, 1]
    merged = merge_up([TextEvent(0, str(size), [7] * size) for size in sizes])
    assert [len(event.token_ids) for event in merged] == [MAX_MERGED_TOKENS, 1, 2 * MAX_MERGED_TOKENS, 1]
    assert "".join(event.text for event in merged) == "".join(map(str, sizes))
    assert merge_up([]) == []


def test_collect_gives_choices_in_order_and_aborts_each() -> None:
    engine = FakeEngine()
    scripts = iter([Script(["slow"] + ["er"] * 20), Script(["fast"])])
    engine.script = lambda request: next(scripts)

    async def test() -> None:
        generation = start(engine, 2)
        events = await generation.collect()
        assert [event.text for event in events] == ["slow" + "er" * 20, "fast"]
        assert [event.finish_reason for event in events] == ["stop", "stop"]
        assert [choice.num_tokens for choice in generation.choices] == [45, 5]
        generation.abort()
        generation.abort()

    run(test)
    assert engine.ends() == ["stop", "stop"]
    assert all(stream.aborts for stream in engine.streams)


@pytest.mark.parametrize(
    ("refused", "status", "code"), [(True, 400, "not_computable"), (False, 500, "engine_error")]
)
def test_what_the_request_brought_with_it_is_no_fault_of_the_server(
    refused: bool, status: int, code: str
) -> None:
    engine = FakeEngine(lambda request: Script(["a"], finish="error", error="too complex"))
    whole = engine.outputs

    def outputs(request: EngineRequest, script: Script) -> list[TokenOutput]:
        made = whole(request, script)
        made[-1].refused = refused
        return made

    engine.outputs = outputs  # type: ignore[method-assign]

    async def test() -> None:
        with pytest.raises(RequestError, match="too complex") as caught:
            await start(engine).collect()
        assert (caught.value.status, caught.value.code) == (status, code)

    run(test)


def test_what_arrives_while_the_consumer_is_busy_is_one_event() -> None:
    engine = FakeEngine(lambda request: Script(["a", "b", "c", "d"], hold_at=3))

    async def test() -> None:
        generation = start(engine, logprobs=1)
        while engine.streams[0]._next < 3:
            await asyncio.sleep(0)
        await asyncio.sleep(0.01)
        batches = generation.batches()
        (event,) = await batches.__anext__()
        assert event.text == "abc"
        assert event.is_first
        assert [entry.token_id for entry in event.logprobs or []] == [97, 98, 99]
        engine.release.set()
        rest = [event async for events in batches for event in events]
        assert merge_events(rest).text == "d"
        assert not any(event.is_first for event in rest)

    run(test)


def test_text_before_an_error_is_delivered_first() -> None:
    engine = FakeEngine(lambda request: Script(["a", "b"], finish="error", error="It broke."))

    async def test() -> None:
        generation = start(engine)
        seen: list[TextEvent] = []
        with pytest.raises(EngineStepError, match="It broke"):  # noqa: PT012 - the loop is the test
            async for events in generation.batches():
                seen += events
        assert "".join(event.text for event in seen) == "ab"
        with pytest.raises(EngineStepError):
            await start(engine).collect()

    run(test)


@pytest.mark.parametrize(
    ("script", "error"),
    [
        (Script([], finish="abort"), EngineUnavailableError),
        (Script([], fault=StopAsyncIteration()), EngineStepError),
        (Script([], fault=ZeroDivisionError()), ZeroDivisionError),
    ],
)
def test_odd_ends_reach_the_consumer(script: Script, error: type[Exception]) -> None:
    engine = FakeEngine(lambda request: script)

    async def test() -> None:
        generation = start(engine)
        with pytest.raises(error):
            await generation.first_event(5)
        with pytest.raises(error):
            await generation.collect()

    run(test)
    assert engine.streams[0].aborts >= 1


def test_an_abort_says_what_the_engine_says() -> None:
    engine = FakeEngine(lambda request: Script(["a"], finish="abort", error="The server is stopping."))

    async def test() -> None:
        generation = start(engine)
        with pytest.raises(EngineUnavailableError, match=r"^The server is stopping\.$"):
            await generation.collect()
        assert generation.choices[0].finish_reason == "abort"

    run(test)


def test_first_event_gives_up_waiting_without_harm() -> None:
    engine = FakeEngine(lambda request: Script(["a"], hold_at=0))

    async def test() -> None:
        generation = start(engine)
        await generation.first_event(0.001)
        engine.release.set()
        assert [event.text for event in await generation.collect()] == ["a"]

    run(test)


def test_abort_in_the_middle_ends_every_stream_and_task() -> None:
    engine = FakeEngine(lambda request: Script(["a"] * 9, hold_at=2))

    async def test() -> None:
        generation = start(engine, 3)
        await generation.first_event(5)
        generation.abort()

    run(test)
    assert engine.ends() == ["abort"] * 3


def test_stop_string_aborts_the_engine_request_and_counts_tokens_up_to_it() -> None:
    engine = FakeEngine(lambda request: Script(["abENDcd"], hold_at=1))

    async def test() -> None:
        generation = start(engine, stop=["END"])
        (event,) = await generation.collect()
        assert (event.text, event.finish_reason) == ("ab", "stop")
        assert generation.choices[0].num_tokens == 5

    run(test)
    assert engine.ends() == ["abort"]


def test_merge_keeps_missing_logprobs_missing() -> None:
    merged = merge_events([TextEvent(0, "a", is_first=True), TextEvent(0, "b", finish_reason="length")])
    assert merged == TextEvent(0, "ab", is_first=True, finish_reason="length")
