"""The real Gemma 3 270M file, against transformers' own GGUF loading."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from gguf_files import numbers
from transformers import Gemma3ForCausalLM, Gemma3TextConfig
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from gqa_serve.engine.weights.checkpoint import open_checkpoint


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_gemma3_270m(gemma3_270m_gguf: Path) -> None:
    checkpoint = open_checkpoint(gemma3_270m_gguf)
    raw = checkpoint.raw_config
    assert (raw["num_attention_heads"], raw["num_key_value_heads"], raw["head_dim"]) == (4, 1, 256)
    assert raw["layer_types"].count("full_attention") == 3
    assert raw["rope_parameters"]["sliding_attention"] == {"rope_type": "default", "rope_theta": 10000.0}
    assert raw["rope_parameters"]["full_attention"]["rope_theta"] == 1e6
    assert checkpoint.generation_config == {"eos_token_id": [1, 106], "bos_token_id": 2}
    with torch.device("meta"):
        names = Gemma3ForCausalLM(Gemma3TextConfig(**{k: v for k, v in raw.items() if k != "model_type"}))
    loaded = load_gguf_checkpoint(gemma3_270m_gguf, return_tensors=True, model_to_load=names)
    expected = loaded["tensors"]
    for name, tensor in checkpoint.tensors():
        assert torch.equal(numbers(tensor), expected.pop(name)), name
    assert not expected
