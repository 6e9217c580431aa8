"""The load generator against a scripted server: what is sent, in which order, and what each fault leaves."""

from __future__ import annotations

import asyncio
import itertools
import random
from collections.abc import Sequence
from typing import Any

import pytest
from scripted_server import (
    CUT,
    HEAD,
    ScriptedServer,
    Step,
    ending,
    event,
    framed,
    obedient,
    plain,
    prompt_of,
    scripted,
    text_event,
)

from gqa_serve.errors import ConfigError
from gqa_serve.workbench.bench.answer import Answer
from gqa_serve.workbench.bench.calibrate import calibrate
from gqa_serve.workbench.bench.connection import HttpClient
from gqa_serve.workbench.bench.load import Load, Prompts, Run
from gqa_serve.workbench.bench.run_report import replayable
from gqa_serve.workbench.bench.target import Target, find_model
from gqa_serve.workbench.bench.words import WORDS, Words, single_tokens
from gqa_serve.workbench.records import RequestRecord
from gqa_serve.workbench.trace import TraceRequest, checked

PLAIN = Words(WORDS)


def target_of(server: ScriptedServer, endpoint: str = "completions", **options: Any) -> Target:
    client = HttpClient(server.url, api_key=options.pop("api_key", None))
    return Target(client, endpoint, "scripted", options.pop("body", {}), options.pop("timeout_s", 20.0))


async def loaded(
    server: ScriptedServer,
    requests: Sequence[TraceRequest],
    *,
    endpoint: str = "completions",
    words: Words = PLAIN,
    concurrency: int | None = None,
    stop: asyncio.Event | None = None,
    **options: Any,
) -> Run:
    target = target_of(server, endpoint, **options)
    try:
        return await Load(target, requests, Prompts(words, "s"), concurrency=concurrency).run(stop)
    finally:
        await target.client.close()


def some(count: int, **fields: Any) -> list[TraceRequest]:
    return [TraceRequest(**{"prompt_tokens": 5, "output_tokens": 3, **fields}) for _ in range(count)]


async def one_record(script: Any, **options: Any) -> RequestRecord:
    async with scripted(script) as server:
        run = await loaded(server, some(1), **options)
    (record,) = run.records
    return record


def test_every_request_is_sent_once_and_recorded_with_the_real_counts() -> None:
    async def go() -> None:
        async with scripted(lambda request: [0.02, *obedient(request)]) as server:
            run = await loaded(server, some(40, prompt_tokens=9, output_tokens=4), concurrency=6)
        assert len(run.sent) == len(server.requests) == 40
        assert server.most_at_once == 6
        assert server.connections == 6  # kept open and used again
        assert {len(prompt_of(request).split()) for request in server.requests} == {9}
        assert len({prompt_of(request) for request in server.requests}) == 40
        for record in run.records:
            assert (record.prompt_tokens, record.output_tokens, record.error) == (9, 4, None)
            assert len(record.token_s) == 4
            assert record.e2e_s == record.token_s[-1] >= record.token_s[0] == record.ttft_s
        assert (run.num_cut, run.num_unsent, run.interrupted) == (0, 0, False)

    asyncio.run(go())


def test_a_request_asks_for_its_length_and_for_usage() -> None:
    async def go() -> None:
        async with scripted() as server:
            await loaded(server, some(1), api_key="sk-1", body={"temperature": 0.7, "top_k": 5})
        (request,) = server.requests
        assert (request["max_tokens"], request["ignore_eos"], request["stream"]) == (3, True, True)
        assert request["stream_options"] == {"include_usage": True}
        assert (request["temperature"], request["top_k"]) == (0.7, 5)
        assert "\r\nAuthorization: Bearer sk-1\r\n" in server.heads[-1]

    asyncio.run(go())


def test_an_answer_may_be_cut_into_any_pieces() -> None:
    chunks = [text_event(" a"), text_event(" é€𝄞"), text_event(" c", "length"), ending(5, 3)]
    whole = HEAD + b"".join(chunks)
    random_ = random.Random(0)

    def script(request: dict[str, Any]) -> list[Step]:
        places = sorted(random_.sample(range(1, len(whole)), 30))
        return [whole[begin:end] for begin, end in itertools.pairwise([0, *places, len(whole)])]

    async def go() -> None:
        async with scripted(script) as server:
            run = await loaded(server, some(20), concurrency=4)
        assert [(r.output_tokens, len(r.token_s), r.error) for r in run.records] == [(3, 3, None)] * 20

    asyncio.run(go())


