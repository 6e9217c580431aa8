"""A backend that can be differentiated: the engine's own `Decoder` becomes a model that trains.

Owns the operations of `engine/backends/base.py` in plain torch with gradients, over packed texts: the T
tokens of a batch are texts one after the other, each attending to itself alone (block-diagonal causal
attention), and there is no KV cache. Knows no loss, no optimizer and no checkpoint.
Invariant: the engine adds to the residual stream in place, so nothing here keeps that tensor for the backward
pass: an operation that needs its value keeps a copy of its own.

    texts of a batch         t0 t0 t0 | t1 t1 | t2 t2 t2 t2        T tokens, flat
    who sees whom            lower triangle per text, zero elsewhere
    computed as              one call per run of texts of equal length: [texts, H, length, D]
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from gqa_serve.engine.backends.base import (
    AttentionLayout,
    AttentionStep,
    Backend,
    Entries,
    HeadNorms,
    Linear,
    Packed,
    Role,
)
from gqa_serve.engine.batch import ForwardBatch

if TYPE_CHECKING:
    from gqa_serve.engine.kv_cache import KVCache
    from gqa_serve.engine.model_config import Activation, ModelConfig
    from gqa_serve.engine.models.layers import DecoderLayer
    from gqa_serve.engine.weights.quantized_matrix import QuantizedMatrix


@dataclass(frozen=True, eq=False)
class TrainablePart:
    """A matrix [n, k] that a layer is made of, and its bias [n] if it has one: both belong to the model."""

    weight: torch.Tensor
    bias: torch.Tensor | None = None

    @property
    def nbytes(self) -> int:
        return self.weight.nbytes + (0 if self.bias is None else self.bias.nbytes)

    @property
    def format(self) -> str:
        return str(self.weight.dtype).removeprefix("torch.")


class NoCache:
    """Stands for the KV cache, which training does not have."""

    block_size = 0
    num_blocks = 0


def packed_batch(token_ids: torch.Tensor, lens: Sequence[int]) -> ForwardBatch:
    """Texts of `lens` tokens one after the other, positions from 0 in each. token_ids [T], T = sum(lens)."""
    device = token_ids.device
    positions = torch.cat([torch.arange(length) for length in lens]).to(device)
    nothing = torch.empty(0, dtype=torch.int64, device=device)
    return ForwardBatch(token_ids, positions, nothing, nothing.view(0, 0), nothing, list(lens), list(lens))


class TrainingBackend(Backend):
    """Parameters stay where the model holds them; gradients flow to those that ask for them.

    `embedding_dtype` is the dtype to which the embedding's scale is rounded, as the served model rounds it.
    `norm_plus_one`: norm weights are held as the checkpoint stores them, minus one.
    """

    name = "training"
    kv_dtype = "float32"

    def __init__(self, *, norm_plus_one: bool = False, embedding_dtype: torch.dtype = torch.float32) -> None:
        self.norm_plus_one = norm_plus_one
        self.embedding_dtype = embedding_dtype
        self.stream: torch.Tensor | None = None  # the residual stream of the pass under way

    def own(self, x: torch.Tensor) -> torch.Tensor:
        """x itself, or a copy of it if it is the residual stream, which changes before the backward pass."""
        return x.clone() if x is self.stream else x

    # --- at load ---

    def pack(self, weight: torch.Tensor | QuantizedMatrix, role: Role) -> Packed:
        tensor = weight if isinstance(weight, torch.Tensor) else weight.dequantize()
        return TrainablePart(tensor.detach().clone())

    def linear(self, parts: Sequence[Packed], bias: torch.Tensor | None) -> Linear:
        if bias is not None:
            raise ValueError("a trained layer's bias belongs to its parts")
        return TrainableLinear([cast("TrainablePart", part) for part in parts], self)

    def block_bytes(self, config: ModelConfig, block_size: int) -> int:
        raise NotImplementedError("training has no KV cache")

    def allocate_cache(self, config: ModelConfig, num_blocks: int, block_size: int) -> KVCache:
        raise NotImplementedError("training has no KV cache")

    # --- in a step ---

    def embed(
        self, table: Packed, token_ids: torch.Tensor, scale: float, entries: Entries | None = None
    ) -> torch.Tensor:
        if entries is not None:
            raise NotImplementedError("a model is trained whole, not by tensor-parallel ranks")
        rows = F.embedding(token_ids, cast("TrainablePart", table).weight)  # [T, E]
        rows = rows.float()
        if scale != 1.0:
            rows = rows * torch.tensor(scale, dtype=self.embedding_dtype).item()
        self.stream = rows
        return rows

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        return cast("torch.Tensor", _RMSNorm.apply(x, weight, eps, self.norm_plus_one))  # type: ignore[no-untyped-call]

    def add_rms_norm(
        self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor | None, eps: float, scale: float
    ) -> torch.Tensor:
        residual.add_(x, alpha=scale)
        return residual.clone() if weight is None else self.rms_norm(residual, weight, eps)

    def gated_activation(self, gate_up: torch.Tensor, activation: Activation) -> torch.Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        if activation == "silu":
            return F.silu(gate) * up
        return F.gelu(gate, approximate="tanh" if activation == "gelu_tanh" else "none") * up

    def prepare(self, batch: ForwardBatch, cache: KVCache, layout: AttentionLayout) -> AttentionStep:
        return PackedAttentionStep(batch, layout, self)

    def logits(self, head: Linear, hidden: torch.Tensor, scale: float, cap: float | None) -> torch.Tensor:
        logits = head(hidden).float()  # [R, V]
        if scale != 1.0:
            logits = logits * scale
        return logits if cap is None else torch.tanh(logits / cap) * cap


class TrainableLinear:
    """The parts joined in each pass, which is one product as in the engine, and split again by autograd."""

    def __init__(self, parts: Sequence[TrainablePart], backend: TrainingBackend) -> None:
        self.parts = parts
        self.backend = backend

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        weights = [part.weight for part in self.parts]
        biases = [part.bias for part in self.parts if part.bias is not None]
        weight = weights[0] if len(weights) == 1 else torch.cat(weights)
        bias = None if not biases else biases[0] if len(biases) == 1 else torch.cat(biases)
        return F.linear(self.backend.own(x), weight, bias)


class _RMSNorm(torch.autograd.Function):
    """RMSNorm that keeps the normed numbers, not its input.

    With n = x / r, r = sqrt(mean(x^2) + eps), y = n * g: dx = (dy g - n mean(dy g n)) / r, dg = sum(dy n).
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float, plus_one: bool) -> torch.Tensor:
        wide = x.float()
        inverse = (wide.square().mean(-1, keepdim=True) + eps).rsqrt_()
        normed = wide * inverse
        gain = weight.float() + 1.0 if plus_one else weight  # in bfloat16 the sum would lose digits
        ctx.save_for_backward(normed, inverse, gain)
        return (normed * gain).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        normed, inverse, gain = ctx.saved_tensors
        grad = grads[0].float()
        grad_weight = (grad * normed).flatten(0, -2).sum(0) if ctx.needs_input_grad[1] else None
        grad_normed = grad * gain
        along = (grad_normed * normed).mean(-1, keepdim=True)
        grad_x = (grad_normed - normed * along).mul_(inverse) if ctx.needs_input_grad[0] else None
        return None if grad_x is None else grad_x.to(grads[0].dtype), grad_weight, None, None


