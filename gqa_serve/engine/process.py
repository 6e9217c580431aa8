"""The engine process: a loop that drains its inbox, steps the engine and sends what came of it.

Started as `python -m gqa_serve.engine.process FD`, with one end of a socket pair as FD, by `client.py`.
Owns the process's life: it ends on `Stop`, when the other end closes (the API process is gone), or when
`_MAX_FAILED_STEPS` steps in a row have failed, so that a fresh process can take over. Knows no text.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
from pathlib import Path

import msgspec

from gqa_serve.engine.channel import Channel, Closed
from gqa_serve.engine.core import Engine
from gqa_serve.engine.profiling import Profiling
from gqa_serve.engine.request import TokenOutput
from gqa_serve.engine.structured import GrammarService
from gqa_serve.engine.wire import (
    Abort,
    Add,
    Begun,
    EndProfile,
    Failed,
    Inspect,
    Loading,
    Outputs,
    Profile,
    Ready,
    Snapshot,
    Start,
    Stop,
)
from gqa_serve.errors import GqaServeError, RequestError
from gqa_serve.logs import configure_logging

logger = logging.getLogger(__name__)

_MAX_FAILED_STEPS = 3


def load_engine(start: Start, channel: Channel) -> Engine:
    """Load the model, reporting progress."""
    from gqa_serve.engine.distributed.replica import load_runner

    runner = load_runner(
        Path(start.path),
        start.config,
        lambda done, total: channel.send(Loading(done, total)),
        placement=start.placement,
        num_blocks=start.num_blocks,
        log=(start.log_level, start.log_format),
        on_loss=_end_at_once,
    )
    grammars = GrammarService.for_model(Path(start.path), runner.eos_token_ids)
    grammars.warm_up()
    return Engine(runner, start.config, grammars)


def _end_at_once(reason: str) -> None:
    """Whatever this process waits for will not come."""
    logger.error("%s The engine process ends, to be replaced.", reason)
    logging.shutdown()
    os._exit(70)


def serve(engine: Engine, channel: Channel) -> int:
    """Run until told to stop. Returns the exit status; raises Closed if the other end goes away."""
    profiling = Profiling(engine, channel.send)
    engine.on_begin = lambda request_ids: channel.send(Begun(request_ids))
    while True:
        outputs: list[TokenOutput] = []
        for message in channel.receive(wait=not engine.has_work):
            if isinstance(message, Add):
                try:
                    engine.add(message.request)
                except RequestError as error:
                    refused = TokenOutput(request_id=message.request.request_id)
                    refused.finish_reason, refused.error = "error", error.message
                    outputs.append(refused)
            elif isinstance(message, Abort):
                engine.abort(message.request_id)
            elif isinstance(message, Inspect):
                channel.send(Snapshot(message.ask_id, engine.snapshot()))
            elif isinstance(message, Profile | EndProfile):
                profiling.take(message)
            elif isinstance(message, Stop):
                return 0
        outputs += engine.step()
        channel.send(Outputs(outputs, engine.stats))
        profiling.stepped(engine.stats.num_requests)
        if engine.num_failed_steps >= _MAX_FAILED_STEPS:
            logger.error("%d steps in a row have failed; the engine process gives up.", _MAX_FAILED_STEPS)
            return 70


def main(fd: int) -> int:
    """The process: the first message says what to load."""
    # A terminal's Ctrl-C and a service manager's TERM reach the whole group; the API process decides.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    channel = Channel(socket.socket(fileno=fd))
    try:
        start = next(channel.receive(wait=True))
        if not isinstance(start, Start):
            raise msgspec.ValidationError(f"expected Start, got {type(start).__name__}")
        place = start.placement
        replica = place.replica if place.num_replicas > 1 else None
        configure_logging(start.log_level, start.log_format, process="engine", replica=replica)
        try:
            engine = load_engine(start, channel)
        except (GqaServeError, MemoryError) as error:
            channel.send(Failed(str(error) or "There is not enough memory to load the model."))
            return 1
        channel.send(Ready(engine.info))
        return serve(engine, channel)
    except Closed:
        return 0
    except Exception:
        logger.exception("The engine process failed.")  # as a line of the log, whatever its format is
        return 1


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1])))
