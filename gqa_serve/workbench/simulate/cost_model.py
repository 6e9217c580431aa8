"""What the twin asks of a cost model: how long a step takes.

Owns the protocol. `roofline.py` answers from data sheets, `fitted.py` from measurements. Knows no scheduler.
Invariant: seconds depend on the step's work alone, so that the same traffic gives the same virtual time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

Chunk = tuple[int, int]
"""(query_len, context_len) of a request that computes several tokens, the new ones included."""


class CostModel(Protocol):
    """Seconds of a step."""

    @property
    def request_s(self) -> float:
        """From sending a request to its arrival at the engine."""

    def step_seconds(self, contexts: Sequence[int], chunks: Sequence[Chunk], num_sampled: int) -> float:
        """A step of one token for each of `contexts` (tokens of each, the new one included), and `chunks`."""

    def decode_seconds(self, contexts: Sequence[int], num_steps: int) -> list[float]:
        """`num_steps` steps in a row that compute one token for each of `contexts`, which grow by one each.

        Exactly what `step_seconds` says of each of them, every row sampling.
        """

    def to_json(self) -> dict[str, Any]:
        """What it is, for reports and files."""


def visible_pairs(query_len: int, context_len: int, window: int | None = None) -> int:
    """How many (query, key) pairs causal attention computes for the last `query_len` of `context_len` tokens.

    Each new token sees those before it and itself, at most `window` of them.
    """
    computed = context_len - query_len
    if window is None:
        return query_len * (computed + 1 + context_len) // 2
    growing = max(0, min(context_len, window) - computed)  # tokens that see everything before them
    return growing * (2 * computed + 1 + growing) // 2 + (query_len - growing) * window
