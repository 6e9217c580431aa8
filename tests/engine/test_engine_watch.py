"""What happens between the two processes: hangs, floods, full sockets, full queues, waiting too long."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from fake_runner import request
from scripted_process import HANG, LARGE, WAIT

from gqa_serve.config import EngineConfig
from gqa_serve.engine import client as client_module
from gqa_serve.engine.client import AsyncEngine
from gqa_serve.engine.metrics import StepStats
from gqa_serve.engine.token_stream import TokenStream
from gqa_serve.errors import EngineUnavailableError, QueueFullError, QueueTimeoutError

SCRIPTED = (sys.executable, str(Path(__file__).with_name("scripted_process.py")))
OK = 5  # a prompt that is answered


@pytest.fixture(autouse=True)
def quick_restart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "_FIRST_BACKOFF_S", 0.05)


@asynccontextmanager
async def started(path: Path = Path(), **settings: Any) -> AsyncIterator[AsyncEngine]:
    engine = AsyncEngine(path, EngineConfig(model="scripted", **settings))
    engine.command = SCRIPTED
    await engine.start()
    try:
        yield engine
    finally:
        await engine.stop()


def in_loop(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    def run(**fixtures: Any) -> None:
        asyncio.run(asyncio.wait_for(test(**fixtures), 120))

    run.__name__ = test.__name__
    run.__signature__ = __import__("inspect").signature(test)  # type: ignore[attr-defined]
    return run


async def tokens_of(stream: TokenStream) -> tuple[list[int], str | None]:
    """All tokens, and why there are no more."""
    tokens, error = [], None
    async for output in stream:
        tokens += output.token_ids
        error = output.error
    return tokens, error


async def eventually(condition: Callable[[], bool]) -> None:
    for _ in range(1200):
        if condition():
            return
        await asyncio.sleep(0.05)
    raise AssertionError("it did not come about")


@pytest.mark.parametrize("how", ["hangs", "is stopped"])
@in_loop
async def test_a_hung_process_is_killed_and_its_requests_hear_of_it(
    how: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with started(engine_timeout=1.0) as engine:
        seen: list[StepStats] = []
        engine.on_step = seen.append
        assert (await tokens_of(engine.submit(request("before", [OK]))))[0] == list(range(8))
        first = engine._process
        assert first is not None
        if how == "is stopped":
            os.kill(first.pid, signal.SIGSTOP)
        streams = [engine.submit(request(f"r{number}", [OK if number else HANG])) for number in range(10)]
        asking = asyncio.create_task(engine.snapshot())  # which one that hangs may still answer
        for stream in streams:
            assert "hung" in ((await tokens_of(stream))[1] or "")
        (picture,) = await asyncio.gather(asking, return_exceptions=True)
        assert isinstance(picture, EngineUnavailableError) or how == "hangs"
        assert engine.num_requests == 0
        await eventually(lambda: engine.state == "ready")
        assert first.returncode == -signal.SIGKILL
        assert (await tokens_of(engine.submit(request("after", [OK]))))[0] == list(range(8))
        gone = next(stats for stats in seen if stats.num_free_blocks)  # when the process was gone
        assert (gone.num_running, gone.num_waiting, gone.num_free_blocks) == (0, 0, 64)
    said = next(record.getMessage() for record in caplog.records if "Killing" in record.getMessage())
    assert "holds 10 requests (r0, r1, r2, r3, ..., r6, r7, r8, r9)" in said
    assert "its last step:" in said
    assert any("raise --engine-timeout" in record.getMessage() for record in caplog.records)


@in_loop
async def test_who_owes_nothing_may_be_silent() -> None:
    async with started(engine_timeout=0.5) as engine:
        assert engine._process is not None
        first = engine._process.pid
        await asyncio.sleep(1.5)
        stream = engine.submit(request("a", [OK]))
        assert (await tokens_of(stream))[0] == list(range(8))
        assert engine._process.pid == first


@in_loop
async def test_an_engine_that_answered_while_this_process_stood_still_is_well() -> None:
    async with started(engine_timeout=1.0) as engine:
        assert engine._process is not None
        first = engine._process.pid
        stream = engine.submit(request("a", [OK], max_tokens=300))
        await anext(stream)
        for _ in range(3):
            time.sleep(1.5)
            await asyncio.sleep(0)
        assert len((await tokens_of(stream))[0]) > 250
        assert engine._process.pid == first


@in_loop
async def test_a_restart_that_hangs_is_tried_again(tmp_path: Path) -> None:
    async with started(tmp_path, engine_timeout=0.5) as engine:
        assert engine._process is not None
        (tmp_path / "FAULT").touch()
        first = engine._process.pid
        engine._process.kill()
        await eventually(lambda: engine._process is not None and engine._process.pid != first)
        second = engine._process.pid
        await eventually(lambda: engine._process is not None and engine._process.pid != second)
        assert engine.state == "restarting"
        with pytest.raises(EngineUnavailableError):
            engine.submit(request("a", [OK]))
        (tmp_path / "FAULT").unlink()
        await eventually(lambda: engine.state == "ready")
        assert (await tokens_of(engine.submit(request("b", [OK]))))[0] == list(range(8))


@in_loop
async def test_a_first_load_that_is_silent_is_only_remarked(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client_module, "_EXIT_TIMEOUT_S", 0.1)  # it will not end by itself
    (tmp_path / "FAULT").touch()
    engine = AsyncEngine(tmp_path, EngineConfig(model="scripted", engine_timeout=0.2))
    engine.command = SCRIPTED
    loading = asyncio.create_task(engine.start())
    await asyncio.sleep(1.0)
    assert not loading.done()
    loading.cancel()
    await asyncio.gather(loading, return_exceptions=True)
    (said,) = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert "while loading the model" in said.getMessage()


@in_loop
async def test_both_sides_send_megabytes_at_once_and_nobody_waits_for_ever() -> None:
    """The socket is full both ways: the engine waits for room, and this process must read, not wait."""
    async with started(max_num_seqs=100) as engine:
        speaking = [engine.submit(request(f"s{number}", [LARGE], max_tokens=4)) for number in range(4)]
        await anext(speaking[0])
        time.sleep(0.3)
        sent = [
            engine.submit(request(f"r{number}", [OK] * 200_000, max_tokens=2)) for number in range(9)
        ]  # about as many bytes
        for stream in sent:
            assert (await tokens_of(stream))[0] == [0, 1]
        for stream in speaking:
            assert (await tokens_of(stream))[0][-1] == 3
        assert engine.num_requests == 0


@in_loop
async def test_a_storm_of_requests_that_come_and_go_does_not_starve_the_others() -> None:
    async with started() as engine:
        steady = engine.submit(request("steady", [OK], max_tokens=200))
        tokens: list[int] = []

        async def read() -> None:
            async for output in steady:
                tokens.extend(output.token_ids)

        reading = asyncio.create_task(read())
        count = 0
        while not reading.done():
            for _ in range(100):
                engine.submit(request(f"r{count}", [OK] * 50)).abort()
                count += 1
            await asyncio.sleep(0.01)
        assert tokens == list(range(200))
        assert engine.num_requests == 0
        assert engine._admission.num_waiting_tokens == 0
        assert (await tokens_of(engine.submit(request("after", [OK]))))[0] == list(range(8))


@in_loop
async def test_what_is_sent_to_an_engine_that_does_not_read_is_bounded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(client_module, "_MAX_UNREAD_BYTES", 2**20)
    async with started() as engine:
        assert engine._process is not None
        engine._process.send_signal(signal.SIGSTOP)

        def flood() -> None:
            for number in range(1000):
                engine.submit(request(f"r{number}", [OK] * 10_000)).abort()

        with pytest.raises(QueueFullError, match="behind with reading"):
            flood()
        engine._process.send_signal(signal.SIGCONT)
        writer = engine._writer
        assert writer is not None
        await eventually(lambda: writer.transport.get_write_buffer_size() == 0)
        assert (await tokens_of(engine.submit(request("after", [OK]))))[0] == list(range(8))


@in_loop
async def test_what_comes_together_is_taken_together_or_not_at_all() -> None:
    async with started(max_num_seqs=2, max_waiting=1) as engine:
        held = engine.submit(request("held", [WAIT]))
        with pytest.raises(QueueFullError):
            engine.submit_all([request(f"a{number}", [OK]) for number in range(3)])
        assert engine.num_requests == 1
        streams = engine.submit_all([request(f"b{number}", [OK]) for number in range(2)])
        for stream in streams:
            assert (await tokens_of(stream))[0] == list(range(8))
        held.abort()
        assert engine.num_requests == 0


@in_loop
async def test_waiting_tokens_are_bounded_and_begun_ones_do_not_count() -> None:
    async with started(max_waiting_tokens=100) as engine:
        large = engine.submit(request("large", [WAIT] * 500))  # nobody waits: it gets in, whatever its size
        with pytest.raises(QueueFullError, match="500 tokens are waiting") as refused:
            engine.submit(request("small", [OK]))
        assert 1 <= refused.value.retry_after_s <= 60
        large.abort()
        running = engine.submit(request("running", [OK] * 90, max_tokens=2000))
        await anext(running)
        assert engine._admission.num_waiting_tokens == 0
        waiting = engine.submit(request("waiting", [WAIT] * 100))
        with pytest.raises(QueueFullError):
            engine.submit(request("more", [OK]))
        waiting.abort()
        running.abort()


@in_loop
async def test_who_waits_too_long_is_told_and_who_has_begun_is_not() -> None:
    async with started(queue_timeout=1.0) as engine:
        long = engine.submit(request("long", [OK], max_tokens=800))
        half = engine.submit_all([request("begun", [OK], max_tokens=800), request("sibling", [WAIT])])
        waiting = engine.submit_all([request("w0", [WAIT]), request("w1", [WAIT])])
        for stream in waiting:
            with pytest.raises(QueueTimeoutError) as late:
                await tokens_of(stream)
            assert (late.value.status, late.value.code) == (503, "queue_timeout")
            assert 1 <= late.value.retry_after_s <= 60
        assert (await tokens_of(long))[0] == list(range(800))
        assert (await tokens_of(half[0]))[0] == list(range(800))
        assert engine.num_requests == 1
        half[1].abort()  # it came with one that was computed: it is not late
        assert engine.num_requests == 0


@in_loop
async def test_a_stop_in_the_middle_of_a_restart_leaves_no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    async with started() as engine:
        assert engine._process is not None
        spawn, spawned = asyncio.create_subprocess_exec, []

        async def slow(*args: Any, **options: Any) -> asyncio.subprocess.Process:
            spawned.append(await spawn(*args, **options))
            await asyncio.sleep(0.5)
            return spawned[0]

        monkeypatch.setattr(asyncio, "create_subprocess_exec", slow)
        engine._process.kill()
        await eventually(lambda: len(spawned) == 1)
        await engine.stop()
        assert spawned[0].returncode is not None
        assert len(spawned) == 1


@in_loop
async def test_a_stop_while_a_process_is_waited_for_leaves_no_process() -> None:
    """It closed its socket and does not end, as one that is stopped or hangs on its way out."""
    async with started() as engine:
        process, writer = engine._process, engine._writer
        assert process is not None
        assert writer is not None
        process.send_signal(signal.SIGSTOP)
        writer.transport.abort()
        await eventually(lambda: engine.state == "restarting")
        await engine.stop()
        assert process.returncode == -signal.SIGKILL


@in_loop
async def test_the_log_names_what_a_process_held_when_it_died(caplog: pytest.LogCaptureFixture) -> None:
    async with started() as engine:
        assert engine._process is not None
        stream = engine.submit(request("fatal", [OK], max_tokens=10**6))
        await anext(stream)
        engine._process.kill()
        assert "died" in ((await tokens_of(stream))[1] or "")
        await eventually(lambda: any("status -9" in record.getMessage() for record in caplog.records))
        (said,) = [record.getMessage() for record in caplog.records if "status -9" in record.getMessage()]
        assert "holds 1 requests (fatal); its last step:" in said
