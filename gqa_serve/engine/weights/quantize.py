"""Weights to fewer bits while they load: int8, int4 and float8, in plain torch on any device.

Owns how scales are chosen; they are those of the native CPU backend (`kernels/cpu/pack.cpp`), so that
--quantization means the same on every device. Does not know layouts.
Invariant: what comes out depends on the row alone; numbers that are not finite raise ValueError.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from gqa_serve.engine.weights.quantized_matrix import GroupedTensor

_FP8_MAX = 448.0
_AT_ONCE = 1 << 24  # weights; a search needs some copies of them in float32
_TINY = 1e-30  # far below the smallest half


def quantize_int8(weight: torch.Tensor, group: int) -> GroupedTensor:
    """[n, k] -> symmetric codes with a float16 scale per group: amax / 127."""
    codes, scales = [], []
    for rows in _chunks(weight):
        groups = _in_groups(rows, group)  # [m, groups, group]
        peak = groups.abs().amax(dim=-1, keepdim=True)
        scale = (peak / 127.0).half()
        # The next half up where the nearest one, subnormal, is so much too small that it clips the weights.
        small = scale.float() * 127.4 < peak
        scale = torch.where(small, (scale.view(torch.int16) + 1).view(torch.float16), scale)
        rounded = (groups * _inverse(scale.float())).round_().clamp_(-127.0, 127.0)
        codes.append((rounded + 128.0).to(torch.uint8).flatten(1)[:, : rows.shape[1]])
        scales.append(_finite(scale[..., 0]))
    return GroupedTensor(8, group, torch.cat(codes), torch.cat(scales))


def quantize_int4(weight: torch.Tensor, group: int) -> GroupedTensor:
    """[n, k] -> codes 0 .. 15 with a float16 scale and minimum per group, of least squared error."""
    codes, scales, minima = [], [], []
    for rows in _chunks(weight):
        groups = _in_groups(rows, group)
        scale, minimum = (values.half() for values in _spread(groups))
        rounded = ((groups - minimum.float()) * _inverse(scale.float())).round_().clamp_(0.0, 15.0)
        codes.append(rounded.to(torch.uint8).flatten(1)[:, : rows.shape[1]])
        scales.append(_finite(scale[..., 0]))
        minima.append(_finite(minimum[..., 0]))
    return GroupedTensor(4, group, torch.cat(codes), torch.cat(scales), None, torch.cat(minima))


def quantize_fp8(weight: torch.Tensor) -> GroupedTensor:
    """[n, k] -> float8_e4m3fn with a float32 scale per row: amax / 448."""
    codes, scales = [], []
    for rows in _chunks(weight):
        scale = rows.abs().amax(dim=1, keepdim=True) / _FP8_MAX
        codes.append((rows * _inverse(scale)).clamp_(-_FP8_MAX, _FP8_MAX).to(torch.float8_e4m3fn))
        scales.append(scale)
    return GroupedTensor(8, weight.shape[1], torch.cat(codes), torch.cat(scales))


def _spread(groups: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and minimum [m, groups, 1] of weights spread over 0 .. reach, for some reaches around 15.

    Each reach gives codes, and they a scale and a minimum by least squares. Squares are of weights divided by
    the largest, so that they neither overflow nor vanish.
    """
    peak = groups.abs().amax(dim=-1, keepdim=True)
    x = groups * _inverse(peak)
    low, high = x.amin(dim=-1, keepdim=True), x.amax(dim=-1, keepdim=True)
    sum_x, count = x.sum(dim=-1, keepdim=True), groups.shape[-1]
    scale, minimum = torch.zeros_like(low), low.clone()
    best = torch.full_like(low, -torch.inf)
    for candidate in range(9):
        reach = (14.1 + 0.3 * candidate) * _inverse(high - low)
        q = ((x - low) * reach).round_().clamp_(0.0, 15.0)
        sum_q, sum_qq = q.sum(dim=-1, keepdim=True), (q * q).sum(dim=-1, keepdim=True)
        sum_xq = (x * q).sum(dim=-1, keepdim=True)
        determinant = count * sum_qq - sum_q * sum_q
        s = (count * sum_xq - sum_x * sum_q) / determinant
        m = (sum_x - s * sum_q) / count
        gain = s * sum_xq + m * sum_x  # the error is the sum of squares less this
        better = (determinant > 0) & (gain > best)
        best = torch.where(better, gain, best)
        scale, minimum = torch.where(better, s, scale), torch.where(better, m, minimum)
    vanishing = peak < _TINY
    return scale.mul_(peak).masked_fill_(vanishing, 0.0), minimum.mul_(peak).masked_fill_(vanishing, 0.0)


def _chunks(weight: torch.Tensor) -> Iterator[torch.Tensor]:
    """Some rows after the other, in float32."""
    count = max(1, _AT_ONCE // max(1, weight.shape[1]))
    for first in range(0, weight.shape[0], count):
        yield _finite(weight[first : first + count].float())


def _in_groups(rows: torch.Tensor, group: int) -> torch.Tensor:
    """[m, k] -> [m, groups, group], the last group filled with copies of its last weight."""
    missing = -rows.shape[1] % group
    padded = F.pad(rows[None], (0, missing), mode="replicate")[0] if missing else rows
    return padded.reshape(rows.shape[0], -1, group)


def _inverse(x: torch.Tensor) -> torch.Tensor:
    """1 / x, and 0 for 0."""
    return torch.where(x == 0, 0.0, 1.0 / x)


def _finite(x: torch.Tensor) -> torch.Tensor:
    if not bool(x.isfinite().all()):
        raise ValueError(
            "holds values that are not finite, so the checkpoint is damaged, or too large for the format "
            "asked for, so another --dtype or --quantization is needed"
        )
    return x
