"""Responses that later requests may continue or read: a bounded store in this process's memory.

Owns which responses are still known and how much memory they take. Knows items only as values to hand back.
Each response keeps the one it continues alive, so a conversation goes on when its earlier responses were
deleted or pushed out. Invariant: `num_bytes` counts every response that is reachable, once, and the ids that
can be looked up are at most `max_responses`.
"""

from __future__ import annotations

import collections
import dataclasses

from gqa_serve.api.errors import shorten
from gqa_serve.api.responses.protocol import Item
from gqa_serve.errors import NotFoundError, RequestError

MAX_STORED_BYTES = 256 * 2**20


@dataclasses.dataclass(eq=False, slots=True)
class StoredResponse:
    """One response: as it was answered, with the request's own items and what it continues."""

    id: str
    body: bytes
    input: list[Item]
    output: list[Item]
    previous: StoredResponse | None
    num_bytes: int
    num_holders: int = 0
    """The store's index, if it has this response, and the responses that continue it."""

    def inputs(self) -> list[Item]:
        """All items that this response answered, oldest first."""
        before = [] if self.previous is None else self.previous.history()
        return before + self.input

    def history(self) -> list[Item]:
        """All items of the conversation up to and including this response's output, oldest first."""
        chain: list[StoredResponse] = []
        response: StoredResponse | None = self
        while response is not None:
            chain.append(response)
            response = response.previous
        return [item for link in reversed(chain) for item in [*link.input, *link.output]]

    def chain_bytes(self) -> int:
        """About the size of `history()`."""
        total, response = 0, self.previous
        while response is not None:
            total, response = total + response.num_bytes, response.previous
        return total + self.num_bytes


class ResponseStore:
    """The least recently used response goes first, when there are too many or they are too large."""

    def __init__(self, max_responses: int, max_bytes: int = MAX_STORED_BYTES) -> None:
        self.max_responses = max_responses
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self._index: collections.OrderedDict[str, StoredResponse] = collections.OrderedDict()

    def __len__(self) -> int:
        return len(self._index)

    @property
    def enabled(self) -> bool:
        """Whether anything is stored at all."""
        return self.max_responses > 0

    def put(self, response: StoredResponse) -> None:
        """Keep a response, and everything it continues."""
        self._index[response.id] = response
        self._hold(response)
        while len(self._index) > self.max_responses or (self.num_bytes > self.max_bytes and self._index):
            _, oldest = self._index.popitem(last=False)
            self._release(oldest)

    def get(self, id: str, *, param: str | None = None) -> StoredResponse:
        """The response. Raises NotFoundError, or RequestError (400) where none is ever stored."""
        response = self._index.get(id)
        if response is None:
            raise self._missing(f"There is no response {shorten(id)!r}", param, "response_not_found")
        self._index.move_to_end(id)
        return response

    def delete(self, id: str) -> None:
        """Forget the response under its id; those that continue it go on. Raises as `get` does."""
        self._release(self.get(id))
        del self._index[id]

    def items(self) -> dict[str, Item]:
        """Every item of every response that can be looked up, by id."""
        return {
            item.id: item for response in self._index.values() for item in [*response.input, *response.output]
        }

    def missing_item(self, id: str, param: str) -> RequestError:
        """The error for a reference to an item that is not known."""
        return self._missing(f"There is no item {shorten(id)!r}", param, "item_not_found")

    def _missing(self, what: str, param: str | None, code: str) -> RequestError:
        if not self.enabled:
            return RequestError(
                "This server stores no responses (--max-stored-responses 0). Send the whole conversation as "
                "input instead.",
                param=param,
                code="store_disabled",
            )
        return NotFoundError(
            f"{what}: responses are kept in this server's memory only, the last {self.max_responses} of them "
            f"(at most {self.max_bytes // 2**20} MiB), and those sent with store: false not at all. Send the "
            "whole conversation as input instead.",
            param=param,
            code=code,
        )

    def _hold(self, response: StoredResponse | None) -> None:
        while response is not None:
            response.num_holders += 1
            if response.num_holders > 1:
                return
            self.num_bytes += response.num_bytes
            response = response.previous

    def _release(self, response: StoredResponse | None) -> None:
        while response is not None:
            response.num_holders -= 1
            if response.num_holders > 0:
                return
            self.num_bytes -= response.num_bytes
            response = response.previous
