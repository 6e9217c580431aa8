"""Recording of forward passes for the native CPU backend: buffers and lifetimes, and what a replay computes.

Lifetimes are checked on what real decoders record; random passes over all operations are compared with the
reference backend, which has a tensor for each value and so nothing to confuse.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from native_calls import LEVELS
from tiny import tiny_model

from gqa_serve.engine.backends import cpu, native_is_built
from gqa_serve.engine.backends.base import AttentionLayout, Backend, HeadNorms
from gqa_serve.engine.backends.cpu import CpuBackend, NativeForward, NativeKVCache
from gqa_serve.engine.backends.cpu_recorder import Recorder, Symbol
from gqa_serve.engine.backends.reference import ReferenceBackend
from gqa_serve.engine.batch import ForwardBatch, PlanRow, StepPlan
from gqa_serve.engine.kernels.cpu import load
from gqa_serve.engine.kv_cache import TensorKVCache
from gqa_serve.engine.model_config import ModelConfig, RopeConfig
from gqa_serve.engine.models.decoder import Decoder
from gqa_serve.engine.models.loader import load_model
from gqa_serve.engine.rope import Rotary
from gqa_serve.engine.weights.checkpoint import open_checkpoint
from gqa_serve.errors import UnsupportedModelError

pytestmark = pytest.mark.skipif(not native_is_built(), reason="the native kernels are not built")

CPU = torch.device("cpu")


# --- buffers ---


class Program:
    """In the native one's place: keeps the widths of values, and which values each operation is told of."""

    def __init__(self) -> None:
        self.widths: list[int] = []
        self.calls: list[tuple[str, set[int]]] = []

    def add_value(self, width: int) -> int:
        self.widths.append(width)
        return len(self.widths) - 1

    def add_rotary(self, *_: Any) -> int:
        return 0

    def embed(self, table: Any, out: int, scale: float, first: int, vocabulary: int) -> None:
        self.calls.append(("embed", {out}))

    def rms_norm(self, x: int, weight: int, n: int, out: int, eps: float) -> None:
        self.calls.append(("rms_norm", {x, out}))

    def add_rms_norm(self, x: int, residual: int, weight: int, n: int, out: int, *_: float) -> None:
        self.calls.append(("add_rms_norm", {x, residual, out}))

    def linear(self, parts: Any, x: int, out: int) -> None:
        self.calls.append(("linear", {x, out}))

    def gated_linear(self, gate: Any, up: Any, x: int, out: int, activation: str) -> None:
        self.calls.append(("gated_linear", {x, out}))

    def gated(self, x: int, out: int, activation: str) -> None:
        self.calls.append(("gated", {x, out}))

    def rotate_and_write(self, layer: int, qkv: int, out: int, *_: Any) -> None:
        self.calls.append(("rotate_and_write", {qkv, out}))

    def attend(self, layer: int, q: int, out: int, *_: Any) -> None:
        self.calls.append(("attend", {q, out}))


def check_lifetimes(recorder: Recorder, program: Program, result: int) -> None:
    """From its definition to its last use a symbol has its buffer for itself."""
    operations = recorder.operations
    defined: dict[Symbol, int] = {}
    last: dict[Symbol, float] = {}
    for index, operation in enumerate(operations):
        for symbol in operation.inputs:
            assert symbol in defined
            last[symbol] = index
        if operation.output is not None:
            assert operation.output not in defined
            defined[operation.output] = index
            last[operation.output] = index
    output = operations[-1].output
    assert output is not None
    assert output.value == result
    last[output] = math.inf
    by_buffer: dict[int, list[Symbol]] = {}
    for symbol in defined:
        assert symbol.width == program.widths[symbol.value]
        by_buffer.setdefault(symbol.value, []).append(symbol)
    for symbols in by_buffer.values():
        symbols.sort(key=lambda symbol: defined[symbol])
        for before, after in itertools.pairwise(symbols):
            assert last[before] < defined[after], "two live symbols share a buffer"


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> list[Recorder]:
    """The recorders that `compile` makes."""
    made: list[Recorder] = []

    class Kept(Recorder):
        def __init__(self, program: Any) -> None:
            super().__init__(program)
            made.append(self)

    monkeypatch.setattr(cpu, "Recorder", Kept)
    return made


def load_tiny(family: str, path: Path) -> Decoder:
    tiny_model(family).save_pretrained(path)
    checkpoint = open_checkpoint(path)
    config = ModelConfig.from_hf(checkpoint.raw_config, checkpoint.generation_config)
    return load_model(checkpoint, config, device=CPU, backend=CpuBackend())


