"""FlashInfer and FlashAttention behind the CUDA backend: stand-ins that do what their documentation says."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from test_cuda import CPU, SMALL, engine, generate
from tiny import tiny_model

from gqa_serve.engine.backends.cuda_libraries import AttentionLibrary, attention_library
from gqa_serve.errors import ConfigError


def attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, window_left: int, cap: float
) -> torch.Tensor:
    """One request: q [new, H, D], k and v [context, KV, D], causal from the bottom right, [new, H, D]."""
    group = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q, k) * scale
    if cap > 0:
        scores = torch.tanh(scores / cap) * cap
    position = torch.arange(len(k) - len(q), len(k))[:, None]
    key = torch.arange(len(k))
    hidden = key > position
    if window_left >= 0:
        hidden |= key < position - window_left
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(hidden, -torch.inf).softmax(-1), v)


class Wrapper:
    """flashinfer.BatchPrefillWithPagedKVCacheWrapper, of pages [pages, KV, page_size, D] ("HND")."""

    def __init__(self, workspace: torch.Tensor, kv_layout: str) -> None:
        assert kv_layout == "HND"
        assert workspace.dtype == torch.uint8

    def plan(
        self,
        qo_indptr: torch.Tensor,
        paged_kv_indptr: torch.Tensor,
        paged_kv_indices: torch.Tensor,
        paged_kv_last_page_len: torch.Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim_qk: int,
        page_size: int,
        *,
        causal: bool,
        sm_scale: float,
        window_left: int,
        logits_soft_cap: float | None,
        q_data_type: torch.dtype,
        kv_data_type: torch.dtype,
    ) -> None:
        assert causal
        for tensor in (qo_indptr, paged_kv_indptr, paged_kv_last_page_len):
            assert tensor.device == CPU  # plans are made on the host: a device tensor would be waited for
            assert tensor.dtype == torch.int32
        assert paged_kv_indices.dtype == torch.int32
        self.shape = (num_qo_heads, num_kv_heads, head_dim_qk, page_size)
        self.requests = []
        for b in range(len(qo_indptr) - 1):
            pages = paged_kv_indices[paged_kv_indptr[b] : paged_kv_indptr[b + 1]].long()
            context = (len(pages) - 1) * page_size + int(paged_kv_last_page_len[b])
            self.requests.append((slice(*qo_indptr[b : b + 2].tolist()), pages, context))
        self.scores = (sm_scale, window_left, logits_soft_cap or 0.0)
        self.dtypes = (q_data_type, kv_data_type)

    def run(self, q: torch.Tensor, cache: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        assert (q.shape[1], *cache[0].shape[1::2], cache[0].shape[2]) == self.shape
        assert (q.dtype, cache[0].dtype) == self.dtypes
        out = torch.empty_like(q)
        for rows, pages, context in self.requests:
            k, v = (x[pages].transpose(1, 2).flatten(0, 1)[:context] for x in cache)
            out[rows] = attention(q[rows], k, v, *self.scores)
        return out


def varlen(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    softmax_scale: float,
    causal: bool,
    window_size: tuple[int, int],
    softcap: float,
    block_table: torch.Tensor,
) -> torch.Tensor:
    """flash_attn.flash_attn_varlen_func, of pages [pages, page_size, KV, D]."""
    assert causal
    assert k.shape[1] % 256 == 0
    assert k.stride(-1) == 1
    assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == block_table.dtype == torch.int32
    assert cu_seqlens_q.diff().max() == max_seqlen_q
    assert cu_seqlens_k.diff().max() == max_seqlen_k
    assert window_size == (-1, -1) or window_size[1] == 0
    out = torch.empty_like(q)
    for b in range(len(cu_seqlens_q) - 1):
        rows = slice(*cu_seqlens_q[b : b + 2].tolist())
        context = int(cu_seqlens_k[b + 1] - cu_seqlens_k[b])
        keys, values = (x[block_table[b].long()].flatten(0, 1)[:context] for x in (k, v))
        out[rows] = attention(q[rows], keys, values, softmax_scale, window_size[0], softcap)
    return out


def library_of_stand_ins(name: str, patch: pytest.MonkeyPatch) -> AttentionLibrary:
    flashinfer, flash_attn = ModuleType("flashinfer"), ModuleType("flash_attn")
    flashinfer.BatchPrefillWithPagedKVCacheWrapper = Wrapper  # type: ignore[attr-defined]
    flash_attn.flash_attn_varlen_func = varlen  # type: ignore[attr-defined]
    patch.setitem(sys.modules, "flashinfer", flashinfer)
    patch.setitem(sys.modules, "flash_attn", flash_attn)
    library = attention_library(name, CPU)
    assert library is not None
    return library


@pytest.mark.parametrize(("name", "block_size"), [("flashinfer", 16), ("flash-attn", 256)])
def test_libraries_generate_what_the_reference_does(
    name: str, block_size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Windows, soft caps, groups, chunks and decoding requests in one step."""
    sizes: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2, **SMALL}
    tiny_model("gemma2", **sizes).save_pretrained(tmp_path)
    settings = {"block_size": block_size, "kv_cache_memory": 1 << 22}
    with monkeypatch.context() as patch:
        expected = generate(engine(tmp_path, patch, None, **settings))
    with monkeypatch.context() as patch:
        library = library_of_stand_ins(name, patch)
    assert block_size % library.block_multiple == 0
    with monkeypatch.context() as patch:
        assert generate(engine(tmp_path, patch, {"library": library}, **settings)) == expected


def test_a_library_that_is_not_installed() -> None:
    with pytest.raises(ConfigError, match=r"flashinfer cannot be used .*pip install flashinfer-python"):
        attention_library("flashinfer", CPU)
    assert attention_library("triton", CPU) is None
