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

from gqa_serve.config import has_c_compiler
from gqa_serve.errors import ConfigError

if TYPE_CHECKING:
    import torch

    from gqa_serve.engine.backends.base import Backend

logger = logging.getLogger(__name__)

_OLDEST_GPU = (8, 0)  # bfloat16 on tensor cores
_OLDEST_FP8_GPU = (8, 9)
EXTENSION = "gqa_serve.engine.kernels.cpu._native"
_CURE = (
    "if it was not built, install gqa-serve again where there is a C++20 compiler (g++ 12 or clang++), on "
    "Linux on x86-64 or aarch64"
)
_QUANTIZED = ("int8", "int4")  # of --quantization
NOT_NATIVE_KV = ("float16", "fp8")  # of --kv-cache-dtype: what the native backend does not serve


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
    deterministic: bool = False
    attention_backend: str = "triton"
    enforce_eager: bool = False
    max_num_seqs: int = 1


@dataclass(frozen=True)
class _Kind:
    """A backend for one type of device, and what to say where it cannot run."""

    device: str
    where: str
    cure: str


_KINDS = {
    "native": _Kind("cpu", "CPUs", _CURE),
    "cuda": _Kind(
        "cuda",
        "NVIDIA GPUs",
        "install PyTorch 2.8 or newer, built for CUDA, and a C compiler with Python's headers",
    ),
}


def create_backend(device: torch.device, options: BackendOptions) -> Backend:
    """The backend for `device`: native kernels on a CPU, Triton's on CUDA, elsewhere the reference, unless
    named.

    Where a backend's kernels cannot run, "auto" serves the reference and logs one warning. Raises ConfigError
    for settings that the backend cannot honour.
    """
    name = options.backend
    if name == "auto":
        name = next((name for name, kind in _KINDS.items() if kind.device == device.type), "reference")
    if name != "native" and options.cpu_isa != "auto":
        raise ConfigError(f"--cpu-isa {options.cpu_isa} is for the native backend, which is not used here.")
    if name == "reference":
        return _reference(device, options)
    kind = _KINDS[name]
    if device.type != kind.device:
        raise ConfigError(
            f"--backend {name} runs on {kind.where}, not on {device.type}; use --device {kind.device} or "
            "--backend reference."
        )
    try:
        return _native(options) if name == "native" else _cuda(device, options)
    except ImportError as error:
        reason = f"The {name} backend cannot run here ({error}); {kind.cure}"
        if options.backend != "auto":
            raise ConfigError(f"{reason}, or use --backend reference.") from error
        for flag, value, needed in (
            ("--quantization", options.quantization, options.quantization in _QUANTIZED),
            ("--cpu-isa", options.cpu_isa, options.cpu_isa != "auto"),
        ):
            if needed:
                raise ConfigError(f"{flag} {value} needs the {name} backend. {reason}.") from error
        logger.warning("%s. Until then plain PyTorch serves, which is several times slower.", reason)
        return _reference(device, options)


def native_is_built() -> bool:
    """Whether this installation has the native kernels at all; they may still not run on this CPU."""
    from importlib.util import find_spec

    return find_spec(EXTENSION) is not None


def native_kv_dtype(quantization: str, checkpoint_dtype: str | None) -> str:
    """What `--kv-cache-dtype auto` is on a CPU: bfloat16 where weights have no more bits, else float32."""
    exact = quantization == "none" or checkpoint_dtype is not None
    wide = exact and quantization not in _QUANTIZED and checkpoint_dtype != "bfloat16"
    return "float32" if wide else "bfloat16"


def _native(options: BackendOptions) -> Backend:
    """Weights as they are stored unless --dtype says; K and V as `native_kv_dtype` has it.

    Raises ImportError, with the reason, where the native kernels were not built or cannot run.
    """
    import torch

    from gqa_serve.engine.backends.cpu import CpuBackend

    _refuse_cuda_settings(options)
    if options.quantization == "fp8":
        raise ConfigError(
            "--quantization fp8 is not served by the native backend; use --quantization int8, or --device "
            "cuda on a GPU of compute capability 8.9 or higher."
        )
    kv_dtype = options.kv_cache_dtype
    if kv_dtype == "auto":
        kv_dtype = native_kv_dtype(options.quantization, options.checkpoint_dtype)
    if kv_dtype in NOT_NATIVE_KV:
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


