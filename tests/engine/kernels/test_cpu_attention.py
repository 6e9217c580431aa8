"""Attention of the native CPU kernels against float64 arithmetic per query head, and itself bit for bit.

A program of three operations, embed -> rotate_and_write -> attend, over a table that holds the queries, keys
and values of all tokens. The cache is full of infinities before a test begins. Expected values are computed
from K and V as the cache's format rounds them, so that tolerances are float32's for every format.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from native_calls import LEVELS, Machine, bits, machines, pack, run

from gqa_serve.engine.backends import native_is_built
from gqa_serve.engine.batch import PlanRow
from gqa_serve.engine.kernels.cpu import load

pytestmark = pytest.mark.skipif(not native_is_built(), reason="the native kernels are not built")

GROUP_SIZES = (1, 2, 3, 4, 5, 7, 8, 16)
HEAD_DIMS = (2, 8, 24, 64, 80, 128)
KV_FORMATS = ("float32", "bfloat16", "int8")
TOLERANCE = 2e-5


@dataclass
class Norms:
    """RMSNorm of queries and keys: "head" or "full"."""

    mode: str
    q: np.ndarray
    k: np.ndarray
    eps: float = 1e-5


@dataclass
class Case:
    """Grouped attention of some requests, each of so many tokens."""

    lengths: Sequence[int]
    num_kv_heads: int = 2
    group_size: int = 3
    head_dim: int = 24
    block_size: int = 16
    window: int = 0
    soft_cap: float = 0.0
    kv_format: str = "float32"
    norms: Norms | None = None
    inv_freq: np.ndarray | None = None
    rotary_scale: float = 1.0
    seed: int = 0
    starts: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self.starts = [0, *itertools.accumulate(self.lengths)]
        rng = np.random.default_rng(self.seed)
        self.scale = 0.7 / math.sqrt(self.head_dim)
        heads = (self.group_size + 2) * self.num_kv_heads
        self.qkv = rng.standard_normal((self.starts[-1], heads, self.head_dim)).astype(np.float32)
        counts = [-(-length // self.block_size) for length in self.lengths]
        free = rng.permutation(sum(counts) + 2).tolist()
        self.num_blocks = len(free)
        self.blocks = [[free.pop() for _ in range(count)] for count in counts]

    @property
    def num_heads(self) -> int:
        return self.group_size * self.num_kv_heads

    @property
    def width(self) -> int:
        return self.num_heads * self.head_dim

    @cached_property
    def table(self) -> Any:
        """Half of the tokens' queries, keys and values. Tables are finite: infinity is half of twice 3e38,
        and the last row, which is no token's, is full of it."""
        rows = self.qkv.reshape(len(self.qkv), -1) / np.float32(2)
        spoilt = np.full((1, rows.shape[1]), np.inf, np.float32)
        return pack(torch.from_numpy(np.concatenate((rows, spoilt)).clip(-3e38, 3e38)), "float32")

    def program(self, machine: Machine, attend: bool = True) -> tuple[Any, int, int]:
        """The program, its values with rotated queries and with the result."""
        program = machine.program()
        sizes = (self.num_heads, self.num_kv_heads, self.head_dim)
        qkv = program.add_value(self.table.k)
        q, out = (program.add_value(self.width) for _ in range(2))
        rotary: tuple[int, int] = (-1, 0)
        if self.inv_freq is not None:
            frequencies = np.ascontiguousarray(self.inv_freq, np.float32)
            number = program.add_rotary(frequencies.ctypes.data, len(frequencies), self.rotary_scale)
            rotary = (number, 2 * len(frequencies))
        norm: tuple[Any, ...] = ("none", 0, 0, 0, 0, 0.0)
        if self.norms is not None:
            weights = (self.norms.q, self.norms.k)
            (a, b), (c, d) = [(weight.ctypes.data, len(weight)) for weight in weights]
            norm = (self.norms.mode, a, b, c, d, self.norms.eps)
        program.embed(self.table, qkv, 2.0)
        program.rotate_and_write(0, qkv, q, *sizes, *rotary, *norm)
        if attend:
            program.attend(0, q, out, *sizes, self.scale, self.soft_cap, self.window)
        return program, q, out

    def cache(self, machine: Machine) -> Any:
        """All of it infinite, padding of heads excepted."""
        cache = load().KVCache(
            1, self.num_blocks, self.kv_format, self.num_kv_heads, self.head_dim, self.block_size
        )
        program, q, _ = self.program(machine, attend=False)
        tokens = [len(self.qkv)] * (self.num_blocks * self.block_size)
        run(program, cache, [PlanRow(tokens, 0, list(range(self.num_blocks)), 1)], q, self.width)
        return cache

    def compute(self, machine: Machine, steps: Sequence[dict[int, int]] | None = None) -> np.ndarray:
        """[all tokens, H * D]. `steps`: new tokens of each request named, in order; one step without."""
        program, _, out = self.program(machine)
        cache = self.cache(machine)
        result = np.full((len(self.qkv), self.width), np.nan, np.float32)
        done = [0] * len(self.lengths)
        for step in steps or [dict(enumerate(self.lengths))]:
            rows, tokens = [], []
            for request, count in step.items():
                begin = self.starts[request] + done[request]
                ids = list(range(begin, begin + count))
                used = -(-(done[request] + count) // self.block_size)
                rows.append(PlanRow(ids, done[request], self.blocks[request][:used], count))
                tokens += ids
                done[request] += count
            result[tokens] = run(program, cache, rows, out, result.shape[1])
        assert done == list(self.lengths)
        return result

    def queries(self) -> np.ndarray:
        """What rotate_and_write makes of the queries, float64 [tokens, H, D]."""
        q = self._normed(self.qkv[:, : self.num_heads], self.norms and self.norms.q)
        return self._rotated(q)

    def keys_and_values(self) -> tuple[np.ndarray, np.ndarray]:
        """What the cache holds of them, float64 [tokens, KV, D]."""
        k, v = np.split(self.qkv[:, self.num_heads :], 2, axis=1)
        k = self._rotated(self._normed(k, self.norms and self.norms.k))
        return stored(k, self.kv_format), stored(v, self.kv_format)

    def _normed(self, x: np.ndarray, weight: np.ndarray | None) -> np.ndarray:
        x = x.astype(np.float64)
        if self.norms is None or weight is None:
            return x
        flat = x.reshape(len(x), -1, len(weight))  # [tokens, normed together, size]
        flat = flat / np.sqrt(np.square(flat).mean(axis=-1, keepdims=True) + self.norms.eps) * weight
        return flat.reshape(x.shape)

    def _rotated(self, x: np.ndarray) -> np.ndarray:
        """Pairs (i, i + rotary_dim / 2) are complex numbers turned by position * frequency."""
        if self.inv_freq is None:
            return x
        half = len(self.inv_freq)
        positions = np.concatenate([np.arange(length) for length in self.lengths]).astype(np.float32)
        angles = (positions[:, None] * self.inv_freq.astype(np.float32)).astype(np.float64)[:, None]
        turned = (x[..., :half] + 1j * x[..., half : 2 * half]) * np.exp(1j * angles) * self.rotary_scale
        return np.concatenate((turned.real, turned.imag, x[..., 2 * half :]), axis=-1)

    def expected(self) -> np.ndarray:
        """Each query head by itself, float64 [tokens, H * D]."""
        q, (k, v) = self.queries(), self.keys_and_values()
        out = np.empty((len(self.qkv), self.num_heads, self.head_dim))
        for begin, end in itertools.pairwise(self.starts):
            position = np.arange(end - begin)
            seen = position[None] <= position[:, None]
            if self.window:
                seen &= position[None] > position[:, None] - self.window
            for head in range(self.num_heads):
                group = head // self.group_size
                scores = q[begin:end, head] @ k[begin:end, group].T * self.scale
                if self.soft_cap:
                    scores = self.soft_cap * np.tanh(scores / self.soft_cap)
                scores = np.where(seen, scores, -np.inf)
                weights = np.exp(scores - scores.max(axis=1, keepdims=True))
                out[begin:end, head] = weights / weights.sum(axis=1, keepdims=True) @ v[begin:end, group]
        return out.reshape(len(out), -1)

    def check(self, steps: Sequence[dict[int, int]]) -> None:
        """In one step what is expected; in `steps` the same bits, with every instruction set."""
        whole = self.compute(Machine(LEVELS[0], 1))
        np.testing.assert_allclose(whole, self.expected(), atol=TOLERANCE, rtol=TOLERANCE)
        for machine in machines((1,)):
            assert np.array_equal(bits(self.compute(machine, steps)), bits(whole)), machine


def stored(x: np.ndarray, kv_format: str) -> np.ndarray:
    """As the cache rounds it: int8 has one scale per token and head."""
    x = x.astype(np.float32)
    if kv_format == "bfloat16":
        return torch.from_numpy(x).bfloat16().double().numpy()
    if kv_format == "int8":
        scale = np.abs(x).max(axis=-1, keepdims=True) / np.float32(127)
        return np.rint(x / scale).astype(np.float64) * scale
    return x.astype(np.float64)


def chunks(lengths: Sequence[int], rng: random.Random) -> Iterator[dict[int, int]]:
    """Random chunks of random requests in random order; often single tokens."""
    done = [0] * len(lengths)
    while unfinished := [i for i, length in enumerate(lengths) if done[i] < length]:
        rng.shuffle(unfinished)
        step = {}
        for request in unfinished[: rng.randint(1, len(unfinished))]:
            count = min(rng.choice([1, 1, 2, 15, 33, 64, 200]), lengths[request] - done[request])
            step[request] = count
            done[request] += count
        yield step


RAGGED = [7, 1, 37, 16, 90]


@pytest.fixture(params=LEVELS)
def isa(request: pytest.FixtureRequest) -> str:
    level: str = request.param
    return level


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("group_size", GROUP_SIZES)
def test_every_group_size_and_head_dim(group_size: int, head_dim: int) -> None:
    rng = random.Random(head_dim)
    for kv_format in KV_FORMATS:
        case = Case(RAGGED, group_size=group_size, head_dim=head_dim, kv_format=kv_format)
        case.check(list(chunks(RAGGED, rng)))


@pytest.mark.parametrize("soft_cap", [0.0, 1.5])
@pytest.mark.parametrize("window", [0, 1, 5, 16, 17, 64, 300])
@pytest.mark.parametrize("block_size", [16, 32, 48])
def test_every_block_size_window_and_soft_cap(block_size: int, window: int, soft_cap: float) -> None:
    lengths = [70, 1, 33]
    for kv_format in KV_FORMATS:
        case = Case(
            lengths, head_dim=8, block_size=block_size, window=window, soft_cap=soft_cap, kv_format=kv_format
        )
        case.check([{0: 69, 2: 32}, {2: 1, 1: 1, 0: 1}])


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    lengths=st.lists(st.integers(1, 130), min_size=1, max_size=5),
    num_kv_heads=st.sampled_from([1, 2, 3]),
    group_size=st.integers(1, 17),
    head_dim=st.sampled_from([2, 6, 16, 18, 24, 40, 64]),
    block_size=st.sampled_from([16, 32, 48]),
    window=st.one_of(st.just(0), st.integers(1, 140)),
    soft_cap=st.sampled_from([0.0, 0.0, 4.0]),
    kv_format=st.sampled_from(KV_FORMATS),
    seed=st.integers(0, 99),
)
def test_random_shapes(seed: int, **fields: Any) -> None:
    case = Case(seed=seed, **fields)
    case.check(list(chunks(case.lengths, random.Random(seed))))


