"""The store of responses: what goes first, and what a conversation keeps alive."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gqa_serve.api.client_names import ClientNames
from gqa_serve.api.responses.protocol import InputMessage, InputText
from gqa_serve.api.responses.store import ResponseStore, StoredResponse
from gqa_serve.errors import NotFoundError, RequestError


def response(id: str, previous: StoredResponse | None = None, num_bytes: int = 10) -> StoredResponse:
    """A response whose input and output are a message each, named after it."""
    asked = InputMessage(id=f"in_{id}", role="user", content=[InputText(id)])
    said = InputMessage(id=f"out_{id}", role="user", content=[InputText(id)])
    return StoredResponse(id, b"{}", [asked], [said], previous, num_bytes)


def test_the_least_recently_used_goes_first() -> None:
    store = ResponseStore(2)
    store.put(response("a"))
    store.put(response("b"))
    store.get("a")
    store.put(response("c"))
    assert [id for id in "abc" if found(store, id)] == ["a", "c"]
    assert store.num_bytes == 20


def found(store: ResponseStore, id: str) -> bool:
    try:
        store.get(id)
    except NotFoundError:
        return False
    return True


def test_bytes_are_bounded_too() -> None:
    store = ResponseStore(100, max_bytes=25)
    for id in "abcd":
        store.put(response(id))
    assert len(store) == 2
    assert store.num_bytes == 20
    store.put(response("huge", num_bytes=1000))
    assert len(store) == store.num_bytes == 0


def test_a_conversation_outlives_its_beginning() -> None:
    store = ResponseStore(1)
    first = response("a")
    store.put(first)
    second = response("b", first)
    store.put(second)
    assert not found(store, "a")
    assert [item.id for item in store.get("b").history()] == ["in_a", "out_a", "in_b", "out_b"]
    assert [item.id for item in second.inputs()] == ["in_a", "out_a", "in_b"]
    assert store.num_bytes == second.chain_bytes() == 20  # it is still there, and counts
    store.delete("b")
    assert store.num_bytes == 0


def test_errors_say_why() -> None:
    with pytest.raises(NotFoundError, match="the last 7 of them") as missing:
        ResponseStore(7).get("resp_x", param="previous_response_id")
    assert missing.value.param == "previous_response_id"
    with pytest.raises(RequestError, match="--max-stored-responses 0") as disabled:
        ResponseStore(0).get("resp_x")
    assert disabled.value.status == 400


@given(
    st.integers(1, 4),
    st.lists(
        st.tuples(st.sampled_from(["put", "continue", "delete", "get"]), st.integers(0, 9)), max_size=40
    ),
)
def test_what_is_counted_is_what_can_be_reached(limit: int, steps: list[tuple[str, int]]) -> None:
    store = ResponseStore(limit, max_bytes=60)
    known: dict[str, StoredResponse] = {}
    for number, (action, which) in enumerate(steps):
        ids = sorted(id for id in known if found(store, id))
        if action == "put" or not ids:
            known[f"r{number}"] = response(f"r{number}", num_bytes=which)
            store.put(known[f"r{number}"])
            continue
        id = ids[which % len(ids)]
        if action == "continue":
            known[f"r{number}"] = response(f"r{number}", known[id], which)
            store.put(known[f"r{number}"])
        elif action == "delete":
            store.delete(id)
        reachable: set[str] = set()
        for name, link in known.items():
            if found(store, name):
                node: StoredResponse | None = link
                while node is not None:
                    reachable.add(node.id)
                    node = node.previous
        assert store.num_bytes == sum(known[name].num_bytes for name in reachable)
        assert len(store) <= limit
        assert store.num_bytes <= 60


def test_errors_are_told_in_the_clients_words() -> None:
    names = ClientNames({"messages": "input", "messages[1]": "input[4]", "tools[1].function": "tools[3]"})

    def told(param: str | None, message: str) -> tuple[str | None, str]:
        with pytest.raises(RequestError) as caught, names.translating():
            raise RequestError(message, param=param)
        return caught.value.param, caught.value.message

    assert told("messages[1].content", "messages[1].content is bad.") == (
        "input[4].content",
        "input[4].content is bad.",
    )
    assert told("messages[12].content", "Bad.") == ("input[12].content", "Bad.")
    assert told("tools[1].function.parameters.x", "Bad.")[0] == "tools[3].parameters.x"
    assert told("temperature", "Bad.") == ("temperature", "Bad.")
    assert told(None, "Bad.") == (None, "Bad.")
