"""A whole model over several ranks, as its first rank holds it: `load_runner`, `ReplicaRunner`.

    first rank (schedules, samples)          the others
    Execute(plan) ------- sockets ------->   execute(plan)
    execute(plan) <------ RankGroup ----->   twice per layer: sums
    Logits(rows), hidden ---------------->   logits of their part of the vocabulary
    logits        <------ RankGroup -----    joined

Owns the processes of the other ranks: it starts and ends them, and sees it when one dies. Knows no requests.
Invariants: ranks do the same in the same order; a rank that dies, or a failure here between an order and its
end, is the end of the replica (`RanksLostError`), never a wait without an end; no rank outlives the first.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import socket
import subprocess
import sys
import tempfile
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import msgspec
import torch

from gqa_serve.config import EngineConfig, adopt_loopback, engine_environment
from gqa_serve.engine.batch import StepPlan
from gqa_serve.engine.core import Runner
from gqa_serve.engine.distributed.group import RankGroup
from gqa_serve.engine.distributed.orders import (
    Execute,
    Here,
    Join,
    Load,
    Logits,
    Order,
    Reader,
    framed,
    report_decoder,
)
from gqa_serve.engine.model_runner import ModelRunner, OnTensor, choose_device
from gqa_serve.engine.placement import ALONE, Placement
from gqa_serve.engine.request import ModelInfo
from gqa_serve.engine.sampler import RowOperations
from gqa_serve.errors import GqaServeError, RanksLostError

logger = logging.getLogger(__name__)

_GRACE_S = 5.0  # for this process to see by itself that a rank is gone, and to say why, before `on_loss`
_EXIT_TIMEOUT_S = 5.0
_CLOSE_TIMEOUT_S = 30.0  # for `OtherRanks.close` after a loss, which may wait in a library, before `on_loss`

Log = tuple[str, str]
"""Level and format."""


def _warn(reason: str) -> None:
    """All that can be done for a process that is not ours to end."""
    logger.error("%s If this process waits for that rank, it has to be ended.", reason)


def load_runner(
    path: Path,
    config: EngineConfig,
    on_tensor: OnTensor | None = None,
    *,
    placement: Placement = ALONE,
    num_blocks: int | None = None,
    log: Log = ("warning", "text"),
    on_loss: Callable[[str], None] = _warn,
) -> Runner:
    """The model at `path`, over as many processes as `config` says; raises as `ModelRunner` does.

    `placement` is this process's among replicas, `num_blocks` as in `ModelRunner`. `on_loss` is called, from
    another thread, with a sentence when a rank has died and this process, which may wait for it, did not
    notice; without it the sentence is a line of the log.
    """
    if config.tensor_parallel_size == 1:
        return ModelRunner(path, config, on_tensor, placement=placement, num_blocks=num_blocks)
    placement = msgspec.structs.replace(placement, num_ranks=config.tensor_parallel_size)
    return ReplicaRunner(path, config, on_tensor, placement, num_blocks, log, on_loss)


class ReplicaRunner:
    """`Runner` (core.py) of a model over several ranks, of which this process is the first.

    It ends the others when it is closed or collected, or when the process ends.
    """

    def __init__(
        self,
        path: Path,
        config: EngineConfig,
        on_tensor: OnTensor | None,
        placement: Placement,
        num_blocks: int | None,
        log: Log,
        on_loss: Callable[[str], None],
    ) -> None:
        device = choose_device(config.device, placement=placement)
        self._others = OtherRanks(on_loss)
        self._finalizer = weakref.finalize(self, self._others.close)
        adopt_loopback()  # of this process, and so of those that it starts
        with self._others.needed("load the model"):
            with tempfile.TemporaryDirectory(prefix="gqa-serve-") as folder:
                meeting = Path(folder) / "ranks"
                for rank in range(1, placement.num_ranks):
                    place = msgspec.structs.replace(placement, rank=rank)
                    self._others.start(Join(config, place, str(meeting), *log))
                self._others.wait_for_all()
                group = RankGroup(meeting, 0, placement.num_ranks, device, exact=config.deterministic)
            self._others.group = group
            self._others.tell(Load(str(path), num_blocks))
            self._local = ModelRunner(
                path, config, on_tensor, placement=placement, group=group, num_blocks=num_blocks
            )
        self._group = group

    @property
    def info(self) -> ModelInfo:
        """Of the whole model."""
        return self._local.info

    @property
    def eos_token_ids(self) -> Sequence[int]:
        """Tokens that end a sequence."""
        return self._local.eos_token_ids

    @property
    def row_operations(self) -> RowOperations | None:
        """The sampler's operations, of which this rank alone has need."""
        return self._local.row_operations

    @property
    def lookahead(self) -> bool:
        """Whether `execute` and `logits` return before the device has computed."""
        return self._local.lookahead

    def execute(self, plan: StepPlan, previous: torch.Tensor | None = None) -> torch.Tensor:
        """As `ModelRunner.execute`. Raises RanksLostError."""
        if previous is not None and all(row.previous_row < 0 for row in plan.rows):
            previous = None
        with self._others.needed("compute a step"):
            self._others.tell(Execute(plan, 0 if previous is None else len(previous)))
            if previous is not None:
                self._group.send(previous)
            return self._local.execute(plan, previous)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """As `ModelRunner.logits`. Raises RanksLostError."""
        with self._others.needed("compute logits"):
            self._others.tell(Logits(hidden.shape[0], str(hidden.dtype).removeprefix("torch.")))
            self._group.send(hidden)
            return self._local.logits(hidden)

    def close(self) -> None:
        """End the other ranks. What this rank holds goes with it."""
        self._finalizer()


