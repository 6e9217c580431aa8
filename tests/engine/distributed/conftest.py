from __future__ import annotations

from collections.abc import Iterator

import pytest
from rank_pool import RankPool


@pytest.fixture(scope="session")
def two_ranks() -> Iterator[RankPool]:
    pool = RankPool(2)
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def four_ranks() -> Iterator[RankPool]:
    pool = RankPool(4)
    yield pool
    pool.close()


@pytest.fixture(params=[2, 4], ids=["2 ranks", "4 ranks"])
def pool(request: pytest.FixtureRequest) -> RankPool:
    found: RankPool = request.getfixturevalue("two_ranks" if request.param == 2 else "four_ranks")
    return found
