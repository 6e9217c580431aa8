"""The real thing: `gqa-serve --model demo` as a process, real clients, real signals."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import httpx2
import openai
import psutil
import pytest
from demo_model import demo_path
from demo_server import START_S, RunningServer, running

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
ANSWER = "The capital of France is Paris."


def eventually(condition: Callable[[], bool], timeout_s: float = 60) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.05)


@pytest.fixture
def server(demo_server: RunningServer) -> RunningServer:
    return demo_server


def test_the_ready_line_holds_a_command_that_works(server: RunningServer) -> None:
    line = next(line for line in server.lines if line.startswith("Ready: "))
    command = line[line.index("curl ") :].strip()
    result = subprocess.run(["sh", "-c", command], capture_output=True, text=True, timeout=120, check=True)
    assert json.loads(result.stdout)["choices"][0]["message"]["content"]


def test_chat_whole_and_streamed(server: RunningServer) -> None:
    with server.client() as client:
        whole = client.chat.completions.create(model="demo", messages=QUESTION, temperature=0)
        assert whole.choices[0].message.content == ANSWER
        assert whole.choices[0].finish_reason == "stop"
        stream = client.chat.completions.create(
            model="demo",
            messages=QUESTION,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
        chunks = list(stream)
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == ANSWER
    assert chunks[-1].usage is not None
    assert whole.usage is not None
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert chunks[-1].usage.prompt_tokens_details is not None
    assert chunks[-1].usage.prompt_tokens_details.cached_tokens > 0


def test_thirty_two_at_once_answer_as_each_does_alone(server: RunningServer) -> None:
    topics = ["Mars", "rain", "bread", "Rome", "cats", "gold", "chess", "tea"]
    questions = [[{"role": "user", "content": f"Say something about {topic}."}] for topic in topics] * 4

    async def ask(client: openai.AsyncOpenAI, number: int) -> str:
        options = {"model": "demo", "messages": questions[number], "temperature": 0, "max_tokens": 24}
        if number % 2:
            stream = await client.chat.completions.create(**options, stream=True)
            return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])
        answer = await client.chat.completions.create(**options)
        return answer.choices[0].message.content or ""

    async def ask_all() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="x", max_retries=0) as client:
            return await asyncio.gather(*(ask(client, number) for number in range(32)))

    together = asyncio.run(ask_all())
    with server.client() as client:
        for number in range(8):
            alone = client.chat.completions.create(
                model="demo", messages=questions[number], temperature=0, max_tokens=24
            )
            assert together[number] == alone.choices[0].message.content
            assert together[number::8] == [together[number]] * 4


def test_completions_score_a_prompt(server: RunningServer) -> None:
    with server.client() as client:
        scored = client.completions.create(
            model="demo", prompt="The capital of France is Paris", max_tokens=0, echo=True, logprobs=1
        )
    choice = scored.choices[0]
    assert choice.text == "The capital of France is Paris"
    assert choice.logprobs is not None
    assert choice.logprobs.token_logprobs is not None
    assert choice.logprobs.token_logprobs[0] is None
    assert choice.logprobs.token_logprobs[-1] > -2


def test_seeded_choices_repeat_and_differ(server: RunningServer) -> None:
    with server.client() as client:
        answers = [
            client.chat.completions.create(
                model="demo", messages=QUESTION, n=3, seed=5, temperature=1, max_tokens=12
            )
            for _ in range(2)
        ]
    first, second = ([choice.message.content for choice in answer.choices] for answer in answers)
    assert first == second
    assert len(set(first)) > 1


def test_system_routes(server: RunningServer) -> None:
    with httpx2.Client(base_url=server.url) as http:
        assert http.get("/health").json() == {"status": "ok"}
        assert http.get("/ready").status_code == 200
        assert http.get("/version").json()["version"]
        (model,) = http.get("/v1/models").json()["data"]
        assert (model["id"], model["max_model_len"]) == ("demo", 8192)
        assert http.get("/v1/models/other").json()["error"]["code"] == "model_not_found"


def test_a_client_that_leaves_frees_its_place() -> None:
    with running("--max-num-seqs", "1") as server, server.client(timeout=60) as client:
        endless = {
            "model": "demo",
            "messages": QUESTION,
            "max_tokens": 8000,
            "extra_body": {"ignore_eos": True},
        }
        stream = client.chat.completions.create(**endless, stream=True)
        next(iter(stream))
        stream.close()
        answer = client.chat.completions.create(model="demo", messages=QUESTION, temperature=0)
        assert answer.choices[0].message.content == ANSWER
        with server.client(timeout=1.5) as impatient, pytest.raises(openai.APITimeoutError):
            impatient.chat.completions.create(**endless)
        answer = client.chat.completions.create(model="demo", messages=QUESTION, temperature=0)
        assert answer.choices[0].message.content == ANSWER


def test_a_killed_engine_ends_streams_with_an_error_and_comes_back() -> None:
    with running() as server, server.client() as client:
        stream = client.chat.completions.create(
            model="demo", messages=QUESTION, stream=True, max_tokens=4000, extra_body={"ignore_eos": True}
        )
        chunks = iter(stream)
        next(chunks)
        server.engine.kill()
        with pytest.raises(openai.APIError, match="died"):
            for _ in chunks:
                pass
        assert httpx2.get(f"{server.url}/ready").status_code == 503
        with pytest.raises(openai.InternalServerError) as refused:
            client.chat.completions.create(model="demo", messages=QUESTION)
        assert refused.value.status_code == 503
        assert refused.value.response.headers["retry-after"]
        eventually(lambda: httpx2.get(f"{server.url}/ready").status_code == 200)
        answer = client.chat.completions.create(model="demo", messages=QUESTION, temperature=0)
        assert answer.choices[0].message.content == ANSWER


def test_keys_and_a_path_prefix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GQA_SERVE_API_KEY", "sk-from-environment")
    file = tmp_path / "keys"
    file.write_text("sk-from-file\n")
    flags = ("--api-key-file", str(file), "--root-path", "/llm", "--log-level", "debug")
    with running(*flags) as server:
        assert any('-H "Authorization: Bearer $API_KEY"' in line for line in server.lines)
        for key in ("sk-from-environment", "sk-from-file"):
            with openai.OpenAI(base_url=f"{server.url}/llm/v1", api_key=key, max_retries=0) as client:
                assert client.chat.completions.create(model="demo", messages=QUESTION, max_tokens=2).choices
        with server.client() as client, pytest.raises(openai.AuthenticationError):
            client.models.list()
        assert httpx2.get(f"{server.url}/llm/openapi.json").json()["servers"] == [{"url": "/llm"}]
        assert server.stop() == 0
    assert "sk-" not in "".join(server.lines)


def test_a_missing_key_file_is_said_before_the_model_is_looked_for() -> None:
    command = [sys.executable, "-m", "gqa_serve.cli", "--model", "/nowhere", "--api-key-file", "/none"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=START_S, check=False)
    assert result.returncode == 1
    assert result.stderr == "gqa-serve: error: --api-key-file /none: No such file or directory.\n"


@pytest.mark.parametrize("sig", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_lets_streams_finish_and_exits_with_0(sig: int) -> None:
    with running() as server, server.client() as client:
        engine = server.engine
        stream = client.chat.completions.create(
            model="demo", messages=QUESTION, stream=True, max_tokens=40, extra_body={"ignore_eos": True}
        )
        chunks = iter(stream)
        next(chunks)
        os.killpg(server.process.pid, sig)  # as a terminal or a service manager does: the whole group
        reasons = [chunk.choices[0].finish_reason for chunk in chunks]
        assert reasons[-1] == "length"
        assert server.process.wait(timeout=60) == 0
        assert not engine.is_running()
        assert "Traceback" not in "".join(server.lines)


def test_what_the_drain_timeout_cuts_still_gets_an_error() -> None:
    with running("--drain-timeout", "1") as server, server.client() as client:
        endless = {
            "model": "demo",
            "messages": QUESTION,
            "max_tokens": 8000,
            "extra_body": {"ignore_eos": True},
        }
        whole: list[openai.APIStatusError] = []

        def ask_whole() -> None:
            with pytest.raises(openai.InternalServerError) as caught:
                client.chat.completions.create(**endless)
            whole.append(caught.value)

        asking = threading.Thread(target=ask_whole)
        asking.start()
        body = {"model": "demo", "prompt": "x", "max_tokens": 8000, "ignore_eos": True, "stream": True}
        with httpx2.stream("POST", f"{server.url}/v1/completions", json=body, timeout=60) as stream:
            lines = stream.iter_lines()
            next(lines)
            server.process.send_signal(signal.SIGTERM)
            events = [line for line in lines if line]
        asking.join(timeout=30)
        assert events[-1] == "data: [DONE]"
        error = json.loads(events[-2].removeprefix("data: "))["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert whole[0].status_code == 503
        assert server.process.wait(timeout=30) == 0
        assert "Traceback" not in "".join(server.lines)


def test_an_engine_whose_server_was_killed_ends_itself() -> None:
    with running() as server:
        engine = server.engine
        server.process.kill()
        eventually(lambda: not engine.is_running())


def test_a_second_signal_does_not_wait() -> None:
    with running("--drain-timeout", "300") as server, server.client() as client:
        stream = client.chat.completions.create(
            model="demo", messages=QUESTION, stream=True, max_tokens=8000, extra_body={"ignore_eos": True}
        )
        next(iter(stream))
        server.process.send_signal(signal.SIGINT)
        server.wait_for("Stopping")
        server.process.send_signal(signal.SIGINT)
        assert server.process.wait(timeout=30) == 0


def test_the_port_answers_503_while_the_model_loads() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with running("--port", str(port), wait=False) as server:
        url = f"http://127.0.0.1:{port}"

        def answers() -> bool:
            try:
                httpx2.get(f"{url}/health")
            except httpx2.ConnectError:
                return False
            return True

        eventually(answers, START_S)
        response = httpx2.post(f"{url}/v1/completions", json={"model": "demo", "prompt": "x"})
        assert httpx2.get(f"{url}/health").status_code == 503
        assert response.status_code == 503
        assert response.json()["error"]["code"] == "engine_unavailable"
        server.ready()
        assert httpx2.get(f"{url}/health").status_code == 200


def test_a_signal_while_the_model_loads_exits_with_0() -> None:
    with running("--log-level", "info", wait=False) as server:
        server.wait_for("Loading")
        eventually(lambda: bool(psutil.Process(server.process.pid).children()), 30)
        engine = server.engine
        assert server.stop() == 0
        assert not engine.is_running()
        assert not any("error" in line or "Traceback" in line for line in server.lines)


def test_a_damaged_file_is_one_sentence_and_status_1(tmp_path: Path) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(demo_path().read_bytes()[:5_000_000])
    result = subprocess.run(
        [sys.executable, "-m", "gqa_serve.cli", "--model", str(broken), "--port", "0"],
        capture_output=True,
        text=True,
        timeout=START_S,
        check=False,
    )
    assert result.returncode == 1
    assert result.stderr.strip().splitlines()[-1].startswith("gqa-serve: error: ")
    assert "Traceback" not in result.stderr
