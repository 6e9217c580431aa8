"""Quantized safetensors give the logits of the model whose weights are what they mean."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from backend_choice import BACKENDS
from paged import PagedRun
from quantized_files import write_quantized
from tiny import tiny_model

from gqa_serve.engine.backends.reference import ReferenceBackend
from gqa_serve.engine.model_config import ModelConfig
from gqa_serve.engine.models.loader import load_model
from gqa_serve.engine.weights.checkpoint import open_checkpoint

CPU = torch.device("cpu")


@pytest.mark.parametrize("name", ["awq", "gptq4 desc_act", "packed8 channels", "fp8 blocks"])
@pytest.mark.parametrize("backend_name", BACKENDS)
def test_cpu_backends_serve_it(tmp_path: Path, name: str, backend_name: str) -> None:
    model = tiny_model("llama", num_hidden_layers=2)
    meaning = write_quantized(tmp_path, model, name)
    model.load_state_dict(meaning)
    checkpoint = open_checkpoint(tmp_path)
    config = ModelConfig.from_hf(checkpoint.raw_config)
    prompts = [[5, 9, 77, 31, 8, 100], [3, 3, 120]]
    with torch.inference_mode():
        expected = [model(torch.tensor([prompt])).logits[0] for prompt in prompts]
    for quantization, tolerance in (("none", 1e-4), ("auto", 0.05)):
        if backend_name == "native":
            from gqa_serve.engine.backends.cpu import CpuBackend

            backend: Any = CpuBackend(dtype=torch.float32, quantization=quantization)
        else:
            backend = ReferenceBackend(CPU, torch.float32)
        decoder = load_model(checkpoint, config, device=CPU, backend=backend)
        if backend_name == "native":
            assert ("int8" in decoder.weight_formats) == (quantization == "auto")
        for logits, exact in zip(
            PagedRun(decoder, prompts, block_size=16).finish_in_one_step(), expected, strict=True
        ):
            assert (logits - exact).abs().max() <= tolerance * exact.abs().max()
