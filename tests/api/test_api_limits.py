"""What one request may cost others: sizes, counts, unread answers; and the line each leaves in the log."""

from __future__ import annotations

import json
import logging
import re
import socket
import threading
from typing import Any

import pytest
from fake_engine import MAX_MODEL_LEN, FakeEngine, Script, Server, fake_info, serving, wait_until
from test_api_raw import CHAT, HI, TEXT, Reply, chat, complete, get, post, send

from gqa_serve.engine.chat_template import ChatTemplate
from gqa_serve.engine.stop_strings import StopStrings
from gqa_serve.engine.tokenizer import Tokenizer


@pytest.mark.parametrize(("size", "thread"), [(3, None), (1024, "AnyIO worker thread")])
def test_stop_strings_are_compiled_once_for_all_choices(
    server: Server, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch, size: int, thread: str | None
) -> None:
    """And large ones not on the event loop; the engine, which never reads them, gets none."""
    threads = []

    class Counted(StopStrings):
        def __init__(self, stops: Any) -> None:
            threads.append(threading.current_thread().name)
            super().__init__(stops)

    monkeypatch.setattr("gqa_serve.api.serving.StopStrings", Counted)
    monkeypatch.setattr("gqa_serve.engine.detokenizer.StopStrings", Counted)
    stops = ["lo", *(chr(0x4E00 + number) * size for number in range(30))]
    reply = complete(server, prompt=["a", "b"], n=4, stop=stops)
    assert [choice["text"] for choice in json.loads(reply.body)["choices"]] == ["Hel"] * 8
    assert len(threads) == 1
    assert (threads[0] == "AnyIO worker thread") == (thread is not None)
    assert [request.params.stop for request in engine.requests] == [[]] * 8


def refuse_to_tokenize(*args: object, **options: object) -> list[int]:
    raise AssertionError("tokenized")


@pytest.mark.parametrize(
    ("path", "fields", "param"),
    [
        (TEXT, {"prompt": "x" * 100_000}, "prompt"),
        (TEXT, {"prompt": ["x" * 100_000]}, "prompt[0]"),
        (CHAT, {"messages": [{"role": "user", "content": "x" * 100_000}]}, "messages"),
        (CHAT, {"messages": [{"role": "user", "content": "x" * 1000}] * 100}, "messages"),
        (
            CHAT,
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "x" * 1000}] * 100}]},
            "messages",
        ),
    ],
)
def test_a_text_that_cannot_fit_is_neither_rendered_nor_tokenized(
    server: Server, monkeypatch: pytest.MonkeyPatch, path: str, fields: dict[str, Any], param: str
) -> None:
    monkeypatch.setattr(Tokenizer, "encode", refuse_to_tokenize)
    monkeypatch.setattr(ChatTemplate, "render", refuse_to_tokenize)
    error = send(server, post(path, json.dumps(fields).encode())).error
    assert (error["param"], error["code"]) == (param, "context_length_exceeded")
    assert "at least 100000 characters" in error["message"]


def test_too_many_messages(server: Server) -> None:
    error = chat(server, messages=[{"role": "user", "content": ""}] * 10_001).error
    assert error["param"] == "messages"
    assert "10000" in error["message"]


