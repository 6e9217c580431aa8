"""`gqa-serve bench kernel`: attention and matrix products alone, against what the device can do.

Owns the flags and which cases they make. The native kernels run on a CPU, the Triton ones on CUDA; plain
torch is the reference and isn't measured.
"""

from __future__ import annotations

import argparse
import itertools
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from gqa_serve.command_line import Parser, make_parser
from gqa_serve.config import adopt_engine_environment
from gqa_serve.errors import ConfigError
from gqa_serve.settings import parse_size
from gqa_serve.workbench.bench.kernel_cases import AttentionCase, KernelCase, LinearCase
from gqa_serve.workbench.kernel_cost import Heads
from gqa_serve.workbench.report import Report, add_output_flags, check_output_flags

PARTS = ("decode", "prefill", "linear")
_KV = {"native": ("bfloat16", "int8", "float32"), "cuda": ("bfloat16", "int8", "fp8")}
_WEIGHTS = {"native": ("bfloat16", "int8", "int4", "float32"), "cuda": ("bfloat16", "int8", "int4", "fp8")}
_EPILOG = """Without --model the shape is Llama 3 8B's: 32 query heads of 128, hidden size 4096.

  gqa-serve bench kernel --quick
  gqa-serve bench kernel --only decode --num-kv-heads 32 8 4 1 --context-len 1024 8192 --html kernel.html
  gqa-serve bench kernel --model demo --only linear --weights int4 --tokens 1 8 64
"""


def run(words: list[str]) -> None:
    """Measure and report. Raises ConfigError, ModelError."""
    args = _parser().parse(words)
    _check(args)
    shape = _shape(args)
    adopt_engine_environment()  # before anything loads OpenMP

    from gqa_serve.workbench.bench.kernel_run import choose_backend, measure_kernels

    backend = choose_backend(args.backend)
    cases = list(_cases(args, shape, backend))
    report = Report("bench kernel", "Kernels", f"gqa-serve bench kernel {shlex.join(words)}")
    measure_kernels(backend, cases, args, report)
    report.deliver(args)


def _parser() -> Parser:
    parser = make_parser(
        "gqa-serve bench kernel",
        "Measure attention and matrix products alone, against what the device can do.",
        usage="gqa-serve bench kernel [options]",
        epilog=_EPILOG,
    )
    group = parser.add_argument_group("cases")
    whole: dict[str, Any] = {"type": int, "nargs": "+", "metavar": "N"}
    group.add_argument("--only", nargs="+", choices=PARTS, help="of decode, prefill and linear (all)")
    group.add_argument("--model", help="whose shape: hub id, directory, config.json, .gguf file, or 'demo'")
    group.add_argument("--num-heads", type=int, metavar="N", help="query heads (32)")
    group.add_argument("--num-kv-heads", **whole, help="KV heads to compare (all query heads, a quarter, 1)")
    group.add_argument("--head-dim", **whole, help="dimensions of a head (128)")
    group.add_argument("--batch-size", **whole, help="requests that decode (1 8)")
    group.add_argument("--context-len", **whole, help="tokens each decodes over (1024 8192)")
    group.add_argument("--prompt-len", **whole, help="tokens of a prompt (512 2048)")
    group.add_argument("--kv-cache-dtype", nargs="+", metavar="TYPE", help="of K and V (bfloat16 int8)")
    group.add_argument("--weights", nargs="+", metavar="TYPE", help="of matrices (bfloat16 int8 int4)")
    group.add_argument("--tokens", **whole, help="rows that a matrix is multiplied with (1 16 256)")
    group.add_argument("--rounds", type=int, metavar="N", help="how often each case runs (5)")
    group.add_argument("--quick", action="store_true", help="fewer cases and rounds, unless they are given")
    device = parser.add_argument_group("device")
    device.add_argument(
        "--backend", choices=("auto", "native", "cuda"), default="auto", help="whose kernels (auto)"
    )
    device.add_argument("--threads", type=int, metavar="N", help="of the CPU; default: its cores")
    device.add_argument(
        "--cpu-isa", default="auto", help="instruction set of the native kernels (auto: the best)"
    )
    device.add_argument("--hardware", metavar="NAME", help="whose limits; default: measured, or the GPU's")
    device.add_argument(
        "--memory", type=parse_size, default=None, metavar="SIZE", help="least that a case reads (512MiB)"
    )
    add_output_flags(parser)
    return parser


_WHOLE = (
    *("num_heads", "num_kv_heads", "head_dim", "batch_size", "context_len", "prompt_len", "tokens"),
    *("rounds", "threads", "memory"),
)
_OF_PART = {  # flag -> the parts that it is for
    "batch_size": ("decode",),
    "context_len": ("decode",),
    "prompt_len": ("prefill",),
    "kv_cache_dtype": ("decode", "prefill"),
    "num_kv_heads": ("decode", "prefill"),
    "weights": ("linear",),
    "tokens": ("linear",),
}


