"""The backends, and which of them serves a device.

Owns the choice, and what "auto" means in the settings that depend on it; each backend is one module beside
this one. Imports a backend's module only when it is chosen, so that one backend's needs are not another's.
Invariant: what was asked for by name is served or refused. Only `--backend auto` may end at the reference,
and says so.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gqa_serve.errors import ConfigError

if TYPE_CHECKING:
    import torch

    from gqa_serve.engine.backends.base import Backend

logger = logging.getLogger(__name__)

EXTENSION = "gqa_serve.engine.kernels.cpu._native"
_CURE = "if it was not built, install gqa-serve again where there is a C++20 compiler (g++ 12 or clang++)"
_NATIVE_ONLY = ("int8", "int4")  # of --quantization


@dataclass(frozen=True, kw_only=True)
class BackendOptions:
    """The settings a backend is made from, as `EngineConfig` spells them, and the checkpoint's dtype."""

    backend: str = "auto"
    dtype: str = "auto"
    checkpoint_dtype: str | None = None
    quantization: str = "auto"
    kv_cache_dtype: str = "auto"
    threads: int = 1
    cpu_isa: str = "auto"


def create_backend(device: torch.device, options: BackendOptions) -> Backend:
    """The backend for `device`: on a CPU the native kernels, elsewhere the reference, unless named.

    Where the native kernels cannot run, "auto" serves the reference and logs one warning. Raises ConfigError
    for settings that the backend cannot honour.
    """
    if options.backend == "reference" or (options.backend == "auto" and device.type != "cpu"):
        if options.cpu_isa != "auto":
            raise ConfigError(
                f"--cpu-isa {options.cpu_isa} is for the native backend, which is not used here."
            )
        return _reference(device, options)
    if device.type != "cpu":
        raise ConfigError(
            f"--backend native runs on CPUs, not on {device.type}; use --device cpu or --backend reference."
        )
    try:
        return _native(options)
    except ImportError as error:
        reason = f"The native backend cannot run here ({error}); {_CURE}"
        if options.backend == "native":
            raise ConfigError(f"{reason}, or use --backend reference.") from error
        for flag, value, native_only in (
            ("--quantization", options.quantization, options.quantization in _NATIVE_ONLY),
            ("--cpu-isa", options.cpu_isa, options.cpu_isa != "auto"),
        ):
            if native_only:
                raise ConfigError(f"{flag} {value} needs the native backend. {reason}.") from error
        logger.warning("%s. Until then plain PyTorch serves, which is several times slower.", reason)
        return _reference(device, options)


def native_is_built() -> bool:
    """Whether this installation has the native kernels at all; they may still not run on this CPU."""
    from importlib.util import find_spec

    return find_spec(EXTENSION) is not None


def _native(options: BackendOptions) -> Backend:
    """Weights as they are stored unless --dtype says; K and V in bfloat16 where weights have no more bits,
    else in float32.

    Raises ImportError, with the reason, where the native kernels were not built or cannot run.
    """
    import torch

    from gqa_serve.engine.backends.cpu import CpuBackend

    kv_dtype = options.kv_cache_dtype
    if kv_dtype == "auto":
        exact = options.quantization == "none" or options.checkpoint_dtype is not None
        wide = exact and options.quantization not in _NATIVE_ONLY and options.checkpoint_dtype != "bfloat16"
        kv_dtype = "float32" if wide else "bfloat16"
    if kv_dtype in ("float16", "fp8"):
        raise ConfigError(
            f"--kv-cache-dtype {kv_dtype} is not served by the native backend; use float32, bfloat16 or "
            "int8, or --backend reference."
        )
    try:
        return CpuBackend(
            dtype=None if options.dtype == "auto" else getattr(torch, options.dtype),
            quantization=options.quantization,
            kv_dtype=kv_dtype,
            threads=options.threads,
            isa=options.cpu_isa,
        )
    except ValueError as error:
        raise ConfigError(f"--cpu-isa {options.cpu_isa} cannot be used: {error}.") from error


def _reference(device: torch.device, options: BackendOptions) -> Backend:
    """One dtype for weights and activations; auto is the checkpoint's, on a CPU float32, which is faster.

    K and V in any format, by default in that dtype.
    """
    import torch

    from gqa_serve.engine.backends.reference import ReferenceBackend
    from gqa_serve.engine.kv_cache import KV_DTYPES

    if options.quantization in _NATIVE_ONLY:
        where = "--backend reference" if device.type == "cpu" else f"--device {device.type}"
        cure = "" if device.type == "cpu" else " or --device cpu"
        raise ConfigError(
            f"{where} does not serve --quantization {options.quantization}; use --quantization none{cure}."
        )
    dtype = options.dtype
    if dtype == "auto":
        dtype = "float32" if device.type == "cpu" else options.checkpoint_dtype or "float32"
    kv_dtype = dtype if options.kv_cache_dtype == "auto" else options.kv_cache_dtype
    return ReferenceBackend(device, getattr(torch, dtype), KV_DTYPES[kv_dtype])
