"""The API byte by byte, through raw sockets: SSE framing, odd bodies, odd clients, clients that leave."""

from __future__ import annotations

import json
import re
import socket
import threading
from typing import Any

import pytest
from fake_engine import MODEL, FakeEngine, Script, Server, fake_info, serving, wait_until

from gqa_serve import __version__
from gqa_serve.engine.tokenizer import Tokenizer

CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"
HI = {"model": MODEL, "messages": [{"role": "user", "content": "Hi"}]}


def post(path: str, body: bytes, *headers: str) -> bytes:
    lines = [f"POST {path} HTTP/1.1", "Host: test", "Content-Type: application/json", *headers]
    if not any(header.startswith("Transfer-Encoding") for header in headers):
        lines.append(f"Content-Length: {len(body)}")
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


class Reply:
    """One HTTP response read from a socket."""

    def __init__(self, stream: Any) -> None:
        self.status = int(stream.readline().split()[1])
        self.headers: dict[str, str] = {}
        while line := stream.readline().strip():
            name, _, value = line.decode().partition(":")
            self.headers[name.lower()] = value.strip()
        if self.headers.get("transfer-encoding") == "chunked":
            self.body = b""
            while size := int(stream.readline(), 16):
                self.body += stream.read(size)
                stream.readline()
            stream.readline()
        else:
            self.body = stream.read(int(self.headers.get("content-length", "0")))

    @property
    def error(self) -> dict[str, Any]:
        """The error object, checked for its shape."""
        assert self.headers["content-type"] == "application/json"
        assert len(self.body) < 2048
        body = json.loads(self.body)
        assert set(body) == {"error"}
        error: dict[str, Any] = body["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert isinstance(error["message"], str)
        assert error["message"]
        assert isinstance(error["type"], str)
        return error


def send(server: Server, data: bytes) -> Reply:
    with server.connect() as connection:
        connection.sendall(data)
        with connection.makefile("rb") as stream:
            return Reply(stream)


def chat(server: Server, **fields: Any) -> Reply:
    return send(server, post(CHAT, json.dumps({**HI, **fields}).encode()))


def complete(server: Server, **fields: Any) -> Reply:
    return send(server, post(TEXT, json.dumps({"model": MODEL, "prompt": "p", **fields}).encode()))


def get(path: str, method: str = "GET") -> bytes:
    return f"{method} {path} HTTP/1.1\r\nHost: test\r\n\r\n".encode()


# --- streams -----------------------------------------------------------------------------------------------


def test_chat_stream_bytes(server: Server, engine: FakeEngine) -> None:
    engine.script = lambda request: Script(["Hé"])
    reply = chat(server, stream=True, stream_options={"include_usage": True})
    assert reply.status == 200
    assert reply.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert reply.headers["cache-control"] == "no-cache"
    assert reply.headers["x-accel-buffering"] == "no"
    match = re.search(rb'"id":"(chatcmpl-[0-9a-f]{32})","object":"[a-z.]+","created":(\d+),', reply.body)
    assert match is not None
    assert reply.headers["x-request-id"] == match[1].decode()
    fingerprint = re.search(rb'"system_fingerprint":"(fp_[0-9a-f]{10})"', reply.body)
    assert fingerprint is not None
    head = (
        b'data: {"id":"%s","object":"chat.completion.chunk","created":%s,"model":"fake/model",'
        b'"system_fingerprint":"%s","choices":[' % (match[1], match[2], fingerprint[1])
    )
    one = b'{"index":0,"delta":%s,"logprobs":null,"finish_reason":%s}],"usage":null}\n\n'
    expected = [
        head + one % (b'{"role":"assistant","content":""}', b"null"),
        head + one % ('{"content":"Hé"}'.encode(), b"null"),
        head + one % (b"{}", b'"stop","stop_reason":null'),
        head + b'],"usage":{"prompt_tokens":21,"completion_tokens":4,"total_tokens":25,'
        b'"prompt_tokens_details":{"cached_tokens":0}}}\n\n',
        b"data: [DONE]\n\n",
    ]
    assert reply.body == b"".join(expected)


def test_error_after_the_first_token_is_an_event_then_done(server: Server, engine: FakeEngine) -> None:
    engine.script = lambda request: Script(["Hello"], finish="error", error="It broke.", hold_at=1)
    with server.connect() as connection:
        connection.sendall(post(CHAT, json.dumps({**HI, "stream": True}).encode()))
        first = b""
        while b"Hello" not in first:
            first += connection.recv(4096)
        engine.release.set()
        rest = first
        while b"[DONE]" not in rest:
            rest += connection.recv(4096)
    events = re.findall(rb"data: (.*)\n\n", rest)
    assert json.loads(events[-2]) == {
        "error": {"message": "It broke.", "type": "server_error", "param": None, "code": "engine_error"}
    }
    assert events[-1] == b"[DONE]"


def test_a_bug_in_a_stream_says_nothing_of_the_inside(server: Server, engine: FakeEngine) -> None:
    engine.script = lambda request: Script(["a"], fault=RuntimeError("secret"), hold_at=1)
    with server.connect() as connection:
        connection.sendall(post(CHAT, json.dumps({**HI, "stream": True}).encode()))
        data = b""
        while b'"content":"a"' not in data:
            data += connection.recv(4096)
        engine.release.set()
        while b"[DONE]" not in data:
            data += connection.recv(4096)
    assert b'"code":"internal_error"' in data
    assert b"secret" not in data


def test_a_waiting_stream_starts_with_pings_after_a_while(
    server: Server, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gqa_serve.api.serving.FIRST_TOKEN_PATIENCE_S", 0.01)
    monkeypatch.setattr("gqa_serve.api.serving.PING_INTERVAL_S", 0.01)
    engine.script = lambda request: Script(hold_at=0)
    with server.connect() as connection:
        connection.sendall(post(CHAT, json.dumps({**HI, "stream": True}).encode()))
        data = b""
        while data.count(b": keep-alive\n\n") < 2:
            data += connection.recv(4096)
        assert data.startswith(b"HTTP/1.1 200 OK")
        assert b"Hel" not in data
        engine.release.set()
        while b"[DONE]" not in data:
            data += connection.recv(4096)
    assert engine.ends() == ["stop"]


# --- clients that leave ------------------------------------------------------------------------------------


@pytest.mark.parametrize("fields", [{}, {"stream": True}, {"n": 3}, {"n": 3, "stream": True}])
@pytest.mark.parametrize("hold_at", [0, 1])
@pytest.mark.parametrize("reset", [False, True])
def test_disconnect_ends_every_choice(
    server: Server, engine: FakeEngine, fields: dict[str, Any], hold_at: int, reset: bool
) -> None:
    """While queued (before any token) and while generating, streamed or not."""
    engine.script = lambda request: Script(["a"] * 50, hold_at=hold_at)
    with server.connect() as connection:
        connection.sendall(post(CHAT, json.dumps({**HI, **fields}).encode()))
        if "stream" in fields and hold_at:
            assert connection.recv(4096)
        wait_until(lambda: len(engine.streams) == fields.get("n", 1))
        assert engine.num_running == fields.get("n", 1)
        if reset:
            linger = socket.SO_LINGER
            connection.setsockopt(socket.SOL_SOCKET, linger, b"\x01\0\0\0\0\0\0\0")
    wait_until(lambda: engine.num_running == 0)
    assert engine.ends() == ["abort"] * fields.get("n", 1)
    assert all(stream.aborts >= 1 for stream in engine.streams)
    assert send(server, get("/health")).status == 200


def test_disconnect_in_the_middle_of_the_body(server: Server, engine: FakeEngine) -> None:
    data = post(CHAT, json.dumps(HI).encode())
    with server.connect() as connection:
        connection.sendall(data[:-10])
    assert chat(server).status == 200
    assert len(engine.requests) == 1


def test_a_slow_reader_gets_everything(server: Server, engine: FakeEngine) -> None:
    engine.script = lambda request: Script(["x" * 100] * 4)
    reply = chat(server, stream=True)
    texts = [json.loads(line[6:])["choices"][0]["delta"] for line in reply.body.split(b"\n\n")[:-2]]
    assert "".join(delta.get("content", "") for delta in texts) == "x" * 400


# --- connections -------------------------------------------------------------------------------------------


def test_pipelined_requests_and_keep_alive_after_errors(server: Server) -> None:
    requests = [
        post(CHAT, json.dumps(HI).encode()),
        post(CHAT, b"{"),
        get("/nowhere"),
        post(CHAT, json.dumps({**HI, "stream": True}).encode()),
        get("/version"),
    ]
    with server.connect() as connection:
        connection.sendall(b"".join(requests))
        with connection.makefile("rb") as stream:
            replies = [Reply(stream) for _ in requests]
    assert [reply.status for reply in replies] == [200, 400, 404, 200, 200]
    assert replies[3].body.endswith(b"data: [DONE]\n\n")


def test_chunked_request_body(server: Server) -> None:
    body = json.dumps(HI).encode()
    pieces = [body[start : start + 7] for start in range(0, len(body), 7)]
    data = b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n\r\n"
    assert send(server, post(CHAT, data, "Transfer-Encoding: chunked")).status == 200


def test_expect_100_continue(server: Server) -> None:
    body = json.dumps(HI).encode()
    request = post(CHAT, body, "Expect: 100-continue")
    with server.connect() as connection:
        connection.sendall(request[: -len(body)])
        assert connection.recv(4096).startswith(b"HTTP/1.1 100 ")
        connection.sendall(body)
        with connection.makefile("rb") as stream:
            assert Reply(stream).status == 200


@pytest.mark.parametrize("chunked", [False, True])
def test_body_limit(chunked: bool) -> None:
    with serving(FakeEngine(), max_body_bytes=2048) as server:
        for padding, status in ((1000, 200), (2048, 413)):
            body = json.dumps({**HI, "user": "x" * padding}).encode()
            if chunked:
                data = b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body)
                reply = send(server, post(CHAT, data, "Transfer-Encoding: chunked"))
            else:
                reply = send(server, post(CHAT, body))
            assert reply.status == status
        assert reply.error["code"] == "request_too_large"


def test_an_announced_length_over_the_limit_is_refused_unread() -> None:
    with serving(FakeEngine(), max_body_bytes=2048) as server:
        head = f"POST {CHAT} HTTP/1.1\r\nHost: test\r\nContent-Length: 999999999999\r\n\r\n"
        assert send(server, head.encode()).status == 413


# --- bodies ------------------------------------------------------------------------------------------------

DEEP = 100_000


@pytest.mark.parametrize(
    ("body", "word"),
    [
        (b"", "empty"),
        (b"  \n", "empty"),
        (b"null", "object"),
        (b"[]", "object"),
        (b'"text"', "object"),
        (b"3", "object"),
        (b"{", "JSON"),
        (b"{}x", "JSON"),
        (b"{'a': 1}", "JSON"),
        (b"\xff\xfe{}", "UTF-8"),
        (b'{"model":"\xed\xa0\x80"}', "UTF-8"),
        (b'{"user":"\xff","messages":[]}', "UTF-8"),
        (b'{"temperature":NaN}', "NaN"),
        (b'{"temperature":-Infinity}', "Infinity"),
        (b'{"unknown":NaN}', "NaN"),
        (rb'{"model":"\ud800"}', "surrogate"),
        (rb'{"model":"\udc00 and more text"}', "surrogate"),
        (rb'{"messages":[{"role":"user","content":"\ud83d\u0041"}]}', "surrogate"),
        (rb'{"\ud800":1}', "surrogate"),
        (b"[" * DEEP + b"]" * DEEP, "object"),
        (b'{"messages":' + b"[" * DEEP + b"]" * DEEP + b"}", "nested"),
        (b'{"user":' + b'{"a":' * DEEP + b"1" + b"}" * DEEP + b"}", "nested"),
        (b'{"chat_template_kwargs":' + b'{"a":' * 64 + b"1" + b"}" * 64 + b"}", "nested"),
        (b'{"x":' + b"[" * DEEP, "nested"),
    ],
)
@pytest.mark.parametrize("path", [CHAT, TEXT])
def test_undecodable_bodies(server: Server, engine: FakeEngine, path: str, body: bytes, word: str) -> None:
    reply = send(server, post(path, body))
    assert reply.status == 400
    assert word in reply.error["message"]
    assert reply.error["type"] == "invalid_request_error"
    assert engine.requests == []


def test_nesting_within_the_limit_and_brackets_in_strings(server: Server) -> None:
    nested: Any = 1
    for _ in range(61):
        nested = {"a": nested}
    assert chat(server, chat_template_kwargs=nested).status == 200
    assert chat(server, user='[{"\\' * 5000).status == 200
    assert complete(server, prompt=[[1]] * 100).status == 200


@pytest.mark.parametrize(
    ("raw", "param"),
    [
        ('"max_tokens": ' + "9" * 5000, "max_tokens"),
        ('"max_tokens": ' + "9" * 400, "max_tokens"),
        ('"seed": 9223372036854775808', "seed"),
        ('"seed": ' + "9" * 30, "seed"),
        ('"n": ' + "9" * 25, "n"),
        ('"temperature": ' + "9" * 5000, "temperature"),
        ('"temperature": 1e400', "temperature"),
        ('"chat_template_kwargs": {"a": ' + "9" * 5000 + "}", "chat_template_kwargs"),
        ('"stop_token_ids": [' + "9" * 300 + "]", "stop_token_ids[0]"),
        ('"stop_token_ids": [' + "9" * 5000 + "]", "stop_token_ids[0]"),
        ('"chat_template_kwargs": {"a": {"b": [1e999]}}', "chat_template_kwargs"),
        # Where nobody would decode them: no-ops, refused and unknown fields.
        ('"user": ' + "9" * 5000, "user"),
        ('"user": ' + "9" * 400, "user"),
        ('"metadata": {"a": [-1e999]}', "metadata"),
        ('"unknown": 1E+309', "unknown"),
        ('"unknown": ' + "9" * 250 + "e100", "unknown"),
        ('"unknown": 1e999, "unknown": 1', ""),
        ('"functions": [' + "9" * 5000 + "]", "functions"),
        ('"best_of": ' + "9" * 5000, "best_of"),
        ('"messages": [{"role": "user", "content": "x", "extra": 1e999}]', "messages"),
    ],
)
def test_absurd_numbers(server: Server, raw: str, param: str) -> None:
    body = json.dumps(HI)[:-1] + ", " + raw + "}"
    reply = send(server, post(CHAT, body.encode()))
    assert reply.status == 400
    assert (reply.error["param"] or "") == param
    assert len(reply.error["message"]) < 200
    assert "$" not in reply.error["message"]


@pytest.mark.parametrize(
    "raw", ['"user": "' + "9" * 5000 + ' 1e999"', '"unknown": [1e308, 0e9, 12e-999]', '"seed": 123']
)
def test_numbers_that_are_fine(server: Server, raw: str) -> None:
    assert send(server, post(CHAT, (json.dumps(HI)[:-1] + ", " + raw + "}").encode())).status == 200


def test_duplicated_keys_take_the_last(server: Server, engine: FakeEngine) -> None:
    body = json.dumps(HI)[:-1] + ', "seed": 1, "seed": 2}'
    assert send(server, post(CHAT, body.encode())).status == 200
    assert engine.requests[0].params.seed == 2


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": None}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": "Hi"}, "messages"),
        ({"messages": [{}]}, "messages[0].role"),
        ({"messages": [{"role": 3}]}, "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [HI["messages"][0], {"role": "bot", "content": "x"}]}, "messages[1].role"),
        ({"messages": [{"role": "user", "content": 3}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": ["x"]}]}, "messages[0].content[0]"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0].text"),
        (
            {
                "messages": [
                    {
                        "role": "user",
                        "content": [
                            {"type": "text", "text": "What is this?"},
                            {"type": "image_url", "image_url": {"url": "http://169.254.169.254/"}},
                        ],
                    }
                ]
            },
            "messages[0].content[1]",
        ),
        ({"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]}, "messages[0].content[0]"),
        (
            {"messages": [{"role": "user", "content": "x", "tool_calls": [{"function": {"name": "f"}}]}]},
            "messages[0].tool_calls",
        ),
        ({"messages": [{"role": "assistant", "tool_calls": [{}]}]}, "messages[0].tool_calls[0].function"),
        ({"messages": [{"role": "assistant", "function_call": {"name": "f"}}]}, "messages[0].function_call"),
        ({"messages": [{"role": "assistant", "audio": {"id": "a"}}]}, "messages[0].audio"),
        ({"temperature": 2.5}, "temperature"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"top_k": -2}, "top_k"),
        ({"min_p": 2}, "min_p"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"presence_penalty": 3}, "presence_penalty"),
        ({"frequency_penalty": -3}, "frequency_penalty"),
        ({"logit_bias": {"a": 1}}, "logit_bias"),
        ({"logit_bias": {"\u0663": 1}}, "logit_bias"),
        ({"logit_bias": {"1": 101}}, "logit_bias"),
        ({"logit_bias": {"258": 1}}, "logit_bias"),
        ({"logit_bias": {"9" * 5000: 1}}, "logit_bias"),
        ({"logit_bias": [1]}, "logit_bias"),
        ({"stop_token_ids": [258]}, "stop_token_ids"),
        ({"stop": ["a"] * 65}, "stop"),
        ({"stop": ["a", ""]}, "stop"),
        ({"stop": 3}, "stop"),
        ({"n": 0}, "n"),
        ({"n": 129}, "n"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"max_completion_tokens": -1}, "max_completion_tokens"),
        ({"max_completion_tokens": 0}, "max_completion_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"min_tokens": 9, "max_tokens": 5}, "min_tokens"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": -1}, "top_logprobs"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": 2}, "logprobs"),
        ({"stream_options": 1}, "stream_options"),
        ({"stream": "yes"}, "stream"),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs"),
        ({"continue_final_message": True}, "messages"),
        ({"model": 7}, "model"),
        # Documented elsewhere, not built here: refused, not ignored.
        ({"functions": [{"name": "f"}]}, "functions"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": {"type": "function", "function": {"name": "f"}}}, "tool_choice"),
        ({"modalities": ["text", "audio"]}, "modalities"),
        ({"audio": {"voice": "alloy"}}, "audio"),
        ({"prediction": {"type": "content", "content": "x"}}, "prediction"),
        ({"web_search_options": {}}, "web_search_options"),
        ({"chat_template": "{{ 1 }}"}, "chat_template"),
        ({"best_of": 2}, "best_of"),
        ({"best_of": "2"}, "best_of"),
        ({"echo": True}, "echo"),
        ({"suffix": "x"}, "suffix"),
        ({"prompt_logprobs": 21}, "prompt_logprobs"),
        ({"prompt_logprobs": 0, "stream": True}, "prompt_logprobs"),
        ({"allowed_token_ids": []}, "allowed_token_ids"),
        ({"allowed_token_ids": [258]}, "allowed_token_ids"),
        ({"allowed_token_ids": [1], "min_tokens": 1}, "allowed_token_ids"),
        ({"allowed_token_ids": [1] * 1025}, "allowed_token_ids"),
        ({"repeat_penalty": 2, "repetition_penalty": 1}, "repeat_penalty"),
        ({"repeat_penalty": 0}, "repetition_penalty"),
        (
            {"spaces_between_special_tokens": True, "skip_special_tokens": False},
            "spaces_between_special_tokens",
        ),
    ],
)
def test_chat_fields_refused(server: Server, engine: FakeEngine, fields: dict[str, Any], param: str) -> None:
    reply = chat(server, **fields)
    assert reply.status == 400
    assert reply.error["param"] == param
    assert engine.requests == []


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": None}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": ["a", ""]}, "prompt[1]"),
        ({"prompt": [[1], []]}, "prompt[1]"),
        ({"prompt": [1, "a"]}, "prompt"),
        ({"prompt": ["a", [1]]}, "prompt"),
        ({"prompt": [1.5]}, "prompt[0]"),
        ({"prompt": [True]}, "prompt[0]"),
        ({"prompt": [258]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": [[1], [10**300]]}, "prompt[1]"),
        ({"prompt": [[1], [10**400]]}, "prompt"),
        ({"prompt": [258] * 600}, "prompt"),
        ({"prompt": ["a"] * 513, "n": 2}, "prompt"),
        ({"logprobs": 21}, "logprobs"),
        ({"logprobs": -1}, "logprobs"),
        ({"logprobs": True}, "logprobs"),
        ({"n": 2, "best_of": 3, "stream": True}, "best_of"),
        ({"n": 2, "best_of": 1}, "best_of"),
        ({"best_of": 0}, "best_of"),
        ({"best_of": 129}, "best_of"),
        ({"prompt": ["a"] * 9, "best_of": 128}, "best_of"),
        ({"prompt_logprobs": 21}, "prompt_logprobs"),
        ({"prompt_logprobs": -1}, "prompt_logprobs"),
        ({"prompt_logprobs": -1, "echo": True, "logprobs": 3}, "prompt_logprobs"),
        ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
        ({"truncate_prompt_tokens": -2}, "truncate_prompt_tokens"),
        ({"truncate_prompt_tokens": 513}, "truncate_prompt_tokens"),
        ({"suffix": "x"}, "suffix"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"max_tokens": -1}, "max_tokens"),
    ],
)
def test_completion_fields_refused(
    server: Server, engine: FakeEngine, fields: dict[str, Any], param: str
) -> None:
    reply = complete(server, **fields)
    assert reply.status == 400
    assert reply.error["param"] == param
    assert engine.requests == []


