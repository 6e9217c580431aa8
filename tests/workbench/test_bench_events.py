"""Reading streamed answers: bytes cut anywhere, chunks of several dialects, every bad ending."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gqa_serve.workbench.bench.answer import Answer, error_text, refusal
from gqa_serve.workbench.bench.sse import EventParser

ENDS = st.sampled_from([b"\n", b"\r", b"\r\n"])
LINES = st.binary(max_size=12).filter(lambda line: not set(line) & set(b"\r\n"))


@st.composite
def streams(draw: st.DrawFn) -> tuple[bytes, list[bytes]]:
    """A stream and its events, written line by line with mixed line ends, comments and other fields."""
    text, events = draw(st.sampled_from([b"", b"\xef\xbb\xbf"])), []
    # One kind of line end: \r and an empty line ended by \n would be one \r\n.
    end = draw(ENDS)
    for data in draw(st.lists(st.lists(LINES, min_size=1, max_size=3), max_size=6)):
        text += b": a comment" + end if draw(st.booleans()) else b""
        text += b"event: message" + end if draw(st.booleans()) else b""
        for line in data:
            space = b" " if line.startswith(b" ") or draw(st.booleans()) else b""
            text += b"data:" + space + line + end
        text += end
        events.append(b"\n".join(data))
    return text, events


@given(streams(), st.lists(st.integers(0, 200), max_size=12))
def test_events_do_not_depend_on_where_the_stream_is_cut(
    stream: tuple[bytes, list[bytes]], cuts: list[int]
) -> None:
    text, events = stream
    parser = EventParser()
    places = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    pieces = [text[begin:end] for begin, end in itertools.pairwise(places)]
    assert [event for piece in pieces for event in parser.feed(piece)] == events
    assert not parser.pending


def test_an_event_without_its_empty_line_is_pending() -> None:
    parser = EventParser()
    assert parser.feed(b"data: a\n\ndata: b\n") == [b"a"]
    assert parser.pending


class Clock:
    """Says what it is told."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def answer_of(*chunks: dict[str, Any] | bytes, each_s: float = 1.0) -> Answer:
    """An answer whose chunks come a second apart, the first a second after the start."""
    clock = Clock()
    answer = Answer(100.0, clock=clock)
    for chunk in chunks:
        clock.now += each_s
        data = chunk if isinstance(chunk, bytes) else json.dumps(chunk).encode()
        answer.feed(b"data: " + data + b"\n\n")
    answer.end()
    return answer


def text(value: str, finish: str | None = None) -> dict[str, Any]:
    return {"choices": [{"index": 0, "text": value, "finish_reason": finish}]}


def delta(finish: str | None = None, **fields: Any) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": fields, "finish_reason": finish}]}


def test_a_completion() -> None:
    usage = {
        "choices": [],
        "usage": {
            "prompt_tokens": 7,
            "completion_tokens": 2,
            "prompt_tokens_details": {"cached_tokens": 4},
        },
    }
    answer = answer_of(text("a"), text("b", "stop"), usage, b"[DONE]")
    assert (answer.text, answer.event_s, answer.error) == ("ab", [1.0, 2.0], None)
    assert answer.finish_reason == "stop"
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == 7
    assert answer.usage.prompt_tokens_details is not None
    assert answer.usage.prompt_tokens_details.cached_tokens == 4


def test_the_chunk_with_the_role_is_no_token() -> None:
    answer = answer_of(delta(role="assistant", content=""), delta(content="a"), delta("stop"), b"[DONE]")
    assert answer.event_s == [2.0]


@pytest.mark.parametrize(
    "fields",
    [
        {"reasoning_content": "hm"},
        {"reasoning": "hm"},
        {"tool_calls": [{"index": 0, "function": {"arguments": "{"}}]},
    ],
)
def test_thinking_and_calls_are_tokens_but_no_text(fields: dict[str, Any]) -> None:
    answer = answer_of(delta(content=None, **fields), delta("stop", content="x"))
    assert (answer.event_s, answer.text) == ([1.0, 2.0], "x")


@pytest.mark.parametrize("empty", [None, []])
def test_an_empty_list_of_calls_is_no_token(empty: object) -> None:
    assert answer_of(delta(tool_calls=empty), delta("stop")).event_s == []


def test_tokens_of_an_event_by_the_running_usage() -> None:
    chunks = [text("ab"), text("c"), text("def", "length")]
    for chunk, total in zip(chunks, (2, 3, 6), strict=True):
        chunk["usage"] = {"prompt_tokens": 1, "completion_tokens": total}
    answer = answer_of(*chunks)
    assert answer.token_times(6) == [1.0, 1.0, 2.0, 3.0, 3.0, 3.0]


def test_usage_with_the_finish_reason_is_no_token() -> None:
    last = {**text("", "length"), "usage": {"prompt_tokens": 1, "completion_tokens": 4}}
    answer = answer_of(text("ab"), text("cd"), last, b"[DONE]")
    assert (answer.event_s, answer.has_running_usage) == ([1.0, 2.0], False)
    assert answer.token_times(4) == [1.0, 1.0, 2.0, 2.0]


@given(st.integers(1, 30), st.integers(1, 60))
def test_tokens_without_a_count_are_dealt_out_in_order(num_events: int, num_tokens: int) -> None:
    answer = answer_of(*[text("x") for _ in range(num_events)], text("", "stop"))
    times = answer.token_times(num_tokens)
    assert len(times) == num_tokens
    assert times == sorted(times)
    assert times[0] == 1.0
    if num_tokens > 1:
        assert times[-1] == num_events
    if num_tokens >= num_events:
        assert set(times) == set(answer.event_s)


def test_an_error_event_ends_the_answer() -> None:
    answer = answer_of(text("a"), {"error": {"message": "out of memory", "type": "server_error"}}, text("b"))
    assert (answer.error, answer.text) == ("out of memory", "a")


def test_a_chunk_that_is_none() -> None:
    error = answer_of(b"{not json").error
    assert error is not None
    assert error.startswith("An event is no chunk of an answer")
    assert answer_of(b'{"choices": [{"text": 5}]}').error is not None


def test_a_stream_without_an_end() -> None:
    assert answer_of(text("a"), b"[DONE]").error == "The stream ended without a finish_reason."
    answer = Answer(0.0)
    answer.feed(b'data: {"choices"')
    answer.end()
    assert answer.error == "The stream ended in the middle of an event."


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (b'{"error": {"message": "too long"}}', "HTTP 400: too long"),
        (b'{"detail": "Not Found"}', "HTTP 400: Not Found"),
        (b'{"message": "no"}', "HTTP 400: no"),
        (b"<html>", "HTTP 400: <html>"),
        (b"", "HTTP 400"),
    ],
)
def test_refusals_are_sentences(body: bytes, expected: str) -> None:
    assert refusal(400, body) == expected


def test_an_error_of_any_shape_has_a_text() -> None:
    assert error_text({"error": {"error": {"message": "deep"}}}) == "deep"
    assert error_text({"code": 3}) == "{'code': 3}"
    assert error_text("plain") == "plain"
