"""GPUs as their data sheets describe them.

Owns the numbers and where they come from. They are peaks: what a kernel reaches is measured, not written
here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Precision = Literal["float32", "bf16", "fp8"]


@dataclass(frozen=True)
class GPU:
    """A data sheet: memory in bytes, bandwidth in bytes/s, dense peaks in operations/s (a multiply-add is
    two).

    `float32_flops` is of ordinary arithmetic, the others of tensor cores; without fp8 tensor cores, numbers
    in fp8 are multiplied as bf16.
    """

    name: str
    memory_bytes: float
    bandwidth: float
    float32_flops: float
    bf16_flops: float
    fp8_flops: float | None

    def peak(self, precision: Precision) -> float:
        """Operations per second."""
        if precision == "float32":
            return self.float32_flops
        if precision == "fp8" and self.fp8_flops is not None:
            return self.fp8_flops
        return self.bf16_flops


# NVIDIA prints tensor-core peaks of H100, H200 and B200 with 2:4 sparsity: twice these.
A100 = GPU("A100 80GB SXM", 80e9, 2.039e12, 19.5e12, 312e12, None)  # "NVIDIA A100 Tensor Core GPU"
H100 = GPU("H100 SXM", 80e9, 3.35e12, 66.9e12, 989.4e12, 1978.9e12)  # "NVIDIA H100 Tensor Core GPU"
H200 = GPU("H200 SXM", 141e9, 4.8e12, 66.9e12, 989.4e12, 1978.9e12)  # "NVIDIA H200 Tensor Core GPU"
B200 = GPU("B200", 180e9, 8.0e12, 80e12, 2250e12, 4500e12)  # "NVIDIA DGX B200": an eighth of the system's
GPUS = (A100, H100, H200, B200)