@pytest.mark.parametrize("window", [0, 300])
@pytest.mark.parametrize("kv_format", KV_FORMATS)
def test_contexts_of_several_splits(kv_format: str, window: int) -> None:
    case = Case([700, 513, 1], 1, 4, 16, block_size=32, window=window, kv_format=kv_format)
    case.check([{0: 699, 1: 512}, {1: 1, 0: 1, 2: 1}])


@pytest.mark.parametrize("window", [0, 90])
@pytest.mark.parametrize("kv_format", KV_FORMATS)
def test_neither_chunks_nor_company_nor_machines_matter(kv_format: str, window: int) -> None:
    """Bit for bit. Contexts of more than two splits, block sizes included."""
    rng = random.Random(kv_format)
    lengths = [530, 1, 257, 64]
    fields: dict[str, Any] = {"head_dim": 40, "window": window, "kv_format": kv_format, "soft_cap": 20.0}
    case = Case(lengths, **fields)
    wanted = case.compute(Machine(LEVELS[-1], 1), [{i: length} for i, length in enumerate(lengths)])
    np.testing.assert_allclose(wanted, case.expected(), atol=TOLERANCE, rtol=TOLERANCE)
    for machine, block_size in zip(machines((1, 2, 3)), itertools.cycle([16, 48, 32])):
        other = Case(lengths, block_size=block_size, **fields)
        for steps in (None, list(chunks(lengths, rng))):
            assert np.array_equal(bits(other.compute(machine, steps)), bits(wanted)), machine