def test_many_empty_messages_do_not_hold_up_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rendering waits here until /health has answered: it cannot be on the event loop."""
    answered = threading.Event()
    render = ChatTemplate.render

    def slow_render(self: ChatTemplate, *args: Any, **options: Any) -> str:
        if len(args[0]) > 10:
            assert answered.wait(20)
        return render(self, *args, **options)

    monkeypatch.setattr(ChatTemplate, "render", slow_render)
    body = {"messages": [{"role": "user", "content": ""}] * 100}
    with serving(FakeEngine()) as server, server.connect() as connection:
        server.engine.model_info = fake_info(max_model_len=4096)
        connection.sendall(post(CHAT, json.dumps(body).encode()))
        try:
            assert send(server, get("/health")).status == 200
        finally:
            answered.set()
        with connection.makefile("rb") as stream:
            assert Reply(stream).status == 200


def test_prompts_are_counted_before_they_are_touched(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gqa_serve.api.completions.split_prompt", refuse_to_tokenize)
    for prompt in ([[1]] * 1025, ["a"] * 1025):
        reply = complete(server, prompt=prompt)
        assert (reply.status, reply.error["param"]) == (400, "prompt")


@pytest.mark.parametrize("prompt", [[-1] * (MAX_MODEL_LEN + 1), [[1], [-1] * (MAX_MODEL_LEN + 1)]])
def test_too_many_ids_are_not_looked_at(server: Server, prompt: list[Any]) -> None:
    error = complete(server, prompt=prompt, max_tokens=0).error
    assert error["code"] == "context_length_exceeded"
    assert f"{MAX_MODEL_LEN + 1} tokens" in error["message"]


def test_a_prompt_as_long_as_the_context_can_be_computed(server: Server, engine: FakeEngine) -> None:
    assert complete(server, prompt=[1] * MAX_MODEL_LEN, max_tokens=0).status == 200
    assert engine.requests[0].params.prompt_logprobs is None  # nobody asked for scores
    assert complete(server, prompt=[1] * MAX_MODEL_LEN).error["code"] == "context_length_exceeded"


@pytest.mark.parametrize(
    ("path", "fields", "param"),
    [
        (CHAT, {"n": 4}, "n"),
        (TEXT, {"n": 4}, "n"),
        (TEXT, {"prompt": ["a", "b"], "n": 2}, "n"),
        (TEXT, {"prompt": ["a"] * 4}, "prompt"),
        (TEXT, {"n": 3}, None),
        (CHAT, {"n": 3}, None),
        (TEXT, {"prompt": ["a"] * 3}, None),
    ],
)
def test_more_choices_than_the_server_ever_holds(
    server: Server, engine: FakeEngine, path: str, fields: dict[str, Any], param: str | None
) -> None:
    engine.model_info = fake_info(max_num_seqs=2, max_waiting=1)
    reply = chat(server, **fields) if path == CHAT else complete(server, **fields)
    assert reply.status == (200 if param is None else 400)
    if param is not None:
        assert reply.error["param"] == param
        assert "3 choices" in reply.error["message"]


# --- fields ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("effort", ["none", None])
def test_no_effort_is_what_a_model_without_the_setting_makes(server: Server, effort: str | None) -> None:
    assert chat(server, reasoning_effort=effort).status == 200


@pytest.mark.parametrize("effort", ["low", "max", "", "None"])
def test_reasoning_effort_is_refused_where_nothing_reads_it(server: Server, effort: str) -> None:
    assert chat(server, reasoning_effort=effort).error["param"] == "reasoning_effort"


@pytest.mark.parametrize(
    ("source", "effort", "shown"),
    [
        ("{{ reasoning_effort | default('-') }}", "high", b"high"),
        ("{{ reasoning_effort | default('-') }}", None, b"-"),
        ("{{ reasoning_effort | default('-') }}", "max", None),
        ("{{ enable_thinking }}", "none", b"False"),
        ("{{ enable_thinking }}", "low", None),
    ],
)
def test_reasoning_effort_reaches_a_template_that_reads_it(
    source: str, effort: str | None, shown: bytes | None
) -> None:
    with serving(FakeEngine(), template=source) as server:
        reply = chat(server, reasoning_effort=effort)
        if shown is None:
            assert reply.error["param"] == "reasoning_effort"
            assert ("enable_thinking" in reply.error["message"]) == ("enable_thinking" in source)
        else:
            assert bytes(server.engine.requests[0].prompt) == shown


@pytest.mark.parametrize(
    "kwargs",
    [
        {"a": "x"},
        {"add_special_tokens": True},
        {"max_model_len": 3},
        {"messages": []},
        {"tokenizer": 1, "a": 1},
    ],
)
def test_template_kwargs_are_blamed_for_what_they_break(kwargs: dict[str, Any]) -> None:
    with serving(FakeEngine(), template="{{ messages[0].content }}{{ 2 + (a or 0) }}") as server:
        for fields in ({"chat_template_kwargs": kwargs}, {"chat_template_kwargs": {"a": 1}}):
            reply = chat(server, **fields)
            if fields["chat_template_kwargs"].get("a") == 1:
                assert reply.status == 200
            else:
                assert (reply.status, reply.error["param"]) == (400, "chat_template_kwargs")


def test_messages_are_blamed_for_what_they_break() -> None:
    source = "{% if messages[0].content == 'Hi' %}{{ raise_exception('no') }}{% endif %}x"
    with serving(FakeEngine(), template=source) as server:
        assert chat(server, chat_template_kwargs={"a": 1}).error["param"] == "messages"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"top_k": -2}, "top_k must be -1 (off) or at least 0, got -2."),
        ({"functions": [{"name": "f", "pad": "x" * 5000}]}, "functions is not supported by this server"),
        ({"best_of": [2] * 5000}, "best_of is not supported by this server"),
    ],
)
def test_messages_are_plain(server: Server, fields: dict[str, Any], message: str) -> None:
    assert chat(server, **fields).error["message"].startswith(message)


def test_models_with_a_slash_too_many(server: Server) -> None:
    reply = send(server, get("/v1/models/"))
    assert (reply.status, reply.error["code"]) == (404, "unknown_url")
    assert "id after the slash" in reply.error["message"]


# --- connections -------------------------------------------------------------------------------------------


def refuses_data(connection: socket.socket) -> bool:
    """Whether the other end has closed its socket, not only said that it will send no more."""
    try:
        connection.sendall(b"x")
    except ConnectionError:
        return True
    return False


def test_a_client_that_reads_nothing_loses_its_connection(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A close would wait for it to read what is unsent, and so would a stopping server."""
    engine = FakeEngine(lambda request: Script(["x" * 500] * 20))
    engine.model_info = fake_info(max_model_len=20_000)
    with serving(engine, send_timeout=0.2) as server, socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect((server.host, server.port))
        fields = {**HI, "stream": True, "logprobs": True, "top_logprobs": 20}
        connection.sendall(post(CHAT, json.dumps(fields).encode()))
        wait_until(lambda: "read nothing for" in caplog.text)
        wait_until(lambda: engine.num_running == 0)
        wait_until(lambda: refuses_data(connection))
        assert send(server, get("/health")).status == 200
    assert "without completing" not in caplog.text
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR] == []


