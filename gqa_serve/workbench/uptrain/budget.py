"""How many tokens to uptrain for, and what that takes: steps, memory, arithmetic.

Owns the sums. The recipe is Ainslie et al. 2023 (arXiv 2305.13245): uptrain for a share alpha = 0.05 of the
original pretraining. Where the original count of tokens is unknown it is taken as 20 per parameter, the
compute-optimal ratio of Hoffmann et al. 2022 (arXiv 2203.15556, table 3); models of today are trained on many
times that, so `--original-tokens` is the better answer wherever the model's card states it.
Imports no torch, because it answers before anything is loaded.
Invariant: counts are whole numbers, and a budget is never less than one step.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from gqa_serve.engine.model_config import ModelConfig
from gqa_serve.engine.models import family_of
from gqa_serve.engine.models.family import parameter_shapes
from gqa_serve.errors import ConfigError

ALPHA = 0.05
TOKENS_PER_PARAMETER = 20
MAX_LOGITS = 1 << 26
"""Logits that a step holds at a time: 256 MiB in float32, and as many for their gradient."""
_SUFFIXES = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "g": 10**9, "t": 10**12}


def parse_count(text: str) -> int:
    """ "1.5M" -> 1500000; k, M, B (or G), T are powers of a thousand. Raises ConfigError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?(?:e\d+)?)\s*([kmbgt]?)", text.strip().replace(",", "").lower())
    count = 0 if match is None else round(float(match[1]) * _SUFFIXES[match[2]])
    if count < 1:
        raise ConfigError(f"{text!r} is no number of tokens; write it like 500k, 20M, 1.5B or 2T.")
    return count


def write_count(count: float) -> str:
    """1500000 -> "1.5 M"."""
    for size, suffix in ((1e12, " T"), (1e9, " B"), (1e6, " M"), (1e3, " k")):
        if count >= size:
            return f"{count / size:.3g}{suffix}"
    return f"{count:.0f}"


@dataclass(frozen=True)
class Parameters:
    """How many numbers a model holds. `multiplied`: those of its matrix products, the output head included
    and an embedding that is only looked up not. `trained` of them all."""

    total: int
    multiplied: int
    trained: int

    @classmethod
    def of(cls, config: ModelConfig, trained: str) -> Parameters:
        """Counts by the config alone. `trained`: "all", "attention" or "kv"."""
        sizes: dict[str, int] = {}
        for name, shape in parameter_shapes(config, family_of(config.architecture).names).items():
            sizes[name] = math.prod(shape)
        total = sum(sizes.values())
        multiplied = total if config.tie_embeddings else total - sizes["embed.weight"]
        q_rows, kv_rows = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        parts = {name: name.split(".")[-2] for name in sizes}
        if trained == "attention":
            chosen = sum(sizes[name] for name in sizes if parts[name] in ("qkv", "o", "q_norm", "k_norm"))
        elif trained == "kv":
            qkv = sum(sizes[name] for name in sizes if parts[name] == "qkv")
            chosen = qkv * 2 * kv_rows // (q_rows + 2 * kv_rows)
        else:
            chosen = total
        return cls(total, multiplied, chosen)


@dataclass(frozen=True)
class Budget:
    """`num_tokens` to train on, and where the number comes from, as a sentence."""

    num_tokens: int
    source: str

    @classmethod
    def choose(
        cls, parameters: Parameters, *, tokens: int | None, original_tokens: int | None, alpha: float
    ) -> Budget:
        """`tokens` as given, else alpha times the original pretraining (from scratch: 1 times)."""
        if tokens is not None:
            return cls(tokens, "given by --tokens")
        if original_tokens is not None:
            count = max(1, round(alpha * original_tokens))
            return cls(count, f"{alpha:g} x {write_count(original_tokens)} tokens of original pretraining")
        count = max(1, round(alpha * TOKENS_PER_PARAMETER * parameters.total))
        return cls(
            count,
            f"{alpha:g} x {TOKENS_PER_PARAMETER} tokens x {write_count(parameters.total)} parameters: the "
            "original pretraining is not known here and assumed compute-optimal; --original-tokens says it",
        )


def training_flops_per_token(
    config: ModelConfig, parameters: Parameters, seq_len: int, *, teacher: Parameters | None = None
) -> float:
    """Operations for one token: 6 per multiplied parameter (forward 2, backward 2 for its input's gradient
    and 2 for its own; Kaplan et al. 2020, arXiv 2001.08361, section 2.1) and 3 x 4 H D per visible key and
    layer; a teacher's forward pass is 2 per parameter and 4 H D per key.

    A causal query sees (seq_len + 1) / 2 keys on average, at most its window. A parameter that is not trained
    has no gradient of its own to compute.
    """
    keys = sum(_mean_keys(seq_len, window) for window in config.windows)
    attention = 4 * config.num_heads * config.head_dim * keys
    flops = (
        4.0 * parameters.multiplied + 2.0 * min(parameters.trained, parameters.multiplied) + 3.0 * attention
    )
    return flops if teacher is None else flops + 2.0 * teacher.multiplied + attention


def _mean_keys(seq_len: int, window: int | None) -> float:
    """Keys that a query sees, on average over a text of seq_len tokens."""
    if window is None or window >= seq_len:
        return (seq_len + 1) / 2
    return (window * (window + 1) / 2 + (seq_len - window) * window) / seq_len


@dataclass(frozen=True)
class Memory:
    """Bytes of a run. `weights`: float32 masters of all parameters (and the teacher's); `gradients` and
    `optimizer` (two moments) of those trained; `activations` of one micro batch, roughly."""

    weights: int
    gradients: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.activations

    @classmethod
    def of(
        cls,
        config: ModelConfig,
        parameters: Parameters,
        *,
        micro_tokens: int,
        number_bytes: int,
        recompute: bool,
        teacher: Parameters | None = None,
    ) -> Memory:
        """`number_bytes`: of what matrix products keep, 4 or 2 (bf16).

        Kept per token and layer: two normed inputs and the residual copies (float32, 4 E in all), the inputs
        of the four products, q, k, v and the gated activation's three (in number_bytes).
        """
        heads = config.num_heads * config.head_dim
        kv = config.num_kv_heads * config.head_dim
        kept = 16 * config.hidden_size + number_bytes * (
            2 * config.hidden_size + 6 * heads + 4 * kv + 5 * config.intermediate_size
        )
        layers = 1 if recompute else config.num_layers
        streams = 8 * config.hidden_size * config.num_layers if recompute else 0
        logits = min(micro_tokens * config.vocab_size, MAX_LOGITS) * 4 * (3 if teacher is None else 6)
        weights = 4 * parameters.total + (0 if teacher is None else number_bytes * teacher.total)
        return cls(
            weights,
            4 * parameters.trained,
            8 * parameters.trained,
            micro_tokens * (kept * layers + streams) + logits,
        )
