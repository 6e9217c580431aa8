"""Tensor parallelism by arithmetic: what the ranks of a model hold, and what they tell each other.

Owns what a plan needs to know of the ranks. How a model is cut is the engine's business
(`engine/distributed/shard.py`), which cuts unevenly where it must; a step takes as long as the rank with the
most to do, so that one's config stands for all of them. Knows no processes and no torch.
"""

from __future__ import annotations

from dataclasses import replace

from gqa_serve.engine.distributed.shard import Shard
from gqa_serve.engine.model_config import ModelConfig
from gqa_serve.errors import ConfigError
from gqa_serve.workbench.hardware import Hardware

REDUCTIONS_PER_LAYER = 2  # the sums of the attention outputs and of the MLP outputs


def local_config(config: ModelConfig, ranks: int) -> ModelConfig:
    """What the busiest of `ranks` holds, as a model of its own; all else is the whole's.

    Where things do not divide evenly, it is the most that any rank has of each. Raises ConfigError for more
    ranks than query heads.
    """
    if not 1 <= ranks <= config.num_heads:
        raise ConfigError(
            f"{config.num_heads} heads cannot be divided over {ranks} ranks; use 1 to {config.num_heads}."
        )
    parts = [Shard(config, rank, ranks).local for rank in range(ranks)]
    return replace(
        config,
        num_heads=max(part.num_heads for part in parts),
        num_kv_heads=max(part.num_kv_heads for part in parts),
        intermediate_size=max(part.intermediate_size for part in parts),
        vocab_size=max(part.vocab_size for part in parts),
    )


def all_reduce_seconds(
    config: ModelConfig, num_tokens: int, ranks: int, hardware: Hardware, *, activation_bytes: int = 2
) -> float:
    """Least time that the ranks of a step over `num_tokens` tokens spend adding up their partial sums.

    Twice per layer, num_tokens * hidden_size numbers. A ring sends 2 (p - 1) / p of them over each link, and
    no algorithm sends less (Patarasuk and Yuan 2009, "Bandwidth optimal all-reduce algorithms for clusters of
    workstations"). Latencies of the links are left out, as is what the vocabulary's ranks tell each other
    about the rows that sample. `config` is the whole model's; `activation_bytes` 0 is a CPU's, float32.
    Raises ConfigError where the link is unknown.
    """
    if ranks == 1:
        return 0.0
    if hardware.link_bandwidth is None:
        raise ConfigError(
            f"How fast several {hardware.name} talk to each other is unknown; give a YAML file as --hardware "
            "that has link_bandwidth, in bytes/s that one device sends while it receives as many, or use "
            "--tensor-parallel 1."
        )
    numbers = REDUCTIONS_PER_LAYER * config.num_layers * num_tokens * config.hidden_size
    reduced = numbers * (activation_bytes or 4)
    return reduced * 2 * (ranks - 1) / ranks / hardware.link_bandwidth
