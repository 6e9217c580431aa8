"""A soak: mixed traffic, clients that leave anywhere, and faults, for as long as you like; then a report.

    python tests/soak --minutes 30

Starts a server of its own (`soak_server.py`), keeps `--clients` busy with requests of all kinds, and demands
of every one that it ends as what was done to it allows; of known prompts, that their text is the same each
time; at the end, that nothing is left running, no block is lost, no memory is gained. Exits with 1 if not.
Owns the clients' loop, the faults and the verdict; `--seed` repeats what each client asks for, in order.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import queue
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
from soak_client import POINTS, Answer, Manner, exchange
from soak_report import Findings
from soak_server import PLANTED
from soak_traffic import Asked, bad_requests, known_requests, other_requests, stream_end, texts_of, was_cut

START_S = 180.0
WARM_REQUESTS = 1000  # until caches and memory pools have the size that they keep
FAULT_LASTS_S = 10.0  # from a planted exception to the step that meets it, at most
MET = ("planted", "Memory ran out")  # what the log says of that step
SERVER = [
    "--model", "demo", "--port", "0", "--log-level", "info", "--kv-cache-memory", "128MiB",
    "--max-num-seqs", "24", "--max-waiting", "24", "--drain-timeout", "10",
    "--max-stored-responses", "50",
]  # fmt: skip


class Server:
    """The server's processes, and the lines it prints."""

    def __init__(self, flags: list[str]) -> None:
        command = [sys.executable, str(Path(__file__).with_name("soak_server.py")), *SERVER, *flags]
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
        )
        self.api = psutil.Process(self.process.pid)
        self.lines: list[str] = []
        self._ready: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()
        line = self._ready.get(timeout=START_S)
        if not line:
            raise RuntimeError("The server did not start:\n" + "".join(self.lines[-30:]))
        self.host, _, port = line.split()[1].removesuffix("/v1").removeprefix("http://").partition(":")
        self.port = int(port)

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("Ready: "):
                self._ready.put(line)
            elif len(self.lines) < 200_000:
                self.lines.append(line)
        self._ready.put("")

    def engine(self) -> psutil.Process | None:
        """The engine process, if there is one now."""
        children = self.api.children()
        return children[0] if children else None

    def stop(self) -> int:
        """Ask it to stop; the exit status."""
        self.process.terminate()
        try:
            return self.process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return self.process.wait()


@contextlib.contextmanager
def running(flags: list[str]) -> Iterator[Server]:
    server = Server(flags)
    try:
        yield server
    finally:
        if server.process.poll() is None:
            children = server.api.children()
            server.process.kill()
            server.process.wait()
            psutil.wait_procs(children, timeout=30)


