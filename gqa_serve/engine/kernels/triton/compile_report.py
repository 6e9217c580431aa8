"""The compile report: every kernel in every form that the engine launches, for every GPU generation.

    python -m gqa_serve.engine.kernels.triton.compile_report --output docs/cuda_kernels.md

Owns the sweep over variants (in processes, since a compiler may die) and the tables of docs/cuda_kernels.md.
Does not know how a kernel is compiled (`compiled.py`).
Invariant: a variant that fails is a line of the report and an exit code of 1, and the others are compiled all
the same; the text depends on the kernels and on the versions named in it, on no machine, path or date.
"""

from __future__ import annotations

import argparse
import functools
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import cpu_count, get_context
from pathlib import Path
from typing import Any

import triton

from gqa_serve.engine.kernels.triton.compiled import ARCHITECTURES, KIB, Compiled, compile_variant
from gqa_serve.engine.kernels.triton.variants import MODULES, TARGETS, Variant, variants

NO_SPILLS = ("decode_attention",)  # files whose kernels must keep everything in registers
TENSOR_CORES = ("mma", "wgmma", "tcgen05")
GPUS = {80: "A100", 90: "H100, H200", 100: "B200"}

_PTXAS_ERROR = re.compile(r"ptxas (fatal|error|\S+, line \d+; (fatal|error))")

Task = tuple[int, int]
"""A variant, by its place in `variants()`, and a target: what can be sent to another process."""


@dataclass(frozen=True)
class Row:
    """A variant and what became of it on one target: an error message where it did not compile."""

    variant: Variant
    target: int
    result: Compiled | str

    def problem(self) -> str | None:
        """What must not be shipped, in one sentence."""
        who = f"{self.variant.file}: {self.variant} on sm_{self.target}"
        it = self.result
        if isinstance(it, str):
            return f"{who} does not compile: {it}"
        if not it.fits:
            limit = ARCHITECTURES[self.target].block_shared_bytes
            return f"{who} needs {it.shared_bytes} bytes of shared memory; a block may have {limit}"
        if self.variant.file in NO_SPILLS and (it.spill_bytes or it.stack_bytes):
            return f"{who} spills {it.spill_bytes} bytes of registers ({it.stack_bytes} of stack)"
        return None

    def line(self) -> str:
        """A line of the kernel's table."""
        if isinstance(self.result, str):
            return f"| {self.variant.name} | {self.target} | does not compile | | | | | | | | |"
        it = self.result
        cells = [
            self.variant.name,
            str(self.target),
            str(it.warps),
            str(it.registers),
            str(it.spill_bytes) if not it.spill_bytes else f"**{it.spill_bytes}**",
            f"{it.shared_bytes / KIB:.1f}" if it.fits else f"**{it.shared_bytes / KIB:.1f}**",
            str(it.blocks_per_sm),
            _counts({name: it.instructions.get(name, 0) for name in TENSOR_CORES}),
            _counts({"TMA": it.instructions.get("TMA", 0), **it.copy_bytes}),
            str(it.instructions.get("ldmatrix", 0)),
            _counts(it.load_bytes),
        ]
        return f"| {' | '.join(cells)} |"


def _counts(counts: Mapping[Any, int]) -> str:
    """ "16 x 8, 4 x 2": each key that occurs, and how often."""
    return ", ".join(f"{key} × {count}" for key, count in counts.items() if count) or "-"


COLUMNS = {
    "variant": "---",
    "sm": "---:",
    "warps": "---:",
    "registers": "---:",
    "spilled": "---:",
    "shared KiB": "---:",
    "blocks / SM": "---:",
    "tensor cores": "---",
    "async copies": "---",
    "ldmatrix": "---:",
    "loads": "---",
}
HEADER = f"| {' | '.join(COLUMNS)} |\n|{'|'.join(COLUMNS.values())}|"

