"""EngineReplicas over real processes: what one engine loses the others keep; who gets a request."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest
from fake_runner import request
from faulty_process import RAISE
from scripted_process import HANG, WAIT
from tiny import tiny_checkpoint

from gqa_serve.config import EngineConfig
from gqa_serve.engine import client as client_module
from gqa_serve.engine.metrics import BlockState
from gqa_serve.engine.replicas import EngineReplicas, LoadedTensors, replica_seed
from gqa_serve.engine.request import TokenOutput
from gqa_serve.engine.token_stream import TokenStream
from gqa_serve.errors import EngineUnavailableError, ModelError, QueueFullError

SCRIPTED = (sys.executable, str(Path(__file__).with_name("scripted_process.py")))
FAULTY = (sys.executable, str(Path(__file__).with_name("faulty_process.py")))
OK = 5  # a prompt that is answered
LONG = 10**5  # tokens, at least 2 ms each


@pytest.fixture(autouse=True)
def quick_restart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "_FIRST_BACKOFF_S", 0.05)


def scripted(num_replicas: int = 2, **settings: Any) -> EngineReplicas:
    engines = EngineReplicas(Path(), EngineConfig(model="scripted", **settings), num_replicas)
    for engine in engines.replicas:
        engine.command = SCRIPTED
    return engines


@asynccontextmanager
async def started(num_replicas: int = 2, **settings: Any) -> AsyncIterator[EngineReplicas]:
    engines = scripted(num_replicas, **settings)
    await engines.start()
    try:
        yield engines
    finally:
        await engines.stop()
    assert owed(engines) == [0] * num_replicas


def in_loop(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    def run(**fixtures: Any) -> None:
        asyncio.run(asyncio.wait_for(test(**fixtures), 240))

    run.__name__ = test.__name__
    run.__signature__ = __import__("inspect").signature(test)  # type: ignore[attr-defined]
    return run


def submit(engines: EngineReplicas, name: str, prompt: list[int], **options: Any) -> TokenStream:
    (stream,) = engines.submit_all([request(name, prompt, **options)])
    return stream


async def collect(stream: TokenStream) -> list[TokenOutput]:
    return [output async for output in stream]


async def ended(stream: TokenStream) -> TokenOutput:
    return (await collect(stream))[-1]


async def eventually(condition: Callable[[], bool]) -> None:
    for _ in range(2400):
        if condition():
            return
        await asyncio.sleep(0.05)
    raise AssertionError("it did not come about")


def held(engines: EngineReplicas) -> list[int]:
    return [engine.num_requests for engine in engines.replicas]


def owed(engines: EngineReplicas) -> list[int]:
    return [engines._router.outstanding(number) for number in range(len(engines.replicas))]


def kill(engines: EngineReplicas, replica: int) -> None:
    pid = engines.replicas[replica].pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)


# --- who gets a request ------------------------------------------------------------------------------------


@in_loop
async def test_requests_are_spread_and_each_ends() -> None:
    async with started() as engines:
        assert engines.state == "ready"
        assert len({engine.pid for engine in engines.replicas}) == 2
        streams = [submit(engines, f"r{number}", [WAIT], max_tokens=5) for number in range(6)]
        assert (held(engines), engines.num_requests) == ([3, 3], 6)
        assert owed(engines) == [3 * (1 + 5)] * 2
        for stream in streams:
            stream.abort()
        assert (held(engines), owed(engines)) == ([0, 0], [0, 0])
        answered = [await ended(submit(engines, f"a{number}", [OK], max_tokens=5)) for number in range(4)]
        assert [output.finish_reason for output in answered] == ["length"] * 4
        assert owed(engines) == [0, 0]


@in_loop
async def test_a_long_prompt_sends_the_next_ones_elsewhere_until_it_is_computed() -> None:
    async with started() as engines:
        waiting = submit(engines, "waiting", [WAIT] * 2000, max_tokens=1)
        others = [submit(engines, f"r{number}", [WAIT], max_tokens=1) for number in range(5)]
        assert held(engines) == [1, 5]
        answering = submit(engines, "answering", [OK] * 50, max_tokens=LONG)
        await anext(answering)
        assert owed(engines) == [2001, 5 * 2 + 256], "its prompt does not count any more"
        for stream in (waiting, answering, *others):
            stream.abort()


@in_loop
async def test_choices_stay_together_and_a_known_prefix_comes_back() -> None:
    async with started(3) as engines:
        prompt = [WAIT, *range(1, 300)]
        group = [request(f"g{n}", prompt, max_tokens=5, group="g") for n in range(4)]
        streams = engines.submit_all(group)
        assert held(engines) == [4, 0, 0]
        assert owed(engines)[0] == 300 + 4 * 5, "one prompt"
        for stream in streams:
            stream.abort()
        for number in range(3):
            again = submit(engines, f"again{number}", [*prompt, 7, number], max_tokens=5)
            assert held(engines) == [1, 0, 0]
            again.abort()
        other = submit(engines, "other", [WAIT, *range(2, 300)], max_tokens=5)
        mine = msgspec.structs.replace(request("salted", prompt, max_tokens=5), cache_salt="mine")
        (salted,) = engines.submit_all([mine])
        assert held(engines) == [0, 1, 1]
        kill(engines, 0)
        await eventually(lambda: engines.replicas[0].state == "restarting")
        await eventually(lambda: engines.replicas[0].state == "ready")
        for stream in (other, salted):
            stream.abort()
        forgotten = submit(engines, "forgotten", prompt, max_tokens=5)
        assert owed(engines)[held(engines).index(1)] == 305, "nobody holds it"
        forgotten.abort()


@in_loop
async def test_without_prefix_caching_there_is_nothing_to_come_back_to() -> None:
    async with started(prefix_caching=False) as engines:
        prompt = [WAIT] * 200
        for wanted in ([1, 0], [0, 1]):
            stream = submit(engines, f"r{wanted}", prompt, max_tokens=5)
            assert held(engines) == wanted
            stream.abort()


@in_loop
async def test_prompts_whose_every_token_is_computed_follow_no_prefix() -> None:
    async with started() as engines:
        prompt = [WAIT] * 200
        submit(engines, "known", prompt, max_tokens=1).abort()
        scoring = submit(engines, "scoring", prompt, max_tokens=1, prompt_logprobs=0)
        assert held(engines) == [0, 1]
        scoring.abort()


# --- full, or not there ------------------------------------------------------------------------------------


@in_loop
async def test_the_next_one_is_tried_and_all_full_is_a_refusal() -> None:
    async with started(max_num_seqs=1, max_waiting=1) as engines:
        group = [request(f"g{n}", [WAIT] * 100, max_tokens=1, group="g") for n in range(2)]
        streams = engines.submit_all(group)
        assert held(engines) == [2, 0]
        engines.check_room()
        # Its prefix is on the first engine, which is full.
        streams += engines.submit_all([request("r0", [WAIT] * 100, max_tokens=1)])
        assert held(engines) == [2, 1]
        before = owed(engines)
        with pytest.raises(QueueFullError) as refused:
            engines.submit_all([request(f"h{n}", [WAIT], max_tokens=1, group="h") for n in range(2)])
        assert refused.value.retry_after_s >= 1
        assert (held(engines), owed(engines)) == ([2, 1], before), "all or none"
        streams += engines.submit_all([request("r1", [WAIT], max_tokens=1)])
        for refuse in (engines.check_room, lambda: submit(engines, "r2", [OK])):
            with pytest.raises(QueueFullError):
                refuse()
        streams[0].abort()
        assert (await ended(submit(engines, "after", [OK], max_tokens=3))).finish_reason == "length"
        for stream in streams:
            stream.abort()


@in_loop
async def test_what_cannot_be_sent_leaves_nothing() -> None:
    async with started() as engines:
        with pytest.raises(OverflowError):
            engines.submit_all([request("good", [OK]), request("bad", [OK], seed=2**70)])
        assert (held(engines), owed(engines)) == ([0, 0], [0, 0])


# --- faults ------------------------------------------------------------------------------------------------


@in_loop
async def test_a_crash_ends_what_that_engine_held_and_nothing_else(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with started(3) as engines:
        streams = [submit(engines, f"r{number}", [OK], max_tokens=LONG) for number in range(6)]
        for stream in streams:
            await anext(stream)
        assert held(engines) == [2, 2, 2]
        kill(engines, 1)
        for number in (1, 4):
            output = await ended(streams[number])
            assert output.finish_reason == "error"
            assert "died" in (output.error or "")
        assert (engines.state, held(engines)) == ("ready", [2, 0, 2])
        assert owed(engines)[1] == 0
        if engines.replicas[1].state == "restarting":
            new = submit(engines, "new", [OK], max_tokens=3)
            assert held(engines)[1] == 0
            assert (await ended(new)).finish_reason == "length"
        for number in (0, 2, 3, 5):
            assert (await anext(streams[number])).finish_reason is None, "goes on"
        await eventually(lambda: engines.replicas[1].state == "ready")
        again = submit(engines, "again", [WAIT], max_tokens=3)
        assert held(engines) == [2, 1, 2], "it has the least to do"
        for stream in (*streams, again):
            stream.abort()
    assert "The engine process of replica 1 ended" in caplog.text
    assert [engine.num_restarts for engine in engines.replicas] == [0, 1, 0]


@in_loop
async def test_with_no_engine_left_requests_are_refused_until_one_is_back() -> None:
    async with started() as engines:
        pids = [engine.pid for engine in engines.replicas]
        for replica in (0, 1):
            kill(engines, replica)
        await eventually(lambda: engines.state == "restarting")
        with pytest.raises(EngineUnavailableError, match="restarting"):
            submit(engines, "r", [OK])
        engines.check_room()  # that it is not ready is another matter
        with pytest.raises(EngineUnavailableError):
            await engines.snapshot()
        await eventually(lambda: engines.state == "ready")
        assert (await ended(submit(engines, "after", [OK], max_tokens=3))).finish_reason == "length"
        await eventually(lambda: all(engine.state == "ready" for engine in engines.replicas))
        assert not {engine.pid for engine in engines.replicas} & set(pids)


@in_loop
async def test_an_engine_that_hangs_is_not_given_more_while_others_have_less(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with started(engine_timeout=2.0) as engines:
        hanging = submit(engines, "hanging", [HANG], max_tokens=100)
        others = [submit(engines, f"r{number}", [WAIT], max_tokens=3) for number in range(5)]
        assert held(engines) == [1, 5]
        for stream in others:
            stream.abort()
        output = await ended(hanging)
        assert output.finish_reason == "error"
        assert "hung" in (output.error or "")
    assert "The engine process of replica 0 has given no sign of life" in caplog.text


# --- start and stop ----------------------------------------------------------------------------------------


@in_loop
async def test_one_that_cannot_load_ends_the_start_and_the_others() -> None:
    engines = scripted(3)
    engines.replicas[1].command = (sys.executable, "-c", "raise SystemExit(9)")
    before = set(psutil.Process().children())
    with pytest.raises(ModelError, match="died while loading"):
        await engines.start()
    assert engines.state == "failed"
    assert not set(psutil.Process().children()) - before
    with pytest.raises(EngineUnavailableError):
        submit(engines, "r", [OK])


@in_loop
async def test_while_one_still_loads_nothing_is_taken_or_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client_module, "_EXIT_TIMEOUT_S", 0.1)
    (tmp_path / "FAULT").touch()  # its load does not end
    engines = scripted()
    engines.replicas[1]._path = tmp_path
    assert (engines.state, engines.model_info) == ("loading", None)
    starting = asyncio.create_task(engines.start())
    await eventually(lambda: engines.replicas[0].state == "ready" and engines.replicas[1].pid is not None)
    processes = [psutil.Process(engine.pid) for engine in engines.replicas]
    assert (engines.state, engines.model_info) == ("loading", None)
    engines.check_room()
    for refused in (engines.submit_all, lambda requests: engines.replicas[1].submit_all(requests)):
        with pytest.raises(EngineUnavailableError, match="loading"):
            refused([request("r", [OK])])
    with pytest.raises(EngineUnavailableError, match="loading"):
        await engines.snapshot()
    starting.cancel()  # as a signal does
    await asyncio.wait({starting})
    assert starting.cancelled()
    assert not any(process.is_running() for process in processes)
    await engines.stop()
    assert engines.state == "stopping"


@in_loop
async def test_a_signal_lets_all_finish_and_stopping_ends_the_rest() -> None:
    async with started() as engines:
        short = [submit(engines, f"s{number}", [OK], max_tokens=30) for number in range(2)]
        long = [submit(engines, f"l{number}", [OK], max_tokens=LONG) for number in range(2)]
        for stream in (*short, *long):
            await anext(stream)
        engines.refuse_new()
        with pytest.raises(EngineUnavailableError, match="stopping"):
            submit(engines, "new", [OK])
        assert [(await ended(stream)).finish_reason for stream in short] == ["length"] * 2
        processes = [psutil.Process(engine.pid) for engine in engines.replicas]
        await engines.stop()
        assert [(await ended(stream)).finish_reason for stream in long] == ["abort"] * 2
        assert engines.state == "stopping"
        assert not any(process.is_running() for process in processes)


# --- what they say -----------------------------------------------------------------------------------------


@in_loop
async def test_a_snapshot_of_all_says_who_holds_what() -> None:
    async with started() as engines:
        streams = [submit(engines, f"r{number}", [WAIT], max_tokens=5) for number in range(2)]
        running = submit(engines, "running", [OK], max_tokens=LONG)
        await anext(running)
        snapshot = await engines.snapshot()
        places = [(one.request_id, one.state, one.replica) for one in snapshot.requests]
        assert places == [("running", "running", 0), ("r0", "waiting", 0), ("r1", "waiting", 1)]
        assert len(snapshot.blocks) == 2 * 64
        assert [snapshot.blocks[:64].count(BlockState.ACTIVE), snapshot.blocks[64:].count(2)] == [2, 1]
        kill(engines, 0)
        await eventually(lambda: engines.replicas[0].state == "restarting")
        snapshot = await engines.snapshot()
        assert [one.request_id for one in snapshot.requests] == ["r1"]
        assert len(snapshot.blocks) == 2 * 64
        for stream in streams:
            stream.abort()


def test_each_process_says_in_its_log_which_it_is(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = tiny_checkpoint("llama", tmp_path)

    async def main() -> list[str | None]:
        config = EngineConfig(model="tiny", kv_cache_memory=2**20)
        engines = EngineReplicas(path, config, 2, log_format="json")
        for engine in engines.replicas:
            engine.command = FAULTY
        await engines.start()
        try:
            streams = [submit(engines, f"r{number}", [OK, RAISE]) for number in range(2)]
            return [(await ended(stream)).error for stream in streams]
        finally:
            await engines.stop()

    assert all(asyncio.run(asyncio.wait_for(main(), 240)))
    records = [json.loads(line) for line in capfd.readouterr().err.splitlines() if line.startswith("{")]
    failed = {record["replica"] for record in records if "planted" in record.get("exception", "")}
    assert failed == {0, 1}
    assert all(record["process"] == "engine" for record in records)


def test_progress_is_of_all_engines() -> None:
    seen: list[tuple[int, int]] = []
    loaded = LoadedTensors(2, lambda done, total: seen.append((done, total)))
    first, second = loaded.of(0), loaded.of(1)
    for done in (1, 2):
        first(done, 2)
    for done in (1, 2):
        second(done, 2)
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_each_engine_draws_its_own_seeds() -> None:
    seeds = [replica_seed(5, replica) for replica in range(50)]
    assert seeds[0] == 5
    assert len(set(seeds)) == 50
    assert seeds == [replica_seed(5, replica) for replica in range(50)]
    assert not set(seeds) & {replica_seed(6, replica) for replica in range(50)}
    assert [replica_seed(None, replica) for replica in range(3)] == [None] * 3
    engines = EngineReplicas(Path(), EngineConfig(model="x", seed=5), 2)
    assert [engine._config.seed for engine in engines.replicas] == seeds[:2]
