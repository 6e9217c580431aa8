"""A request's view of the block pool: look up, extend, publish, release.

Owns, per request, the list of its blocks in order of position and how many of them are indexed for
reuse. Knows nothing of scheduling. Invariant: a request's blocks cover its computed tokens, and only
blocks whose every token is computed are published.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from gqa_serve.engine.block_pool import BlockPool, Chain


@dataclass
class _Held:
    """Blocks of one request; the first `num_published` are indexed, `chain` continues after them.
    `chain` None: nothing of this request may be shared."""

    chain: Chain | None
    block_ids: list[int] = field(default_factory=list)
    num_published: int = 0


class KVManager:
    """Blocks by request id."""

    def __init__(self, pool: BlockPool) -> None:
        self.pool = pool
        self._held: dict[str, _Held] = {}

    def blocks_for(self, num_tokens: int) -> int:
        """How many blocks `num_tokens` tokens take."""
        return -(-num_tokens // self.pool.block_size)

    def block_ids(self, request_id: str) -> list[int]:
        """The request's blocks in order of position."""
        return self._held[request_id].block_ids

    def num_published_tokens(self, request_id: str) -> int:
        """How many tokens from its beginning are indexed for others; 0 for a request that holds nothing."""
        held = self._held.get(request_id)
        return 0 if held is None else held.num_published * self.pool.block_size

    def start(self, request_id: str, tokens: Sequence[int], salt: Chain | None, reuse: bool) -> int:
        """Begin a request, referencing cached blocks that hold the beginning of `tokens`.

        At least one token is left to compute, since its logits are needed. `salt` None shares nothing;
        `reuse` False looks nothing up but lets others reuse. Returns the number of tokens found.
        """
        held = self._held[request_id] = _Held(salt)
        size = self.pool.block_size
        while reuse and held.chain is not None:
            begin = held.num_published * size
            if begin + size >= len(tokens):
                break
            entry = self.pool.lookup(held.chain, tokens[begin : begin + size])
            if entry is None:
                break
            self.pool.acquire(entry.block_id)
            held.block_ids.append(entry.block_id)
            held.chain = entry.serial
            held.num_published += 1
        return held.num_published * size

    def extend(self, request_id: str, num_tokens: int) -> bool:
        """Make the request's blocks cover `num_tokens`; False, changing nothing, if too few are free."""
        block_ids = self._held[request_id].block_ids
        missing = self.blocks_for(num_tokens) - len(block_ids)
        if missing <= 0:  # nearly always, while a request decodes
            return True
        if missing > self.pool.num_free:
            return False
        block_ids += self.pool.allocate(missing)
        return True

    def publish(self, request_id: str, tokens: Sequence[int], num_computed_tokens: int) -> None:
        """Index the blocks that the first `num_computed_tokens` of `tokens` fill."""
        held = self._held[request_id]
        if held.chain is None:
            return
        size = self.pool.block_size
        while (held.num_published + 1) * size <= num_computed_tokens:
            begin = held.num_published * size
            block_id = held.block_ids[held.num_published]
            held.chain = self.pool.publish(block_id, held.chain, tokens[begin : begin + size]).serial
            held.num_published += 1

    def release(self, request_id: str) -> None:
        """Drop the request's references. Does nothing for a request that holds none."""
        held = self._held.pop(request_id, None)
        if held is not None:
            self.pool.release(held.block_ids)
