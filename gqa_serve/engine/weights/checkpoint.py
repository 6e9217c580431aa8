"""The one interface the model loader sees: a `Checkpoint`, whatever file format is behind it.

Owns the choice between formats and the JSON reading they share. Does not know models, dtypes to
serve in, or devices. Invariant: every failure is a `ModelError` of one sentence that names the file.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gqa_serve.errors import ModelError

if TYPE_CHECKING:
    import torch

    from gqa_serve.engine.weights.quantized_matrix import QuantizedMatrix

GGUF_MAGIC = b"GGUF"


class Checkpoint(ABC):
    """Config and weights of one model on disk.

    Attributes:
        path: the directory or file that was opened.
        raw_config: the model's config in Hugging Face spelling, as plain JSON values.
        generation_config: `generation_config.json` or its equivalent; `{}` if there is none.
        weight_bytes: bytes of all tensors as they are stored.
        num_tensors: how many tensors `tensors` will yield.
    """

    path: Path
    raw_config: dict[str, Any]
    generation_config: dict[str, Any]
    weight_bytes: int
    num_tensors: int

    @abstractmethod
    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Hugging Face name -> shape of every tensor that `tensors` will yield, from the headers."""

    @abstractmethod
    def tensors(
        self, names: Collection[str] | None = None
    ) -> Iterator[tuple[str, torch.Tensor | QuantizedMatrix]]:
        """Yield `(Hugging Face name, tensor)`, one at a time; a quantized one as a `QuantizedMatrix`.

        With `names` those alone, in whatever order they are stored; the others are not read.
        A tensor may alias a file mapping: copy it before asking for the next one, never write to it.
        Raises `ModelError` if a tensor cannot be read.
        """


def open_checkpoint(path: Path) -> Checkpoint:
    """Open a safetensors directory or a `.gguf` file; reads headers only.

    Raises `ModelError` (or its `UnsupportedModelError`) if it cannot be served.
    """
    from gqa_serve.engine.weights.gguf import GgufCheckpoint
    from gqa_serve.engine.weights.quantized_checkpoint import CONFIG_KEY, QuantizedCheckpoint
    from gqa_serve.engine.weights.safetensors import DirectoryCheckpoint

    if path.is_dir():
        stored = DirectoryCheckpoint(path)
        return stored if stored.raw_config.get(CONFIG_KEY) is None else QuantizedCheckpoint(stored)
    if not path.exists():
        raise ModelError(f"{path} does not exist; check the path.")
    require_gguf_file(path)
    return GgufCheckpoint(path)


def require_gguf_file(path: Path) -> None:
    """Return if the file `path` is named or begins like a GGUF file; `ModelError` with the cure if not."""
    if path.suffix == ".gguf" or is_gguf_file(path):
        return
    if path.suffix == ".safetensors":
        raise ModelError(f"{path} is one weight file; give the directory that holds it and config.json.")
    raise ModelError(f"{path} is not a GGUF file; give a .gguf file or a directory with safetensors weights.")


def is_gguf_file(path: Path) -> bool:
    """True if the file starts with the GGUF magic bytes."""
    try:
        with path.open("rb") as file:
            return file.read(len(GGUF_MAGIC)) == GGUF_MAGIC
    except OSError as error:
        raise ModelError(
            f"{path} cannot be read ({error.strerror}); check the path and permissions."
        ) from error


def read_json_object(path: Path) -> dict[str, Any]:
    """Read a JSON file whose top level is an object; `ModelError` if it is missing or damaged."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ModelError(
            f"{path} is missing; give a directory with config.json and safetensors weights, or a .gguf file."
        ) from error
    except OSError as error:
        raise ModelError(
            f"{path} cannot be read ({error.strerror}); check the file and permissions."
        ) from error
    except (ValueError, RecursionError) as error:  # bad UTF-8 and bad JSON are both ValueError
        raise ModelError(f"{path} is not valid JSON; download it again.") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path} does not hold a JSON object; download it again.")
    return value
