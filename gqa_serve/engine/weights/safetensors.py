"""A Hugging Face model directory: config.json plus safetensors weights, single or sharded.

Owns which weight files belong to the model and the check that they are whole. Tensors are streamed
from a memory mapping, so peak memory is what the consumer copies. Does not know any model family.
Invariant: nothing is ever unpickled; the index and the shards must agree before a tensor is handed out.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from gqa_serve.engine.weights.checkpoint import Checkpoint, read_json_object
from gqa_serve.errors import ModelError, UnsupportedModelError

if TYPE_CHECKING:
    import torch

    from gqa_serve.engine.weights.quantized_matrix import QuantizedMatrix

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
PICKLE_SUFFIXES = frozenset({".bin", ".pt", ".pth", ".ckpt", ".pkl"})
TORCH_DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
}
FLOAT_DTYPES = frozenset({"F64", "F32", "F16", "BF16"})


class DirectoryCheckpoint(Checkpoint):
    """A directory in the layout `transformers` writes."""

    def __init__(self, directory: Path) -> None:
        """Read configs and the headers of all weight files; raises `ModelError`."""
        self.path = directory
        self._shards = find_weight_files(directory)
        self.raw_config = read_json_object(directory / "config.json")
        generation = directory / "generation_config.json"
        self.generation_config: dict[str, Any] = read_json_object(generation) if generation.exists() else {}
        self.num_tensors = 0
        self.weight_bytes = 0
        self._shapes: dict[str, tuple[int, ...]] = {}
        quantized = self.raw_config.get("quantization_config") is not None  # then its format checks the types
        for file, names in self._shards.items():
            shapes = _check_shard(file, names, any_type=quantized)
            self._shards[file] = list(shapes)
            self._shapes |= shapes
            self.num_tensors += len(shapes)
            self.weight_bytes += _data_bytes(file)

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        return self._shapes

    def tensor_dtypes(self) -> dict[str, str]:
        """torch's name of the dtype of every tensor; the format's own name for one that torch lacks."""
        return {
            name: TORCH_DTYPES.get(kind, kind)
            for file, names in self._shards.items()
            for name, kind in _stored_types(file, names or []).items()
        }

    def tensors(
        self, names: Collection[str] | None = None
    ) -> Iterator[tuple[str, torch.Tensor | QuantizedMatrix]]:
        """As `Checkpoint.tensors`, of all or of those in `names`; files without any stay closed."""
        for file, held in self._shards.items():
            wanted = [name for name in held or [] if names is None or name in names]
            if not wanted:
                continue
            try:
                with safe_open(file, framework="pt") as shard:
                    for name in wanted:
                        yield name, shard.get_tensor(name)
            except (SafetensorError, OSError) as error:
                raise _damaged(file, error) from error


def find_weight_files(directory: Path) -> dict[Path, list[str] | None]:
    """Map each weight file to the tensors the index expects of it (None: all it holds).

    `model.safetensors` wins over an index, as in `transformers`; anything else in the directory
    (`consolidated.safetensors`, `original/`, adapters) is not part of the model. Raises `ModelError`.
    """
    single, index = directory / SINGLE_FILE, directory / INDEX_FILE
    if single.exists():
        return {single: None}
    if index.exists():
        shards: dict[Path, list[str] | None] = {}
        for file_name, names in read_weight_index(index).items():
            shards[directory / file_name] = names
        for file in shards:
            if not file.exists():
                raise ModelError(f"{file} is missing though {INDEX_FILE} lists it; download the model again.")
        return shards
    raise _no_weights(directory)


def read_weight_index(index: Path) -> dict[str, list[str]]:
    """Read `model.safetensors.index.json`: file name -> tensor names. Raises `ModelError`."""
    weight_map = read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelError(f"{index} has no weight_map; download it again.")
    files: dict[str, list[str]] = {}
    for tensor, file_name in weight_map.items():
        # A plain name only: an index must not reach outside its own directory.
        if not isinstance(file_name, str) or Path(file_name).name != file_name or "\\" in file_name:
            raise ModelError(
                f"{index} maps {tensor} to {file_name!r}, not to a file beside it; download it again."
            )
        if Path(file_name).suffix != ".safetensors":
            raise ModelError(
                f"{index} maps {tensor} to {file_name}, which is not safetensors; convert the model."
            )
        files.setdefault(file_name, []).append(tensor)
    return files


def _check_shard(file: Path, expected: list[str] | None, *, any_type: bool) -> dict[str, tuple[int, ...]]:
    """Validate one file's header; the shapes of the `expected` tensors, or of all it holds."""
    shapes = {}
    try:
        with safe_open(file, framework="pt") as shard:
            names = list(shard.keys())
            present = set(names)
            for name in expected or []:
                if name not in present:
                    raise ModelError(
                        f"{file} lacks {name}, which {INDEX_FILE} says it holds; download it again."
                    )
            for name in names if expected is None else expected:
                view = shard.get_slice(name)
                shapes[name] = tuple(view.get_shape())
                dtype = view.get_dtype()
                if not any_type and dtype not in FLOAT_DTYPES and name.endswith((".weight", ".bias")):
                    raise UnsupportedModelError(
                        f"{file} stores {name} as {dtype}, and config.json does not say how it was "
                        "quantized; use the original bf16/fp16 model or a GGUF file."
                    )
    except (SafetensorError, OSError) as error:
        raise _damaged(file, error) from error
    if not names:
        raise ModelError(f"{file} holds no tensors; download it again.")
    return shapes