@pytest.mark.parametrize("path", [CHAT, TEXT])
def test_missing_fields(server: Server, path: str) -> None:
    reply = send(server, post(path, b"{}"))
    assert reply.status == 400
    assert reply.error["param"] == {CHAT: "messages", TEXT: "prompt"}[path]


def test_harmless_values_of_refused_fields(server: Server) -> None:
    harmless = {
        "tools": [],
        "tool_choice": "auto",
        "functions": [],
        "response_format": {"type": "text"},
        "modalities": ["text"],
        "suffix": "",
        "echo": False,
        "best_of": 1,
        "metadata": {"a": "b"},
        "store": True,
        "service_tier": "flex",
        "user": "u",
        "parallel_tool_calls": True,
        "stream_options": {"include_usage": True},  # without stream
        "verbosity": "medium",
    }
    reply = chat(server, **harmless)
    assert reply.status == 200
    assert complete(server, n=2, best_of=2).status == 200


def test_the_model_may_be_left_out(server: Server) -> None:
    reply = send(server, post(CHAT, json.dumps({"messages": HI["messages"]}).encode()))
    assert (reply.status, json.loads(reply.body)["model"]) == (200, MODEL)


def test_unknown_fields_are_logged_once_each(caplog: pytest.LogCaptureFixture) -> None:
    with serving(FakeEngine()) as server:
        _check_unknown_fields(server, caplog)