class Soak:
    """One run."""

    def __init__(self, server: Server, args: argparse.Namespace) -> None:
        self.server = server
        self.args = args
        self.findings = Findings()
        self.known: dict[str, dict[int, str]] = {}
        self.asked_for_known = known_requests()[: args.known]
        self.bad = bad_requests(server.host)
        self.disturbed: list[list[float]] = []  # [from, to], when a fault may have touched a request
        self.stopping = asyncio.Event()

    # --- one request ---------------------------------------------------------------------------------------

    async def ask(self, asked: Asked, manner: Manner, rng: random.Random) -> Answer:
        began = time.monotonic()
        request = asked.to_bytes(self.server.host, self.server.port)
        answer = await exchange(self.server.host, self.server.port, request, manner, rng)
        touched = any(start <= time.monotonic() and end >= began for start, end in self.disturbed)
        end, problem = self._judge(asked, manner, answer, touched)
        self.findings.ends[asked.kind][end] += 1
        if problem:
            when = time.strftime("%H:%M:%S")
            self.findings.failures.append(f"{when} {asked.kind}, {manner}: {problem}")
        if end == "complete" and not manner.slow and not touched:
            times = self.findings.times[asked.kind]
            times["total"].append(answer.total_s)
            if answer.first_s is not None:
                times["first"].append(answer.first_s)
            times["gap"] += answer.gaps_s
        return answer

    def _judge(self, asked: Asked, manner: Manner, answer: Answer, touched: bool) -> tuple[str, str | None]:
        """How it ended, and what is wrong with that, if anything is."""
        if answer.ended == "left":
            return "client left", None
        if answer.ended != "whole":
            if manner.leaves is not None and answer.ended == "cut":
                return "client left", None  # the server was faster to close
            return answer.ended, f"ended {answer.ended!r} with status {answer.status}"
        if answer.status == 429 or (answer.status in (500, 503) and touched):
            return f"status {answer.status}", None
        if answer.status not in asked.statuses:
            return f"status {answer.status}", f"status {answer.status}: {answer.body[:300]!r}"
        if answer.status != 200:
            return f"refused {answer.status}", None
        if answer.body.startswith((b"data:", b"event:", b":")):
            end = stream_end(answer.body)
            if end != "complete":
                return end, None if touched and end == "error event" else f"{end}: {answer.body[-300:]!r}"
        end = "cut short" if asked.check is not None and was_cut(answer.body) else "complete"
        return end, self._wrong_text(asked, answer)

    def _wrong_text(self, asked: Asked, answer: Answer) -> str | None:
        try:
            texts = texts_of(answer.body)
            if asked.check is not None and not was_cut(answer.body) and not asked.check(texts):
                return f"the wrong form: {texts!r}"
        except (ValueError, KeyError, IndexError) as error:
            return f"{error!r} in {answer.body[:300]!r}"
        if asked.known is None:
            return None
        before = self.known.setdefault(asked.known, texts)
        return None if before == texts else f"{texts!r} instead of {before!r}"

    # --- clients -------------------------------------------------------------------------------------------

    async def client(self, number: int) -> None:
        """Ask until the end."""
        rng = random.Random(f"{self.args.seed} {number}")
        while not self.stopping.is_set():
            answer = await self.ask(self._choose(rng), self._manner(rng), rng)
            if answer.status in (429, 503) or answer.ended == "refused":
                await asyncio.sleep(rng.uniform(0.1, 1.0))
            elif rng.random() < 0.1:
                await asyncio.sleep(rng.uniform(0.0, 1.0))

    def _choose(self, rng: random.Random) -> Asked:
        dice = rng.random()
        if dice < 0.15:
            return rng.choice(self.bad)
        if dice < 0.55:
            return rng.choice(self.asked_for_known)
        return rng.choice(other_requests(rng))

    def _manner(self, rng: random.Random) -> Manner:
        dice = rng.random()
        if dice < 0.25:
            return Manner(leaves=rng.choice(POINTS), by=rng.choice(("fin", "rst", "half")))
        return Manner(slow=dice < 0.32)

    # --- faults, memory, progress --------------------------------------------------------------------------

    async def faults(self) -> None:
        """One after another, each when the last is over."""
        rng = random.Random(f"{self.args.seed} faults")
        kinds = [*PLANTED, "killed", *(["hung"] if self.args.hang else [])]
        await asyncio.sleep(self.args.fault_every / 2)
        number = 0
        while not self.stopping.is_set():
            engine = self.server.engine()
            kind = kinds[number % len(kinds)]
            if engine is not None:
                number += 1
                self.findings.faults[kind] += 1
                await self._inject(kind, engine)
            await asyncio.sleep(rng.uniform(0.5, 1.5) * self.args.fault_every)

    async def _inject(self, kind: str, engine: psutil.Process) -> None:
        span = [time.monotonic(), float("inf")]
        self.disturbed.append(span)
        if kind in PLANTED:
            before = self._num_met()
            engine.send_signal(PLANTED[kind][0])
            while self._num_met() == before and time.monotonic() < span[0] + FAULT_LASTS_S:
                await asyncio.sleep(0.1)
        else:
            engine.send_signal(signal.SIGSTOP if kind == "hung" else signal.SIGKILL)
            await asyncio.to_thread(engine.wait, START_S)
            await self.until_ready()
        span[1] = time.monotonic()

    def _num_met(self) -> int:
        return sum(any(met in line for met in MET) for line in self.server.lines)

    async def until_ready(self) -> None:
        """Wait until the server takes requests. Raises TimeoutError."""
        deadline = time.monotonic() + START_S
        while (await self.get("/ready"))[0] != 200:
            if time.monotonic() > deadline:
                raise TimeoutError("The server never became ready again.")
            await asyncio.sleep(0.1)

    async def get(self, path: str) -> tuple[int, bytes]:
        """Status and body."""
        request = f"GET {path} HTTP/1.1\r\nHost: {self.server.host}\r\nConnection: close\r\n\r\n".encode()
        answer = await exchange(self.server.host, self.server.port, request, Manner(), random.Random(0))
        return answer.status, answer.body

    async def watch(self, seconds: float) -> None:
        """Sample memory and tell how it goes, until the time is over."""
        findings = self.findings
        warm_after = min(120.0, 0.2 * seconds)
        interactive = sys.stderr.isatty()
        while (spent := time.monotonic() - findings.began_s) < seconds:
            if findings.warm_s is None and spent >= warm_after and findings.num_requests >= WARM_REQUESTS:
                findings.warm_s = time.monotonic()
            findings.sample(self.server.api, self.server.engine())
            if self.server.process.poll() is not None:
                raise RuntimeError("The server is gone:\n" + "".join(self.server.lines[-30:]))
            if interactive:
                held = findings.samples[-1].api / 2**20
                line = f"{spent:5.0f} of {seconds:.0f} s, {findings.num_requests} requests, "
                line += f"{sum(findings.faults.values())} faults, API {held:.0f} MiB, "
                print(f"\r{line}{len(findings.failures)} failures ", end="", file=sys.stderr, flush=True)
            await asyncio.sleep(1)
        if interactive:
            print(file=sys.stderr)

    # --- the whole -----------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Learn the known texts in calm, then everything at once, then look at what is left."""
        rng = random.Random(0)
        for asked in self.asked_for_known:
            await self.ask(asked, Manner(), rng)
        self.findings.began_s = time.monotonic()
        seconds = self.args.minutes * 60
        clients = [asyncio.create_task(self.client(number)) for number in range(self.args.clients)]
        faults = asyncio.create_task(self.faults())
        await self.watch(seconds)
        self.stopping.set()
        await asyncio.gather(*clients)
        faults.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await faults
        await self._aftermath(rng)

    async def _aftermath(self, rng: random.Random) -> None:
        """Nothing is under way any more, and the same requests still give the same texts."""
        await self.until_ready()
        failures = self.findings.failures
        deadline = time.monotonic() + 30
        while (
            load := json.loads((await self.get("/load"))[1])["server_load"]
        ) and time.monotonic() < deadline:
            await asyncio.sleep(0.1)
        if load:
            failures.append(f"{load} requests are still under way after the last client left.")
        for asked in self.asked_for_known[:8]:
            await self.ask(asked, Manner(), rng)
        await self._gauges()
        self.findings.judge_memory()
        tracebacks = sum("Traceback" in line for line in self.server.lines)
        planted = sum("planted" in line for line in self.server.lines)
        self.findings.notes["tracebacks in the log"] = tracebacks
        if tracebacks > planted:
            failures.append(f"The log holds {tracebacks} tracebacks, {planted} of them planted.")

    async def _gauges(self) -> None:
        """What /metrics says of an idle server: nothing runs, nothing waits, every block is free."""
        status, body = await self.get("/metrics")
        if status != 200:
            self.findings.notes["metrics"] = f"GET /metrics answers {status}"
            return
        values = {}
        for line in body.decode().splitlines():
            name, _, value = line.rpartition(" ")
            values[name.partition("{")[0].removeprefix("gqa_serve_").removeprefix("gqa_serve:")] = value
        shown = {name: values.get(name) for name in ("num_requests_running", "num_requests_waiting")}
        shown["kv_cache_usage_perc"] = values.get("kv_cache_usage_perc")
        self.findings.notes["gauges at the end"] = shown
        for name, value in shown.items():
            if value is None or float(value) != 0:
                self.findings.failures.append(f"{name} is {value} though nothing is under way.")