@dataclass(frozen=True)
class _Run:
    """`count` neighbouring texts of `length` tokens each, in the flat batch from `start` on."""

    start: int
    count: int
    length: int

    @property
    def tokens(self) -> slice:
        return slice(self.start, self.start + self.count * self.length)


class PackedAttentionStep(AttentionStep):
    """Attention of one pass. K and V of a layer are kept from `rotate_and_write` to `attend`, no longer."""

    def __init__(self, batch: ForwardBatch, layout: AttentionLayout, backend: TrainingBackend) -> None:
        self.layout = layout
        self.backend = backend
        self.split = (layout.num_heads, layout.num_kv_heads, layout.num_kv_heads)
        angles = [rotary.angles(batch.positions, torch.float32) for rotary in layout.rotaries]
        self.angles = [None if i is None else angles[i] for i in layout.layer_rotaries]
        self.runs = _runs(batch.query_lens)
        self.masks: dict[tuple[int, int | None], torch.Tensor] = {}
        self.held: tuple[torch.Tensor, torch.Tensor] | None = None

    def rotate_and_write(self, layer: int, qkv: torch.Tensor, norms: HeadNorms | None) -> torch.Tensor:
        heads = qkv.view(qkv.shape[0], -1, self.layout.head_dim)  # [T, H + 2 KV, D]
        q, k, v = heads.split_with_sizes(self.split, 1)
        if norms is not None:
            q, k = self._normalize(q, norms.q, norms), self._normalize(k, norms.k, norms)
        angles = self.angles[layer]
        if angles is not None:
            q, k = _rotate(q, *angles), _rotate(k, *angles)
        self.held = (k, v)
        return q

    def _normalize(self, x: torch.Tensor, weight: torch.Tensor, norms: HeadNorms) -> torch.Tensor:
        """x [T, heads, D], normed by head or over all of them."""
        if norms.mode == "head":
            return self.backend.rms_norm(x, weight, norms.eps)
        return self.backend.rms_norm(x.flatten(1), weight, norms.eps).view(x.shape)

    def attend(self, layer: int, q: torch.Tensor) -> torch.Tensor:
        if self.held is None:
            raise RuntimeError("attend before rotate_and_write")
        k, v = self.held
        self.held = None
        window = self.layout.windows[self.layout.layer_windows[layer]]
        outs = [self._attend_run(run, window, q, k, v) for run in self.runs]
        return outs[0] if len(outs) == 1 else torch.cat(outs)

    def _attend_run(
        self, run: _Run, window: int | None, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> torch.Tensor:
        """The run's rows of the output, [count * length, H * D]."""

        def texts(x: torch.Tensor) -> torch.Tensor:
            x = x[run.tokens].view(run.count, run.length, -1, self.layout.head_dim)
            if x.device.type == "cpu":  # torch's CPU kernel is slower in bfloat16, forward and backward
                x = x.float()
            if x.shape[2] != self.layout.num_heads:
                x = x.repeat_interleave(self.layout.group_size, 2)
            return x.transpose(1, 2)  # [count, H, length, D]

        dtype = q.dtype
        q, k, v = texts(q), texts(k), texts(v)
        masked = window is not None and window < run.length
        if self.layout.soft_cap is not None:
            mask = self._mask(run.length, window if masked else None, q.device)
            out = _capped_attention(q, k, v, mask, self.layout.scale, self.layout.soft_cap)
        elif masked:
            mask = self._mask(run.length, window, q.device)
            out = F.scaled_dot_product_attention(q, k, v, mask, scale=self.layout.scale)
        else:
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.layout.scale)
        return out.transpose(1, 2).reshape(run.count * run.length, -1).to(dtype)

    def _mask(self, length: int, window: int | None, device: torch.device) -> torch.Tensor:
        """[length, length] bool: which keys (columns) a query (row) sees."""
        mask = self.masks.get((length, window))
        if mask is None:
            mask = torch.ones(length, length, dtype=torch.bool, device=device).tril_()
            if window is not None:
                mask = mask.triu_(1 - window)
            self.masks[length, window] = mask
        return mask


