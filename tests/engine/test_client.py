"""AsyncEngine over a real engine process: every stream ends once, whatever happens to the process."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import sys
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from fake_runner import request
from faulty_process import DIE, LARGE, RAISE, SLOW, TOO_LARGE
from tiny import tiny_checkpoint

from gqa_serve.config import EngineConfig
from gqa_serve.engine import client as client_module
from gqa_serve.engine.client import AsyncEngine, TokenStream
from gqa_serve.engine.metrics import StepStats
from gqa_serve.engine.request import TokenOutput
from gqa_serve.engine.wire import LENGTH, Start, to_engine_decoder
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


def at_rest(stats: StepStats, engine: AsyncEngine) -> bool:
    """Whether nothing is running or waiting, no block is held, and no stream is open."""
    assert engine.model_info is not None
    held = (stats.num_running, stats.num_waiting, stats.num_waiting_tokens, engine.num_requests)
    return held == (0, 0, 0, 0) and stats.num_free_blocks == engine.model_info.num_blocks


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


OTHERS = {f"other{number}": [5 + number, 6, 7, 8] for number in range(4)}


@in_loop
async def test_memory_that_runs_out_ends_only_who_is_too_large_alone(checkpoint: Path) -> None:
    async with started(checkpoint) as engine:
        steps: list[StepStats] = []
        engine.on_step = steps.append
        wanted = [tokens_of(await collect(engine.submit(request(n, p)))) for n, p in OTHERS.items()]
        await eventually(lambda: at_rest(steps[-1], engine))
        assert not any(stats.num_shrunk for stats in steps)
        streams = engine.submit_all(
            [request(n, p) for n, p in OTHERS.items()]
            + [request("large", [LARGE, 6, 7]), request("too large", [TOO_LARGE, 6, 7])]
        )
        *others, large, too_large = [await collect(stream) for stream in streams]
        assert [tokens_of(outputs) for outputs in others] == wanted
        assert large[-1].finish_reason == "length"  # alone, token by token
        assert too_large[-1].finish_reason == "error"
        assert "not enough memory" in (too_large[-1].error or "")
        assert any(stats.num_shrunk for stats in steps)
        await eventually(lambda: at_rest(steps[-1], engine))


@in_loop
async def test_an_engine_killed_at_any_point_ends_what_it_held_and_comes_back(checkpoint: Path) -> None:
    async with started(checkpoint) as engine:
        steps: list[StepStats] = []
        engine.on_step = steps.append
        wanted = tokens_of(await collect(engine.submit(request("before", [5, 6]))))
        for moment in ("prefill", "decode", "twice"):
            assert engine._process is not None
            first = engine._process.pid
            streams = [engine.submit(request(f"{moment}{i}", [SLOW, 6], max_tokens=250)) for i in range(3)]
            if moment == "decode":
                for stream in streams:
                    await anext(stream)
            os.kill(first, signal.SIGKILL)
            for stream in streams:
                outputs = await collect(stream)
                assert [output.finish_reason for output in outputs if output.finish_reason] == ["error"]
                assert "died" in (outputs[-1].error or "")
            assert at_rest(steps[-1], engine)
            if moment == "twice":  # the next one, too, while it loads
                await eventually(lambda first=first: engine._process and engine._process.pid != first)
                os.kill(engine._process.pid, signal.SIGKILL)
            await eventually(lambda: engine.state == "ready")
            assert tokens_of(await collect(engine.submit(request("after", [5, 6])))) == wanted
            await eventually(lambda: at_rest(steps[-1], engine))


@in_loop
async def test_what_cannot_be_sent_holds_no_place(checkpoint: Path) -> None:
    async with started(checkpoint, max_num_seqs=1, max_waiting=1) as engine:
        for number in range(3):
            with pytest.raises(OverflowError):
                engine.submit_all(
                    [request(f"good{number}", [5, 6]), request(f"bad{number}", [5], seed=2**70)]
                )
        assert engine.num_requests == 0
        assert tokens_of(await collect(engine.submit(request("after", [5, 6]))))


@in_loop
async def test_a_model_that_vanishes_or_is_damaged_is_waited_for(checkpoint: Path) -> None:
    folder = checkpoint.with_name("vanishing")
    shutil.copytree(checkpoint, folder)
    async with started(folder) as engine:
        wanted = tokens_of(await collect(engine.submit(request("before", [5, 6]))))
        away = folder.with_name("away")
        folder.rename(away)
        assert engine._process is not None
        engine._process.kill()
        await eventually(lambda: engine.state == "restarting")
        failures: list[int | None] = []

        async def next_failure() -> None:
            await eventually(lambda: engine._process is not None and engine._process.pid not in failures)
            assert engine._process is not None
            failures.append(engine._process.pid)
            await eventually(lambda: engine._process is None or engine._process.pid not in failures)
            with pytest.raises(EngineUnavailableError, match="restarting"):
                engine.submit(request("meanwhile", [5, 6]))

        await next_failure()
        away.rename(folder)
        weights = folder / "model.safetensors"
        whole = weights.read_bytes()
        weights.write_bytes(whole[: len(whole) // 2])
        await next_failure()
        weights.write_bytes(whole)
        await eventually(lambda: engine.state == "ready")
        assert tokens_of(await collect(engine.submit(request("after", [5, 6])))) == wanted


@in_loop
async def test_a_new_process_is_told_what_kv_cache_the_old_one_had(checkpoint: Path) -> None:
    told: list[int | None] = []
    async with started(checkpoint) as engine:
        write, info = engine._write, engine.model_info
        assert info is not None
        assert engine._process is not None

        def record(data: bytes) -> None:
            message = to_engine_decoder.decode(data[LENGTH.size :])
            if isinstance(message, Start):
                told.append(message.num_blocks)
            write(data)

        engine._write = record  # type: ignore[method-assign]
        engine._process.kill()
        await eventually(lambda: engine.num_restarts == 1 and engine.state == "ready")
    assert told == [info.num_blocks]


def test_a_process_that_dies_while_it_loads_first_is_an_error_of_the_start(checkpoint: Path) -> None:
    folder = checkpoint.with_name("deadly")
    shutil.copytree(checkpoint, folder)
    (folder / "FAULT").write_text("die")

    async def start() -> None:
        engine = AsyncEngine(folder, EngineConfig(model="tiny"))
        engine.command = FAULTY
        with pytest.raises(ModelError, match="died while loading"):
            await engine.start()
        assert engine.state == "failed"

    asyncio.run(start())


@in_loop
async def test_a_storm_of_aborts_leaves_nothing_behind_and_hurts_nobody(checkpoint: Path) -> None:
    async with started(checkpoint, max_num_seqs=8, max_num_batched_tokens=64) as engine:
        steps: list[StepStats] = []
        engine.on_step = steps.append
        wanted = tokens_of(await collect(engine.submit(request("alone", [5, 6], max_tokens=40))))
        steady = asyncio.create_task(collect(engine.submit(request("steady", [5, 6], max_tokens=40))))
        for burst in range(20):
            streams = [
                engine.submit(request(f"{burst}-{i}", [7 + i % 50] * (1 + i % 90), max_tokens=9))
                for i in range(50)
            ]
            await asyncio.sleep(0.01)
            for stream in streams:
                stream.abort()
        assert tokens_of(await steady) == wanted
        await eventually(lambda: at_rest(steps[-1], engine))
        assert tokens_of(await collect(engine.submit(request("after", [5, 6], max_tokens=40)))) == wanted


@in_loop
async def test_a_step_that_raises_ends_its_requests_and_three_in_a_row_the_process(checkpoint: Path) -> None:
    async with started(checkpoint) as engine:
        assert engine._process is not None
        first = engine._process.pid
        for number in range(4):  # never two in a row
            outputs = await collect(engine.submit(request(f"a{number}", [5, RAISE])))
            assert outputs[-1].finish_reason == "error"
            assert "RuntimeError" in (outputs[-1].error or "")
            assert tokens_of(await collect(engine.submit(request(f"b{number}", [5, 6]))))
        assert (engine.state, engine._process.pid) == ("ready", first)
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


def test_the_engine_process_logs_as_told(checkpoint: Path, capfd: pytest.CaptureFixture[str]) -> None:
    async def main() -> None:
        config = EngineConfig(model="tiny", kv_cache_memory=2**20)
        engine = AsyncEngine(checkpoint, config, log_format="json")
        engine.command = FAULTY
        await engine.start()
        try:
            await collect(engine.submit(request("a", [5, RAISE])))
        finally:
            await engine.stop()

    asyncio.run(asyncio.wait_for(main(), 120))
    records = [json.loads(line) for line in capfd.readouterr().err.splitlines()]
    assert all(record["process"] == "engine" for record in records)
    (record,) = [record for record in records if record["level"] == "error"]
    assert "RuntimeError: planted" in record["exception"]


def test_what_nobody_foresaw_in_the_engine_process_is_a_line_of_its_log(
    checkpoint: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = checkpoint.with_name("unforeseen")
    shutil.copytree(checkpoint, folder)
    (folder / "FAULT").write_text("raise")

    async def start() -> None:
        engine = AsyncEngine(folder, EngineConfig(model="tiny"), log_format="json")
        engine.command = FAULTY
        with pytest.raises(ModelError, match="died while loading"):
            await engine.start()

    asyncio.run(asyncio.wait_for(start(), 120))
    (record,) = [json.loads(line) for line in capfd.readouterr().err.splitlines()]
    assert (record["process"], record["level"]) == ("engine", "error")
    assert "KeyError: 'planted'" in record["exception"]
