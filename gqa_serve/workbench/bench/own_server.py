"""A server of our own to measure: started, waited for, stopped, with nothing left behind.

Owns the child process and what it prints. Knows nothing of requests: it hands out an address.
Invariant: when the context ends, by whatever way Python can see (the end, an error, Ctrl-C, SIGTERM, a closed
terminal), the server and its engine process have ended too. After a SIGKILL of ours nothing can.
"""

from __future__ import annotations

import collections
import contextlib
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence

import psutil

from gqa_serve.errors import ConfigError
from gqa_serve.workbench.signals import signals_as_exceptions

READY = "Ready: "
_ERROR = "gqa-serve: error: "
_KEPT_LINES = 40  # of what it printed last, for when it dies
_STOP_S = 15.0
_POLL_S = 0.2


@contextlib.contextmanager
def own_server(flags: Sequence[str], *, quiet: bool = False) -> Iterator[str]:
    """Start `gqa-serve` with these flags on a free port of 127.0.0.1; its base URL, "http://127.0.0.1:4711".

    What it prints while it loads goes to standard error, unless `quiet`. Raises ConfigError with its own
    words if it ends before it is ready, and when leaving the context if it died in between.
    """
    server = _Server(["--host", "127.0.0.1", "--port", "0", *flags], quiet)
    with signals_as_exceptions():
        try:
            yield server.wait_until_ready()
            server.check_alive()
        finally:
            server.stop()


class _Server:
    """The child, in a session of its own: a Ctrl-C in the terminal reaches us alone, and we stop it."""

    def __init__(self, flags: Sequence[str], quiet: bool) -> None:
        self._quiet = quiet
        self._lines: collections.deque[str] = collections.deque(maxlen=_KEPT_LINES)
        self._arrived: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._ready = False
        self._process = subprocess.Popen(
            [sys.executable, "-m", "gqa_serve.cli", *flags],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            errors="replace",
            start_new_session=True,
        )
        self._reader = threading.Thread(target=self._read, name="own server", daemon=True)
        self._reader.start()

    def _read(self) -> None:
        """Everything it prints, to its end, so that it never waits for us."""
        assert self._process.stdout is not None
        with self._process.stdout as pipe:
            for line in pipe:
                self._lines.append(line.rstrip())
                if not self._ready:
                    self._arrived.put(line.rstrip())

    def wait_until_ready(self) -> str:
        """The address of the ready line. Raises ConfigError if the server ends before."""
        began = time.monotonic()
        while True:
            ended = self._process.poll() is not None
            if ended:
                self._reader.join(timeout=_POLL_S)
            try:
                line = self._arrived.get(timeout=_POLL_S)
            except queue.Empty:
                if ended:
                    raise self._died("did not start") from None
                continue
            if line.startswith(READY):
                self._ready = True
                self._tell(f"The server is ready after {time.monotonic() - began:.0f} s.")
                return line.split()[1].removesuffix("/v1")
            self._tell(line)

    def check_alive(self) -> None:
        """Raise ConfigError if it died while it was used."""
        if self._process.poll() is not None:
            self._reader.join(timeout=_POLL_S)
            raise self._died("died while it was measured")

    def stop(self) -> None:
        """End it: ask, and kill it with its children if it doesn't go, or if a second Ctrl-C comes."""
        children = self._children()
        try:
            if self._process.poll() is None:
                self._process.terminate()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self._process.wait(timeout=_STOP_S)
        finally:
            if self._process.poll() is None:
                self._process.kill()
                self._process.wait()
            for child in psutil.wait_procs(children, timeout=1)[1]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    child.kill()
            self._reader.join(timeout=1)

    def _children(self) -> list[psutil.Process]:
        try:
            return psutil.Process(self._process.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            return []

    def _died(self, what: str) -> ConfigError:
        """Its own error, if it told one, else the last lines."""
        lines = list(self._lines)
        told = [line.removeprefix(_ERROR) for line in lines if line.startswith(_ERROR)]
        status = self._process.poll()
        if told:
            return ConfigError(f"The server {what}: {told[-1]}")
        shown = "\n".join(lines) or "(it printed nothing)"
        return ConfigError(f"The server {what} (exit status {status}). It printed:\n{shown}")

    def _tell(self, line: str) -> None:
        if not self._quiet:
            print(line, file=sys.stderr, flush=True)
