"""`gqa-serve --tensor-parallel-size 2` as a process: it answers, survives a rank's death, leaves nothing."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator

import httpx2
import openai
import psutil
import pytest
from demo_server import RunningServer, running

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
ANSWER = "The capital of France is Paris."


@pytest.fixture(scope="module")
def server() -> Iterator[RunningServer]:
    with running("--tensor-parallel-size", "2", "--max-num-seqs", "8") as made:
        yield made


def wait_until_ready(server: RunningServer) -> None:
    deadline = time.monotonic() + 120
    while httpx2.get(f"{server.url}/ready").status_code != 200:
        assert time.monotonic() < deadline, "it did not come back"
        time.sleep(0.1)


def ask(server: RunningServer) -> str | None:
    with server.client() as client:
        answer = client.chat.completions.create(model="demo", messages=QUESTION, temperature=0)
    return answer.choices[0].message.content


def test_it_answers_as_one_process_does(server: RunningServer) -> None:
    assert ask(server) == ANSWER
    assert len(server.engine.children()) == 1


def test_a_killed_rank_ends_streams_with_an_error_and_comes_back(server: RunningServer) -> None:
    (rank,) = server.engine.children()
    with server.client() as client:
        stream = client.chat.completions.create(
            model="demo", messages=QUESTION, stream=True, max_tokens=4000, extra_body={"ignore_eos": True}
        )
        next(iter(stream))
        rank.send_signal(signal.SIGKILL)
        with pytest.raises(openai.APIError, match="died"):
            for _ in stream:
                pass
    wait_until_ready(server)
    assert ask(server) == ANSWER
    assert not rank.is_running() or rank.status() == psutil.STATUS_ZOMBIE
    assert any("rank 1 (process" in line for line in server.lines)


def test_a_killed_engine_takes_its_ranks_along(server: RunningServer) -> None:
    (rank,) = server.engine.children()
    server.engine.send_signal(signal.SIGKILL)
    _, alive = psutil.wait_procs([rank], timeout=60)
    assert alive == []


def test_a_signal_ends_them_all() -> None:
    with running("--tensor-parallel-size", "2", "--max-num-seqs", "8") as server:
        processes = [server.engine, *server.engine.children()]
        assert len(processes) == 2
        assert server.stop() == 0
        _, alive = psutil.wait_procs(processes, timeout=30)
        assert alive == []
