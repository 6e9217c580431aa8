"""AsyncEngine over a real engine process: every stream ends once, whatever happens to the process."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from fake_runner import request
from faulty_process import DIE, RAISE, SLOW
from tiny import tiny_checkpoint

from gqa_serve.config import EngineConfig
from gqa_serve.engine import client as client_module
from gqa_serve.engine.client import AsyncEngine, TokenStream
from gqa_serve.engine.request import TokenOutput
from gqa_serve.errors import EngineUnavailableError, ModelError, QueueFullError

FAULTY = (sys.executable, str(Path(__file__).with_name("faulty_process.py")))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint("llama", tmp_path_factory.mktemp("client"))


@pytest.fixture(autouse=True)
def quick_restart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "_FIRST_BACKOFF_S", 0.05)


@asynccontextmanager
async def started(path: Path, **settings: Any) -> AsyncIterator[AsyncEngine]:
    config = EngineConfig(model="tiny", kv_cache_memory=2**20, **settings)
    engine = AsyncEngine(path, config)
    engine.command = FAULTY
    await engine.start()
    try:
        yield engine
    finally:
        await engine.stop()


def in_loop(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    def run(checkpoint: Path) -> None:
        asyncio.run(asyncio.wait_for(test(checkpoint), 120))

    return run


async def collect(stream: TokenStream) -> list[TokenOutput]:
    return [output async for output in stream]


async def eventually(condition: Callable[[], bool]) -> None:
    for _ in range(600):
        if condition():
            return
        await asyncio.sleep(0.05)
    raise AssertionError("it did not come about")


def tokens_of(outputs: list[TokenOutput]) -> list[int]:
    return [token for output in outputs for token in output.token_ids]


@in_loop
async def test_streams_end_once_and_merge_what_piled_up(checkpoint: Path) -> None:
    async with started(checkpoint) as engine:
        assert engine.state == "ready"
        assert engine.model_info is not None
        assert engine.model_info.num_kv_heads == 2
        stream = engine.submit(request("a", [5, 6, 7], max_tokens=12, logprobs=1))
        await eventually(lambda: stream._ended)
        (merged,) = await collect(stream)
        assert len(merged.token_ids) == 12
        assert merged.logprobs is not None
        assert [entry.token_id for entry in merged.logprobs] == merged.token_ids
        assert merged.finish_reason == "length"
        again = await collect(engine.submit(request("b", [5, 6, 7], max_tokens=12)))
        assert tokens_of(again) == merged.token_ids
        assert engine.num_requests == 0


@in_loop
async def test_a_step_that_raises_ends_its_requests_and_the_engine_goes_on(checkpoint: Path) -> None:
    async with started(checkpoint) as engine:
        outputs = await collect(engine.submit(request("a", [5, RAISE])))
        assert outputs[-1].finish_reason == "error"
        assert "RuntimeError" in (outputs[-1].error or "")
        assert engine.state == "ready"
        assert tokens_of(await collect(engine.submit(request("b", [5, 6]))))


@in_loop
async def test_a_process_that_dies_fails_its_streams_and_comes_back(checkpoint: Path) -> None:
    async with started(checkpoint) as engine:
        wanted = tokens_of(await collect(engine.submit(request("before", [5, 6]))))
        long = engine.submit(request("long", [7, 8], max_tokens=200))
        await anext(long)
        dying = engine.submit(request("dying", [5, DIE]))
        assert (await collect(dying))[-1].finish_reason == "error"
        assert (await collect(long))[-1].finish_reason == "error"
        with pytest.raises(EngineUnavailableError):
            engine.submit(request("too soon", [5, 6]))
        await eventually(lambda: engine.state == "ready")
        assert tokens_of(await collect(engine.submit(request("after", [5, 6])))) == wanted


@in_loop
async def test_a_killed_process_is_noticed_while_idle(checkpoint: Path) -> None:
    async with started(checkpoint) as engine:
        assert engine._process is not None
        first = engine._process.pid
        os.kill(first, signal.SIGKILL)
        await eventually(lambda: engine.state == "restarting")
        await eventually(lambda: engine.state == "ready")
        assert engine._process.pid != first


@in_loop
async def test_steps_that_keep_failing_end_the_process(checkpoint: Path) -> None:
    async with started(checkpoint) as engine:
        assert engine._process is not None
        first = engine._process.pid
        for number in range(3):
            outputs = await collect(engine.submit(request(f"r{number}", [5, RAISE])))
            assert outputs[-1].finish_reason == "error"
        await eventually(lambda: engine._process is not None and engine._process.pid != first)
        await eventually(lambda: engine.state == "ready")


@in_loop
async def test_abort_is_idempotent_and_frees_the_place(checkpoint: Path) -> None:
    async with started(checkpoint, max_num_seqs=1, max_num_batched_tokens=64) as engine:
        long = engine.submit(request("long", [5, 6], max_tokens=200))
        await anext(long)
        waiting = engine.submit(request("waiting", [7, 8], max_tokens=2))
        long.abort()
        long.abort()
        assert await collect(long) == []
        assert (await collect(waiting))[-1].finish_reason == "length"
        assert engine.num_requests == 0


@in_loop
async def test_a_full_queue_refuses_at_once(checkpoint: Path) -> None:
    async with started(checkpoint, max_num_seqs=1, max_waiting=1) as engine:
        streams = [engine.submit(request(f"r{i}", [SLOW, 6], max_tokens=3)) for i in range(2)]
        with pytest.raises(QueueFullError):
            engine.submit(request("one too many", [5, 6]))
        for stream in streams:
            assert (await collect(stream))[-1].finish_reason == "length"


@in_loop
async def test_what_the_engine_refuses_ends_as_an_error(checkpoint: Path) -> None:
    async with started(checkpoint) as engine:
        outputs = await collect(engine.submit(request("a", [5000])))
        assert [output.finish_reason for output in outputs] == ["error"]
        assert "vocabulary" in (outputs[0].error or "")


@in_loop
async def test_refuse_new_lets_what_is_under_way_finish(checkpoint: Path) -> None:
    async with started(checkpoint) as engine:
        stream = engine.submit(request("a", [5, 6], max_tokens=30))
        await anext(stream)
        engine.refuse_new()
        with pytest.raises(EngineUnavailableError):
            engine.submit(request("b", [5, 6]))
        assert (await collect(stream))[-1].finish_reason == "length"
        process = engine._process
        await engine.stop()
        assert process is not None
        assert process.returncode == 0


@in_loop
async def test_stop_ends_streams_under_way(checkpoint: Path) -> None:
    async with started(checkpoint) as engine:
        stream = engine.submit(request("a", [5, 6], max_tokens=200))
        await anext(stream)
        await engine.stop()
        assert (await collect(stream))[-1].finish_reason == "abort"
        assert engine.num_requests == 0


@in_loop
async def test_stop_kills_a_process_that_reads_nothing(checkpoint: Path) -> None:
    async with started(checkpoint) as engine:
        assert engine._process is not None
        process = engine._process
        process.send_signal(signal.SIGSTOP)
        for number in range(60):  # more bytes than the socket's buffer takes
            engine.submit(request(f"r{number}", [5] * 8000, max_tokens=1))
        await asyncio.wait_for(engine.stop(), client_module._EXIT_TIMEOUT_S + 10)
        assert process.returncode == -signal.SIGKILL


def test_a_checkpoint_that_cannot_be_loaded_says_why(tmp_path: Path) -> None:
    async def start() -> None:
        engine = AsyncEngine(tmp_path / "nothing", EngineConfig(model="x"))
        with pytest.raises(ModelError, match="does not exist"):
            await engine.start()
        assert engine.state == "failed"

    asyncio.run(start())


def test_loading_reports_every_tensor(checkpoint: Path) -> None:
    seen: list[tuple[int, int]] = []

    async def start() -> None:
        config = EngineConfig(model="tiny", kv_cache_memory=2**20)
        engine = AsyncEngine(checkpoint, config, on_load=lambda done, total: seen.append((done, total)))
        await engine.start()
        await engine.stop()

    asyncio.run(start())
    assert [done for done, _ in seen] == list(range(1, seen[0][1] + 1))
