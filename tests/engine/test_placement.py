"""Placement: no two processes of a server on one GPU, and no more threads than cores."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from gqa_serve.engine.placement import Placement


@given(replicas=st.integers(1, 8), ranks=st.integers(1, 8), cores=st.integers(1, 200))
def test_processes_have_their_own_gpu_and_share_the_cores(replicas: int, ranks: int, cores: int) -> None:
    every = [
        Placement(replica, replicas, rank, ranks) for replica in range(replicas) for rank in range(ranks)
    ]
    assert sorted(one.index for one in every) == list(range(replicas * ranks))
    shares = [one.share(cores) for one in every]
    assert sum(shares) == max(cores, len(every))
    assert max(shares) - min(shares) <= 1


def test_alone_it_has_everything() -> None:
    assert (Placement().index, Placement().share(7)) == (0, 7)
