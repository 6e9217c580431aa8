"""`Affinity`: which replicas have computed a prompt's beginning lately, and where to send the next request.

Owns what is remembered of the requests that were routed here and the order of preference that follows from
it and from load. Knows neither Ray nor HTTP. Invariant: a replica that is busier than the least busy one by
more than `imbalance` requests is never preferred, however much of the prompt it has in its cache.

    keys of the new prompt     a b c d e
    remembered                 a: {1, 2}  b: {1, 2}  c: {2}      ->  2, if it is not too busy; else 1
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Collection, Mapping, Sequence

_MAX_KEYS = 200_000  # some 30 MB


class Affinity:
    """The memory of one router. Replicas go by their names."""

    def __init__(self, imbalance: int, max_keys: int = _MAX_KEYS) -> None:
        self._imbalance = imbalance
        self._max_keys = max_keys
        self._seen: OrderedDict[bytes, set[str]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._seen)

    def ranked(self, keys: Sequence[bytes], loads: Mapping[str, int]) -> list[list[str]]:
        """The replicas of `loads` (requests under way) in ranks, the most preferred first."""
        if not loads:
            return []
        least = min(loads.values())
        near = [name for name, load in loads.items() if load - least <= self._imbalance]
        far = [name for name in loads if name not in near]
        holders = self._holders(keys, near)
        if holders:
            ranks = [holders, [name for name in near if name not in holders], far]
        else:
            ranks = [[_first_choice(keys, [name for name in near if loads[name] == least])], near, far]
        return [sorted(rank, key=loads.__getitem__) for rank in ranks if rank]

    def _holders(self, keys: Sequence[bytes], among: Collection[str]) -> list[str]:
        """Those that have computed the longest beginning that any of them has."""
        for key in reversed(keys):
            if found := [name for name in among if name in self._seen.get(key, ())]:
                return found
        return []

    def sent(self, keys: Sequence[bytes], name: str) -> None:
        """A prompt with these keys went to this replica."""
        for key in keys:
            self._seen.setdefault(key, set()).add(name)
            self._seen.move_to_end(key)
        while len(self._seen) > self._max_keys:
            self._seen.popitem(last=False)

    def keep_only(self, names: Collection[str]) -> None:
        """There are no other replicas any more."""
        for key, holders in list(self._seen.items()):
            holders.intersection_update(names)
            if not holders:
                del self._seen[key]


def _first_choice(keys: Sequence[bytes], names: Sequence[str]) -> str:
    """One of them, the same in every router for prompts that begin alike (rendezvous hashing)."""
    begin = keys[0] if keys else b""
    return max(names, key=lambda name: hashlib.blake2b(begin + name.encode(), digest_size=8).digest())
