"""Which backend serves, with what, and what is refused."""

from __future__ import annotations

import logging
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from gqa_serve.engine import backends
from gqa_serve.engine.backends import BackendOptions, create_backend
from gqa_serve.engine.backends.reference import ReferenceBackend
from gqa_serve.errors import ConfigError

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
MPS = torch.device("mps")
MODULE = "gqa_serve.engine.backends.cpu"


def native(monkeypatch: pytest.MonkeyPatch, **options: Any) -> dict[str, Any]:
    """The arguments that CpuBackend is made with."""
    monkeypatch.setitem(sys.modules, MODULE, SimpleNamespace(CpuBackend=lambda **given: given))  # type: ignore[arg-type]
    made: Any = create_backend(CPU, BackendOptions(**options))
    return dict(made)


def reference(device: torch.device = CPU, **options: Any) -> ReferenceBackend:
    made = create_backend(device, BackendOptions(**options))
    assert isinstance(made, ReferenceBackend)
    return made


@pytest.fixture
def no_native(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**given: Any) -> None:
        raise ImportError("the kernels are not there")

    monkeypatch.setitem(sys.modules, MODULE, SimpleNamespace(CpuBackend=refuse))  # type: ignore[arg-type]


def test_native_gets_the_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    made = native(monkeypatch, threads=3, cpu_isa="avx2", quantization="int4")
    assert made == {
        "dtype": None, "quantization": "int4", "kv_dtype": "bfloat16", "threads": 3, "isa": "avx2"
    }  # fmt: skip
    assert native(monkeypatch, backend="native", dtype="float16")["dtype"] == torch.float16


@pytest.mark.parametrize(
    ("asked", "checkpoint", "quantization", "kv_dtype"),
    [
        ("auto", "bfloat16", "auto", "bfloat16"),
        ("auto", "float16", "auto", "float32"),
        ("auto", "float32", "auto", "float32"),
        ("auto", "float32", "int8", "bfloat16"),
        ("auto", None, "auto", "bfloat16"),
        ("auto", None, "none", "float32"),
        ("int8", "bfloat16", "auto", "int8"),
        ("float32", "bfloat16", "auto", "float32"),
        ("bfloat16", None, "none", "bfloat16"),
    ],
)
def test_natives_cache(
    asked: str, checkpoint: str | None, quantization: str, kv_dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"kv_cache_dtype": asked, "checkpoint_dtype": checkpoint, "quantization": quantization}
    assert native(monkeypatch, **options)["kv_dtype"] == kv_dtype


@pytest.mark.parametrize("asked", ["float16", "fp8"])
def test_formats_that_native_has_no_cache_in(asked: str, monkeypatch: pytest.MonkeyPatch) -> None:
    says = f"--kv-cache-dtype {asked} is not .* use float32, bfloat16 or int8, or --backend reference"
    with pytest.raises(ConfigError, match=says):
        native(monkeypatch, kv_cache_dtype=asked)


def test_an_instruction_set_that_this_cpu_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**given: Any) -> None:
        raise ValueError("this CPU supports avx2")

    monkeypatch.setitem(sys.modules, MODULE, SimpleNamespace(CpuBackend=refuse))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="--cpu-isa neon cannot be used: this CPU supports avx2"):
        create_backend(CPU, BackendOptions(cpu_isa="neon"))


@pytest.mark.parametrize(
    ("device", "options", "dtype", "kv_dtype"),
    [
        (CPU, {"backend": "reference", "checkpoint_dtype": "bfloat16"}, torch.float32, "float32"),
        (CPU, {"backend": "reference", "dtype": "bfloat16"}, torch.bfloat16, "bfloat16"),
        (CPU, {"backend": "reference", "kv_cache_dtype": "float16"}, torch.float32, "float16"),
        (CPU, {"backend": "reference", "kv_cache_dtype": "int8"}, torch.float32, "int8"),
        (CPU, {"backend": "reference", "kv_cache_dtype": "fp8"}, torch.float32, "fp8"),
        (CPU, {"backend": "reference", "quantization": "none"}, torch.float32, "float32"),
        (MPS, {"checkpoint_dtype": "bfloat16"}, torch.bfloat16, "bfloat16"),
        (MPS, {}, torch.float32, "float32"),
        (MPS, {"checkpoint_dtype": "bfloat16", "kv_cache_dtype": "fp8"}, torch.bfloat16, "fp8"),
        (CUDA, {"backend": "reference", "dtype": "float16"}, torch.float16, "float16"),
    ],
)
def test_the_references_precision(
    device: torch.device, options: dict[str, Any], dtype: torch.dtype, kv_dtype: str
) -> None:
    backend = reference(device, **options)
    assert (backend.dtype, backend.kv_dtype) == (dtype, kv_dtype)


@pytest.mark.usefixtures("no_native")
def test_without_kernels_the_reference_serves_and_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    backend = reference(checkpoint_dtype="bfloat16", kv_cache_dtype="int8")
    assert backend.kv_dtype == "int8"
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "(the kernels are not there)" in record.message
    assert "install gqa-serve again where there is a C++20 compiler" in record.message


def test_a_module_that_cannot_be_imported_counts_as_not_there(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, MODULE, None)  # type: ignore[arg-type]
    reference()
    assert len(caplog.records) == 1


