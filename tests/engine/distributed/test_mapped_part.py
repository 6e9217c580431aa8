"""What a rank touches of the weight files: its own rows, not the whole."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import cast

import pytest
import torch
from tiny import tiny_checkpoint

from gqa_serve.engine.backends import BackendOptions, create_backend
from gqa_serve.engine.distributed.members import Members
from gqa_serve.engine.distributed.shard import Shard
from gqa_serve.engine.model_config import ModelConfig
from gqa_serve.engine.models.loader import load_model
from gqa_serve.engine.weights.checkpoint import open_checkpoint

WEIGHTS = "model.safetensors"


class Cut:
    """`Members` as far as loading needs them."""

    def __init__(self, shard: Shard) -> None:
        self.shard = shard


def mapped_bytes(file: Path) -> int:
    """Pages of `file` that this process has touched, as far as it maps them now."""
    mappings = Path("/proc/self/smaps").read_text()
    found = re.findall(rf"{re.escape(str(file))}\n(?:.*\n)*?Rss: +(\d+) kB", mappings)
    return sum(map(int, found)) * 1024


def most_mapped(path: Path, ranks: int, rank: int) -> float:
    """Of the weight file, the part that loading one rank's share of the model maps."""
    file = path.resolve() / WEIGHTS
    checkpoint = open_checkpoint(path)
    config = ModelConfig.from_hf(checkpoint.raw_config, checkpoint.generation_config)
    options = BackendOptions(backend="reference", dtype="float32", checkpoint_dtype=config.dtype)
    device = torch.device("cpu")
    seen = 0

    def look(_name: str) -> None:
        nonlocal seen
        seen = max(seen, mapped_bytes(file))

    load_model(
        checkpoint,
        config,
        device=device,
        backend=create_backend(device, options),
        on_tensor=look,
        members=cast("Members", Cut(Shard(config, rank, ranks))),
    )
    return seen / file.stat().st_size


@pytest.mark.skipif(sys.platform != "linux", reason="asks the kernel what is mapped")
def test_a_rank_touches_its_own_rows_only(tmp_path: Path) -> None:
    path = tiny_checkpoint("llama", tmp_path, vocab_size=2**17)  # nearly all of it: embedding and head
    assert (path / WEIGHTS).stat().st_size > 16 * 2**20
    assert most_mapped(path, 1, 0) > 0.95
    for rank in range(4):
        assert 0.2 < most_mapped(path, 4, rank) < 0.4  # the kernel maps a little more around what is touched
