"""Loading: what is missing, unexpected or misshapen is said; what is left out is left out knowingly."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tiny import tiny_model

from gqa_serve.engine.backends.base import Backend, Linear, Packed, Role
from gqa_serve.engine.backends.reference import ReferenceBackend
from gqa_serve.engine.model_config import ModelConfig
from gqa_serve.engine.models import FAMILIES, family_of
from gqa_serve.engine.models.decoder import Decoder
from gqa_serve.engine.models.family import parameter_shapes, weight_slots
from gqa_serve.engine.models.loader import load_model
from gqa_serve.errors import ModelError

CPU = torch.device("cpu")


class Tensors:
    """A checkpoint of tensors in memory."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        self.named = list(tensors.items())

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(tensor.shape) for name, tensor in self.named}

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        yield from self.named


@pytest.fixture(scope="module")
def llama() -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    model = tiny_model("llama")
    return model.state_dict(), model.config.to_dict()


def load(
    tensors: dict[str, torch.Tensor] | Tensors,
    raw: dict[str, Any],
    dtype: torch.dtype = torch.float32,
    backend: Backend | None = None,
    **options: Any,
) -> Decoder:
    source = tensors if isinstance(tensors, Tensors) else Tensors(tensors)
    backend = backend or ReferenceBackend(CPU, dtype)
    return load_model(source, ModelConfig.from_hf(raw), device=CPU, backend=backend, **options)


class Observed(ReferenceBackend):
    """The reference, remembering what it was given."""

    def __init__(self) -> None:
        super().__init__(CPU, torch.float32)
        self.packed: list[tuple[Role, torch.Size]] = []
        self.joined: list[tuple[list[int], int | None]] = []

    def pack(self, weight: Any, role: Role) -> Packed:
        self.packed.append((role, weight.shape))
        return super().pack(weight, role)

    def linear(self, parts: Any, bias: torch.Tensor | None) -> Linear:
        self.joined.append(([part.tensor.shape[0] for part in parts], None if bias is None else len(bias)))
        assert bias is None or bias.dtype == torch.float32
        return super().linear(parts, bias)


def test_progress_and_size(llama: Any) -> None:
    tensors, raw = llama
    seen: list[str] = []
    decoder = load(tensors, raw, on_tensor=seen.append, dtype=torch.bfloat16)
    assert seen == list(tensors)
    norms = sum(t.numel() for t in tensors.values() if t.dim() == 1)
    matrices = sum(t.numel() for t in tensors.values() if t.dim() == 2)
    assert decoder.weight_bytes == norms * 4 + matrices * 2
    assert decoder.weight_formats == {"bfloat16": matrices * 2, "float32": norms * 4}
    assert list(decoder.weight_formats) == ["bfloat16", "float32"]


@pytest.mark.parametrize("tied", [False, True])
def test_each_matrix_is_packed_by_its_role_and_joined_in_row_order(tied: bool) -> None:
    model = tiny_model("qwen2", tie_word_embeddings=tied)
    tensors = dict(reversed(model.state_dict().items()))
    if tied:
        del tensors["lm_head.weight"]
    backend = Observed()
    decoder = load(tensors, model.config.to_dict(), backend=backend)
    assert [shape for role, shape in backend.packed if role == "head"] == [(128, 64)]
    assert [role for role, _ in backend.packed].count("embedding") == (not tied)
    assert [role for role, _ in backend.packed].count("linear") == 4 * 7
    assert backend.joined == [([64, 32, 32], 128), ([64], None), ([96, 96], None), ([64], None)] * 4 + [
        ([128], None)
    ]
    expected = model.state_dict()["model.layers.2.self_attn.k_proj.weight"]
    assert torch.equal(decoder.layers[2].attention.qkv.weight[64:96], expected)  # type: ignore[attr-defined]
    head = decoder.lm_head.weight  # type: ignore[attr-defined]
    assert torch.equal(head, model.state_dict()["lm_head.weight"])
    assert (head.data_ptr() == decoder.embedding.tensor.data_ptr()) == tied  # type: ignore[attr-defined]


def test_numbers_that_the_backend_refuses_are_named(llama: Any) -> None:
    tensors, raw = llama

    class Strict(ReferenceBackend):
        def pack(self, weight: Any, role: Role) -> Packed:
            if weight.isnan().any():
                raise ValueError("holds NaN")
            return super().pack(weight, role)

    name = "model.layers.1.mlp.up_proj.weight"
    damaged = {**tensors, name: tensors[name].clone().fill_(torch.nan)}
    with pytest.raises(ModelError, match=r"Tensor model\.layers\.1\.mlp\.up_proj\.weight holds NaN"):
        load(damaged, raw, backend=Strict(CPU, torch.float32))


