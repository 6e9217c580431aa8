"""Channel: the engine process's end of the socket pair.

Owns whole messages in and out, blocking. Knows nothing of what they cause. Sending waits for the API process
to read, which it always does (`client.py`); what comes in meanwhile waits in the other process.
"""

from __future__ import annotations

import select
import socket
from collections.abc import Iterator

from gqa_serve.engine.wire import LENGTH, FromEngine, ToEngine, frame, to_engine_decoder

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
        """Messages that have arrived; with `wait`, at least one. Raises Closed.

        What one read brings is enough: however fast more arrives, the engine gets to its next step.
        """
        yielded = has_read = False
        while True:
            for data in self._whole_frames():
                yielded = True
                yield to_engine_decoder.decode(data)
            if has_read and (yielded or not wait):
                return
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
            has_read = True

    def _whole_frames(self) -> Iterator[bytes]:
        while len(self._buffer) >= LENGTH.size:
            (length,) = LENGTH.unpack_from(self._buffer)
            end = LENGTH.size + length
            if len(self._buffer) < end:
                return
            data = bytes(self._buffer[LENGTH.size : end])
            del self._buffer[:end]
            yield data
