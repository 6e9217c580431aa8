"""What each kernel of the CUDA backend costs by arithmetic: bytes, flops, and the time a GPU's data sheet
allows.

Owns the account of a kernel: the bytes that must move (each input read once, each output written once), the
bytes that our kernel moves, and the flops. Knows no tensors and no clock: an expected time is a bound that no
kernel beats, not a measurement. Imports no torch, because the planning tools read it.
Invariant: a cost depends on shapes and formats alone.

Left out because they are under a percent: lists of work items, lengths, positions, norm weights of heads. A
matrix product is taken to read its operands from memory once: what its tiles read again is in the GPU's L2
cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from gqa_serve.engine.model_config import ModelConfig
from gqa_serve.workbench.hardware import Hardware, Precision

SPLIT = 256  # tokens of one item of the decode kernel; kernels/triton/decode_attention.py
INDEX_BYTES = 4  # of a block id, a slot, a token id
FLOAT_BYTES = 4


@dataclass(frozen=True)
class WeightFormat:
    """How the matrices [n, k] of linear layers are held.

    `group_size` inputs share `group_bytes` of scale (and zero point); 0: all inputs of an output share them.
    `precision` is what a product is computed in; a format with `quantizes_inputs` first writes its inputs as
    fp8, one scale per token.
    """

    name: str
    bits: int
    group_size: int
    group_bytes: int
    precision: Precision = "bf16"
    quantizes_inputs: bool = False

    def matrix_bytes(self, outputs: int, inputs: int) -> int:
        """Memory of one matrix, scales included."""
        groups = -(-inputs // self.group_size) if self.group_size else 1
        return outputs * inputs * self.bits // 8 + outputs * groups * self.group_bytes


FLOAT32 = WeightFormat("float32", 32, 0, 0, precision="float32")
BF16 = WeightFormat("bf16", 16, 0, 0)  # and float16
FP8 = WeightFormat("fp8", 8, 0, 4, precision="fp8", quantizes_inputs=True)
INT8 = WeightFormat("int8", 8, 128, 2)
INT4 = WeightFormat("int4", 4, 32, 4)  # scale and minimum
WEIGHTS = (BF16, FP8, INT8, INT4)


@dataclass(frozen=True)
class KVFormat:
    """How the KV cache holds numbers; `scale_bytes` per token and KV head, for K and again for V."""

    name: str
    element_bytes: int
    scale_bytes: int = 0

    def bytes_per_token(self, num_kv_heads: int, head_dim: int) -> int:
        """K and V of one token in one layer."""
        return 2 * num_kv_heads * (head_dim * self.element_bytes + self.scale_bytes)


KV_FLOAT32 = KVFormat("float32", 4)
KV_BF16 = KVFormat("bf16", 2)  # and float16
KV_FP8 = KVFormat("fp8", 1, FLOAT_BYTES)
KV_INT8 = KVFormat("int8", 1, FLOAT_BYTES)


@dataclass(frozen=True)
class Cost:
    """Bytes and flops of one kernel, or of the same kernel over several layers.

    must_bytes: each input once, each output once. moved_bytes: what the kernel's programs load and store, of
    which `cached_bytes` are read again while they are in the L2 cache. flops: those that count, without
    padding.
    """

    must_bytes: int
    moved_bytes: int
    flops: int
    precision: Precision = "float32"
    cached_bytes: int = 0

    def times(self, count: int) -> Cost:
        """The same work `count` times."""
        return replace(
            self,
            must_bytes=self.must_bytes * count,
            moved_bytes=self.moved_bytes * count,
            flops=self.flops * count,
            cached_bytes=self.cached_bytes * count,
        )

    def seconds(self, gpu: Hardware) -> float:
        """Expected time: memory or arithmetic, whichever takes longer, at the GPU's peak."""
        memory = (self.moved_bytes - self.cached_bytes) / gpu.bandwidth
        return max(memory, self.flops / gpu.peak(self.precision))

    def least_seconds(self, gpu: Hardware) -> float:
        """The same for a kernel that moves no byte more than it must."""
        return max(self.must_bytes / gpu.bandwidth, self.flops / gpu.peak(self.precision))


@dataclass(frozen=True)
class Heads:
    """The shape of attention: H query heads over KV heads, of D dimensions each."""

    num_heads: int
    num_kv_heads: int
    head_dim: int

    @classmethod
    def of(cls, config: ModelConfig) -> Heads:
        return cls(config.num_heads, config.num_kv_heads, config.head_dim)

    @property
    def group_size(self) -> int:
        return self.num_heads // self.num_kv_heads


