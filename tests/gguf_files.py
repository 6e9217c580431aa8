"""Write small GGUF files from transformers models, the way llama.cpp's converters do.

Tensor names come from the gguf library's own name map, and the Q/K permutation and the +1 on Gemma norms
are written out here as llama.cpp's conversion scripts state them, so that the reader is tested against
an independent account of the format.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf.quants import quantize

from gqa_serve.engine.weights.block_tensor import BlockTensor

PERMUTED = {"llama", "mistral3", "smollm3", "granite"}
NORM_PLUS_ONE = {"gemma2", "gemma3"}


def permute(weights: torch.Tensor, num_heads: int) -> torch.Tensor:
    """`LlamaModel.permute` of llama.cpp's converter."""
    split = weights.reshape(num_heads, 2, weights.shape[0] // num_heads // 2, *weights.shape[1:])
    return split.swapaxes(1, 2).reshape(weights.shape)


def convert_tensors(model: Any, architecture: str) -> dict[str, torch.Tensor]:
    """The model's tensors under GGUF names, with the converter's changes applied."""
    config = model.config
    arch = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    name_map = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    tensors = {}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        if architecture in PERMUTED and name.endswith(("q_proj.weight", "q_proj.bias")):
            tensor = permute(tensor, config.num_attention_heads)
        if architecture in PERMUTED and name.endswith(("k_proj.weight", "k_proj.bias")):
            tensor = permute(tensor, config.num_key_value_heads)
        if architecture in NORM_PLUS_ONE and name.endswith("norm.weight"):
            tensor = tensor + 1
        gguf_name = name_map.get_name(name, try_suffixes=(".weight", ".bias"))
        assert gguf_name is not None, name
        tensors[gguf_name] = tensor.detach()
    return tensors


def write_gguf(
    path: Path,
    architecture: str,
    metadata: dict[str, Any],
    tensors: dict[str, torch.Tensor],
    quantization: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
    **writer_options: Any,
) -> Path:
    """Write matrices in `quantization` and vectors in float32; keys without a dot get the prefix."""
    writer = gguf.GGUFWriter(path, architecture, **writer_options)
    for key, value in metadata.items():
        add(writer, key if key.startswith(("tokenizer.", "general.")) else f"{architecture}.{key}", value)
    for name, tensor in tensors.items():
        values = tensor.float().numpy()
        if tensor.ndim == 1:
            writer.add_tensor(name, values)
        else:
            writer.add_tensor(name, quantize(values, quantization), raw_dtype=quantization)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    """Add one key with the type the converters use for such a value."""
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


def base_metadata(config: Any) -> dict[str, Any]:
    """The keys every text converter writes (TextModel.set_gguf_parameters)."""
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
    }


def randomize(model: torch.nn.Module, seed: int = 0) -> None:
    """Give every parameter, norms and biases too, a random value, so that none can be mistaken."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            values = torch.randn(parameter.shape, generator=generator) * 0.1
            parameter.copy_(values + (1.0 if parameter.ndim == 1 else 0.0))


def numbers(tensor: torch.Tensor | BlockTensor) -> torch.Tensor:
    """What a checkpoint yielded, as numbers of its own."""
    return tensor.clone() if isinstance(tensor, torch.Tensor) else tensor.dequantize()


def reference_dequantize(tensor: torch.Tensor, quantization: gguf.GGMLQuantizationType) -> torch.Tensor:
    """What a matrix is after a trip through the library's own quantize and dequantize."""
    values = gguf.quants.dequantize(quantize(tensor.float().numpy(), quantization), quantization)
    return torch.from_numpy(np.array(values))