def test_planted_times_are_measured() -> None:
    def script(request: dict[str, Any]) -> list[Step]:
        return [
            HEAD,
            0.15,
            text_event("a"),
            0.1,
            text_event("b"),
            0.1,
            text_event("c", "stop"),
            0.1,
            ending(5, 3),
        ]

    record = asyncio.run(one_record(script))
    assert record.token_s[0] >= 0.15
    assert all(gap >= 0.095 for gap in record.itl_s)
    assert len(record.itl_s) == 2
    assert record.e2e_s == record.token_s[-1]  # what comes after the last token is not the answer's
    assert record.tpot_s == pytest.approx((record.token_s[2] - record.token_s[0]) / 2)


FAULTS = {
    "refused": ([plain(429, b'{"error": {"message": "queue full"}}')], "HTTP 429: queue full"),
    "not JSON": ([plain(500, b"oops")], "HTTP 500: oops"),
    "cut": ([HEAD, text_event("a"), CUT], "The connection was cut in the middle of the answer."),
    "cut at once": ([CUT], "The server closed the connection without an answer."),
    "error event": (
        [HEAD, text_event("a"), event(error={"message": "engine died"}), b"0\r\n\r\n"],
        "engine died",
    ),
    "no end": (
        [HEAD, text_event("a"), framed(b"data: [DONE]\n\n") + b"0\r\n\r\n"],
        "The stream ended without a finish_reason.",
    ),
    "no chunk": ([HEAD, framed(b"data: {]\n\n"), b"0\r\n\r\n"], "An event is no chunk of an answer"),
    "no HTTP": ([b"hello\r\n\r\n", CUT], "The answer is not HTTP"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_every_failure_is_a_record_with_its_error(name: str) -> None:
    steps, error = FAULTS[name]
    record = asyncio.run(one_record(lambda _: list(steps)))
    assert record.error is not None
    assert record.error.startswith(error)
    assert record.prompt_tokens == 5


def test_an_answer_that_does_not_end_is_given_up() -> None:
    record = asyncio.run(one_record(lambda _: [HEAD, text_event("a"), 30.0], timeout_s=0.2))
    assert record.error == "No end within 0.2 s (--timeout)."


def test_a_server_that_is_not_there() -> None:
    async def go() -> None:
        async with scripted() as server:
            pass
        run = await loaded(server, some(2))
        assert [(record.error or "")[:13] for record in run.records] == ["No connection"] * 2
        with pytest.raises(ConfigError, match="No server answers"):
            await find_model(HttpClient(server.url))

    asyncio.run(go())


def test_a_connection_that_the_server_closed_meanwhile_is_no_failure() -> None:
    async def go() -> None:
        async with scripted(lambda request: [*obedient(request), CUT]) as server:
            run = await loaded(server, some(5), concurrency=1)
        assert [record.error for record in run.records] == [None] * 5
        assert len(server.requests) == 5

    asyncio.run(go())


def test_an_answer_that_the_end_of_the_connection_ends() -> None:
    body = b"".join(
        b"data: " + text + b"\n\n"
        for text in (b'{"choices": [{"text": "a", "finish_reason": "stop"}]}', b"[DONE]")
    )
    record = asyncio.run(one_record(lambda _: [b"HTTP/1.1 200 OK\r\n\r\n" + body, CUT]))
    assert (record.error, record.output_tokens, record.finish_reason) == (None, 1, "stop")


def test_an_open_loop_does_not_wait_for_answers() -> None:
    requests = [TraceRequest(prompt_tokens=5, output_tokens=1, arrival_s=at / 100) for at in range(10)]

    async def go() -> None:
        async with scripted(lambda request: [0.2, *obedient(request)]) as server:
            run = await loaded(server, requests)
            assert server.most_at_once == 10
            held = await loaded(server, requests, concurrency=1, timeout_s=60)
        pairs = zip(run.records, requests, strict=True)
        assert all(record.sent_s >= one.arrival_s for record, one in pairs)
        # What the limit held back is told, not hidden: the last waited for nine answers.
        assert held.records[-1].late_s > 9 * 0.2 - 0.2
        assert held.records[-1].sent_s == pytest.approx(0.09 + held.records[-1].late_s)

    asyncio.run(go())


def test_a_closed_loop_has_no_lateness() -> None:
    async def go() -> None:
        async with scripted(lambda request: [0.05, *obedient(request)]) as server:
            run = await loaded(server, some(4), concurrency=1)
        assert [record.late_s for record in run.records] == [0.0] * 4

    asyncio.run(go())


CONVERSATION = [
    TraceRequest(prompt_tokens=40, output_tokens=3, conversation="c", prefix="p", prefix_tokens=12),
    TraceRequest(
        prompt_tokens=60, output_tokens=3, conversation="c", turn=1, think_s=0.2, prefix="p", prefix_tokens=12
    ),
    TraceRequest(prompt_tokens=80, output_tokens=3, conversation="c", turn=2, prefix="p", prefix_tokens=12),
]


@pytest.mark.parametrize("endpoint", ["completions", "chat"])
def test_a_conversation_sends_the_real_answers_and_keeps_its_length(endpoint: str) -> None:
    async def go() -> None:
        async with scripted() as server:
            run = await loaded(server, CONVERSATION, endpoint=endpoint)
        assert [record.prompt_tokens for record in run.records] == [40, 60, 80]
        first, second, third = map(prompt_of, server.requests)
        assert second.startswith(first + " w0 w1 end")
        assert third.startswith(second + " w0 w1 end")
        if endpoint == "chat":
            roles = [message["role"] for message in server.requests[2]["messages"]]
            assert roles == ["user", "assistant", "user", "assistant", "user"]
        gap = run.records[1].sent_s - run.records[0].sent_s - run.records[0].e2e_s
        assert gap >= 0.2

    asyncio.run(go())


def test_a_conversation_ends_with_its_first_failure() -> None:
    def script(request: dict[str, Any]) -> list[Step]:
        return obedient(request) if len(prompt_of(request).split()) < 60 else [plain(500, b"")]

    async def go() -> None:
        async with scripted(script) as server:
            run = await loaded(server, CONVERSATION)
        assert [record.error for record in run.records] == [None, "HTTP 500"]
        assert run.num_unsent == 1

    asyncio.run(go())


def test_prefixes_are_shared_and_nothing_else() -> None:
    requests = [
        TraceRequest(prompt_tokens=40, output_tokens=1, prefix=name, prefix_tokens=length)
        for name, length in (("a", 20), ("a", 20), ("b", 15), ("b", 15))
    ]

    async def go() -> list[list[str]]:
        async with scripted() as server:
            await loaded(server, requests, concurrency=1)
        return [prompt_of(request).split() for request in server.requests]

    prompts = asyncio.run(go())

    def shared(one: list[str], other: list[str]) -> int:
        return sum(
            1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=True))
        )

    assert shared(prompts[0], prompts[1]) in (20, 21)  # one word more by chance, with 1 in 200
    assert shared(prompts[2], prompts[3]) in (15, 16)
    assert shared(prompts[0], prompts[2]) < 3


