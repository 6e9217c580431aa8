"""Constraints over the fake model's vocabulary that need no grammar: what may follow is drawn from a name.

"toy:SEED:LENGTH" allows, at each position of an output of at most LENGTH tokens, one token or some, and now
and then the end. "toy:SEED:LENGTH:append" fails at its third token, "...:mask" has no mask there, "bad" is
none.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from concurrent.futures import Future

from fake_runner import EOS, VOCAB

from gqa_serve.engine.constraints import Constraint, ConstraintError


def allowed(name: str, position: int) -> list[int]:
    """Tokens that may stand at `position` of the output."""
    _, seed, length, *_ = name.split(":")
    if position >= int(length):
        return [EOS]
    source = random.Random(f"{seed}/{position}")
    if source.random() < 0.6:
        return [source.randrange(4, VOCAB)]
    ends = [EOS] if source.random() < 0.4 else []
    return ends + source.sample(range(4, VOCAB), 12)


class ToyConstraint:
    """One output's position; `service.forcing` says whether tokens without alternative are named."""

    def __init__(self, name: str, service: ToyService) -> None:
        self.name = name
        self.service = service
        self.position = 0
        self.ended = False
        self.prepared: bytes | None = None
        self.error: str | None = None

    @property
    def finished(self) -> bool:
        return self.ended or allowed(self.name, self.position) == [EOS]

    def append(self, tokens: Sequence[int]) -> None:
        for token in tokens:
            assert not self.ended, "a token after the end"
            if token not in allowed(self.name, self.position):
                raise AssertionError(f"token {token} may not be at {self.position}")
            self.ended = token == EOS
            self.position += 1
            self.prepared = None
            if self.position == 3 and self.name.endswith(":append"):
                raise ConstraintError("append failed")

    def forced(self) -> list[int]:
        tokens = []
        while self.service.forcing:
            (token, *others) = allowed(self.name, self.position + len(tokens))
            if others or token == EOS:
                break
            tokens.append(token)
        return tokens

    def mask(self) -> bytes:
        assert self.prepared is not None, "no mask was asked for"
        return self.prepared

    def has_mask(self, timeout_s: float) -> bool:
        assert self.prepared is not None, "no mask was asked for"
        self.service.num_asked += 1
        return self.name not in self.service.late

    def prepare(self, avoid_end: bool) -> None:
        assert self.prepared is None, "asked for twice"
        tokens = allowed(self.name, self.position)
        if avoid_end and len(tokens) > 1:
            tokens = [token for token in tokens if token != EOS]
        if self.position >= 3 and self.name.endswith(":mask"):
            tokens, self.error = [], "mask failed"
        bits = sum(1 << token for token in tokens)
        self.prepared = bits.to_bytes(-(-VOCAB // 8), "little")


class ToyService:
    """Constraints that come at once, or with `patient` when `release` is called."""

    def __init__(self, *, forcing: bool = True, patient: bool = False) -> None:
        self.forcing = forcing
        self.patient = patient
        self.late: set[str] = set()  # whose masks are not there yet
        self.num_asked = 0
        self.held: list[tuple[Future[Constraint], str]] = []

    def begin(self, grammar: str) -> Future[Constraint]:
        self.held.append((Future(), grammar))
        future = self.held[-1][0]
        if not self.patient:
            self.release()
        return future

    def release(self, count: int | None = None) -> None:
        """Make the first `count` constraints that were asked for, or all."""
        for future, name in self.held[:count]:
            if future.cancelled():
                continue
            if name == "bad":
                future.set_exception(ConstraintError("bad grammar"))
            else:
                future.set_result(ToyConstraint(name, self))
        del self.held[:count]

    def prepare(self, constraints: Sequence[tuple[Constraint, bool]]) -> None:
        for constraint, avoid_end in constraints:
            assert isinstance(constraint, ToyConstraint)
            constraint.prepare(avoid_end)
