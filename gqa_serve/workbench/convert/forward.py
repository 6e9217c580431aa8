"""The model and its conversions over a text, with one layer's weights in memory at a time.

Owns the pass: each layer is read once, computed for the original and for every conversion that is compared
(which differ in attention alone, and each has hidden states of its own), and let go. The original's keys and
values of a layer decide how it is merged before the conversions compute it. Knows no files but the source.
Invariant: memory is one layer in float32, one converted attention, and the hidden states [T, E] of each
variant.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, cast

import torch
import torch.nn.functional as F

from gqa_serve.engine.backends.base import AttentionLayout, AttentionStep, HeadNorms
from gqa_serve.engine.backends.reference import ReferenceBackend
from gqa_serve.engine.models.attention import Attention
from gqa_serve.engine.models.family import WeightSlot, parameter_shapes
from gqa_serve.engine.models.layers import DecoderLayer
from gqa_serve.engine.models.loader import load_tensor
from gqa_serve.engine.models.parameters import Loaded, Parameters
from gqa_serve.workbench.convert.heads import LayerMerge, convert_tensor, converted_shape
from gqa_serve.workbench.convert.methods import KeysAndValues, Method, plan_layer, read_back
from gqa_serve.workbench.convert.source import Source
from gqa_serve.workbench.uptrain.backend import NoCache, PackedAttentionStep, packed_batch

if TYPE_CHECKING:
    from gqa_serve.engine.batch import ForwardBatch
    from gqa_serve.engine.kv_cache import KVCache
    from gqa_serve.engine.model_config import ModelConfig
    from gqa_serve.workbench.uptrain.backend import TrainingBackend

_CHUNK_TOKENS = 1024  # computed at once: bounds the activations of the MLP
_LOGIT_ROWS = 128


@dataclass(frozen=True)
class CalibrationText:
    """Windows of equal length. The first `num_fitted` are what groups and fits are found on; errors and
    losses are of the others, which no fit has seen. tokens [windows, length]."""

    tokens: torch.Tensor
    num_fitted: int
    name: str


@dataclass
class Variant:
    """The original (method None) or a conversion. Errors are relative squared errors of reading back the
    original's keys and values, per layer; NaN where that has no meaning."""

    method: Method | None
    merges: list[LayerMerge] = field(default_factory=list)
    k_errors: list[float] = field(default_factory=list)
    v_errors: list[float] = field(default_factory=list)
    loss: float = math.nan
    """Mean negative log-likelihood of a token of the held-out windows, nats."""


def measure(
    source: Source,
    num_kv_heads: int,
    methods: Sequence[Method],
    text: CalibrationText,
    seed: int,
    on_layer: Callable[[int], None],
) -> list[Variant]:
    """The original and each method's conversion over `text`; `on_layer(number)` after each layer."""
    with torch.inference_mode():
        return _Pass(source, num_kv_heads, methods, text, seed).run(on_layer)


class _Recorder(PackedAttentionStep):
    """Attention that keeps what K and V came out of the projection."""

    seen: KeysAndValues | None = None
    norms: HeadNorms | None = None

    def rotate_and_write(self, layer: int, qkv: torch.Tensor, norms: HeadNorms | None) -> torch.Tensor:
        heads = qkv.view(qkv.shape[0], -1, self.layout.head_dim)
        _, k, v = heads.split_with_sizes(self.split, 1)
        self.seen, self.norms = KeysAndValues(k.clone(), v.clone()), norms
        return super().rotate_and_write(layer, qkv, norms)


class _Backend(ReferenceBackend):
    """The reference, with attention over packed texts, which needs no cache."""

    def prepare(self, batch: ForwardBatch, cache: KVCache, layout: AttentionLayout) -> AttentionStep:
        return _Recorder(batch, layout, cast("TrainingBackend", self))


