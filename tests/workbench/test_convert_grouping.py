"""The search for equal groups, against trying all of them."""

from __future__ import annotations

import numpy as np
import pytest

from gqa_serve.workbench.convert import grouping
from gqa_serve.workbench.convert.grouping import all_groupings, best_groups, cost, count_groupings


def scattered(num: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Points [num, 5] and their squared distances."""
    points = np.random.default_rng(seed).normal(size=(num, 5))
    return points, np.square(points[:, None] - points[None]).sum(-1)


def test_cost_is_that_of_replacing_heads_by_their_mean() -> None:
    points, distances = scattered(6, 0)
    groups = ((0, 4, 5), (1, 2, 3))
    direct = sum(np.square(points[list(g)] - points[list(g)].mean(0)).sum() for g in groups)
    assert cost(groups, distances) == pytest.approx(direct)


@pytest.mark.parametrize(("total", "size"), [(4, 2), (6, 3), (8, 2), (6, 1), (6, 6), (9, 3)])
def test_all_groupings_are_as_many_as_they_should(total: int, size: int) -> None:
    found = list(all_groupings(tuple(range(total)), size))
    assert len(found) == len(set(found)) == count_groupings(total, size)
    assert all(sorted(head for group in groups for head in group) == list(range(total)) for groups in found)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("total", "num"), [(8, 4), (8, 2), (9, 3)])
def test_the_search_finds_the_best(monkeypatch: pytest.MonkeyPatch, seed: int, total: int, num: int) -> None:
    _, distances = scattered(total, seed)
    best = best_groups(distances, num)  # by trying all
    monkeypatch.setattr(grouping, "_MOST_TRIED", 0)
    searched = best_groups(distances, num)
    assert cost(searched, distances) == pytest.approx(cost(best, distances), rel=0.02)


def test_hidden_groups_among_many_heads_are_found() -> None:
    random = np.random.default_rng(3)
    labels = random.permutation(np.repeat(np.arange(8), 8))
    points = random.normal(size=(8, 5))[labels] * 10 + random.normal(size=(64, 5)) * 0.1
    groups = best_groups(np.square(points[:, None] - points[None]).sum(-1), 8)
    assert all(len(set(labels[list(group)])) == 1 and len(group) == 8 for group in groups)