def test_another_run_has_other_prompts() -> None:
    request = TraceRequest(prompt_tokens=30, output_tokens=1, prefix="a", prefix_tokens=20)
    one, other = (Prompts(PLAIN, salt).write(request, None, 0) for salt in ("x", "y"))
    assert one.split()[:5] != other.split()[:5]
    assert one == Prompts(PLAIN, "x").write(request, None, 0)


def test_a_prompt_of_the_users_own_is_sent_as_it_is() -> None:
    request = TraceRequest(prompt_tokens=9, output_tokens=1, prompt="What is\n a head?")
    assert Prompts(PLAIN, "x").write(request, None, 0) == "What is\n a head?"


def test_a_run_that_is_stopped_keeps_what_has_ended() -> None:
    async def go() -> None:
        slow: list[Step] = [HEAD, text_event("a"), 60.0]

        def script(request: dict[str, Any]) -> list[Step]:
            return obedient(request) if len(server.requests) <= 3 else slow

        async with scripted(script) as server:
            stop = asyncio.Event()
            running = asyncio.ensure_future(loaded(server, some(9), concurrency=2, stop=stop))
            while len(server.requests) < 5:
                await asyncio.sleep(0.01)
            stop.set()
            run = await running
        assert (len(run.sent), run.num_cut, run.num_unsent, run.interrupted) == (3, 2, 4, True)
        assert all(record.error is None for record in run.records)

    asyncio.run(go())