INTRODUCTION = """\
# The CUDA kernels, compiled

Every kernel of `gqa_serve/engine/kernels/triton/` in every form that the engine launches, compiled for
{targets} by Triton {version}.
Nothing here was run: this is what the compiler and the assembler say. Made by `make compile-report`, which
ends with an error where a variant does not compile, where a block needs more shared memory than the GPU has,
or where the decode kernel spills a register; `tests/engine/kernels/test_compile_report.py` compiles a sample
anew and compares.

* registers, spilled: per thread, from `ptxas -v`; spilled counts bytes stored plus bytes loaded.
* shared KiB: of one block. It may have {limits}.
* blocks / SM: how many blocks a multiprocessor holds at once by registers, shared memory and warps.
* tensor cores: places in the code that multiply on them: `mma` (Ampere's instruction, on any of them),
  `wgmma` (Hopper), `tcgen05` (Blackwell).
* async copies, loads: places that read global memory into shared memory past the registers, and into
  registers, by the bytes that one thread reads at once (16 × 8 = eight places of 16 bytes).
"""


def render(rows: Sequence[Row]) -> str:
    """The report, in the order of the rows."""
    limits = ", ".join(
        f"{ARCHITECTURES[target].block_shared_bytes // KIB} KiB on sm_{target}" for target in TARGETS
    )
    targets = ", ".join(f"sm_{target} ({GPUS[target]})" for target in TARGETS)
    parts = [INTRODUCTION.format(targets=targets, version=triton.__version__, limits=limits), _summary(rows)]
    for file in MODULES:
        of_file = [row for row in rows if row.variant.file == file]
        if of_file:
            parts.append(f"## {file}\n")
        for kernel in dict.fromkeys(row.variant.kernel.__name__ for row in of_file):
            lines = [row.line() for row in of_file if row.variant.kernel.__name__ == kernel]
            parts.append("\n".join([f"### {kernel}\n", HEADER, *lines, ""]))
    problems = [problem for row in rows if (problem := row.problem())]
    if problems:
        parts.append("\n".join(["## Problems\n", *(f"* {problem}" for problem in problems), ""]))
    return "\n".join(parts)


