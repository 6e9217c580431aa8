"""How published tools store a quantized matrix: AWQ, GPTQ, compressed-tensors and fp8.

Owns the reading of `quantization_config` and the layouts of the tensors that make one matrix. Does not know
files (`quantized_checkpoint.py`) or what backends compute with.
Invariant: what is not known to be understood is refused, in a sentence that names the format and a cure.

    AWQ      qweight [k, n / 8] int32     of eight outputs, output ORDER[i] at bits 4i
             qzeros [groups, n / 8]       packed alike; weight = scale * (code - zero)
    GPTQ     qweight [k / p, n] int32     p = 32 / bits inputs of an output, the first in the lowest bits
             qzeros [groups, n / p]       packed along the outputs, less 1 in the first version of the format
             g_idx [k]                    each input's group
    pack-quantized    weight_packed [n, k / p] int32, weight_zero_point [n / p, groups]
    float- and int-quantized, fp8        weight [n, k] float8_e4m3fn or int8

    scales    [groups, n] in AWQ and GPTQ, else [n, groups], [n, 1] or a single number
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from gqa_serve.engine.weights.quantized_matrix import GroupedTensor
from gqa_serve.errors import ModelError, UnsupportedModelError

if TYPE_CHECKING:
    import torch

_AWQ_PLACES = (
    0,
    4,
    1,
    5,
    2,
    6,
    3,
    7,
)  # where outputs 0 .. 7 lie in a word: the inverse of ORDER 0 2 4 6 1 3 5 7
_CURE = "use the unquantized checkpoint, or a GGUF file"

Shape = tuple[int, ...]


class QuantizedFormat(ABC):
    """One way to store a matrix as several tensors `module.suffix`.

    A module that has the tensor `key` is quantized. `parts` are the suffixes that are read, True for those
    that must be there; `unused` those that serving does not need: scales of activations and of K and V, which
    we take from the numbers themselves.
    """

    key: str
    parts: Mapping[str, bool]
    unused: frozenset[str] = frozenset()
    invents_biases = False
    """Whether tools wrote biases of zeros where the model has none."""

    @abstractmethod
    def shape(self, shapes: Mapping[str, Shape]) -> tuple[int, int]:
        """(n, k) of the matrix, from the shapes of its parts by suffix."""

    @abstractmethod
    def unpack(self, parts: Mapping[str, torch.Tensor], shape: tuple[int, int]) -> GroupedTensor:
        """The numbers, on the device that the parts are on. Raises ValueError for parts that do not fit."""


class Awq(QuantizedFormat):
    """AutoAWQ's "gemm" layout: 4 bits with zero points."""

    key = "qweight"
    parts: Mapping[str, bool] = {"qweight": True, "qzeros": True, "scales": True}

    def __init__(self, group: int) -> None:
        self.group = group

    def shape(self, shapes: Mapping[str, Shape]) -> tuple[int, int]:
        k, words = _matrix(shapes["qweight"])
        return words * 8, k

    def unpack(self, parts: Mapping[str, torch.Tensor], shape: tuple[int, int]) -> GroupedTensor:
        codes, zero = (_awq_codes(parts[name]).t() for name in ("qweight", "qzeros"))
        return _integers(4, self.group, codes, parts["scales"].t(), zero, shape)


