"""Requests that come at once take turns: others run between them, order is kept, none is forgotten."""

from __future__ import annotations

import asyncio
from typing import Any

from starlette.types import Receive, Scope, Send

from gqa_serve.api.turns import PER_PASS, Turns

POST = {"type": "http", "method": "POST"}


async def never_called(*args: Any) -> Any:
    raise AssertionError


class Recorder:
    """An application that notes in which pass of the event loop each request began."""

    def __init__(self) -> None:
        self.pass_number = 0
        self.began: list[tuple[int, int]] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.began.append((scope["number"], self.pass_number))

    async def count(self) -> None:
        while True:
            self.pass_number += 1
            await asyncio.sleep(0)


def run_all(scopes: list[dict[str, Any]], cancel: int | None = None) -> list[tuple[int, int]]:
    async def main() -> list[tuple[int, int]]:
        app = Recorder()
        turns = Turns(app)
        counting = asyncio.create_task(app.count())
        tasks = [
            asyncio.create_task(turns({**scope, "number": number}, never_called, never_called))
            for number, scope in enumerate(scopes)
        ]
        if cancel is not None:
            await asyncio.sleep(0)
            tasks[cancel].cancel()
        await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 90)
        counting.cancel()
        return app.began

    return asyncio.run(main())


def test_few_begin_in_one_pass_and_in_order() -> None:
    began = run_all([POST] * 50)
    assert [number for number, _ in began] == list(range(50))
    passes = [in_pass for _, in_pass in began]
    assert max(passes.count(one) for one in set(passes)) <= PER_PASS + 1
    assert len(set(passes)) >= 50 // (PER_PASS + 1)


def test_what_is_no_post_does_not_wait() -> None:
    began = run_all([POST] * 20 + [{"type": "http", "method": "GET"}, {"type": "lifespan"}])
    order = [number for number, _ in began]
    assert sorted(order) == list(range(22))
    assert order.index(20) == PER_PASS
    assert order.index(21) == PER_PASS + 1


def test_one_who_left_the_queue_costs_nobody_a_turn() -> None:
    began = run_all([POST] * 20, cancel=10)
    assert [number for number, _ in began] == [number for number in range(20) if number != 10]


def test_a_queue_that_ran_dry_fills_again() -> None:
    async def main() -> int:
        app = Recorder()
        turns = Turns(app)
        for _ in range(3):
            tasks = [turns({**POST, "number": 0}, never_called, never_called) for _ in range(2 * PER_PASS)]
            await asyncio.wait_for(asyncio.gather(*tasks), 90)
            await asyncio.sleep(0.01)
        return len(app.began)

    assert asyncio.run(main()) == 6 * PER_PASS
