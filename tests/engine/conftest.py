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