class _Pass:
    def __init__(
        self, source: Source, num_kv_heads: int, methods: Sequence[Method], text: CalibrationText, seed: int
    ) -> None:
        self.source = source
        self.config = source.config
        self.num_kv_heads = num_kv_heads
        self.text = text
        self.seed = seed
        self.device = torch.device("cpu")
        self.backend = _Backend(self.device, torch.float32)
        self.variants = [Variant(None), *(Variant(method) for method in methods)]
        windows, length = text.tokens.shape
        self.per_chunk = max(1, _CHUNK_TOKENS // length)
        self.fitted_rows = text.num_fitted * length
        self.num_rows = windows * length

    def run(self, on_layer: Callable[[int], None]) -> list[Variant]:
        outer = self._load(None, self.config, dict(self._tensors(None)))
        table = outer.matrices["embed.weight"][0]
        start = self.backend.embed(table, self.text.tokens.flatten(), self.config.embedding_scale)
        streams = [start.clone() for _ in self.variants]
        del start, table, outer
        for layer in range(self.config.num_layers):
            self._layer(layer, streams)
            on_layer(layer)
        outer = self._load(None, self.config, dict(self._tensors(None)))
        parameters = Parameters(outer, self.backend)
        norm = parameters.norm("norm")
        head = (
            self.backend.linear([parameters.matrix("embed")], None)
            if self.config.tie_embeddings
            else parameters.linear("lm_head")
        )
        for variant, stream in zip(self.variants, streams, strict=True):
            hidden = self.backend.rms_norm(stream[self.fitted_rows :], norm, self.config.norm_eps)
            variant.loss = self._loss(hidden, head)
        return self.variants

    def _tensors(self, layer: int | None) -> Iterator[tuple[str, tuple[WeightSlot, torch.Tensor]]]:
        """Copies, because a tensor may alias a mapping that ends with the next one."""
        for name, slot, tensor in self.source.tensors(layer):
            yield name, (slot, tensor.clone())

    def _load(
        self, layer: int | None, config: ModelConfig, tensors: dict[str, tuple[WeightSlot, torch.Tensor]]
    ) -> Loaded:
        """The tensors as parameters. `config` gives the shapes of vectors."""
        loaded = Loaded()
        wanted = {slot.parameter for slot, _ in tensors.values()}
        for name, shape in parameter_shapes(config, self.source.family.names).items():
            if name in wanted and len(shape) == 1:
                loaded.vectors[name] = torch.empty(shape)
        for name, (slot, tensor) in tensors.items():
            load_tensor(name, tensor, slot, config, self.backend, loaded)
        if config.norm_plus_one:
            for name, vector in loaded.vectors.items():
                if name.split(".")[-2].endswith("norm"):
                    vector.add_(1.0)
        return loaded

    def _layer(self, layer: int, streams: list[torch.Tensor]) -> None:
        """Compute one layer for all variants, in place of their residual streams."""
        tensors = dict(self._tensors(layer))
        parameters = Parameters(self._load(layer, self.config, tensors), self.backend)
        block = DecoderLayer(self.config, parameters.under(f"layers.{layer}"), 0, self.backend)
        attention = {name: pair for name, pair in tensors.items() if _is_attention(pair[0])}
        del tensors, parameters
        steps = self._advance(block, self._one_layer(layer, self.config), streams[0])
        seen = KeysAndValues(torch.cat([s.seen.k for s in steps]), torch.cat([s.seen.v for s in steps]))  # type: ignore[union-attr]
        norms = steps[0].norms
        fitted = KeysAndValues(seen.k[: self.fitted_rows], seen.v[: self.fitted_rows])
        keys = self._normed(fitted.k, norms)
        for variant, stream in zip(self.variants[1:], streams[1:], strict=True):
            method = cast("Method", variant.method)
            merge = plan_layer(method, self.config, layer, self.num_kv_heads, fitted, self.seed, keys)
            variant.merges.append(merge)
            self._note_errors(variant, merge, seen, norms)
            block.attention = self._attention(layer, attention, merge)
            config = replace(self.config, num_kv_heads=self.num_kv_heads)
            self._advance(block, self._one_layer(layer, config), stream)

    def _advance(self, block: DecoderLayer, config: ModelConfig, stream: torch.Tensor) -> list[_Recorder]:
        """One layer over all windows, some at a time."""
        layout = AttentionLayout.from_config(config, self.device)
        windows, length = self.text.tokens.shape
        steps = []
        for first in range(0, windows, self.per_chunk):
            part = self.text.tokens[first : first + self.per_chunk]
            batch = packed_batch(part.flatten(), [length] * len(part))
            residual = stream[first * length : (first + len(part)) * length]
            x = residual
            if block.attn_norm is not None:
                x = self.backend.rms_norm(residual, block.attn_norm, config.norm_eps)
            step = cast("_Recorder", self.backend.prepare(batch, cast("KVCache", NoCache()), layout))
            block(x, residual, None, step)
            steps.append(step)
        return steps

    def _one_layer(self, layer: int, config: ModelConfig) -> ModelConfig:
        return replace(config, num_layers=1, windows=(config.windows[layer],), ropes=(config.ropes[layer],))

    def _attention(
        self, layer: int, tensors: dict[str, tuple[WeightSlot, torch.Tensor]], merge: LayerMerge
    ) -> Attention:
        """The layer's attention after the conversion."""
        config = replace(self.config, num_kv_heads=self.num_kv_heads)
        converted = {}
        for name, (slot, tensor) in tensors.items():
            new = convert_tensor(slot, tensor, merge, self.config).float()
            q_rows, old = config.num_heads * config.head_dim, self.config.num_kv_heads * config.head_dim
            row = slot.row if slot.row <= q_rows else slot.row - old + config.num_kv_heads * config.head_dim
            assert new.shape == converted_shape(slot, self.config, self.num_kv_heads)
            converted[name] = (WeightSlot(slot.parameter, row, tuple(new.shape)), new)
        loaded = self._load(layer, config, converted)
        return Attention(config, Parameters(loaded, self.backend).under(f"layers.{layer}"), 0, self.backend)

    def _note_errors(
        self, variant: Variant, merge: LayerMerge, seen: KeysAndValues, norms: HeadNorms | None
    ) -> None:
        if merge.pooling == "random":
            variant.k_errors.append(math.nan)
            variant.v_errors.append(math.nan)
            return
        if merge.expands:
            variant.k_errors.append(0.0)
            variant.v_errors.append(0.0)
            return
        k, v = seen.k[self.fitted_rows :], seen.v[self.fitted_rows :]
        replaced = read_back(k, merge, merge.k)
        variant.k_errors.append(_relative(self._normed(k, norms), self._normed(replaced, norms)))
        variant.v_errors.append(_relative(v, read_back(v, merge, merge.v)))

    def _normed(self, keys: torch.Tensor, norms: HeadNorms | None) -> torch.Tensor:
        """Keys as they go into the rotation. [T, KV, D]."""
        if norms is None:
            return keys
        if norms.mode == "head":
            return self.backend.rms_norm(keys, norms.k, norms.eps)
        return self.backend.rms_norm(keys.flatten(1), norms.k, norms.eps).view(keys.shape)

    def _loss(self, hidden: torch.Tensor, head: object) -> float:
        """Mean over the held-out windows of all tokens but the first."""
        length = self.text.tokens.shape[1]
        wanted = self.text.tokens[self.text.num_fitted :]
        states = hidden.view(-1, length, hidden.shape[-1])[:, :-1].flatten(0, 1)
        targets = wanted[:, 1:].flatten()
        total = 0.0
        for rows, goal in zip(
            torch.split(states, _LOGIT_ROWS), torch.split(targets, _LOGIT_ROWS), strict=True
        ):
            logits = self.backend.logits(
                head,  # type: ignore[arg-type]
                rows,
                self.config.logits_scale,
                self.config.logits_soft_cap,
            )
            total += float(F.cross_entropy(logits, goal, reduction="sum"))
        return total / len(targets)


def _is_attention(slot: WeightSlot) -> bool:
    return slot.parameter.split(".")[-2] in ("qkv", "o", "q_norm", "k_norm")


def _relative(true: torch.Tensor, replaced: torch.Tensor) -> float:
    """|true - replaced|^2 / |true|^2."""
    difference = (true.double() - replaced.double()).square().sum()
    return float(difference / true.double().square().sum().clamp(min=1e-30))
