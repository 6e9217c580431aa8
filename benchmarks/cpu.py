"""How near the native CPU backend comes to what the machine can do.

Measures in one run the machine's limits (read bandwidth, float32 and int8 peak), the engine in process,
attention alone, and the server over HTTP, and prints each as a fraction of its limit: medians and ranges of
some rounds.

    make bench-cpu                       everything (about a quarter of an hour on two cores)
    make bench-cpu ARGS="--only engine --models demo --formats int8 --rounds 3"
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path

from cpu_attention import bench_attention
from cpu_engine import bench_engine
from cpu_http import bench_http
from cpu_limits import Report
from cpu_models import FORMATS, MODELS, model_path

from gqa_serve.config import engine_environment
from gqa_serve.engine.cpus import usable_cores
from gqa_serve.engine.kernels.cpu import load

PARTS = ("peaks", "engine", "attention", "http")
KV_FORMATS = ("float32", "bfloat16", "int8")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--formats", nargs="+", choices=list(FORMATS), default=None)
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 4, 16, 32], help="requests or streams")
    parser.add_argument("--context", type=int, default=256, help="of decoding, in tokens")
    parser.add_argument("--prefill", type=int, default=1024, help="tokens of the prompt")
    parser.add_argument("--kv-cache-dtype", choices=("auto", *KV_FORMATS), default="auto")
    parser.add_argument("--contexts", nargs="+", type=int, default=[8192, 32768], help="of attention alone")
    parser.add_argument("--attention-batches", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--kv-formats", nargs="+", choices=KV_FORMATS, default=list(KV_FORMATS))
    parser.add_argument("--attention-bytes", type=int, default=2**30, help="least size of its cache")
    parser.add_argument("--http-prompt", type=int, default=128)
    parser.add_argument("--http-output", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=usable_cores())
    parser.add_argument("--isa", default=None, help="of limits and attention; default: the best")
    parser.add_argument("--cache-dir", type=Path, default=Path(tempfile.gettempdir()) / "gqa-serve-bench")
    parser.add_argument("--json", type=Path, default=None, metavar="FILE")
    return parser.parse_args()


def formats(model: str, asked: list[str] | None) -> list[str]:
    """Those asked for; by default the ones with a target. Only the demo is stored quantized."""
    chosen = asked or ["bfloat16", "int8", "int4", "stored"]
    return [form for form in chosen if form != "stored" or model == "demo"]


def main() -> None:
    args = parse()
    environ = engine_environment()
    if environ != dict(os.environ):  # OpenMP reads it when it is loaded, and the server's engine runs in it
        os.execve(sys.executable, [sys.executable, *sys.argv], environ)
    report = Report(args.isa or load().isa_levels()[-1], args.threads)
    if "peaks" in args.only:
        for _ in range(3):
            print(report.measure_limits(), flush=True)
    if "engine" in args.only:
        for model in args.models:
            path = model_path(model, args.cache_dir)
            for form in formats(model, args.formats):
                bench_engine(report, model, path, form, args)
    if "attention" in args.only:
        bench_attention(report, args)
    if "http" in args.only:
        for form in formats("demo", args.formats):
            bench_http(report, form, args)
    if args.json is not None:
        report.write(args.json)


if __name__ == "__main__":
    main()
