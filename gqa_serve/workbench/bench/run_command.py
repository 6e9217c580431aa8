"""`gqa-serve bench`: one run of traffic over a server, and its report.

Owns the flags of a run and what may go with what. Invariant: files that can't be written are refused before
the first request.
"""

from __future__ import annotations

import argparse
import asyncio
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gqa_serve.command_line import Parser, make_parser
from gqa_serve.errors import ConfigError
from gqa_serve.workbench.bench.setup import (
    ServerChoice,
    add_objective_flags,
    add_server_flags,
    open_target,
    read_objectives,
    read_server,
    server_url,
    split_words,
)
from gqa_serve.workbench.report import Report, add_output_flags, check_output_flags
from gqa_serve.workbench.trace import TraceRequest, write_trace
from gqa_serve.workbench.traffic import LENGTHS_HELP, add_traffic_flags, read_traffic

if TYPE_CHECKING:
    from gqa_serve.workbench.bench.load import Run
    from gqa_serve.workbench.bench.measure import Measurement

_CONCURRENCY = 8
_WARMUP = 2

EXAMPLES = """examples:
  gqa-serve bench --url http://127.0.0.1:8000                  100 requests of 512 + 128 tokens, 8 at a time
  gqa-serve bench --model demo --concurrency 4 -- --kv-cache-dtype int8        a server of its own
  gqa-serve bench --url HOST:8000 --rate 4 --prompt-len lognormal:800,0.9:16-8000 --output-len 200 \\
      --slo-ttft 500ms --slo-tpot 50ms --json a.json --html a.html
  gqa-serve bench --url HOST:8000 --dataset sharegpt.json --tokenizer MODEL --endpoint chat --turns 4 --rate 2
  gqa-serve bench --url HOST:8000 --turns 5 --think exponential:8 --prefixes 3 --prefix-len 600 --rate 3

commands: bench compare A.json B.json, bench saturate, bench selftest; below HTTP: bench kernel, bench engine.
"""


def make_run_parser() -> Parser:
    """The parser of a run."""
    parser = make_parser(
        "gqa-serve bench",
        "Send traffic to an OpenAI-compatible server and measure how it is answered.",
        usage="gqa-serve bench (--url URL | --model MODEL) [options] [-- SERVER_FLAGS]",
        epilog=f"{EXAMPLES}\n{LENGTHS_HELP}",
    )
    add_server_flags(parser)
    add_traffic_flags(parser)
    group = parser.add_argument_group("run")
    group.add_argument(
        "--concurrency",
        type=int,
        metavar="N",
        help="most users at once; without a rate or trace each sends one request after another, default 8",
    )
    group.add_argument("--warmup", type=int, metavar="N", help="requests before the run; default 2")
    group.add_argument("--label", help="what the run is called in comparisons; default: the model's name")
    add_objective_flags(parser)
    group = parser.add_argument_group("files")
    group.add_argument("--records", type=Path, metavar="FILE", help="write one JSON object per request")
    group.add_argument("--write-trace", type=Path, metavar="FILE", help="write what was sent, to replay it")
    group.add_argument(
        "--model-config", metavar="MODEL", help="show KV demand in bytes of this model's cache"
    )
    add_output_flags(parser)
    return parser


def run(words: list[str]) -> None:
    """Parse, measure, report. Raises ConfigError, ModelError."""
    own, server_words = split_words(words)
    args = make_run_parser().parse(own)
    check_output_flags(args)
    for path in (args.records, args.write_trace):
        check_writable(path)
    choice = read_server(args, server_words)
    concurrency = read_concurrency(args)
    num_warmup = _WARMUP if args.warmup is None else args.warmup
    if num_warmup < 0:
        raise ConfigError("--warmup must not be negative.")
    read_objectives(args)
    config = model_config(args.model_config)
    if args.dataset is not None and args.tokenizer is None:
        args.tokenizer = args.model  # None with --url
    requests = read_traffic(args).requests()
    command = shlex.join(["gqa-serve", "bench", *words])
    with server_url(choice) as url:
        report, done = asyncio.run(
            _measure(args, choice, url, requests, concurrency, num_warmup, config, command)
        )
    _write_files(args, done.run)
    report.deliver(args)


def check_writable(path: Path | None) -> None:
    """Raise ConfigError now for what would fail after the run."""
    if path is not None and (path.is_dir() or not path.parent.is_dir()):
        raise ConfigError(f"{path} can't be written: it must be a file in a folder that exists.")


def read_concurrency(args: argparse.Namespace) -> int | None:
    """None: no limit."""
    if args.concurrency is not None:
        if args.concurrency < 1:
            raise ConfigError("--concurrency must be 1 or more.")
        return int(args.concurrency)
    paced = args.rate is not None or args.trace is not None or args.arrivals is not None
    return None if paced else _CONCURRENCY


def model_config(name: str | None) -> Any:
    """The ModelConfig of --model-config. Raises ModelError, HubError."""
    if name is None:
        return None
    from gqa_serve.workbench.model_source import read_model

    return read_model(name).config


async def _measure(
    args: argparse.Namespace,
    choice: ServerChoice,
    url: str,
    requests: list[TraceRequest],
    concurrency: int | None,
    num_warmup: int,
    config: Any,
    command: str,
) -> tuple[Report, Measurement]:
    from gqa_serve.workbench.bench.measure import first_turns, interruptible, measure, warm_up
    from gqa_serve.workbench.bench.run_report import RunFacts, run_report

    multi_turn = any(request.turn for request in requests)
    async with (
        open_target(args, choice, url, multi_turn=multi_turn) as (target, found),
        interruptible() as stop,
    ):
        await warm_up(target, found.words, first_turns(requests, num_warmup), stop)
        if stop.is_set():
            raise ConfigError("Stopped during the warm-up; nothing was measured.")
        done = await measure(target, found.words, requests, concurrency=concurrency, stop=stop)
        if not done.run.sent:
            raise ConfigError("Stopped before the first request ended; nothing was measured.")
        facts = RunFacts(
            label=args.label or target.model,
            server=target.client.base,
            model=target.model,
            endpoint=target.endpoint,
            command=command,
            settings=settings_of(args),
            how_counted=found.how,
            has_usage=found.has_usage,
            refused=target.refused,
            client_cpu=done.client_cpu,
            config=config,
            objectives=read_objectives(args),
        )
        return run_report(done.run, facts), done


def settings_of(args: argparse.Namespace) -> dict[str, Any]:
    """The flags that were given, as JSON has them: what two runs must share to be compared."""
    left_out = {"json", "html", "records", "write_trace", "label", "url", "model", "model_name"}
    return {
        name: str(value) if isinstance(value, Path) else value
        for name, value in vars(args).items()
        if value is not None and name not in left_out
    }


def _write_files(args: argparse.Namespace, done: Run) -> None:
    from gqa_serve.workbench.bench.run_report import replayable
    from gqa_serve.workbench.records import write_records

    if args.records is not None:
        write_records(args.records, done.records)
    if args.write_trace is not None:
        write_trace(args.write_trace, replayable(done))
