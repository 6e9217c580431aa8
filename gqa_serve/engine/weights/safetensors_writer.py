"""Writing a checkpoint folder as transformers reads it: safetensors files of limited size, and their index.

    layout: name -> shape, dtype      known before the first tensor, so every offset is
    model-00001-of-00003.safetensors  [8 bytes: header length][header, JSON][tensors, no holes between them]
    model.safetensors.index.json      which file has which tensor; a single file needs none

Owns the format of the files, and that a folder appears whole or not at all. Does not know what tensors mean.
Invariants: tensors may come in any order, and none is kept in memory; the output's name exists only when all
of its files are complete.
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gqa_serve.engine.weights.safetensors import INDEX_FILE, SINGLE_FILE, TORCH_DTYPES
from gqa_serve.errors import ConfigError

if TYPE_CHECKING:
    import torch

MAX_SHARD_BYTES = 5 * 10**9
FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Errors of a disk, or of a user's share of it, that has no room."""
# torch's name of a dtype -> the format's.
DTYPES = {name: kind for kind, name in TORCH_DTYPES.items()}
_ALIGNMENT = 8
_SPARE_BYTES = 64 * 2**20  # tokenizer and configs, and what a file system keeps for itself


@dataclass(frozen=True)
class TensorSpec:
    """A tensor that will be written. `dtype`: one of `DTYPES`."""

    shape: tuple[int, ...]
    dtype: str

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ConfigError(f"Tensors can't be written as {self.dtype}; choose of {', '.join(DTYPES)}.")

    @property
    def item_bytes(self) -> int:
        """Bytes of one number."""
        digits = re.sub(r"\D", "", self.dtype)
        return int(digits) // 8 if digits else 1

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return math.prod(self.shape) * self.item_bytes


@dataclass(frozen=True)
class _Place:
    """Where a tensor lies: its file, and its first byte there."""

    file: str
    offset: int
    spec: TensorSpec


