"""Triton's interpreter, made several times faster for kernels that are written as several functions.

When one jitted function calls another (`tl.sum` is one too), the interpreter looks through all of Triton's
language again for what to replace, which takes milliseconds, though the launch has replaced it already.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from typing import Any

import pytest


@pytest.fixture(scope="session", autouse=True)
def device_calls_without_searching() -> Iterator[None]:
    """While tests of the engine run; does nothing where Triton is missing or does not interpret."""
    if importlib.util.find_spec("triton") is None or os.environ.get("TRITON_INTERPRET") != "1":
        yield
        return
    import triton.language as tl
    from triton.runtime import interpreter

    function = interpreter.InterpretedFunction
    searching = function.__call__
    prepared: dict[int, bool] = {}

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        names = self.fn.__globals__
        if id(names) not in prepared:
            # A module that sees `triton.language` is one whose kernels were launched: the launch replaces it.
            # Others, Triton's own, see the module behind it, in which what is replaced stays replaced.
            prepared[id(names)] = True
            if not any(value is tl for value in names.values()):
                return searching(self, *args, **kwargs)
        return self.rewrite()(*args, **kwargs)

    function.__call__ = call
    yield
    function.__call__ = searching


@pytest.fixture
def ordered_dot() -> Iterator[None]:
    """`tl.dot` as a GPU computes it, where a row's sums do not depend on where in the tile it stands.

    The interpreter's is numpy's product, whose BLAS may add up the rows at a tile's edge in another order.
    """
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    def numbers(x: Any, dtype: Any) -> Any:
        data = x.data
        if x.dtype.primitive_bitwidth == 8 and x.dtype.is_floating():
            data = interpreter._convert_float(data, x.dtype, tl.float16, None).view(np.float16)
        return data.astype(dtype)

    def create_dot(self: Any, a: Any, b: Any, d: Any, *options: Any) -> Any:
        products = numbers(a, d.data.dtype)[..., None] * numbers(b, d.data.dtype)[..., None, :, :]  # M, K, N
        return interpreter.TensorHandle(np.add.reduce(products, axis=-2) + d.data, d.dtype.scalar)

    with pytest.MonkeyPatch.context() as patch:  # of its own: tests undo theirs
        patch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)
        yield
