"""Rotary position embeddings: from a `RopeConfig` to inverse frequencies, and from positions to angles.

Owns the formulas of every scaling type. Does not know how configs spell them (`models/rope_fields.py`) or how
heads are rotated (the backend).
Invariant: the embedding of a position depends on the model and its `max_model_len` only, never on how long a
request is now, how its prompt was chunked, or what else is in the batch. Keys are rotated once, when they
are written to the cache, and stay right for as long as they are there.

That invariant decides the two scaling types which transformers recomputes from the length of each forward:

* "dynamic" (NTK-aware): transformers derives the base from the current length once it exceeds the trained
  one, while keys already cached keep an older base. Here the base is the one transformers uses for a one-shot
  forward of `max_model_len` tokens; with `max_model_len` at the trained length (the default) nothing changes.
* "longrope": transformers uses the long factors in forwards longer than the trained length. Here they are
  used if `max_model_len` is longer than the trained length, for every position of every request.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from gqa_serve.engine.model_config import RopeConfig


@dataclass(frozen=True)
class Rotary:
    """inv_freq: [rotary_dim / 2] float32, radians per position. Cosines, sines are multiplied by `scale`."""

    inv_freq: torch.Tensor
    scale: float

    @classmethod
    def build(cls, rope: RopeConfig, max_model_len: int, device: torch.device) -> Rotary:
        inv_freq = _FORMULAS[rope.rope_type](rope, max_model_len).to(device)
        scale = rope.attention_factor if rope.rope_type in ("yarn", "longrope") else 1.0
        return cls(inv_freq, scale)

    def angles(self, positions: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """positions [T] -> (cos, sin), each [T, 1, rotary_dim]; computed in float32, returned in `dtype`.

        The sine of the first half is negated, so that with the halves of x swapped the rotation is
        `x * cos + swapped * sin`.
        """
        freqs = positions[:, None].float() * self.inv_freq  # [T, rotary_dim / 2]
        cos, sin = freqs.cos(), freqs.sin()
        cos = torch.cat((cos, cos), dim=-1)
        sin = torch.cat((-sin, sin), dim=-1)
        if self.scale != 1.0:
            cos, sin = cos * self.scale, sin * self.scale
        return cos.to(dtype)[:, None], sin.to(dtype)[:, None]  # [T, 1, rotary_dim]


def _wavelengths(rope: RopeConfig, theta: float) -> torch.Tensor:
    """theta^(2i/d) for i < d/2: the inverse of the frequencies of Su et al. 2021 (arXiv 2104.09864)."""
    exponents = torch.arange(0, rope.rotary_dim, 2, dtype=torch.float32) / rope.rotary_dim
    return theta**exponents


def _default(rope: RopeConfig, max_model_len: int) -> torch.Tensor:
    del max_model_len
    return 1.0 / _wavelengths(rope, rope.theta)


def _linear(rope: RopeConfig, max_model_len: int) -> torch.Tensor:
    """Position interpolation, Chen et al. 2023 (arXiv 2306.15595)."""
    return _default(rope, max_model_len) / rope.factor


def _dynamic(rope: RopeConfig, max_model_len: int) -> torch.Tensor:
    """NTK-aware scaling for a context of `max_model_len` (see the module's docstring)."""
    length = max(max_model_len, rope.original_max_position)
    stretch = rope.factor * length / rope.original_max_position - (rope.factor - 1)
    return 1.0 / _wavelengths(rope, rope.theta * stretch ** (rope.rotary_dim / (rope.rotary_dim - 2)))


def _llama3(rope: RopeConfig, max_model_len: int) -> torch.Tensor:
    """Llama 3.1: long wavelengths are divided by the factor, short ones kept, those between interpolated."""
    inv_freq = _default(rope, max_model_len)
    turns = rope.original_max_position * inv_freq / (2 * math.pi)  # rotations within the trained context
    smooth = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    smooth = smooth.clamp(0, 1)
    return (1 - smooth) * inv_freq / rope.factor + smooth * inv_freq


def _yarn(rope: RopeConfig, max_model_len: int) -> torch.Tensor:
    """YaRN, Peng et al. 2023 (arXiv 2309.00071), section 3.2: interpolate by parts."""
    inv_freq = _default(rope, max_model_len)
    dim = rope.rotary_dim

    def dimension(rotations: float) -> float:
        """The dimension that turns `rotations` times within the trained context."""
        return (
            dim
            * math.log(rope.original_max_position / (rotations * 2 * math.pi))
            / (2 * math.log(rope.theta))
        )

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001
    ramp = ((torch.arange(dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    return inv_freq / rope.factor * ramp + inv_freq * (1 - ramp)


def _longrope(rope: RopeConfig, max_model_len: int) -> torch.Tensor:
    """LongRoPE, Ding et al. 2024 (arXiv 2402.13753): a searched factor per frequency."""
    factors = rope.long_factors if max_model_len > rope.original_max_position else rope.short_factors
    return 1.0 / (torch.tensor(factors, dtype=torch.float32) * _wavelengths(rope, rope.theta))


def _factors(rope: RopeConfig, max_model_len: int) -> torch.Tensor:
    """GGUF's `rope_freqs` tensor: a divisor per frequency."""
    return _default(rope, max_model_len) / torch.tensor(rope.short_factors, dtype=torch.float32)


_FORMULAS = {
    "default": _default,
    "linear": _linear,
    "dynamic": _dynamic,
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": _longrope,
    "factors": _factors,
}
