"""Which kernels exist in which forms: what a GPU would have to compile, listed without a GPU.

Owns the word "variant" and the list of files that have kernels. Each such file lists its own, in a function
`variants()`. Does not know how a variant is compiled (`compile_report.py`) or launched (its file's launcher).
Invariant: a Variant that exists accounts for every argument of its kernel, once: as a type or as a constant.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

MODULES = (
    "decode_attention",
    "prefill_attention",
    "norms",
    "activations",
    "rotary",
    "sampling",
    "matmul",
    "quantized_linear",
    "quantize",
    "embedding",
)
TARGETS = (80, 90, 100)  # A100; H100, H200; B200


@dataclass(frozen=True)
class Variant:
    """One compilation of a Triton kernel: its types and constants, as a launch of the engine would fix them.

    `name` tells variants of a kernel apart for a reader ("bf16 D128 G4 fp8"). `signature` maps arguments to
    types as Triton writes them: "*bf16", "i32", "fp32"; "i32:16" is an integer that is a multiple of 16, so
    that the compiler may use wide loads. Pointers are taken to be multiples of 16 bytes, as torch allocates;
    "*bf16:1" is one that need not be. `constexprs` has the compile-time arguments: the constants, tensors
    that are absent (None), and integers that are 1, since Triton compiles those in. `targets` are compute
    capabilities times ten.
    """

    kernel: Any
    name: str
    signature: Mapping[str, str]
    constexprs: Mapping[str, Any]
    num_warps: int
    num_stages: int
    targets: tuple[int, ...] = TARGETS

    def __post_init__(self) -> None:
        given = [*self.signature, *self.constexprs]
        if sorted(given) != sorted(self.kernel.arg_names):
            wrong = sorted(set(given) ^ set(self.kernel.arg_names)) or "an argument named twice"
            raise ValueError(f"{self}: the variant and the kernel's arguments differ in {wrong}")

    def __str__(self) -> str:
        return f"{self.kernel.__name__} {self.name}"

    @property
    def file(self) -> str:
        """Which of MODULES the kernel is in."""
        return str(self.kernel.fn.__module__).rsplit(".", 1)[-1]


def variants() -> Iterator[Variant]:
    """All variants of all kernel files, in the order of MODULES."""
    for name in MODULES:
        module = f"{__package__}.{name}"
        if importlib.util.find_spec(module) is not None:
            yield from importlib.import_module(module).variants()
