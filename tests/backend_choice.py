"""Backends by name, with exact weights and a float32 cache, for tests that hold for every one of them."""

from __future__ import annotations

import pytest
import torch

from gqa_serve.engine.backends import BackendOptions, create_backend, native_is_built
from gqa_serve.engine.backends.base import Backend

BACKENDS = [
    "reference",
    pytest.param(
        "native", marks=pytest.mark.skipif(not native_is_built(), reason="the native kernels are not built")
    ),
]


def exact_backend(name: str) -> Backend:
    """The backend on the CPU, all in float32."""
    options = BackendOptions(
        backend=name, dtype="float32", quantization="none", kv_cache_dtype="float32", threads=2
    )
    return create_backend(torch.device("cpu"), options)
