"""What a decode step costs as a function of the batch, and where it turns from memory to arithmetic.

Owns the straight lines: requests of one context length each add the same bytes and operations, so a part of
the step costs fixed + batch * each, and two steps of the account (`step_cost.py`) give the lines exactly.

    memory(b)     = (W + K b) / bandwidth      W: weights, read once    K: KV and activations of a request
    arithmetic(b) = F b / peak                 F: operations of a token

They meet at b = W / bandwidth / (F / peak - K / bandwidth), or never, where F / K, the operations per byte
that each further request brings, is below the device's own peak / bandwidth (Williams et al. 2009, "Roofline:
An Insightful Visual Performance Model for Multicore Architectures").
Invariant: at every batch equal to `decode_step` of the account. Imports no torch.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property

from gqa_serve.engine.model_config import ModelConfig
from gqa_serve.workbench.hardware import Hardware
from gqa_serve.workbench.kernel_cost import Cost, Formats
from gqa_serve.workbench.sharding import all_reduce_seconds, local_config
from gqa_serve.workbench.step_cost import decode_step

LINEAR = ("qkv", "o", "gate, up", "down", "logits")
"""Parts whose weights all requests share."""


@dataclass(frozen=True)
class Line:
    """A part at any batch: bytes that must move, and operations at `peak` per second."""

    fixed_bytes: int
    request_bytes: int
    fixed_flops: int
    request_flops: int
    peak: float

    @classmethod
    def through(cls, one: Cost, two: Cost, peak: float) -> Line:
        """From the part at batch 1 and at batch 2."""
        byte, flop = two.must_bytes - one.must_bytes, two.flops - one.flops
        return cls(one.must_bytes - byte, byte, one.flops - flop, flop, peak)

    def bytes_at(self, batch: int) -> int:
        return self.fixed_bytes + self.request_bytes * batch

    def flops_at(self, batch: int) -> int:
        return self.fixed_flops + self.request_flops * batch


@dataclass(frozen=True)
class DecodeCost:
    """Decode steps of requests that each have `context_len` tokens, the new one included, on one of `ranks`
    equal ranks. `config` is the whole model's."""

    config: ModelConfig
    context_len: int
    formats: Formats
    hardware: Hardware
    ranks: int = 1
    post_norms: bool = False

    @cached_property
    def lines(self) -> dict[str, Line]:
        """The step's parts by name, of one rank."""
        local = local_config(self.config, self.ranks)
        one, two = (
            decode_step(local, batch, self.context_len, self.formats, post_norms=self.post_norms).parts
            for batch in (1, 2)
        )
        return {
            name: Line.through(one[name], two[name], self.hardware.peak(one[name].precision)) for name in one
        }

    @cached_property
    def attention(self) -> list[str]:
        return [name for name in self.lines if name.startswith("decode attention")]

    def seconds(self, batch: int) -> float:
        """Least time of a step: its parts one after the other, each bound by memory or by arithmetic, and
        the ranks' sums."""
        parts = sum(self.part_seconds(name, batch) for name in self.lines)
        return parts + all_reduce_seconds(
            self.config,
            batch,
            self.ranks,
            self.hardware,
            activation_bytes=self.formats.activation_bytes,
        )

    def part_seconds(self, name: str, batch: int) -> float:
        """Least time of one part."""
        line = self.lines[name]
        return max(line.bytes_at(batch) / self.hardware.bandwidth, line.flops_at(batch) / line.peak)

    def memory_seconds(self, batch: int, parts: Collection[str] | None = None) -> float:
        """Time to move the bytes of `parts`, all of them unless given."""
        lines = (self.lines[name] for name in (self.lines if parts is None else parts))
        return sum(line.bytes_at(batch) for line in lines) / self.hardware.bandwidth

    def arithmetic_seconds(self, batch: int, parts: Collection[str] | None = None) -> float:
        """Time to compute `parts` at the peaks of their precisions."""
        lines = (self.lines[name] for name in (self.lines if parts is None else parts))
        return sum(line.flops_at(batch) / line.peak for line in lines)

    def compute_bound_from(self, parts: Collection[str] | None = None) -> int | None:
        """The smallest batch at which computing `parts` takes at least as long as moving their bytes.

        None: no batch does, because each further request adds more time for its bytes than for its
        operations.
        """

        names = list(self.lines if parts is None else parts)

        def surplus(batch: int) -> float:
            return self.arithmetic_seconds(batch, names) - self.memory_seconds(batch, names)

        if surplus(1) >= 0:
            return 1
        each = [self.lines[name] for name in names]
        slope = sum(line.request_flops / line.peak for line in each)
        slope -= sum(line.request_bytes for line in each) / self.hardware.bandwidth
        if slope <= 0:
            return None
        batch = max(1, math.floor(1 - surplus(1) / slope) - 1)
        while surplus(batch) < 0:  # what rounding left
            batch += 1
        return batch

    def intensity(self, parts: Collection[str], batch: int) -> float:
        """Operations per byte of `parts`."""
        lines = [self.lines[name] for name in parts]
        return sum(line.flops_at(batch) for line in lines) / sum(line.bytes_at(batch) for line in lines)

    @property
    def read_bytes_per_request(self) -> int:
        """K and V that a step reads for one request, on this rank: of layers with a window, the window's."""
        local = local_config(self.config, self.ranks)
        seen = sum(
            self.context_len if window is None else min(window, self.context_len) for window in local.windows
        )
        return seen * self.formats.kv.bytes_per_token(local.num_kv_heads, local.head_dim)

    @property
    def read_weight_bytes(self) -> int:
        """Weights that a step reads, whatever the batch, on this rank: all but an embedding that is not the
        output head too."""
        return sum(self.lines[name].fixed_bytes for name in LINEAR)
