"""`gqa-serve --model demo` as a process on loopback: one for all tests that only talk to it, or your own."""

from __future__ import annotations

import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import openai
import psutil
from demo_model import demo_path

START_S = 180


class RunningServer:
    """A gqa-serve process and what it prints."""

    def __init__(self, *flags: str, command: Sequence[str] = (sys.executable, "-m", "gqa_serve.cli")) -> None:
        self.process = subprocess.Popen(
            [*command, *flags],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self.lines: list[str] = []
        self._arrived: queue.Queue[str] = queue.Queue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self.url = ""

    def _read(self) -> None:
        assert self.process.stdout is not None
        with self.process.stdout as pipe:
            for line in pipe:
                self.lines.append(line)
                self._arrived.put(line)

    def wait_for(self, text: str) -> str:
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline:
            try:
                line = self._arrived.get(timeout=0.2)
            except queue.Empty:
                assert self.process.poll() is None, "".join(self.lines)
                continue
            if text in line:
                return line
        raise AssertionError(f"never printed {text!r}: {''.join(self.lines)}")

    def ready(self) -> RunningServer:
        self.url = self.wait_for("Ready: ").split()[1].removesuffix("/v1")
        return self

    @property
    def engine(self) -> psutil.Process:
        (child,) = self.engines
        return child

    @property
    def engines(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children()

    def client(self, **options: object) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="unused", max_retries=0, **options)

    def stop(self, sig: int = signal.SIGTERM) -> int:
        """Send a signal; the exit status."""
        self.process.send_signal(sig)
        status = self.process.wait(timeout=120)
        self._reader.join(timeout=10)
        return status


@contextmanager
def running(*flags: str, wait: bool = True) -> Iterator[RunningServer]:
    demo_path()  # skips where the weights are missing
    # Exact weights, so that every backend gives the one answer.
    exact = ("--quantization", "none", "--kv-cache-memory", "512MiB")
    server = RunningServer("--model", "demo", "--port", "0", *exact, *flags)
    try:
        yield server.ready() if wait else server
    finally:
        if server.process.poll() is None:
            children = psutil.Process(server.process.pid).children()
            server.process.kill()
            server.process.wait()
            psutil.wait_procs(children, timeout=30)
        server._reader.join(timeout=10)
