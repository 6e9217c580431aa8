"""config.json to ModelConfig: both spellings, every default, and errors that name the field."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest

from gqa_serve.engine.model_config import ModelConfig, RopeConfig
from gqa_serve.errors import ConfigError, ModelError, UnsupportedModelError

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 100,
    "hidden_size": 72,
    "intermediate_size": 50,
    "num_hidden_layers": 4,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 512,
}


def raw(architecture: str, **fields: Any) -> dict[str, Any]:
    """A small config of an architecture; a field set to ... is left out."""
    merged = {**LLAMA, "architectures": [architecture], **fields}
    return {name: value for name, value in merged.items() if value is not ...}


def read(architecture: str = "LlamaForCausalLM", **fields: Any) -> ModelConfig:
    return ModelConfig.from_hf(raw(architecture, **fields))


def test_sizes_follow_from_the_fields() -> None:
    config = read()
    assert (config.num_heads, config.num_kv_heads, config.group_size, config.head_dim) == (9, 3, 3, 8)
    assert config.kv_bytes_per_token(2) == 2 * 4 * 3 * 8 * 2
    assert config.attention_scale == 8**-0.5
    assert config.windows == (None,) * 4
    assert config.ropes == (RopeConfig("default", 10000.0, 8),) * 4
    assert not config.tie_embeddings


def test_importing_it_does_not_import_torch() -> None:
    program = (
        "import sys; from gqa_serve.engine.model_config import ModelConfig; "
        f"ModelConfig.from_hf({LLAMA!r}); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


SPELLINGS: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("LlamaForCausalLM", {"rope_theta": 5e5}, {"rope_parameters": {"rope_theta": 5e5}}),
    ("LlamaForCausalLM", {"torch_dtype": "bfloat16"}, {"dtype": "bfloat16"}),
    (
        "LlamaForCausalLM",
        {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 4.0}},
        {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 5e5}},
    ),
    (
        "LlamaForCausalLM",
        {
            "rope_theta": 5e5,
            "rope_scaling": {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 128,
            },
        },
        {
            "rope_parameters": {
                "rope_theta": 5e5,
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 128,
            }
        },
    ),
    (
        "Qwen2ForCausalLM",
        {"rope_theta": 1e6, "rope_scaling": {"type": "yarn", "factor": 4.0}},
        {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e6}},
    ),
    (
        "Gemma3ForCausalLM",
        {
            "rope_theta": 1e6,
            "rope_local_base_freq": 1e4,
            "rope_scaling": {"rope_type": "linear", "factor": 8.0},
            "sliding_window_pattern": 2,
        },
        {
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
            "layer_types": ["sliding_attention", "full_attention"] * 2,
        },
    ),
    (
        "Phi3ForCausalLM",
        {
            "original_max_position_embeddings": 128,
            "partial_rotary_factor": 0.5,
            "rope_theta": 1e4,
            "rope_scaling": {"type": "su", "short_factor": [1.0, 1.5], "long_factor": [2.0, 9.0]},
        },
        {
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 1e4,
                "partial_rotary_factor": 0.5,
                "original_max_position_embeddings": 128,
                "short_factor": [1.0, 1.5],
                "long_factor": [2.0, 9.0],
            }
        },
    ),
    (
        "Qwen2ForCausalLM",
        {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 3},
        {
            "use_sliding_window": True,
            "sliding_window": 8,
            "layer_types": ["full_attention"] * 3 + ["sliding_attention"],
        },
    ),
]


@pytest.mark.parametrize(("architecture", "older", "newer"), SPELLINGS)
def test_older_and_newer_spelling_are_equal(
    architecture: str, older: dict[str, Any], newer: dict[str, Any]
) -> None:
    assert read(architecture, **older) == read(architecture, **newer)
    assert read(architecture, **older) != read(architecture)


def test_rope_values_arrive() -> None:
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
    [rope] = set(read(rope_scaling=scaling, rope_theta=7.0).ropes)
    assert rope is not None
    assert (rope.theta, rope.factor, rope.original_max_position) == (7.0, 4.0, 128)
    assert rope.attention_factor == pytest.approx(1.1386294361)  # 0.1 ln 4 + 1


def test_gguf_frequency_factors() -> None:
    config = read(rope_scaling={"rope_type": "factors", "factors": [1.0, 1.0, 2.0, 8.0]})
    assert config.ropes[0] == RopeConfig("factors", 10000.0, 8, short_factors=(1.0, 1.0, 2.0, 8.0))


CONTEXTS: list[tuple[dict[str, Any] | None, int, int]] = [
    (None, 512, 512),
    ({"rope_type": "linear", "factor": 4.0}, 2048, 2048),
    ({"rope_type": "dynamic", "factor": 4.0}, 512, 2048),
    ({"rope_type": "yarn", "factor": 4.0}, 2048, 2048),
    ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}, 512, 512),
]


@pytest.mark.parametrize(("scaling", "served", "limit"), CONTEXTS)
def test_context_length(scaling: dict[str, Any] | None, served: int, limit: int) -> None:
    config = read(rope_scaling=scaling)
    assert (config.max_model_len, config.context_limit) == (served, limit)
    assert config.with_max_model_len(limit).max_model_len == limit
    with pytest.raises(ConfigError, match=f"between 1 and {limit}"):
        config.with_max_model_len(limit + 1)


def test_gemma3_counts_the_stretched_context() -> None:
    scaling = {"rope_type": "linear", "factor": 8.0}
    assert read("Gemma3ForCausalLM", head_dim=8, rope_scaling=scaling).max_model_len == 512


def test_missing_or_null_kv_heads_mean_what_the_architecture_says() -> None:
    assert read(num_key_value_heads=...).num_kv_heads == 9
    assert read(num_key_value_heads=None).num_kv_heads == 9
    eight = {"num_attention_heads": 8, "hidden_size": 64, "num_key_value_heads": ...}
    assert read("MistralForCausalLM", **eight).num_kv_heads == 8
    assert read("MistralForCausalLM", num_key_value_heads=None).num_kv_heads == 9
    assert read("Gemma2ForCausalLM", **eight).num_kv_heads == 4


def test_windows() -> None:
    assert read("MistralForCausalLM", sliding_window=7).windows == (7,) * 4
    assert read("MistralForCausalLM").windows == (4096,) * 4
    assert read("MistralForCausalLM", sliding_window=None).windows == (None,) * 4
    assert read("Qwen2ForCausalLM", sliding_window=7, max_window_layers=0).windows == (None,) * 4
    assert read("Gemma2ForCausalLM", sliding_window=7).windows == (7, None, 7, None)
    assert read("Gemma3ForCausalLM", sliding_window=7).windows == (7,) * 4
    assert read("Gemma3ForCausalLM", num_hidden_layers=6, sliding_window=7).windows == (*(7,) * 5, None)
    assert read("SmolLM3ForCausalLM", sliding_window=7).windows == (None,) * 4
    smollm3 = read("SmolLM3ForCausalLM", sliding_window=7, use_sliding_window=True)
    assert smollm3.windows == (None, None, None, 7)
    assert [rope is None for rope in smollm3.ropes] == [False, False, False, True]


def test_model_type_serves_where_no_architecture_is_named() -> None:
    config = read(architectures=...)
    assert config.architecture == "llama"
    assert replace(config, architecture="LlamaForCausalLM") == read()


def test_end_of_sequence_ids_of_both_files_are_merged() -> None:
    config = ModelConfig.from_hf(raw("LlamaForCausalLM", eos_token_id=2), {"eos_token_id": [3, 2, 4]})
    assert config.eos_token_ids == (2, 3, 4)
    assert config.bos_token_id is None
    assert ModelConfig.from_hf(raw("LlamaForCausalLM"), {"bos_token_id": 1}).bos_token_id == 1
    with pytest.raises(ModelError, match=r"generation_config.json: eos_token_id must be a token id"):
        ModelConfig.from_hf(raw("LlamaForCausalLM"), {"eos_token_id": "</s>"})


def test_a_sparse_multimodal_gemma3_config() -> None:
    """The text_config of published checkpoints names only what differs from the architecture's defaults."""
    text = {"hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34, "sliding_window": 1024}
    text["rope_scaling"] = {"factor": 8.0, "rope_type": "linear"}
    config = ModelConfig.from_hf(
        {
            "architectures": ["Gemma3ForConditionalGeneration"],
            "text_config": text,
            "torch_dtype": "bfloat16",
            "eos_token_id": [1, 106],
            "vision_config": {},
        }
    )
    assert (config.num_heads, config.num_kv_heads, config.head_dim, config.vocab_size) == (8, 4, 256, 262208)
    assert (config.dtype, config.eos_token_ids, config.tie_embeddings) == ("bfloat16", (1, 106), True)
    full, window = config.ropes[5], config.ropes[0]
    assert full is not None
    assert window is not None
    assert (full.rope_type, full.theta, window.rope_type, window.theta) == ("linear", 1e6, "default", 1e4)


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"num_key_value_heads": 4}, r"num_key_value_heads must be .* divides num_attention_heads \(9\), got 4"),
    ({"num_key_value_heads": 0}, "num_key_value_heads must be a positive integer, got 0"),
    ({"num_attention_heads": ...}, "num_attention_heads must be a positive integer, it is missing"),
    ({"num_attention_heads": True}, "num_attention_heads must be a positive integer, got True"),
    ({"num_attention_heads": "9"}, "num_attention_heads must be a positive integer, got '9'"),
    ({"hidden_size": 73}, r"hidden_size must be a multiple of num_attention_heads \(9\), got 73"),
    ({"vocab_size": 1.5}, "vocab_size must be a positive integer"),
    ({"num_hidden_layers": -1}, "num_hidden_layers must be a positive integer"),
    ({"head_dim": 7}, r"partial_rotary_factor must be .* head_dim \(7\)"),
    ({"rms_norm_eps": 0}, "rms_norm_eps must be a number greater than 0"),
    ({"tie_word_embeddings": "yes"}, "tie_word_embeddings must be true or false, got 'yes'"),
    ({"eos_token_id": [1, -2]}, "eos_token_id must be a token id"),
    ({"rope_theta": "big"}, "rope_theta must be a number"),
    ({"rope_theta": float("nan")}, "rope_theta must be a number"),
    ({"rope_scaling": [1]}, "rope_scaling must be an object"),
    ({"rope_scaling": {"rope_type": "linear"}}, "rope_scaling: factor must be a number, it is missing"),
    ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor must be a number"),
    ({"rope_scaling": {"rope_type": "factors", "factors": [1.0]}}, "factors must be a list of 4 numbers"),
    ({"architectures": "LlamaForCausalLM"}, "architectures must be a list of names"),
    ({"architectures": ..., "model_type": ...}, "names neither architectures nor model_type"),
]