@dataclass(frozen=True)
class Formats:
    """How numbers are held: linear layers, vocabulary matrices, KV cache, activations.

    `activation_bytes`: of each number that passes through memory from one kernel to the next; 0 where a
    processor's caches hold them, as on CPUs, which multiply them in float32.
    """

    weights: WeightFormat = BF16
    head: WeightFormat = BF16
    kv: KVFormat = KV_BF16
    activation_bytes: int = 2
    block_size: int = 16

    @property
    def attention_precision(self) -> Precision:
        """What queries are multiplied in with K and V."""
        return "bf16" if self.activation_bytes == 2 else "float32"

    @classmethod
    def quantized(cls, weights: WeightFormat, kv: KVFormat = KV_BF16) -> Formats:
        """As --quantization: with layers in fewer bits, vocabulary matrices are in int8."""
        return cls(weights, head=BF16 if weights is BF16 else INT8, kv=kv)


DEFAULT = Formats()


def decode_attention(
    heads: Heads, context_lens: Sequence[int], formats: Formats = DEFAULT, window: int | None = None
) -> Cost:
    """One new token per request over its `context_len` tokens, that one included; splits and their merge.

    K and V of the tokens in the window are read once for all heads of a group. Each split reads the queries
    again; where a request has several, each writes float32 values, a maximum and a sum per head, and the
    merge reads them.
    """
    row_bytes = heads.num_heads * heads.head_dim * formats.activation_bytes
    partial_bytes = heads.num_heads * (heads.head_dim + 2) * FLOAT_BYTES
    must = moved = seen_tokens = again = 0
    for context_len in context_lens:
        first = 0 if window is None else max(0, context_len - window)
        seen = context_len - first
        table = _table_bytes(first, context_len, formats.block_size)
        kv = seen * formats.kv.bytes_per_token(heads.num_kv_heads, heads.head_dim)
        splits = _tiles(first, context_len, SPLIT)
        repeated = (splits - 1) * row_bytes + (heads.num_kv_heads - 1) * table
        must += kv + table + 2 * row_bytes
        moved += kv + table + 2 * row_bytes + repeated
        if splits > 1:
            moved += 2 * splits * partial_bytes
        again += repeated
        seen_tokens += seen
    return Cost(
        must, moved, 4 * heads.num_heads * heads.head_dim * seen_tokens, formats.attention_precision, again
    )


def prefill_attention(
    heads: Heads,
    lens: Sequence[tuple[int, int]],
    formats: Formats = DEFAULT,
    window: int | None = None,
) -> Cost:
    """Chunks of new tokens, (query_len, context_len) per request, new ones included, causal.

    A tile of rows (tokens times the heads of a group) reads K and V from what its first token sees to its
    last token; what another tile of the request has read before is in the L2 cache.
    """
    row_bytes = heads.num_heads * heads.head_dim * formats.activation_bytes
    token_bytes = formats.kv.bytes_per_token(heads.num_kv_heads, heads.head_dim)
    tokens = prefill_tokens_per_tile(heads, formats.kv)
    must = moved = visible = 0
    for query_len, context_len in lens:
        computed = context_len - query_len
        first = 0 if window is None else max(0, computed + 1 - window)
        table = _table_bytes(first, context_len, formats.block_size)
        must += (context_len - first) * token_bytes + table + 2 * query_len * row_bytes
        moved += 2 * query_len * row_bytes
        for start in range(0, query_len, tokens):
            high = computed + min(start + tokens, query_len)
            low = 0 if window is None else max(0, computed + start + 1 - window)
            table = _table_bytes(low, high, formats.block_size)
            moved += (high - low) * token_bytes + table * heads.num_kv_heads
        visible += _visible(computed, query_len, window)
    flops = 4 * heads.num_heads * heads.head_dim * visible
    return Cost(must, moved, flops, formats.attention_precision, moved - must)


def prefill_tokens_per_tile(heads: Heads, kv: KVFormat) -> int:
    """How many tokens a tile of rows holds; kernels/triton/prefill_attention.py chooses."""
    rows = 128 if heads.head_dim <= 128 and kv.element_bytes <= 2 else 64
    return max(rows, heads.group_size) // heads.group_size


def rotate_and_write(num_tokens: int, heads: Heads, formats: Formats = DEFAULT, rotary_dim: int = 0) -> Cost:
    """Queries and keys rotated, K and V written into their slots; `rotary_dim` 0: no positions.

    Reads the row [(H + 2 KV) * D] and the angles, cosine and sine in float32; writes queries, K and V.
    """
    size = formats.activation_bytes
    read = (heads.num_heads + 2 * heads.num_kv_heads) * heads.head_dim * size + INDEX_BYTES
    angles = 2 * rotary_dim * FLOAT_BYTES
    written = heads.num_heads * heads.head_dim * size + formats.kv.bytes_per_token(
        heads.num_kv_heads, heads.head_dim
    )
    flops = 3 * (heads.num_heads + heads.num_kv_heads) * rotary_dim
    moved = num_tokens * (read + angles + written)
    return Cost(moved, moved, num_tokens * flops)