class OtherRanks:
    """The processes of all ranks but the first."""

    command: Sequence[str] = (sys.executable, "-m", "gqa_serve.engine.distributed.rank")
    """What to run, before the numbers of the socket and the lifeline; tests put faults here."""

    def __init__(self, on_loss: Callable[[str], None]) -> None:
        self.group: RankGroup | None = None
        self._on_loss = on_loss
        self._processes: list[subprocess.Popen[bytes]] = []
        self._sockets: list[socket.socket] = []
        self._lifeline, self._held = os.pipe()  # others read the one, and live while we hold the other
        self._closing = threading.Event()
        self._closed = threading.Event()
        self._here: queue.SimpleQueue[bool] = queue.SimpleQueue()
        self._lost = threading.Event()
        self._loss: str | None = None
        """Why the first of them was lost."""

    def start(self, join: Join) -> None:
        """Start the rank that `join` names and tell it to meet the others."""
        ours, theirs = socket.socketpair()
        self._sockets.append(ours)
        with theirs:
            fds = [theirs.fileno(), self._lifeline]
            command = [*self.command, *map(str, fds)]
            process = subprocess.Popen(
                command, pass_fds=fds, stdin=subprocess.DEVNULL, env=engine_environment()
            )
        self._processes.append(process)
        with contextlib.suppress(OSError):  # it has ended already, which its watcher tells
            ours.sendall(framed(join))
        rank = join.placement.rank
        threading.Thread(
            target=self._watch, args=(rank, process, ours), name=f"rank {rank}", daemon=True
        ).start()

    def _watch(self, rank: int, process: subprocess.Popen[bytes], sock: socket.socket) -> None:
        """Hear a rank say that it is there, and see it end."""
        reports = Reader(sock, report_decoder)
        reason = None
        while (report := reports.next()) is not None:
            if isinstance(report, Here):
                self._here.put(True)
            else:
                reason = report.message
        status = _end_of(process)
        if reason is None and status is None:
            reason = (
                f"Tensor-parallel rank {rank} (process {process.pid}) failed, did not end, and was killed."
            )
        elif reason is None:
            reason = f"Tensor-parallel rank {rank} (process {process.pid}) ended with status {status}."
        if self._closing.is_set():
            return
        self._loss = self._loss or reason
        self._lost.set()
        self._here.put(False)
        if not (self._closing.wait(_GRACE_S) and self._closed.wait(_CLOSE_TIMEOUT_S)):
            self._on_loss(reason)

    def wait_for_all(self) -> None:
        """Until the processes have started. Raises RanksLostError if one has ended instead."""
        for _ in self._processes:
            if not self._here.get():
                raise RanksLostError(self._loss)

    def tell(self, order: Order) -> None:
        """Send an order to every rank."""
        message = framed(order)
        for sock in self._sockets:
            sock.sendall(message)

    @contextlib.contextmanager
    def needed(self, purpose: str) -> Iterator[None]:
        """While ranks act together: what fails leaves them out of step, and raises RanksLostError."""
        try:
            yield
        except (GqaServeError, KeyboardInterrupt):
            self.close()
            raise
        except Exception as error:
            self._lost.wait(_GRACE_S)  # if it is because a rank has died, that is the reason to tell
            self.close()
            reason = self._loss or f"The first rank failed ({type(error).__name__}: {error})."
            raise RanksLostError(f"The tensor-parallel ranks could not {purpose}. {reason}") from error

    def close(self) -> None:
        """End the ranks, and leave their group."""
        if self._closing.is_set():
            return
        self._closing.set()
        os.close(self._held)
        os.close(self._lifeline)
        for process in self._processes:
            _end_of(process)
        for sock in self._sockets:
            sock.close()
        if self.group is not None:
            self.group.close()
        self._closed.set()


def _end_of(process: subprocess.Popen[bytes]) -> int | None:
    """The status of a rank that has nothing left to do; None for one that a library held: it is killed.

    Others may wait for it until its process is gone.
    """
    try:
        return process.wait(_EXIT_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        return None
