"""Which backend serves, with what, and what is refused."""

from __future__ import annotations

import logging
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from gqa_serve.engine.backends import BackendOptions, create_backend
from gqa_serve.engine.backends.reference import ReferenceBackend
from gqa_serve.errors import ConfigError

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
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
        (CUDA, {"checkpoint_dtype": "bfloat16"}, torch.bfloat16, "bfloat16"),
        (CUDA, {}, torch.float32, "float32"),
        (CUDA, {"checkpoint_dtype": "bfloat16", "kv_cache_dtype": "fp8"}, torch.bfloat16, "fp8"),
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
        (CUDA, {"quantization": "int8"}, "--device cuda .*; use --quantization none or --device cpu"),
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
