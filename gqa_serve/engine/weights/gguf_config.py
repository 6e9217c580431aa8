"""GGUF metadata to a Hugging Face style config, so that each model family has one config reader.

Owns the meaning of the `<architecture>.*` keys and of the defaults llama.cpp assumes when one is
absent (src/llama-model.cpp, src/models/*.cpp; cited where used). Knows tensors only by name and shape.
Invariant: what the metadata asks for is translated or refused, and nothing is guessed from names.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from gqa_serve.engine.weights.gguf_keys import Keys, short_float
from gqa_serve.errors import ModelError, UnsupportedModelError

# architecture -> (model_type, architectures[0]) as transformers spells them
_HF_TYPES = {
    "llama": ("llama", "LlamaForCausalLM"),
    "mistral3": ("mistral", "MistralForCausalLM"),
    "smollm3": ("smollm3", "SmolLM3ForCausalLM"),
    "granite": ("granite", "GraniteForCausalLM"),
    "qwen2": ("qwen2", "Qwen2ForCausalLM"),
    "qwen3": ("qwen3", "Qwen3ForCausalLM"),
    "gemma2": ("gemma2", "Gemma2ForCausalLM"),
    "gemma3": ("gemma3_text", "Gemma3ForCausalLM"),
    "phi3": ("phi3", "Phi3ForCausalLM"),
    "olmo2": ("olmo2", "Olmo2ForCausalLM"),
}

# Control tokens that end a chat turn. llama.cpp stops at them too, because many files name only the
# end-of-text token in their metadata (src/llama-vocab.cpp, "special_eog_ids").
_END_OF_TURN_TOKENS = frozenset({"<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>"})

_SAMPLING_KEYS = {
    "temp": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "penalty_repeat": "repetition_penalty",
}

# Options that change the result: a family that does not read one cannot serve a file that sets it.
_NOT_IGNORABLE = (
    "attention.clamp_kqv",
    "attention.scale",
    "attention.sliding_window",
    "attention.temperature_scale",
    "attn_logit_softcapping",
    "embedding_scale",
    "final_logit_softcapping",
    "logit_scale",
    "residual_scale",
)


def translate_config(
    where: str,
    architecture: str,
    metadata: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
    factors: Mapping[str, list[float]],
) -> dict[str, Any]:
    """Build the config of a supported architecture.

    `shapes`: shape of every tensor by GGUF name; `factors`: values of the rotary factor tensors by GGUF
    name. Raises `ModelError` naming the key, `UnsupportedModelError` naming the option.
    """
    keys = Keys(where, architecture, metadata)
    model_type, class_name = _HF_TYPES[architecture]
    config = _common(keys, shapes)
    config |= {"model_type": model_type, "architectures": [class_name]}
    if keys.integer("expert_count", 0, minimum=0) > 0:
        raise UnsupportedModelError(
            f"{where} is a mixture of experts, which is not supported; use a dense model."
        )
    rope = rope_parameters(keys, config["head_dim"], factors)
    config["rope_parameters"] = rope
    if "partial_rotary_factor" in rope:
        config["partial_rotary_factor"] = rope["partial_rotary_factor"]
    extend = _FAMILIES.get(architecture)
    if extend is not None:
        extend(keys, config)
    _refuse_unused(keys, config["max_position_embeddings"])
    for name in ("bos", "eos"):
        token = metadata.get(f"tokenizer.ggml.{name}_token_id")
        config[f"{name}_token_id"] = token if isinstance(token, int) else None
    return config


def _refuse_unused(keys: Keys, context_length: int) -> None:
    if keys.get("attention.causal") is False:
        raise UnsupportedModelError(f"{keys.where} is an encoder (attention is not causal); use a decoder.")
    for key in _NOT_IGNORABLE:
        value = None if key in keys.used else keys.get(key)
        harmless = key == "attention.sliding_window" and isinstance(value, int) and value >= context_length
        if value and not harmless:
            raise UnsupportedModelError(
                f"{keys.where}: {keys.architecture}.{key} = {value} is not supported for this architecture; "
                "use a model without it."
            )


def _common(keys: Keys, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    embedding = shapes.get("token_embd.weight")
    hidden_size = keys.integer("embedding_length")
    if embedding is None or len(embedding) != 2 or embedding[1] != hidden_size:
        raise ModelError(
            f"{keys.where}: tensor token_embd.weight is missing or not {hidden_size} wide; "
            "download the file again."
        )
    num_heads = keys.integer("attention.head_count")
    head_dim = keys.integer("attention.key_length", hidden_size // num_heads)
    if keys.integer("attention.value_length", head_dim) != head_dim:
        raise UnsupportedModelError(f"{keys.where}: keys and values of different lengths are not supported.")
    return {
        "vocab_size": embedding[0],
        "hidden_size": hidden_size,
        "intermediate_size": keys.integer("feed_forward_length"),
        "num_hidden_layers": keys.integer("block_count"),
        "num_attention_heads": num_heads,
        "num_key_value_heads": keys.integer("attention.head_count_kv", num_heads),
        "head_dim": head_dim,
        "max_position_embeddings": keys.integer("context_length"),
        "rms_norm_eps": keys.number("attention.layer_norm_rms_epsilon"),
        "hidden_act": "silu",
        "tie_word_embeddings": "output.weight" not in shapes,
        "attention_bias": "blk.0.attn_q.bias" in shapes,
        "mlp_bias": "blk.0.ffn_gate.bias" in shapes,
    }


def rope_parameters(keys: Keys, head_dim: int, factors: Mapping[str, list[float]]) -> dict[str, Any]:
    """Rotary settings in the newer Hugging Face spelling.

    `rope_freqs.weight` (Llama 3's scaling, precomputed) becomes `{"rope_type": "factors", "factors": [...]}`:
    the inverse frequency of each rotary pair is divided by its factor.
    """
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": keys.number("rope.freq_base", 10000.0)}
    rotary_dim = keys.integer("rope.dimension_count", head_dim)
    if rotary_dim != head_dim:
        rope["partial_rotary_factor"] = rotary_dim / head_dim
    scaling = keys.get("rope.scaling.type")
    factor = keys.number("rope.scaling.factor", keys.number("rope.scale_linear", 0.0))
    if scaling is None and factor not in (0.0, 1.0):
        scaling = "linear"  # llama.cpp's default type
    if "rope_factors_long.weight" in factors or scaling == "longrope":
        rope |= _longrope(keys, factors)
    elif scaling == "yarn":
        rope |= _yarn(keys, factor)
    elif scaling == "linear":
        if factor < 0:
            raise keys.error("rope.scaling.factor", f"is {factor}")
        if factor not in (0.0, 1.0):  # 0 means unset
            rope |= {"rope_type": "linear", "factor": factor}
    elif scaling not in (None, "none"):
        raise UnsupportedModelError(
            f"{keys.where}: rotary scaling {scaling!r} is not supported; "
            "supported are linear, yarn and longrope."
        )
    if (values := factors.get("rope_freqs.weight")) is not None and any(value != 1.0 for value in values):
        if rope["rope_type"] != "default":
            raise UnsupportedModelError(
                f"{keys.where}: rope_freqs.weight together with {rope['rope_type']} scaling is not supported."
            )
        rope |= {"rope_type": "factors", "factors": values}
    for name, values in factors.items():
        if len(values) != rotary_dim // 2 or not all(math.isfinite(value) and value > 0 for value in values):
            raise ModelError(
                f"{keys.where}: tensor {name} does not hold {rotary_dim // 2} positive factors; "
                "download the file again."
            )
    return rope


def _yarn(keys: Keys, factor: float) -> dict[str, Any]:
    # The converter copies these from config.json unchanged, so they are copied back unchanged.
    if keys.number("rope.scaling.yarn_log_multiplier", 0.0) != 0.0:
        raise UnsupportedModelError(
            f"{keys.where}: yarn with a log multiplier (mscale_all_dim) is not supported."
        )
    if keys.number("rope.scaling.yarn_ext_factor", 1.0) not in (1.0, -1.0):
        raise UnsupportedModelError(f"{keys.where}: yarn with an extrapolation factor is not supported.")
    if factor <= 0:
        raise keys.error("rope.scaling.factor", "is missing or not positive")
    yarn: dict[str, Any] = {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": keys.integer("rope.scaling.original_context_length"),
    }
    for key, name in (
        ("attn_factor", "attention_factor"),
        ("beta_fast", "beta_fast"),
        ("beta_slow", "beta_slow"),
    ):
        if keys.get(f"rope.scaling.yarn_{key}") is not None:
            yarn[name] = keys.number(f"rope.scaling.yarn_{key}")
    return yarn


def _longrope(keys: Keys, factors: Mapping[str, list[float]]) -> dict[str, Any]:
    if "rope_factors_long.weight" not in factors or "rope_factors_short.weight" not in factors:
        raise ModelError(
            f"{keys.where}: longrope needs the tensors rope_factors_long.weight and "
            "rope_factors_short.weight; convert the model again."
        )
    longrope: dict[str, Any] = {
        "rope_type": "longrope",
        "long_factor": factors["rope_factors_long.weight"],
        "short_factor": factors["rope_factors_short.weight"],
        "original_max_position_embeddings": keys.integer("rope.scaling.original_context_length"),
    }
    if keys.get("rope.scaling.attn_factor") is not None:
        longrope["attention_factor"] = keys.number("rope.scaling.attn_factor")
    return longrope


def _sliding_layers(keys: Keys, num_layers: int, period: int) -> list[str]:
    """Layer types: every `period`-th layer is full (llama.cpp's `set_swa_pattern`), or as the file lists."""
    pattern = keys.get("attention.sliding_window_pattern")
    if isinstance(pattern, list):
        if len(pattern) != num_layers:
            raise keys.error(
                "attention.sliding_window_pattern", f"has {len(pattern)} entries for {num_layers} layers"
            )
        sliding = [bool(item) for item in pattern]
    else:
        if pattern is not None:
            period = keys.integer("attention.sliding_window_pattern")
        sliding = [layer % period < period - 1 for layer in range(num_layers)]
    return ["sliding_attention" if item else "full_attention" for item in sliding]


def _llama(keys: Keys, config: dict[str, Any]) -> None:
    if config["rope_parameters"].get("partial_rotary_factor", 1.0) != 1.0:
        raise keys.error("rope.dimension_count", f"is not the head dimension {config['head_dim']}")
    if keys.number("attention.scale", 0.0) not in (0.0, config["head_dim"] ** -0.5):
        raise UnsupportedModelError(f"{keys.where}: an explicit attention scale is not supported for llama.")
    window = keys.integer("attention.sliding_window", 0, minimum=0)
    if window > 0:
        config |= {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": window}


def _mistral3(keys: Keys, config: dict[str, Any]) -> None:
    if keys.number("attention.temperature_scale", 0.0) != 0.0:
        raise UnsupportedModelError(
            f"{keys.where}: Ministral 3's position-dependent attention temperature is not supported; "
            "use an earlier Mistral or Ministral model."
        )
    config["sliding_window"] = keys.integer("attention.sliding_window", 0, minimum=0) or None


def _smollm3(keys: Keys, config: dict[str, Any]) -> None:
    # Every fourth layer has no rotary embedding: a constant in llama.cpp (n_no_rope_layer_step), not a key.
    layers = range(config["num_hidden_layers"])
    config |= {"no_rope_layer_interval": 4, "no_rope_layers": [int((layer + 1) % 4 != 0) for layer in layers]}


def _granite(keys: Keys, config: dict[str, Any]) -> None:
    if keys.get("rope.scaling.finetuned") is False:  # llama.cpp's switch for "no rotary embedding"
        raise UnsupportedModelError(f"{keys.where}: Granite without rotary embeddings is not supported.")
    config |= {
        "logits_scaling": keys.number("logit_scale"),
        "residual_multiplier": keys.number("residual_scale", 0.0) or 1.0,
        "embedding_multiplier": keys.number("embedding_scale", 0.0) or 1.0,
        "attention_multiplier": keys.number("attention.scale", 0.0) or config["head_dim"] ** -0.5,
    }


def _gemma(keys: Keys, config: dict[str, Any], *, large_model_layers: int) -> None:
    config.pop("hidden_act")
    config["hidden_activation"] = "gelu_pytorch_tanh"
    # Not in the metadata: llama.cpp tells the 27B model, the one that scales by hidden size per head, by its
    # layer count (src/models/gemma2.cpp and gemma3.cpp, f_attention_scale).
    large = config["num_hidden_layers"] == large_model_layers
    scalar = config["hidden_size"] // config["num_attention_heads"] if large else config["head_dim"]
    config["query_pre_attn_scalar"] = scalar
    for key in ("attn_logit_softcapping", "final_logit_softcapping"):
        config[key] = keys.number(key, 0.0) or None


def _gemma2(keys: Keys, config: dict[str, Any]) -> None:
    _gemma(keys, config, large_model_layers=46)
    config["attn_logit_softcapping"] = config["attn_logit_softcapping"] or 50.0  # llama.cpp's defaults
    config["final_logit_softcapping"] = config["final_logit_softcapping"] or 30.0
    config["sliding_window"] = keys.integer("attention.sliding_window", 4096)
    config["layer_types"] = _sliding_layers(keys, config["num_hidden_layers"], 2)


def _gemma3(keys: Keys, config: dict[str, Any]) -> None:
    _gemma(keys, config, large_model_layers=62)
    config["use_bidirectional_attention"] = False
    window = keys.integer("attention.sliding_window", 0, minimum=0)
    config["sliding_window"] = window or None
    period = 6 if window else 1
    config["layer_types"] = _sliding_layers(keys, config["num_hidden_layers"], period)
    local_theta = keys.number("rope.freq_base_swa", 10000.0)
    # Scaling applies to the full-attention layers only (llama.cpp: rope_freq_scale_train_swa = 1).
    config["rope_parameters"] = {
        "full_attention": config["rope_parameters"],
        "sliding_attention": {"rope_type": "default", "rope_theta": local_theta},
    }


def _phi3(keys: Keys, config: dict[str, Any]) -> None:
    original = keys.integer("rope.scaling.original_context_length", config["max_position_embeddings"])
    config["original_max_position_embeddings"] = original
    config["sliding_window"] = (
        keys.integer("attention.sliding_window", 0, minimum=0) or None
    )  # 0: none (Phi-4)


def _olmo2(keys: Keys, config: dict[str, Any]) -> None:
    if keys.integer("attention.sliding_window", 0, minimum=0) > 0:
        raise UnsupportedModelError(f"{keys.where} is an OLMo 3 model, which is not supported; use OLMo 2.")


_FAMILIES: dict[str, Callable[[Keys, dict[str, Any]], None]] = {
    "llama": _llama,
    "mistral3": _mistral3,
    "smollm3": _smollm3,
    "granite": _granite,
    "gemma2": _gemma2,
    "gemma3": _gemma3,
    "phi3": _phi3,
    "olmo2": _olmo2,
}


def translate_generation_config(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """The file's end tokens and sampling defaults, as `generation_config.json` would say them."""
    ids = [metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    tokens = metadata.get("tokenizer.ggml.tokens")
    if isinstance(tokens, list):
        # Whatever type the file gives them: converters have stored them as ordinary tokens.
        ids += [i for i, text in enumerate(tokens) if isinstance(text, str) and text in _END_OF_TURN_TOKENS]
    generation: dict[str, Any] = {}
    if eos := list(dict.fromkeys(i for i in ids if isinstance(i, int))):
        generation["eos_token_id"] = eos
    bos = metadata.get("tokenizer.ggml.bos_token_id")
    if isinstance(bos, int):
        generation["bos_token_id"] = bos
    for key, name in _SAMPLING_KEYS.items():
        value = metadata.get(f"general.sampling.{key}")
        if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
            generation[name] = value if isinstance(value, int) else short_float(value)
    return generation
