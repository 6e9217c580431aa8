"""The engine process: a loop that drains its inbox, steps the engine and sends what came of it.

Started as `python -m gqa_serve.engine.process FD`, with one end of a socket pair as FD, by `client.py`.
Owns the process's life: it ends on `Stop`, when the other end closes (the API process is gone), or when
`_MAX_FAILED_STEPS` steps in a row have failed, so that a fresh process can take over. Knows no text.
"""

from __future__ import annotations

import logging
import select
import signal
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec

from gqa_serve.engine.core import Engine
from gqa_serve.engine.request import TokenOutput
from gqa_serve.engine.structured import GrammarService
from gqa_serve.engine.wire import (
    LENGTH,
    Abort,
    Add,
    Failed,
    FromEngine,
    Loading,
    Outputs,
    Ready,
    Start,
    Stop,
    ToEngine,
    frame,
    to_engine_decoder,
)
from gqa_serve.errors import GqaServeError, RequestError
from gqa_serve.logs import configure_logging

logger = logging.getLogger(__name__)

_MAX_FAILED_STEPS = 3
_RECEIVE_BYTES = 1 << 18


class Closed(Exception):
    """The other end of the socket is gone."""


class Channel:
    """Whole messages over a connected socket."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._buffer = bytearray()

    def send(self, message: FromEngine) -> None:
        """Send, waiting for room. Raises Closed."""
        try:
            self._sock.sendall(frame(message))
        except OSError as error:
            raise Closed from error

    def receive(self, *, wait: bool) -> Iterator[ToEngine]:
        """The messages that have arrived; with `wait`, at least one. Raises Closed."""
        yielded = False
        while True:
            for data in self._whole_frames():
                yielded = True
                yield to_engine_decoder.decode(data)
            timeout = None if wait and not yielded else 0
            if not select.select([self._sock], [], [], timeout)[0]:
                return
            try:
                data = self._sock.recv(_RECEIVE_BYTES)
            except OSError as error:
                raise Closed from error
            if not data:
                raise Closed
            self._buffer += data

    def _whole_frames(self) -> Iterator[bytes]:
        while len(self._buffer) >= LENGTH.size:
            (length,) = LENGTH.unpack_from(self._buffer)
            end = LENGTH.size + length
            if len(self._buffer) < end:
                return
            data = bytes(self._buffer[LENGTH.size : end])
            del self._buffer[:end]
            yield data


def load_engine(start: Start, channel: Channel) -> Engine:
    """Load the model, reporting progress."""
    from gqa_serve.engine.model_runner import ModelRunner

    runner = ModelRunner(
        Path(start.path), start.config, lambda done, total: channel.send(Loading(done, total))
    )
    return Engine(runner, start.config, GrammarService.for_model(Path(start.path), runner.eos_token_ids))


def serve(engine: Engine, channel: Channel) -> int:
    """Run until told to stop. Returns the exit status; raises Closed if the other end goes away."""
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
            elif isinstance(message, Stop):
                return 0
        outputs += engine.step()
        if outputs:
            channel.send(Outputs(outputs))
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
        configure_logging(start.log_level)
        try:
            engine = load_engine(start, channel)
        except (GqaServeError, MemoryError) as error:
            channel.send(Failed(str(error) or "There is not enough memory to load the model."))
            return 1
        channel.send(Ready(engine.info))
        return serve(engine, channel)
    except Closed:
        return 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1])))
