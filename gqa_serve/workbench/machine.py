"""What this machine's processor and memory can do, measured in about two seconds with numpy.

Owns the measuring for `--hardware cpu`. It runs on the cores that the server would compute on. It imports no
torch, so it can't use the native kernels: the rates of units that numpy does not reach (VNNI for integers,
AMX for bfloat16) follow from float32's by how many more numbers one of their instructions multiplies.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from gqa_serve.engine.cpus import usable_cores
from gqa_serve.engine.memory import machine_memory
from gqa_serve.workbench.hardware import Hardware

BUFFER_BYTES = 2**29  # several times the last cache
MATRIX_SIZE = 768  # as short as is efficient: a round that nothing else disturbs is the sooner met
MEASURE_S = 0.6  # of rounds, the fastest of which counts: whatever else runs can only slow a round down
_VNNI_FLAGS = frozenset({"avx512_vnni", "avx_vnni", "asimddp"})
# Products of a cycle over float32's (two units of 16 lanes): VNNI has 4 in each lane; an instruction on tiles
# makes 16 * 16 * 64 of int8, or half of bfloat16, in 16 cycles. Kernels need three of bfloat16 (docs/cpu.md).
_VNNI, _AMX_INT8, _AMX_BF16 = 4, 32, 16 / 3


def measure_machine() -> Hardware:
    """This machine as a data sheet; its best rates of some rounds."""
    threads = usable_cores()
    flops = float32_rate()
    name, flags = _processor()
    return Hardware(
        f"this CPU ({name}, {threads} core{'s' if threads > 1 else ''})",
        machine_memory(),
        read_rate(threads),
        flops,
        flops * (_AMX_BF16 if "amx_bf16" in flags else 1),
        None,
        is_cpu=True,
        int8_flops=flops * (_AMX_INT8 if "amx_int8" in flags else _VNNI if flags & _VNNI_FLAGS else 1),
    )


def how_measured() -> str:
    """The sentence for a report."""
    return (
        f"measured with numpy just now, the best of some rounds: bandwidth by reading "
        f"{BUFFER_BYTES >> 20} MiB with {usable_cores()} thread(s), float32 by a product of {MATRIX_SIZE} x "
        f"{MATRIX_SIZE} matrices, integers and bfloat16 by what VNNI and AMX multiply in the same time. A "
        "busy machine measures low"
    )


def read_rate(threads: int, buffer_bytes: int = BUFFER_BYTES) -> float:
    """Bytes per second that `threads` threads read together; numpy lets go of the interpreter meanwhile."""
    numbers = np.ones(buffer_bytes // 4, np.float32)
    parts = np.array_split(numbers, threads)
    with ThreadPoolExecutor(threads) as pool:
        largest = _fastest(lambda: list(pool.map(np.maximum.reduce, parts)))
        products = _fastest(lambda: list(pool.map(np.dot, parts, parts)))
    return numbers.nbytes / min(largest, products)


def float32_rate(size: int = MATRIX_SIZE) -> float:
    """Operations per second of a matrix product, on the threads that numpy's library uses."""
    a = np.ones((size, size), np.float32)
    out = np.empty_like(a)
    return 2 * size**3 / _fastest(lambda: np.matmul(a, a, out=out))


def _fastest(work: Callable[[], object]) -> float:
    least, end = float("inf"), time.perf_counter() + MEASURE_S
    while (start := time.perf_counter()) < end:
        work()
        least = min(least, time.perf_counter() - start)
    return least


def _processor() -> tuple[str, frozenset[str]]:
    """Its name and its instruction sets as Linux has them; elsewhere a name alone."""
    fields: dict[str, str] = {}
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            key, _, value = line.partition(":")
            fields.setdefault(key.strip(), value.strip())
    flags = fields.get("flags", fields.get("Features", ""))
    name = fields.get("model name") or platform.processor() or platform.machine()
    return name, frozenset(flags.split())
