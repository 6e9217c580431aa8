"""What a whole step of a model costs: its kernels' costs by name, for any mix of prompts and decoding
requests.

Owns which kernels a step runs, how often and on which shapes. What one costs is `kernel_cost.py`'s; kernels
run one after the other, and the time between two is not counted. Imports no torch, because the planning tools
read it.
Invariant: a step costs the sum of its parts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from gqa_serve.engine.model_config import ModelConfig
from gqa_serve.workbench.hardware import Hardware
from gqa_serve.workbench.kernel_cost import (
    DEFAULT,
    Cost,
    Formats,
    Heads,
    decode_attention,
    embed,
    gated_activation,
    linear,
    logits,
    prefill_attention,
    rms_norm,
    rotate_and_write,
    sample,
)


@dataclass(frozen=True)
class StepCost:
    """A whole step: its parts by name, each over all layers that have it, in the order of a layer."""

    parts: Mapping[str, Cost]

    @property
    def must_bytes(self) -> int:
        return sum(part.must_bytes for part in self.parts.values())

    @property
    def moved_bytes(self) -> int:
        return sum(part.moved_bytes for part in self.parts.values())

    @property
    def flops(self) -> int:
        return sum(part.flops for part in self.parts.values())

    def seconds(self, gpu: Hardware) -> float:
        """Expected time: kernels run one after the other."""
        return sum(part.seconds(gpu) for part in self.parts.values())

    def least_seconds(self, gpu: Hardware) -> float:
        """Time that no kernels beat: each moves no byte more than it must."""
        return sum(part.least_seconds(gpu) for part in self.parts.values())


def step(
    config: ModelConfig,
    lens: Sequence[tuple[int, int]],
    formats: Formats = DEFAULT,
    *,
    post_norms: bool = False,
    num_sampled: int | None = None,
) -> StepCost:
    """A step that computes (query_len, context_len) per request; rows of one token go to the decode kernel.

    `post_norms`: attention and MLP outputs are normed before they are added (Gemma 2 and 3, OLMo 2), which a
    ModelConfig does not say. `num_sampled`: rows that sample, all requests unless given.
    """
    heads, layers, hidden = Heads.of(config), config.num_layers, config.hidden_size
    tokens = sum(query_len for query_len, _ in lens)
    rows = len(lens) if num_sampled is None else num_sampled
    q_size, kv_size = heads.num_heads * heads.head_dim, heads.num_kv_heads * heads.head_dim
    parts = {
        "embed": embed(tokens, hidden, formats),
        "first norm": rms_norm(tokens, hidden, formats),
        "norms": rms_norm(tokens, hidden, formats, add=True).times(2 * layers),
        "qkv": linear(tokens, hidden, q_size + 2 * kv_size, formats, bias=config.qkv_bias).times(layers),
        **_rotations(config, tokens, formats),
        **_attention(config, lens, formats),
        "o": linear(tokens, q_size, hidden, formats, bias=config.o_bias).times(layers),
        "gate, up": linear(tokens, hidden, 2 * config.intermediate_size, formats, bias=config.mlp_bias).times(
            layers
        ),
        "gated activation": gated_activation(tokens, config.intermediate_size, formats).times(layers),
        "down": linear(tokens, config.intermediate_size, hidden, formats, bias=config.mlp_bias).times(layers),
    }
    if rows:  # a chunk of a prompt that is not its last makes no logits
        parts["logits"] = logits(rows, config, formats)
        parts["sample"] = sample(rows, config.vocab_size)
    if config.qk_norm == "full":
        parts["q norm"] = rms_norm(tokens, q_size, formats).times(layers)
        parts["k norm"] = rms_norm(tokens, kv_size, formats).times(layers)
    if post_norms:
        parts["post norms"] = rms_norm(tokens, hidden, formats).times(2 * layers)
    return StepCost(parts)


def decode_step(
    config: ModelConfig,
    batch_size: int,
    context_len: int,
    formats: Formats = DEFAULT,
    *,
    post_norms: bool = False,
) -> StepCost:
    """One token for each of `batch_size` requests of `context_len` tokens, the new one included."""
    return step(config, [(1, context_len)] * batch_size, formats, post_norms=post_norms)


def weight_bytes(config: ModelConfig, formats: Formats = DEFAULT) -> int:
    """Memory of the matrices: layers, output head, and the embedding where it is not tied to that."""
    hidden, q_size = config.hidden_size, config.num_heads * config.head_dim
    kv_size = config.num_kv_heads * config.head_dim
    matrix = formats.weights.matrix_bytes
    layer = matrix(q_size + 2 * kv_size, hidden) + matrix(hidden, q_size)
    layer += matrix(2 * config.intermediate_size, hidden) + matrix(hidden, config.intermediate_size)
    vocabulary = formats.head.matrix_bytes(config.vocab_size, hidden)
    return config.num_layers * layer + vocabulary * (1 if config.tie_embeddings else 2)


def kv_bytes(config: ModelConfig, num_tokens: int, formats: Formats = DEFAULT) -> int:
    """Memory of K and V of `num_tokens` tokens in all layers."""
    return num_tokens * config.num_layers * formats.kv.bytes_per_token(config.num_kv_heads, config.head_dim)


def _rotations(config: ModelConfig, tokens: int, formats: Formats) -> dict[str, Cost]:
    """One part per rotated width: layers without positions read no angles."""
    heads = Heads.of(config)
    dims = [0 if rope is None else rope.rotary_dim for rope in config.ropes]
    return {
        "rotate, write" if len(set(dims)) == 1 else f"rotate {dim}, write": rotate_and_write(
            tokens, heads, formats, dim
        ).times(dims.count(dim))
        for dim in dict.fromkeys(dims)
    }


def _attention(config: ModelConfig, lens: Sequence[tuple[int, int]], formats: Formats) -> dict[str, Cost]:
    """One part per kernel and distinct window."""
    heads = Heads.of(config)
    decoded = [context_len for query_len, context_len in lens if query_len == 1]
    chunks = [(query_len, context_len) for query_len, context_len in lens if query_len > 1]
    parts = {}
    for window in dict.fromkeys(config.windows):
        count = config.windows.count(window)
        suffix = "" if window is None else f", window {window}"
        if decoded:
            parts[f"decode attention{suffix}"] = decode_attention(heads, decoded, formats, window).times(
                count
            )
        if chunks:
            parts[f"prefill attention{suffix}"] = prefill_attention(heads, chunks, formats, window).times(
                count
            )
    return parts
