"""/tokenize, /detokenize and /tokenizer_info: vLLM's shapes, chat's tokens, and no need of a free engine."""

from __future__ import annotations

from typing import Any

import httpx2
import openai
import pytest
from fake_engine import IM_END, IM_START, MAX_MODEL_LEN, MODEL, VOCAB_SIZE, FakeEngine, Server

USER = [{"role": "user", "content": "Hi"}]


def post(server: Server, path: str, **fields: Any) -> httpx2.Response:
    return server.post(path, fields)


@pytest.mark.parametrize("path", ["/tokenize", "/v1/tokenize"])
def test_a_prompt(server: Server, path: str) -> None:
    reply = post(server, path, model=MODEL, prompt="é<|im_end|>")
    assert reply.json() == {
        "count": 3,
        "max_model_len": MAX_MODEL_LEN,
        "tokens": [0xC3, 0xA9, IM_END],
        "token_strs": None,
    }
    strings = post(server, path, prompt="a <|im_end|>", return_token_strs=True).json()["token_strs"]
    assert strings == ["a", "Ġ", "<|im_end|>"]
    assert post(server, path, prompt="", add_special_tokens=True).json()["tokens"] == []


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"add_generation_prompt": False},
        {
            "messages": [*USER, {"role": "assistant", "content": "yes <|im_end|>"}],
            "continue_final_message": True,
        },
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "parts"}]}]},
        {"chat_template_kwargs": {"x": 1}, "temperature": 0.5, "max_tokens": 3},
    ],
)
def test_a_conversation_has_the_tokens_chat_sends(
    server: Server, engine: FakeEngine, client: openai.OpenAI, fields: dict[str, Any]
) -> None:
    counted = post(server, "/tokenize", **{"messages": USER, **fields}).json()
    body = {"model": MODEL, "messages": USER, **fields}
    assert server.post("/v1/chat/completions", body).status_code == 200
    (request,) = engine.requests
    assert counted["tokens"] == request.prompt
    assert counted["count"] == len(request.prompt)
    assert counted["tokens"][0] == IM_START


def test_what_is_too_long_for_the_model_is_counted(server: Server) -> None:
    text = "x" * (2 * MAX_MODEL_LEN)
    assert post(server, "/tokenize", prompt=text).json()["count"] == 2 * MAX_MODEL_LEN
    long = [{"role": "user", "content": text}]
    assert post(server, "/tokenize", messages=long).json()["count"] > 2 * MAX_MODEL_LEN
    # but not beyond all measure: nobody tokenizes megabytes to learn that they do not fit
    reply = post(server, "/tokenize", prompt="x" * 100 * MAX_MODEL_LEN)
    assert (reply.status_code, reply.json()["error"]["code"]) == (400, "context_length_exceeded")


@pytest.mark.parametrize("state", ["restarting", "stopping"])
def test_a_busy_or_restarting_engine_is_in_nobodys_way(
    server: Server, engine: FakeEngine, state: str
) -> None:
    engine.capacity = 0
    engine.state = state
    assert post(server, "/tokenize", prompt="ab").json()["tokens"] == [97, 98]
    assert post(server, "/tokenize", messages=USER).status_code == 200
    assert post(server, "/detokenize", tokens=[97]).json() == {"prompt": "a"}
    assert engine.requests == []


def test_before_the_model_is_known(server: Server, engine: FakeEngine) -> None:
    engine.state, engine.model_info = "loading", None
    assert post(server, "/tokenize", prompt="ab").status_code == 503


@pytest.mark.parametrize("path", ["/detokenize", "/v1/detokenize"])
def test_there_and_back(server: Server, path: str) -> None:
    text = "Grüße, <|im_start|>user\n 你好"
    tokens = post(server, "/tokenize", prompt=text).json()["tokens"]
    assert post(server, path, model=MODEL, tokens=tokens).json() == {"prompt": text}
    assert post(server, path, tokens=[]).json() == {"prompt": ""}


@pytest.mark.parametrize(
    ("path", "fields", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "a", "messages": USER}, "prompt"),
        ("/tokenize", {"prompt": ["a"]}, "prompt"),
        ("/tokenize", {"messages": [{"role": "nobody", "content": "a"}]}, "messages[0].role"),
        ("/tokenize", {"messages": USER, "chat_template": "x"}, "chat_template"),
        ("/tokenize", {"messages": USER, "continue_final_message": True}, "messages"),
        ("/detokenize", {}, "tokens"),
        ("/detokenize", {"tokens": "a"}, "tokens"),
        ("/detokenize", {"tokens": [VOCAB_SIZE]}, "tokens"),
        ("/detokenize", {"tokens": [-1]}, "tokens"),
        ("/detokenize", {"tokens": [10**30]}, "tokens[0]"),
        ("/detokenize", {"tokens": [1.5]}, "tokens[0]"),
    ],
)
def test_refusals(server: Server, path: str, fields: dict[str, Any], param: str) -> None:
    reply = post(server, path, **fields)
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, param)


def test_unknown_model(server: Server) -> None:
    for path, fields in (("/tokenize", {"prompt": "a"}), ("/detokenize", {"tokens": [1]})):
        assert post(server, path, model="other", **fields).status_code == 404


def test_tokenizer_info(server: Server) -> None:
    assert httpx2.get(f"{server.url}/tokenizer_info").json() == {
        "bos_token": None,
        "eos_token": "<|im_end|>",
        "pad_token": None,
        "unk_token": None,
        "vocab_size": VOCAB_SIZE,
    }