def test_what_was_sent_is_a_trace_of_real_counts() -> None:
    requests = [*CONVERSATION, *some(3, prompt_tokens=7)]

    async def go() -> Run:
        async with scripted(lambda request: obedient(request, template_tokens=2)) as server:
            return await loaded(server, requests)

    run = asyncio.run(go())
    trace = checked(replayable(run), "written")
    talk = [one for one in trace if one.conversation]
    assert [one.prompt_tokens for one in talk] == [42, 62, 82]
    assert talk[1].think_s >= 0.2
    assert (talk[0].prefix, talk[0].prefix_tokens) == ("p", 12)
    assert sorted(one.prompt_tokens for one in trace if not one.conversation) == [9, 9, 9]
    assert min(one.arrival_s for one in trace) == 0


# --- calibration -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokenize", [True, False])
@pytest.mark.parametrize("endpoint", ["completions", "chat"])
def test_calibration_sees_the_template(endpoint: str, tokenize: bool) -> None:
    """A template of 6 tokens at the beginning, and 4 for every message, of words that are tokens."""

    def script(request: dict[str, Any]) -> list[Step]:
        return obedient(request, 6 + 4 * len(request.get("messages", [])))

    async def go() -> None:
        async with scripted(script, tokenize=tokenize) as server:
            target = target_of(server, endpoint)
            found = await calibrate(target, None, multi_turn=True)
            assert found.has_usage
            assert ("/tokenize" in found.how) == tokenize
            chat = endpoint == "chat"
            assert (found.words.overhead, found.words.turn_overhead) == ((10, 8) if chat else (6, 0))
            run = await loaded(server, CONVERSATION, endpoint=endpoint, words=found.words)
            await target.client.close()
        assert [record.prompt_tokens for record in run.records] == [40, 60, 80]

    asyncio.run(go())


def test_only_words_that_are_one_token_are_used() -> None:
    split = {"people", "because", "thought"}
    calls = []

    async def count(text: str) -> int:
        calls.append(text)
        return 1 + sum(2 if word in split else 1 for word in text.split())

    found = asyncio.run(single_tokens(count))
    assert set(found) == set(WORDS) - split
    assert len(calls) < len(WORDS) / 2


def test_a_vocabulary_without_words_is_refused() -> None:
    async def letters(text: str) -> int:
        return len(text)

    with pytest.raises(ConfigError, match="--dataset"):
        asyncio.run(single_tokens(letters))


def test_fields_that_a_server_refuses_are_given_up() -> None:
    def strict(request: dict[str, Any]) -> list[Step]:
        unknown = {"ignore_eos", "skip_special_tokens"} & set(request)
        return [plain(400, b'{"error": {"message": "unknown"}}')] if unknown else obedient(request)

    async def go() -> None:
        async with scripted(strict) as server:
            target = target_of(server)
            await target.probe()
            assert target.refused == ("skip_special_tokens", "ignore_eos")
            await target.client.close()

    asyncio.run(go())


def test_a_server_that_answers_nothing_is_an_error_with_its_words() -> None:
    async def go() -> None:
        async with scripted(lambda _: [plain(401, b'{"error": {"message": "no key"}}')]) as server:
            target = target_of(server)
            with pytest.raises(ConfigError, match=r"HTTP 401: no key .*OPENAI_API_KEY"):
                await target.probe()
            await target.client.close()

    asyncio.run(go())


@pytest.mark.parametrize(
    "url",
    [
        "",
        "ftp://x",
        "http://",
        "http://x:99999",
        "http://x/?q=1",
        "http://x..y",
        "http://[::1",
        "x/\u00fc\u4e2d",
    ],
)
def test_a_url_that_is_none(url: str) -> None:
    with pytest.raises(ConfigError, match="--url"):
        HttpClient(url)


@pytest.mark.parametrize("url", ["h:8000", "http://h:8000/", "http://h:8000/v1", "http://h:8000/v1/"])
def test_a_url_with_or_without_its_ends(url: str) -> None:
    assert HttpClient(url).base == "http://h:8000"


def test_null_for_no_choices_and_space_after_the_end() -> None:
    answer = Answer(0.0)
    answer.feed(b'data: {"choices": [{"text": "a", "finish_reason": "stop"}], "usage": null}\n\n')
    answer.feed(b'data: {"choices": null, "usage": {"prompt_tokens": 3, "completion_tokens": 1}}\n\n')
    answer.feed(b"data: [DONE] \n\n")
    answer.end()
    assert (answer.error, answer.text, len(answer.event_s)) == (None, "a", 1)
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == 3
