"""What a model is, in numbers: `ModelConfig`, rich enough that one `Decoder` serves every family.

Owns the meaning of each field and the sums that follow from them (KV bytes per token). Does not know how
a checkpoint spells them: `models/<family>.py` translates. Imports no torch, because the planning tools read
it; dtypes are names.
Invariant: a ModelConfig that exists is consistent; translation raises before building a wrong one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from gqa_serve.errors import ConfigError

RopeType = Literal["default", "linear", "dynamic", "llama3", "yarn", "longrope", "factors"]
Activation = Literal["silu", "gelu", "gelu_tanh"]
QKNorm = Literal["none", "head", "full"]


@dataclass(frozen=True)
class RopeConfig:
    """One rotary position embedding; `engine/rope.py` has the formulas.

    `rotary_dim` of the head's D dimensions are rotated, the rest pass through. `original_max_position` is the
    context length the model was trained at before its rotary embedding was stretched.
    """

    rope_type: RopeType
    theta: float
    rotary_dim: int
    factor: float = 1.0
    original_max_position: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float = 1.0
    short_factors: tuple[float, ...] = ()
    long_factors: tuple[float, ...] = ()


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """One decoder-only transformer.

    Per layer `l`: `windows[l]` is the number of tokens a query sees, itself included (None = all before it);
    `ropes[l]` its rotary embedding (None = no position encoding).

    `norm_plus_one`: the checkpoint stores norm weights minus one. `qk_norm`: RMSNorm of queries and keys
    before the rotation, per head or over the full projection. Scores are q.k * `attention_scale`, then
    `cap * tanh(scores / cap)` with `attention_soft_cap`. Logits are hidden @ lm_head * `logits_scale`, then
    soft capped likewise. Embeddings are multiplied by `embedding_scale`, attention and MLP outputs by
    `residual_scale` before they are added.

    `max_model_len` is the context length served; `context_limit` the largest it can be set to
    (`with_max_model_len`). `dtype` is the name of the checkpoint's dtype, None where it does not say.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    max_model_len: int
    context_limit: int
    windows: tuple[int | None, ...]
    ropes: tuple[RopeConfig | None, ...]
    attention_scale: float
    activation: Activation = "silu"
    norm_eps: float = 1e-6
    norm_plus_one: bool = False
    qk_norm: QKNorm = "none"
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    logits_scale: float = 1.0
    attention_soft_cap: float | None = None
    logits_soft_cap: float | None = None
    tie_embeddings: bool = False
    dtype: str | None = None
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()

    @property
    def group_size(self) -> int:
        """G: query heads that share one KV head; query head h reads KV head h // G."""
        return self.num_heads // self.num_kv_heads

    def kv_bytes_per_token(self, dtype_bytes: int) -> int:
        """KV cache bytes of one token: 2 (K and V) * layers * KV heads * head_dim * bytes per number."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * dtype_bytes

    def with_max_model_len(self, max_model_len: int) -> ModelConfig:
        """The same model served with another context length, 1 .. `context_limit` tokens, else ConfigError.

        Where the rotary embedding depends on the context length ("dynamic", "longrope"), this chooses it.
        """
        if not 1 <= max_model_len <= self.context_limit:
            raise ConfigError(
                f"max_model_len must be between 1 and {self.context_limit}, the longest context this "
                f"checkpoint describes, got {max_model_len}."
            )
        return replace(self, max_model_len=max_model_len)

    @classmethod
    def from_hf(
        cls, raw: Mapping[str, Any], generation_config: Mapping[str, Any] | None = None
    ) -> ModelConfig:
        """Translate a `config.json` (and `generation_config.json`) as plain dicts.

        The family is chosen by `architectures[0]`, or by `model_type` where a config has no architectures.
        Raises UnsupportedModelError for an architecture or option this package does not serve, ModelError for
        a field that is missing or wrong; both name the field.
        """
        from gqa_serve.engine.models import find_family

        config = find_family(raw).config_from_hf(raw)
        return config if not generation_config else _merge_eos(config, generation_config)


def _merge_eos(config: ModelConfig, generation_config: Mapping[str, Any]) -> ModelConfig:
    """Add the end-of-sequence ids of generation_config.json: chat checkpoints often name more than one."""
    from gqa_serve.engine.models.fields import Fields

    fields = Fields(generation_config, source="generation_config.json")
    bos = fields.token_ids("bos_token_id")
    eos = (*config.eos_token_ids, *fields.token_ids("eos_token_id", vocab_size=config.vocab_size))
    return replace(
        config,
        bos_token_id=config.bos_token_id if config.bos_token_id is not None or not bos else bos[0],
        eos_token_ids=tuple(dict.fromkeys(eos)),
    )