@pytest.mark.parametrize("window", [0, 20])
@pytest.mark.parametrize("kv_format", KV_FORMATS)
def test_tokens_after_a_query_have_no_effect_on_it(kv_format: str, window: int, isa: str) -> None:
    """Not even infinity, in a tile that the diagonal crosses; from its own position on it shows."""
    case = Case([100, 30], window=window, kv_format=kv_format)
    wanted = case.compute(Machine(isa, 1))
    spoilt = Case([100, 30], window=window, kv_format=kv_format)
    spoilt.qkv[50] = np.inf
    got = spoilt.compute(Machine(isa, 1))
    last = 50 + window if window else 100
    clean = [row for row in range(130) if row < 50 or row >= last]
    assert np.array_equal(bits(got[clean]), bits(wanted[clean]))
    assert not np.isfinite(got[50:last]).any()


def test_a_window_of_one_gives_the_token_its_own_value(isa: str) -> None:
    case = Case([40], window=1, group_size=2)
    values = case.qkv[:, -case.num_kv_heads :]
    wanted = np.repeat(values, 2, axis=1).reshape(40, -1)
    assert np.array_equal(case.compute(Machine(isa, 1)), wanted)


def test_scores_of_any_size(isa: str) -> None:
    """exp neither overflows nor leaves nothing: far apart scores, and equal ones."""
    for factor in (0.0, 1e-20, 300.0, 1e6):
        case = Case([80, 17], head_dim=8)
        case.qkv[:, : case.num_heads] *= np.float32(factor)
        got, wanted = case.compute(Machine(isa, 1)), case.expected()
        # Scores are float32 numbers; far from zero their rounding error moves the weights.
        close = np.isclose(got, wanted, atol=TOLERANCE * max(1.0, factor), rtol=TOLERANCE).mean()
        assert np.isfinite(got).all()
        assert close > 0.99