def _check_unknown_fields(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(3):
        assert chat(server, tempratur=1, **{"x" * 5000: 1}).status == 200
    messages = [record.getMessage() for record in caplog.records if record.name == "gqa_serve.api.params"]
    assert len(messages) == 2
    assert any("'tempratur'" in message for message in messages)
    assert all(len(message) < 200 for message in messages)
    for number in range(200):
        chat(server, **{f"unknown{number}": 1})
    assert len([record for record in caplog.records if record.name == "gqa_serve.api.params"]) == 64


def test_errors_do_not_amplify(server: Server) -> None:
    long = "x" * 100_000
    for reply in (
        chat(server, model=long),
        chat(server, messages=[{"role": long, "content": "x"}]),
        chat(server, messages=[{"role": "user", "content": [{"type": long}]}]),
        chat(server, logit_bias={long: 1}),
        chat(server, temperature=long),
        chat(server, tool_choice=long),
    ):
        assert reply.status in (400, 404)
        assert reply.error["message"]


# --- routes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path", ["/ui", "/ui/", "/v1", "/v1/images/generations", "/v1/chat", "/v1/completions/", "/" + "x" * 5000]
)
def test_unknown_routes(server: Server, path: str) -> None:
    for data in (get(path), post(path, b"{}")):
        reply = send(server, data)
        assert reply.status == 404
        assert reply.error["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("method", "path", "allow"),
    [
        ("GET", CHAT, {"POST"}),
        ("DELETE", TEXT, {"POST"}),
        ("OPTIONS", CHAT, {"POST"}),
        ("POST", "/v1/models", {"GET", "HEAD"}),
        ("DELETE", "/v1/models/fake/model", {"GET", "HEAD"}),
        ("POST", "/health", {"GET", "HEAD"}),
    ],
)
def test_wrong_methods(server: Server, method: str, path: str, allow: set[str]) -> None:
    reply = send(server, get(path, method))
    assert reply.status == 405
    assert set(re.split(r",\s*", reply.headers["allow"])) == allow
    assert reply.error["code"] == "method_not_allowed"


