"""The ways to merge KV heads, from the activations of one layer to its `LayerMerge`.

    mean      neighbouring heads, mean-pooled projections: Ainslie et al. 2023 (arXiv 2305.13245), section 2.1
    first     neighbouring heads, the first head of each group: the paper's comparison
    random    neighbouring heads, projections drawn anew: the paper's other comparison
    grouped   groups chosen by what the heads compute on calibration text, then mean-pooled
    fitted    groups chosen so, and the linear merge that reads each old head back with the least square error

Owns distances between heads and the fit. A fitted V is the best rank-D approximation of the group's stacked
values (their leading principal directions; Eckart and Young 1936), since any matrix after V can be absorbed
into o_proj. K is read through the rotary embedding, which turns pairs of dimensions (j, j + R/2) by an angle
that depends on the position: as complex numbers, multiplies them by a phase. What commutes with that are
complex factors per pair, so each pair of the group's keys is approximated by one complex number: the leading
eigenvector of their second moments, which the phase leaves as they are. Dimensions that are not rotated are
merged as V is. Where keys are normed after the projection (Qwen3, Gemma 3, OLMo 2) no factor can be absorbed,
so K is mean-pooled there.
Invariant: K and V of a layer are float32 [T, KV, D]; sums over tokens are in float64.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch

from gqa_serve.workbench.convert.grouping import best_groups
from gqa_serve.workbench.convert.heads import HeadMap, LayerMerge, neighbours

if TYPE_CHECKING:
    from gqa_serve.engine.model_config import ModelConfig

Method = Literal["mean", "first", "random", "grouped", "fitted"]
METHODS: tuple[Method, ...] = ("mean", "first", "random", "grouped", "fitted")
NEEDS_ACTIVATIONS = frozenset({"grouped", "fitted"})


@dataclass(frozen=True)
class KeysAndValues:
    """What one layer's projections gave on the calibration text, before norms and rotation: [T, KV, D]."""

    k: torch.Tensor
    v: torch.Tensor


def plan_layer(
    method: Method,
    config: ModelConfig,
    layer: int,
    num_kv_heads: int,
    seen: KeysAndValues | None,
    seed: int,
    keys: torch.Tensor | None = None,
) -> LayerMerge:
    """How layer `layer` is merged. `seen` is needed for `grouped` and `fitted`.

    `keys` [T, KV, D]: the keys as they are compared, after their norm; `seen.k` if there is none.
    """
    groups = neighbours(config.num_kv_heads, num_kv_heads)
    if method not in NEEDS_ACTIVATIONS or num_kv_heads > config.num_kv_heads:
        pooling = method if method in ("first", "random") else "mean"
        return LayerMerge(groups, pooling, seed=seed)
    assert seen is not None
    keys = seen.k if keys is None else keys
    fits_k = method == "fitted" and config.qk_norm == "none"
    rotary = _rotary_dim(config, layer)
    k_distance = aligned_k_distances(keys, rotary) if fits_k else distances(keys)
    v_distance = aligned_distances(seen.v) if method == "fitted" else distances(seen.v)
    both = k_distance / _energy(keys) + v_distance / _energy(seen.v)
    groups = best_groups(both.numpy(), num_kv_heads)
    if method == "grouped":
        return LayerMerge(groups)
    k = fit_keys(seen.k, groups, rotary) if fits_k else None
    return LayerMerge(groups, k=k, v=fit_values(seen.v, groups))


def distances(heads: torch.Tensor) -> torch.Tensor:
    """[T, n, D] -> [n, n] float64: sum over tokens of the squared distance of each two heads.

    Rotation by position leaves it as it is, because both heads of a token turn alike.
    """
    flat = heads.transpose(0, 1).flatten(1).double()  # [n, T * D]
    products = flat @ flat.T
    own = products.diagonal()
    return (own[:, None] + own[None, :] - 2 * products).clamp_(min=0)


def aligned_distances(heads: torch.Tensor) -> torch.Tensor:
    """As `distances`, after the best orthogonal map of one head onto the other (Schoenemann 1966).

    min over Q of |X - Y Q|^2 = |X|^2 + |Y|^2 - 2 (sum of the singular values of X'Y).
    """
    num = heads.shape[1]
    wide = heads.double()
    out = torch.zeros(num, num, dtype=torch.float64)
    own = wide.square().sum((0, 2))
    for a in range(num):
        for b in range(a):
            nuclear = torch.linalg.matrix_norm(wide[:, a].T @ wide[:, b], "nuc")
            out[a, b] = out[b, a] = (own[a] + own[b] - 2 * nuclear).clamp(min=0)
    return out