class CheckpointWriter:
    """Weight files of `layout` in `folder`, which exists. Use as a context manager.

    Files are filled up to `max_shard_bytes` in the order of the layout; a larger tensor has one of its own.
    """

    def __init__(
        self, folder: Path, layout: Mapping[str, TensorSpec], *, max_shard_bytes: int = MAX_SHARD_BYTES
    ) -> None:
        """Write the headers. Raises ConfigError where the disk has no room for all of it."""
        self.folder = folder
        self.total_bytes = sum(spec.nbytes for spec in layout.values())
        require_space(folder, self.total_bytes)
        self._places: dict[str, _Place] = {}
        self._left = set(layout)
        shards = _split(layout, max_shard_bytes)
        for number, names in enumerate(shards, 1):
            file = SINGLE_FILE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            with writing(folder / file):
                self._begin(file, {name: layout[name] for name in names})

    def _begin(self, file: str, layout: Mapping[str, TensorSpec]) -> None:
        """Header and offsets of one file; its tensors are holes until they come."""
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        # Wide numbers first: then each tensor begins at a multiple of its item size, which mappings need.
        for name, spec in sorted(layout.items(), key=lambda item: -item[1].item_bytes):
            begin, end = end, end + spec.nbytes
            header[name] = {
                "dtype": DTYPES[spec.dtype],
                "shape": list(spec.shape),
                "data_offsets": [begin, end],
            }
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % _ALIGNMENT)
        for name, spec in layout.items():
            offset = 8 + len(text) + header[name]["data_offsets"][0]
            self._places[name] = _Place(file, offset, spec)
        with (self.folder / file).open("wb") as stream:
            stream.write(len(text).to_bytes(8, "little") + text)
            stream.truncate(8 + len(text) + end)

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Put a tensor into its file, rounded to the dtype of the layout. Each is written once.

        Raises ValueError for a tensor the layout does not have or has in another shape, ConfigError if the
        disk refuses it.
        """
        import torch

        if name not in self._left:
            raise ValueError(f"{name} is not in the layout, or was written before")
        place = self._places[name]
        if tuple(tensor.shape) != place.spec.shape:
            raise ValueError(f"{name} has the shape {list(tensor.shape)}, not {list(place.spec.shape)}")
        numbers = tensor.detach().to("cpu", getattr(torch, place.spec.dtype)).contiguous()
        with writing(self.folder / place.file), (self.folder / place.file).open("r+b") as stream:
            stream.seek(place.offset)
            stream.write(numbers.view(-1).view(torch.uint8).numpy().data)
        self._left.discard(name)

    def finish(self) -> None:
        """Write the index and see to it that everything is on the disk. ValueError if a tensor is missing."""
        if self._left:
            raise ValueError(f"{len(self._left)} tensors were not written, such as {min(self._left)}")
        files = sorted({place.file for place in self._places.values()})
        if len(files) > 1:
            weight_map = {name: self._places[name].file for name in sorted(self._places)}
            index = {"metadata": {"total_size": self.total_bytes}, "weight_map": weight_map}
            write_json(self.folder / INDEX_FILE, index)
        for file in files:
            with writing(self.folder / file), (self.folder / file).open("rb") as stream:
                os.fsync(stream.fileno())

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.finish()


def write_tensors(
    folder: Path,
    layout: Mapping[str, TensorSpec],
    tensors: Iterable[tuple[str, torch.Tensor]],
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """All `tensors`, which are those of `layout`, into weight files in `folder`."""
    with CheckpointWriter(folder, layout, max_shard_bytes=max_shard_bytes) as writer:
        for name, tensor in tensors:
            writer.write(name, tensor)


@contextlib.contextmanager
def new_folder(output: Path) -> Iterator[Path]:
    """An empty folder beside `output` to write into; it gets that name at the end, or is deleted on an error.

    Raises ConfigError if something is at `output` already (an empty folder may be), or it can't be made.
    """
    require_free(output)
    with writing(output):
        output.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{output.name}.", suffix=".partial", dir=output.parent))
        folder.chmod(0o755)
    try:
        yield folder
        with writing(output):
            os.replace(folder, output)
    except BaseException:  # an interrupted conversion, too, leaves nothing behind
        shutil.rmtree(folder, ignore_errors=True)
        raise


def require_free(output: Path) -> None:
    """Raise ConfigError if there is something at `output` that a new checkpoint would replace."""
    if output.is_symlink() or (output.exists() and not output.is_dir()):
        raise ConfigError(f"{output} exists and is not a folder; give another --output.")
    if output.is_dir() and any(output.iterdir()):
        raise ConfigError(f"{output} exists and is not empty; delete it, or give another --output.")


def require_space(folder: Path, nbytes: int) -> None:
    """Raise ConfigError unless the disk of `folder`, which exists, has room for `nbytes` and a bit more."""
    with writing(folder):
        free = shutil.disk_usage(folder).free
    if free < nbytes + _SPARE_BYTES:
        raise ConfigError(
            f"The result needs {nbytes / 2**30:.2f} GiB, and {folder.parent} has {free / 2**30:.2f} GiB "
            "free; free some, or give an --output on another disk."
        )


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn an error of the disk into a ConfigError that names `path`, the reason and the cure."""
    try:
        yield
    except OSError as error:
        cure = "free some space" if error.errno in FULL_DISK else "check the folder and its permissions"
        raise ConfigError(
            f"{path} can't be written ({error.strerror}); {cure}, or give an --output elsewhere."
        ) from error


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """A JSON file of a checkpoint, as transformers lays it out. Raises ConfigError."""
    with writing(path):
        path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _split(layout: Mapping[str, TensorSpec], max_bytes: int) -> list[list[str]]:
    """Names by file, in the order of the layout."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name, spec in layout.items():
        if shards[-1] and filled + spec.nbytes > max_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += spec.nbytes
    return shards
