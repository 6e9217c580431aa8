"""What a family file provides, and the map from checkpoint names to the model's fused parameters.

    checkpoint                               parameter            rows
    model.layers.0.self_attn.q_proj.weight   layers.0.qkv.weight  [0, H*D)
    model.layers.0.self_attn.k_proj.weight   layers.0.qkv.weight  [H*D, (H+KV)*D)
    model.layers.0.self_attn.v_proj.weight   layers.0.qkv.weight  [(H+KV)*D, (H+2KV)*D)
    model.layers.0.mlp.gate_proj.weight      layers.0.gate_up.weight  [0, I)
    model.layers.0.mlp.up_proj.weight        layers.0.gate_up.weight  [I, 2I)

Owns the names of the model's parameters and their shapes. Knows no tensor and imports no torch.
Invariant: the slots of one parameter tile its rows exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from gqa_serve.engine.model_config import ModelConfig


@dataclass(frozen=True)
class WeightSlot:
    """Where one checkpoint tensor of `shape` goes: rows `row` .. `row + shape[0]` of `parameter`."""

    parameter: str
    row: int
    shape: tuple[int, ...]


@dataclass(frozen=True)
class WeightNames:
    """How a family names its tensors inside `model.layers.N`. None: the family has no such tensor.

    The four norms stand before attention, after attention, before the MLP and after the MLP. With
    `fused` the checkpoint already holds qkv_proj and gate_up_proj.
    """

    attn_norm: str | None = "input_layernorm"
    post_attn_norm: str | None = None
    mlp_norm: str | None = "post_attention_layernorm"
    post_mlp_norm: str | None = None
    fused: bool = False


@dataclass(frozen=True)
class Family:
    """One model family: what it answers to, how its config reads, how its tensors are named.

    `prefixes` are the spellings of the decoder's place in a checkpoint, tried in order; a multimodal
    checkpoint holds the text decoder deeper. Tensors under one of `ignored` belong to parts that are not
    served.
    """

    name: str
    architectures: tuple[str, ...]
    model_types: tuple[str, ...]
    config_from_hf: Callable[[Mapping[str, Any]], ModelConfig]
    names: WeightNames = WeightNames()
    prefixes: tuple[str, ...] = ("model.",)
    heads: tuple[str, ...] = ("lm_head.weight",)
    ignored: tuple[str, ...] = ()


def parameter_shapes(config: ModelConfig, names: WeightNames) -> dict[str, tuple[int, ...]]:
    """Every parameter of the model and its shape, in the order of the forward pass."""
    shapes: dict[str, tuple[int, ...]] = {}
    for slot in _decoder_slots(config, names).values():
        rows = slot.row + slot.shape[0]
        shapes[slot.parameter] = (max(rows, shapes.get(slot.parameter, (0,))[0]), *slot.shape[1:])
    if not config.tie_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, config.hidden_size)
    return shapes


def weight_slots(config: ModelConfig, family: Family, prefix: str) -> dict[str, WeightSlot]:
    """Checkpoint name -> slot, for a checkpoint that keeps its decoder under `prefix`."""
    slots = {prefix + name: slot for name, slot in _decoder_slots(config, family.names).items()}
    if not config.tie_embeddings:
        head = WeightSlot("lm_head.weight", 0, (config.vocab_size, config.hidden_size))
        slots.update(dict.fromkeys(family.heads, head))
    return slots


def _decoder_slots(config: ModelConfig, names: WeightNames) -> dict[str, WeightSlot]:
    """Slots by the name inside the decoder, without the prefix or the output head."""
    embedding = (config.vocab_size, config.hidden_size)
    slots = {"embed_tokens.weight": WeightSlot("embed.weight", 0, embedding)}
    for layer in range(config.num_layers):
        for name, slot in _layer_slots(config, names).items():
            parameter = f"layers.{layer}.{slot.parameter}"
            slots[f"layers.{layer}.{name}"] = WeightSlot(parameter, slot.row, slot.shape)
    slots["norm.weight"] = WeightSlot("norm.weight", 0, (config.hidden_size,))
    return slots


def _layer_slots(config: ModelConfig, names: WeightNames) -> dict[str, WeightSlot]:
    hidden, head_dim = config.hidden_size, config.head_dim
    q_rows, kv_rows = config.num_heads * head_dim, config.num_kv_heads * head_dim
    inner = config.intermediate_size
    slots: dict[str, WeightSlot] = {}

    def linear(name: str, parameter: str, row: int, out: int, into: int, bias: bool) -> None:
        slots[f"{name}.weight"] = WeightSlot(f"{parameter}.weight", row, (out, into))
        if bias:
            slots[f"{name}.bias"] = WeightSlot(f"{parameter}.bias", row, (out,))

    def norm(name: str | None, parameter: str, size: int = hidden) -> None:
        if name is not None:
            slots[f"{name}.weight"] = WeightSlot(f"{parameter}.weight", 0, (size,))

    norm(names.attn_norm, "attn_norm")
    if names.fused:
        linear("self_attn.qkv_proj", "qkv", 0, q_rows + 2 * kv_rows, hidden, config.qkv_bias)
    else:
        linear("self_attn.q_proj", "qkv", 0, q_rows, hidden, config.qkv_bias)
        linear("self_attn.k_proj", "qkv", q_rows, kv_rows, hidden, config.qkv_bias)
        linear("self_attn.v_proj", "qkv", q_rows + kv_rows, kv_rows, hidden, config.qkv_bias)
    if config.qk_norm != "none":
        norm("self_attn.q_norm", "q_norm", head_dim if config.qk_norm == "head" else q_rows)
        norm("self_attn.k_norm", "k_norm", head_dim if config.qk_norm == "head" else kv_rows)
    linear("self_attn.o_proj", "o", 0, hidden, q_rows, config.o_bias)
    norm(names.post_attn_norm, "post_attn_norm")
    norm(names.mlp_norm, "mlp_norm")
    if names.fused:
        linear("mlp.gate_up_proj", "gate_up", 0, 2 * inner, hidden, config.mlp_bias)
    else:
        linear("mlp.gate_proj", "gate_up", 0, inner, hidden, config.mlp_bias)
        linear("mlp.up_proj", "gate_up", inner, inner, hidden, config.mlp_bias)
    linear("mlp.down_proj", "down", 0, hidden, inner, config.mlp_bias)
    norm(names.post_mlp_norm, "post_mlp_norm")
    return slots
