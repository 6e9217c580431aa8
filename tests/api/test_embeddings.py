"""/v1/embeddings through the real client and raw: forms of input and answer, refusals, failures, limits."""

from __future__ import annotations

import base64
import math
from collections.abc import Iterator
from typing import Any

import httpx2
import numpy as np
import openai
import pytest
from fake_engine import HIDDEN_SIZE, MAX_MODEL_LEN, MODEL, FakeEngine, Script, Server, fake_info, serving

from gqa_serve.errors import QueueFullError


def unit(*numbers: float) -> list[float]:
    length = math.sqrt(sum(number * number for number in numbers))
    return [number / length for number in numbers]


@pytest.fixture(scope="module")
def mean_server() -> Iterator[Server]:
    with serving(FakeEngine(), pooling="mean") as running:
        yield running


def post(server: Server, **fields: Any) -> httpx2.Response:
    return server.post("/v1/embeddings", {"input": "ab", **fields})


@pytest.mark.parametrize(
    ("given", "ids"),
    [
        ("ab", [[97, 98]]),
        (["ab", "c"], [[97, 98], [99]]),
        ([97, 98], [[97, 98]]),
        ([[97], [98, 99]], [[97], [98, 99]]),
    ],
)
def test_input_forms(client: openai.OpenAI, engine: FakeEngine, given: Any, ids: list[list[int]]) -> None:
    answer = client.embeddings.create(model=MODEL, input=given)  # the client asks for base64 and decodes it
    assert [request.prompt for request in engine.requests] == ids
    assert {request.params.max_tokens for request in engine.requests} == {0}
    assert {request.pooling for request in engine.requests} == {"last"}
    assert [item.index for item in answer.data] == list(range(len(ids)))
    for item, prompt in zip(answer.data, ids, strict=True):
        assert item.embedding == pytest.approx(unit(prompt[-1], 1, 0, -2))
    count = sum(map(len, ids))
    assert (answer.object, answer.model) == ("list", MODEL)
    assert (answer.usage.prompt_tokens, answer.usage.total_tokens) == (count, count)
    assert engine.ends() == ["length"] * len(ids)


def test_both_encodings_are_the_same_numbers(server: Server) -> None:
    plain = post(server, encoding_format="float").json()["data"][0]
    default = post(server).json()["data"][0]
    coded = post(server, encoding_format="base64").json()["data"][0]
    assert plain == default
    assert plain["object"] == "embedding"
    values = np.frombuffer(base64.b64decode(coded["embedding"]), "<f4")
    assert values.tolist() == plain["embedding"]
    assert len(values) == HIDDEN_SIZE


def test_dimensions_cut_before_the_length_is_made_one(client: openai.OpenAI) -> None:
    answer = client.embeddings.create(model=MODEL, input="ab", dimensions=2)
    assert answer.data[0].embedding == pytest.approx(unit(98, 1))


def test_pooling_is_the_request_s_or_the_server_s(server: Server, mean_server: Server) -> None:
    post(server, pooling="mean")
    post(mean_server)
    post(mean_server, pooling="last")
    assert [request.pooling for request in server.engine.requests] == ["mean"]
    assert [request.pooling for request in mean_server.engine.requests] == ["mean", "last"]


def test_fields_reach_the_engine(server: Server, engine: FakeEngine) -> None:
    reply = post(
        server,
        priority=3,
        cache_salt="s",
        truncate_prompt_tokens=2,
        input=["abcd", "e"],
        user="u",
        model="alias",
        add_special_tokens=False,
    )
    assert reply.status_code == 200
    assert reply.json()["model"] == "alias"
    assert reply.json()["usage"]["prompt_tokens"] == 3
    assert [(r.prompt, r.priority, r.cache_salt) for r in engine.requests] == [
        ([99, 100], 3, "s"),
        ([101], 3, "s"),
    ]


def test_a_whole_context_may_be_embedded(server: Server, engine: FakeEngine) -> None:
    assert post(server, input=[1] * MAX_MODEL_LEN).status_code == 200
    assert post(server, input=[1] * (MAX_MODEL_LEN + 5), truncate_prompt_tokens=-1).status_code == 200
    assert [len(request.prompt) for request in engine.requests] == [MAX_MODEL_LEN, MAX_MODEL_LEN]


def test_a_longer_input_is_not_told_of_tokens_to_generate(server: Server) -> None:
    error = post(server, input=[1] * (MAX_MODEL_LEN + 1)).json()["error"]
    assert error["code"] == "context_length_exceeded"
    assert "generate" not in error["message"]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": None}, "input"),
        ({"input": ""}, "input"),
        ({"input": []}, "input"),
        ({"input": ["a", ""]}, "input[1]"),
        ({"input": [[1], []]}, "input[1]"),
        ({"input": ["a", [1]]}, "input"),
        ({"input": [258]}, "input"),
        ({"input": ["x"] * 1025}, "input"),
        ({"input": [[1], [1] * (MAX_MODEL_LEN + 1)]}, "input[1]"),
        ({"input": {"text": "a"}}, "input"),
        ({"encoding_format": "int8"}, "encoding_format"),
        ({"dimensions": 0}, "dimensions"),
        ({"dimensions": HIDDEN_SIZE + 1}, "dimensions"),
        ({"dimensions": "2"}, "dimensions"),
        ({"pooling": "max"}, "pooling"),
        ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
        ({"normalize": False}, "normalize"),
        ({"messages": [{"role": "user", "content": "a"}]}, "messages"),
        ({"embed_dtype": "float16"}, "embed_dtype"),
    ],
)
def test_refusals(server: Server, engine: FakeEngine, fields: dict[str, Any], param: str) -> None:
    reply = post(server, **fields)
    assert reply.status_code == 400
    assert reply.json()["error"]["param"] == param
    assert engine.requests == []


def test_what_asks_for_nothing_else_is_fine(server: Server) -> None:
    nulls = ("model", "encoding_format", "dimensions", "pooling", "user", "priority", "cache_salt")
    assert post(server, normalize=True, endianness="little", **dict.fromkeys(nulls)).status_code == 200


def test_more_inputs_than_the_server_could_ever_hold(server: Server, engine: FakeEngine) -> None:
    engine.model_info = fake_info(max_num_seqs=1, max_waiting=1)
    assert post(server, input=["a", "b"]).status_code == 200
    reply = post(server, input=["a", "b", "c"])
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, "input")
    assert reply.json()["error"]["message"].startswith("3 inputs is more than the 2 ")


def test_more_inputs_than_the_server_holds_now(server: Server, engine: FakeEngine) -> None:
    engine.capacity = 2
    reply = post(server, input=["a", "b", "c"])
    assert reply.status_code == QueueFullError("").status == 429
    assert engine.ends() == []  # all or none


def test_an_engine_that_fails(server: Server, engine: FakeEngine) -> None:
    engine.script = lambda request: Script(finish="error", error="It broke.")
    reply = post(server, input=["a", "b"])
    assert reply.status_code == 500
    assert reply.json()["error"]["message"] == "It broke."
