"""The command line of `gqa-serve uptrain`: flags, and which of its three answers is wanted.

Owns the help. Imports nothing heavy, so that help and errors come at once.
"""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path
from typing import Any

from gqa_serve.command_line import Parser, make_parser
from gqa_serve.workbench.report import add_output_flags, check_output_flags
from gqa_serve.workbench.uptrain.budget import ALPHA
from gqa_serve.workbench.uptrain.options import GIVEN, Options

_EPILOG = """examples:
  gqa-serve uptrain --model llama-gqa4 --budget-only            how many tokens, how much memory
  gqa-serve uptrain --model llama-gqa4 --dry-run                ... and how long on this machine
  gqa-serve uptrain --model llama-gqa4 --text books/ --output llama-gqa4-up
  gqa-serve uptrain --model llama-gqa4 --teacher llama --text books/ --output llama-gqa4-up
  gqa-serve uptrain --from-config config.json --train-tokenizer 2048 --tokens 2M --text docs/ --output tiny

Killed or stopped (Ctrl-C), the same command goes on where the last state was saved, to the same weights.
docs/workbench/uptrain.md has the formulas.
"""


class _Given(argparse.Action):
    """Keeps the value, and that it was given: a flag that would mean nothing is refused."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: Any = None) -> None:
        setattr(namespace, self.dest, values)
        setattr(namespace, f"{self.dest}_given", True)


def run(words: list[str]) -> None:
    """Parse `words`, train (or only say what it would take), report."""
    args = _parser().parse(words)
    options = Options.from_args(args)
    check_output_flags(args)
    command = shlex.join(["gqa-serve", "uptrain", *words])
    from gqa_serve.workbench.uptrain import estimate

    if options.budget_only or options.dry_run:
        estimate.report(options, command).deliver(args)
        return
    from gqa_serve.workbench.uptrain import session

    session.uptrain(options, command).deliver(args)


def _parser() -> Parser:
    parser = make_parser(
        "gqa-serve uptrain",
        "Continue pretraining a converted checkpoint on your text, so that it recovers the quality it lost.",
        usage="gqa-serve uptrain --model MODEL --text FILES --output FOLDER [options]",
        epilog=_EPILOG,
    )
    parser.set_defaults(**{f"{name}_given": False for name in GIVEN})
    _add_model(parser)
    _add_text(parser)
    _add_objective(parser)
    _add_optimization(parser)
    _add_running(parser)
    add_output_flags(parser)
    return parser


def _add_model(parser: Parser) -> None:
    group = parser.add_argument_group("model")
    group.add_argument("--model", metavar="MODEL", help="checkpoint to go on from: a folder or a hub id")
    group.add_argument("--revision", help="branch, tag or commit, where --model is a hub id")
    group.add_argument(
        "--offline", action="store_true", help="use what the hub cache holds of --model and --teacher"
    )
    group.add_argument("--output", type=Path, metavar="FOLDER", help="where the trained checkpoint goes")
    group.add_argument(
        "--from-config", type=Path, metavar="FILE", help="train a new model of this config.json from scratch"
    )
    group.add_argument(
        "--tokenizer", type=Path, metavar="FOLDER", help="of --from-config: where its tokenizer.json is"
    )
    group.add_argument(
        "--train-tokenizer",
        type=int,
        metavar="SIZE",
        help="of --from-config: a byte-level BPE made of the text",
    )
    group.add_argument(
        "--train", choices=("all", "attention", "kv"), default="all",
        help="parameters to train: all, those of attention, the K and V projections (all)",
    )  # fmt: skip
    group.add_argument(
        "--save-dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto",
        help="of the result; auto: as --model is stored",
    )  # fmt: skip


def _add_text(parser: Parser) -> None:
    group = parser.add_argument_group("text")
    group.add_argument(
        "--text", type=Path, nargs="+", default=[], metavar="PATH",
        help='.txt and .md (a document each), .jsonl (one per line, in "text"), or folders of these',
    )  # fmt: skip
    group.add_argument(
        "--validation-text", type=Path, nargs="+", default=[], metavar="PATH",
        help="measured on and never trained on; without it a part of --text is held out",
    )  # fmt: skip
    group.add_argument(
        "--validation-share", type=float, default=0.02, action=_Given, metavar="SHARE",
        help="of --text to hold out, at most 64 sequences (0.02); 0: none",
    )  # fmt: skip
    group.add_argument(
        "--seq-len",
        type=int,
        metavar="TOKENS",
        help="tokens of a sequence (1024, or the model's context if less)",
    )


def _add_objective(parser: Parser) -> None:
    group = parser.add_argument_group("objective")
    group.add_argument(
        "--teacher", metavar="MODEL", help="learn its predictions too: usually the model before conversion"
    )
    group.add_argument(
        "--distill-weight", type=float, default=0.5, action=_Given, metavar="SHARE",
        help="of the teacher's predictions against the text itself (0.5); 1: the teacher alone",
    )  # fmt: skip
    group.add_argument(
        "--temperature",
        type=float,
        default=1.0,
        action=_Given,
        metavar="T",
        help="that softens both predictions (1)",
    )
    group = parser.add_argument_group("budget")
    group.add_argument("--tokens", metavar="N", help="tokens to train on, such as 500k, 20M, 1.5B")
    group.add_argument("--original-tokens", metavar="N", help="tokens of the model's pretraining, such as 2T")
    group.add_argument(
        "--alpha", type=float, default=ALPHA, action=_Given, metavar="SHARE",
        help="of the pretraining to repeat (0.05)",
    )  # fmt: skip
    group.add_argument("--budget-only", action="store_true", help="print tokens, steps and memory, and stop")
    group.add_argument(
        "--dry-run", action="store_true", help="the same, and measure two steps; writes nothing"
    )


def _add_optimization(parser: Parser) -> None:
    group = parser.add_argument_group("optimization (AdamW, betas 0.9 and 0.95)")
    group.add_argument(
        "--learning-rate", type=float, metavar="RATE", help="at its peak (1e-4; 1e-3 from scratch)"
    )
    group.add_argument(
        "--warmup-share", type=float, default=0.02, metavar="SHARE", help="of the steps, linear (0.02)"
    )
    group.add_argument(
        "--final-share",
        type=float,
        default=0.1,
        metavar="SHARE",
        help="of the peak at the end of the cosine (0.1)",
    )
    group.add_argument(
        "--weight-decay", type=float, default=0.1, metavar="W", help="of matrices, not of vectors (0.1)"
    )
    group.add_argument("--clip", type=float, default=1.0, metavar="NORM", help="largest gradient norm (1)")
    group.add_argument("--batch-size", type=int, default=16, metavar="N", help="sequences per step (16)")
    group.add_argument(
        "--micro-batch-size",
        type=int,
        metavar="N",
        help="sequences computed at a time (as many as make up 4096 tokens)",
    )
    group.add_argument(
        "--seed", type=int, default=0, metavar="N", help="of the order of the text and of new weights (0)"
    )


def _add_running(parser: Parser) -> None:
    group = parser.add_argument_group("machine")
    group.add_argument("--device", default="auto", metavar="NAME", help="auto, cpu or cuda")
    group.add_argument(
        "--dtype", choices=("auto", "float32", "bfloat16"), default="auto",
        help="of matrix products; auto: bfloat16 where the machine multiplies it (weights: float32)",
    )  # fmt: skip
    group.add_argument("--threads", type=int, metavar="N", help="on a CPU (its physical cores)")
    group.add_argument(
        "--recompute",
        action="store_true",
        help="keep each layer's input alone: less memory, a third more work",
    )
    group = parser.add_argument_group("states")
    group.add_argument("--save-steps", type=int, metavar="N", help="save a state every N steps too")
    group.add_argument(
        "--save-minutes", type=float, default=10.0, metavar="N", help="and every N minutes (10)"
    )
    group.add_argument("--keep", type=int, default=2, metavar="N", help="states to keep (2)")
    group.add_argument(
        "--validate-steps", type=int, metavar="N", help="measure every N steps (a tenth of them)"
    )
    group.add_argument("--restart", action="store_true", help="begin again in an --output that was begun")
