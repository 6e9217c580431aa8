"""How the server would hold a model's numbers on a device, from the same settings.

Owns the translation of --quantization and --kv-cache-dtype into `Formats`, and the refusals that the server
would answer with. Knows no costs. Imports no torch.
Invariant: what is returned is what `gqa-serve --device ...` with these settings computes with.
"""

from __future__ import annotations

from dataclasses import replace

from gqa_serve.engine.backends import NOT_NATIVE_KV, native_kv_dtype
from gqa_serve.errors import ConfigError
from gqa_serve.workbench.hardware import Hardware
from gqa_serve.workbench.kernel_cost import (
    BF16,
    FLOAT32,
    FP8,
    INT4,
    INT8,
    KV_BF16,
    KV_FLOAT32,
    KV_FP8,
    KV_INT8,
    Formats,
    KVFormat,
    WeightFormat,
)
from gqa_serve.workbench.model_source import ModelSource

KV_DTYPES: dict[str, KVFormat] = {
    "float32": KV_FLOAT32,
    "bfloat16": KV_BF16,
    "float16": KVFormat("float16", 2),
    "int8": KV_INT8,
    "fp8": KV_FP8,
}
QUANTIZATIONS = ("auto", "none", "int8", "int4", "fp8")
_ASKED = {"int8": INT8, "int4": INT4, "fp8": FP8}


def served_formats(
    source: ModelSource, hardware: Hardware, quantization: str, kv_dtype: str, block_size: int
) -> Formats:
    """The formats that the server would use. `kv_dtype` as `served_kv_dtype` gives it. Raises ConfigError."""
    weights, head = _weights(source, hardware, quantization)
    if hardware.is_cpu:  # its products of integer weights are of integers
        weights, head = (
            replace(part, precision="int8") if part.bits <= 8 else part for part in (weights, head)
        )
    return Formats(
        weights,
        head,
        KV_DTYPES[kv_dtype],
        activation_bytes=0 if hardware.is_cpu else 2,
        block_size=block_size,
    )


def served_kv_dtype(source: ModelSource, hardware: Hardware, quantization: str, asked: str) -> str:
    """The dtype of K and V for `--kv-cache-dtype asked`. Raises ConfigError for what the server refuses."""
    dtype = source.config.dtype
    if asked == "auto":
        if hardware.is_cpu:
            return native_kv_dtype(quantization, dtype)
        return "float16" if dtype == "float16" else "bfloat16"
    if hardware.is_cpu and asked in NOT_NATIVE_KV:
        raise ConfigError(
            f"A KV cache in {asked} is not served on CPUs; use float32, bfloat16 or int8 in --kv-dtypes."
        )
    if asked == "fp8" and hardware.fp8_flops is None:
        raise ConfigError(
            f"A KV cache in fp8 is not served on {hardware.name}, which has no fp8 units; use int8 in "
            "--kv-dtypes."
        )
    return asked


def _weights(source: ModelSource, hardware: Hardware, quantization: str) -> tuple[WeightFormat, WeightFormat]:
    """Of the linear layers and of the vocabulary's matrices."""
    if quantization == "fp8" and hardware.fp8_flops is None:
        raise ConfigError(
            f"--quantization fp8 is not served on {hardware.name}, which has no fp8 units; use int8 or int4."
        )
    if quantization in _ASKED:
        return _ASKED[quantization], INT8
    plain = _plain(source, hardware)
    if quantization == "none" or source.weights is None or source.head is None:
        return plain, plain
    return tuple(_held(part, hardware) for part in (source.weights, source.head))  # type: ignore[return-value]


def _plain(source: ModelSource, hardware: Hardware) -> WeightFormat:
    """Of weights that are not quantized: on GPUs 16 bits, on CPUs as they are stored."""
    if not hardware.is_cpu:
        return BF16
    return BF16 if source.config.dtype in ("bfloat16", "float16") else FLOAT32


def _held(stored: WeightFormat, hardware: Hardware) -> WeightFormat:
    """What becomes of a quantized checkpoint's format on a device."""
    if not hardware.is_cpu:
        if stored is FP8 and hardware.fp8_flops is None:
            return INT8
        return BF16 if stored is FLOAT32 else stored
    if stored.name.startswith("Q") or stored.bits > 8:
        return stored
    return WeightFormat("int8", 8, 32, 2)  # other formats than GGUF's are packed again