# --- before attention ---


def norms_of(mode: str, case: Case, seed: int = 0) -> Norms:
    rng = np.random.default_rng(seed)
    heads = (1, 1) if mode == "head" else (case.num_heads, case.num_kv_heads)
    q, k = (rng.uniform(-2, 2, count * case.head_dim).astype(np.float32) for count in heads)
    return Norms(mode, q, k)


def frequencies(pairs: int) -> np.ndarray:
    return (100.0 ** (-np.arange(pairs) / max(1, pairs))).astype(np.float32)


@pytest.mark.parametrize("mode", ["none", "head", "full"])
@pytest.mark.parametrize("pairs", [0, 1, 4, 12, 19, 20])
def test_queries_and_keys_are_normed_then_rotated(pairs: int, mode: str) -> None:
    """All dimensions, a part of them, or none."""
    plain = Case([40, 3, 21], head_dim=40)
    case = Case(
        [40, 3, 21],
        head_dim=40,
        norms=None if mode == "none" else norms_of(mode, plain),
        inv_freq=frequencies(pairs) if pairs else None,
        rotary_scale=1.25 if pairs == 12 else 1.0,
    )
    machine = Machine(LEVELS[-1], 2)
    program, q, _ = case.program(machine)
    rows = [
        PlanRow(list(range(begin, end)), 0, blocks, end - begin)
        for (begin, end), blocks in zip(itertools.pairwise(case.starts), case.blocks, strict=True)
    ]
    got = run(program, case.cache(machine), rows, q, case.width)
    np.testing.assert_allclose(got, case.queries().reshape(len(got), -1), atol=3e-6, rtol=3e-6)
    case.check(list(chunks(case.lengths, random.Random(pairs))))


def test_layers_have_caches_of_their_own(isa: str) -> None:
    """Two layers over the same tokens, other keys and values: each reads what it wrote."""
    cases = [Case([50], seed=seed) for seed in (0, 1)]
    machine = Machine(isa, 1)
    cache = load().KVCache(2, 4, "float32", 2, 24, 16)
    program = machine.program()
    sizes = (6, 2, 24)
    outs = []
    norm = ("none", 0, 0, 0, 0, 0.0)
    queries = []
    for layer, case in enumerate(cases):
        qkv, q, out = program.add_value(case.table.k), program.add_value(144), program.add_value(144)
        program.embed(case.table, qkv, 2.0)
        program.rotate_and_write(layer, qkv, q, *sizes, -1, 0, *norm)
        queries.append(q)
        outs.append(out)
    for layer, (q, out) in enumerate(zip(queries, outs, strict=True)):
        program.attend(layer, q, out, *sizes, cases[0].scale, 0.0, 0)
    rows = [PlanRow(list(range(50)), 0, [2, 0, 3, 1], 50)]
    for case, out in zip(cases, outs, strict=True):
        assert np.array_equal(bits(run(program, cache, rows, out, 144)), bits(case.compute(machine)))


# --- the cache ---


@pytest.mark.parametrize(
    ("kv_format", "size", "scales"), [("float32", 4, 0), ("bfloat16", 2, 0), ("int8", 1, 4)]
)
def test_bytes_of_a_block(kv_format: str, size: int, scales: int) -> None:
    """K and V of the tokens, with head_dim rounded up to 16, and int8's scale per token and head."""
    for head_dim, padded in ((64, 64), (24, 32), (2, 16)):
        got = load().KVCache.block_bytes(kv_format, 3, head_dim, 32)
        assert got == 2 * 3 * 32 * (padded * size + scales)


def test_plans_that_lack_blocks_are_refused() -> None:
    case = Case([40])
    machine = Machine(LEVELS[-1], 1)
    program, _, out = case.program(machine)
    cache = case.cache(machine)
    for blocks in ([0, 1], [0, 1, case.num_blocks], [0, -1, 1]):
        with pytest.raises(ValueError, match="block"):
            run(program, cache, [PlanRow(list(range(40)), 0, blocks, 1)], out, 144)
