"""What the first rank tells the others to do, and how: messages over a socket pair each.

Owns the messages and their framing (a msgpack struct after its length, as in `wire.py`). Tensors do not come
this way but through the `RankGroup`, right after the order that announces them.
"""

from __future__ import annotations

import socket
from typing import Generic, TypeVar

import msgspec

from gqa_serve.config import EngineConfig
from gqa_serve.engine.batch import StepPlan
from gqa_serve.engine.placement import Placement
from gqa_serve.engine.wire import LENGTH


class Join(msgspec.Struct, tag=True):
    """First order: be the rank that `placement` says, and meet the others at the file `meeting`."""

    config: EngineConfig
    placement: Placement
    meeting: str
    log_level: str
    log_format: str


class Load(msgspec.Struct, tag=True):
    """Second order, when all ranks have met: load this rank's part of the model at `path`.

    `num_blocks` as in `ModelRunner`.
    """

    path: str
    num_blocks: int | None


class Execute(msgspec.Struct, tag=True):
    """Compute the plan; where `num_previous` > 0, from so many tokens that the step before sampled."""

    plan: StepPlan
    num_previous: int


class Logits(msgspec.Struct, tag=True):
    """Compute logits of hidden states [num_rows, E] of `dtype`."""

    num_rows: int
    dtype: str


class Here(msgspec.Struct, tag=True):
    """From a rank: its process has started, and joins the others now."""


class Refused(msgspec.Struct, tag=True):
    """From a rank, before it ends: why it could not load."""

    message: str


Order = Join | Load | Execute | Logits
Report = Here | Refused
Message = TypeVar("Message")
_encoder = msgspec.msgpack.Encoder()
order_decoder: msgspec.msgpack.Decoder[Order] = msgspec.msgpack.Decoder(Order)
report_decoder: msgspec.msgpack.Decoder[Report] = msgspec.msgpack.Decoder(Report)


def framed(message: Order | Report) -> bytes:
    """The message with its length in front."""
    data = _encoder.encode(message)
    return LENGTH.pack(len(data)) + data


class Reader(Generic[Message]):
    """Whole messages of one kind from a connected socket."""

    def __init__(self, sock: socket.socket, decoder: msgspec.msgpack.Decoder[Message]) -> None:
        self._stream = sock.makefile("rb")
        self._decoder = decoder

    def next(self) -> Message | None:
        """The next message; None when the other end is gone."""
        try:
            length = self._stream.read(LENGTH.size)
            if len(length) < LENGTH.size:
                return None
            (size,) = LENGTH.unpack(length)
            data = self._stream.read(size)
        except OSError:  # it went with messages unread
            return None
        return self._decoder.decode(data) if len(data) == size else None
