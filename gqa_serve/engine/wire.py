"""The messages between the API process and the engine process, and their framing.

A message is a msgspec struct, tagged by its class name, packed as msgpack after a four-byte little-endian
length. Both sides read whole messages only. Knows nothing of what the messages cause.
"""

from __future__ import annotations

import struct

import msgspec

from gqa_serve.config import EngineConfig
from gqa_serve.engine.metrics import EngineSnapshot, StepStats
from gqa_serve.engine.placement import ALONE, Placement
from gqa_serve.engine.request import EngineRequest, ModelInfo, TokenOutput

LENGTH = struct.Struct("<I")


class Start(msgspec.Struct, tag=True):
    """First message to the engine: load the model at `path`, as the process that `placement` says.

    `num_blocks`: KV blocks that the process before this one had, if there was one.
    """

    path: str
    config: EngineConfig
    log_level: str
    log_format: str = "text"
    placement: Placement = ALONE
    num_blocks: int | None = None


class Add(msgspec.Struct, tag=True):
    """Queue a request."""

    request: EngineRequest


class Abort(msgspec.Struct, tag=True):
    """End a request and free its blocks; it may have ended already."""

    request_id: str


class Inspect(msgspec.Struct, tag=True):
    """Answer with a `Snapshot` of the same `ask_id`."""

    ask_id: int


class Profile(msgspec.Struct, tag=True):
    """Record the next `num_steps` steps that compute something; answer with `Profiled`."""

    ask_id: int
    num_steps: int


class EndProfile(msgspec.Struct, tag=True):
    """End it now; answer only if what was recorded so far is `wanted`."""

    ask_id: int
    wanted: bool


class Stop(msgspec.Struct, tag=True):
    """Exit."""


class Loading(msgspec.Struct, tag=True):
    """`done` of `total` tensors are loaded."""

    done: int
    total: int


class Ready(msgspec.Struct, tag=True):
    """The model is loaded; requests may come."""

    info: ModelInfo


class Failed(msgspec.Struct, tag=True):
    """The model can't be loaded: one sentence for the user."""

    message: str


class Begun(msgspec.Struct, tag=True):
    """These requests are in the step that begins now, for the first time."""

    request_ids: list[str]


class Outputs(msgspec.Struct, tag=True):
    """All outputs of one step, and what it did."""

    outputs: list[TokenOutput]
    stats: StepStats


class Snapshot(msgspec.Struct, tag=True):
    """The answer to `Inspect`."""

    ask_id: int
    snapshot: EngineSnapshot


class Profiled(msgspec.Struct, tag=True):
    """The answer to `Profile`: a Chrome trace of `num_steps` steps, packed by gzip, or why there is none."""

    ask_id: int
    num_steps: int
    trace: bytes
    error: str | None = None


ToEngine = Start | Add | Abort | Inspect | Profile | EndProfile | Stop
FromEngine = Loading | Ready | Failed | Begun | Outputs | Snapshot | Profiled

_encoder = msgspec.msgpack.Encoder()
to_engine_decoder = msgspec.msgpack.Decoder(ToEngine)
from_engine_decoder = msgspec.msgpack.Decoder(FromEngine)


def frame(message: ToEngine | FromEngine) -> bytes:
    """The message with its length in front."""
    data = _encoder.encode(message)
    return LENGTH.pack(len(data)) + data
