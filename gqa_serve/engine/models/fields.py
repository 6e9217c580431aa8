"""Reading a `config.json`: typed fields whose errors name the field, and the fields all families share.

Owns checking of single values and `common_fields`, the part of `ModelConfig` every family spells alike. Does
not know any family: each passes its own defaults, taken from the meaning its architecture gives an absent
field. Imports no torch.
Invariant: a value leaves this module with the type its reader names, or a ModelError was raised.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from gqa_serve.engine.model_config import Activation
from gqa_serve.errors import ModelError, UnsupportedModelError

_MISSING = object()
_ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
}
_DTYPES = ("float32", "bfloat16", "float16")
FULL, SLIDING = "full_attention", "sliding_attention"
# Larger numbers are damage. Without a bound, one number in a config.json could ask for all memory.
MOST = 2**31 - 1
MOST_LAYERS = 4096


class Fields:
    """A mapping read by field name. `defaults` stand in for absent fields, never for wrong ones."""

    def __init__(
        self,
        raw: Mapping[str, Any],
        *,
        defaults: Mapping[str, Any] | None = None,
        source: str = "config.json",
    ) -> None:
        if not isinstance(raw, Mapping):
            raise ModelError(f"{source} must hold a JSON object, got {type(raw).__name__}.")
        self.raw = raw
        self.defaults = defaults or {}
        self.source = source

    def get(self, name: str) -> Any:
        """The field as it is, its default if absent, None if there is neither."""
        return self.raw.get(name, self.defaults.get(name))

    def error(self, name: str, wanted: str) -> ModelError:
        """A ModelError saying what the field must be and what it is."""
        value = self.raw.get(name, self.defaults.get(name, _MISSING))
        got = "it is missing" if value is _MISSING else f"got {_short(value)}"
        return ModelError(f"{self.source}: {name} must be {wanted}, {got}.")

    def positive_int(self, name: str, *, most: int = MOST) -> int:
        """An integer from 1 to `most`."""
        value = self.get(name)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise self.error(name, "a positive integer")
        if value > most:
            raise self.error(name, f"a positive integer, at most {most}")
        return value

    def optional_positive_int(self, name: str) -> int | None:
        return None if self.get(name) is None else self.positive_int(name)

    def number(self, name: str, *, above: float = -math.inf) -> float:
        """A finite number greater than `above`."""
        value = self.get(name)
        if not _is_finite(value):
            raise self.error(name, "a number")
        if value <= above:
            raise self.error(name, f"a number greater than {above:g}")
        return float(value)

    def optional_number(self, name: str, *, above: float = -math.inf) -> float | None:
        return None if self.get(name) is None else self.number(name, above=above)

    def boolean(self, name: str) -> bool:
        """True or false; absent and null are false."""
        value = self.get(name)
        if value is not None and not isinstance(value, bool):
            raise self.error(name, "true or false")
        return bool(value)

    def numbers(self, name: str, length: int) -> tuple[float, ...]:
        """A list of exactly `length` numbers greater than 0."""
        value = self.get(name)
        good = isinstance(value, Sequence) and not isinstance(value, str) and len(value) == length
        if not good or not all(_is_finite(x) and x > 0 for x in value):
            raise self.error(name, f"a list of {length} numbers greater than 0")
        return tuple(float(x) for x in value)

    def token_ids(self, name: str, *, vocab_size: int | None = None) -> tuple[int, ...]:
        """One token id or a list of them; absent and null are none.

        With `vocab_size`, ids must be below it; a family's default beyond it means nothing and is left out.
        """
        value = self.get(name)
        ids = [] if value is None else value if isinstance(value, list) else [value]
        if any(isinstance(i, bool) or not isinstance(i, int) or i < 0 for i in ids):
            raise self.error(name, "a token id or a list of token ids")
        if vocab_size is not None and any(i >= vocab_size for i in ids):
            if name in self.raw:
                raise self.error(name, f"below the vocabulary size ({vocab_size})")
            ids = [i for i in ids if i < vocab_size]
        return tuple(ids)

    def unsupported(self, name: str, supported: str) -> UnsupportedModelError:
        """An UnsupportedModelError for an option that is well formed but not served."""
        return UnsupportedModelError(
            f"{self.source}: {name} = {_short(self.get(name))} is not supported; supported: {supported}."
        )


def _is_finite(value: object) -> bool:
    """True for a number that a float can hold (JSON's integers can be larger, and its NaN is read too)."""
    limit = sys.float_info.max
    return isinstance(value, int | float) and not isinstance(value, bool) and -limit <= value <= limit


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def common_fields(fields: Fields, *, activation: str = "hidden_act") -> dict[str, Any]:
    """The keyword arguments of ModelConfig that every family spells alike.

    An absent or null num_key_value_heads means one KV head per query head (MHA) unless the family's defaults
    say otherwise; an absent or null head_dim means hidden_size / num_attention_heads.
    """
    refuse_quantized(fields)
    num_heads = fields.positive_int("num_attention_heads")
    num_kv_heads = num_heads
    if fields.get("num_key_value_heads") is not None:
        num_kv_heads = fields.positive_int("num_key_value_heads")
        if num_heads % num_kv_heads:
            raise fields.error(
                "num_key_value_heads", f"a positive integer that divides num_attention_heads ({num_heads})"
            )
    bos = fields.token_ids("bos_token_id")
    vocab_size = fields.positive_int("vocab_size")
    return {
        "architecture": architecture_name(fields.raw),
        "vocab_size": vocab_size,
        "hidden_size": fields.positive_int("hidden_size"),
        "num_layers": fields.positive_int("num_hidden_layers", most=MOST_LAYERS),
        "num_heads": num_heads,
        "num_kv_heads": num_kv_heads,
        "head_dim": _head_dim(fields, num_heads),
        "intermediate_size": fields.positive_int("intermediate_size"),
        "activation": _activation(fields, activation),
        "norm_eps": fields.number("rms_norm_eps", above=0),
        "tie_embeddings": fields.boolean("tie_word_embeddings"),
        "dtype": _dtype(fields),
        "bos_token_id": bos[0] if bos else None,
        "eos_token_ids": fields.token_ids("eos_token_id", vocab_size=vocab_size),
    }


def architecture_name(raw: Mapping[str, Any]) -> str:
    """`architectures[0]`, or `model_type` where a config has none."""
    architectures = raw.get("architectures")
    return str(architectures[0] if architectures else raw.get("model_type"))


def refuse_quantized(fields: Fields) -> None:
    """Refuse a quantization that is not the reader's business: `weights/` takes out those it undoes."""
    if fields.get("quantization_config") is not None:
        method = fields.get("quantization_config")
        name = method.get("quant_method") if isinstance(method, Mapping) else method
        raise UnsupportedModelError(
            f"{fields.source}: quantization_config ({_short(name)}) is not supported; use the unquantized "
            "checkpoint (float32, bfloat16 or float16) or a GGUF file."
        )


def _head_dim(fields: Fields, num_heads: int) -> int:
    explicit = fields.optional_positive_int("head_dim")
    if explicit is not None:
        return explicit
    hidden = fields.positive_int("hidden_size")
    if hidden % num_heads:
        raise fields.error("hidden_size", f"a multiple of num_attention_heads ({num_heads})")
    return hidden // num_heads


def _activation(fields: Fields, name: str) -> Activation:
    value = fields.get(name)
    if not isinstance(value, str) or value not in _ACTIVATIONS:
        raise fields.unsupported(name, ", ".join(_ACTIVATIONS))
    return _ACTIVATIONS[value]


def _dtype(fields: Fields) -> str | None:
    """The checkpoint's dtype, spelled `dtype` or, in older files, `torch_dtype`."""
    name = "dtype" if fields.get("dtype") is not None else "torch_dtype"
    value = fields.get(name)
    if value is None:
        return None
    if value not in _DTYPES:
        raise fields.unsupported(name, ", ".join(_DTYPES))
    return str(value)


def layer_windows(fields: Fields, layer_types: Sequence[str]) -> tuple[int | None, ...]:
    """Each layer's window: `sliding_window` where its type is sliding, None where it sees everything."""
    window = fields.optional_positive_int("sliding_window")
    if window is None and SLIDING in layer_types:
        raise fields.error("sliding_window", f"a positive integer, because layer_types names {SLIDING}")
    return tuple(window if kind == SLIDING else None for kind in layer_types)


def explicit_layer_types(fields: Fields) -> list[str] | None:
    """The `layer_types` list, one per layer, or None if the config has none."""
    value = fields.get("layer_types")
    if value is None:
        return None
    count = fields.positive_int("num_hidden_layers", most=MOST_LAYERS)
    if not isinstance(value, list) or len(value) != count:
        raise fields.error("layer_types", f"a list of num_hidden_layers ({count}) names")
    if any(kind not in (FULL, SLIDING) for kind in value):
        raise fields.unsupported("layer_types", f"{FULL}, {SLIDING}")
    return list(value)
