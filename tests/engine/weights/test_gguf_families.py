"""Each GGUF architecture against transformers: same tensors, and a config that computes the same logits."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from gguf_files import base_metadata, convert_tensors, randomize, write_gguf

from gqa_serve.engine.model_config import ModelConfig
from gqa_serve.engine.weights.checkpoint import open_checkpoint
from gqa_serve.errors import UnsupportedModelError

SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
DEFAULT_ROPE = {"rope_type": "default", "rope_theta": 5000.0}


def llama(**extra: Any) -> tuple[Any, dict[str, Any]]:
    config = transformers.LlamaConfig(**{**SIZES, "rope_parameters": DEFAULT_ROPE, **extra})
    metadata = {"vocab_size": 64, "rope.dimension_count": config.head_dim, "rope.freq_base": 5000.0}
    return config, metadata


def llama_linear() -> tuple[Any, dict[str, Any]]:
    config, metadata = llama(rope_parameters={**DEFAULT_ROPE, "rope_type": "linear", "factor": 4.0})
    return config, {**metadata, "rope.scaling.type": "linear", "rope.scaling.factor": 4.0}


def llama_yarn() -> tuple[Any, dict[str, Any]]:
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "beta_fast": 16.0}
    config, metadata = llama(rope_parameters={**DEFAULT_ROPE, **yarn})
    metadata |= {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0}
    return config, metadata | {
        "rope.scaling.original_context_length": 32,
        "rope.scaling.yarn_beta_fast": 16.0,
    }


def mistral_window() -> tuple[Any, dict[str, Any]]:
    config = transformers.MistralConfig(**SIZES, sliding_window=5, head_dim=12, rope_parameters=DEFAULT_ROPE)
    return config, {"rope.dimension_count": 12, "rope.freq_base": 5000.0, "attention.sliding_window": 5}


def mistral3() -> tuple[Any, dict[str, Any]]:
    config = transformers.MistralConfig(
        **SIZES, sliding_window=None, head_dim=16, rope_parameters=DEFAULT_ROPE
    )
    return config, {"rope.dimension_count": 16, "rope.freq_base": 5000.0}


def smollm3() -> tuple[Any, dict[str, Any]]:
    config = transformers.SmolLM3Config(**{**SIZES, "num_hidden_layers": 5}, rope_parameters=DEFAULT_ROPE)
    return config, {"rope.dimension_count": 8, "rope.freq_base": 5000.0}


def granite(**extra: Any) -> tuple[Any, dict[str, Any]]:
    scales = {"embedding_multiplier": 12.0, "logits_scaling": 8.0, "residual_multiplier": 0.22}
    config = transformers.GraniteConfig(
        **SIZES, **scales, attention_multiplier=0.0156, rope_parameters=DEFAULT_ROPE, **extra
    )
    metadata = {"rope.dimension_count": 8, "rope.freq_base": 5000.0, "attention.scale": 0.0156}
    return config, metadata | {"embedding_scale": 12.0, "logit_scale": 8.0, "residual_scale": 0.22}


def qwen2() -> tuple[Any, dict[str, Any]]:
    return transformers.Qwen2Config(**SIZES, rope_parameters=DEFAULT_ROPE), {"rope.freq_base": 5000.0}


def qwen3() -> tuple[Any, dict[str, Any]]:
    config = transformers.Qwen3Config(**SIZES, head_dim=16, rope_parameters=DEFAULT_ROPE)
    return config, {"rope.freq_base": 5000.0}


def gemma2() -> tuple[Any, dict[str, Any]]:
    config = transformers.Gemma2Config(**SIZES, head_dim=16, query_pre_attn_scalar=16, sliding_window=5)
    metadata = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
    return config, metadata | {"attention.sliding_window": 5}


def gemma3() -> tuple[Any, dict[str, Any]]:
    sizes = {**SIZES, "num_hidden_layers": 7, "num_key_value_heads": 1}
    rope = {
        "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    }
    config = transformers.Gemma3TextConfig(
        **sizes, head_dim=16, query_pre_attn_scalar=16, sliding_window=5, rope_parameters=rope
    )
    metadata = {"rope.freq_base": 1e6, "rope.scaling.type": "linear", "rope.scaling.factor": 8.0}
    return config, metadata | {"attention.sliding_window": 5}


def phi3() -> tuple[Any, dict[str, Any]]:
    config = transformers.Phi3Config(**SIZES, sliding_window=5, rope_parameters=DEFAULT_ROPE)
    metadata = {"rope.dimension_count": 8, "rope.freq_base": 5000.0, "attention.sliding_window": 5}
    return config, metadata | {"rope.scaling.original_context_length": 128}


def olmo2() -> tuple[Any, dict[str, Any]]:
    return transformers.Olmo2Config(**SIZES, rope_parameters=DEFAULT_ROPE), {"rope.freq_base": 5000.0}


CASES: dict[str, tuple[str, Callable[[], tuple[Any, dict[str, Any]]]]] = {
    "llama": ("llama", llama),
    "llama tied": ("llama", lambda: llama(tie_word_embeddings=True)),
    "llama bias": ("llama", lambda: llama(attention_bias=True, mlp_bias=True)),
    "llama mqa": ("llama", lambda: llama(num_key_value_heads=1)),
    "llama mha": ("llama", lambda: llama(num_key_value_heads=4)),
    "llama head_dim": ("llama", lambda: llama(head_dim=12)),
    "llama linear": ("llama", llama_linear),
    "llama yarn": ("llama", llama_yarn),
    "mistral window": ("llama", mistral_window),
    "mistral3": ("mistral3", mistral3),
    "smollm3": ("smollm3", smollm3),
    "granite": ("granite", granite),
    "qwen2": ("qwen2", qwen2),
    "qwen3": ("qwen3", qwen3),
    "gemma2": ("gemma2", gemma2),
    "gemma3": ("gemma3", gemma3),
    "phi3": ("phi3", phi3),
    "olmo2": ("olmo2", olmo2),
}


def build(config: Any) -> Any:
    config._attn_implementation = "eager"
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    randomize(model)
    return model


def reload(path: Path) -> tuple[Any, dict[str, torch.Tensor]]:
    """Build the transformers model from what the checkpoint says, and nothing else."""
    checkpoint = open_checkpoint(path)
    raw = {"pad_token_id": None, **checkpoint.raw_config}  # the default may lie outside a tiny vocabulary
    config = transformers.AutoConfig.for_model(raw.pop("model_type"), **raw)
    config._attn_implementation = "eager"
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    tensors = {name: tensor.clone() for name, tensor in checkpoint.tensors()}
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    assert not unexpected
    assert missing == (["lm_head.weight"] if config.tie_word_embeddings else [])
    model.tie_weights()
    return model, tensors


@pytest.mark.parametrize("case", CASES)
def test_round_trip_matches_transformers(tmp_path: Path, case: str) -> None:
    architecture, make = CASES[case]
    config, metadata = make()
    original = build(config)
    path = tmp_path / "m.gguf"
    write_gguf(path, architecture, base_metadata(config) | metadata, convert_tensors(original, architecture))
    restored, tensors = reload(path)
    for name, expected in original.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        # (w + 1) - 1 is all that Gemma's norms leave of w
        tolerance = {"rtol": 0.0, "atol": 2e-7 if architecture.startswith("gemma") else 0.0}
        torch.testing.assert_close(tensors[name], expected, msg=name, **tolerance)
    ids = torch.arange(3, 3 + 40).remainder(64).unsqueeze(0)
    with torch.no_grad():
        torch.testing.assert_close(restored(ids).logits, original(ids).logits, rtol=1e-5, atol=1e-5)
    served = ModelConfig.from_hf(open_checkpoint(path).raw_config, {})
    assert (served.num_heads, served.num_kv_heads) == (config.num_attention_heads, config.num_key_value_heads)


def test_llama3_frequency_factors_divide_the_inverse_frequencies(tmp_path: Path) -> None:
    """`rope_freqs.weight` as the converter computes it gives the frequencies transformers computes."""
    rope = {
        "rope_type": "llama3", "rope_theta": 5000.0, "factor": 8.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
    }  # fmt: skip
    config, metadata = llama(head_dim=32, rope_parameters=rope)
    original = build(config)
    frequencies = 5000.0 ** -(torch.arange(0, 32, 2) / 32)
    factors = []
    for frequency in frequencies.tolist():
        wavelength = 2 * math.pi / frequency
        smooth = min(1.0, max(0.0, (64 / wavelength - 1.0) / (4.0 - 1.0)))
        factors.append(1 / ((1 - smooth) / 8.0 + smooth))
    assert len(set(factors)) > 2
    tensors = convert_tensors(original, "llama")
    tensors["rope_freqs.weight"] = torch.tensor(factors)
    path = write_gguf(tmp_path / "m.gguf", "llama", base_metadata(config) | metadata, tensors)
    checkpoint = open_checkpoint(path)
    stated = checkpoint.raw_config["rope_parameters"]
    assert stated["rope_type"] == "factors"
    torch.testing.assert_close(
        frequencies / torch.tensor(stated["factors"]), original.model.rotary_emb.inv_freq, rtol=1e-5, atol=0
    )
    assert {name for name, _ in checkpoint.tensors()} == set(original.state_dict())
    assert ModelConfig.from_hf(checkpoint.raw_config, {}).ropes[0].rope_type == "factors"


@pytest.mark.parametrize("max_position", [128, 32])
def test_phi3_longrope(tmp_path: Path, max_position: int) -> None:
    """Partial rotary embedding with long and short factors, below and above the original context."""
    sizes = {**SIZES, "max_position_embeddings": max_position}
    long, short = [1.0, 2.0, 3.5], [1.0, 1.1, 1.25]
    rope = {
        "rope_type": "longrope", "rope_theta": 5000.0, "long_factor": long, "short_factor": short,
        "original_max_position_embeddings": 32, "partial_rotary_factor": 0.75,
    }  # fmt: skip
    config = transformers.Phi3Config(
        **sizes, rope_parameters=rope, original_max_position_embeddings=32, partial_rotary_factor=0.75
    )
    original = build(config)
    scale = max_position / 32
    metadata = base_metadata(config) | {
        "rope.dimension_count": 6,
        "rope.freq_base": 5000.0,
        "attention.sliding_window": 0,
        "rope.scaling.original_context_length": 32,
        "rope.scaling.attn_factor": math.sqrt(1 + math.log(scale) / math.log(32)),
    }
    tensors = convert_tensors(original, "phi3")
    tensors["rope_factors_long.weight"] = torch.tensor(long)
    tensors["rope_factors_short.weight"] = torch.tensor(short)
    path = write_gguf(tmp_path / "m.gguf", "phi3", metadata, tensors)
    restored, _ = reload(path)
    assert restored.config.sliding_window is None
    for length in (20, 40):
        ids = torch.arange(length).remainder(64).unsqueeze(0)
        with torch.no_grad():
            torch.testing.assert_close(restored(ids).logits, original(ids).logits, rtol=1e-5, atol=1e-5)
    ModelConfig.from_hf(open_checkpoint(path).raw_config, {})


@pytest.mark.parametrize(
    ("architecture", "make", "extra", "sentence"),
    [
        ("llama", llama, {"expert_count": 8}, "mixture of experts"),
        ("llama", llama, {"rope.scaling.type": "weird"}, "rotary scaling 'weird' is not supported"),
        ("llama", llama, {"attention.value_length": 4}, "keys and values of different lengths"),
        ("llama", llama, {"attention.head_count": [4, 2]}, "differs from layer to layer"),
        ("mistral3", mistral3, {"attention.temperature_scale": 0.1}, "Ministral 3"),
        ("granite", granite, {"rope.scaling.finetuned": False}, "without rotary embeddings"),
        ("olmo2", olmo2, {"attention.sliding_window": 4096}, "OLMo 3"),
        ("llama", llama, {"logit_scale": 8.0}, r"llama\.logit_scale = 8\.0 is not supported"),
        ("llama", llama, {"attention.scale": 0.5}, "explicit attention scale"),
        ("llama", llama, {"attention.causal": False}, "is an encoder"),
        ("qwen2", qwen2, {"attention.sliding_window": 64}, r"qwen2\.attention\.sliding_window = 64"),
        ("qwen3", qwen3, {"final_logit_softcapping": 30.0}, r"qwen3\.final_logit_softcapping"),
    ],
)
def test_options_that_are_refused(
    tmp_path: Path,
    architecture: str,
    make: Callable[[], tuple[Any, dict[str, Any]]],
    extra: dict[str, Any],
    sentence: str,
) -> None:
    config, metadata = make()
    tensors = convert_tensors(build(config), architecture)
    path = write_gguf(tmp_path / "m.gguf", architecture, base_metadata(config) | metadata | extra, tensors)
    with pytest.raises(UnsupportedModelError, match=sentence):
        open_checkpoint(path)


def test_head_counts_listed_per_layer_are_read_if_they_agree(tmp_path: Path) -> None:
    config, metadata = llama()
    per_layer = {
        "attention.head_count": [4, 4],
        "attention.head_count_kv": [2, 2],
        "feed_forward_length": [48, 48],
    }
    tensors = convert_tensors(build(config), "llama")
    path = write_gguf(tmp_path / "m.gguf", "llama", base_metadata(config) | metadata | per_layer, tensors)
    raw = open_checkpoint(path).raw_config
    assert (raw["num_attention_heads"], raw["num_key_value_heads"], raw["intermediate_size"]) == (4, 2, 48)


def test_defaults_llama_cpp_assumes(tmp_path: Path) -> None:
    """Only the required keys: one KV head per query head, base 10000, head_dim from the sizes."""
    config, _ = llama(num_key_value_heads=4, rope_parameters={"rope_type": "default", "rope_theta": 10000.0})
    optional = ("attention.head_count_kv", "attention.key_length", "attention.value_length")
    metadata = {key: value for key, value in base_metadata(config).items() if key not in optional}
    original = build(config)
    path = write_gguf(tmp_path / "m.gguf", "llama", metadata, convert_tensors(original, "llama"))
    restored, _ = reload(path)
    assert restored.config.num_key_value_heads == 4
    ids = torch.arange(40).unsqueeze(0)
    with torch.no_grad():
        torch.testing.assert_close(restored(ids).logits, original(ids).logits, rtol=1e-5, atol=1e-5)


def test_gemma3_window_pattern_and_local_base_may_be_stated(tmp_path: Path) -> None:
    config, metadata = gemma3()
    stated = {"attention.sliding_window_pattern": [True, False, True, True, False, True, False]}
    stated |= {"rope.freq_base_swa": 7000.0}
    tensors = convert_tensors(build(config), "gemma3")
    path = write_gguf(tmp_path / "m.gguf", "gemma3", base_metadata(config) | metadata | stated, tensors)
    raw = open_checkpoint(path).raw_config
    assert [kind == "sliding_attention" for kind in raw["layer_types"]] == stated[
        "attention.sliding_window_pattern"
    ]
    assert raw["rope_parameters"]["sliding_attention"]["rope_theta"] == 7000.0
