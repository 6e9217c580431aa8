"""Running the cases of `bench kernel` on a backend, and the report.

Owns which cases are in memory together (those that differ in KV heads alone, which run by turns) and the
limits they are compared with.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch

from gqa_serve.config import omp_num_threads
from gqa_serve.engine.cpus import usable_cores
from gqa_serve.engine.kernels.cpu import NativeUnavailableError, load
from gqa_serve.errors import ConfigError
from gqa_serve.workbench.bench.case_progress import CaseProgress
from gqa_serve.workbench.bench.cpu_kernels import NativeAttention, NativeLinear
from gqa_serve.workbench.bench.kernel_cases import AttentionCase, KernelCase, KernelResult, LinearCase
from gqa_serve.workbench.bench.kernel_report import sections
from gqa_serve.workbench.bench.limits import Ceiling, Limits, Work, processor_name
from gqa_serve.workbench.bench.measured import Measured, rounds_of
from gqa_serve.workbench.hardware import CPU, GPUS, Hardware, find_hardware
from gqa_serve.workbench.report import Report

_MIN_S = 0.2  # of a round of a case

Timed = tuple[Callable[[], float], Work]
"""Seconds of one layer, and what it must read and compute."""


def choose_backend(name: str) -> str:
    """Whose kernels are measured here. Raises ConfigError where they can't run."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "native"
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--backend cuda needs a CUDA device, and there is none here; use --backend native.")
    if name == "native":
        try:
            load()
        except NativeUnavailableError as error:
            raise ConfigError(f"The native kernels can't run here: {error}.") from error
    return name


def measure_kernels(
    backend: str, cases: Sequence[KernelCase], args: argparse.Namespace, report: Report
) -> None:
    """Run all cases and put tables and plots into the report."""
    hardware = None if args.hardware is None else find_hardware(args.hardware)
    if hardware is not None and hardware.is_cpu != (backend == "native"):
        raise ConfigError(
            f"--hardware {args.hardware} is not what the {backend} kernels run on; leave it out."
        )
    progress = CaseProgress()
    if backend == "native":
        _native(cases, args, report, progress, hardware)
    else:
        _cuda(cases, args, report, progress, hardware)


def _native(
    cases: Sequence[KernelCase],
    args: argparse.Namespace,
    report: Report,
    progress: CaseProgress,
    hardware: Hardware | None,
) -> None:
    native = load()
    levels = native.isa_levels()
    isa = levels[-1] if args.cpu_isa == "auto" else args.cpu_isa
    if isa not in levels:
        raise ConfigError(f"--cpu-isa {isa} is not of this processor; it has {', '.join(levels)}.")
    threads = args.threads or omp_num_threads() or usable_cores()
    torch.set_num_threads(threads)

    def prepare(case: KernelCase) -> Timed:
        return native_case(native, isa, threads, case, args.memory)

    def limits() -> Limits | None:
        if hardware is not None and args.hardware.lower() != CPU:
            return None
        with progress.task("Measuring what the machine can do at most"):
            return Limits.measure(isa, threads)

    before = limits()
    results = run_cases(cases, prepare, args.rounds, progress)
    after = limits()
    told = f"{processor_name()}, {threads} thread(s), {isa}"
    formats = ["", *{case.weights: None for case in cases if isinstance(case, LinearCase)}]
    if before is not None and after is not None:
        best = before.better(after)
        ceilings = {name: Ceiling.of_cpu(best, name or "float32") for name in formats}
        told += f"; limits, measured here: {best}"
    else:
        assert hardware is not None
        ceilings = {name: Ceiling.of_sheet(hardware, name or "float32") for name in formats}
    report.sections += [f"{told}.", *sections(results, ceilings)]


def native_case(native: Any, isa: str, threads: int, case: KernelCase, min_bytes: int) -> Timed:
    """The case in memory, ready to be timed."""
    if isinstance(case, AttentionCase):
        attention = NativeAttention(native, isa, threads, case, min_bytes)
        return lambda: attention.seconds(_MIN_S), case.work(attention.token_bytes)
    linear = NativeLinear(native, isa, threads, case, min_bytes)
    return lambda: linear.seconds(_MIN_S), case.work(linear.matrix_bytes)


def _cuda(
    cases: Sequence[KernelCase],
    args: argparse.Namespace,
    report: Report,
    progress: CaseProgress,
    hardware: Hardware | None,
) -> None:
    from gqa_serve.workbench.bench import cuda_kernels

    for flag in ("threads", "cpu_isa"):
        if getattr(args, flag) not in (None, "auto"):
            raise ConfigError(f"--{flag.replace('_', '-')} is for the native kernels; leave it out.")
    name = torch.cuda.get_device_name()
    sheet = hardware or next((gpu for gpu in GPUS if gpu.name.split()[0] in name), None)
    results = run_cases(cases, cuda_kernels.prepare, args.rounds, progress)
    ceilings = {}
    if sheet is not None:
        formats = ["", *{case.weights: None for case in cases if isinstance(case, LinearCase)}]
        ceilings = {form: Ceiling.of_sheet(sheet, form or "bfloat16") for form in formats}
    told = "not known; give --hardware" if sheet is None else f"the data sheet of {sheet.name}"
    report.sections += [f"{name}, PyTorch {torch.__version__}; limits: {told}.", *sections(results, ceilings)]


def run_cases(
    cases: Sequence[KernelCase],
    prepare: Callable[[KernelCase], Timed],
    rounds: int,
    progress: CaseProgress,
) -> list[KernelResult]:
    """Cases that differ in KV heads alone are in memory together and take turns; then they make room."""
    results: list[KernelResult] = []
    with progress.task("Measuring") as update:
        for _, group in itertools.groupby(cases, key=_rest):
            together = list(group)
            progress.label(str(together[0]))
            timed = [prepare(case) for case in together]
            seconds = rounds_of([time for time, _ in timed], rounds)
            results += [
                KernelResult(case, Measured(tuple(of)), work)
                for case, (_, work), of in zip(together, timed, seconds, strict=True)
            ]
            update(len(results), len(cases))
    return results


def _rest(case: KernelCase) -> tuple[object, ...]:
    """What a case is, but for its KV heads."""
    if isinstance(case, LinearCase):
        return (case,)
    return (
        case.part,
        case.heads.num_heads,
        case.heads.head_dim,
        case.kv_dtype,
        case.batch_size,
        case.context_len,
    )
