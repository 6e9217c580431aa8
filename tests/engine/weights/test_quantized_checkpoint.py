"""Quantized safetensors: every format means what an independent reading says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from quantized_files import FORMATS, write_quantized
from safetensors.torch import load_file, save_file
from tiny import tiny_model

from gqa_serve.engine.backends.reference import ReferenceBackend
from gqa_serve.engine.model_config import ModelConfig
from gqa_serve.engine.models.loader import load_model
from gqa_serve.engine.weights.checkpoint import open_checkpoint
from gqa_serve.engine.weights.quantized_formats import format_of
from gqa_serve.engine.weights.quantized_matrix import QuantizedMatrix
from gqa_serve.errors import ModelError, UnsupportedModelError

CPU = torch.device("cpu")


def model_of(**fields: Any) -> Any:
    return tiny_model("llama", num_hidden_layers=1, **fields)


@pytest.mark.parametrize("name", FORMATS)
def test_every_number_is_what_the_format_means(tmp_path: Path, name: str) -> None:
    meaning = write_quantized(tmp_path, model_of(), name)
    checkpoint = open_checkpoint(tmp_path)
    assert "quantization_config" not in checkpoint.raw_config
    shapes = checkpoint.tensor_shapes()
    assert shapes == {key: tuple(tensor.shape) for key, tensor in meaning.items()}
    assert checkpoint.num_tensors == len(shapes)
    seen = set()
    for key, tensor in checkpoint.tensors():
        seen.add(key)
        if not isinstance(tensor, QuantizedMatrix):
            assert torch.equal(tensor.float(), meaning[key])
            continue
        assert key.endswith("_proj.weight")
        assert (tensor.name, tensor.shape) == (key, shapes[key])
        torch.testing.assert_close(tensor.dequantize(), meaning[key], rtol=1e-6, atol=1e-8)
        grouped = tensor.grouped(CPU)
        assert grouped is not None
        torch.testing.assert_close(grouped.dequantize(), meaning[key], rtol=1e-6, atol=1e-8)
    assert seen == set(meaning)


@pytest.mark.parametrize("name", ["awq", "packed4", "float8 channels"])
def test_parts_in_any_order_over_several_files(tmp_path: Path, name: str) -> None:
    meaning = write_quantized(tmp_path, model_of(), name)
    tensors = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    names = sorted(tensors, key=lambda key: key[::-1])
    files = {}
    for number in range(3):
        file = f"model-0000{number + 1}-of-00003.safetensors"
        save_file({key: tensors[key] for key in names[number::3]}, tmp_path / file)
        files |= dict.fromkeys(names[number::3], file)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    found = dict(open_checkpoint(tmp_path).tensors())
    assert found.keys() == meaning.keys()
    for key, tensor in found.items():
        if isinstance(tensor, QuantizedMatrix):
            torch.testing.assert_close(tensor.dequantize(), meaning[key], rtol=1e-6, atol=1e-8)


def rewrite(path: Path, change: Any) -> None:
    """Change the tensors of a written checkpoint in place."""
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path / "model.safetensors")


def test_biases_that_older_tools_invented_are_left_out(tmp_path: Path) -> None:
    meaning = write_quantized(tmp_path, model_of(), "gptq4")
    module = "model.layers.0.self_attn"
    biases = {f"{module}.o_proj.bias": torch.zeros(64), f"{module}.q_proj.bias": torch.eye(64)[3]}
    rewrite(tmp_path, lambda tensors: tensors.update(biases))
    found = open_checkpoint(tmp_path).tensor_shapes()
    assert found.keys() - meaning.keys() == {f"{module}.q_proj.bias"}


def test_what_is_missing_or_misshapen_is_named(tmp_path: Path) -> None:
    write_quantized(tmp_path, model_of(), "awq")
    name = "model.layers.0.mlp.up_proj"
    rewrite(tmp_path, lambda tensors: tensors.update({f"{name}.scales": tensors[f"{name}.scales"][:1]}))
    checkpoint = open_checkpoint(tmp_path)
    config = ModelConfig.from_hf(checkpoint.raw_config)
    with pytest.raises(
        ModelError,
        match=r"Tensor model\.layers\.0\.mlp\.up_proj\.weight has scales .* \[96, 1\], not \[96, 2\]",
    ):
        load_model(checkpoint, config, device=CPU, backend=ReferenceBackend(CPU, torch.float32))
    rewrite(tmp_path, lambda tensors: tensors.pop(f"{name}.qzeros"))
    with pytest.raises(ModelError, match=r"lacks tensor model\.layers\.0\.mlp\.up_proj\.qzeros"):
        open_checkpoint(tmp_path)


def test_tensors_of_another_kind_than_config_says(tmp_path: Path) -> None:
    write_quantized(tmp_path, model_of(), "int8 channels")
    raw = json.loads((tmp_path / "config.json").read_text())
    raw["quantization_config"] = FORMATS["awq"][0]
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(UnsupportedModelError, match=r"no tensor's name ends in \.qweight"):
        open_checkpoint(tmp_path)
    raw["quantization_config"] = "awq"
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(UnsupportedModelError, match="quantization_config is not an object"):
        open_checkpoint(tmp_path)


def test_wrong_types_are_refused(tmp_path: Path) -> None:
    config = FORMATS["float8 channels"][0]
    weight = {"weight": torch.zeros(4, 8, dtype=torch.float8_e5m2), "weight_scale": torch.ones(4, 1)}
    with pytest.raises(ValueError, match="is stored as float8_e5m2, not as float8_e4m3fn or int8"):
        format_of(config, "x").unpack(weight, (4, 8))
    parts = {name: torch.zeros(4, 4, dtype=torch.int64) for name in ("qweight", "qzeros", "scales")}
    with pytest.raises(ValueError, match="is packed in int64, not in int32"):
        format_of(FORMATS["awq"][0], "x").unpack(parts, (32, 4))


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"quant_method": "bitsandbytes"}, "quantization 'bitsandbytes' is not served; use the unquantized"),
        ({}, "quantization None is not served"),
        ({"quant_method": "awq", "bits": 4, "version": "gemv"}, "version 'gemv' is not served .*'gemm'"),
        ({"quant_method": "awq", "bits": 8}, "bits 8 is not served"),
        ({"quant_method": "awq", "bits": 4, "zero_point": False}, "zero_point False"),
        ({"quant_method": "awq", "bits": 4, "group_size": "x"}, "group_size 'x' is not served"),
        ({"quant_method": "gptq", "bits": 3}, r"bits 3 is not served \(only 4, 8\)"),
        ({"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"}, "checkpoint_format 'marlin'"),
        ({"quant_method": "fp8", "weight_block_size": 128}, "weight_block_size 128"),
        ({"quant_method": "fp8", "fmt": "e5m2"}, "fmt 'e5m2'"),
        ({"quant_method": "compressed-tensors"}, "no weights in config_groups"),
        ({**FORMATS["packed4"][0], "format": "nvfp4-pack-quantized"}, "format 'nvfp4-pack-quantized'"),
        ({**FORMATS["packed4"][0], "sparsity_config": {"format": "sparse-24-bitmask"}}, "a sparsity_config"),
        ({**FORMATS["packed4"][0], "transform_config": {"config_groups": {}}}, "transform_config"),
        (
            {
                **FORMATS["packed4"][0],
                "config_groups": {"a": {"weights": {"num_bits": 4}}, "b": {"weights": {"num_bits": 8}}},
            },
            "different weights in its config_groups",
        ),
    ],
)
def test_what_is_not_served_is_refused_by_name(config: dict[str, Any], says: str) -> None:
    with pytest.raises(UnsupportedModelError, match=says) as caught:
        format_of(config, "m/config.json")
    assert str(caught.value).startswith("m/config.json: ")