def test_order_of_tensors_does_not_matter(llama: Any) -> None:
    tensors, raw = llama
    decoder = load(dict(reversed(tensors.items())), raw)
    assert torch.equal(decoder.embedding.tensor, tensors["model.embed_tokens.weight"])


def test_left_out_knowingly(llama: Any) -> None:
    tensors, raw = llama
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}
    load({**tensors, **extra}, raw)
    tied = load(tensors, {**raw, "tie_word_embeddings": True})
    assert tied.config.tie_embeddings


def test_missing_tensors_are_named(llama: Any) -> None:
    tensors, raw = llama
    less = {name: tensor for name, tensor in tensors.items() if "layers.2.mlp.up" not in name}
    with pytest.raises(
        ModelError, match=r"lacks tensor model\.layers\.2\.mlp\.up_proj\.weight that llama needs"
    ):
        load(less, raw)
    with pytest.raises(ModelError, match=r"lacks 39 tensors \(.*, \.\.\.\)"):
        load({}, raw)


def test_unexpected_tensors_are_named(llama: Any) -> None:
    tensors, raw = llama
    more = {**tensors, "model.layers.0.self_attn.q_proj.bias": torch.zeros(64)}
    with pytest.raises(ModelError, match=r"holds tensor model\.layers\.0\.self_attn\.q_proj\.bias"):
        load(more, raw)


def test_wrong_shape_and_type_are_named(llama: Any) -> None:
    tensors, raw = llama
    name = "model.layers.1.self_attn.k_proj.weight"
    with pytest.raises(ModelError, match=r"k_proj\.weight has shape \[64, 64\].* describes \[32, 64\]"):
        load({**tensors, name: torch.zeros(64, 64)}, raw)
    with pytest.raises(ModelError, match=r"k_proj\.weight holds int8 numbers"):
        load({**tensors, name: torch.zeros(32, 64, dtype=torch.int8)}, raw)


def test_a_tensor_that_comes_twice(llama: Any) -> None:
    tensors, raw = llama
    source = Tensors(tensors)
    source.named.append(("model.norm.weight", tensors["model.norm.weight"]))
    with pytest.raises(ModelError, match=r"model\.norm\.weight twice"):
        load(source, raw)


def test_a_config_of_too_many_layers_or_too_large_a_vocabulary_takes_no_memory(
    llama: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors, raw = llama

    def no_memory(*args: object, **kwargs: object) -> None:
        raise AssertionError("allocated before the names were compared")

    monkeypatch.setattr(torch, "empty", no_memory)
    with pytest.raises(ModelError, match=r"lacks \d+ tensors \(model\.layers\.10"):
        load(tensors, {**raw, "num_hidden_layers": 1000})
    with pytest.raises(
        ModelError, match="num_hidden_layers must be a positive integer, at most 4096, got 1000"
    ):
        load(tensors, {**raw, "num_hidden_layers": 1_000_000_000})
    with pytest.raises(ModelError, match=r"embed_tokens\.weight has shape \[128, 64\]"):
        load(tensors, {**raw, "vocab_size": 2**31 - 1})


def test_a_tensor_that_the_headers_name_but_the_file_lacks(llama: Any) -> None:
    tensors, raw = llama

    class Short(Tensors):
        def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
            yield from self.named[:-1]

    with pytest.raises(ModelError, match="did not hand out tensor"):
        load(Short(tensors), raw)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_slots_tile_every_parameter(family: Any) -> None:
    raw = {
        "architectures": [family.architectures[0]],
        "vocab_size": 20,
        "hidden_size": 24,
        "intermediate_size": 10,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "attention_bias": True,
        "mlp_bias": True,
        "tie_word_embeddings": False,
    }
    config = ModelConfig.from_hf({**raw, "text_config": raw})
    assert family_of(config.architecture) is family
    for prefix in family.prefixes:
        slots = weight_slots(config, family, prefix).values()
        for parameter, shape in parameter_shapes(config, family.names).items():
            parts = sorted({(slot.row, slot.shape) for slot in slots if slot.parameter == parameter})
            assert [row for row, _ in parts] == [sum(s[0] for _, s in parts[:i]) for i in range(len(parts))]
            assert sum(part[0] for _, part in parts) == shape[0]
