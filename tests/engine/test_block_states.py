"""`BlockPool.states` says of each block what the pool knows of it."""

from __future__ import annotations

from gqa_serve.engine.block_pool import BlockPool
from gqa_serve.engine.metrics import BlockState


def test_states_of_blocks() -> None:
    pool = BlockPool(6, 2)
    assert pool.states() == bytes(6)
    first, second, third = pool.allocate(3)
    for _ in range(3):
        pool.acquire(second)
    pool.publish(third, "", (1, 2))
    pool.release([third])
    states = pool.states()
    assert states[first] == BlockState.ACTIVE
    assert states[second] == BlockState.SHARED
    assert states[third] == BlockState.CACHED
    assert states.count(BlockState.FREE) == 3
    pool.acquire(third)
    assert pool.states()[third] == BlockState.ACTIVE, "in use, and its content can be found as well"
