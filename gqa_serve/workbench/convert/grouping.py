"""Which heads belong together: equal groups of the least cost.

Owns the search. Knows distances between heads, not what they are distances of.
Replacing the heads of a group by their mean costs sum_h |x_h - mean|^2 = (sum over pairs of |x_h - x_i|^2) /
size, so that the cost of any grouping follows from the distances of pairs. With few heads every grouping is
tried; else a greedy start and swaps of two heads until none helps, from several starts.
Invariant: never worse than neighbouring heads, which is one of the starts; the same input, the same groups.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

Groups = tuple[tuple[int, ...], ...]
_MOST_TRIED = 20_000  # groupings that are all tried
_STARTS = 8


def cost(groups: Groups, distances: npt.NDArray[np.float64]) -> float:
    """Sum over groups of the pairs' squared distances / group size. distances [n, n], symmetric."""
    return float(sum(distances[np.ix_(group, group)].sum() / (2 * len(group)) for group in groups))


def best_groups(distances: npt.NDArray[np.float64], num_groups: int) -> Groups:
    """Equal groups of the n heads of `distances` [n, n] with the least cost found; heads in order within."""
    total = len(distances)
    size = total // num_groups
    neighbouring = tuple(tuple(range(start, start + size)) for start in range(0, total, size))
    if num_groups in (1, total):
        return neighbouring
    if count_groupings(total, size) <= _MOST_TRIED:
        return min(all_groupings(tuple(range(total)), size), key=lambda groups: cost(groups, distances))
    random = np.random.default_rng(0)
    starts = [neighbouring, _greedy(distances, size)]
    starts += [_of_labels(random.permutation(total) // size) for _ in range(_STARTS)]
    return min((_swapped(start, distances) for start in starts), key=lambda groups: cost(groups, distances))


def count_groupings(total: int, size: int) -> int:
    """How many ways there are: n! / (size!^m m!)."""
    groups = total // size
    same: int = math.factorial(size) ** groups * math.factorial(groups)
    return math.factorial(total) // same


def all_groupings(heads: tuple[int, ...], size: int) -> Iterator[Groups]:
    """Every way to cut `heads` into groups of `size`; the first head's group comes first."""
    if not heads:
        yield ()
        return
    for others in itertools.combinations(heads[1:], size - 1):
        left = tuple(head for head in heads[1:] if head not in others)
        for rest in all_groupings(left, size):
            yield ((heads[0], *others), *rest)


def _greedy(distances: npt.NDArray[np.float64], size: int) -> Groups:
    """From the two closest heads that are left, add the closest to the group until it is full."""
    left = set(range(len(distances)))
    groups = []
    while left:
        pairs = [(distances[a, b], a, b) for a in left for b in left if a < b]
        group = list(min(pairs)[1:])[:size] if pairs else [left.pop()]
        while len(group) < size:
            group.append(min(left - set(group), key=lambda head: (distances[head, group].sum(), head)))
        left -= set(group)
        groups.append(tuple(sorted(group)))
    return tuple(sorted(groups))


def _swapped(start: Groups, distances: npt.NDArray[np.float64]) -> Groups:
    """The best swap of two heads of different groups, again and again, as long as it lowers the cost.

    What a head pays in each group is kept as a matrix [n, groups], so that all swaps are weighed at once.
    """
    size = len(start[0])
    labels = np.empty(len(distances), np.int64)
    for index, group in enumerate(start):
        labels[list(group)] = index
    while True:
        member = np.eye(len(start))[labels]  # [n, groups]
        pays = distances @ member  # [n, groups]: to all members of each group
        own = pays[np.arange(len(labels)), labels]
        moved = pays[:, labels]  # [a, b]: what a would pay in b's group
        gain = own[:, None] + own[None, :] - moved - moved.T + 2 * distances
        gain[labels[:, None] == labels[None, :]] = -np.inf
        a, b = np.unravel_index(int(np.argmax(gain)), gain.shape)
        if gain[a, b] <= 1e-12 * (abs(own).max() + size):
            return _of_labels(labels)
        labels[a], labels[b] = labels[b], labels[a]


def _of_labels(labels: npt.NDArray[np.int64]) -> Groups:
    return tuple(sorted(tuple(np.flatnonzero(labels == label).tolist()) for label in np.unique(labels)))
