"""Quantized safetensors directories, written number by number as their formats are published.

Nothing of the product is used here: what it reads is compared with what these loops wrote.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

Parts = dict[str, torch.Tensor]

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # which of eight outputs lies in bits 0-3, 4-7, ...


def signed(word: int) -> int:
    return word - (1 << 32) if word >= 1 << 31 else word


def pack_words(codes: list[int], bits: int) -> list[int]:
    """Codes into 32-bit words, the first in the lowest bits."""
    per = 32 // bits
    codes = codes + [0] * (-len(codes) % per)
    return [
        signed(sum(code << (bits * i) for i, code in enumerate(codes[at : at + per])))
        for at in range(0, len(codes), per)
    ]


def quantized(
    weight: torch.Tensor, bits: int, group: int, symmetric: bool, scale_dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes [n, k], zeros and scales [n, groups] of a weight, and what they stand for."""
    n, k = weight.shape
    codes, numbers = torch.empty(n, k, dtype=torch.int64), torch.empty(n, k)
    count = -(-k // group)
    zeros, scales = torch.empty(n, count, dtype=torch.int64), torch.empty(n, count, dtype=scale_dtype)
    top = (1 << bits) - 1
    for g in range(count):
        part = weight[:, g * group : (g + 1) * group].float()
        if symmetric:
            scale = (part.abs().amax(1) / (top // 2)).to(scale_dtype)
            zero = torch.full((n,), 1 << (bits - 1))
        else:
            low, high = part.amin(1).clamp(max=0), part.amax(1).clamp(min=0)
            scale = ((high - low) / top).to(scale_dtype)
            zero = (-low / scale.float()).round().clamp(0, top).long()
        code = (part / scale.float()[:, None] + zero[:, None]).round().clamp(0, top)
        span = slice(g * group, g * group + part.shape[1])
        codes[:, span], zeros[:, g], scales[:, g] = code.long(), zero, scale
        numbers[:, span] = (code - zero[:, None]) * scale.float()[:, None]
    return codes, zeros, scales, numbers


def awq(weight: torch.Tensor, group: int) -> tuple[Parts, torch.Tensor]:
    codes, zeros, scales, numbers = quantized(weight, 4, group, False, torch.float16)

    def packed(columns: torch.Tensor) -> torch.Tensor:
        """[rows, n] -> [rows, n / 8]."""
        words = [
            [
                signed(sum(int(row[at + AWQ_ORDER[i]]) << (4 * i) for i in range(8)))
                for at in range(0, len(row), 8)
            ]
            for row in columns.tolist()
        ]
        return torch.tensor(words, dtype=torch.int32)

    return {
        "qweight": packed(codes.t()),
        "qzeros": packed(zeros.t()),
        "scales": scales.t().contiguous(),
    }, numbers


def gptq(
    weight: torch.Tensor,
    group: int,
    bits: int,
    symmetric: bool,
    first: bool,
    order: torch.Tensor | None = None,
) -> tuple[Parts, torch.Tensor]:
    """`order`: the inputs by group, where groups are not runs of inputs."""
    k = weight.shape[1]
    order = torch.arange(k) if order is None else order
    codes, zeros, scales, numbers = quantized(weight[:, order], bits, group, symmetric, torch.float16)
    back = order.argsort()
    codes, numbers = codes[:, back], numbers[:, back]
    g_idx = (torch.arange(k) // group)[back].int()
    if first:  # a zero of 0 can't be stored: 15 would be 16
        zeros = zeros - 1
        assert int(zeros.min()) >= 0
    qweight = torch.tensor([pack_words(row, bits) for row in codes.tolist()], dtype=torch.int32).t()
    qzeros = torch.tensor([pack_words(row, bits) for row in zeros.t().tolist()], dtype=torch.int32)
    parts = {"qweight": qweight, "qzeros": qzeros, "scales": scales.t(), "g_idx": g_idx}
    return {name: part.contiguous() for name, part in parts.items()}, numbers


def pack_quantized(
    weight: torch.Tensor, group: int, bits: int, symmetric: bool
) -> tuple[Parts, torch.Tensor]:
    codes, zeros, scales, numbers = quantized(weight, bits, group, symmetric, torch.bfloat16)
    parts = {
        "weight_packed": torch.tensor([pack_words(row, bits) for row in codes.tolist()], dtype=torch.int32),
        "weight_scale": scales,
        "weight_shape": torch.tensor(weight.shape),
    }
    if not symmetric:
        rows = torch.tensor([pack_words(row, bits) for row in zeros.t().tolist()], dtype=torch.int32)
        parts["weight_zero_point"] = rows.t().contiguous()
    return parts, numbers


def float8(weight: torch.Tensor, per: str) -> tuple[Parts, torch.Tensor]:
    """One scale in all ("tensor") or per output ("channel")."""
    peak = weight.abs().amax() if per == "tensor" else weight.abs().amax(1, keepdim=True)
    scale = peak.float() / 448
    codes = (weight.float() / scale).to(torch.float8_e4m3fn)
    parts = {"weight": codes, "weight_scale": scale, "input_scale": torch.tensor([0.02])}
    return parts, codes.float() * scale


def float8_blocks(weight: torch.Tensor, rows: int, inputs: int) -> tuple[Parts, torch.Tensor]:
    n, k = weight.shape
    scales = torch.empty(-(-n // rows), -(-k // inputs))
    codes, numbers = torch.empty(n, k, dtype=torch.float8_e4m3fn), torch.empty(n, k)
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            block = (slice(i * rows, (i + 1) * rows), slice(j * inputs, (j + 1) * inputs))
            scales[i, j] = weight[block].abs().max() / 448
            codes[block] = (weight[block] / scales[i, j]).to(torch.float8_e4m3fn)
            numbers[block] = codes[block].float() * scales[i, j]
    return {"weight": codes, "weight_scale_inv": scales}, numbers


def int8_channels(weight: torch.Tensor) -> tuple[Parts, torch.Tensor]:
    scale = (weight.abs().amax(1, keepdim=True) / 127).bfloat16()
    codes = (weight / scale.float()).round().clamp(-127, 127)
    return {"weight": codes.to(torch.int8), "weight_scale": scale}, codes * scale.float()


def compressed(stored: str, weights: Mapping[str, Any], **more: Any) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": {"num_bits": 8, "type": "int", "symmetric": True, **weights}}
    return {
        "quant_method": "compressed-tensors", "format": stored, "config_groups": {"group_0": group},
        "ignore": ["lm_head"], **more,
    }  # fmt: skip


Write = Callable[[torch.Tensor], tuple[Parts, torch.Tensor]]
# Name -> (quantization_config, what writes a matrix of it). Sizes divide 64 inputs.
FORMATS: dict[str, tuple[dict[str, Any], Write]] = {
    "awq": (
        {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"},
        lambda w: awq(w, 32),
    ),
    "gptq4": (
        {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "desc_act": False},
        lambda w: gptq(w, 32, 4, True, True),
    ),
    "gptq4 all inputs": (
        {"quant_method": "gptq", "bits": 4, "group_size": -1, "sym": True, "desc_act": False},
        lambda w: gptq(w, w.shape[1], 4, True, True),
    ),
    "gptq8 zeros": (
        {"quant_method": "gptq", "bits": 8, "group_size": 32, "sym": False, "checkpoint_format": "gptq_v2"},
        lambda w: gptq(w, 32, 8, False, False),
    ),
    "gptq4 desc_act": (
        {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": False, "desc_act": True},
        lambda w: gptq(w, 32, 4, False, True, order_of(w.shape[1])),
    ),
    "packed4": (
        compressed("pack-quantized", {"num_bits": 4, "strategy": "group", "group_size": 32}),
        lambda w: pack_quantized(w, 32, 4, True),
    ),
    "packed4 zeros": (
        compressed("pack-quantized", {"num_bits": 4, "group_size": 32, "symmetric": False}),
        lambda w: pack_quantized(w, 32, 4, False),
    ),
    "packed8 channels": (
        compressed("pack-quantized", {"num_bits": 8, "strategy": "channel"}),
        lambda w: pack_quantized(w, w.shape[1], 8, True),
    ),
    "int8 channels": (compressed("int-quantized", {"strategy": "channel"}), int8_channels),
    "float8 channels": (
        compressed("float-quantized", {"type": "float", "strategy": "channel"}),
        lambda w: float8(w, "channel"),
    ),
    "float8 tensor": (
        compressed("float-quantized", {"type": "float", "strategy": "tensor"}, kv_cache_scheme=None),
        lambda w: float8(w, "tensor"),
    ),
    "fp8 static": ({"quant_method": "fp8", "activation_scheme": "static"}, lambda w: float8(w, "tensor")),
    "fp8 blocks": (
        {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [48, 32]},
        lambda w: float8_blocks(w, 48, 32),
    ),
}  # fmt: skip


def order_of(k: int) -> torch.Tensor:
    return torch.randperm(k, generator=torch.Generator().manual_seed(k))


def write_quantized(path: Path, model: Any, name: str) -> dict[str, torch.Tensor]:
    """A model's projections quantized as `name` says, the rest in float16; what its tensors stand for."""
    config, write = FORMATS[name]
    tensors: Parts = {}
    meaning: dict[str, torch.Tensor] = {}
    for key, tensor in model.state_dict().items():
        if key.endswith("_proj.weight"):
            parts, meaning[key] = write(tensor.detach().float())
            tensors |= {f"{key.removesuffix('weight')}{part}": value for part, value in parts.items()}
        else:
            tensors[key] = tensor.detach().half().contiguous()
            meaning[key] = tensors[key].float()
    path.mkdir(parents=True, exist_ok=True)
    save_file({key: tensor.clone() for key, tensor in tensors.items()}, path / "model.safetensors")
    raw = {**model.config.to_dict(), "quantization_config": config, "dtype": "float16"}
    (path / "config.json").write_text(json.dumps(raw))
    return meaning
