"""A replica of several processes: the tokens of one, one end for all, never a wait without an end."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
from fake_runner import request, run, tokens_of
from tiny import tiny_checkpoint

from gqa_serve.config import EngineConfig
from gqa_serve.engine.backends import native_is_built
from gqa_serve.engine.batch import PlanRow, StepPlan
from gqa_serve.engine.core import Engine
from gqa_serve.engine.distributed import replica
from gqa_serve.engine.distributed.replica import OtherRanks, ReplicaRunner, load_runner
from gqa_serve.engine.model_runner import ModelRunner
from gqa_serve.errors import ConfigError, RanksLostError

SETTINGS: dict[str, Any] = {
    "model": "tiny",
    "device": "cpu",
    "backend": "reference",
    "kv_cache_memory": 1 << 20,
    "max_num_seqs": 4,
    "max_num_batched_tokens": 16,
    "seed": 0,
    "threads": 1,
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint("llama", tmp_path_factory.mktemp("tiny"))


def ranks_of_this_process() -> list[psutil.Process]:
    """Those that live, without what other tests have left."""
    return [
        child
        for child in psutil.Process().children()
        if child.status() != psutil.STATUS_ZOMBIE
        and any("distributed.rank" in argument for argument in child.cmdline())
    ]


@pytest.fixture
def runner(tiny: Path) -> Iterator[ReplicaRunner]:
    config = EngineConfig(**SETTINGS, tensor_parallel_size=2)
    made = load_runner(tiny, config)
    assert isinstance(made, ReplicaRunner)
    yield made
    made.close()
    assert ranks_of_this_process() == []


def generated(engine: Engine) -> dict[str, list[int]]:
    shared = [(7 * i) % 60 + 3 for i in range(19)]
    for name, prompt in (("a", shared), ("b", [*shared[:17], 5]), ("c", [9])):
        engine.add(request(name, prompt, max_tokens=6, logprobs=2, seed=3, temperature=0.5))
    return {name: tokens_of(parts) for name, parts in run(engine).items()}


def test_two_processes_generate_what_one_does(tiny: Path, runner: ReplicaRunner) -> None:
    config = EngineConfig(**SETTINGS)
    alone = ModelRunner(tiny, config)
    assert generated(Engine(runner, config)) == generated(Engine(alone, config))
    assert runner.info.num_heads == alone.info.num_heads
    assert runner.info.vocab_size == alone.info.vocab_size
    assert runner.info.kv_bytes_per_token == alone.info.kv_bytes_per_token
    assert runner.info.num_blocks == 2 * alone.info.num_blocks  # each has that memory, for half the heads
    assert alone.info.weight_bytes < runner.info.weight_bytes < 1.1 * alone.info.weight_bytes  # norms, twice


@pytest.mark.skipif(not native_is_built(), reason="the native kernels are not built")
def test_company_changes_no_bit(tiny: Path) -> None:
    config = EngineConfig(**{**SETTINGS, "backend": "native"}, tensor_parallel_size=2, prefix_caching=False)
    made = load_runner(tiny, config)
    assert isinstance(made, ReplicaRunner)

    def numbers(names: str) -> list[tuple[int, str]]:
        engine = Engine(made, config)
        for name in names:
            prompt = [(7 * i) % 60 + 3 for i in range(ord(name) % 40)]
            engine.add(request(name, prompt, max_tokens=8, logprobs=2))
        parts = run(engine)["g"]
        return [(e.token_id, e.logprob.hex()) for part in parts for e in part.logprobs or []]

    alone = numbers("g")
    assert len(alone) == 8
    assert numbers("abgc") == alone
    made.close()


def test_a_restarted_replica_has_the_blocks_it_had(tiny: Path) -> None:
    made = load_runner(tiny, EngineConfig(**SETTINGS, tensor_parallel_size=2), num_blocks=9)
    assert isinstance(made, ReplicaRunner)
    try:
        assert made.info.num_blocks == 9
    finally:
        made.close()


def test_a_rank_that_dies_ends_the_replica(runner: ReplicaRunner) -> None:
    engine = Engine(runner, EngineConfig(**SETTINGS))
    engine.add(request("a", [5, 6, 7], max_tokens=200))
    assert engine.step()
    (rank,) = ranks_of_this_process()
    rank.send_signal(signal.SIGKILL)
    with pytest.raises(RanksLostError, match=rf"rank 1 \(process {rank.pid}\) ended with status -9"):
        run(engine)
    assert ranks_of_this_process() == []
    with pytest.raises(RanksLostError):
        engine.step()


def test_ranks_talk_by_loopback_alone(runner: ReplicaRunner) -> None:
    (rank,) = ranks_of_this_process()
    found = [connection for process in (rank, psutil.Process()) for connection in process.net_connections()]
    assert len(found) >= 2
    assert {connection.laddr.ip for connection in found} == {"127.0.0.1"}


def test_an_interrupt_in_a_step_ends_the_replica(
    runner: ReplicaRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who goes on afterwards must not go on with ranks that are out of step."""
    engine = Engine(runner, EngineConfig(**SETTINGS))

    def interrupt(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(runner._local, "execute", interrupt)
    engine.add(request("a", [5, 6, 7], max_tokens=2))
    with pytest.raises(KeyboardInterrupt):
        engine.step()
    assert ranks_of_this_process() == []
    with pytest.raises(RanksLostError):
        runner.execute(StepPlan([PlanRow([5], 0, [0], 1)]))


def test_what_fails_here_in_a_step_ends_the_replica(
    runner: ReplicaRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine(runner, EngineConfig(**SETTINGS))

    def fail(*args: object) -> None:
        raise MemoryError("planted")

    monkeypatch.setattr(runner._local, "execute", fail)
    engine.add(request("a", [5, 6, 7], max_tokens=2))
    with pytest.raises(RanksLostError, match=r"first rank failed \(MemoryError: planted\)"):
        engine.step()
    assert ranks_of_this_process() == []


def test_a_process_that_does_not_notice_is_told(tiny: Path) -> None:
    """As one that waits in a library which never gives up."""
    told = threading.Event()
    reasons = []

    def note(reason: str) -> None:
        reasons.append(reason)
        told.set()

    made = load_runner(tiny, EngineConfig(**SETTINGS, tensor_parallel_size=2), on_loss=note)
    assert isinstance(made, ReplicaRunner)
    (rank,) = ranks_of_this_process()
    rank.send_signal(signal.SIGKILL)
    assert told.wait(60)
    assert "ended with status -9" in reasons[0]
    made.close()


def test_a_process_that_waits_while_it_leaves_the_group_is_told(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one whose library waits for the others before it lets go."""
    monkeypatch.setattr(replica, "_CLOSE_TIMEOUT_S", 0.1)
    told, let_go = threading.Event(), threading.Event()
    config = EngineConfig(**SETTINGS, tensor_parallel_size=2)
    made = load_runner(tiny, config, on_loss=lambda reason: told.set())
    assert isinstance(made, ReplicaRunner)
    leave = made._group.close
    monkeypatch.setattr(made._group, "close", lambda: (let_go.wait(120), leave()))
    (rank,) = ranks_of_this_process()
    rank.send_signal(signal.SIGKILL)
    with ThreadPoolExecutor(1) as pool:
        step = pool.submit(made.execute, StepPlan([PlanRow([5], 0, [0], 1)]))
        try:
            assert told.wait(60)
            assert not step.done()
        finally:
            let_go.set()
        assert isinstance(step.exception(60), RanksLostError)


def test_a_process_that_is_not_to_be_ended_gets_a_line_in_its_log(
    runner: ReplicaRunner, caplog: pytest.LogCaptureFixture
) -> None:
    (rank,) = ranks_of_this_process()
    rank.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 60
    while "has to be ended" not in caplog.text:
        assert time.monotonic() < deadline, "nothing was said"
        time.sleep(0.05)
    assert "ended with status -9" in caplog.text


def test_a_rank_that_fails_but_cannot_end_is_killed(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As one whose library waits for the other ranks on the way out, while they wait for it."""
    fault = (
        "import atexit, sys, time; import gqa_serve.engine.distributed.rank as rank\n"
        "def fail(runner, orders): orders.next(); raise MemoryError('planted')\n"
        "rank.follow = fail; atexit.register(time.sleep, 600)\n"
        "sys.exit(rank.main(int(sys.argv[1]), int(sys.argv[2])))"
    )
    monkeypatch.setattr(OtherRanks, "command", [sys.executable, "-c", fault])
    monkeypatch.setattr(replica, "_EXIT_TIMEOUT_S", 0.5)
    made = load_runner(tiny, EngineConfig(**SETTINGS, tensor_parallel_size=2))
    assert isinstance(made, ReplicaRunner)
    (rank,) = ranks_of_this_process()
    with ThreadPoolExecutor(1) as pool:
        step = pool.submit(made.execute, StepPlan([PlanRow([5], 0, [0], 1)]))
        try:
            error = step.exception(60)
        finally:
            with contextlib.suppress(psutil.NoSuchProcess):  # as it should be
                rank.kill()
    assert isinstance(error, RanksLostError)
    assert f"rank 1 (process {rank.pid}) failed, did not end, and was killed" in str(error)
    assert ranks_of_this_process() == []


def test_a_rank_that_cannot_start_is_an_error(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(OtherRanks, "command", [sys.executable, "-c", "raise SystemExit(3)"])
    with pytest.raises(RanksLostError, match="ended with status 3"):
        load_runner(tiny, EngineConfig(**SETTINGS, tensor_parallel_size=3))
    assert ranks_of_this_process() == []


def test_a_rank_that_cannot_load_says_why(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fault = (
        "import sys; import gqa_serve.engine.distributed.rank as rank\n"  # which names the process
        "from gqa_serve.errors import ModelError\n"
        "def fail(*args, **more): raise ModelError('The disk of this rank is gone.')\n"
        "rank.%s = fail; sys.exit(rank.main(int(sys.argv[1]), int(sys.argv[2])))"
    )
    for step in ("choose_device", "ModelRunner"):  # before and after the ranks have met
        monkeypatch.setattr(OtherRanks, "command", [sys.executable, "-c", fault % step])
        with pytest.raises(RanksLostError, match="The disk of this rank is gone"):
            load_runner(tiny, EngineConfig(**SETTINGS, tensor_parallel_size=2))
        assert ranks_of_this_process() == []


def test_the_model_must_have_as_many_heads(tmp_path: Path) -> None:
    path = tiny_checkpoint("llama", tmp_path)
    with pytest.raises(ConfigError, match="4 query heads can be divided over 1 to 4 ranks, not 5"):
        load_runner(path, EngineConfig(**SETTINGS, tensor_parallel_size=5))
    assert ranks_of_this_process() == []


def test_tools_that_load_a_model_alone_refuse(tiny: Path) -> None:
    with pytest.raises(ConfigError, match="--tensor-parallel-size is for"):
        ModelRunner(tiny, EngineConfig(**SETTINGS, tensor_parallel_size=2))


def test_ranks_end_with_the_process_that_started_them(tiny: Path) -> None:
    """However it ends."""
    read, write = os.pipe()
    child = os.posix_spawn(
        sys.executable,
        [
            sys.executable,
            "-c",
            "import os, sys, time\n"
            "from pathlib import Path\n"
            "from gqa_serve.config import EngineConfig\n"
            "from gqa_serve.engine.distributed.replica import load_runner\n"
            "runner = load_runner(Path(sys.argv[1]), EngineConfig(model='tiny', device='cpu', "
            "backend='reference', kv_cache_memory=1 << 20, threads=1, tensor_parallel_size=2))\n"
            "os.write(1, b'x')\n"
            "time.sleep(600)\n",
            str(tiny),
        ],
        os.environ,
        file_actions=[(os.POSIX_SPAWN_DUP2, write, 1), (os.POSIX_SPAWN_CLOSE, read)],
    )
    os.close(write)
    try:
        assert os.read(read, 1) == b"x"
        (rank,) = psutil.Process(child).children()
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(read)
    _, alive = psutil.wait_procs([rank], timeout=60)
    assert alive == []
