"""Where and in which numbers training computes.

Owns the choice of device, threads and dtype.
Invariant: bfloat16 is chosen only where the hardware multiplies it; elsewhere it would be slower and no
better.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from gqa_serve.config import omp_num_threads
from gqa_serve.engine.cpus import usable_cores
from gqa_serve.errors import ConfigError
from gqa_serve.workbench.uptrain.options import Options


@dataclass(frozen=True)
class Machine:
    """A device, the dtype of its matrix products, and on a CPU the number of threads."""

    device: torch.device
    compute_dtype: torch.dtype
    threads: int

    @classmethod
    def choose(cls, options: Options) -> Machine:
        """As the flags say. Sets torch's threads. Raises ConfigError for a device that is not here."""
        name = options.device
        if name == "auto":
            name = "cuda" if torch.cuda.is_available() else "cpu"
        try:
            device = torch.device(name)
        except RuntimeError as error:
            raise ConfigError(f"--device {name!r} is none; give auto, cpu or cuda.") from error
        if device.type not in ("cpu", "cuda"):
            raise ConfigError(f"--device {name} is not supported; give auto, cpu or cuda.")
        if device.type == "cuda" and not torch.cuda.is_available():
            raise ConfigError("--device cuda: torch finds no CUDA device here; use --device cpu.")
        threads = options.threads or omp_num_threads() or usable_cores()
        torch.set_num_threads(threads)
        return cls(device, _dtype(options.dtype, device), threads)

    @property
    def free_bytes(self) -> int:
        """Memory that is free now."""
        if self.device.type == "cuda":
            return int(torch.cuda.mem_get_info(self.device)[0])
        import psutil

        return int(psutil.virtual_memory().available)

    def __str__(self) -> str:
        where = f"CPU, {self.threads} threads" if self.device.type == "cpu" else torch.cuda.get_device_name()
        return f"{where}, {str(self.compute_dtype).removeprefix('torch.')} products"


def _dtype(name: str, device: torch.device) -> torch.dtype:
    if name != "auto":
        return torch.bfloat16 if name == "bfloat16" else torch.float32
    if device.type == "cuda":
        native = torch.cuda.get_device_capability(device) >= (8, 0)
    else:
        native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if native else torch.float32