class Gptq(QuantizedFormat):
    """4 or 8 bits with zero points; `first` version: the zeros are stored less 1."""

    invents_biases = True
    key = "qweight"
    parts: Mapping[str, bool] = {"qweight": True, "qzeros": True, "scales": True, "g_idx": False}

    def __init__(self, bits: int, group: int, first: bool) -> None:
        self.bits = bits
        self.group = group
        self.first = first

    def shape(self, shapes: Mapping[str, Shape]) -> tuple[int, int]:
        words, n = _matrix(shapes["qweight"])
        return n, words * (32 // self.bits)

    def unpack(self, parts: Mapping[str, torch.Tensor], shape: tuple[int, int]) -> GroupedTensor:
        codes = _codes(parts["qweight"].t(), self.bits)  # [n, k]
        zero = _codes(parts["qzeros"], self.bits).t()  # [n, groups]
        if self.first:
            zero = (zero + 1) & ((1 << self.bits) - 1)
        scale, group = parts["scales"].t(), self.group
        order = parts.get("g_idx")
        if order is not None and not _in_order(order, group or shape[1]):
            # desc_act: the inputs of a group lie apart, so that each is given its scale.
            scale, zero, group = scale[:, order.long()], zero[:, order.long()], 1
        return _integers(self.bits, group, codes, scale, zero, shape)


class PackQuantized(QuantizedFormat):
    """compressed-tensors' packed integers; codes and zero points are signed numbers plus 2^(bits - 1)."""

    key = "weight_packed"
    parts: Mapping[str, bool] = {
        "weight_packed": True, "weight_scale": True, "weight_zero_point": False, "weight_g_idx": False,
    }  # fmt: skip
    unused = frozenset({"weight_shape", "input_scale", "output_scale", "q_scale", "k_scale", "v_scale"})

    def __init__(self, bits: int, group: int) -> None:
        self.bits = bits
        self.group = group

    def shape(self, shapes: Mapping[str, Shape]) -> tuple[int, int]:
        n, words = _matrix(shapes["weight_packed"])
        return n, words * (32 // self.bits)

    def unpack(self, parts: Mapping[str, torch.Tensor], shape: tuple[int, int]) -> GroupedTensor:
        codes = _codes(parts["weight_packed"], self.bits)
        scale, group, zero = parts["weight_scale"], self.group, None
        if "weight_zero_point" in parts:
            zero = _codes(parts["weight_zero_point"].t(), self.bits).t()[: shape[0]]
        order = parts.get("weight_g_idx")
        if order is not None and not _in_order(order, group or shape[1]):
            scale, group = scale[:, order.long()], 1
            zero = None if zero is None else zero[:, order.long()]
        return _integers(self.bits, group, codes, scale, zero, shape)


class PlainQuantized(QuantizedFormat):
    """One number an element, float8_e4m3fn or int8: compressed-tensors' float- and int-quantized, and fp8.

    The scale is a number, one per output, per group of inputs, or (`block` [rows, inputs]) per block of both.
    """

    unused = frozenset(
        {
            "input_scale",
            "input_zero_point",
            "output_scale",
            "q_scale",
            "k_scale",
            "v_scale",
            "kv_scale",
        }
    )

    def __init__(self, key: str, block: tuple[int, int] | None = None, group: int = 0) -> None:
        self.key = key
        self.group = group
        self.parts = {"weight": True, key: True, "weight_zero_point": False}
        self.block = block

    def shape(self, shapes: Mapping[str, Shape]) -> tuple[int, int]:
        return _matrix(shapes["weight"])

    def unpack(self, parts: Mapping[str, torch.Tensor], shape: tuple[int, int]) -> GroupedTensor:
        import torch

        weight, scale, group = parts["weight"], parts[self.key], shape[1]
        if self.block is not None:
            scale, group = scale.repeat_interleave(self.block[0], dim=0)[: shape[0]], self.block[1]
        scale = scale.reshape(-1, 1) if scale.dim() < 2 else scale
        if self.block is None and scale.shape[1] > 1:
            group = self.group or -(-shape[1] // scale.shape[1])
        if scale.shape[0] not in (1, shape[0]):
            raise ValueError(f"has scales of shape {list(scale.shape)}; {_CURE}")
        scale = scale.expand(shape[0], -1)
        if weight.dtype == torch.float8_e4m3fn:
            _check_scales(scale, group, shape)
            return GroupedTensor(8, group, weight, scale)
        if weight.dtype != torch.int8:
            raise ValueError(f"is stored as {_name(weight)}, not as float8_e4m3fn or int8; {_CURE}")
        zero = parts.get("weight_zero_point")
        if zero is not None:
            zero = (zero.reshape(-1, scale.shape[1]).to(torch.int8).view(torch.uint8) ^ 128).expand_as(scale)
        return _integers(8, group, weight.view(torch.uint8) ^ 128, scale, zero, shape)


def format_of(config: Mapping[str, Any], source: str) -> QuantizedFormat:
    """The format that a config.json's `quantization_config` describes; raises UnsupportedModelError."""
    method = config.get("quant_method")
    reader = _READERS.get(str(method).lower())
    if reader is None:
        raise UnsupportedModelError(
            f"{source}: quantization {method!r} is not served; {_CURE}, or one quantized as "
            "awq, gptq, compressed-tensors or fp8."
        )
    fields = _Fields(config, f"{source}: {method}")
    return reader(fields)


class _Fields:
    """A part of quantization_config, and the refusal of what it asks for."""

    def __init__(self, config: Mapping[str, Any], source: str) -> None:
        self.config = config
        self.source = source

    def one_of(self, name: str, *served: Any, default: Any = None) -> Any:
        value = self.config.get(name, default)
        value = value.lower() if isinstance(value, str) else value
        if value not in served:
            raise self.refused(f"{name} {value!r}", ", ".join(map(repr, served)))
        return value

    def group(self, name: str = "group_size") -> int:
        """Inputs of a group; 0 for all of them."""
        value = self.config.get(name)
        if value in (None, -1):
            return 0
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise self.refused(f"{name} {value!r}", "a number of inputs")
        return value

    def refused(self, what: str, served: str) -> UnsupportedModelError:
        return UnsupportedModelError(f"{self.source} with {what} is not served (only {served}); {_CURE}.")


def _awq(fields: _Fields) -> QuantizedFormat:
    fields.one_of("version", "gemm", default="gemm")
    fields.one_of("bits", 4)
    fields.one_of("zero_point", True, default=True)
    return Awq(fields.group())


def _gptq(fields: _Fields) -> QuantizedFormat:
    first = fields.one_of("checkpoint_format", "gptq", "gptq_v2", default="gptq") == "gptq"
    return Gptq(fields.one_of("bits", 4, 8), fields.group(), first)


def _fp8(fields: _Fields) -> QuantizedFormat:
    fields.one_of("fmt", "e4m3", "float8_e4m3fn", default="e4m3")
    block = fields.config.get("weight_block_size")
    if block is None:
        return PlainQuantized("weight_scale")
    if (
        not isinstance(block, list)
        or len(block) != 2
        or not all(type(side) is int and side > 0 for side in block)
    ):
        raise fields.refused(f"weight_block_size {block!r}", "two numbers")
    return PlainQuantized("weight_scale_inv", (block[0], block[1]))


def _compressed_tensors(fields: _Fields) -> QuantizedFormat:
    groups = fields.config.get("config_groups")
    weights = [group.get("weights") for group in groups.values()] if isinstance(groups, Mapping) else []
    if not weights or not all(isinstance(weight, Mapping) for weight in weights):
        raise fields.refused("no weights in config_groups", "quantized weights")
    if any(weight != weights[0] for weight in weights):
        raise fields.refused("different weights in its config_groups", "one kind for all")
    sparsity = fields.config.get("sparsity_config") or {}
    if sparsity.get("format", "dense") != "dense" or fields.config.get("transform_config"):
        raise fields.refused(
            "a sparsity_config or transform_config", "weights that are quantized and no more"
        )
    stored = fields.one_of(
        "format",
        "pack-quantized",
        "float-quantized",
        "int-quantized",
        "naive-quantized",
        default="pack-quantized",
    )
    weight = _Fields(weights[0], fields.source)
    default = "group" if weight.group() else "channel"
    strategy = weight.one_of("strategy", "tensor", "channel", "group", "block", default=default)
    group = weight.group() if strategy == "group" else 0
    if stored == "pack-quantized":
        weight.one_of("type", "int", default="int")
        weight.one_of("strategy", "channel", "group", default=default)
        return PackQuantized(weight.one_of("num_bits", 4, 8), group)
    weight.one_of("num_bits", 8)
    if strategy != "block":
        return PlainQuantized("weight_scale", group=group)
    block = weight.config.get("block_structure")
    if not isinstance(block, list) or len(block) != 2:
        raise fields.refused(f"block_structure {block!r}", "two numbers")
    return PlainQuantized("weight_scale", (int(block[0]), int(block[1])))


_READERS = {"awq": _awq, "gptq": _gptq, "fp8": _fp8, "compressed-tensors": _compressed_tensors}


def _matrix(shape: Shape) -> tuple[int, int]:
    if len(shape) != 2:
        raise ModelError(f"has the shape {list(shape)}, not that of a matrix")
    return shape[0], shape[1]


def _codes(words: torch.Tensor, bits: int) -> torch.Tensor:
    """int32 [.., w] -> uint8 [.., w * 32 / bits], the lowest bits first."""
    import torch

    if words.dtype != torch.int32:
        raise ValueError(f"is packed in {_name(words)}, not in int32; {_CURE}")
    octets = words.contiguous().view(torch.uint8)  # in memory the lowest byte comes first
    return octets if bits == 8 else torch.stack((octets & 15, octets >> 4), dim=-1).flatten(-2)


def _awq_codes(words: torch.Tensor) -> torch.Tensor:
    """int32 [.., w] -> uint8 [.., w * 8], outputs in their own order."""
    codes = _codes(words, 4)
    return codes.view(*words.shape, 8)[..., _AWQ_PLACES].flatten(-2)


def _in_order(order: torch.Tensor, group: int) -> bool:
    """Whether each input's group is the one it would have if groups were runs of inputs."""
    import torch

    return torch.equal(order.long(), torch.arange(order.numel(), device=order.device) // group)


def _integers(
    bits: int,
    group: int,
    codes: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    shape: tuple[int, int],
) -> GroupedTensor:
    """Codes [n, k], scale and zero [n, groups]; group 0: one for all. Zeros all in the middle are dropped."""
    group = group or shape[1]
    codes = codes[:, : shape[1]]
    _check_scales(scale, group, shape)
    if zero is not None:
        _check_scales(zero, group, shape)
        if bool((zero == 1 << (bits - 1)).all()):
            zero = None
    return GroupedTensor(bits, group, codes, scale, zero)


def _check_scales(values: torch.Tensor, group: int, shape: tuple[int, int]) -> None:
    expected = (shape[0], -(-shape[1] // group))
    if tuple(values.shape) != expected:
        raise ValueError(f"has scales or zeros of shape {list(values.shape)}, not {list(expected)}; {_CURE}")


def _name(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
