"""Tiny random checkpoints of every family, saved by transformers.

Weights are drawn wide and norms and biases are random too, so that logits differ visibly between positions
and a wrong head, mask or angle cannot hide in values near zero.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

SIZES: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
# Family -> (transformers' config class, what makes the family itself).
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "mistral": ("MistralConfig", {"sliding_window": 12, "head_dim": 24}),
    "ministral": (
        "MinistralConfig",
        {"head_dim": 24, "sliding_window": 9, "layer_types": ["sliding_attention", "full_attention"] * 2},
    ),
    "qwen2": ("Qwen2Config", {"use_sliding_window": True, "sliding_window": 10, "max_window_layers": 2}),
    "qwen3": ("Qwen3Config", {"head_dim": 24}),
    "gemma2": ("Gemma2Config", {"head_dim": 24, "sliding_window": 11, "query_pre_attn_scalar": 20}),
    "gemma3": (
        "Gemma3TextConfig",
        {
            "head_dim": 24,
            "sliding_window": 7,
            "query_pre_attn_scalar": 20,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
    "phi3": ("Phi3Config", {"sliding_window": None, "original_max_position_embeddings": 256}),
    "smollm3": ("SmolLM3Config", {"no_rope_layer_interval": 2}),
    "olmo2": ("Olmo2Config", {}),
    "granite": (
        "GraniteConfig",
        {
            "embedding_multiplier": 3.0,
            "logits_scaling": 2.0,
            "residual_multiplier": 0.6,
            "attention_multiplier": 0.2,
        },
    ),
}


def tiny_config(family: str, **overrides: Any) -> Any:
    """transformers' config of a tiny model of `family`, with any of its fields overridden."""
    name, fields = FAMILIES[family]
    return getattr(transformers, name)(**{**SIZES, **fields, **overrides})


def tiny_model(family: str, *, seed: int = 0, **overrides: Any) -> Any:
    """transformers' model with random weights, eager attention, float32, on the CPU."""
    config = tiny_config(family, **overrides)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    randomize(model, seed)
    return model.eval()


def randomize(model: torch.nn.Module, seed: int) -> None:
    """Draw every parameter anew: matrices with gain about 1.5, norms and biases around what they were."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() == 1:
                parameter.add_(0.3 * noise)
            else:
                parameter.copy_(noise * 1.5 / parameter.shape[1] ** 0.5)


def tiny_checkpoint(family: str, tmp_path: Path, *, seed: int = 0, **overrides: Any) -> Path:
    """Save a tiny random model of `family` (safetensors, config.json) under `tmp_path`; its directory."""
    path = tmp_path / family
    tiny_model(family, seed=seed, **overrides).save_pretrained(path)
    return path
