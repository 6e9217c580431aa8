"""What fits into a device's memory beside the weights: KV blocks, tokens, requests.

Owns the account that `ModelRunner` makes by measuring, here by arithmetic with the same shares
(`engine/memory.py`). The server's cache holds every token of a request in every layer until the request ends,
those outside a layer's window too; only reading knows windows. Imports no torch.
Invariant: counts are of one rank, and all ranks are equal.
"""

from __future__ import annotations

from dataclasses import dataclass

from gqa_serve.engine.memory import cpu_kv_budget, gpu_kv_budget
from gqa_serve.engine.model_config import ModelConfig
from gqa_serve.workbench.hardware import Hardware
from gqa_serve.workbench.kernel_cost import Formats
from gqa_serve.workbench.model_source import vector_bytes
from gqa_serve.workbench.sharding import local_config
from gqa_serve.workbench.step_cost import kv_bytes, weight_bytes

GPU_RESERVE = 2**29
"""What a GPU's context, libraries and captured graphs take: about this much, which only the server knows."""


@dataclass(frozen=True, kw_only=True)
class MemorySettings:
    """As the server's flags of these names; `reserve`: bytes of a GPU that are neither weights nor cache."""

    utilization: float = 0.9
    kv_cache_memory: int | None = None
    block_size: int = 16
    max_num_batched_tokens: int = 2048
    max_num_seqs: int = 128
    reserve: int = GPU_RESERVE


@dataclass(frozen=True)
class Capacity:
    """One rank's memory in bytes. A negative `kv_budget_bytes` is what is missing for the weights."""

    weight_bytes: int
    activation_bytes: int
    kv_budget_bytes: int
    block_bytes: int
    block_size: int

    @property
    def num_blocks(self) -> int:
        return max(0, self.kv_budget_bytes // self.block_bytes)

    @property
    def max_tokens(self) -> int:
        """Tokens of all requests together."""
        return self.num_blocks * self.block_size

    def max_requests(self, context_len: int) -> int:
        """Requests of `context_len` tokens that fit together, each in whole blocks."""
        return self.num_blocks // -(-context_len // self.block_size)


def held_weight_bytes(config: ModelConfig, ranks: int, formats: Formats) -> int:
    """Memory of one rank's weights: its part of the matrices; norms and biases in float32."""
    local = local_config(config, ranks)
    return weight_bytes(local, formats) + vector_bytes(local)


def activation_bytes(local: ModelConfig, hardware: Hardware, settings: MemorySettings) -> int:
    """What the largest step holds at its widest point: the residual stream and its norm, and the MLP's gate,
    up and product; then the logits of all rows, in the activations' format and in float32."""
    size = 4 if hardware.is_cpu else 2
    widest = 2 * local.hidden_size + 3 * local.intermediate_size
    numbers = settings.max_num_batched_tokens * widest + settings.max_num_seqs * local.vocab_size
    return numbers * size + settings.max_num_seqs * local.vocab_size * 4


def capacity(
    config: ModelConfig, ranks: int, formats: Formats, hardware: Hardware, settings: MemorySettings
) -> Capacity:
    """What one of `ranks` devices holds. `config` is the whole model's."""
    local = local_config(config, ranks)
    weights = held_weight_bytes(config, ranks, formats)
    activations = activation_bytes(local, hardware, settings)
    block = kv_bytes(local, formats.block_size, formats)
    total = int(hardware.memory_bytes)
    if settings.kv_cache_memory is not None:
        room = total - weights - activations - (0 if hardware.is_cpu else settings.reserve)
        budget = min(settings.kv_cache_memory, room)
    elif hardware.is_cpu:
        budget = cpu_kv_budget(total - weights, -(-config.max_model_len // formats.block_size) * block)
    else:
        in_use = weights + settings.reserve
        share = gpu_kv_budget(total, in_use, settings.utilization)
        budget = min(share, total - in_use - activations)  # a step's activations are in what the share leaves
    return Capacity(weights, activations, budget, block, formats.block_size)
