"""Placement: no two processes of a server on one GPU, and no more threads than cores."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gqa_serve.engine.model_runner import choose_device
from gqa_serve.engine.placement import Placement
from gqa_serve.errors import ConfigError


@given(replicas=st.integers(1, 8), ranks=st.integers(1, 8), cores=st.integers(1, 200))
def test_processes_have_their_own_gpu_and_share_the_cores(replicas: int, ranks: int, cores: int) -> None:
    every = [
        Placement(replica, replicas, rank, ranks) for replica in range(replicas) for rank in range(ranks)
    ]
    assert sorted(one.index for one in every) == list(range(replicas * ranks))
    shares = [one.share(cores) for one in every]
    assert sum(shares) == max(cores, len(every))
    assert max(shares) - min(shares) <= 1


@pytest.fixture
def four_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)


@pytest.mark.usefixtures("four_gpus")
def test_each_process_takes_the_gpu_of_its_number() -> None:
    found = [
        choose_device("auto", placement=Placement(replica, 2, rank, 2))
        for replica in (0, 1)
        for rank in (0, 1)
    ]
    assert found == [torch.device("cuda", index) for index in range(4)]
    assert choose_device("cuda") == torch.device("cuda")
    assert choose_device("cpu", placement=Placement(5, 6)) == torch.device("cpu")


@pytest.mark.usefixtures("four_gpus")
def test_fewer_gpus_than_processes_are_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"size 3 times --tensor-parallel-size 2 needs 6 GPUs.* there are 4"
    ):
        choose_device("auto", placement=Placement(0, 3, 0, 2))


def test_alone_it_has_everything() -> None:
    assert (Placement().index, Placement().share(7)) == (0, 7)
