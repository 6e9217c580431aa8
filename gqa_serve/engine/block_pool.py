"""Physical KV blocks: who references them, which hold reusable content, which may be handed out.

Owns block ids, reference counts and the prefix cache's index. Knows nothing of requests or tensors.

A full block is indexed by (chain, its tokens), where `chain` stands for everything before it: the serial
number of the previous block's entry, or the cache's salt for a first block. Looking a block up therefore
compares token ids themselves, never only hashes of them. A free block keeps its content and its entry
until it is allocated anew, least recently freed first; then the entry goes before the block is handed out.

Invariants: every block is either free or referenced; free + referenced == total. An entry's block holds
exactly the tokens of the entry.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

from gqa_serve.engine.metrics import BlockState
from gqa_serve.errors import CacheCapacityError

Chain = int | str
"""What precedes a block: an entry's serial number, or the salt that starts a chain."""

_Key = tuple[Chain, tuple[int, ...]]

_BY_REFERENCES = bytes([BlockState.FREE, BlockState.ACTIVE, BlockState.SHARED]).ljust(256, b"\0")


class Entry(NamedTuple):
    """A block whose content can be reused, and the serial number that continues its chain."""

    block_id: int
    serial: int


class _FreeBlocks:
    """Free blocks in the order in which they are handed out: those never used, by their ids, then the least
    recently freed. Of the former only a count is kept, so that a fleet of large pools can be simulated."""

    def __init__(self, num_blocks: int) -> None:
        self._num_blocks = num_blocks
        self._num_used = 0  # ids below have been handed out before
        self._freed: OrderedDict[int, None] = OrderedDict()

    def __len__(self) -> int:
        return self._num_blocks - self._num_used + len(self._freed)

    def __contains__(self, block_id: int) -> bool:
        return block_id >= self._num_used or block_id in self._freed

    def take_next(self) -> int:
        """Take the next out; there must be one."""
        if self._num_used < self._num_blocks:
            self._num_used += 1
            return self._num_used - 1
        return self._freed.popitem(last=False)[0]

    def take(self, block_id: int) -> None:
        """Take this one out, which has been used and freed."""
        del self._freed[block_id]

    def add(self, block_id: int) -> None:
        """It is free now."""
        self._freed[block_id] = None


class BlockPool:
    """`num_blocks` blocks of `block_size` tokens."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._ref_counts = [0] * num_blocks
        self._free = _FreeBlocks(num_blocks)
        self._entries: dict[_Key, Entry] = {}
        self._key_of_block: dict[int, _Key] = {}
        self._next_serial = 0
        self.num_cached = 0
        """Free blocks that hold reusable content."""

    @property
    def num_free(self) -> int:
        """Blocks nobody references (they may still hold reusable content)."""
        return len(self._free)

    def states(self) -> bytes:
        """One byte for each block: its `BlockState`."""
        # In a few milliseconds for 100,000 blocks: while a dashboard is open, it asks once a second.
        states = bytearray([count if count < 2 else 2 for count in self._ref_counts])
        states = states.translate(_BY_REFERENCES)
        for block_id in self._key_of_block:
            if states[block_id] == BlockState.FREE:
                states[block_id] = BlockState.CACHED
        return bytes(states)

    def allocate(self, count: int) -> list[int]:
        """`count` blocks with one reference each. Raises CacheCapacityError, allocating none, if too few."""
        if count > len(self._free):
            raise CacheCapacityError(f"{count} KV blocks wanted, {len(self._free)} free.")
        blocks = []
        for _ in range(count):
            block_id = self._free.take_next()
            key = self._key_of_block.pop(block_id, None)
            if key is not None:
                del self._entries[key]
                self.num_cached -= 1
            self._ref_counts[block_id] = 1
            blocks.append(block_id)
        return blocks

    def acquire(self, block_id: int) -> None:
        """One more reference to a block found by `lookup`."""
        if self._ref_counts[block_id] == 0:
            self._free.take(block_id)
            self.num_cached -= 1  # only content brings a free block back
        self._ref_counts[block_id] += 1

    def release(self, block_ids: Sequence[int]) -> None:
        """Drop one reference each. The last of a request's blocks is freed first, so that a chain is
        evicted from its end and what many requests share stays longest."""
        for block_id in reversed(block_ids):
            if self._ref_counts[block_id] <= 0:
                raise RuntimeError(f"KV block {block_id} released more often than referenced")
            self._ref_counts[block_id] -= 1
            if self._ref_counts[block_id] == 0:
                self._free.add(block_id)
                self.num_cached += block_id in self._key_of_block

    def lookup(self, chain: Chain, tokens: Sequence[int]) -> Entry | None:
        """The entry of a block holding `tokens` (one full block of them) after `chain`."""
        return self._entries.get((chain, tuple(tokens)))

    def publish(self, block_id: int, chain: Chain, tokens: Sequence[int]) -> Entry:
        """Index a referenced, fully computed block. If equal content is indexed already, that entry stays
        and is returned: its serial continues the chain for both blocks."""
        key = (chain, tuple(tokens))
        entry = self._entries.get(key)
        if entry is None:
            entry = self._entries[key] = Entry(block_id, self._next_serial)
            self._key_of_block[block_id] = key
            self._next_serial += 1
        return entry
