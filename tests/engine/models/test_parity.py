"""Every family computes what transformers computes, through the paged path, whole and in pieces."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from backend_choice import BACKENDS, exact_backend
from paged import PagedRun
from tiny import FAMILIES, randomize, tiny_config, tiny_model

from gqa_serve.engine.backends.reference_attention import ReferenceAttentionStep
from gqa_serve.engine.model_config import ModelConfig
from gqa_serve.engine.models.decoder import Decoder
from gqa_serve.engine.models.loader import load_model
from gqa_serve.engine.weights.checkpoint import open_checkpoint

CPU = torch.device("cpu")
TOLERANCE = 1e-4


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


def load(path: Path, backend: str, max_model_len: int | None = None) -> Decoder:
    checkpoint = open_checkpoint(path)
    config = ModelConfig.from_hf(checkpoint.raw_config, checkpoint.generation_config)
    if max_model_len is not None:
        config = config.with_max_model_len(max_model_len)
    return load_model(checkpoint, config, device=CPU, backend=exact_backend(backend))


def prompts_of(lengths: list[int], seed: int = 1) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 128, (length,), generator=generator).tolist() for length in lengths]


@torch.inference_mode()
def oracle(model: Any, prompt: list[int]) -> torch.Tensor:
    logits: torch.Tensor = model(torch.tensor([prompt]), use_cache=False).logits[0].float()
    return logits


def check(
    tmp_path: Path,
    backend: str,
    family: str,
    lengths: list[int],
    max_model_len: int | None = None,
    **overrides: Any,
) -> None:
    model = tiny_model(family, **overrides)
    model.save_pretrained(tmp_path)
    decoder = load(tmp_path, backend, max_model_len)
    prompts = prompts_of(lengths)
    expected = [oracle(model, prompt) for prompt in prompts]
    assert min(logits.std() for logits in expected) > 0.2, "logits near zero prove nothing"
    runs = [
        PagedRun(decoder, prompts, block_size=16).finish_in_one_step(),
        PagedRun(decoder, prompts[:1], block_size=1, seed=1).finish_in_one_step(),
        PagedRun(decoder, prompts, block_size=5, seed=2).finish_ragged(11),
    ]
    for run in runs:
        for got, want in zip(run, expected, strict=False):
            assert (got - want).abs().max() < TOLERANCE


# Query heads and KV heads: MHA, GQA with an odd group, MQA.
HEADS = [(4, 4), (6, 2), (5, 1)]


@pytest.mark.parametrize("heads", HEADS, ids=lambda heads: f"{heads[0]}q{heads[1]}kv")
@pytest.mark.parametrize("family", FAMILIES)
def test_family(family: str, heads: tuple[int, int], backend: str, tmp_path: Path) -> None:
    sizes = {"num_attention_heads": heads[0], "num_key_value_heads": heads[1]}
    # transformers wants hidden_size to be a multiple of the heads, even where head_dim is given.
    check(tmp_path, backend, family, [37, 20, 1, 29], hidden_size=60 if heads[0] != 4 else 64, **sizes)


LLAMA3 = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
ROPES: dict[str, tuple[str, dict[str, Any]]] = {
    "linear": ("llama", {"max_position_embeddings": 32, "rope": {"rope_type": "linear", "factor": 4.0}}),
    "llama3": ("llama", {"max_position_embeddings": 128, "rope": LLAMA3}),
    "yarn": ("llama", {"max_position_embeddings": 64, "rope": YARN}),
    "yarn-ramp": (
        "qwen2",
        {
            "max_position_embeddings": 64,
            "head_dim": 32,
            "rope": {**YARN, "beta_fast": 4.0, "beta_slow": 0.5, "truncate": False, "rope_theta": 100.0},
        },
    ),
    "yarn-mscale": (
        "qwen3",
        {"max_position_embeddings": 64, "rope": {**YARN, "mscale": 0.7, "mscale_all_dim": 1.3}},
    ),
    "yarn-attention-factor": (
        "mistral",
        {"max_position_embeddings": 64, "rope": {**YARN, "attention_factor": 1.3}},
    ),
    "linear-gemma3": (
        "gemma3",
        {
            "rope": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 5000.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
            }
        },
    ),
}


@pytest.mark.parametrize("name", ROPES)
def test_rotary_scaling_past_the_original_context(name: str, backend: str, tmp_path: Path) -> None:
    family, fields = ROPES[name]
    fields = {**fields, "rope_parameters": {"rope_theta": 1000.0, **fields["rope"]}}
    if family == "gemma3":
        del fields["rope_parameters"]["rope_theta"]
    del fields["rope"]
    check(tmp_path, backend, family, [61, 33, 9], **fields)


# The embedding of these two follows the context length served; see engine/rope.py.
@pytest.mark.parametrize("length", [32, 57])
def test_dynamic_rotary_scaling_is_that_of_the_whole_context(
    length: int, backend: str, tmp_path: Path
) -> None:
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1000.0}
    check(tmp_path, backend, "llama", [length], length, max_position_embeddings=32, rope_parameters=rope)


def longrope(head_dim: int) -> dict[str, Any]:
    pairs = head_dim // 2
    return {
        "rope_type": "longrope",
        "rope_theta": 1000.0,
        "short_factor": [1.0 + 0.1 * i for i in range(pairs)],
        "long_factor": [2.0 + 0.7 * i for i in range(pairs)],
    }


@pytest.mark.parametrize(("lengths", "max_model_len"), [([24, 11], 24), ([25, 61], 96)])
@pytest.mark.parametrize("partial", [1.0, 0.5])
def test_longrope_below_and_above_the_original_context(
    lengths: list[int], max_model_len: int, partial: float, backend: str, tmp_path: Path
) -> None:
    rope = {**longrope(int(16 * partial)), "partial_rotary_factor": partial}
    fields = {"max_position_embeddings": 96, "original_max_position_embeddings": 24}
    check(tmp_path, backend, "phi3", lengths, max_model_len, rope_parameters=rope, **fields)


OPTIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama tied": ("llama", {"tie_word_embeddings": True}),
    "llama head_dim": ("llama", {"head_dim": 40}),
    "mistral without window": ("mistral", {"sliding_window": None}),
    "mistral window of one": ("mistral", {"sliding_window": 1}),
    "qwen2 without window": ("qwen2", {"use_sliding_window": False}),
    "qwen2 layer types": ("qwen2", {"layer_types": ["full_attention", "sliding_attention"] * 2}),
    "qwen3 window and bias": (
        "qwen3",
        {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1, "attention_bias": True},
    ),
    "gemma2 without caps": ("gemma2", {"attn_logit_softcapping": None, "final_logit_softcapping": None}),
    "gemma2 tight caps": ("gemma2", {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}),
    "gemma3 logits cap": ("gemma3", {"final_logit_softcapping": 2.0, "hidden_activation": "gelu"}),
    "phi3 window": ("phi3", {"sliding_window": 13}),
    "smollm3 window": ("smollm3", {"use_sliding_window": True, "sliding_window": 8}),
    "smollm3 chosen layers": ("smollm3", {"no_rope_layers": [0, 1, 1, 0], "attention_bias": True}),
    "granite biases": ("granite", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_option(name: str, backend: str, tmp_path: Path) -> None:
    family, fields = OPTIONS[name]
    check(tmp_path, backend, family, [31, 14], **fields)


def test_text_part_of_a_multimodal_gemma3(backend: str, tmp_path: Path) -> None:
    text = tiny_config("gemma3")
    vision = transformers.SiglipVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28
    )
    config = transformers.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    model = transformers.Gemma3ForConditionalGeneration._from_config(config, attn_implementation="eager")
    randomize(model, 0)
    model.eval().save_pretrained(tmp_path)
    decoder = load(tmp_path, backend)
    [prompt] = prompts_of([30])
    [got] = PagedRun(decoder, [prompt], block_size=8).finish_in_one_step()
    assert (got - oracle(model, prompt)).abs().max() < TOLERANCE


def test_the_check_notices_a_wrong_group_mapping(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Were query head h to read KV head h % KV instead of h // G, the logits would be far off."""
    model = tiny_model("llama")
    model.save_pretrained(tmp_path)
    [prompt] = prompts_of([24])
    right = ReferenceAttentionStep.attend

    def wrong(step: ReferenceAttentionStep, layer: int, q: torch.Tensor) -> torch.Tensor:
        order = torch.tensor([0, 2, 1, 3])
        return right(step, layer, q[:, order]).view(q.shape)[:, order].flatten(1)

    monkeypatch.setattr(ReferenceAttentionStep, "attend", wrong)
    [got] = PagedRun(load(tmp_path, "reference"), [prompt], block_size=8).finish_in_one_step()
    assert (got - oracle(model, prompt)).abs().max() > 1000 * TOLERANCE