@pytest.mark.parametrize(
    "data", [b"\x16\x03\x01\r\n\r\n", b"GET\r\n\r\n", b"GET / HTTP/1.1\r\n\x00: 1\r\n\r\n"]
)
def test_malformed_http_is_answered_in_json(server: Server, data: bytes) -> None:
    reply = send(server, data)
    assert (reply.status, reply.error["code"]) == (400, "invalid_http")
    assert reply.headers["connection"] == "close"


def test_garbage_after_a_request_does_not_get_into_its_answer(server: Server, engine: FakeEngine) -> None:
    engine.script = lambda request: Script(["a", "b"], hold_at=1)
    with server.connect() as connection:
        connection.sendall(post(CHAT, json.dumps({**HI, "stream": True}).encode()))
        data = connection.recv(4096)
        connection.sendall(b"\x00\x01\r\n\r\n")
        while more := connection.recv(4096):
            data += more
    assert data.startswith(b"HTTP/1.1 200")
    assert data.count(b"HTTP/1.1") == 1
    wait_until(lambda: engine.ends() == ["abort"])


def test_a_stopping_engine_ends_answers_in_its_own_words(server: Server, engine: FakeEngine) -> None:
    engine.script = lambda request: Script([], finish="abort", error="The server is stopping.")
    reply = chat(server)
    assert (reply.status, reply.error["message"]) == (503, "The server is stopping.")
    engine.script = lambda request: Script(["a"], finish="abort", error="The server is stopping.", hold_at=1)
    with server.connect() as connection:
        connection.sendall(post(CHAT, json.dumps({**HI, "stream": True}).encode()))
        data = b""
        while b'"content":"a"' not in data:
            data += connection.recv(4096)
        engine.release.set()
        while b"[DONE]" not in data:
            data += connection.recv(4096)
    *_, error, done = re.findall(rb"data: (.*)\n\n", data)
    assert json.loads(error)["error"] == {
        "message": "The server is stopping.",
        "type": "service_unavailable_error",
        "param": None,
        "code": "engine_unavailable",
    }
    assert done == b"[DONE]"


# --- log ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "fields", "script", "line"),
    [
        (CHAT, {}, Script(num_cached_tokens=16), "chat prompt=21 cached=16 output=12 finish=stop"),
        (CHAT, {"stream": True}, Script(), "chat stream prompt=21 cached=0 output=12 finish=stop"),
        (TEXT, {"max_tokens": 2, "n": 3}, Script(), "completion prompt=1 cached=0 output=6 finish=length:3"),
        (CHAT, {}, Script([], finish="error", error="x"), "chat prompt=21 cached=0 output=0 finish=error"),
    ],
)
def test_each_request_leaves_one_line(
    server: Server,
    engine: FakeEngine,
    caplog: pytest.LogCaptureFixture,
    path: str,
    fields: dict[str, Any],
    script: Script,
    line: str,
) -> None:
    engine.script = lambda request: script
    times = r" \d+\.\d\ds" + ("" if "error" in line else r" ttft=\d+\.\d{3}s tpot=\d+\.\d{4}s")
    pattern = re.compile(rf"(chatcmpl|cmpl)-[0-9a-f]{{32}} {re.escape(line)}{times}")

    def lines() -> list[str]:  # that of a test before may come late
        return [text for record in caplog.records if pattern.fullmatch(text := record.getMessage())]

    with caplog.at_level(logging.INFO, "gqa_serve.api.account"):
        (chat if path == CHAT else complete)(server, **fields)
        wait_until(lambda: bool(lines()))
    assert len(lines()) == 1
