"""`own_server`: the address of a running server, its own words when it fails, and nothing left behind."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx2
import psutil
import pytest
from demo_model import demo_path

from gqa_serve.errors import ConfigError
from gqa_serve.workbench.bench.own_server import own_server

_FLAGS = ("--model", "demo", "--kv-cache-memory", "64MiB", "--max-model-len", "512")
# Prints the address and the pids of the server's processes, then is stopped by a signal.
_USER = f"""
import psutil, signal, time
from gqa_serve.cli import main
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background job ignores
from gqa_serve.workbench.bench import own_server
with own_server.own_server({_FLAGS!r}) as url:
    print(url, *[child.pid for child in psutil.Process().children(recursive=True)], flush=True)
    time.sleep(600)
"""


def children() -> set[psutil.Process]:
    """Of this process, those of other tests' servers included."""
    return set(psutil.Process().children(recursive=True))


def test_it_yields_an_address_that_answers_and_leaves_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    demo_path()
    before = children()
    with own_server(_FLAGS) as url:
        processes = children() - before
        assert url.startswith("http://127.0.0.1:")
        assert httpx2.get(f"{url}/v1/models", timeout=10).json()["data"][0]["id"] == "demo"
    assert len(processes) == 2  # API and engine
    assert not [process for process in processes if process.is_running()]
    shown = capfd.readouterr()
    assert "Loading" in shown.err
    assert "ready after" in shown.err
    assert not shown.out


def test_its_own_error_is_ours(tmp_path: Path) -> None:
    with (
        pytest.raises(ConfigError, match=rf"^The server did not start: .*{tmp_path.name}"),
        own_server(["--model", str(tmp_path)], quiet=True),
    ):
        pass


def test_an_unknown_flag_is_told() -> None:
    with (
        pytest.raises(ConfigError, match=r"did not start: .*Did you mean --max-model-len\?"),
        own_server(["--model", "demo", "--max-model-length", "1"], quiet=True),
    ):
        pass


def use_and_kill() -> None:
    before = children()
    with own_server(_FLAGS, quiet=True):
        (server,) = [child for child in children() - before if "gqa_serve.cli" in child.cmdline()]
        server.kill()
        server.wait()


def test_a_server_that_dies_meanwhile_is_an_error() -> None:
    demo_path()
    with pytest.raises(ConfigError, match="died while it was measured"):
        use_and_kill()


@pytest.mark.parametrize(
    "sig",
    [
        signal.SIGINT,
        pytest.param(signal.SIGTERM, marks=pytest.mark.slow),
        pytest.param(signal.SIGHUP, marks=pytest.mark.slow),
    ],
)
def test_a_signal_takes_the_server_with_us(sig: signal.Signals) -> None:
    demo_path()
    with subprocess.Popen(
        [sys.executable, "-c", _USER], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as user:
        assert user.stdout is not None
        words = user.stdout.readline().split()
        pids = [int(word) for word in words[1:]]
        assert len(pids) == 2
        user.send_signal(sig)
        try:
            assert user.wait(timeout=60) != 0
        finally:
            user.kill()  # else leaving the block waits for it
    deadline = time.monotonic() + 30
    while any(map(psutil.pid_exists, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not [pid for pid in pids if psutil.pid_exists(pid)]
    with pytest.raises(httpx2.TransportError):
        httpx2.get(words[0], timeout=5)


def test_signal_handlers_are_put_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(ConfigError), own_server(["--nonsense"], quiet=True):
        pass
    assert signal.getsignal(signal.SIGTERM) is before