def aligned_k_distances(keys: torch.Tensor, rotary_dim: int) -> torch.Tensor:
    """As `distances`, after the best phase per rotary pair, and the best orthogonal map of the rest."""
    pairs = _pairs(keys, rotary_dim)  # [R / 2, T, n]
    moments = pairs.conj().transpose(1, 2) @ pairs  # [R / 2, n, n]
    own = moments.diagonal(dim1=1, dim2=2).real.sum(0)
    turned = (own[:, None] + own[None, :] - 2 * moments.abs().sum(0)).clamp_(min=0)
    if rotary_dim == keys.shape[-1]:
        return turned.fill_diagonal_(0)
    return turned.fill_diagonal_(0) + aligned_distances(keys[..., rotary_dim:])


def fit_values(values: torch.Tensor, groups: tuple[tuple[int, ...], ...]) -> HeadMap:
    """The merge of V with the least squared error of reading every head back. values [T, KV, D]."""
    num, dim = values.shape[1:]
    decode = torch.zeros(num, dim, dim, dtype=torch.float64)
    for group in groups:
        stacked = values[:, list(group)].flatten(1).double()  # [T, size * D]
        leading = torch.linalg.eigh(stacked.T @ stacked).eigenvectors[:, -dim:]  # ascending order
        decode[list(group)] = leading.view(len(group), dim, dim)
    return HeadMap(decode.transpose(1, 2).contiguous(), decode)


def fit_keys(keys: torch.Tensor, groups: tuple[tuple[int, ...], ...], rotary_dim: int) -> HeadMap:
    """The same for K, among the maps that commute with the rotation of the first `rotary_dim` dimensions."""
    num, dim = keys.shape[1:]
    half = rotary_dim // 2
    decode = torch.zeros(num, dim, dim, dtype=torch.float64)
    pairs = _pairs(keys, rotary_dim)
    first = torch.arange(half)
    for group in groups:
        own = pairs[:, :, list(group)]  # [R / 2, T, size]
        moments = own.transpose(1, 2) @ own.conj()  # E[z z^H] per pair
        leading = torch.linalg.eigh(moments).eigenvectors[..., -1]  # [R / 2, size]
        for place, head in enumerate(group):
            factor = leading[:, place]
            decode[head, first, first] = decode[head, first + half, first + half] = factor.real
            decode[head, first + half, first] = factor.imag
            decode[head, first, first + half] = -factor.imag
    if rotary_dim < dim:
        rest = fit_values(keys[..., rotary_dim:], groups)
        decode[:, rotary_dim:, rotary_dim:] = rest.decode
    return HeadMap(decode.transpose(1, 2).contiguous(), decode)


def read_back(heads: torch.Tensor, merge: LayerMerge, fitted: HeadMap | None) -> torch.Tensor:
    """What stands for each old head after the merge: [T, KV, D] -> [T, KV, D]; not for `random`."""
    out = torch.empty_like(heads)
    for group in merge.groups:
        held = heads[:, list(group)]
        if fitted is not None:
            encode, decode = fitted.encode[list(group)].float(), fitted.decode[list(group)].float()
            new = torch.einsum("hij,thj->ti", encode, held)
            out[:, list(group)] = torch.einsum("hij,tj->thi", decode, new)
        else:
            out[:, list(group)] = held[:, :1] if merge.pooling == "first" else held.mean(1, keepdim=True)
    return out


def _pairs(keys: torch.Tensor, rotary_dim: int) -> torch.Tensor:
    """[T, n, D] -> [R / 2, T, n] complex128: dimension j is the real part, j + R/2 the imaginary one."""
    wide = keys[..., :rotary_dim].double()
    real, imaginary = wide.chunk(2, dim=-1)
    return torch.complex(real, imaginary).permute(2, 0, 1)


def _rotary_dim(config: ModelConfig, layer: int) -> int:
    rope = config.ropes[layer]
    return 0 if rope is None else rope.rotary_dim


def _energy(heads: torch.Tensor) -> torch.Tensor:
    return heads.double().square().sum().clamp(min=1e-30)
