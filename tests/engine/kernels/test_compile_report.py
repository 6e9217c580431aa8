"""Kernels compiled for GPUs that are not here, in processes of their own: Triton interprets in this one.

A sample of every run; everything, with `-m slow`.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

triton = pytest.importorskip("triton")

import kernels_to_compile  # noqa: E402
from kernels_to_compile import copying, squaring  # noqa: E402

from gqa_serve.engine.kernels.triton import compile_report  # noqa: E402
from gqa_serve.engine.kernels.triton.compile_report import Row, compile_all, message, render  # noqa: E402
from gqa_serve.engine.kernels.triton.compiled import Compiled, read_result  # noqa: E402
from gqa_serve.engine.kernels.triton.variants import MODULES, Variant, variants  # noqa: E402

ROOT = Path(__file__).parents[3]
REPORT = ROOT / "docs" / "cuda_kernels.md"
GOOD = Compiled(
    target=90, warps=4, registers=168, spill_bytes=0, stack_bytes=0, shared_bytes=38 * 1024,
    instructions={"wgmma": 8}, copy_bytes={16: 4}, load_bytes={4: 2},
)  # fmt: skip


def run(*arguments: str, timeout: float = 250) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    path = os.pathsep.join([str(ROOT), *sys.path])
    return subprocess.run(
        [sys.executable, *arguments],
        env=environment | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


@functools.cache
def found() -> dict[str, Any]:
    result = run(kernels_to_compile.__file__)
    assert result.returncode == 0, result.stderr
    compiled: dict[str, Any] = json.loads(result.stdout)
    return compiled


def test_a_compiled_kernel_is_described() -> None:
    copy, square = found()["copy"], found()["square"]
    assert copy["load_bytes"] == {"16": 1}
    assert copy["shared_bytes"] == copy["spill_bytes"] == 0
    assert copy["warps"] == 4
    assert square["instructions"]["mma"] > 0
    assert set(square["copy_bytes"]) == {"16"}
    assert square["shared_bytes"] >= 64 * 64 * 2
    assert square["registers"] > copy["registers"] > 0
    assert square["fits"]
    assert square["blocks_per_sm"] >= 1


def test_widths_follow_what_is_known_of_the_arguments() -> None:
    assert set(found()["copy, any size"]["load_bytes"]) == {"2"}  # masked element by element
    assert set(found()["copy from anywhere"]["load_bytes"]) == {"2"}


def test_spills_and_too_much_shared_memory_are_seen() -> None:
    assert found()["spilling"]["spill_bytes"] > 100
    assert found()["spilling"]["stack_bytes"] > 0
    assert found()["too large"]["shared_bytes"] > 163 * 1024
    assert not found()["too large"]["fits"]
    assert found()["too large"]["blocks_per_sm"] == 0


def test_a_kernel_that_does_not_compile_says_why() -> None:
    assert "64" in found()["wrong"]
    assert "128" in found()["wrong"]


def test_the_assemblers_log_is_read() -> None:
    ptx = """
        @%p1 ld.global.v4.b32 { %r1, %r2, %r3, %r4 }, [ %rd1 + 0 ];
        ld.global.b16 { %rs1 }, [ %rd1 + 0 ];
        ld.global.L1::evict_first.v2.b64 { %rd3, %rd4 }, [ %rd1 + 0 ];
        ld.shared.v4.b32 { %r1, %r2, %r3, %r4 }, [ %r1 + 0 ];
        cp.async.cg.shared.global [ %r1 + 0 ], [ %rd2 + 0 ], 0x10, %r9;
        cp.async.ca.shared.global [ %r1 + 0 ], [ %rd2 + 0 ], 0x4, %r9;
        cp.async.commit_group;
        cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%r1], [%rd1];
        wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16
        mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32
        ldmatrix.sync.aligned.m8n8.x4.shared.b16
    """  # fmt: skip
    log = (
        "ptxas info    : Function properties for kernel\n"
        "    16 bytes stack frame, 8 bytes spill stores, 12 bytes spill loads\n"
        "ptxas info    : Used 90 registers, used 1 barriers, 16 bytes cumulative stack size\n"
    )
    result = read_result(90, 4, 2048, ptx, log)
    assert (result.registers, result.spill_bytes, result.stack_bytes, result.shared_bytes) == (
        90,
        20,
        16,
        2048,
    )
    assert result.load_bytes == {16: 2, 2: 1}
    assert result.copy_bytes == {16: 1, 4: 1}
    assert result.instructions == {"mma": 1, "wgmma": 1, "TMA": 1, "ldmatrix": 1}
    with pytest.raises(RuntimeError, match="log"):
        read_result(90, 4, 2048, ptx, "")


@pytest.mark.parametrize(
    ("registers", "warps", "shared_kib", "blocks"),
    [
        (32, 4, 0, 16),  # 64 warps
        (32, 1, 0, 32),  # 32 blocks
        (168, 4, 0, 3),  # 3 warps of 5,376 registers in each file of 16,384
        (255, 8, 0, 1),
        (32, 4, 75, 3),  # 76 KiB of 228 each
        (32, 4, 76, 2),
    ],
)
def test_blocks_per_multiprocessor(registers: int, warps: int, shared_kib: int, blocks: int) -> None:
    compiled = Compiled(90, warps, registers, 0, 0, shared_kib * 1024, {}, {}, {})
    assert compiled.blocks_per_sm == blocks


def test_a_variant_accounts_for_every_argument() -> None:
    with pytest.raises(ValueError, match="size"):
        Variant(copying().kernel, "copy", {"source": "*bf16", "target": "*bf16"}, {"BLOCK": 1}, 4, 1)
    with pytest.raises(ValueError, match="twice"):
        Variant(copying().kernel, "copy", {**copying().signature, "BLOCK": "i32"}, {"BLOCK": 1}, 4, 1)


def test_problems_of_a_row() -> None:
    row = Row(squaring(64, 4, 2), 90, GOOD)
    assert row.problem() is None
    assert row.line() == "| square 64 | 90 | 4 | 168 | 0 | 38.0 | 3 | wgmma × 8 | 16 × 4 | 0 | 4 × 2 |"
    large = Row(squaring(64, 4, 2), 90, Compiled(90, 4, 168, 0, 0, 228 * 1024, {}, {}, {}))
    assert "shared memory" in (large.problem() or "")
    failed = Row(squaring(64, 4, 2), 90, "Unsupported")
    assert "does not compile: Unsupported" in (failed.problem() or "")
    assert "does not compile" in render([row, failed])


def test_messages_are_the_assemblers_where_it_spoke() -> None:
    error = RuntimeError(
        "`ptxas` failed with error code 255\n`ptxas` stderr:\n"
        "ptxas /tmp/tmp1x.ptx, line 7; error   : Unknown symbol 'a'\n"
        "ptxas fatal   : Ptx assembly aborted due to errors\n"
        "Repro command: ptxas --gpu-name=sm_80 /tmp/tmp1x.ptx -o /tmp/tmp1x.ptx.o"
    )
    assert message(error) == (
        "ptxas kernel.ptx, line 7; error   : Unknown symbol 'a' / "
        "ptxas fatal   : Ptx assembly aborted due to errors"
    )
    assert message(ValueError("at 3:4:\n  x = y\nunsupported")) == "at 3:4: / unsupported"


def die_of_three(task: tuple[int, int]) -> str:
    if task[0] == 3:
        os._exit(139)
    return f"did {task[0]}"


def test_a_compiler_that_dies_costs_one_variant() -> None:
    tasks = [(index, 90) for index in range(6)]
    results = dict(compile_all(tasks, jobs=2, work=die_of_three))
    assert results == {
        task: "the compiler's process died" if task[0] == 3 else f"did {task[0]}" for task in tasks
    }


def test_a_sample_is_spread_over_the_variants() -> None:
    tasks = compile_report.choose(argparse.Namespace(only=None, sample=None))
    assert len(tasks) == sum(len(variant.targets) for variant in variants()) == len(set(tasks))
    few = compile_report.choose(argparse.Namespace(only=None, sample=2))
    files = {list(variants())[index].file for index, _ in few}
    assert len(few) <= 2 * len(files)
    assert set(few) <= set(tasks)


# --- the kernels of the package ---


def test_every_file_of_kernels_is_listed() -> None:
    folder = ROOT / "gqa_serve" / "engine" / "kernels" / "triton"
    with_variants = {
        path.stem for path in folder.glob("*.py") if "\ndef variants(" in path.read_text("utf-8")
    }
    assert with_variants - {"variants"} == set(MODULES)
    assert {variant.file for variant in variants()} == set(MODULES)


def test_names_tell_variants_apart() -> None:
    names = [str(variant) for variant in variants()]
    assert len(names) == len(set(names))


def test_the_report_names_every_variant_that_exists() -> None:
    lines = REPORT.read_text(encoding="utf-8").splitlines()
    kernel, named = "", []
    for line in lines:
        if line.startswith("### "):
            kernel = line.removeprefix("### ")
        elif kernel and line.startswith("| ") and not line.startswith("| variant"):
            name, target = line.strip("| ").split(" | ")[:2]
            named.append((kernel, name, int(target)))
    expected = [(v.kernel.__name__, v.name, target) for v in variants() for target in v.targets]
    assert sorted(named) == sorted(expected), "run `make compile-report`"


def compare(result: subprocess.CompletedProcess[str]) -> None:
    """What was compiled has no problems and is what the report says, if it is by the same Triton."""
    assert result.returncode == 0, result.stderr
    report = REPORT.read_text(encoding="utf-8").splitlines()
    if f"Triton {triton.__version__}." not in "\n".join(report):
        pytest.skip(f"the report is by another Triton than {triton.__version__}; nothing to compare with")
    made = [
        line for line in result.stdout[result.stdout.index("\n## ") :].splitlines() if line.startswith("| ")
    ]
    assert [line for line in made if line not in report] == [], "run `make compile-report`"


def test_a_sample_compiles_as_the_report_says() -> None:
    """Decode attention may not spill, no kernel may need more shared memory than there is."""
    compare(run("-m", compile_report.__name__, "--only", "decode_attention", "--sample", "4"))


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_everything_compiles_as_the_report_says() -> None:
    compare(run("-m", compile_report.__name__, timeout=3500))