class RecomputedLayer:
    """A layer of whose forward pass only the input is kept; the backward pass computes the rest again.

    Chen et al. 2016 (arXiv 1604.06174), with every layer a segment.
    """

    def __init__(self, layer: DecoderLayer, backend: TrainingBackend) -> None:
        self.layer = layer
        self.attn_norm = layer.attn_norm
        self.backend = backend

    def __call__(
        self, x: torch.Tensor, residual: torch.Tensor, next_norm: torch.Tensor | None, step: AttentionStep
    ) -> torch.Tensor:
        def compute(x: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            residual = residual.clone()  # the layer adds to it in place; the kept input must stay
            return self.layer(x, residual, next_norm, step), residual

        kept = self.backend.own(x), residual.clone()
        out, added = checkpoint(compute, *kept, use_reentrant=False, preserve_rng_state=False)
        residual.copy_(added)
        return cast("torch.Tensor", out)


def _runs(lens: Sequence[int]) -> list[_Run]:
    runs, start = [], 0
    for length, group in itertools.groupby(lens):
        count = sum(1 for _ in group)
        runs.append(_Run(start, count, length))
        start += count * length
    return runs


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """x [T, heads, D]; the first rotary_dim of D are rotated, in float32, and returned in x's dtype."""
    dim = cos.shape[-1]
    turned = x[..., :dim].float()
    first, second = turned.chunk(2, dim=-1)
    turned = (turned * cos + torch.cat((second, first), dim=-1) * sin).to(x.dtype)
    return turned if dim == x.shape[-1] else torch.cat((turned, x[..., dim:]), dim=-1)


def _capped_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor, scale: float, cap: float
) -> torch.Tensor:
    """softmax(cap * tanh(q k' scale / cap)) v; all [N, H, length, D], scores in float32."""
    scores = (q @ k.transpose(-1, -2)).float() * scale
    scores = torch.tanh(scores / cap) * cap
    weights = scores.masked_fill(~mask, float("-inf")).softmax(-1)
    return weights.to(v.dtype) @ v
