"""docker/Dockerfile.cpu, built and run: it serves without rights, writes nowhere, and stops in order."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import buildah
import httpx2
import psutil
import pytest
from demo_model import demo_path
from demo_server import RunningServer
from packaging.version import Version
from test_container import pinned

ROOT = Path(__file__).parents[2]
BASE, IMAGE = "localhost/gqa-serve-base", "localhost/gqa-serve:cpu"
SCRATCH = {"/tmp", "/var/tmp", "/run/lock"}  # writable for everybody; with --read-only, /tmp is a tmpfs

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]


@pytest.fixture(scope="module")
def tool() -> Iterator[buildah.Buildah]:
    """buildah, with the image built."""
    if reason := buildah.missing():
        pytest.skip(reason)
    demo_path()
    torch: Version = pinned((ROOT / "constraints.txt").read_text())["torch"][0]
    with buildah.workshop() as tool:
        tool.base(BASE)
        options = buildah.torch_options(str(torch))
        tool.build(ROOT / "docker" / "Dockerfile.cpu", ROOT, IMAGE, BASE_IMAGE=BASE, **options)
        yield tool


@pytest.fixture(scope="module")
def container(tool: buildah.Buildah) -> str:
    return tool("from", IMAGE).strip()


@contextmanager
def serving(tool: buildah.Buildah, container: str) -> Iterator[RunningServer]:
    """The demo model, mounted like a user's own file, served as `docker run IMAGE --model ...` would."""
    environ = ("--env", "GQA_SERVE_HOST=127.0.0.1", "--env", "GQA_SERVE_PORT=0")  # no network of its own here
    mounted = ("--volume", f"{demo_path()}:/models/demo.gguf:ro")
    command = tool.run_words(container, tool.config(IMAGE)["Entrypoint"], *environ, *mounted)
    flags = ("--model", "/models/demo.gguf", "--quantization", "none", "--kv-cache-memory", "512MiB")
    server = RunningServer(*flags, command=command)
    try:
        yield server.ready()
    finally:
        alive = server.process.poll() is None
        left = psutil.Process(server.process.pid).children(recursive=True) if alive else []
        for process in left:
            process.kill()
        psutil.wait_procs(left, timeout=30)
        server.process.wait(timeout=60)
        server._reader.join(timeout=10)


@pytest.fixture(scope="module")
def server(tool: buildah.Buildah, container: str) -> Iterator[RunningServer]:
    with serving(tool, container) as server:
        yield server


def processes(server: RunningServer) -> dict[str, psutil.Process]:
    """tini, the API process and the engine process."""
    below = psutil.Process(server.process.pid).children(recursive=True)
    (tini,) = [process for process in below if process.name() == "tini"]
    (api,) = tini.children()
    (engine,) = api.children()
    return {"tini": tini, "api": api, "engine": engine}


def result(tool: buildah.Buildah, container: str, command: list[str], *options: str) -> Any:
    words = tool.run_words(container, command, *options)
    return subprocess.run(words, capture_output=True, text=True, check=False)


def test_chats(server: RunningServer) -> None:
    answer = server.client().chat.completions.create(
        model="/models/demo.gguf",
        messages=[{"role": "user", "content": "What is the capital of France?"}],
        temperature=0,
        max_tokens=20,
    )
    assert "Paris" in (answer.choices[0].message.content or "")
    assert any("native backend on cpu" in line for line in server.lines)  # the kernels were built


def test_runs_without_rights(server: RunningServer) -> None:
    for process in processes(server).values():
        assert set(process.uids()) | set(process.gids()) == {10001}
        status = Path(f"/proc/{process.pid}/status").read_text()
        assert "CapEff:\t0000000000000000\n" in status


def test_the_health_check_tells_a_server_from_none(
    tool: buildah.Buildah, container: str, server: RunningServer
) -> None:
    kind, *command = tool.config(IMAGE)["Healthcheck"]["Test"]
    assert kind == "CMD"
    port = urlsplit(server.url).port
    assert result(tool, container, command, "--env", f"GQA_SERVE_PORT={port}").returncode == 0
    assert result(tool, container, command, "--env", "GQA_SERVE_PORT=1").returncode != 0


def test_can_write_nowhere_but_to_its_volume(
    tool: buildah.Buildah, container: str, server: RunningServer
) -> None:
    """So that it runs with a read-only root."""
    volumes = set(tool.config(IMAGE)["Volumes"])
    find = [
        "find",
        "/",
        "-xdev",
        "(",
        "-path",
        "/proc",
        "-o",
        "-path",
        "/dev",
        "-o",
        "-path",
        "/sys",
        ")",
        "-prune",
    ]
    found = result(
        tool, container, [*find, "-o", "-writable", "(", "-type", "f", "-o", "-type", "d", ")", "-print"]
    )
    assert set(found.stdout.split()) == volumes | SCRATCH
    root = Path(tool("mount", container).strip())
    assert [path for folder in SCRATCH for path in (root / folder[1:]).iterdir()] == []


def test_is_as_small_as_its_packages(tool: buildah.Buildah, container: str) -> None:
    size, base = tool.size(IMAGE), tool.size(BASE)
    print(f"image: {size / 1e6:,.0f} MB, {base / 1e6:,.0f} MB of it the base")
    assert size - base < 1.2e9
    for absent in ("g++", "cmake", "pip"):
        assert result(tool, container, ["sh", "-c", f"command -v {absent}"]).returncode != 0


def test_a_signal_lets_answers_finish(tool: buildah.Buildah, container: str) -> None:
    body = {
        "model": "/models/demo.gguf",
        "prompt": "x",
        "max_tokens": 200,
        "ignore_eos": True,
        "stream": True,
    }
    with serving(tool, container) as server:
        with httpx2.stream("POST", f"{server.url}/v1/completions", json=body, timeout=120) as response:
            lines = response.iter_lines()
            assert next(lines).startswith("data: ")
            processes(server)["tini"].terminate()
            *_, last, done = [line for line in lines if line]
        assert json.loads(last.removeprefix("data: "))["choices"][0]["finish_reason"] == "length"
        assert done == "data: [DONE]"
        assert server.process.wait(timeout=60) == 0
