"""What the engine counts and shows of itself: numbers of each step, and a picture of the moment.

Owns the two messages and nothing else: `stock.py` fills them in, the API process renders them. Knows no
Prometheus and no text. Invariant: counts of a `StepStats` are differences, so that adding them up stays right
when the engine process is replaced by a new one.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import msgspec


class StepStats(msgspec.Struct, array_like=True):
    """One call of `Engine.step`: what it did, and how things stood afterwards.

    A step computes prompts (`num_prompt_tokens`), continues answers (`num_decode_tokens`), or both. Where
    the device works on its own (`Runner.lookahead`), `forward_s` is the time to launch it and `sample_s` the
    time to wait for it.
    """

    num_running: int = 0
    num_waiting: int = 0
    num_waiting_tokens: int = 0
    """Prompt tokens of the requests that wait."""
    num_free_blocks: int = 0
    """Blocks nobody references, those with reusable content included."""
    num_cached_blocks: int = 0
    """Those among the free ones that hold reusable content."""

    num_requests: int = 0
    """Rows of the plan; 0 if nothing was computed."""
    num_prompt_tokens: int = 0
    num_decode_tokens: int = 0
    num_queried_tokens: int = 0
    """Prompt tokens looked up in the prefix cache, and those found there."""
    num_hit_tokens: int = 0
    num_preemptions: int = 0
    num_discarded_tokens: int = 0
    """Tokens chosen for requests that had ended by the time the step was collected."""
    num_failed_steps: int = 0
    num_shrunk: int = 0
    """How often memory ran out while a plan was computed, which was then cut up."""

    schedule_s: float = 0.0
    forward_s: float = 0.0
    sample_s: float = 0.0
    step_s: float = 0.0
    """The whole call, what is named above included."""

    @contextmanager
    def timing(self, field: str) -> Iterator[None]:
        """Add what the block takes to the seconds in `field`."""
        began = time.perf_counter()
        try:
            yield
        finally:
            setattr(self, field, getattr(self, field) + time.perf_counter() - began)

    @property
    def phase(self) -> Literal["idle", "prefill", "decode", "mixed"]:
        """What kind of tokens the step computed."""
        if not self.num_requests:
            return "idle"
        if not self.num_decode_tokens:
            return "prefill"
        return "mixed" if self.num_prompt_tokens else "decode"


RequestState = Literal["waiting", "running", "preparing"]
"""`preparing`: its grammar is being compiled."""


class RequestSnapshot(msgspec.Struct):
    """One request that has not ended. `age_s` counts from its arrival at the engine."""

    request_id: str
    state: RequestState
    age_s: float
    num_prompt_tokens: int
    num_output_tokens: int
    num_computed_tokens: int
    num_cached_tokens: int
    num_blocks: int
    priority: int = 0
    replica: int = 0
    """Which of several engines holds it; `EngineReplicas` fills it in."""


class BlockState:
    """What a byte of `EngineSnapshot.blocks` says of its block."""

    FREE = 0
    CACHED = 1
    """Free, with content that a prompt may find again."""
    ACTIVE = 2
    SHARED = 3
    """Referenced by more than one request."""


class EngineSnapshot(msgspec.Struct):
    """The engine at one moment: every block (one byte each, `BlockState`) and every request, in order."""

    blocks: bytes
    requests: list[RequestSnapshot]