@pytest.mark.parametrize("family", ["llama", "gemma3", "olmo2", "qwen3"])
def test_live_symbols_never_share_a_buffer(family: str, recorded: list[Recorder], tmp_path: Path) -> None:
    decoder = load_tiny(family, tmp_path)
    program = Program()
    backend = cast(Any, decoder.backend)
    backend.native = SimpleNamespace(Program=lambda isa, threads: program)
    forward = backend.compile(decoder)
    (recorder,) = recorded
    check_lifetimes(recorder, program, forward.result)
    # Operations reach the program in order, with the buffers of their symbols.
    for operation, (_, values) in zip(recorder.operations, program.calls, strict=True):
        symbols = [*operation.inputs, *([operation.output] if operation.output is not None else [])]
        assert {symbol.value for symbol in symbols} == values
    layers = decoder.config.num_layers
    assert [name for name, _ in program.calls].count("attend") == layers
    # As many buffers as one layer needs, however many layers there are.
    assert len(program.widths) <= 10 < len(recorder.operations)


def test_the_check_notices_a_shared_buffer(recorded: list[Recorder], tmp_path: Path) -> None:
    decoder = load_tiny("llama", tmp_path)
    program = Program()
    backend = cast(Any, decoder.backend)
    backend.native = SimpleNamespace(Program=lambda isa, threads: program)
    forward = backend.compile(decoder)
    residual = recorded[0].operations[0].output
    other = recorded[0].operations[1].output  # the first norm, while the residual is alive
    assert residual is not None
    assert other is not None
    assert residual.width == other.width
    other.value = residual.value
    with pytest.raises(AssertionError, match="share a buffer"):
        check_lifetimes(recorded[0], program, forward.result)


# --- random passes ---

