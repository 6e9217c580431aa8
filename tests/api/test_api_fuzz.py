"""Whatever the body: 2xx or 4xx, JSON, errors with all four keys. Never a 5xx, nothing left running."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx2
import pytest
from fake_engine import MODEL, FakeEngine, Server, wait_until
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from gqa_serve.api.params import NO_OPS, FieldRules
from gqa_serve.api.protocol import ChatRequest, CompletionRequest, EmbeddingRequest

PATHS = ("/v1/chat/completions", "/v1/completions")
OTHER_PATHS = ("/v1/embeddings", "/tokenize", "/detokenize")
OTHER_FIELDS = sorted({*EmbeddingRequest.__struct_fields__, "messages", "return_token_strs", "other"})
FIELDS = sorted(
    {
        *ChatRequest.__struct_fields__,
        *CompletionRequest.__struct_fields__,
        *NO_OPS,
        "tools",
        "best_of",
        "suffix",
    }
)

scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.sampled_from([0, 1, -1, 2**31, 2**63, -(2**63) - 1, 10**30]),
    st.floats(),
    st.text(max_size=20),
    st.sampled_from(["user", "assistant", "text", "auto", "<|im_end|>", "\x00", "\ud800", "é\u2028"]),
)
values = st.recursive(
    scalars,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=10), inner, max_size=4)
    ),
    max_leaves=12,
)
parts = st.fixed_dictionaries(
    {"type": st.sampled_from(["text", "image_url", "refusal"])}, optional={"text": values}
)
messages = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["system", "user", "assistant", "tool", "developer"]) | values},
        optional={
            "content": st.text(max_size=20) | st.lists(parts, max_size=3) | values,
            "tool_calls": st.lists(
                st.fixed_dictionaries(
                    {"function": st.fixed_dictionaries({"name": values, "arguments": values})}
                )
            )
            | values,
            "name": values,
            "refusal": values,
        },
    ),
    max_size=3,
)
prompts = (
    st.text(max_size=20)
    | st.lists(st.text(max_size=5), max_size=3)
    | st.lists(st.integers(0, 300), max_size=9)
)
bodies = st.fixed_dictionaries(
    {"messages": messages | values, "prompt": prompts | values, "n": st.none() | st.integers(0, 4) | values},
    optional={name: values for name in FIELDS if name not in ("messages", "prompt", "n", "model")},
)


@pytest.fixture(scope="module")
def http() -> Iterator[httpx2.Client]:
    with httpx2.Client(timeout=20) as client:
        yield client


def check(http: httpx2.Client, server: Server, path: str, body: bytes) -> int:
    reply = http.post(server.url + path, content=body)
    if reply.headers["content-type"].startswith("text/event-stream"):
        assert reply.status_code == 200
        assert reply.text.endswith("data: [DONE]\n\n")
        return 200
    decoded = json.loads(reply.content, parse_constant=lambda name: pytest.fail(f"{name} in JSON"))
    if reply.status_code == 200:
        assert decoded.keys() & {"choices", "data", "tokens", "prompt"}
    else:
        assert reply.status_code in (400, 404), reply.text
        assert set(decoded["error"]) == {"message", "type", "param", "code"}
        assert len(reply.content) < 4096
    return int(reply.status_code)


relaxed = settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@relaxed
@given(path=st.sampled_from(PATHS), body=bodies)
@example(path=PATHS[0], body={"messages": [{"role": "user", "content": "\ud800"}]})
@example(path=PATHS[1], body={"prompt": "a", "stop": ["\ud800"]})
@example(path=PATHS[1], body={"prompt": "a", "temperature": float("nan")})
@example(
    path=PATHS[0], body={"messages": [{"role": "user", "content": "a"}], "chat_template_kwargs": {"self": 1}}
)
@example(
    path=PATHS[0], body={"messages": [{"role": "user", "content": "a"}], "chat_template_kwargs": {"": 1}}
)
def test_any_fields(
    http: httpx2.Client, server: Server, engine: FakeEngine, path: str, body: dict[str, Any]
) -> None:
    check(http, server, path, json.dumps({"model": MODEL, **body}).encode("utf-8", "surrogatepass"))
    wait_until(lambda: engine.num_running == 0)


@relaxed
@given(path=st.sampled_from(PATHS), name=st.sampled_from(FIELDS), value=values)
def test_one_odd_field(http: httpx2.Client, server: Server, path: str, name: str, value: Any) -> None:
    body = {"messages": [{"role": "user", "content": "Hi"}], "prompt": "Hi", name: value}
    check(http, server, path, json.dumps(body).encode())


@relaxed
@given(
    path=st.sampled_from(OTHER_PATHS),
    given=st.lists(st.integers(0, 300), max_size=4) | values,
    name=st.sampled_from(OTHER_FIELDS),
    value=values,
)
def test_endpoints_that_generate_nothing(
    http: httpx2.Client, server: Server, engine: FakeEngine, path: str, given: Any, name: str, value: Any
) -> None:
    field = {"/v1/embeddings": "input", "/tokenize": "prompt", "/detokenize": "tokens"}[path]
    check(http, server, path, json.dumps({field: given, name: value}).encode())
    wait_until(lambda: engine.num_running == 0)


@relaxed
@given(
    path=st.sampled_from(PATHS), body=st.binary(max_size=60) | st.text(max_size=60).map(lambda t: t.encode())
)
def test_any_bytes(http: httpx2.Client, server: Server, path: str, body: bytes) -> None:
    assert check(http, server, path, body) == 400


@relaxed
@given(path=st.sampled_from(PATHS), data=st.data())
def test_damaged_bodies(http: httpx2.Client, server: Server, path: str, data: st.DataObject) -> None:
    body = json.dumps(
        {"messages": [{"role": "user", "content": "H\ud83d\ude00"}], "prompt": [[1], [2]], "n": 2}
    )
    start = data.draw(st.integers(0, len(body)))
    end = data.draw(st.integers(start, len(body)))
    insert = data.draw(
        st.sampled_from(["", "{", "]", '"', "\\", "\\ud800", "NaN", "9" * 5000, "null", "[" * 99])
    )
    check(http, server, path, (body[:start] + insert + body[end:]).encode())


def test_every_field_is_known_or_refused() -> None:
    """The fields of the official client's requests: none may be dropped as unknown."""
    from openai.types import completion_create_params, embedding_create_params
    from openai.types.chat import completion_create_params as chat_params

    for rules, documented in (
        (FieldRules.chat(), chat_params.CompletionCreateParamsBase),
        (FieldRules.completion(), completion_create_params.CompletionCreateParamsBase),
        (FieldRules.embedding(), embedding_create_params.EmbeddingCreateParams),
    ):
        assert {name for name in documented.__annotations__ if not rules.covers(name)} == set()
