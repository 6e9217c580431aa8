"""The GGUF container: header, metadata and tensor directory of one file, memory mapped.

Owns byte layout only (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md); what the keys mean
is `gguf_config`, what the tensors mean is `gguf_names`. Types and dequantizing come from the `gguf`
library. The header is parsed here because the library's reader builds a numpy view per array element
(tens of seconds for a 262k-token vocabulary) and trusts every length it reads. Invariant: every
length is checked against the file before it is used, so a damaged file is a `ModelError`, never a hang.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf.constants import GGML_QUANT_SIZES, GGUF_DEFAULT_ALIGNMENT, GGMLQuantizationType, GGUFValueType
from gguf.quants import dequantize

from gqa_serve.engine.weights.checkpoint import GGUF_MAGIC
from gqa_serve.errors import ModelError, UnsupportedModelError

SUPPORTED_VERSIONS = (2, 3)
MAX_DIMENSIONS = 4
MAX_REASON_CHARS = 200
WEIGHTS_PER_CHUNK = 1 << 16  # temporaries of this size stay in the CPU's cache

_SCALARS = {
    GGUFValueType.UINT8: "<u1",
    GGUFValueType.INT8: "<i1",
    GGUFValueType.UINT16: "<u2",
    GGUFValueType.INT16: "<i2",
    GGUFValueType.UINT32: "<u4",
    GGUFValueType.INT32: "<i4",
    GGUFValueType.FLOAT32: "<f4",
    GGUFValueType.UINT64: "<u8",
    GGUFValueType.INT64: "<i8",
    GGUFValueType.FLOAT64: "<f8",
    GGUFValueType.BOOL: "?",
}


@dataclass(frozen=True)
class GgufTensor:
    """One entry of the tensor directory. `shape` is in torch order (rows first)."""

    name: str
    type: GGMLQuantizationType
    shape: tuple[int, ...]
    num_bytes: int
    data: npt.NDArray[np.uint8]  # [num_bytes], aliases the mapping

    @property
    def is_quantized_matrix(self) -> bool:
        """Two dimensions, in blocks of several numbers."""
        return len(self.shape) == 2 and GGML_QUANT_SIZES[self.type][0] > 1

    def to_float32(self) -> npt.NDArray[np.float32]:
        """Dequantize to a float32 array of `shape`; F32 aliases the (copy-on-write) mapping.

        Raises `UnsupportedModelError` for a type the `gguf` library cannot dequantize.
        """
        if self.type is GGMLQuantizationType.F32:
            return self.data.view(np.float32).reshape(self.shape)
        return dequantize_blocks(self.data, self.type, self.shape, self.name)


def dequantize_blocks(
    data: npt.NDArray[np.uint8], kind: GGMLQuantizationType, shape: tuple[int, ...], name: str
) -> npt.NDArray[np.float32]:
    """The numbers of `data`, whole blocks of type `kind` in any shape, as a new float32 array of `shape`.

    Raises `UnsupportedModelError`, naming the tensor, for a type the `gguf` library cannot dequantize.
    """
    block_size, type_size = GGML_QUANT_SIZES[kind]
    out = np.empty(math.prod(shape), dtype=np.float32)
    chunk = WEIGHTS_PER_CHUNK // block_size
    blocks = data.reshape(-1, type_size)
    for start in range(0, len(blocks), chunk):
        part = blocks[start : start + chunk].reshape(1, -1)  # one row: one vectorized call
        try:
            values = dequantize(part, kind)
        except NotImplementedError as error:
            raise UnsupportedModelError(
                f"Tensor {name} is stored as {kind.name}, which cannot be dequantized; "
                "use a file with another quantization, such as Q4_K_M or Q8_0."
            ) from error
        out[start * block_size : start * block_size + values.size] = values.reshape(-1)
    return out.reshape(shape)


class GgufFile:
    """A parsed GGUF file.

    Attributes:
        metadata: every key as a plain Python value (str, int, float, bool or a list of them).
        tensors: the tensor directory, in file order.
    """

    def __init__(self, path: Path) -> None:
        """Map and parse `path`; raises `ModelError` if it is missing, damaged or truncated."""
        self.path = path
        reader = _Reader(path, map_file(path))
        tensor_count, metadata_count = _read_header(reader)
        self.metadata = _read_metadata(reader, metadata_count)
        self.tensors = _read_tensors(reader, tensor_count, self.metadata)


def map_file(path: Path) -> mmap.mmap:
    """Map a file copy-on-write as bytes; raises `ModelError`."""
    try:
        if path.stat().st_size == 0:
            raise ModelError(f"{path} is empty; download it again.")
        with path.open("rb") as file:
            # Copy-on-write and not read-only: torch warns about arrays it could not write to.
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    except OSError as error:
        raise ModelError(
            f"{path} cannot be read ({error.strerror}); check the path and permissions."
        ) from error


class _Reader:
    """A cursor that never reads past the end of the file."""

    def __init__(self, path: Path, mapping: mmap.mmap) -> None:
        self.path = path
        self.data = np.frombuffer(mapping, dtype=np.uint8)
        self.view = memoryview(mapping)
        self.offset = 0

    def damaged(self, what: str) -> ModelError:
        what = (
            what if len(what) <= MAX_REASON_CHARS else what[:MAX_REASON_CHARS] + "..."
        )  # it quotes the file
        return ModelError(f"{self.path} is damaged or incomplete ({what}); delete it and download it again.")

    def take(self, num_bytes: int, what: str) -> memoryview:
        end = self.offset + num_bytes
        if end > len(self.view):
            raise self.damaged(f"it ends inside {what}")
        part = self.view[self.offset : end]
        self.offset = end
        return part

    def u32(self, what: str) -> int:
        return int(struct.unpack("<I", self.take(4, what))[0])

    def u64(self, what: str) -> int:
        return int(struct.unpack("<Q", self.take(8, what))[0])

    def string(self, what: str) -> str:
        try:
            return str(self.take(self.u64(what), what), "utf-8")
        except UnicodeDecodeError as error:
            raise self.damaged(f"{what} is not UTF-8") from error

    def value_type(self, what: str) -> GGUFValueType:
        number = self.u32(what)
        try:
            return GGUFValueType(number)
        except ValueError as error:
            raise self.damaged(f"{what} has the unknown type {number}") from error

    def scalars(self, kind: GGUFValueType, count: int, what: str) -> list[Any]:
        dtype = np.dtype(_SCALARS[kind])
        values: list[Any] = np.frombuffer(self.take(count * dtype.itemsize, what), dtype=dtype).tolist()
        return values

    def value(self, what: str) -> Any:
        kind = self.value_type(what)
        if kind is GGUFValueType.STRING:
            return self.string(what)
        if kind is not GGUFValueType.ARRAY:
            return self.scalars(kind, 1, what)[0]
        item_kind, count = self.value_type(what), self.u64(what)
        if item_kind is GGUFValueType.ARRAY:
            raise self.damaged(f"{what} is an array of arrays")
        if item_kind is GGUFValueType.STRING:
            if count * 8 > len(self.view) - self.offset:  # before building a list of that length
                raise self.damaged(f"it ends inside {what}")
            return [self.string(what) for _ in range(count)]
        return self.scalars(item_kind, count, what)


def _read_header(reader: _Reader) -> tuple[int, int]:
    """Returns (tensor count, metadata count)."""
    if bytes(reader.take(4, "the header")) != GGUF_MAGIC:
        raise ModelError(f"{reader.path} is not a GGUF file; check the path or download it again.")
    version = reader.u32("the header")
    if version not in SUPPORTED_VERSIONS:
        raise ModelError(
            f"{reader.path} is GGUF version {version}, but only little-endian versions 2 and 3 are "
            "supported; convert the model again with a current llama.cpp."
        )
    return reader.u64("the header"), reader.u64("the header")


def _read_metadata(reader: _Reader, count: int) -> dict[str, Any]:
    metadata: dict[str, Any] = {}
    for _ in range(count):
        key = reader.string("a metadata key")
        if key in metadata:
            raise reader.damaged(f"the key {key!r} appears twice")
        metadata[key] = reader.value(f"the value of {key!r}")
    return metadata


def _read_tensors(reader: _Reader, count: int, metadata: dict[str, Any]) -> list[GgufTensor]:
    entries: dict[str, tuple[GGMLQuantizationType, tuple[int, ...], int]] = {}
    for _ in range(count):
        name = reader.string("a tensor name")
        if name in entries:
            raise reader.damaged(f"the tensor {name!r} appears twice")
        num_dimensions = reader.u32(f"tensor {name!r}")
        if not 1 <= num_dimensions <= MAX_DIMENSIONS:
            raise reader.damaged(f"the tensor {name!r} has {num_dimensions} dimensions")
        sizes = [reader.u64(f"tensor {name!r}") for _ in range(num_dimensions)]
        type_number = reader.u32(f"tensor {name!r}")
        if type_number not in GGMLQuantizationType._value2member_map_:
            raise UnsupportedModelError(
                f"{reader.path} stores {name} in the unknown quantization type {type_number}; "
                "use a file with another quantization, such as Q4_K_M or Q8_0, or update the gguf package."
            )
        # GGUF lists the fastest-varying dimension first, torch lists it last.
        entries[name] = (
            GGMLQuantizationType(type_number),
            tuple(sizes[::-1]),
            reader.u64(f"tensor {name!r}"),
        )
    alignment = metadata.get("general.alignment", GGUF_DEFAULT_ALIGNMENT)
    if not isinstance(alignment, int) or alignment <= 0 or alignment & (alignment - 1):
        raise reader.damaged(f"the alignment is {alignment!r}")
    base = -(-reader.offset // alignment) * alignment
    tensors = [_tensor(reader, name, *entry, base) for name, entry in entries.items()]
    _check_apart(reader, {name: offset for name, (_, _, offset) in entries.items()}, tensors)
    return tensors


def _check_apart(reader: _Reader, offsets: dict[str, int], tensors: list[GgufTensor]) -> None:
    """Raises ModelError if two tensors share bytes."""
    end = 0
    for tensor in sorted(tensors, key=lambda tensor: offsets[tensor.name]):
        if offsets[tensor.name] < end:
            raise reader.damaged(f"the tensor {tensor.name!r} overlaps another")
        end = offsets[tensor.name] + tensor.num_bytes


def _tensor(
    reader: _Reader, name: str, kind: GGMLQuantizationType, shape: tuple[int, ...], offset: int, base: int
) -> GgufTensor:
    block_size, type_size = GGML_QUANT_SIZES[kind]
    if 0 in shape or shape[-1] % block_size:
        raise reader.damaged(f"the tensor {name!r} has the shape {list(shape)}")
    num_bytes = math.prod(shape) // block_size * type_size
    start = base + offset
    if start + num_bytes > len(reader.data):
        raise reader.damaged(f"it ends inside the tensor {name!r}")
    if start % min(type_size, 4) and kind is GGMLQuantizationType.F32:
        raise reader.damaged(f"the tensor {name!r} is not aligned")
    return GgufTensor(name, kind, shape, num_bytes, reader.data[start : start + num_bytes])


def total_bytes(tensors: Sequence[GgufTensor]) -> int:
    """Bytes of the tensors as stored."""
    return sum(tensor.num_bytes for tensor in tensors)
