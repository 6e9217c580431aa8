"""What the engine knows of constrained output: which tokens may come next, and which must.

Owns the seam between the scheduler's world, which sees ids and masks, and whatever makes them from a grammar
(`structured.py`). Knows no grammar, no text, no torch. Invariant: masks and forced tokens agree, so that a
request's tokens are the same whether its forced ones are appended or sampled one by one.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from typing import Protocol


class ConstraintError(Exception):
    """A constraint that cannot be made, or cannot go on; the message is for the client.

    `is_ours`: not the grammar is to blame, but the machine or this program.
    """

    def __init__(self, message: str, *, is_ours: bool = False) -> None:
        super().__init__(message)
        self.is_ours = is_ours


class Constraint(Protocol):
    """The state of one request's output."""

    @property
    def finished(self) -> bool:
        """Whether nothing but the end of the sequence may follow."""

    def append(self, tokens: Sequence[int]) -> None:
        """`tokens` were added to the output. Raises ConstraintError if they may not be there."""

    def forced(self) -> list[int]:
        """Tokens that must come next: what sampling them one by one under the masks would give.

        Raises ConstraintError.
        """

    def mask(self) -> bytes:
        """Which tokens may come next: bit i % 8 of byte i // 8, there being none beyond the last byte.

        Waits for it; it is nothing but zeros after a failure, of which `error` tells. Needs a `prepare` since
        the last `append`.
        """

    def has_mask(self, timeout_s: float) -> bool:
        """Whether `mask` returns at once; waits that long for it."""

    @property
    def error(self) -> str | None:
        """Why no mask could be computed."""


class ConstraintService(Protocol):
    """Where constraints come from. No call but `Constraint.mask` and `has_mask` waits for anything."""

    def begin(self, grammar: str) -> Future[Constraint]:
        """A constraint at the beginning of an output; the future raises ConstraintError."""

    def prepare(self, constraints: Sequence[tuple[Constraint, bool]]) -> None:
        """Compute their masks meanwhile; with True, the sequence may end only where nothing else is left."""