@pytest.mark.parametrize(
    ("state", "health", "ready"),
    [
        ("loading", 503, 503),
        ("ready", 200, 200),
        ("restarting", 503, 503),
        ("stopping", 200, 503),
        ("failed", 503, 503),
    ],
)
def test_health_and_ready(server: Server, engine: FakeEngine, state: str, health: int, ready: int) -> None:
    engine.state = state
    for path, status in (("/health", health), ("/ready", ready)):
        reply = send(server, get(path))
        assert reply.status == status
        if status == 200:
            assert reply.body == b'{"status":"ok"}'
        else:
            assert state in reply.error["message"]
            assert reply.error["code"] == "engine_unavailable"
            assert int(reply.headers["retry-after"]) > 0


def test_nothing_needs_a_loaded_model_but_completions(server: Server, engine: FakeEngine) -> None:
    engine.state, engine.model_info = "loading", None
    models = json.loads(send(server, get("/v1/models")).body)
    assert [model["id"] for model in models["data"]] == [MODEL, "alias"]
    assert json.loads(send(server, get("/version")).body) == {"version": __version__}
    assert chat(server).status == 503
    assert complete(server).status == 503
    assert chat(server, messages=[]).status == 400


@pytest.mark.parametrize("path", ["/v1/models/fake/model", "/v1/models/fake%2Fmodel", "/v1/models/alias"])
def test_one_model(server: Server, path: str) -> None:
    card = json.loads(send(server, get(path)).body)
    assert card["id"] in path.replace("%2F", "/")
    assert (card["object"], card["root"]) == ("model", MODEL)
    assert isinstance(card["created"], int)


