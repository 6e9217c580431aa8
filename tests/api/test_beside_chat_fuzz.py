"""Whatever comes to /v1/responses and /v1/messages: 2xx or 4xx in the endpoint's shape, never a 5xx."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx2
import pytest
from fake_engine import FakeEngine, Server, wait_until
from hypothesis import given
from hypothesis import strategies as st
from test_api_fuzz import relaxed, values
from tool_model import tool_server

from gqa_serve.api.anthropic.protocol import Block, MessagesRequest
from gqa_serve.api.responses.protocol import InputItem, ResponsesRequest

TYPES = ["message", "function_call", "function_call_output", "reasoning", "item_reference", "web_search_call"]
BLOCKS = ["text", "thinking", "tool_use", "tool_result", "image", "redacted_thinking"]
texts = st.text(max_size=10)
ids = st.sampled_from(["a", "b", ""])


def structs(fields: dict[str, st.SearchStrategy[Any]], names: tuple[str, ...]) -> st.SearchStrategy[Any]:
    """Objects with a type and some of these fields."""
    optional = {name: fields.get(name, texts) for name in names}
    return st.fixed_dictionaries({"type": optional.pop("type")}, optional=optional)


parts = st.fixed_dictionaries(
    {"type": st.sampled_from(["input_text", "output_text", "refusal"]), "text": texts}
)
items = structs(
    {
        "type": st.sampled_from(TYPES),
        "role": st.sampled_from(["user", "assistant", "system", "developer"]),
        "content": texts | st.lists(parts, max_size=2),
        "output": texts | st.lists(parts, max_size=2),
        "summary": st.lists(parts, max_size=2),
        "call_id": ids,
    },
    InputItem.__struct_fields__,
)
blocks = structs(
    {
        "type": st.sampled_from(BLOCKS),
        "input": st.dictionaries(texts, values, max_size=2),
        "id": ids,
        "tool_use_id": ids,
        "is_error": st.booleans(),
    },
    Block.__struct_fields__,
)
tools = st.lists(
    st.fixed_dictionaries(
        {},
        optional={
            "type": st.sampled_from(["function", "custom", "web_search"]),
            "name": st.sampled_from(["f", "g"]) | texts,
            "parameters": st.just({"type": "object"}) | values,
            "input_schema": st.just({"type": "object"}) | values,
            "strict": st.booleans(),
        },
    ),
    max_size=2,
)
named = st.fixed_dictionaries(
    {"type": st.sampled_from(["auto", "any", "tool", "function", "none"])}, optional={"name": st.just("f")}
)
BODIES = {
    "/v1/responses": st.fixed_dictionaries(
        {"input": texts | st.lists(items, max_size=4)},
        optional={
            "tools": tools,
            "tool_choice": st.sampled_from(["auto", "none", "required"]) | named,
            "truncation": st.just("auto"),
            "stream": st.booleans(),
        },
    ),
    "/v1/messages": st.fixed_dictionaries(
        {
            "max_tokens": st.integers(1, 50),
            "messages": st.lists(
                st.fixed_dictionaries(
                    {
                        "role": st.sampled_from(["user", "assistant", "system"]),
                        "content": texts | st.lists(blocks, max_size=3),
                    }
                ),
                min_size=1,
                max_size=3,
            ),
        },
        optional={"tools": tools, "tool_choice": named, "stream": st.booleans()},
    ),
}


@pytest.fixture(scope="module")
def shared_server() -> Iterator[Server]:
    with tool_server() as running:
        yield running


@pytest.fixture(scope="module")
def http() -> Iterator[httpx2.Client]:
    with httpx2.Client(timeout=20) as client:
        yield client


def check(http: httpx2.Client, server: Server, path: str, body: bytes) -> int:
    """The status, if the answer has the endpoint's shape."""
    reply = http.post(server.url + path, content=body)
    if reply.headers["content-type"].startswith("text/event-stream"):
        events = [json.loads(line[6:]) for line in reply.text.splitlines() if line.startswith("data: ")]
        assert events[-1]["type"] in ("message_stop", "response.completed", "response.incomplete")
        return 200
    decoded = json.loads(reply.content, parse_constant=lambda name: pytest.fail(f"{name} in JSON"))
    if reply.status_code == 200:
        assert decoded["id"].startswith(("resp_", "msg_")) if "id" in decoded else decoded["input_tokens"]
    else:
        assert reply.status_code in (400, 404), reply.text
        keys = {"message", "type"} if "messages" in path else {"message", "type", "param", "code"}
        assert set(decoded["error"]) == keys
        assert len(reply.content) < 4096
    return reply.status_code


@relaxed
@given(data=st.data(), path=st.sampled_from(sorted(BODIES)), counting=st.booleans())
def test_bodies_of_the_right_types(
    http: httpx2.Client, server: Server, engine: FakeEngine, data: st.DataObject, path: str, counting: bool
) -> None:
    body = data.draw(BODIES[path])
    if counting and path == "/v1/messages":
        path += "/count_tokens"
    check(http, server, path, json.dumps(body).encode("utf-8", "surrogatepass"))
    wait_until(lambda: engine.num_running == 0)


@relaxed
@given(data=st.data(), path=st.sampled_from(sorted(BODIES)), value=values)
def test_one_odd_field(
    http: httpx2.Client, server: Server, data: st.DataObject, path: str, value: Any
) -> None:
    fields = ResponsesRequest if path == "/v1/responses" else MessagesRequest
    name = data.draw(st.sampled_from(sorted(fields.__struct_fields__)))
    good = {"input": "Hi"} if path == "/v1/responses" else {"messages": [{"role": "user", "content": "Hi"}]}
    needed = {} if path == "/v1/responses" else {"max_tokens": 5}
    check(http, server, path, json.dumps({**good, **needed, name: value}).encode("utf-8", "surrogatepass"))


@relaxed
@given(path=st.sampled_from(sorted(BODIES)), body=st.binary(max_size=40))
def test_any_bytes(http: httpx2.Client, server: Server, path: str, body: bytes) -> None:
    assert check(http, server, path, body) == 400