def _summary(rows: Sequence[Row]) -> str:
    """One line per kernel and target: the worst of its variants."""
    lines = [
        "| kernel | sm | variants | registers | spilling | shared KiB | tensor cores | async copies |",
        "|---|---:|---:|---:|---:|---:|---|---|",
    ]
    groups: dict[tuple[str, int], list[Compiled]] = {}
    for row in rows:
        if isinstance(row.result, Compiled):
            groups.setdefault((row.variant.kernel.__name__, row.target), []).append(row.result)
    order = list(dict.fromkeys(kernel for kernel, _ in groups))
    for kernel, target in sorted(groups, key=lambda group: (order.index(group[0]), group[1])):
        results = groups[kernel, target]
        used = {name for result in results for name in result.instructions}
        widths = {width for result in results for width in result.copy_bytes}
        cells = [
            kernel,
            str(target),
            str(len(results)),
            str(max(result.registers for result in results)),
            str(sum(result.spill_bytes > 0 for result in results)),
            f"{max(result.shared_bytes for result in results) / KIB:.1f}",
            ", ".join(name for name in TENSOR_CORES if name in used) or "-",
            ", ".join(f"{width} bytes" for width in sorted(widths, reverse=True)) or "-",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def _compile(task: Task) -> Compiled | str:
    """Runs in a worker. Whatever stops the compiler is the variant's result: the report goes on."""
    index, target = task
    try:
        return compile_variant(_all_variants()[index], target)
    except Exception as error:
        return message(error)


@functools.cache
def _all_variants() -> tuple[Variant, ...]:
    """Listed once per process."""
    return tuple(variants())


def message(error: Exception) -> str:
    """The lines that tell what is wrong: the assembler's where it spoke, else the error's first and last."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [repr(error)]
    of_ptxas = [line for line in lines if _PTXAS_ERROR.match(line)]
    text = " / ".join(dict.fromkeys(of_ptxas[:3] or [lines[0], lines[-1]]))
    return re.sub(r"\S+\.ptx", "kernel.ptx", text)  # a temporary file's name


def compile_all(
    tasks: Sequence[Task], jobs: int, work: Callable[[Task], Compiled | str] = _compile
) -> Iterator[tuple[Task, Compiled | str]]:
    """Results as they come. If a worker dies, all that it may have been at is tried again, one by one."""
    waiting = list(reversed(tasks))
    while waiting:
        in_flight: dict[Future[Compiled | str], Task] = {}
        try:
            with _pool(jobs) as pool:
                while waiting or in_flight:
                    while waiting and len(in_flight) < jobs:
                        task = waiting[-1]
                        in_flight[pool.submit(work, task)] = task
                        waiting.pop()
                    for future in wait(in_flight, return_when=FIRST_COMPLETED).done:
                        result = future.result()
                        yield in_flight.pop(future), result
        except BrokenProcessPool:
            for task in in_flight.values():
                yield task, _alone(task, work)


def _alone(task: Task, work: Callable[[Task], Compiled | str]) -> Compiled | str:
    try:
        with _pool(1) as pool:
            return pool.submit(work, task).result()
    except BrokenProcessPool:
        return "the compiler's process died"


def _pool(jobs: int) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(jobs, mp_context=get_context("spawn"))


def choose(args: argparse.Namespace) -> list[Task]:
    """The tasks that the flags ask for; `--sample` takes a file's variants evenly, and targets in turn."""
    listed = _all_variants()
    chosen: list[Task] = []
    for file in args.only or MODULES:
        of_file = [index for index, variant in enumerate(listed) if variant.file == file]
        if not args.sample:
            chosen += [(index, target) for index in of_file for target in listed[index].targets]
            continue
        count = min(args.sample, len(of_file))
        for place in range(count):
            index = of_file[place * len(of_file) // count]
            targets = listed[index].targets
            chosen.append((index, targets[place % len(targets)]))
    return chosen


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; the exit code says whether there were problems."""
    parser = argparse.ArgumentParser(prog="compile_report", description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--only", nargs="+", choices=MODULES, help="kernels of these files alone")
    parser.add_argument("--sample", type=int, help="at most so many variants of each file, each for one GPU")
    parser.add_argument("--jobs", type=int, default=cpu_count(), help="processes (default: all processors)")
    parser.add_argument("--output", type=Path, help="write the report there instead of to standard output")
    args = parser.parse_args(arguments)
    if triton.knobs.runtime.interpret:
        parser.error("Triton interprets; unset TRITON_INTERPRET to compile.")
    if args.output and (args.only or args.sample):
        parser.error("--output is for the whole report; without it, a part is printed.")
    tasks = choose(args)
    results: dict[Task, Compiled | str] = {}
    for task, result in compile_all(tasks, args.jobs):
        results[task] = result
        _progress(len(results), len(tasks), f"sm_{task[1]} {_all_variants()[task[0]]}")
    rows = [Row(_all_variants()[index], target, results[index, target]) for index, target in tasks]
    if args.output:
        args.output.write_text(render(rows), encoding="utf-8")
    else:
        print(render(rows))
    problems = [problem for row in rows if (problem := row.problem())]
    print(f"{len(rows)} compilations, {len(problems)} problems", *problems, sep="\n", file=sys.stderr)
    return 1 if problems or not rows else 0


def _progress(done: int, of: int, what: str) -> None:
    """One line that is written over where somebody watches; elsewhere a line now and then."""
    line = f"[{done}/{of}] {what}"
    if sys.stderr.isatty():
        print(f"\r\033[K{line[:100]}", end="\n" if done == of else "", file=sys.stderr, flush=True)
    elif done % 50 == 0:
        print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