@pytest.mark.usefixtures("no_native")
@pytest.mark.parametrize(
    ("device", "options", "says"),
    [
        (
            CPU,
            {"backend": "native"},
            r"cannot run here \(the kernels are not there\).* --backend reference\.",
        ),
        (CPU, {"quantization": "int8"}, r"--quantization int8 needs the native backend\. .*compiler"),
        (CUDA, {"backend": "native"}, "runs on CPUs, not on cuda; use --device cpu or --backend reference"),
        (
            CPU,
            {"backend": "reference", "quantization": "int4"},
            "--backend reference does not serve --quantization int4; use --quantization none",
        ),
        (CPU, {"cpu_isa": "avx2"}, "--cpu-isa avx2 needs the native backend"),
        (CPU, {"backend": "reference", "cpu_isa": "avx2"}, "--cpu-isa avx2 is for the native backend"),
        (MPS, {"quantization": "int8"}, "--device mps .*; use --quantization none or --device cpu"),
        (CPU, {"backend": "cuda"}, "runs on NVIDIA GPUs, not on cpu; use --device cuda or --backend ref"),
        (CPU, {"enforce_eager": True}, "--enforce-eager is for the cuda backend"),
        (CPU, {"backend": "reference", "deterministic": True}, "--deterministic is not served by the ref"),
        (
            CPU,
            {"quantization": "fp8"},
            "--quantization fp8 is not served by the native backend; use .*int8, or",
        ),
        (
            CPU,
            {"backend": "reference", "quantization": "fp8"},
            r"--backend reference does not serve --quantization fp8; use --quantization none\.",
        ),
    ],
)
def test_what_cannot_be_honoured_is_refused(
    device: torch.device, options: dict[str, Any], says: str, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(ConfigError, match=says):
        create_backend(device, BackendOptions(**options))
    assert not caplog.records


# --- CUDA, whose settings are looked at without one ---


def cuda(
    monkeypatch: pytest.MonkeyPatch,
    capability: tuple[int, int] = (9, 0),
    compiler: bool = True,
    **options: Any,
) -> dict[str, Any]:
    """What the CUDA backend is made from on a GPU of this compute capability."""
    given: dict[str, Any] = {}

    def made(device: torch.device, dtype: torch.dtype, **settings: Any) -> object:
        given.update(settings, device=device, dtype=dtype)
        return object()

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(backends, "has_c_compiler", lambda: compiler)
    monkeypatch.setattr("gqa_serve.engine.backends.cuda.CudaBackend", made)
    monkeypatch.setattr("gqa_serve.engine.backends.cuda_graphs.CudaCapture", lambda: "capture")
    create_backend(CUDA, BackendOptions(**options))
    return given


@pytest.mark.parametrize(
    ("options", "dtype", "kv_dtype"),
    [
        ({}, torch.bfloat16, torch.bfloat16),
        ({"checkpoint_dtype": "float32"}, torch.bfloat16, torch.bfloat16),
        ({"checkpoint_dtype": "float16"}, torch.float16, torch.float16),
        ({"dtype": "float32"}, torch.float32, torch.float32),
        ({"kv_cache_dtype": "fp8"}, torch.bfloat16, torch.float8_e4m3fn),
        ({"kv_cache_dtype": "int8"}, torch.bfloat16, torch.int8),
    ],
)
def test_cudas_precision(
    options: dict[str, Any], dtype: torch.dtype, kv_dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = cuda(monkeypatch, **options)
    assert (given["dtype"], given["kv_dtype"]) == (dtype, kv_dtype)


def test_cudas_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    given = cuda(monkeypatch, deterministic=True, quantization="int4", max_num_seqs=7)
    assert (given["capture"], given["max_num_seqs"]) == ("capture", 7)
    assert (given["deterministic"], given["quantization"]) == (True, "int4")
    assert cuda(monkeypatch, enforce_eager=True)["capture"] is None


def test_gpus_that_are_too_old(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    says = r"needs a GPU of compute capability 8\.0 or newer, this one has 7\.5"
    with pytest.raises(ConfigError, match=says):
        cuda(monkeypatch, (7, 5), backend="cuda")
    assert cuda(monkeypatch, (7, 5)) == {}  # the reference serves
    (record,) = caplog.records
    assert "7.5" in record.getMessage()
    with pytest.raises(ConfigError, match=r"--kv-cache-dtype fp8 needs .* 8\.9 or newer.*use int8"):
        cuda(monkeypatch, (8, 0), kv_cache_dtype="fp8")


def test_triton_without_a_c_compiler(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(
        ConfigError, match=r"Triton needs a C compiler.*; install .* or use --backend reference"
    ):
        cuda(monkeypatch, compiler=False, backend="cuda")
    assert cuda(monkeypatch, compiler=False) == {}  # the reference serves
    assert len(caplog.records) == 1


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"deterministic": True}, "does not serve --deterministic"),
        ({"dtype": "float32"}, "does not serve --dtype float32"),
        ({"kv_cache_dtype": "int8"}, "does not serve --kv-cache-dtype int8"),
        ({"kv_cache_dtype": "float16"}, "does not serve --kv-cache-dtype float16"),
    ],
)
def test_what_attention_libraries_do_not_serve(
    options: dict[str, Any], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gqa_serve.engine.backends.cuda_libraries.attention_library", lambda *_: object())
    with pytest.raises(ConfigError, match=f"--attention-backend flashinfer {says}"):
        cuda(monkeypatch, attention_backend="flashinfer", **options)
    assert cuda(monkeypatch, attention_backend="flashinfer")["capture"] is None
