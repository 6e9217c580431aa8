"""What benchmarks/cpu.py runs: the demo, and random weights in the shape of Llama 3.2 1B, in several formats.

Owns the random checkpoint (written once, 2.3 GiB of bfloat16, no tokenizer: the engine takes token ids) and
what each format asks of the engine.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from gqa_serve.engine.model_config import ModelConfig
from gqa_serve.engine.weights.hub import resolve_model
from gqa_serve.progress import ProgressBar

MODELS = ("demo", "1b")
# Name -> (engine settings, whether the int8 peak is its limit).
FORMATS: dict[str, tuple[dict[str, str], bool]] = {
    "float32": ({"dtype": "float32", "quantization": "none"}, False),
    "bfloat16": ({"dtype": "bfloat16", "quantization": "none"}, False),
    "int8": ({"quantization": "int8"}, True),
    "int4": ({"quantization": "int4"}, True),
    "stored": ({}, True),  # the demo's own Q4_1
}
LLAMA_1B: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 2048,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "intermediate_size": 8192,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "bos_token_id": 128000,
    "eos_token_id": 128001,
}
_STD = 0.02  # keeps activations near 1 through norms, and logits too


def model_path(name: str, cache_dir: Path) -> Path:
    """Where `name` is; the random checkpoint is written if it is not there yet."""
    if name == "demo":
        return resolve_model("demo")
    folder = cache_dir / "random-llama-1b"
    if not (folder / "config.json").exists():
        write_random(LLAMA_1B, folder)
    return folder


def write_random(config: dict[str, Any], folder: Path) -> None:
    """A checkpoint with normal weights, one file for each layer; config.json comes last: complete."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(0)
    index: dict[str, str] = {}
    groups = list(_shapes(config))
    bar = ProgressBar(f"Writing {folder.name}")
    for number, shapes in enumerate(groups):
        file = f"model-{number:05d}.safetensors"
        tensors = {name: _random(shape, generator) for name, shape in shapes.items()}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        index.update(dict.fromkeys(tensors, file))
        bar.update(number + 1, len(groups))
    document = {"metadata": {}, "weight_map": index}
    (folder / "model.safetensors.index.json").write_text(json.dumps(document), encoding="utf-8")
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")


def _shapes(config: dict[str, Any]) -> Iterator[dict[str, tuple[int, ...]]]:
    """Names and shapes: embedding and last norm, then layer by layer."""
    hidden, inner, dim = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    yield {"model.embed_tokens.weight": (config["vocab_size"], hidden), "model.norm.weight": (hidden,)}
    for layer in range(config["num_hidden_layers"]):
        shapes: dict[str, tuple[int, ...]] = {
            "input_layernorm": (hidden,),
            "post_attention_layernorm": (hidden,),
            "self_attn.q_proj": (heads * dim, hidden),
            "self_attn.k_proj": (kv_heads * dim, hidden),
            "self_attn.v_proj": (kv_heads * dim, hidden),
            "self_attn.o_proj": (hidden, heads * dim),
            "mlp.gate_proj": (inner, hidden),
            "mlp.up_proj": (inner, hidden),
            "mlp.down_proj": (hidden, inner),
        }
        yield {f"model.layers.{layer}.{name}.weight": shape for name, shape in shapes.items()}


def _random(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    return torch.empty(shape).normal_(0, _STD, generator=generator).to(torch.bfloat16)


def layer_weights(config: ModelConfig) -> int:
    """Weights of all matrices but the vocabulary's: what each token of a prompt is multiplied with."""
    attention = (2 * config.num_heads + 2 * config.num_kv_heads) * config.head_dim
    return config.num_layers * config.hidden_size * (attention + 3 * config.intermediate_size)


def head_weights(config: ModelConfig) -> int:
    """Weights of the output matrix: what each token that is sampled is multiplied with too."""
    return config.vocab_size * config.hidden_size
