"""The flags of `gqa-serve plan` and how their values are read. Knows nothing of what they do."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from gqa_serve.command_line import Parser, make_parser
from gqa_serve.errors import ConfigError
from gqa_serve.settings import parse_size
from gqa_serve.workbench.hardware import NAMED
from gqa_serve.workbench.plan.serving_formats import KV_DTYPES, QUANTIZATIONS
from gqa_serve.workbench.report import add_output_flags

DEFAULT_CONTEXT_LEN = 4096
_KV_ALIASES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}

_EPILOG = """examples:
  gqa-serve plan --model meta-llama/Meta-Llama-3-8B --hardware h100 --price 2.5
  gqa-serve plan --model meta-llama/Llama-2-70b-hf --hardware a100 --tensor-parallel 2,4,8
  gqa-serve plan --model ./config.json --kv-dtypes bfloat16,int8,fp8 --context-lens 2048,32768
  gqa-serve plan --model demo --hardware cpu --batch-sizes 1,8,32 --html plan.html

Nothing is loaded: of a model on the hub, config.json alone is downloaded.
"""


def make_plan_parser() -> Parser:
    """All flags; whoever parses finds None where a flag was not given."""
    parser = make_parser(
        "gqa-serve plan",
        "What a model needs and can reach on a device, for MHA, every number of KV heads, and MQA: memory, "
        "requests that\nfit, time of a step, tokens per second, cost. By arithmetic, from config.json and a "
        "data sheet.",
        usage="gqa-serve plan --model MODEL [--hardware NAME] [options]",
        epilog=_EPILOG,
    )
    group = parser.add_argument_group("model")
    group.add_argument("--model", help="hub id, directory, .gguf file, config.json, or 'demo'")
    group.add_argument("--revision", help="branch, tag or commit on the hub")
    group.add_argument("--offline", action="store_true", help="use only files already downloaded")
    group.add_argument(
        "--num-kv-heads",
        type=_whole_numbers,
        metavar="LIST",
        help="numbers of KV heads to compare, e.g. 32,8,1; default: every one that divides the heads",
    )
    group = parser.add_argument_group("hardware")
    group.add_argument(
        "--hardware",
        default="h100",
        metavar="NAME",
        help=f"{', '.join(NAMED)}, cpu (this machine, measured), or a .yaml file; default: h100",
    )
    group.add_argument(
        "--tensor-parallel",
        type=_whole_numbers,
        metavar="LIST",
        help="numbers of devices that share the model, e.g. 1,2,4,8; default: the first that it fits into",
    )
    group.add_argument(
        "--price", type=_positive, help="of one device per hour, for the cost of a million output tokens"
    )
    _add_serving_flags(parser)
    add_output_flags(parser)
    return parser


def _add_serving_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("requests")
    group.add_argument(
        "--context-lens",
        type=_whole_numbers,
        metavar="LIST",
        help=f"tokens of a request, prompt and output; default: {DEFAULT_CONTEXT_LEN}, or the model's most",
    )
    group.add_argument(
        "--prompt-lens",
        type=_whole_numbers,
        metavar="LIST",
        help="tokens of prompts whose first token is timed; default: the context",
    )
    group.add_argument(
        "--batch-sizes", type=_whole_numbers, metavar="LIST", help="also a table at these numbers of requests"
    )
    group = parser.add_argument_group("as the server's settings")
    group.add_argument(
        "--quantization",
        choices=QUANTIZATIONS,
        default="auto",
        help="of weights; auto: as the checkpoint has",
    )
    group.add_argument(
        "--kv-dtypes",
        type=_kv_dtypes,
        metavar="LIST",
        help=f"precisions of K and V to compare: auto, {', '.join(KV_DTYPES)}; default: auto",
    )
    group.add_argument(
        "--gpu-memory-utilization",
        "--memory-utilization",
        type=_share,
        metavar="SHARE",
        help="of a GPU's memory for weights and KV cache (0.9)",
    )
    group.add_argument(
        "--kv-cache-memory", type=_size, metavar="SIZE", help="memory of the KV cache, e.g. 2GiB"
    )
    group.add_argument(
        "--reserve", type=_size, metavar="SIZE", help="what a GPU's context and libraries take (512MiB)"
    )
    group.add_argument("--block-size", type=_whole_number, metavar="N", help="tokens per KV block (16)")
    group.add_argument(
        "--max-num-batched-tokens", type=_whole_number, metavar="N", help="most tokens of a step (2048)"
    )
    group.add_argument(
        "--max-num-seqs", type=_whole_number, metavar="N", help="most requests computed at once (128)"
    )


def _checked(convert: Callable[[str], Any], what: str) -> Callable[[str], Any]:
    """An argparse type whose failure says `what` is expected."""

    def parse(text: str) -> Any:
        try:
            return convert(text)
        except (ValueError, ConfigError) as error:
            raise argparse.ArgumentTypeError(f"expected {what}, got {text!r}") from error

    return parse


def _natural(text: str) -> int:
    value = int(text)
    if not 1 <= value <= 10**9:
        raise ValueError(text)
    return value


def _between(low: float, high: float) -> Callable[[str], float]:
    def convert(text: str) -> float:
        value = float(text)
        if not low < value <= high:
            raise ValueError(text)
        return value

    return convert


def _dtype(text: str) -> str:
    name = _KV_ALIASES.get(text, text)
    if name != "auto" and name not in KV_DTYPES:
        raise ValueError(text)
    return name


def _list_of(convert: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    return lambda text: list(dict.fromkeys(convert(part.strip()) for part in text.split(",")))


_whole_number = _checked(_natural, "a whole number from 1 on")
_whole_numbers = _checked(_list_of(_natural), "whole numbers from 1 on with commas between, such as 1,2,4")
_kv_dtypes = _checked(_list_of(_dtype), f"some of auto, {', '.join(KV_DTYPES)}, with commas between")
_share = _checked(_between(0, 1), "a share above 0 and up to 1, such as 0.9")
_positive = _checked(_between(0, 1e12), "a price above 0")
_size = _checked(parse_size, "a size such as 512MiB or 2GiB")
