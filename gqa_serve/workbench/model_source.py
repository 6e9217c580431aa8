"""A model's numbers without its weights: from a hub id, a directory, a GGUF file, or a config.json.

Owns how the tools that compute nothing find a `ModelConfig`, and in which format the weights are stored.
Imports no torch.
Invariant: no weight is read or downloaded; of a hub id's repository, config.json alone is.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gqa_serve.engine.model_config import ModelConfig
from gqa_serve.engine.models import family_of
from gqa_serve.engine.models.family import parameter_shapes
from gqa_serve.engine.weights.checkpoint import is_gguf_file, read_json_object
from gqa_serve.engine.weights.quantized_checkpoint import CONFIG_KEY, without_quantization
from gqa_serve.engine.weights.quantized_formats import Awq, Gptq, PackQuantized, QuantizedFormat
from gqa_serve.errors import ConfigError, ModelError
from gqa_serve.workbench.kernel_cost import BF16, FLOAT32, FP8, WeightFormat

# GGUF's blocks as the engine holds them: exactly these stay as they are, all others become 8 bits.
_BLOCKS = {
    "F32": FLOAT32,
    "F16": BF16,
    "BF16": BF16,
    "Q8_0": WeightFormat("Q8_0", 8, 32, 2),
    "Q4_0": WeightFormat("Q4_0", 4, 32, 2),
    "Q4_1": WeightFormat("Q4_1", 4, 32, 4),
}
_OTHER_BLOCKS = WeightFormat("int8", 8, 32, 2)


@dataclass(frozen=True)
class ModelSource:
    """A model as the tools see it.

    `stored_bytes`: its weights as they lie on disk, where that is known. `weights` and `head`: the formats
    that its layers and vocabulary are served in where the checkpoint is quantized; None: it is not.
    """

    name: str
    config: ModelConfig
    stored_bytes: int | None = None
    weights: WeightFormat | None = None
    head: WeightFormat | None = None

    @property
    def post_norms(self) -> bool:
        """Whether attention and MLP outputs are normed before they are added, which a ModelConfig lacks."""
        return family_of(self.config.architecture).names.post_attn_norm is not None

    @property
    def num_parameters(self) -> int:
        """All numbers of the checkpoint; a tied output head counts once."""
        return sum(math.prod(shape) for shape in _shapes(self.config).values())

    def with_kv_heads(self, num_kv_heads: int) -> ModelConfig:
        """The same model with another number of KV heads, as `convert` makes it. Raises ConfigError."""
        if num_kv_heads < 1 or self.config.num_heads % num_kv_heads:
            raise ConfigError(
                f"{num_kv_heads} KV heads do not divide the {self.config.num_heads} heads of {self.name}; "
                f"use {', '.join(map(str, group_counts(self.config)))}."
            )
        return replace(self.config, num_kv_heads=num_kv_heads)


def group_counts(config: ModelConfig) -> list[int]:
    """Every number of KV heads that divides the heads: MHA first, MQA last."""
    return [count for count in range(config.num_heads, 0, -1) if config.num_heads % count == 0]


def vector_bytes(config: ModelConfig) -> int:
    """Memory of norm weights and biases, which the engine holds in float32 on every rank."""
    return 4 * sum(shape[0] for shape in _shapes(config).values() if len(shape) == 1)


def read_model(model: str, *, revision: str | None = None, offline: bool = False) -> ModelSource:
    """What `model` says of itself: "demo", a directory, a GGUF file, a config.json, or a hub id.

    `revision` (branch, tag or commit) and `offline` are for hub ids. Raises ModelError, HubError; ConfigError
    for a revision of something else.
    """
    from gqa_serve.engine.weights.hub import download_config, find_local  # half a second: not for --help

    path = find_local(model)
    if path is None:
        path = download_config(model, revision=revision, offline=offline)
    elif revision is not None:
        raise ConfigError(f"--revision is for models on the hub; {model} is on this machine. Leave it out.")
    if path.is_file() and (path.suffix == ".gguf" or is_gguf_file(path)):
        return _read_gguf(model, path)
    if path.is_file() and path.suffix != ".json":
        raise ModelError(f"{path} is no GGUF file and no config.json; give one of these, or their folder.")
    file = path / "config.json" if path.is_dir() else path
    return _from_config(model, read_json_object(file), file)


def _from_config(model: str, raw: Mapping[str, Any], file: Path) -> ModelSource:
    plain, stored = without_quantization(raw, file)
    config = ModelConfig.from_hf(plain)
    if stored is None:
        return ModelSource(model, config)
    return ModelSource(model, config, weights=_stored_format(stored, raw[CONFIG_KEY]), head=BF16)


def _stored_format(stored: QuantizedFormat, quantized: Mapping[str, Any]) -> WeightFormat:
    """Of the linear layers; a group has a scale of 2 bytes, and as much for its zero point if it has one."""
    if isinstance(stored, Awq):
        return WeightFormat("awq int4", 4, stored.group, 4)
    if isinstance(stored, Gptq):
        return WeightFormat(f"gptq int{stored.bits}", stored.bits, stored.group, 4)
    if isinstance(stored, PackQuantized):
        return WeightFormat(f"int{stored.bits}", stored.bits, stored.group, 2)
    return FP8 if quantized.get("format") != "int-quantized" else WeightFormat("int8", 8, 0, 4)


def _read_gguf(model: str, path: Path) -> ModelSource:
    from gqa_serve.engine.weights.gguf import GgufCheckpoint

    checkpoint = GgufCheckpoint(path)
    config = ModelConfig.from_hf(checkpoint.raw_config)
    types, shapes = checkpoint.matrix_types(), checkpoint.tensor_shapes()
    counts: tuple[Counter[str], Counter[str]] = (Counter(), Counter())  # of layers, of the vocabulary
    for name, type_ in types.items():
        counts[".layers." not in name][type_] += math.prod(shapes[name])
    layers, head = (_BLOCKS.get(count.most_common(1)[0][0], _OTHER_BLOCKS) for count in counts)
    if config.dtype is not None:  # all matrices in one plain type
        return ModelSource(model, config, checkpoint.weight_bytes)
    return ModelSource(model, config, checkpoint.weight_bytes, layers, head)


def _shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    return parameter_shapes(config, family_of(config.architecture).names)
