"""Attention by other packages where they are installed: FlashInfer, FlashAttention 2.

Owns the translation of a step into their arguments: one call per layer computes prompts and decoding
requests together. Both read our cache where it lies. Neither is needed; `--attention-backend` chooses.

Invariant: the host knows everything a plan needs, so nothing here waits for the device, but for the copies
of two plans before. Their plans depend
on the lengths of a step, so steps are not captured in graphs; their order of sums is theirs, so
`--deterministic` and quantized caches are not served.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch

from gqa_serve.engine.backends.base import AttentionLayout
from gqa_serve.engine.backends.cuda_step import StepArrays
from gqa_serve.engine.kv_cache import LayerKV
from gqa_serve.engine.transfer import to_device
from gqa_serve.errors import ConfigError

Attend = Callable[[torch.Tensor, LayerKV], torch.Tensor]
"""q [T, H, D] and a layer's cache -> [T, H, D]."""

_WORKSPACE_BYTES = 128 << 20  # what FlashInfer's documentation asks for


class AttentionLibrary(Protocol):
    """A package's attention over one device."""

    block_multiple: int

    def plan(
        self, arrays: StepArrays, layout: AttentionLayout, block_size: int, dtype: torch.dtype
    ) -> Sequence[Attend]:
        """What computes the layers of a step, one for each distinct window."""


class FlashInfer:
    """FlashInfer's paged prefill, which takes single tokens too. Its "HND" layout of K and V is ours."""

    block_multiple = 1

    def __init__(self, device: torch.device) -> None:
        import flashinfer

        self.device = device
        self.wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper
        self.workspace = torch.empty(_WORKSPACE_BYTES, dtype=torch.uint8, device=device)
        # Plans are copied from pinned memory of the wrappers, which they must not write to again before that:
        # two sets of wrappers take turns, each with the event after its last copies.
        self.sets: list[list[Any]] = [[], []]
        self.copied: list[torch.cuda.Event | None] = [None, None]
        self.turn = 0

    def plan(
        self, arrays: StepArrays, layout: AttentionLayout, block_size: int, dtype: torch.dtype
    ) -> Sequence[Attend]:
        self.turn = 1 - self.turn
        wrappers, event = self.sets[self.turn], self.copied[self.turn]
        if event is not None:
            event.synchronize()
        while len(wrappers) < len(layout.windows):
            wrappers.append(self.wrapper(self.workspace, "HND"))
        regions = arrays.regions
        context_lens = regions["context_lens"]
        ends = np.append(regions["block_starts"], len(regions["block_ids"])).astype(np.int32)
        on_host = [torch.from_numpy(x) for x in (regions["query_starts"], ends)]
        last = torch.from_numpy((context_lens - 1) % block_size + 1)
        indices = to_device(regions["block_ids"], self.device)
        result: list[Attend] = []
        for wrapper, window in zip(wrappers, layout.windows, strict=True):
            wrapper.plan(
                *on_host,
                indices,
                last,
                layout.num_heads,
                layout.num_kv_heads,
                layout.head_dim,
                block_size,
                causal=True,
                sm_scale=layout.scale,
                window_left=-1 if window is None else window - 1,
                logits_soft_cap=layout.soft_cap,
                q_data_type=dtype,
                kv_data_type=dtype,
            )
            result.append(partial(_run, wrapper))
        if self.device.type == "cuda":
            self.copied[self.turn] = event = event or torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record()
        return result


class FlashAttention:
    """FlashAttention 2's ragged attention over blocks of a multiple of 256 tokens."""

    block_multiple = 256

    def __init__(self, device: torch.device) -> None:
        from flash_attn import flash_attn_varlen_func

        self.device = device
        self.function = flash_attn_varlen_func

    def plan(
        self, arrays: StepArrays, layout: AttentionLayout, block_size: int, dtype: torch.dtype
    ) -> Sequence[Attend]:
        regions = arrays.regions
        query_starts, context_lens = regions["query_starts"], regions["context_lens"]
        counts = -(-context_lens // block_size)
        table = np.zeros((len(counts), int(counts.max())), np.int32)
        table[np.arange(table.shape[1]) < counts[:, None]] = regions["block_ids"]
        common = {
            "cu_seqlens_q": to_device(query_starts, self.device),
            "cu_seqlens_k": to_device(_starts(context_lens), self.device),
            "max_seqlen_q": int(np.diff(query_starts).max()),
            "max_seqlen_k": int(context_lens.max()),
            "softmax_scale": layout.scale,
            "softcap": layout.soft_cap or 0.0,
            "causal": True,
            "block_table": to_device(table, self.device),
        }

        def attend(window: int | None, q: torch.Tensor, kv: LayerKV) -> torch.Tensor:
            sees = (-1, -1) if window is None else (window - 1, 0)
            # [num_blocks, block_size, KV, D]: the same memory, seen from the other side
            k, v = kv.k.transpose(1, 2), kv.v.transpose(1, 2)
            out: torch.Tensor = self.function(q, k, v, window_size=sees, **common)
            return out

        return [partial(attend, window) for window in layout.windows]


def _run(wrapper: Any, q: torch.Tensor, kv: LayerKV) -> torch.Tensor:
    out: torch.Tensor = wrapper.run(q, (kv.k, kv.v))
    return out


def _starts(lengths: np.ndarray) -> np.ndarray:
    return np.concatenate(([0], np.cumsum(lengths))).astype(np.int32)


_LIBRARIES: dict[str, tuple[str, type[FlashInfer] | type[FlashAttention]]] = {
    "flashinfer": ("flashinfer-python", FlashInfer),
    "flash-attn": ("flash-attn", FlashAttention),
}


def attention_library(name: str, device: torch.device) -> AttentionLibrary | None:
    """What --attention-backend names; None: our own kernels. Raises ConfigError if it is not installed."""
    if name == "triton":
        return None
    package, library = _LIBRARIES[name]
    try:
        return library(device)
    except ImportError as error:
        raise ConfigError(
            f"--attention-backend {name} cannot be used ({error}); pip install {package}, or leave it out."
        ) from error