@pytest.mark.parametrize("path", [CHAT, TEXT])
def test_a_long_prompt_does_not_hold_up_others(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokenizing a long text waits here until /health has answered: it cannot be on the event loop."""
    answered = threading.Event()
    encode = Tokenizer.encode

    def slow_encode(self: Tokenizer, text: str, **options: Any) -> list[int]:
        assert answered.wait(20)
        return encode(self, text, **options)

    text = "x" * 20_000
    body = {"model": MODEL, "prompt": text, "messages": [{"role": "user", "content": text}]}
    del body["messages" if path == TEXT else "prompt"]
    with serving(FakeEngine()) as server, server.connect() as connection:
        server.engine.model_info = fake_info(max_model_len=4096)
        monkeypatch.setattr(Tokenizer, "encode", slow_encode)
        connection.sendall(post(path, json.dumps(body).encode()))
        try:
            assert send(server, get("/health")).status == 200
        finally:
            answered.set()
        with connection.makefile("rb") as stream:
            assert Reply(stream).error["code"] == "context_length_exceeded"


def test_the_model_name_defaults_to_the_engines() -> None:
    with serving(FakeEngine(), served_model_name=()) as server:
        assert json.loads(chat(server).body)["model"] == MODEL
        server.engine.state, server.engine.model_info = "loading", None
        assert chat(server).status == 503
        reply = send(server, get("/v1/models"))
        assert (reply.status, reply.error["code"]) == (503, "engine_unavailable")
        assert int(reply.headers["retry-after"]) > 0
