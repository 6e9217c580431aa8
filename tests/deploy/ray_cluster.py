"""A local Ray cluster that serves the demo model, in processes of its own: `Cluster`.

Ray is kept out of pytest's process: what it starts there (threads, signal handlers) stays until the end.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import httpx2
import psutil
from demo_model import demo_path

T = TypeVar("T")

DEADLINE_S = 180
SMALL = {"model": "demo", "kv_cache_memory": "64MiB", "max_num_seqs": 16, "ingress_replicas": 1}
_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # stay on loopback, as it does on those systems
    "RAY_AUTH_MODE": "token",  # else Ray makes a token, and keeps it in the home directory
    "RAY_SERVE_REPLICA_AUTOSCALING_METRIC_PUSH_INTERVAL_S": "0.5",
    "RAY_SERVE_HANDLE_AUTOSCALING_METRIC_PUSH_INTERVAL_S": "0.5",
}


class Cluster:
    """The driver process, and what it prints."""

    def __init__(self, num_cpus: int, temp_dir: str) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        command = [sys.executable, str(Path(__file__).with_name("ray_driver.py")), str(port), str(num_cpus)]
        self.url = f"http://127.0.0.1:{port}"
        self.lines: list[str] = []
        self._answers: queue.Queue[str | None] = queue.Queue()
        self.process = subprocess.Popen(
            [*command, temp_dir],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=os.environ | _ENVIRONMENT | {"RAY_AUTH_TOKEN": secrets.token_hex(32)},
            start_new_session=True,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line)
            if line.startswith("answer "):
                self._answers.put(line.removeprefix("answer "))
        self._answers.put(None)

    def ask(self, **command: Any) -> Any:
        """What the driver answers."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(command) + "\n")
        self.process.stdin.flush()
        answer = self._answers.get(timeout=2 * DEADLINE_S)
        assert answer is not None, "".join(self.lines)
        return json.loads(answer)

    def deploy(self, **settings: Any) -> None:
        """Deploy the demo model, small, with these settings."""
        self.ask(deploy=SMALL | settings)

    def status(self) -> list[dict[str, Any]]:
        """What every engine replica says of itself."""
        found: list[dict[str, Any]] = self.ask(status=True)
        return found

    def client(self) -> httpx2.Client:
        return httpx2.Client(base_url=self.url, timeout=DEADLINE_S)

    def processes(self) -> list[psutil.Process]:
        """All there are, engines included."""
        return psutil.Process(self.process.pid).children(recursive=True)

    def stop(self) -> None:
        """End the cluster. No process of it may be left."""
        processes = self.processes()
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        self.process.wait(timeout=DEADLINE_S)
        self._reader.join(timeout=DEADLINE_S)
        self.process.stdout.close()
        _, left = psutil.wait_procs(processes, timeout=60)
        for process in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        assert not left, left


@contextlib.contextmanager
def cluster(num_cpus: int = 4) -> Iterator[Cluster]:
    demo_path()  # skips where the weights are missing
    temp_dir = tempfile.mkdtemp(prefix="ray-")  # pytest's are too long for the names of sockets
    started = Cluster(num_cpus, temp_dir)
    try:
        yield started
    finally:
        started.stop()
        shutil.rmtree(temp_dir, ignore_errors=True)


def wait_until(what: Callable[[], T], deadline_s: float = DEADLINE_S) -> T:
    """The first true value of `what`."""
    deadline = time.monotonic() + deadline_s
    while not (value := what()):
        assert time.monotonic() < deadline, "this never became true"
        time.sleep(0.1)
    return value
