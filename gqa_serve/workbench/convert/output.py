"""The converted checkpoint: tensors, config, tokenizer, and a note of where it came from.

Owns what stands in the new directory. Does not know how merges were found.
Invariant: one tensor is in memory at a time; every field of the config but the number of KV heads (and the
dtype, where that changes) is the original's; the directory appears when it is whole.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gqa_serve import __version__
from gqa_serve.engine.models.family import WeightSlot
from gqa_serve.engine.weights.hub import demo_defaults
from gqa_serve.engine.weights.safetensors import DirectoryCheckpoint
from gqa_serve.engine.weights.safetensors_writer import (
    MAX_SHARD_BYTES,
    CheckpointWriter,
    TensorSpec,
    new_folder,
    write_json,
    writing,
)
from gqa_serve.workbench.checkpoint_files import CONFIG, copy_small_files, set_dtype
from gqa_serve.workbench.convert.heads import LayerMerge, convert_tensor, converted_shape, is_changed
from gqa_serve.workbench.convert.source import Source, layer_of, numbers

if TYPE_CHECKING:
    import torch

NOTE_FILE = "gqa_conversion.json"


def write_checkpoint(
    source: Source,
    output: Path,
    merges: list[LayerMerge],
    note: dict[str, Any],
    *,
    dtype: str | None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    on_tensor: Callable[[int, int], None] | None = None,
) -> int:
    """Write the conversion to `output`, which appears when it is whole; returns the bytes of its weights.

    `dtype` None keeps each tensor's own (bfloat16 where the source is quantized). `on_tensor(done, total)`
    follows the writing. Raises ConfigError if it cannot be written, ModelError if the source is damaged.
    """
    num_kv_heads = len(merges[0].groups)
    layout = _layout(source, num_kv_heads, dtype)
    with new_folder(output) as folder:
        write_json(folder / CONFIG, new_config(source, num_kv_heads, dtype))
        with writing(folder):
            _write_files(source, folder)
        earlier = source.path / NOTE_FILE if source.path.is_dir() else None
        if earlier is not None and earlier.is_file():
            note = {**note, "before": json.loads(earlier.read_text(encoding="utf-8"))}
        write_json(folder / NOTE_FILE, note)
        with CheckpointWriter(folder, layout, max_shard_bytes=max_shard_bytes) as writer:
            for done, (name, tensor) in enumerate(source.checkpoint.tensors(), 1):
                writer.write(name, _converted(source.slots[name], numbers(tensor), merges, source))
                if on_tensor is not None:
                    on_tensor(done, len(layout))
    return writer.total_bytes


def new_config(source: Source, num_kv_heads: int, dtype: str | None) -> dict[str, Any]:
    """The original's config.json with another num_key_value_heads, and dtype if it is another one."""
    raw = copy.deepcopy(source.checkpoint.raw_config)
    inner = raw["text_config"] if "num_attention_heads" not in raw and "text_config" in raw else raw
    inner["num_key_value_heads"] = num_kv_heads
    dtype = dtype or (_quantized_dtype(source) if _is_quantized(source) else None)
    if dtype is not None:
        set_dtype(raw, dtype)
    return raw


def describe(source: Source, method: str, merges: list[LayerMerge], seed: int | None) -> dict[str, Any]:
    """The note: enough to know what was done and to do it again."""
    return {
        "gqa_serve_version": __version__,
        "source": source.name,
        "method": method,
        "num_attention_heads": source.config.num_heads,
        "num_key_value_heads_before": source.config.num_kv_heads,
        "num_key_value_heads": len(merges[0].groups),
        "seed": seed,
        "groups": [[list(group) for group in merge.groups] for merge in merges],
    }


def _is_quantized(source: Source) -> bool:
    """Whether some tensors are no plain numbers, so that there is no dtype to keep."""
    from gqa_serve.engine.weights.quantized_checkpoint import QuantizedCheckpoint

    if isinstance(source.checkpoint, QuantizedCheckpoint):
        return True
    return not source.path.is_dir() and source.config.dtype is None


def _quantized_dtype(source: Source) -> str:
    stored = source.config.dtype
    return stored if stored in ("float16", "bfloat16") else "bfloat16"


def _layout(source: Source, num_kv_heads: int, dtype: str | None) -> dict[str, TensorSpec]:
    """Name, dtype and shape of every tensor to be written, in the source's order."""
    stored = _stored_dtypes(source) if dtype is None else {}
    fallback = dtype or _quantized_dtype(source)
    layout = {}
    for name, shape in source.checkpoint.tensor_shapes().items():
        slot = source.slots[name]
        if slot is not None:
            shape = converted_shape(slot, source.config, num_kv_heads)
        layout[name] = TensorSpec(tuple(shape), stored.get(name, fallback))
    return layout


def _stored_dtypes(source: Source) -> dict[str, str]:
    """The dtype of each tensor by name; {} for a quantized source."""
    if _is_quantized(source):
        return {}
    if not isinstance(source.checkpoint, DirectoryCheckpoint):
        return dict.fromkeys(source.checkpoint.tensor_shapes(), source.config.dtype or "bfloat16")
    return source.checkpoint.tensor_dtypes()


def _converted(
    slot: WeightSlot | None, tensor: torch.Tensor, merges: list[LayerMerge], source: Source
) -> torch.Tensor:
    layer = None if slot is None else layer_of(slot)
    if slot is not None and layer is not None and is_changed(slot, source.config):
        return convert_tensor(slot, tensor, merges[layer], source.config)
    return tensor


def _write_files(source: Source, folder: Path) -> None:
    """Tokenizer, chat template, generation config, license: copied, or out of the GGUF file."""
    if not source.path.is_dir():
        _write_gguf_files(source, folder)
        return
    copy_small_files(source.path, folder, but=(CONFIG, NOTE_FILE))


def _write_gguf_files(source: Source, folder: Path) -> None:
    from gqa_serve.engine.chat_template_files import load_chat_template
    from gqa_serve.engine.tokenizer import load_tokenizer
    from gqa_serve.engine.weights.gguf import read_gguf_metadata

    tokenizer = load_tokenizer(source.path)
    tokenizer.save(folder / "tokenizer.json")
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": source.config.max_model_len,
        **tokenizer.special_tokens,
    }
    if read_gguf_metadata(source.path).get("tokenizer.chat_template"):
        settings["chat_template"] = load_chat_template(source.path).source
    write_json(folder / "tokenizer_config.json", settings)
    generation = dict(source.checkpoint.generation_config)
    if sampling := demo_defaults(source.name):
        generation |= {"do_sample": True, **sampling}
    if generation:
        write_json(folder / "generation_config.json", generation)
