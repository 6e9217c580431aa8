"""The native CPU kernels: C++ compiled into `_native` when the package is built (CMakeLists.txt).

Owns loading them, and the reason why they can't be. What they compute is said in the .h files beside this
one, which only the sources have.
Invariant: whatever is wrong with the extension, `load` says it in one way.
"""

from __future__ import annotations

import importlib
import importlib.util
from types import ModuleType

_EXTENSION = f"{__name__}._native"


class NativeUnavailableError(ImportError):
    """The native kernels were not built, or can't run here; the message is the reason."""


def load() -> ModuleType:
    """The extension module, ready to compute. Raises NativeUnavailableError."""
    # It computes on the threads of torch's OpenMP runtime, which it finds in the process (team.h).
    importlib.import_module("torch")
    if importlib.util.find_spec(_EXTENSION) is None:
        raise NativeUnavailableError("the kernels are not part of this installation")
    try:
        native = importlib.import_module(_EXTENSION)
    except ImportError as error:
        raise NativeUnavailableError(f"they cannot be loaded: {error}") from error
    if not native.isa_levels():
        raise NativeUnavailableError(
            "this processor lacks the instructions they need: AVX2 with FMA and F16C, or ARMv8.2's dot "
            "product and half precision"
        )
    if reason := native.team_error():
        raise NativeUnavailableError(reason)
    return native
