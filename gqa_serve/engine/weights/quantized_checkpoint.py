"""A safetensors directory whose matrices are quantized: several tensors of the files are one of ours.

Owns which tensors belong together, and hands them on as one `StoredMatrix` under the name the matrix would
have unquantized. How they make numbers is `quantized_formats.py`'s business.
Invariant: seen from outside the checkpoint looks like an unquantized one; `raw_config` has no
`quantization_config`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gqa_serve.engine.weights.checkpoint import Checkpoint
from gqa_serve.engine.weights.quantized_formats import QuantizedFormat, format_of
from gqa_serve.engine.weights.quantized_matrix import GroupedTensor, QuantizedMatrix
from gqa_serve.errors import ModelError, UnsupportedModelError

if TYPE_CHECKING:
    import torch

CONFIG_KEY = "quantization_config"


def without_quantization(
    raw_config: Mapping[str, Any], file: Path
) -> tuple[dict[str, Any], QuantizedFormat | None]:
    """The config of the unquantized model, and the format its `quantization_config` describes, if any.

    Raises UnsupportedModelError, which names `file`, for one that is not served.
    """
    config = raw_config.get(CONFIG_KEY)
    rest = {name: value for name, value in raw_config.items() if name != CONFIG_KEY}
    if config is None:
        return rest, None
    if not isinstance(config, Mapping):
        raise UnsupportedModelError(f"{file}: {CONFIG_KEY} is not an object; download it again.")
    return rest, format_of(config, str(file))


@dataclass(frozen=True, eq=False)
class StoredMatrix(QuantizedMatrix):
    """A matrix [n, k] as the tensors that its file has of it, by suffix."""

    name: str
    shape: tuple[int, int]
    parts: Mapping[str, torch.Tensor]
    format: QuantizedFormat

    def grouped(self, device: torch.device) -> GroupedTensor:
        return self.format.unpack({name: part.to(device) for name, part in self.parts.items()}, self.shape)

    def dequantize(self) -> torch.Tensor:
        return self.format.unpack(self.parts, self.shape).dequantize()


class QuantizedCheckpoint(Checkpoint):
    """An opened directory with a `quantization_config`, matrix by matrix."""

    def __init__(self, stored: Checkpoint) -> None:
        """Raises UnsupportedModelError for a format that is not served, ModelError for missing parts."""
        self.path = stored.path
        self.generation_config = stored.generation_config
        self.weight_bytes = stored.weight_bytes
        self._stored = stored
        self.raw_config, found = without_quantization(stored.raw_config, self.path / "config.json")
        assert found is not None
        self._format = found
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._parts: dict[str, str] = {}  # tensor -> its matrix
        self._wanted: dict[str, frozenset[str]] = {}  # matrix -> its tensors' suffixes
        self._sort(stored.tensor_shapes())
        self.num_tensors = len(self._shapes)

    def _sort(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Find the quantized modules, then which tensors are theirs; the others stay as they are."""
        key = "." + self._format.key
        modules = {name.removesuffix(key) for name in shapes if name.endswith(key)}
        if not modules:
            raise UnsupportedModelError(
                f"{self.path}: config.json says that weights are quantized, but no tensor's name ends in "
                f"{key}; check that config.json belongs to these weights."
            )
        for module in sorted(modules):
            found = {part for part in self._format.parts if f"{module}.{part}" in shapes}
            for part, needed in self._format.parts.items():
                if needed and part not in found:
                    raise ModelError(f"{self.path} lacks tensor {module}.{part}; download it again.")
            matrix = f"{module}.weight"
            try:
                self._shapes[matrix] = self._format.shape(
                    {part: shapes[f"{module}.{part}"] for part in found}
                )
            except ModelError as error:
                raise ModelError(f"{self.path}: {module} {error}; download it again.") from error
            self._wanted[matrix] = frozenset(found)
            self._parts |= {f"{module}.{part}": matrix for part in found}
        invented = self._invented_biases({f"{module}.bias" for module in modules} & shapes.keys())
        for name, shape in shapes.items():
            unused = name.rsplit(".", 1)[-1] in self._format.unused or name in invented
            if name not in self._parts and not unused:
                self._shapes[name] = shape

    def _invented_biases(self, biases: set[str]) -> set[str]:
        """Those of `biases` that are zeros, if the format's tools write such."""
        if not biases or not self._format.invents_biases:
            return set()
        return {
            name
            for name, tensor in self._stored.tensors()
            if name in biases and not isinstance(tensor, QuantizedMatrix) and not bool(tensor.any())
        }

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        return self._shapes

    def tensors(
        self, names: Collection[str] | None = None
    ) -> Iterator[tuple[str, torch.Tensor | QuantizedMatrix]]:
        """A matrix comes when its last tensor was read; until then copies of the others wait."""
        waiting: dict[str, dict[str, torch.Tensor]] = {}
        stored = (
            None
            if names is None
            else {name for name in self._stored.tensor_shapes() if self._parts.get(name, name) in names}
        )
        for name, tensor in self._stored.tensors(stored):
            matrix = self._parts.get(name)
            if matrix is None:
                if name in self._shapes:
                    yield name, tensor
                continue
            assert not isinstance(tensor, QuantizedMatrix)
            parts = waiting.setdefault(matrix, {})
            parts[name.rsplit(".", 1)[-1]] = tensor
            if parts.keys() == self._wanted[matrix]:
                shape = self._shapes[matrix]
                yield matrix, StoredMatrix(matrix, (shape[0], shape[1]), waiting.pop(matrix), self._format)
            else:
                parts[name.rsplit(".", 1)[-1]] = tensor.clone()
