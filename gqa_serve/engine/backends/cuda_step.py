"""From a plan to the integers that the CUDA backend's kernels read.

Owns what a step is on the host (`StepArrays`: numpy, no device), and how it gets to the device: as one int32
buffer, cut into regions (`StepBuffer`). Knows no kernel's arithmetic, only how its work is listed.

    host   | token_ids | positions | slots | ... | items of window 0 | ... | block_ids        |
              fixed sizes in a captured graph       used part copied          used part copied

Invariants: nothing here waits for the device, but for a copy that was enqueued two steps before. A padding
row (of a step that replays a graph for more requests than it has) writes to no slot, has no blocks and no
items.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from gqa_serve.engine.backends.base import AttentionLayout
from gqa_serve.engine.batch import StepPlan
from gqa_serve.engine.kernels.triton.decode_attention import SPLIT, Blocks, SplitWork
from gqa_serve.engine.kernels.triton.prefill_attention import ChunkWork

_ALIGN = 32  # ints: 128 bytes
_MAX_GAP = 2048  # ints that are copied along rather than started a copy of their own for
_HOST_BUFFERS = 2


@dataclass
class StepArrays:
    """One step: T new tokens of B requests. All int32, by the names of the regions.

    token_ids, positions, slots, previous_rows: [T]; a token whose id only the device knows is row
    previous_rows[t] of the tokens sampled by the step before, else previous_rows[t] is -1. logit_rows: [R].
    context_lens, block_starts, last_rows: [B]; query_starts: [B + 1]; block_ids: all requests' blocks, one
    after the other. Per distinct window w, for requests with one new token: `item_starts{w}` [B + 1],
    `item_requests{w}`, `item_splits{w}`. For the others: chunk_requests, chunk_firsts [tiles].
    """

    regions: dict[str, np.ndarray]
    num_tokens: int
    num_requests: int

    @classmethod
    def from_plan(
        cls, plan: StepPlan, block_size: int, windows: Sequence[int | None], tile_tokens: int
    ) -> StepArrays:
        """`tile_tokens`: how many new tokens of one request share a tile of the prefill kernel."""
        rows = plan.rows
        query_lens = np.array([len(row.token_ids) for row in rows], np.int32)
        starts = np.array([row.start for row in rows], np.int32)
        context_lens = starts + query_lens
        query_starts = np.concatenate(([0], np.cumsum(query_lens))).astype(np.int32)
        used = -(-context_lens // block_size)
        block_starts = np.cumsum(used) - used
        block_ids = np.empty(int(used.sum()), np.int32)
        for row, start, count in zip(rows, block_starts.tolist(), used.tolist(), strict=True):
            block_ids[start : start + count] = row.block_ids[:count]
        request = np.repeat(np.arange(len(rows), dtype=np.int32), query_lens)
        positions = _ranges(query_lens) + starts[request]
        blocks = block_ids[block_starts[request] + positions // block_size]
        previous_rows = np.full(len(request), -1, np.int32)
        previous_rows[query_starts[1:] - 1] = [row.previous_row for row in rows]
        num_logits = np.array([row.num_logits for row in rows], np.int32)
        regions = {
            "token_ids": np.array([token for row in rows for token in row.token_ids], np.int32),
            "positions": positions,
            "slots": blocks * block_size + positions % block_size,
            "previous_rows": previous_rows,
            "logit_rows": np.repeat(query_starts[1:] - num_logits, num_logits) + _ranges(num_logits),
            "context_lens": context_lens,
            "block_starts": block_starts,
            "last_rows": query_starts[1:] - 1,
            "query_starts": query_starts,
        }
        for index, window in enumerate(windows):
            regions |= _items(index, window, context_lens, query_lens)
        regions |= _chunks(query_lens, tile_tokens)
        regions["block_ids"] = block_ids
        arrays = {name: array.astype(np.int32, copy=False) for name, array in regions.items()}
        return cls(arrays, len(request), len(rows))

    @classmethod
    def empty(cls, regions: Iterable[str]) -> StepArrays:
        """A decode step of no requests, to be padded."""
        ends = ("query_starts", "item_starts")
        return cls({name: np.zeros(int(name.startswith(ends)), np.int32) for name in regions}, 0, 0)

    @property
    def is_decode(self) -> bool:
        """Whether each request has one new token and samples after it: what a captured graph computes."""
        return len(self.regions["logit_rows"]) == self.num_tokens == self.num_requests

    def pad(self, num_requests: int) -> None:
        """Add requests without blocks to a decode step, up to `num_requests`."""
        more = num_requests - self.num_requests
        last = self.regions["query_starts"][-1]
        rest = np.arange(self.num_requests, num_requests, dtype=np.int32)
        for name, values in (
            ("token_ids", np.zeros(more)),
            ("positions", np.zeros(more)),
            ("slots", np.full(more, -1)),
            ("previous_rows", np.full(more, -1)),
            ("logit_rows", rest),
            ("context_lens", np.zeros(more)),
            ("block_starts", np.zeros(more)),
            ("last_rows", rest),
            ("query_starts", last + 1 + np.arange(more)),
        ):
            self._extend(name, values)
        for name in [name for name in self.regions if name.startswith("item_starts")]:
            self._extend(name, np.full(more, self.regions[name][-1]))
        self.num_tokens = self.num_requests = num_requests

    def _extend(self, name: str, values: np.ndarray) -> None:
        self.regions[name] = np.concatenate((self.regions[name], values.astype(np.int32)))


def _ranges(lengths: np.ndarray) -> np.ndarray:
    """0, 1, .. for each length: [2, 3] -> [0, 1, 0, 1, 2]."""
    ends = np.cumsum(lengths)
    count = int(ends[-1]) if len(ends) else 0
    return np.arange(count, dtype=np.int32) - np.repeat(ends - lengths, lengths).astype(np.int32)


def _items(
    index: int, window: int | None, context_lens: np.ndarray, query_lens: np.ndarray
) -> dict[str, np.ndarray]:
    """Splits to read for each request with one new token; none of those that its window leaves out."""
    first = 0 if window is None else np.maximum(context_lens - window, 0) // SPLIT
    counts = np.where(query_lens == 1, -(-context_lens // SPLIT) - first, 0)
    request = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
    return {
        f"item_starts{index}": np.concatenate(([0], np.cumsum(counts))),
        f"item_requests{index}": request,
        f"item_splits{index}": _ranges(counts) + np.broadcast_to(first, counts.shape)[request],
    }


def _chunks(query_lens: np.ndarray, tile_tokens: int) -> dict[str, np.ndarray]:
    """Tiles of the new tokens of requests with more than one."""
    counts = np.where(query_lens > 1, -(-query_lens // tile_tokens), 0)
    return {
        "chunk_requests": np.repeat(np.arange(len(counts), dtype=np.int32), counts),
        "chunk_firsts": _ranges(counts) * tile_tokens,
    }


@dataclass(frozen=True)
class StepTensors:
    """A step on the device; see StepArrays. `splits`: one per distinct window, None if no request decodes.

    `arrays`: the same on the host, None in a captured step.
    """

    token_ids: torch.Tensor
    positions: torch.Tensor
    slots: torch.Tensor
    previous_rows: torch.Tensor
    logit_rows: torch.Tensor
    blocks: Blocks
    splits: tuple[SplitWork, ...] | None
    chunks: ChunkWork | None
    arrays: StepArrays | None = None

    @classmethod
    def of(
        cls, tensors: Mapping[str, torch.Tensor], layout: AttentionLayout, arrays: StepArrays | None = None
    ) -> StepTensors:
        """Of the regions by name."""
        splits = tuple(
            SplitWork(
                tensors["last_rows"],
                *(tensors[f"item_{part}{w}"] for part in ("starts", "requests", "splits")),
            )
            for w in range(len(layout.windows))
        )
        decodes = any(len(work.requests) for work in splits)
        chunks = ChunkWork(tensors["query_starts"], tensors["chunk_requests"], tensors["chunk_firsts"])
        return cls(
            token_ids=tensors["token_ids"],
            positions=tensors["positions"],
            slots=tensors["slots"],
            previous_rows=tensors["previous_rows"],
            logit_rows=tensors["logit_rows"],
            blocks=Blocks(tensors["block_ids"], tensors["block_starts"], tensors["context_lens"]),
            splits=splits if decodes else None,
            chunks=chunks if len(chunks.requests) else None,
            arrays=arrays,
        )


class StepBuffer:
    """Regions of int32 on the device, filled by few asynchronous copies.

    With `capacities` (ints by region) a region is always at the same place and of the same size, as a
    captured graph needs; without, regions are as long as what is loaded, and the buffer grows.
    """

    def __init__(self, device: torch.device, capacities: Mapping[str, int] | None = None) -> None:
        self.device = device
        self.capacities = capacities
        self._hosts: list[torch.Tensor] = []
        self._copied: list[torch.cuda.Event | None] = [None] * _HOST_BUFFERS
        self._next = 0
        self._reserve(0 if capacities is None else _offsets(capacities)[1])

    def fits(self, arrays: StepArrays) -> bool:
        """Whether every region has room."""
        capacities = self.capacities or {}
        return all(len(array) <= capacities.get(name, len(array)) for name, array in arrays.regions.items())

    def load(self, arrays: StepArrays) -> dict[str, torch.Tensor]:
        """Enqueue the copies; the regions on the device, valid until the next load."""
        sizes = self.capacities or {name: len(array) for name, array in arrays.regions.items()}
        offsets, total = _offsets(sizes)
        if total > len(self._device):
            self._reserve(2 * total)
        index, self._next = self._next, (self._next + 1) % _HOST_BUFFERS
        host, event = self._hosts[index], self._copied[index]
        if event is not None:
            event.synchronize()
        numbers = host.numpy()
        runs: list[list[int]] = []
        for name, array in arrays.regions.items():
            begin = offsets[name]
            numbers[begin : begin + len(array)] = array
            if runs and begin - runs[-1][1] <= _MAX_GAP:
                runs[-1][1] = begin + len(array)
            else:
                runs.append([begin, begin + len(array)])
        for begin, end in runs:
            self._device[begin:end].copy_(host[begin:end], non_blocking=True)
        if self.device.type == "cuda":
            self._copied[index] = event = event or torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record()
        return {name: self._device[offsets[name] : offsets[name] + size] for name, size in sizes.items()}

    def _reserve(self, size: int) -> None:
        pin = self.device.type == "cuda"
        self._device = torch.zeros(size, dtype=torch.int32, device=self.device)
        self._hosts = [torch.zeros(size, dtype=torch.int32, pin_memory=pin) for _ in range(_HOST_BUFFERS)]
        self._copied = [None] * _HOST_BUFFERS


def _offsets(sizes: Mapping[str, int]) -> tuple[dict[str, int], int]:
    """Where each region begins, and the size of all."""
    offsets, end = {}, 0
    for name, size in sizes.items():
        offsets[name] = end
        end += -(-size // _ALIGN) * _ALIGN
    return offsets, end


def decode_capacities(
    num_requests: int, num_windows: int, most_items: int, most_blocks: int
) -> dict[str, int]:
    """The regions of a captured decode step of `num_requests`, in the order of StepArrays."""
    names = (
        "token_ids",
        "positions",
        "slots",
        "previous_rows",
        "logit_rows",
        "context_lens",
        "block_starts",
        "last_rows",
    )
    sizes = dict.fromkeys(names, num_requests)
    sizes["query_starts"] = num_requests + 1
    for window in range(num_windows):
        sizes[f"item_starts{window}"] = num_requests + 1
        sizes[f"item_requests{window}"] = sizes[f"item_splits{window}"] = most_items
    return sizes | {"chunk_requests": 0, "chunk_firsts": 0, "block_ids": most_blocks}
