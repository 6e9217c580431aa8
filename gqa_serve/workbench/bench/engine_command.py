"""`gqa-serve bench engine`: the engine in this process, without HTTP.

Owns the flags and the order of the work: load, measure the machine, run the cases or the trace, report. The
model is loaded and stepped by the server's own code, with the server's own settings.
"""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path
from typing import Any

from gqa_serve.command_line import Parser, make_parser
from gqa_serve.config import EngineConfig, adopt_engine_environment, collect
from gqa_serve.errors import ConfigError
from gqa_serve.settings import add_flags
from gqa_serve.workbench.report import Report, add_output_flags, check_output_flags

PARTS = ("decode", "prefill", "mixed")
_ROUNDS, _QUICK_ROUNDS = 5, 2

_EPILOG = """Prompts of decoding requests are not computed: a step takes as long whatever K and V say, so that
the cache is filled with random numbers once (--compute-prompts computes them).

  gqa-serve bench engine --model demo --quick                 a first look, under a minute
  gqa-serve bench engine --model demo --batch-size 1 8 32 --context-len 512 4096 --html engine.html
  gqa-serve bench engine --model demo --num-kv-heads all      the same shape as MHA, GQA, MQA, random weights
  gqa-serve bench engine --model demo --steps steps.jsonl     what `gqa-serve simulate` fits its cost model to
  gqa-serve bench engine --model demo --trace traffic.jsonl --records measured.jsonl
"""


def run(words: list[str]) -> None:
    """Measure and report. Raises ConfigError, ModelError, CacheCapacityError."""
    args = _parser().parse(words)
    _check(args)
    (config,) = collect([EngineConfig], vars(args))
    if not config.model:
        raise ConfigError("Which model? Give --model a hub id, a directory, a .gguf file, or 'demo'.")
    if args.rounds is None:
        args.rounds = _QUICK_ROUNDS if args.quick else _ROUNDS
    adopt_engine_environment()  # before anything loads OpenMP

    from gqa_serve.logs import configure_logging
    from gqa_serve.workbench.bench.engine_run import EngineRun

    configure_logging("warning")
    report = Report("bench engine", f"Engine: {config.model}", f"gqa-serve bench engine {shlex.join(words)}")
    EngineRun(args, config, report).all()
    report.deliver(args)


def _parser() -> Parser:
    parser = make_parser(
        "gqa-serve bench engine",
        "Measure the engine in this process: decoding, prompts, and both at once; or replay a trace.",
        usage="gqa-serve bench engine --model MODEL [options]",
        epilog=_EPILOG,
    )
    cases = parser.add_argument_group("cases")
    cases.add_argument("--only", nargs="+", choices=PARTS, help="of decode, prefill and mixed (all)")
    whole: dict[str, Any] = {"type": int, "nargs": "+", "metavar": "N"}
    cases.add_argument("--batch-size", **whole, help="requests that decode at once (1 4 16)")
    cases.add_argument("--context-len", **whole, help="tokens of each, prompt and answer (256 2048)")
    cases.add_argument("--prompt-len", **whole, help="tokens of a prompt computed alone (128 512 2048)")
    cases.add_argument("--num-prompts", **whole, help="prompts that arrive together (1)")
    cases.add_argument("--mixed-batch-size", **whole, help="requests that decode beside a prompt (8)")
    cases.add_argument("--mixed-prompt-len", **whole, help="tokens of that prompt (256)")
    cases.add_argument(
        "--num-kv-heads",
        nargs="+",
        metavar="N",
        help="compare: the model's shape with so many KV heads, random weights; all: all that divide",
    )
    cases.add_argument("--rounds", type=int, metavar="N", help=f"how often each case runs ({_ROUNDS})")
    cases.add_argument("--quick", action="store_true", help="fewer cases and rounds, unless they are given")
    cases.add_argument(
        "--compute-prompts", action="store_true", help="compute the prompts of decoding requests too"
    )
    cases.add_argument(
        "--hardware", metavar="NAME", help="whose limits to compare with; default: this CPU's, measured"
    )
    trace = parser.add_argument_group("traffic and steps")
    trace.add_argument("--trace", type=Path, metavar="FILE", help="replay these requests at their times")
    trace.add_argument("--records", type=Path, metavar="FILE", help="of --trace: write what each request saw")
    trace.add_argument(
        "--steps", type=Path, metavar="FILE", help="write how long each step took; more cases, for a fit"
    )
    add_output_flags(parser)
    add_flags(parser, EngineConfig)
    return parser


def _check(args: argparse.Namespace) -> None:
    """Refuse what makes no sense before anything is loaded."""
    check_output_flags(args)
    for name in _SERVERS:
        if name in vars(args):
            raise ConfigError(
                f"--{name.replace('_', '-')} is for a server; there is none here. Leave it out."
            )
    if args.records is not None and args.trace is None:
        raise ConfigError("--records is what the requests of --trace saw; give a --trace too.")
    if args.num_kv_heads is not None:
        for flag, given in (("--trace", args.trace), ("--steps", args.steps)):
            if given is not None:
                raise ConfigError(f"{flag} is of one model; leave out --num-kv-heads.")
    if args.trace is not None and args.only is None and args.steps is None:
        named = [name for name in GRID if getattr(args, name) is not None]
        if named:
            flag = named[0].replace("_", "-")
            raise ConfigError(f"--trace is measured instead of cases; add --only for those of --{flag}.")
    for name in (*GRID, "rounds"):
        given = getattr(args, name)
        for value in given if isinstance(given, list) else [given]:
            if value is not None and value < 1:
                raise ConfigError(f"--{name.replace('_', '-')} must be at least 1; got {value}.")
    for path in (args.records, args.steps):
        if path is not None and not path.parent.is_dir():
            raise ConfigError(f"There is no folder {path.parent} to write {path.name} into.")


_SERVERS = ("max_waiting", "max_waiting_tokens", "queue_timeout", "engine_timeout")
GRID = {  # flag -> field of Grid
    "batch_size": "batch_sizes",
    "context_len": "context_lens",
    "prompt_len": "prompt_lens",
    "num_prompts": "num_prompts",
    "mixed_batch_size": "mixed_batch_sizes",
    "mixed_prompt_len": "mixed_prompt_lens",
}