def rms_norm(num_tokens: int, hidden_size: int, formats: Formats = DEFAULT, *, add: bool = False) -> Cost:
    """RMSNorm of rows; with `add`, after adding them to the residual stream, which is written too."""
    rows = num_tokens * hidden_size
    moved = (4 if add else 2) * rows * formats.activation_bytes + hidden_size * FLOAT_BYTES
    return Cost(moved, moved, (5 if add else 4) * rows)


def gated_activation(num_tokens: int, intermediate_size: int, formats: Formats = DEFAULT) -> Cost:
    """activation(gate) * up: reads two numbers and writes one; the activation is counted as four flops."""
    rows = num_tokens * intermediate_size
    moved = 3 * rows * formats.activation_bytes
    return Cost(moved, moved, 5 * rows)


def linear(
    num_tokens: int,
    inputs: int,
    outputs: int,
    formats: Formats = DEFAULT,
    weights: WeightFormat | None = None,
    *,
    bias: bool = False,
) -> Cost:
    """x [T, k] -> x W^T [T, n]. `weights` is the matrix's format, `formats.weights` unless given.

    In fp8 the inputs are quantized by a kernel of their own, whose result is written and read. In int8 and
    int4 a product of few rows is cut along its inputs, and the parts are added by a second kernel.
    """
    weights = weights or formats.weights
    x, y = num_tokens * inputs, num_tokens * outputs
    must = weights.matrix_bytes(outputs, inputs) + (x + y) * formats.activation_bytes
    must += outputs * FLOAT_BYTES if bias else 0
    moved = must
    if weights.quantizes_inputs:
        moved += 2 * (x + num_tokens * FLOAT_BYTES)
    splits = product_splits(num_tokens, inputs, outputs, weights)
    if splits > 1:
        moved += 2 * splits * y * FLOAT_BYTES
    return Cost(must, moved, 2 * x * outputs, weights.precision)


def product_splits(num_tokens: int, inputs: int, outputs: int, weights: WeightFormat) -> int:
    """Parts of a product of int8 or int4 weights, enough to fill a GPU; quantized_linear.py chooses."""
    if not weights.group_size or num_tokens > 64:
        return 1
    steps = -(-inputs // (weights.group_size * 8 // weights.bits))
    return max(1, min(256 // -(-outputs // 64), steps // 4, 8))


def embed(num_tokens: int, hidden_size: int, formats: Formats = DEFAULT) -> Cost:
    """Rows of the embedding copied."""
    moved = num_tokens * (2 * hidden_size * formats.activation_bytes + INDEX_BYTES)
    return Cost(moved, moved, 0)


def logits(num_rows: int, config: ModelConfig, formats: Formats = DEFAULT) -> Cost:
    """hidden [R, E] -> logits [R, V]: the product in the activations' dtype, then widened to float32."""
    product = linear(num_rows, config.hidden_size, config.vocab_size, formats, formats.head)
    numbers = num_rows * config.vocab_size
    widened = numbers * FLOAT_BYTES
    must = product.must_bytes - numbers * formats.activation_bytes + widened
    moved = product.moved_bytes + numbers * formats.activation_bytes + widened
    return replace(product, must_bytes=must, moved_bytes=moved)


def sample(
    num_rows: int, vocab_size: int, *, draw: bool = False, top_k: bool = False, top_p: bool = False
) -> Cost:
    """Logits [R, V] float32 -> tokens [R]: the largest in one pass over them; a draw in two.

    A draw looks for the smallest logit that a filter keeps, four bits in a pass: 8 passes for top-k, and one
    more for top-p, each of which compares every logit with 16 bounds.
    """
    numbers = num_rows * vocab_size
    searches = (8 * top_k + 8 * top_p) if draw else 0
    passes = 1 + (1 + searches + top_p if draw else 0)
    must = numbers * FLOAT_BYTES + num_rows * INDEX_BYTES
    return Cost(must, must + (passes - 1) * numbers * FLOAT_BYTES, numbers * (passes + 32 * searches))


def _tiles(first: int, end: int, size: int) -> int:
    """How many tiles of `size` positions, counted from position 0, overlap [first, end)."""
    return -(-end // size) - first // size


def _table_bytes(first: int, end: int, block_size: int) -> int:
    """Ids of the blocks that hold positions [first, end)."""
    return _tiles(first, end, block_size) * INDEX_BYTES


def _visible(computed: int, query_len: int, window: int | None) -> int:
    """Sum over new tokens of the positions each sees: computed + 1, + 2, ..., at most `window`."""
    last = computed + query_len
    if window is None:
        return query_len * (computed + 1 + last) // 2
    growing = max(0, min(last, window) - computed)  # tokens that see everything before them
    return growing * (2 * computed + 1 + growing) // 2 + (query_len - growing) * window
