"""Decode steps as captured CUDA graphs, for a ladder of numbers of requests.

Owns the static buffers that a graph reads and writes, which rung serves a step, and padding up to it. Knows
neither kernels nor the model: `forward` is given, and so is how something is captured, so that all of it
but the capture itself is tested without a GPU.

Invariant: a replay computes what an eager step would for the real rows; padding rows write no K and V.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch

from gqa_serve.engine.backends.cuda_step import StepArrays, StepBuffer

Forward = Callable[[Mapping[str, torch.Tensor], torch.Tensor], torch.Tensor]
"""Regions of a step, and the tokens that the step before sampled [room] int64 -> hidden states [R, E]."""


class Replay(Protocol):
    """Something captured."""

    def replay(self) -> None: ...


Capture = Callable[[Callable[[], torch.Tensor]], tuple[Replay, torch.Tensor]]
"""Runs a function so that it can be replayed; also returns its tensor, which each replay writes anew."""


class CudaCapture:
    """Captures CUDA graphs that share one memory pool. The function is first run twice, to load kernels."""

    def __init__(self) -> None:
        self.pool = torch.cuda.graph_pool_handle()
        self.stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]  # one: cuBLAS has memory for each

    def __call__(self, function: Callable[[], torch.Tensor]) -> tuple[Replay, torch.Tensor]:
        stream = self.stream
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                function()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool, stream=stream):
            result = function()
        return graph, result


def ladder(most: int) -> list[int]:
    """Numbers of requests that get a graph: 1, 2, 4, then steps of 8, from 64 on of 16, from 256 on of 32,
    up to `most`.

    A step is padded by 3 rows at most up to 8 requests, 7 up to 64, 15 up to 256: little of a long step, and
    a short one is bound by reading weights.
    """
    rungs = [1, 2, 4]
    while rungs[-1] < most:
        last = rungs[-1]
        rungs.append(8 if last == 4 else last + (8 if last < 64 else 16 if last < 256 else 32))
    return [rung for rung in rungs if rung < most] + [most]


@dataclass
class _Captured:
    replay: Replay
    hidden: torch.Tensor


class DecodeGraphs:
    """One graph per rung of the ladder; the largest is captured first, so that the others fit into its
    memory.

    `capacities(rung)` gives the sizes of a step's regions (see `decode_capacities`). All graphs read the same
    buffer: a smaller one the beginnings of its regions.
    """

    def __init__(
        self,
        most: int,
        capacities: Callable[[int], Mapping[str, int]],
        forward: Forward,
        capture: Capture,
        device: torch.device,
    ) -> None:
        self.buffer = StepBuffer(device, capacities(most))
        self.previous = torch.zeros(most, dtype=torch.int64, device=device)
        self.captured: dict[int, _Captured] = {}
        for rung in reversed(ladder(most)):
            arrays = StepArrays.empty(capacities(rung))
            arrays.pad(rung)
            regions = self.buffer.load(arrays)
            tensors = {name: regions[name][:size] for name, size in capacities(rung).items()}
            self.captured[rung] = _Captured(*capture(partial(forward, tensors, self.previous)))

    def run(self, arrays: StepArrays, previous: torch.Tensor | None) -> torch.Tensor | None:
        """Hidden states [B, E] of a decode step, which the next run may overwrite; None if no graph fits.

        That is a step with more requests than the largest rung, or one whose requests share so many blocks
        that their tables are longer than the cache.
        """
        rung = min((rung for rung in self.captured if rung >= arrays.num_requests), default=None)
        if rung is None or not arrays.is_decode or not self.buffer.fits(arrays):
            return None
        num_requests = arrays.num_requests
        arrays.pad(rung)
        self.buffer.load(arrays)
        if previous is not None:
            self.previous[: len(previous)].copy_(previous)
        self.captured[rung].replay.replay()
        return self.captured[rung].hidden[:num_requests]