HIDDEN, INNER, HEADS, KV_HEADS, HEAD_DIM, VOCAB = 32, 40, 4, 2, 8, 50
LAYOUT = AttentionLayout(
    num_heads=HEADS,
    num_kv_heads=KV_HEADS,
    head_dim=HEAD_DIM,
    scale=0.4,
    soft_cap=5.0,
    windows=(None, 3),
    layer_windows=(0, 1, 0, 1),
    rotaries=(
        Rotary.build(RopeConfig("default", 100.0, HEAD_DIM), 64, CPU),
        Rotary.build(RopeConfig("default", 10.0, HEAD_DIM // 2), 64, CPU),
    ),
    layer_rotaries=(0, None, 1, 0),
)
STEPS = ("norm", "linear", "mlp", "attention", "add and norm", "add", "turn")


class Pass:
    """A random forward pass, the same for every backend: `steps` take values from a pool, and add theirs."""

    def __init__(self, backend: Backend, steps: Sequence[str], seed: int) -> None:
        self.backend = backend
        self.steps = steps
        self.seed = seed
        self.config = SimpleNamespace(hidden_size=HIDDEN, head_dim=HEAD_DIM)
        generator = torch.Generator().manual_seed(seed)

        def linear(n: int, k: int) -> Any:
            weight = torch.randn(n, k, generator=generator) / math.sqrt(k)
            parts = [backend.pack(part, "linear") for part in weight.split([n // 2, n - n // 2])]
            return backend.linear(parts, torch.randn(n, generator=generator) * 0.1)

        def norm(n: int) -> torch.Tensor:
            return torch.rand(n, generator=generator) + 0.5

        self.table = backend.pack(torch.randn(VOCAB, HIDDEN, generator=generator), "head")
        self.square, self.gate_up, self.down = (
            linear(n, k) for n, k in ((HIDDEN, HIDDEN), (2 * INNER, HIDDEN), (HIDDEN, INNER))
        )
        self.qkv = linear((HEADS + 2 * KV_HEADS) * HEAD_DIM, HIDDEN)
        self.norms = [norm(HIDDEN) for _ in range(3)]
        self.head_norms = HeadNorms("head", norm(HEAD_DIM), norm(HEAD_DIM), 1e-5)
        full = (norm(HEADS * HEAD_DIM), norm(KV_HEADS * HEAD_DIM))
        self.full_norms = HeadNorms("full", *full, 1e-5)

    def forward(self, batch: ForwardBatch, cache: Any) -> torch.Tensor:
        backend, rng = self.backend, random.Random(self.seed)
        attention = backend.prepare(batch, cache, LAYOUT)
        pool = [backend.embed(self.table, batch.token_ids, 1.5)]
        layer = 0
        for step in self.steps:
            x = rng.choice(pool)
            if step == "turn":
                pool.append(pool.pop(0))
            elif step == "linear":
                pool.append(self.square(x))
            elif step == "mlp":
                activation = rng.choice(["silu", "gelu", "gelu_tanh"])
                inner = backend.gated_activation(self.gate_up(x), cast(Any, activation))
                pool.append(self.down(inner))
            elif step == "attention" and layer < len(LAYOUT.layer_windows):
                norms = [None, self.head_norms, self.full_norms, None][layer]
                q = attention.rotate_and_write(layer, self.qkv(x), norms)
                pool.append(attention.attend(layer, q))
                layer += 1
            elif step in ("add", "add and norm") and len(pool) > 1:
                residual = rng.choice([value for value in pool if value is not x])
                weight = rng.choice(self.norms) if step == "add and norm" else None
                normed = backend.add_rms_norm(x, residual, weight, 1e-5, rng.choice([1.0, 0.25]))
                if weight is None:
                    assert normed is residual
                else:
                    pool.append(normed)
            else:
                pool.append(backend.rms_norm(x, rng.choice(self.norms), 1e-5))
            # Large numbers are normed, and old ones let go.
            if len(pool) > 4:
                pool.pop(rng.randrange(4))
        # All that is alive counts.
        total = backend.rms_norm(pool[0], self.norms[0], 1e-5)
        for value in pool[1:]:
            backend.add_rms_norm(backend.rms_norm(value, self.norms[1], 1e-5), total, None, 1e-5, 1.0)
        return backend.rms_norm(total, self.norms[2], 1e-5)


def plan(tokens: int) -> StepPlan:
    rng = random.Random(tokens)
    return StepPlan([PlanRow([rng.randrange(VOCAB) for _ in range(tokens)], 0, [2, 0, 1], tokens)])


def reference(steps: Sequence[str], seed: int, tokens: int) -> torch.Tensor:
    backend = ReferenceBackend(CPU, torch.float32)
    shape = (3, KV_HEADS, 16, HEAD_DIM)
    layers = len(LAYOUT.layer_windows)
    cache = TensorKVCache(
        [torch.zeros(shape) for _ in range(layers)], [torch.zeros(shape) for _ in range(layers)], 16, 3
    )
    with torch.inference_mode():
        return Pass(backend, steps, seed).forward(ForwardBatch.from_plan(plan(tokens), 16, CPU), cache)


def native_cache() -> NativeKVCache:
    layers = len(LAYOUT.layer_windows)
    return NativeKVCache(load().KVCache(layers, 3, "float32", KV_HEADS, HEAD_DIM, 16), 16, 3)


def compiled(backend: CpuBackend, steps: Sequence[str], seed: int) -> NativeForward:
    forward = backend.compile(cast(Decoder, Pass(backend, steps, seed)))
    assert isinstance(forward, NativeForward)
    return forward


def replay(forward: Callable[..., torch.Tensor], tokens: int) -> torch.Tensor:
    return forward(plan(tokens), native_cache())


@settings(max_examples=60, deadline=None, derandomize=True)
@given(steps=st.lists(st.sampled_from(STEPS), max_size=25), seed=st.integers(0, 1000))
def test_a_replay_computes_what_was_recorded(steps: list[str], seed: int) -> None:
    tokens = 1 + seed % 40
    wanted = reference(steps, seed, tokens)
    outputs = [replay(compiled(CpuBackend(isa=isa), steps, seed), tokens) for isa in LEVELS]
    torch.testing.assert_close(outputs[0], wanted, atol=1e-3, rtol=1e-3)
    for output in outputs[1:]:
        assert torch.equal(output, outputs[0])


ALL = ["norm", "attention", "add and norm", "mlp", "add", "linear", "attention", "add and norm", "mlp", "add"]


def test_compiling_twice() -> None:
    """Passes of one backend, also the same one again, do not touch each other."""
    backend = CpuBackend(threads=2)
    decoder = cast(Decoder, Pass(backend, ALL, 1))
    first, second = backend.compile(decoder), backend.compile(decoder)
    other = compiled(backend, ALL[::-1], 2)
    wanted = replay(first, 30)
    other_wanted = replay(other, 30)
    torch.testing.assert_close(wanted, reference(ALL, 1, 30), atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(other_wanted, reference(ALL[::-1], 2, 30), atol=1e-3, rtol=1e-3)
    assert torch.equal(replay(second, 30), wanted)
    assert torch.equal(replay(other, 30), other_wanted)
    assert torch.equal(replay(first, 30), wanted)


def test_a_pass_serves_steps_of_any_size() -> None:
    """Buffers grow between steps; what they hold is not carried over."""
    forward = compiled(CpuBackend(), ALL, 3)
    for tokens in (1, 30, 2, 48, 1):
        fresh = replay(compiled(CpuBackend(), ALL, 3), tokens)
        assert torch.equal(replay(forward, tokens), fresh)
        assert fresh.shape == (tokens, HIDDEN)


@pytest.mark.parametrize("seed", range(8))
def test_only_the_rows_asked_for_are_returned(seed: int) -> None:
    """What follows the last attention is computed for them alone."""
    steps = random.Random(seed).sample(ALL, len(ALL))
    forward = compiled(CpuBackend(), steps, seed)
    whole = replay(forward, 40)
    rows = plan(40).rows[0]
    for count in (0, 1, 7):
        some = StepPlan([PlanRow(rows.token_ids, 0, rows.block_ids, count)])
        assert torch.equal(forward(some, cast(Any, native_cache())), whole[40 - count :])


@pytest.mark.parametrize("ends_with_attention", [True, False])
def test_a_result_that_attention_gives(ends_with_attention: bool) -> None:
    """Nothing follows it, or nothing that the result depends on."""

    class Ending(Pass):
        def forward(self, batch: ForwardBatch, cache: Any) -> torch.Tensor:
            attention = self.backend.prepare(batch, cache, LAYOUT)
            x = self.backend.embed(self.table, batch.token_ids, 1.0)
            out = attention.attend(0, attention.rotate_and_write(0, self.qkv(x), None))
            if not ends_with_attention:
                self.backend.rms_norm(out, self.norms[0], 1e-5)
            return out

    backend = CpuBackend()
    forward = backend.compile(cast(Decoder, Ending(backend, [], 1)))
    whole = replay(forward, 40)
    row = plan(40).rows[0]
    some = StepPlan([PlanRow(row.token_ids, 0, row.block_ids, 3)])
    assert torch.equal(forward(some, cast(Any, native_cache())), whole[37:])


# --- misuse ---


def test_operations_outside_compile_are_refused() -> None:
    backend = CpuBackend()
    decoder = Pass(backend, ALL, 0)
    x, weight = torch.zeros(1, HIDDEN), torch.ones(HIDDEN)
    batch = cast(Any, SimpleNamespace(token_ids=torch.zeros(1, dtype=torch.int64)))
    calls: list[Callable[[], object]] = [
        lambda: backend.embed(decoder.table, batch.token_ids, 1.0),
        lambda: backend.rms_norm(x, weight, 1e-5),
        lambda: backend.add_rms_norm(x, x, weight, 1e-5, 1.0),
        lambda: backend.gated_activation(x, "silu"),
        lambda: decoder.square(x),
        lambda: backend.prepare(batch, cast(Any, native_cache()), LAYOUT),
    ]

    def refused() -> None:
        for call in calls:
            with pytest.raises(RuntimeError, match="compiled"):
                call()

    refused()
    backend.compile(cast(Decoder, decoder))
    refused()


def test_an_odd_head_dim_is_refused() -> None:
    backend = CpuBackend()
    decoder = Pass(backend, ALL, 0)
    decoder.config.head_dim = 7
    with pytest.raises(UnsupportedModelError, match="even head_dim"):
        backend.compile(cast(Decoder, decoder))


def test_a_recording_that_fails_leaves_the_backend_usable() -> None:
    """Here an operation is handed a tensor where it wants what another returned."""
    backend = CpuBackend()
    decoder = Pass(backend, ALL, 5)
    good = replay(backend.compile(cast(Decoder, decoder)), 5)
    bad = SimpleNamespace(
        forward=lambda batch, cache: decoder.square(torch.zeros(1, HIDDEN)), config=decoder.config
    )
    with pytest.raises(TypeError, match="Tensor"):
        backend.compile(cast(Decoder, bad))
    with pytest.raises(RuntimeError, match="compiled"):
        decoder.square(torch.zeros(1, HIDDEN))
    assert torch.equal(replay(backend.compile(cast(Decoder, decoder)), 5), good)
