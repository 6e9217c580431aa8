"""Which replica gets a request: the policies of `--routing`.

Owns the choice. Knows no replica, only how many requests each holds at that moment and where a conversation
was before. Deterministic: no random numbers, ties go to the next replica in turn.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from typing import Protocol

from gqa_serve.errors import ConfigError
from gqa_serve.workbench.simulate.jobs import Job

POLICIES = ("round-robin", "least-loaded", "prefix-affinity")
BOUND = 1.25
"""No replica gets a request of prefix-affinity that makes it hold more than so many times the mean."""


class Routing(Protocol):
    """One policy over a fleet."""

    def choose(self, job: Job, loads: Sequence[int]) -> int:
        """The replica for a job; `loads`: requests that each holds."""


class RoundRobin:
    """One after the other, in order of arrival."""

    def __init__(self) -> None:
        self._next = 0

    def choose(self, job: Job, loads: Sequence[int]) -> int:
        chosen = self._next % len(loads)
        self._next = chosen + 1
        return chosen


class LeastLoaded:
    """Whoever holds the fewest requests."""

    def __init__(self) -> None:
        self._next = 0

    def choose(self, job: Job, loads: Sequence[int]) -> int:
        fewest = min(loads)
        start = self._next % len(loads)
        try:
            chosen = loads.index(fewest, start)
        except ValueError:
            chosen = loads.index(fewest)
        self._next = chosen + 1
        return chosen


class PrefixAffinity:
    """Where the prefix probably is cached, unless that replica holds too much.

    A later turn goes where the turn before it went; a shared prefix has a home, found by hashing its name.
    Where the choice would hold more than BOUND times the mean, the next replica in turn gets it: consistent
    hashing with bounded loads (Mirrokni, Thorup and Zadimoghaddam 2018, https://arxiv.org/abs/1608.01350).
    What shares nothing goes to the least loaded.
    """

    def __init__(self) -> None:
        self._least_loaded = LeastLoaded()
        self._homes: dict[str, int] = {}

    def choose(self, job: Job, loads: Sequence[int]) -> int:
        request = job.request
        key = request.conversation or ""
        if request.turn and key in self._homes:
            home = self._homes[key]
        elif request.prefix is not None and request.prefix_tokens:
            home = zlib.crc32(request.prefix.encode()) % len(loads)
        else:
            home = self._least_loaded.choose(job, loads)
        most = math.ceil(BOUND * (sum(loads) + 1) / len(loads))
        while loads[home] >= most:  # the least loaded holds at most the mean, so that this ends
            home = (home + 1) % len(loads)
        if request.conversation is not None:
            self._homes[key] = home
        return home


def make_routing(policy: str) -> Routing:
    """A policy by its name."""
    kinds: dict[str, type[RoundRobin] | type[LeastLoaded] | type[PrefixAffinity]] = {
        "round-robin": RoundRobin,
        "least-loaded": LeastLoaded,
        "prefix-affinity": PrefixAffinity,
    }
    if policy not in kinds:
        raise ConfigError(f"--routing must be one of {', '.join(POLICIES)}; got {policy!r}.")
    return kinds[policy]()