def _cuda(device: torch.device, options: BackendOptions) -> Backend:
    """Weights and activations in the checkpoint's dtype, but float32 in bfloat16, which is what tensor
    cores multiply (`--dtype float32` keeps it); K and V likewise.

    Raises ImportError, with the reason, where Triton is missing or the GPU is too old.
    """
    import torch

    capability = torch.cuda.get_device_capability(device)
    if capability < _OLDEST_GPU:
        needed, found = (".".join(map(str, version)) for version in (_OLDEST_GPU, capability))
        raise ImportError(f"it needs a GPU of compute capability {needed} or newer, this one has {found}")
    if not has_c_compiler():
        raise ImportError("Triton needs a C compiler, gcc or clang, to launch kernels")
    from gqa_serve.engine.backends.cuda import CudaBackend
    from gqa_serve.engine.backends.cuda_graphs import CudaCapture
    from gqa_serve.engine.backends.cuda_libraries import attention_library
    from gqa_serve.engine.kv_cache import KV_DTYPES

    dtype = options.dtype
    if dtype == "auto":
        dtype = "float16" if options.checkpoint_dtype == "float16" else "bfloat16"
    if options.kv_cache_dtype == "fp8" and capability < _OLDEST_FP8_GPU:
        raise ConfigError(
            "--kv-cache-dtype fp8 needs a GPU of compute capability 8.9 or newer (Ada, Hopper); use int8."
        )
    library = attention_library(options.attention_backend, device)
    unserved = {
        "--deterministic": options.deterministic,
        "--dtype float32": dtype == "float32",
        f"--kv-cache-dtype {options.kv_cache_dtype}": options.kv_cache_dtype not in ("auto", dtype),
    }
    refused = next((flag for flag, asked in unserved.items() if asked), None)
    if library is not None and refused is not None:
        raise ConfigError(
            f"--attention-backend {options.attention_backend} does not serve {refused}; leave one out."
        )
    return CudaBackend(
        device,
        getattr(torch, dtype),
        kv_dtype=KV_DTYPES[dtype if options.kv_cache_dtype == "auto" else options.kv_cache_dtype],
        quantization=options.quantization,
        deterministic=options.deterministic,
        capture=None if options.enforce_eager or library is not None else CudaCapture(),
        max_num_seqs=options.max_num_seqs,
        library=library,
    )


def _reference(device: torch.device, options: BackendOptions) -> Backend:
    """One dtype for weights and activations; auto is the checkpoint's, on a CPU float32, which is faster.

    K and V in any format, by default in that dtype.
    """
    import torch

    from gqa_serve.engine.backends.reference import ReferenceBackend
    from gqa_serve.engine.kv_cache import KV_DTYPES

    _refuse_cuda_settings(options)
    if options.deterministic:
        raise ConfigError("--deterministic is not served by the reference backend, which is used here.")
    if options.quantization in (*_QUANTIZED, "fp8"):
        where = "--backend reference" if device.type == "cpu" else f"--device {device.type}"
        cure = "" if device.type == "cpu" or options.quantization == "fp8" else " or --device cpu"
        raise ConfigError(
            f"{where} does not serve --quantization {options.quantization}; use --quantization none{cure}."
        )
    dtype = options.dtype
    if dtype == "auto":
        dtype = "float32" if device.type == "cpu" else options.checkpoint_dtype or "float32"
    kv_dtype = dtype if options.kv_cache_dtype == "auto" else options.kv_cache_dtype
    return ReferenceBackend(device, getattr(torch, dtype), KV_DTYPES[kv_dtype])


def _refuse_cuda_settings(options: BackendOptions) -> None:
    """Raises ConfigError for settings that mean something to the cuda backend alone."""
    for flag, asked in (
        ("--enforce-eager", options.enforce_eager),
        (f"--attention-backend {options.attention_backend}", options.attention_backend != "triton"),
    ):
        if asked:
            raise ConfigError(f"{flag} is for the cuda backend, which is not used here.")
