"""The roofline of `step_cost.py` as a cost model: the same seconds, in microseconds of computing.

Owns the tables that make it fast. What a step costs is `step_cost.py`'s: the parts that depend on the number
of tokens alone are asked there once for each number; attention is the sum of what each request reads, which
`kernel_cost.py` is asked once for each context length. Imports no torch.
Invariant: equal to `step_cost.step(...).seconds(hardware)` of one rank, over `efficiency`, plus the time
that ranks need to add up and `overhead_s`. A step in which no row samples computes no logits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from gqa_serve.engine.model_config import ModelConfig
from gqa_serve.workbench import kernel_cost, step_cost
from gqa_serve.workbench.hardware import Hardware
from gqa_serve.workbench.kernel_cost import Formats, Heads
from gqa_serve.workbench.sharding import all_reduce_seconds, local_config
from gqa_serve.workbench.simulate.cost_model import Chunk, visible_pairs

_MORE = 1024  # context lengths that a table grows by


@dataclass
class _Attention:
    """The layers with one window: how many, and by context length what a decoding request reads and sees."""

    window: int | None
    count: int
    read_bytes: list[int] = field(default_factory=list)
    seen: list[int] = field(default_factory=list)
    read_array: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    seen_array: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))


class Roofline:
    """`ranks` devices of one kind compute a model; every rank holds `local_config(config, ranks)`."""

    request_s = 0.0

    def __init__(
        self,
        config: ModelConfig,
        hardware: Hardware,
        formats: Formats,
        *,
        ranks: int = 1,
        post_norms: bool = False,
        efficiency: float = 1.0,
        overhead_s: float = 0.0,
    ) -> None:
        self._whole = config
        self._config = local_config(config, ranks)
        self._heads = Heads.of(self._config)
        self._hardware = hardware
        self._formats = formats
        self._ranks = ranks
        self._post_norms = post_norms
        self._efficiency = efficiency
        self._overhead_s = overhead_s
        self._dense: dict[int, float] = {}
        self._sampling: dict[int, float] = {0: 0.0}
        windows = self._config.windows
        self._attention = [_Attention(window, windows.count(window)) for window in dict.fromkeys(windows)]
        peak = hardware.peak(formats.attention_precision)
        self._pair_s = 4 * self._heads.num_heads * self._heads.head_dim / peak
        self._byte_s = 1 / hardware.bandwidth

    def step_seconds(self, contexts: Sequence[int], chunks: Sequence[Chunk], num_sampled: int) -> float:
        """See CostModel."""
        tokens = len(contexts) + sum([query_len for query_len, _ in chunks])
        seconds = self._dense_s(tokens) + self._sampling_s(num_sampled)
        if contexts:
            longest = max(contexts)
            for part in self._attention:
                if longest >= len(part.seen):
                    self._grow(part, longest)
                read = sum(map(part.read_bytes.__getitem__, contexts))
                seen = sum(map(part.seen.__getitem__, contexts))
                seconds += part.count * max(read * self._byte_s, seen * self._pair_s)
        if chunks:
            seconds += self._prefill_s(chunks)
        return seconds / self._efficiency + self._overhead_s

    def decode_seconds(self, contexts: Sequence[int], num_steps: int) -> list[float]:
        """See CostModel."""
        lens = np.asarray(contexts, np.int64)[:, None] + np.arange(num_steps)  # [B, num_steps]
        longest = int(lens[:, -1].max())
        totals = [self._dense_s(len(lens)) + self._sampling_s(len(lens))] * num_steps
        for part in self._attention:
            if longest >= len(part.seen):
                self._grow(part, longest)
            read = part.read_array[lens].sum(axis=0).tolist()
            seen = part.seen_array[lens].sum(axis=0).tolist()
            totals = [
                total + part.count * max(r * self._byte_s, s * self._pair_s)
                for total, r, s in zip(totals, read, seen, strict=True)
            ]
        return [total / self._efficiency + self._overhead_s for total in totals]

    def to_json(self) -> dict[str, Any]:
        """See CostModel."""
        return {
            "kind": "roofline",
            "hardware": self._hardware.name,
            "tensor_parallel": self._ranks,
            "efficiency": self._efficiency,
            "overhead_s": self._overhead_s,
        }

    def _dense_s(self, tokens: int) -> float:
        """Everything but attention and the logits, and the sums over ranks."""
        seconds = self._dense.get(tokens)
        if seconds is None:
            cost = step_cost.step(
                self._config, [(tokens, tokens)], self._formats, post_norms=self._post_norms, num_sampled=1
            )
            seconds = sum(
                part.seconds(self._hardware)
                for name, part in cost.parts.items()
                if name not in ("logits", "sample") and "attention" not in name
            )
            if self._ranks > 1:
                seconds += all_reduce_seconds(
                    self._whole,
                    tokens,
                    self._ranks,
                    self._hardware,
                    activation_bytes=self._formats.activation_bytes,
                )
            self._dense[tokens] = seconds
        return seconds

    def _sampling_s(self, rows: int) -> float:
        seconds = self._sampling.get(rows)
        if seconds is None:
            seconds = kernel_cost.logits(rows, self._config, self._formats).seconds(self._hardware)
            seconds += kernel_cost.sample(rows, self._config.vocab_size).seconds(self._hardware)
            self._sampling[rows] = seconds
        return seconds

    def _grow(self, part: _Attention, context_len: int) -> None:
        """Extend the tables to `context_len`."""
        for length in range(len(part.seen), context_len + _MORE):
            cost = kernel_cost.decode_attention(self._heads, [max(1, length)], self._formats, part.window)
            part.read_bytes.append(cost.moved_bytes - cost.cached_bytes)
            part.seen.append(length if part.window is None else min(length, part.window))
        part.read_array, part.seen_array = np.asarray(part.read_bytes), np.asarray(part.seen)

    def _prefill_s(self, chunks: Sequence[Chunk]) -> float:
        """As kernel_cost.prefill_attention, of which what tiles read again is in a cache."""
        heads, formats = self._heads, self._formats
        row_bytes = heads.num_heads * heads.head_dim * formats.activation_bytes
        token_bytes = formats.kv.bytes_per_token(heads.num_kv_heads, heads.head_dim)
        size = formats.block_size
        seconds = 0.0
        for part in self._attention:
            read = pairs = 0
            for query_len, context_len in chunks:
                first = 0
                if part.window is not None:
                    first = max(0, context_len - query_len + 1 - part.window)
                blocks = -(-context_len // size) - first // size
                read += (context_len - first) * token_bytes + blocks * kernel_cost.INDEX_BYTES
                read += 2 * query_len * row_bytes
                pairs += visible_pairs(query_len, context_len, part.window)
            seconds += part.count * max(read * self._byte_s, pairs * self._pair_s)
        return seconds
