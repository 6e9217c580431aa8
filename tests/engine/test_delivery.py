"""Outputs of a large step are given out in slices: the event loop comes to other work between them."""

from __future__ import annotations

import asyncio
from pathlib import Path

from gqa_serve.config import EngineConfig
from gqa_serve.engine import client
from gqa_serve.engine.client import AsyncEngine
from gqa_serve.engine.metrics import StepStats
from gqa_serve.engine.request import EngineRequest, SamplingParams, TokenOutput
from gqa_serve.engine.wire import Outputs, frame

NUM_STREAMS = 10 * client._SLICE


def test_other_work_is_done_between_the_outputs_of_a_step() -> None:
    async def main() -> None:
        engine = AsyncEngine(Path("nowhere"), EngineConfig(model="x", max_num_seqs=NUM_STREAMS))
        engine.state = "ready"
        steps: list[StepStats] = []
        engine.on_step = steps.append
        ids = [f"r{number}" for number in range(NUM_STREAMS)]
        streams = [
            engine.submit(EngineRequest(request_id=id, prompt=[1], params=SamplingParams())) for id in ids
        ]
        outputs = [TokenOutput(request_id=id, token_ids=[7], finish_reason="length") for id in ids]
        reader = asyncio.StreamReader()
        reader.feed_data(frame(Outputs(outputs, StepStats(num_requests=NUM_STREAMS))))
        reader.feed_eof()
        delivery = asyncio.create_task(engine._deliver(reader))
        seen = set()
        while not delivery.done():
            seen.add(engine.num_requests)
            await asyncio.sleep(0)
        assert max(a - b for a, b in zip(sorted(seen)[1:], sorted(seen), strict=False)) <= client._SLICE
        assert [stats.num_requests for stats in steps] == [NUM_STREAMS]
        assert engine.num_requests == 0
        for stream in streams:
            assert [output.token_ids async for output in stream] == [[7]]

    asyncio.run(main())
