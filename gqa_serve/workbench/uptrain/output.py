"""The trained model as an ordinary checkpoint folder, which gqa-serve and transformers load.

Owns which files it has. Invariant: config.json comes last, so that a folder which can be loaded is whole.
"""

from __future__ import annotations

import copy
import itertools
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from gqa_serve.engine.models import family_of
from gqa_serve.engine.weights.safetensors_writer import TensorSpec, write_json, write_tensors, writing
from gqa_serve.workbench.checkpoint_files import CONFIG, copy_small_files, set_dtype

if TYPE_CHECKING:
    from gqa_serve.engine.weights.safetensors import DirectoryCheckpoint
    from gqa_serve.workbench.uptrain.model import TrainableModel

_FLOATS = ("float32", "bfloat16", "float16")


def layout_of(model: TrainableModel, source: DirectoryCheckpoint, dtype: str) -> dict[str, TensorSpec]:
    """The result's tensors: those of `model`, and those of `source` that are not the text decoder's.

    `dtype` of floating-point numbers; "auto": each as stored. Raises ConfigError if one can't be written.
    A tied output head that was stored twice is left out: it would be the embedding before training.
    """
    stored = source.tensor_dtypes()
    shapes = {name: shape for name, shape, _ in model.layout()}
    heads = family_of(model.config.architecture).heads
    shapes |= {n: s for n, s in source.tensor_shapes().items() if n not in shapes and n not in heads}
    return {
        name: TensorSpec(shape, stored[name] if dtype == "auto" or stored[name] not in _FLOATS else dtype)
        for name, shape in shapes.items()
    }


def write_checkpoint(target: Path, model: TrainableModel, source: DirectoryCheckpoint, dtype: str) -> None:
    """Weights, config.json (in `dtype` unless "auto") and the other files of `source` into `target`.

    Raises ConfigError if the disk refuses.
    """
    layout = layout_of(model, source, dtype)
    trained = {name for name, _, _ in model.layout()}
    others = source.tensors([name for name in layout if name not in trained])
    kept = ((name, tensor) for name, tensor in others if isinstance(tensor, torch.Tensor))
    config = copy.deepcopy(source.raw_config)
    if dtype != "auto":
        set_dtype(config, dtype)
    partial = target / "uptrain" / "result"
    with writing(target):
        (target / CONFIG).unlink(missing_ok=True)
        for stale in target.glob("model*.safetensors*"):  # of a run before a restart, perhaps in other shards
            stale.unlink()
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        write_tensors(partial, layout, itertools.chain(model.tensors(), kept))
        copy_small_files(source.path, partial)
        for entry in sorted(partial.iterdir()):
            if entry.is_dir():  # more chat templates
                shutil.copytree(entry, target / entry.name, dirs_exist_ok=True)
            else:
                os.replace(entry, target / entry.name)
        shutil.rmtree(partial)
    write_json(target / CONFIG, config)