def _check(args: argparse.Namespace) -> None:
    """Refuse what makes no sense, and fill in what was not given."""
    check_output_flags(args)
    for name in _WHOLE:
        given = getattr(args, name)
        for value in given if isinstance(given, list) else [given]:
            if value is not None and value < 1:
                raise ConfigError(f"--{name.replace('_', '-')} must be at least 1; got {value}.")
    if args.model is not None:
        for name in ("num_heads", "head_dim"):
            if getattr(args, name) is not None:
                raise ConfigError(f"--{name.replace('_', '-')} is the model's; leave it or --model out.")
    for name, parts in _OF_PART.items():
        if args.only is not None and getattr(args, name) is not None and not set(parts) & set(args.only):
            flag = name.replace("_", "-")
            raise ConfigError(f"--{flag} is for {' and '.join(parts)}, which --only leaves out.")
    quick = args.quick
    _default(args, "only", list(PARTS))
    _default(args, "batch_size", [4] if quick else [1, 8])
    _default(args, "context_len", [2048] if quick else [1024, 8192])
    _default(args, "prompt_len", [512] if quick else [512, 2048])
    _default(args, "tokens", [1, 64] if quick else [1, 16, 256])
    _default(args, "kv_cache_dtype", ["bfloat16"] if quick else ["bfloat16", "int8"])
    _default(args, "weights", ["int8"] if quick else ["bfloat16", "int8", "int4"])
    _default(args, "rounds", 2 if quick else 5)
    _default(args, "memory", 2**28 if quick else 2**29)


def _default(args: argparse.Namespace, name: str, value: object) -> None:
    if getattr(args, name) is None:
        setattr(args, name, value)


@dataclass(frozen=True)
class Shape:
    """What is measured: heads, the dimensions to try, and the matrices, (inputs, outputs) by name."""

    num_heads: int
    kv_heads: tuple[int, ...]
    head_dims: tuple[int, ...]
    matrices: dict[str, tuple[int, int]]


_LLAMA_3_8B = {"qkv": (4096, 6144), "o": (4096, 4096), "gate, up": (4096, 28672), "down": (14336, 4096)}


def _shape(args: argparse.Namespace) -> Shape:
    """Of the model, or as given; Llama 3 8B's where nothing is."""
    if args.model is None:
        num_heads = args.num_heads or 32
        counts = args.num_kv_heads or sorted({num_heads, max(1, num_heads // 4), 1}, reverse=True)
        shape = Shape(num_heads, tuple(counts), tuple(args.head_dim or [128]), _LLAMA_3_8B)
    else:
        from gqa_serve.workbench.model_source import read_model

        config = read_model(args.model).config
        q_size, kv_size = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        counts = args.num_kv_heads or sorted({config.num_heads, config.num_kv_heads, 1}, reverse=True)
        matrices = {
            "qkv": (config.hidden_size, q_size + 2 * kv_size),
            "o": (q_size, config.hidden_size),
            "gate, up": (config.hidden_size, 2 * config.intermediate_size),
            "down": (config.intermediate_size, config.hidden_size),
        }
        shape = Shape(config.num_heads, tuple(counts), (config.head_dim,), matrices)
    for count in shape.kv_heads:
        if shape.num_heads % count:
            raise ConfigError(f"{count} KV heads do not divide {shape.num_heads} query heads.")
    return shape


def _cases(args: argparse.Namespace, shape: Shape, backend: str) -> Iterator[KernelCase]:
    """Those to be compared with each other one after the other: KV heads change fastest."""
    for flag, given, known in (
        ("kv-cache-dtype", args.kv_cache_dtype, _KV[backend]),
        ("weights", args.weights, _WEIGHTS[backend]),
    ):
        for name in given:
            if name not in known:
                raise ConfigError(
                    f"--{flag} of the {backend} kernels is one of {', '.join(known)}; got {name}."
                )
    sizes = {
        "decode": list(itertools.product(args.context_len, args.batch_size)),
        "prefill": [(length, 1) for length in args.prompt_len],
    }
    for part in ("decode", "prefill"):
        if part not in args.only:
            continue
        for dtype, dim, (length, batch) in itertools.product(
            args.kv_cache_dtype, shape.head_dims, sizes[part]
        ):
            for count in shape.kv_heads:
                yield AttentionCase(
                    "decode" if part == "decode" else "prefill",
                    Heads(shape.num_heads, count, dim),
                    dtype,
                    batch,
                    length,
                )
    if "linear" in args.only:
        for (name, (inputs, outputs)), weights, tokens in itertools.product(
            shape.matrices.items(), args.weights, args.tokens
        ):
            yield LinearCase(name, inputs, outputs, weights, tokens)