def main() -> int:
    """0 if all went as promised."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--clients", type=int, default=40)
    parser.add_argument("--seed", default="soak")
    parser.add_argument("--fault-every", type=float, default=45.0, help="mean seconds between two faults")
    parser.add_argument("--known", type=int, help="how many of the known prompts to use; default: all")
    parser.add_argument("--hang", action="store_true", help="let the engine process hang, too")
    parser.add_argument("--json", type=Path, help="write the report there, too")
    parser.add_argument("--log", type=Path, help="write what the server printed there")
    parser.add_argument("server", nargs="*", help="more flags of the server, after --")
    args = parser.parse_args()
    flags = [*args.server, *(["--engine-timeout", "30"] if args.hang else [])]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # as Ctrl-C does: take the server along
    with running(flags) as server:
        soak = Soak(server, args)
        try:
            asyncio.run(soak.run())
            if (status := server.stop()) != 0:
                soak.findings.failures.append(f"The server's exit status is {status}.")
        except (RuntimeError, TimeoutError) as error:
            soak.findings.failures.append(str(error))
        finally:
            if args.log:
                args.log.write_text("".join(server.lines), encoding="utf-8")
    print(soak.findings.text())
    if args.json:
        soak.findings.write(args.json)
    return 0 if not soak.findings.failures else 1


if __name__ == "__main__":
    os.environ.setdefault("PYTHONUNBUFFERED", "1")
    sys.exit(main())
