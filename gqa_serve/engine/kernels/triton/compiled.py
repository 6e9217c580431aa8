"""A variant compiled for a GPU that need not be there, and what the result says of itself.

Owns how Triton's compiler and its assembler are asked, and the limits of the three architectures that we
compile for. Does not know which variants exist (`variants.py`) or how a report looks (`compile_report.py`).
Nothing here works while Triton interprets: kernels are not compilable then.
Invariant: numbers come from the
assembler's own log and from the PTX it was given, never from an estimate; only `blocks_per_sm` is computed,
by the allocation rules of the CUDA occupancy calculator.
"""

from __future__ import annotations

import contextlib
import io
import re
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from gqa_serve.engine.kernels.triton.variants import Variant

KIB = 1024


@dataclass(frozen=True)
class Architecture:
    """What one streaming multiprocessor has (CUDA C++ Programming Guide, "Compute Capabilities")."""

    block_shared_bytes: int  # most shared memory of one block
    sm_shared_bytes: int
    max_blocks: int = 32
    max_warps: int = 64
    registers: int = 64 * KIB


ARCHITECTURES = {
    80: Architecture(block_shared_bytes=163 * KIB, sm_shared_bytes=164 * KIB),
    90: Architecture(block_shared_bytes=227 * KIB, sm_shared_bytes=228 * KIB),
    100: Architecture(block_shared_bytes=227 * KIB, sm_shared_bytes=228 * KIB),
}

_USED = re.compile(r"Used (\d+) registers")
_FRAME = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_INSTRUCTIONS = {
    "mma": re.compile(r"\bmma\.sync\b"),
    "wgmma": re.compile(r"\bwgmma\.mma_async\b"),
    "tcgen05": re.compile(r"\btcgen05\.mma\b"),
    "TMA": re.compile(r"\bcp\.async\.bulk\.tensor\b"),
    "ldmatrix": re.compile(r"\bldmatrix\b"),
}
_ASYNC_COPY = re.compile(
    r"\bcp\.async\.c[ag]\.shared\.global\S*\s*\[[^]]*\],\s*\[[^]]*\],\s*(0x[0-9a-f]+|\d+)"
)
_GLOBAL_LOAD = re.compile(r"\bld\.(?:\w+\.)?global\b(?:\.(?!v\d)[\w:]+?)*?(?:\.v(\d))?\.[busf](\d+)\b")


@dataclass(frozen=True)
class Compiled:
    """What the compiler made of a variant for one target.

    `registers` are per thread, spills and stack per thread too, in bytes; `shared_bytes` per block; `warps`
    is what a block has in the end (the compiler adds some where it gives copying and multiplying to different
    warps). `instructions` counts places in the code, not executions; `copy_bytes` and `load_bytes` map the
    width of a load from global memory, per thread, to how many there are.
    """

    target: int
    warps: int
    registers: int
    spill_bytes: int
    stack_bytes: int
    shared_bytes: int
    instructions: Mapping[str, int]
    copy_bytes: Mapping[int, int]
    load_bytes: Mapping[int, int]

    @property
    def fits(self) -> bool:
        """Whether a block may have that much shared memory."""
        return self.shared_bytes <= ARCHITECTURES[self.target].block_shared_bytes

    @property
    def blocks_per_sm(self) -> int:
        """Blocks that are resident on a multiprocessor at once; 0 if not even one fits.

        Registers are given to warps in units of 256, out of the multiprocessor's four equal files; a block
        takes 1 KiB of shared memory beside its own.
        """
        sm = ARCHITECTURES[self.target]
        if not self.fits:
            return 0
        warps_by_registers = 4 * (sm.registers // 4 // _round_up(max(self.registers, 1) * 32, 256))
        by_shared = sm.sm_shared_bytes // _round_up(self.shared_bytes + KIB, 128)
        return min(sm.max_blocks, sm.max_warps // self.warps, warps_by_registers // self.warps, by_shared)


def compile_variant(variant: Variant, target: int) -> Compiled:
    """Compile for sm_`target`. Raises what Triton raises: CompilationError, PTXASError, ..."""
    if not isinstance(variant.kernel, triton.runtime.JITFunction):
        raise RuntimeError("Triton interprets (TRITON_INTERPRET is set): kernels cannot be compiled.")
    fn = variant.kernel
    signature, attrs = {}, {}
    for index, name in enumerate(fn.arg_names):
        if name in variant.constexprs:
            signature[name] = "constexpr"
            continue
        kind, _, multiple = variant.signature[name].partition(":")
        signature[name] = kind
        if multiple == "16" or (kind.startswith("*") and not multiple):
            attrs[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn, signature, dict(variant.constexprs), attrs)
    # Fused multiply-add is what launches get; Triton 3.9 warns where it has to assume so.
    options = {"num_warps": variant.num_warps, "num_stages": variant.num_stages, "enable_fp_fusion": True}
    return _compile(source, target, options)


def _compile(source: ASTSource, target: int, options: Mapping[str, object]) -> Compiled:
    """Triton prints the assembler's log if asked to, nowhere else; an empty cache makes it assemble."""
    log = io.StringIO()
    with tempfile.TemporaryDirectory() as cache, triton.knobs.cache.scope(), triton.knobs.nvidia.scope():
        triton.knobs.cache.dir = cache
        triton.knobs.nvidia.dump_ptxas_log = True
        with contextlib.redirect_stdout(log):
            kernel = triton.compile(source, target=GPUTarget("cuda", target, 32), options=dict(options))
    return read_result(
        target, kernel.metadata.num_warps, kernel.metadata.shared, kernel.asm["ptx"], log.getvalue()
    )


def read_result(target: int, warps: int, shared_bytes: int, ptx: str, log: str) -> Compiled:
    """Numbers out of the PTX and of what `ptxas -v` said of it, a kernel's called functions included."""
    frames = [tuple(map(int, frame)) for frame in _FRAME.findall(log)]
    registers = [int(count) for count in _USED.findall(log)]
    if not frames or not registers:
        raise RuntimeError(f"The assembler's log does not tell what the kernel uses: {log!r}")
    copies = Counter(int(width, 0) for width in _ASYNC_COPY.findall(ptx))
    loads = Counter(int(count or 1) * int(bits) // 8 for count, bits in _GLOBAL_LOAD.findall(ptx))
    counts = {name: len(pattern.findall(ptx)) for name, pattern in _INSTRUCTIONS.items()}
    return Compiled(
        target=target,
        warps=warps,
        registers=max(registers),
        spill_bytes=sum(stores + loads for _, stores, loads in frames),
        stack_bytes=sum(stack for stack, _, _ in frames),
        shared_bytes=shared_bytes,
        instructions={name: count for name, count in counts.items() if count},
        copy_bytes=dict(sorted(copies.items(), reverse=True)),
        load_bytes=dict(sorted(loads.items(), reverse=True)),
    )


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