def _stored_types(file: Path, names: list[str]) -> dict[str, str]:
    """The format's name of each tensor's dtype."""
    try:
        with safe_open(file, framework="pt") as shard:
            return {name: shard.get_slice(name).get_dtype() for name in names}
    except (SafetensorError, OSError) as error:
        raise _damaged(file, error) from error


def _data_bytes(file: Path) -> int:
    """Bytes of tensor data: the format allows no holes, so it is the file less its header."""
    with file.open("rb") as stream:
        header_bytes = int.from_bytes(stream.read(8), "little")
    return file.stat().st_size - 8 - header_bytes


def _damaged(file: Path, error: Exception) -> ModelError:
    if isinstance(error, OSError) and error.strerror:
        return ModelError(f"{file} cannot be read ({error.strerror}); check the file and permissions.")
    return ModelError(f"{file} is damaged or incomplete ({error}); delete it and download it again.")


def _no_weights(directory: Path) -> ModelError:
    """Say what the directory holds instead of the weights we want, and what to do about it."""
    try:
        files = sorted(path for path in directory.iterdir() if path.is_file())
    except OSError as error:
        return ModelError(f"{directory} cannot be read ({error.strerror}); check the path and permissions.")
    gguf = [file for file in files if file.suffix == ".gguf"]
    if gguf:
        which = "pass that file" if len(gguf) == 1 else "pass one of them, of a split one the first"
        return ModelError(f"{directory} holds GGUF weights; {which}: --model {gguf[0]}")
    return ModelError(describe_missing_weights(str(directory), [file.name for file in files]))


def describe_missing_weights(where: str, names: list[str]) -> str:
    """One sentence for a model that has no servable safetensors among its top-level file `names`."""
    suffixes = {Path(name).suffix for name in names}
    if "adapter_config.json" in names:
        return f"{where} holds an adapter, not a model; merge it into its base model and serve the result."
    if ".gguf" in suffixes:
        first = next(name for name in names if name.endswith(".gguf"))
        return f"{where} holds GGUF weights; download one of the files and give its path, such as {first}."
    if ".safetensors" in suffixes:
        return (
            f"{where} has safetensors files but neither {SINGLE_FILE} nor {INDEX_FILE}; "
            "use the repository in transformers' layout."
        )
    if suffixes & PICKLE_SUFFIXES:
        return (
            f"{where} has only pickled weights, which are never loaded because they can run code; "
            "convert them to safetensors (transformers: model.save_pretrained)."
        )
    return f"{where} has no weights; give a directory with {SINGLE_FILE}, or a .gguf file."