@pytest.mark.parametrize(("fields", "message"), WRONG)
def test_errors_name_the_field(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        read(**fields)


UNSUPPORTED: list[tuple[str, dict[str, Any], str]] = [
    ("LlamaForCausalLM", {"hidden_act": "relu2"}, "hidden_act = 'relu2' is not supported; supported: silu"),
    ("LlamaForCausalLM", {"rope_scaling": {"type": "mrope"}}, "rope_type = 'mrope' .* default, linear"),
    ("LlamaForCausalLM", {"rope_scaling": {"type": "default", "mrope_section": [1]}}, "mrope_section"),
    ("LlamaForCausalLM", {"rope_scaling": {"type": "own"}}, "rope_type = 'own' is not supported"),
    ("LlamaForCausalLM", {"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5"),
    ("LlamaForCausalLM", {"quantization_config": {"quant_method": "gptq"}}, "'gptq'.* GGUF"),
    ("LlamaForCausalLM", {"torch_dtype": "float64"}, "torch_dtype = 'float64'"),
    ("MixtralForCausalLM", {}, "'MixtralForCausalLM' is not supported; supported: LlamaForCausalLM"),
    ("llamaforcausallm", {}, "'llamaforcausallm' is not supported"),
    ("MistralForCausalLM", {"layer_types": ["full_attention", "sliding_attention"] * 2}, "layer_types"),
    ("Qwen3ForCausalLM", {"layer_types": ["linear_attention"] * 4}, "layer_types"),
    ("Gemma3ForCausalLM", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
    ("Gemma2ForCausalLM", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
    ("Phi3ForCausalLM", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "supported: default, longrope"),
]


@pytest.mark.parametrize(("architecture", "fields", "message"), UNSUPPORTED)
def test_unsupported_options_say_what_is_supported(
    architecture: str, fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        read(architecture, **fields)


def test_more_layer_errors() -> None:
    with pytest.raises(ModelError, match=r"layer_types must be a list of num_hidden_layers \(4\) names"):
        read("Qwen2ForCausalLM", layer_types=["full_attention"])
    with pytest.raises(ModelError, match=r"layer_types must be without sliding_attention"):
        read("Qwen2ForCausalLM", layer_types=["sliding_attention"] * 4)
    with pytest.raises(ModelError, match=r"sliding_window must be a positive integer"):
        read("Gemma2ForCausalLM", sliding_window=None)
    with pytest.raises(ModelError, match="no_rope_layers must be a list of at least 4"):
        read("SmolLM3ForCausalLM", no_rope_layers=[1, 0])
    with pytest.raises(ModelError, match="text_config must be an object"):
        read("Gemma3ForConditionalGeneration")
    with pytest.raises(ModelError, match="must hold a JSON object"):
        ModelConfig.from_hf([])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"num_hidden_layers": 10**9}, "num_hidden_layers must be a positive integer, at most 4096"),
        ({"vocab_size": 2**31}, "vocab_size must be a positive integer, at most 2147483647"),
        ({"rope_theta": 10**400}, "rope_theta must be a number"),
        ({"eos_token_id": 99999}, r"eos_token_id must be below the vocabulary size \(100\), got 99999"),
        ({"eos_token_id": [2, 100]}, r"eos_token_id must be below the vocabulary size \(100\)"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "factor must be a number, it is missing"),
    ],
)
def test_numbers_that_cannot_be(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(ModelError, match=says):
        read(**fields)


def test_an_end_of_sequence_beyond_the_vocabulary_in_generation_config() -> None:
    with pytest.raises(ModelError, match=r"generation_config\.json: eos_token_id must be below"):
        ModelConfig.from_hf(LLAMA, {"eos_token_id": 100})
    assert ModelConfig.from_hf(LLAMA, {"eos_token_id": 99}).eos_token_ids[-1] == 99


def test_a_null_yarn_factor_is_the_ratio_of_the_lengths() -> None:
    """As in transformers, for DeepSeek's configs."""
    scaling = {"rope_type": "yarn", "factor": None, "original_max_position_embeddings": 128}
    rope = read(rope_scaling=scaling).ropes[0]
    assert rope is not None
    assert rope.factor == 512 / 128
