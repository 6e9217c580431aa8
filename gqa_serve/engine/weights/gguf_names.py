"""GGUF tensor names to Hugging Face names, and the value changes llama.cpp's converter makes.

Owns, per architecture, the name table, whether Q and K rows are permuted, and whether norm weights
are stored plus one. Does not know the file format or the config. Source: llama.cpp's converters
(conversion/*.py, `modify_tensors`) and gguf-py's tensor_mapping.py, undone here. Invariant: a tensor
whose meaning is unknown is an error, never dropped.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gqa_serve.errors import UnsupportedModelError

if TYPE_CHECKING:
    import torch

# Read into the config (rotary factors), not into the model.
CONFIG_TENSORS = frozenset({"rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"})

_GLOBAL = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_BLOCK = re.compile(r"blk\.(\d+)\.([a-z0-9_]+)\.(weight|bias)")
_TOP = re.compile(r"([a-z0-9_]+)\.(weight|bias)")

_ATTENTION = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
}
_QK_NORM = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_MLP = {"ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
_PRE_NORMS = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
_POST_NORMS = {
    "post_attention_norm": "post_attention_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_GEMMA_NORMS = {"attn_norm": "input_layernorm", "ffn_norm": "pre_feedforward_layernorm", **_POST_NORMS}
_FUSED = {
    "attn_qkv": "self_attn.qkv_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_up": "mlp.gate_up_proj",
    "ffn_down": "mlp.down_proj",
}


@dataclass(frozen=True)
class TensorRules:
    """How one architecture's tensors map back to Hugging Face's.

    `permuted`: Q and K rows are interleaved for llama.cpp's "norm" rotary layout.
    `norm_plus_one`: norm weights are stored as `1 + weight`.
    """

    block: dict[str, str]
    permuted: bool = False
    norm_plus_one: bool = False


_LLAMA = TensorRules({**_ATTENTION, **_MLP, **_PRE_NORMS}, permuted=True)

# The table of supported architectures: `general.architecture` -> rules.
RULES: dict[str, TensorRules] = {
    "llama": _LLAMA,
    "mistral3": _LLAMA,
    "smollm3": _LLAMA,
    "granite": _LLAMA,
    "qwen2": TensorRules({**_ATTENTION, **_MLP, **_PRE_NORMS}),
    "qwen3": TensorRules({**_ATTENTION, **_QK_NORM, **_MLP, **_PRE_NORMS}),
    "gemma2": TensorRules({**_ATTENTION, **_MLP, **_GEMMA_NORMS}, norm_plus_one=True),
    "gemma3": TensorRules({**_ATTENTION, **_QK_NORM, **_MLP, **_GEMMA_NORMS}, norm_plus_one=True),
    "phi3": TensorRules({**_FUSED, **_PRE_NORMS}),
    "olmo2": TensorRules({**_ATTENTION, **_QK_NORM, **_MLP, **_POST_NORMS}),
}


def rules_for(architecture: str) -> TensorRules:
    """The rules of a supported architecture; `UnsupportedModelError` for any other."""
    rules = RULES.get(architecture)
    if rules is None:
        raise UnsupportedModelError(
            f"GGUF architecture {architecture!r} is not supported; supported are {', '.join(sorted(RULES))}."
        )
    return rules


def hf_name(name: str, architecture: str) -> str:
    """Translate one GGUF tensor name; `UnsupportedModelError` if the architecture has no such tensor."""
    rules = rules_for(architecture)
    if match := _BLOCK.fullmatch(name):
        layer, part, suffix = match.groups()
        if part in rules.block:
            return f"model.layers.{layer}.{rules.block[part]}.{suffix}"
    elif (match := _TOP.fullmatch(name)) and match[1] in _GLOBAL:
        return f"{_GLOBAL[match[1]]}.{match[2]}"
    raise UnsupportedModelError(
        f"GGUF tensor {name!r} is not part of a supported {architecture} model; "
        "use the file of a plain text model."
    )


def undo_conversion(
    name: str, tensor: torch.Tensor, rules: TensorRules, num_heads: int, num_kv_heads: int
) -> torch.Tensor:
    """Give a tensor (under its Hugging Face name) the value it has in a Hugging Face checkpoint.

    Of a quantized matrix, `tensor` is its bytes by rows: a permutation moves whole rows.
    """
    owner = name.rsplit(".", 2)[-2]  # "...self_attn.q_proj.weight" -> "q_proj"
    if rules.permuted and owner in ("q_proj", "k_proj"):
        return unpermute(tensor, num_heads if owner == "q_proj" else num_kv_heads)
    if rules.norm_plus_one and (owner == "norm" or owner.endswith(("layernorm", "_norm"))):
        return tensor - 1
    return tensor


def unpermute(tensor: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Undo `LlamaModel.permute` of llama.cpp's converter on rows of Q or K (weight or bias).

    Per head the file interleaves the two rotary halves (x0 y0 x1 y1 ...); Hugging Face keeps them
    one after the other (x0 x1 ... y0 y1 ...). The caller has checked that rows divide by 2 * num_heads.
    """
    pairs = tensor.shape[0] // num_heads // 2
    grouped = tensor.reshape(num_heads, pairs, 2, *tensor.shape[1:])  # [heads, pairs, 2, ...]
    return grouped.transpose(1, 2).reshape(tensor.shape)
