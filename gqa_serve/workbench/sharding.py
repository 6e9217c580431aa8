"""Tensor parallelism by arithmetic: what one of several ranks holds, and what the ranks tell each other.

Owns how a model is cut: attention by heads, the MLP by its inner width, the vocabulary by its entries, as in
Megatron-LM (Shoeybi et al. 2019, https://arxiv.org/abs/1909.08053). A KV head serves whole groups of query
heads, so with fewer KV heads than ranks each rank holds a copy of the one that its query heads read. Knows no
processes and no torch: all ranks are equal, so one rank's config stands for each of them.
Invariant: the ranks together hold every head exactly once, KV heads ranks/num_kv_heads times where that is
more than one.
"""

from __future__ import annotations

from dataclasses import replace

from gqa_serve.engine.model_config import ModelConfig
from gqa_serve.errors import ConfigError
from gqa_serve.workbench.hardware import Hardware

REDUCTIONS_PER_LAYER = 2  # the sums of the attention outputs and of the MLP outputs


def local_config(config: ModelConfig, ranks: int) -> ModelConfig:
    """What one of `ranks` holds, as a model of its own; hidden size, layers and windows are the whole's.

    The vocabulary's rows may be cut anywhere; the config is of a rank with the most. Raises ConfigError where
    heads, KV heads or the MLP's inner width cannot be divided evenly.
    """
    if ranks < 1:
        raise ConfigError(f"There must be 1 rank or more, got {ranks}.")
    if problem := _indivisible(config, ranks):
        allowed = [count for count in range(1, config.num_heads + 1) if not _indivisible(config, count)]
        raise ConfigError(
            f"{problem} cannot be divided over {ranks} ranks; use {' or '.join(map(str, allowed))}."
        )
    return replace(
        config,
        num_heads=config.num_heads // ranks,
        num_kv_heads=max(1, config.num_kv_heads // ranks),
        intermediate_size=config.intermediate_size // ranks,
        vocab_size=-(-config.vocab_size // ranks),
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


def _indivisible(config: ModelConfig, ranks: int) -> str | None:
    """What keeps the model from being cut into so many parts; None if nothing does."""
    kv = config.num_kv_heads
    if config.num_heads % ranks:
        return f"{config.num_heads} heads"
    if kv % ranks and ranks % kv:
        return f"{kv} KV heads"
    if config.intermediate_size % ranks:
        return f"The MLP's inner width of {config.intermediate_size}"
    return None
