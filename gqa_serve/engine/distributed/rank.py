"""The process of a tensor-parallel rank but the first: it loads its part and does as the first rank says.

Started as `python -m gqa_serve.engine.distributed.rank SOCKET LIFELINE` by `replica.py`. Owns the process's
life: it ends when the socket with the orders closes, when the lifeline does (the first rank is gone, whatever
this one waits for), or when anything fails here, because ranks that are out of step cannot go on.
Knows no requests: a plan says all there is to know.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import torch

from gqa_serve.engine.distributed.group import RankGroup
from gqa_serve.engine.distributed.orders import (
    Execute,
    Here,
    Join,
    Load,
    Logits,
    Order,
    Reader,
    Refused,
    Report,
    framed,
    order_decoder,
)
from gqa_serve.engine.model_runner import ModelRunner, choose_device
from gqa_serve.errors import GqaServeError
from gqa_serve.logs import configure_logging

logger = logging.getLogger(__name__)


def load_part(join: Join, orders: Reader[Order], say: Callable[[Report], None]) -> ModelRunner | None:
    """This rank's part of the model, once all ranks have loaded theirs; None if the first rank has gone."""
    placement, config = join.placement, join.config
    device = choose_device(config.device, placement=placement)
    say(Here())  # from here on the others wait for this one
    group = RankGroup(
        Path(join.meeting), placement.rank, placement.num_ranks, device, exact=config.deterministic
    )
    load = orders.next()
    if not isinstance(load, Load):
        return None
    return ModelRunner(Path(load.path), config, placement=placement, group=group, num_blocks=load.num_blocks)


def follow(runner: ModelRunner, orders: Reader[Order]) -> None:
    """Do as the first rank says until it is gone."""
    group = runner.group
    assert group is not None
    while (order := orders.next()) is not None:
        if isinstance(order, Execute):
            count = order.num_previous
            runner.execute(order.plan, group.receive((count,), torch.int64) if count else None)
        elif isinstance(order, Logits):
            shape = order.num_rows, runner.info.hidden_size
            runner.logits(group.receive(shape, getattr(torch, order.dtype)))


def _end_with(lifeline: int) -> None:
    """End this process when the pipe's other end closes, even in the middle of waiting for another rank."""

    def wait() -> None:
        os.read(lifeline, 1)
        os._exit(0)

    threading.Thread(target=wait, name="lifeline", daemon=True).start()


def main(fd: int, lifeline: int) -> int:
    """The process: the first order says which rank it is."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    _end_with(lifeline)
    sock = socket.socket(fileno=fd)
    orders = Reader(sock, order_decoder)
    join = orders.next()
    if not isinstance(join, Join):
        return 0
    place = join.placement
    replica = place.replica if place.num_replicas > 1 else None
    configure_logging(join.log_level, join.log_format, process=f"rank {place.rank}", replica=replica)

    def say(report: Report) -> None:
        sock.sendall(framed(report))

    try:
        try:
            runner = load_part(join, orders, say)
        except (GqaServeError, MemoryError) as error:
            say(Refused(str(error) or "There is not enough memory to load the model."))
            return 1
        if runner is not None:
            follow(runner, orders)
    except Exception:
        logger.exception("This tensor-parallel rank failed.")  # as a line of the log, whatever its format is
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), int(sys.argv[2])))
