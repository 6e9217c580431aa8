"""What a device can do at most, and the least time that so much work needs on it.

Owns two sources of limits: loops in the native module that do nothing but read memory or multiply (a CPU),
and data sheets (a GPU, `hardware.py`). A machine's speed drifts, so that a CPU's limits are measured before
and after a run, and the better of the two count. Knows no model.
"""

from __future__ import annotations

import dataclasses
import platform
from pathlib import Path

from gqa_serve.workbench.hardware import Hardware

BUFFER_BYTES = 2**30  # several times the last cache


@dataclasses.dataclass(frozen=True)
class Limits:
    """Of a CPU: per second, by all threads together; a multiply-add is two operations."""

    read_bytes: float
    float_ops: float
    int8_ops: float
    bf16_ops: float  # of tiles; 0 where there are none

    @classmethod
    def measure(cls, isa: str, threads: int, buffer_bytes: int = BUFFER_BYTES) -> Limits:
        """About two seconds; `isa` is one of the native module's, "auto" the best."""
        from gqa_serve.engine.kernels.cpu import load

        native = load()
        return cls(*native.peaks(native.isa_levels()[-1] if isa == "auto" else isa, threads, buffer_bytes))

    def better(self, other: Limits) -> Limits:
        """The larger of each."""
        return Limits(*map(max, dataclasses.astuple(self), dataclasses.astuple(other)))

    def __str__(self) -> str:
        return (
            f"read {self.read_bytes / 1e9:.1f} GB/s   float32 {self.float_ops / 1e9:.0f} GFLOP/s   "
            f"int8 {self.int8_ops / 1e9:.0f} GOP/s"
            + (f"   bfloat16 {self.bf16_ops / 1e9:.0f} GFLOP/s" if self.bf16_ops else "")
        )


@dataclasses.dataclass(frozen=True)
class Work:
    """Bytes that must be read, operations of matrix products, operations of attention."""

    read_bytes: float
    product_ops: float = 0.0
    attention_ops: float = 0.0


@dataclasses.dataclass(frozen=True)
class Ceiling:
    """What one device does at most with weights of one format. `source`: measured, or whose data sheet."""

    source: str
    bandwidth: float
    product_ops: float
    attention_ops: float

    @classmethod
    def of_cpu(cls, limits: Limits, weight_format: str) -> Ceiling:
        """`weight_format` as the native backend names it. It multiplies int8 and int4 with int8 activations,
        bfloat16 by tiles (three for the precision of one in float32) where there are any, else in float32;
        attention is in float32."""
        product = limits.float_ops
        if weight_format in ("int8", "int4"):
            product = limits.int8_ops
        elif weight_format == "bfloat16" and limits.bf16_ops:
            product = max(product, limits.bf16_ops / 3)
        return cls("measured here", limits.read_bytes, product, limits.float_ops)

    @classmethod
    def of_sheet(cls, hardware: Hardware, weight_format: str) -> Ceiling:
        """`weight_format` as the engine names it: only fp8 is multiplied in fp8."""
        attention = hardware.peak("bf16")
        if weight_format == "float32":
            return cls(hardware.name, hardware.bandwidth, hardware.float32_flops, attention)
        product = hardware.peak("fp8" if weight_format in ("fp8", "float8_e4m3fn") else "bf16")
        return cls(hardware.name, hardware.bandwidth, product, attention)

    def seconds(self, work: Work) -> float:
        """The least time: memory or arithmetic, whichever takes longer."""
        return max(self.memory_s(work), self.arithmetic_s(work))

    def memory_s(self, work: Work) -> float:
        return work.read_bytes / self.bandwidth

    def arithmetic_s(self, work: Work) -> float:
        return work.product_ops / self.product_ops + work.attention_ops / self.attention_ops

    def bound(self, work: Work) -> str:
        """Which of the two it is."""
        return "memory" if self.memory_s(work) >= self.arithmetic_s(work) else "arithmetic"

    def __str__(self) -> str:
        return (
            f"{self.bandwidth / 1e9:,.1f} GB/s, products {self.product_ops / 1e9:,.0f} GOP/s, attention "
            f"{self.attention_ops / 1e9:,.0f} GFLOP/s ({self.source})"
        )


def processor_name() -> str:
    """As the system has it."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
