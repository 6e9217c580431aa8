"""An engine process without an engine, which starts at once: for what happens between the two processes.

It answers a request for n tokens with the numbers 0 to n - 1, one a step, or does what its prompt begins
with. A file FAULT at the model's path makes it hang instead of loading.
"""

from __future__ import annotations

import socket
import sys
import time
from pathlib import Path

from gqa_serve.engine.channel import Channel, Closed
from gqa_serve.engine.metrics import BlockState, EngineSnapshot, RequestSnapshot, RequestState, StepStats
from gqa_serve.engine.request import EngineRequest, ModelInfo, TokenLogprobs, TokenOutput
from gqa_serve.engine.wire import Abort, Add, Begun, Inspect, Outputs, Ready, Snapshot, Start, Stop

HANG, WAIT, LARGE = 1, 2, 3
"""Never reads or writes again; is never begun; has an answer of megabytes a step."""
STEP_S = 0.002

INFO = ModelInfo(
    model="scripted",
    architecture="none",
    vocab_size=128,
    max_model_len=10**6,
    num_heads=4,
    num_kv_heads=2,
    num_blocks=64,
    block_size=16,
    kv_bytes_per_token=8,
    kv_dtype="float32",
    weight_bytes=0,
    dtype="float32",
    quantization="none",
    device="cpu",
    backend="none",
    max_num_seqs=8,
)
ENTRY = TokenLogprobs(0, -1.0, 1, [(token, -1.0) for token in range(20)])


def snapshot_of(held: dict[str, EngineRequest]) -> EngineSnapshot:
    """A block for each request; those that are never begun wait."""
    requests = []
    for name, request in held.items():
        state: RequestState = "waiting" if request.prompt[0] == WAIT else "running"
        requests.append(RequestSnapshot(name, state, 0.0, len(request.prompt), 0, 0, 0, 1))
    blocks = bytes([BlockState.ACTIVE] * len(held))
    return EngineSnapshot(blocks.ljust(INFO.num_blocks, b"\0"), requests)


def main(fd: int) -> int:
    channel = Channel(socket.socket(fileno=fd))
    start = next(channel.receive(wait=True))
    assert isinstance(start, Start)
    if (Path(start.path) / "FAULT").exists():
        time.sleep(10_000)
    channel.send(Ready(INFO))
    held: dict[str, EngineRequest] = {}
    sent: dict[str, int] = {}
    while True:
        for message in channel.receive(wait=not any(r.prompt[0] != WAIT for r in held.values())):
            if isinstance(message, Add):
                held[message.request.request_id] = message.request
            elif isinstance(message, Abort):
                held.pop(message.request_id, None)
            elif isinstance(message, Inspect):
                channel.send(Snapshot(message.ask_id, snapshot_of(held)))
            elif isinstance(message, Stop):
                return 0
        running = [request for request in held.values() if request.prompt[0] != WAIT]
        begun = [request.request_id for request in running if request.request_id not in sent]
        if begun:
            channel.send(Begun(begun))
        if any(request.prompt[0] == HANG for request in running):
            time.sleep(10_000)
        time.sleep(STEP_S)
        outputs = []
        for request in running:
            name, count = request.request_id, sent.get(request.request_id, 0)
            output = TokenOutput(request_id=name, token_ids=[count])
            if request.prompt[0] == LARGE:
                output.logprobs = [ENTRY] * 2000
            sent[name] = count + 1
            if sent[name] == request.params.max_tokens:
                output.finish_reason = "length"
                del held[name], sent[name]
            outputs.append(output)
        stats = StepStats(num_running=len(running), num_waiting=len(held) - len(running))
        channel.send(Outputs(outputs, stats))


if __name__ == "__main__":
    try:
        sys.exit(main(int(sys.argv[1])))
    except Closed:
        sys.exit(0)
