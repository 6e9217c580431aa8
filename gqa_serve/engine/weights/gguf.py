"""A GGUF file as a `Checkpoint`: what llama.cpp's converter did is undone on the way in.

Owns opening the file (or all parts of a split one), and streaming its tensors under Hugging Face names:
quantized matrices as `BlockTensor`, other matrices in the precision of the file, vectors in float32. The
container is `gguf_file`, metadata is `gguf_config`, names and permutations are `gguf_names`.
Invariant: a yielded tensor equals what the safetensors checkpoint held, up to quantization.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from gguf.constants import GGMLQuantizationType

from gqa_serve.engine.weights.block_tensor import BlockTensor
from gqa_serve.engine.weights.checkpoint import Checkpoint
from gqa_serve.engine.weights.gguf_config import translate_config, translate_generation_config
from gqa_serve.engine.weights.gguf_file import GgufFile, GgufTensor, total_bytes
from gqa_serve.engine.weights.gguf_names import CONFIG_TENSORS, hf_name, rules_for, undo_conversion
from gqa_serve.engine.weights.quantized_matrix import QuantizedMatrix
from gqa_serve.errors import ModelError

if TYPE_CHECKING:
    import torch

_SPLIT_NAME = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf")
_PLAIN_DTYPES = {
    GGMLQuantizationType.F32: "float32",
    GGMLQuantizationType.F16: "float16",
    GGMLQuantizationType.BF16: "bfloat16",
}


def read_gguf_metadata(path: Path) -> dict[str, Any]:
    """All metadata of a file as plain values; raises `ModelError`."""
    return GgufFile(path).metadata


class GgufCheckpoint(Checkpoint):
    """One GGUF model. `raw_config["dtype"]` is set only if the matrices are not quantized."""

    def __init__(self, path: Path) -> None:
        """Read headers and translate the config; raises `ModelError`, `UnsupportedModelError`."""
        self.path = path
        first = GgufFile(path)
        tensors = {tensor.name: tensor for tensor in _all_tensors(first)}  # later parts name no architecture
        architecture = first.metadata.get("general.architecture")
        if not isinstance(architecture, str):
            raise ModelError(
                f"{path} does not name its architecture; it is not a model, use a model's GGUF file."
            )
        self._rules = rules_for(architecture)
        factors = {
            name: tensors.pop(name).to_float32().reshape(-1).tolist()
            for name in CONFIG_TENSORS & set(tensors)
        }
        self._tensors = {hf_name(name, architecture): tensor for name, tensor in tensors.items()}
        self.num_tensors = len(self._tensors)
        self.weight_bytes = total_bytes(list(self._tensors.values()))
        shapes = {name: tensor.shape for name, tensor in tensors.items()}
        self.raw_config = translate_config(str(path), architecture, first.metadata, shapes, factors)
        self.generation_config = translate_generation_config(first.metadata)
        if (dtype := _stored_dtype(self._tensors)) is not None:
            self.raw_config["dtype"] = dtype
        self._check_permutable()

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tensor.shape for name, tensor in self._tensors.items()}

    def matrix_types(self) -> dict[str, str]:
        """The block type of every matrix, such as Q4_K, F16, by its Hugging Face name."""
        return {name: tensor.type.name for name, tensor in self._tensors.items() if len(tensor.shape) == 2}

    def tensors(
        self, names: Collection[str] | None = None
    ) -> Iterator[tuple[str, torch.Tensor | QuantizedMatrix]]:
        """As `Checkpoint.tensors`, of all tensors or of those in `names`."""
        heads = self.raw_config["num_attention_heads"], self.raw_config["num_key_value_heads"]
        for name, stored in self._tensors.items():
            if names is not None and name not in names:
                continue
            if stored.is_quantized_matrix:
                rows = undo_conversion(name, _numbers(stored), self._rules, *heads)
                yield name, BlockTensor(name, stored.type.name, (stored.shape[0], stored.shape[1]), rows)
            else:
                yield name, undo_conversion(name, _numbers(stored), self._rules, *heads)

    def _check_permutable(self) -> None:
        heads = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}
        for name, tensor in self._tensors.items():
            owner = name.rsplit(".", 2)[-2]
            if (
                owner in heads
                and tensor.shape[0] != self.raw_config[heads[owner]] * self.raw_config["head_dim"]
            ):
                raise ModelError(
                    f"{self.path}: tensor {tensor.name} has {tensor.shape[0]} rows, not the "
                    f"{self.raw_config[heads[owner]]} heads of {self.raw_config['head_dim']} that the "
                    "metadata says; download the file again."
                )


def _all_tensors(first: GgufFile) -> list[GgufTensor]:
    """Tensors of the file, or of all parts of a split one given its first part."""
    count = first.metadata.get("split.count", 0)
    if not isinstance(count, int) or count <= 1:
        return first.tensors
    match = _SPLIT_NAME.fullmatch(first.path.name)
    if match is None or int(match[3]) != count:
        raise ModelError(
            f"{first.path} is one of {count} parts and must keep its name; "
            f"rename it to end in -00001-of-{count:05d}.gguf."
        )
    if first.metadata.get("split.no") != 0:
        start = first.path.with_name(f"{match[1]}-00001-of-{match[3]}.gguf")
        raise ModelError(f"{first.path} is not the first of its {count} parts; give {start}.")
    tensors = {tensor.name: tensor for tensor in first.tensors}
    for number in range(2, count + 1):
        part = first.path.with_name(f"{match[1]}-{number:05d}-of-{match[3]}.gguf")
        for tensor in GgufFile(part).tensors:
            if tensor.name in tensors:
                raise ModelError(f"{part} repeats the tensor {tensor.name}; download all parts again.")
            tensors[tensor.name] = tensor
    expected = first.metadata.get("split.tensors.count", len(tensors))
    if expected != len(tensors):
        raise ModelError(
            f"{first.path}: the parts hold {len(tensors)} tensors, not {expected}; download all again."
        )
    return list(tensors.values())


def _numbers(stored: GgufTensor) -> torch.Tensor:
    """A matrix in the file's own precision, a quantized one as its bytes by rows; all else in float32.

    May alias the mapping.
    """
    import torch  # here alone: reading metadata must not cost its import

    if stored.is_quantized_matrix:
        return torch.from_numpy(stored.data.reshape(stored.shape[0], -1))
    dtype = _PLAIN_DTYPES.get(stored.type)
    if dtype is None or dtype == "float32" or len(stored.shape) == 1:
        return torch.from_numpy(stored.to_float32())
    numbers = stored.data.view(np.int16)  # numpy knows no bfloat16
    if not numbers.flags.aligned:
        numbers = numbers.copy()
    return torch.from_numpy(numbers).view(getattr(torch, dtype)).view(stored.shape)


def _stored_dtype(tensors: Mapping[str, GgufTensor]) -> str | None:
    """The dtype of the matrices if all have the same and it is not a quantization."""
    kinds = {tensor.type for tensor in tensors.values() if len(tensor.shape) > 1}
    return _PLAIN_DTYPES.get(kinds.pop()) if len(kinds) == 1 else None
