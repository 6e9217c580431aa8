"""One line of the plan: a number of KV heads, a KV dtype, a number of ranks and a context length, answered.

Owns what is computed for each; `decode_cost.py` and `capacity.py` own how. Knows no output.
Invariant: bytes are of all ranks together unless a name ends in `_per_rank`; times are least times.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from gqa_serve.engine.model_config import ModelConfig
from gqa_serve.workbench.hardware import Hardware
from gqa_serve.workbench.kernel_cost import Formats
from gqa_serve.workbench.model_source import ModelSource
from gqa_serve.workbench.plan.capacity import Capacity, MemorySettings, capacity
from gqa_serve.workbench.plan.decode_cost import LINEAR, DecodeCost
from gqa_serve.workbench.sharding import all_reduce_seconds, local_config
from gqa_serve.workbench.step_cost import kv_bytes, step


@dataclass(frozen=True)
class Case:
    """What is asked beside the number of KV heads."""

    kv_dtype: str
    ranks: int
    context_len: int


@dataclass(frozen=True)
class Answer:
    """A model with `config`'s KV heads, served in one case."""

    source: ModelSource
    config: ModelConfig
    case: Case
    formats: Formats
    hardware: Hardware
    settings: MemorySettings

    @property
    def kind(self) -> str:
        """MHA, GQA or MQA."""
        if self.config.num_kv_heads == self.config.num_heads:
            return "MHA"
        return "MQA" if self.config.num_kv_heads == 1 else "GQA"

    @property
    def label(self) -> str:
        """ "8 GQA" """
        return f"{self.config.num_kv_heads} {self.kind}"

    @property
    def is_as_it_is(self) -> bool:
        return self.config.num_kv_heads == self.source.config.num_kv_heads

    @cached_property
    def decode(self) -> DecodeCost:
        return DecodeCost(
            self.config,
            self.case.context_len,
            self.formats,
            self.hardware,
            self.case.ranks,
            self.source.post_norms,
        )

    @cached_property
    def memory(self) -> Capacity:
        return capacity(self.config, self.case.ranks, self.formats, self.hardware, self.settings)

    @property
    def kv_bytes_per_token(self) -> int:
        """What the cache stores, over all ranks: with more ranks than KV heads, copies too."""
        return kv_bytes(local_config(self.config, self.case.ranks), 1, self.formats) * self.case.ranks

    @property
    def max_requests(self) -> int:
        """Requests of the context length that fit at once."""
        return self.memory.max_requests(self.case.context_len)

    @property
    def kv_outweighs_weights_from(self) -> int:
        """The batch from which a step reads more K and V than weights."""
        return -(-self.decode.read_weight_bytes // self.decode.read_bytes_per_request)

    def tokens_per_second(self, batch: int) -> float:
        """Output tokens of all requests, no step slower than it must be."""
        return batch / self.decode.seconds(batch)

    def cost_per_million(self, price: float, batch: int) -> float:
        """Of a million output tokens, where a device costs `price` per hour; in the price's currency."""
        return price * self.case.ranks / 3600 / self.tokens_per_second(batch) * 1e6

    def prompt_seconds(self, prompt_len: int) -> float:
        """Least time from the start of a prompt's computation to its first token, with nothing else running.

        The prompt is computed in chunks of `max_num_batched_tokens`, as the scheduler cuts it.
        """
        local = local_config(self.config, self.case.ranks)
        chunk = self.settings.max_num_batched_tokens
        seconds = 0.0
        for start in range(0, prompt_len, chunk):
            end = min(start + chunk, prompt_len)
            cost = step(
                local,
                [(end - start, end)],
                self.formats,
                post_norms=self.source.post_norms,
                num_sampled=int(end == prompt_len),
            )
            seconds += cost.least_seconds(self.hardware) + all_reduce_seconds(
                self.config,
                end - start,
                self.case.ranks,
                self.hardware,
                activation_bytes=self.formats.activation_bytes,
            )
        return seconds

    def numbers(self, prompt_len: int, price: float | None) -> dict[str, Any]:
        """Everything, for tables and JSON; None where nothing fits."""
        decode, memory, case = self.decode, self.memory, self.case
        ranks, most = case.ranks, self.max_requests
        full = most if most else None
        return {
            "num_kv_heads": self.config.num_kv_heads,
            "group_size": self.config.group_size,
            "kind": self.kind,
            "as_it_is": self.is_as_it_is,
            **asdict(case),
            "weight_format": self.formats.weights.name,
            "kv_bytes_per_token": self.kv_bytes_per_token,
            "kv_bytes_per_request": -(-case.context_len // memory.block_size) * memory.block_bytes * ranks,
            "weight_bytes": memory.weight_bytes * ranks,
            "weight_bytes_per_rank": memory.weight_bytes,
            "activation_bytes_per_rank": memory.activation_bytes,
            "kv_budget_bytes_per_rank": max(0, memory.kv_budget_bytes),
            "missing_bytes_per_rank": max(0, memory.block_bytes - memory.kv_budget_bytes),
            "max_tokens": memory.max_tokens,
            "max_requests": most,
            "weight_bytes_per_step": decode.read_weight_bytes * ranks,
            "kv_read_bytes_per_request_and_step": decode.read_bytes_per_request * ranks,
            "kv_read_bytes_per_step_full": None
            if full is None
            else decode.read_bytes_per_request * ranks * full,
            "step_s_one": decode.seconds(1),
            "step_s_full": None if full is None else decode.seconds(full),
            "tokens_per_s_one": self.tokens_per_second(1),
            "tokens_per_s_full": None if full is None else self.tokens_per_second(full),
            "attention_share_full": None if full is None else self._attention_share(full),
            "kv_outweighs_weights_from": self.kv_outweighs_weights_from,
            "linear_compute_bound_from": decode.compute_bound_from(LINEAR),
            "attention_compute_bound": decode.compute_bound_from(decode.attention) is not None,
            "attention_flops_per_byte": decode.intensity(decode.attention, 1),
            "step_compute_bound_from": decode.compute_bound_from(),
            "prompt_len": prompt_len,
            "prompt_s": self.prompt_seconds(prompt_len),
            "cost_per_million_full": None
            if price is None or full is None
            else self.cost_per_million(price, full),
        }

    def _attention_share(self, batch: int) -> float:
        """Of the step's time."""
        spent = sum(self.decode.part_seconds(name, batch) for name in self.decode.attention)
        return spent / self.decode.seconds(batch)


def batch_ladder(most: int) -> list[int]:
    """1, 2, 4, ... up to `most`, and `most` itself."""
    ladder = []
    batch = 1
    while batch < most:
        ladder.append(batch)
        batch *= 2
    return [*ladder, max(1, most)]


def smallest_ranks(answers: Sequence[Answer]) -> int:
    """The number of ranks of the first answer in which a request fits; the last one's if none does."""
    return next((answer for answer in answers if answer.max_requests), answers[-1]).case.ranks
