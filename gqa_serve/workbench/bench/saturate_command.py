"""`gqa-serve bench saturate`: the highest rate of requests that meets objectives, and the curve up to there.

Owns the flags, how long each rate is tried, and the report. `search.py` decides which rates.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import math
import shlex
from collections.abc import Sequence
from typing import TYPE_CHECKING

from gqa_serve.command_line import Parser, make_parser
from gqa_serve.errors import ConfigError
from gqa_serve.workbench.bench.run_command import settings_of
from gqa_serve.workbench.bench.search import Found, Point, find_highest_rate
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
from gqa_serve.workbench.records import Objectives, summarize
from gqa_serve.workbench.report import (
    Cell,
    Column,
    Plot,
    Report,
    Series,
    Table,
    add_output_flags,
    check_output_flags,
    number,
    percent,
    scaled,
)
from gqa_serve.workbench.trace import TraceRequest
from gqa_serve.workbench.traffic import LENGTHS_HELP, Traffic, add_traffic_flags, read_traffic

if TYPE_CHECKING:
    from gqa_serve.workbench.bench.calibrate import Calibration
    from gqa_serve.workbench.bench.target import Target

_EPILOG = f"""examples:
  gqa-serve bench saturate --url HOST:8000 --slo-ttft 500ms --slo-tpot 50ms --html curve.html
  gqa-serve bench saturate --model demo --slo-ttft 2s --attainment 0.95 --prompt-len 128 --output-len 32

{LENGTHS_HELP}"""
_ALONE = 3
_DEFAULT_REQUESTS = 50
_LEAST_S = 20.0


def make_saturate_parser() -> Parser:
    """The parser."""
    parser = make_parser(
        "gqa-serve bench saturate",
        "Find the highest rate at which a server keeps objectives.",
        usage="gqa-serve bench saturate (--url URL | --model MODEL) --slo-... [options] [-- SERVER_FLAGS]",
        epilog=_EPILOG,
    )
    add_server_flags(parser)
    add_traffic_flags(parser)
    add_objective_flags(parser)
    group = parser.add_argument_group("search")
    add = group.add_argument
    add(
        "--attainment",
        type=float,
        default=0.95,
        metavar="PART",
        help="of the requests must keep the objectives; default 0.95",
    )
    add(
        "--min-seconds",
        type=float,
        metavar="S",
        help="how long each rate is tried, at least, so that queues show; default 20, or the longest of "
        "--slo-ttft and --slo-e2e over --resolution if that is more",
    )
    add(
        "--resolution",
        type=float,
        default=0.1,
        metavar="PART",
        help="how near the answer is to a rate that failed; default 0.1 (10 %%)",
    )
    add("--start-rate", type=float, metavar="R", help="where to begin; default: what one user alone gets")
    add("--max-rate", type=float, metavar="R", help="no rate above this is tried")
    add_output_flags(parser)
    return parser


def run(words: list[str]) -> None:
    """Parse, search, report. Raises ConfigError, ModelError."""
    own, server_words = split_words(words)
    args = make_saturate_parser().parse(own)
    check_output_flags(args)
    choice = read_server(args, server_words)
    objectives = read_objectives(args)
    if objectives is None:
        raise ConfigError("Saturated by what measure? Give --slo-ttft, --slo-tpot or --slo-e2e, e.g. 500ms.")
    if objectives.ttft_s is None and objectives.e2e_s is None:
        raise ConfigError(
            "A queue before a busy server makes no token slower, so that any rate may keep --slo-tpot; give "
            "--slo-ttft or --slo-e2e too."
        )
    traffic = _read_traffic(args)
    if args.min_seconds is None:
        args.min_seconds = least_seconds(objectives, args.resolution)
    command = shlex.join(["gqa-serve", "bench", "saturate", *words])
    with server_url(choice) as url:
        report = asyncio.run(_measure(args, choice, url, traffic, objectives, command))
    report.deliver(args)


def _read_traffic(args: argparse.Namespace) -> Traffic:
    if args.rate is not None or args.trace is not None or args.arrivals == "all":
        raise ConfigError(
            "bench saturate chooses the rate itself; leave out --rate, --trace, --arrivals all."
        )
    for name, high in (("attainment", 1.0), ("resolution", math.inf), ("min_seconds", math.inf)):
        value = getattr(args, name)
        if value is not None and not (0 < value <= high and math.isfinite(value)):
            raise ConfigError(f"--{name.replace('_', '-')} must be more than 0{', at most 1' * (high == 1)}.")
    for name in ("start_rate", "max_rate"):
        value = getattr(args, name)
        if value is not None and not 0 < value < math.inf:
            raise ConfigError(f"--{name.replace('_', '-')} must be more than 0 requests a second.")
    return read_traffic(argparse.Namespace(**{**vars(args), "rate": 1.0}))


def least_seconds(objectives: Objectives, resolution: float) -> float:
    """How long a rate is tried, so that one too high by `resolution` breaks an objective.

    After T seconds of a rate (1 + r) times too high, the queue is r * T seconds long.
    """
    longest = max(objectives.ttft_s or 0.0, objectives.e2e_s or 0.0)
    return max(_LEAST_S, longest / resolution)


async def _measure(
    args: argparse.Namespace,
    choice: ServerChoice,
    url: str,
    traffic: Traffic,
    objectives: Objectives,
    command: str,
) -> Report:
    from gqa_serve.workbench.bench.measure import first_turns, interruptible, measure, warm_up

    multi_turn = traffic.turns.parameters[-1] > 1
    async with (
        open_target(args, choice, url, multi_turn=multi_turn) as (target, found),
        interruptible() as stop,
    ):
        few = dataclasses.replace(traffic, num_requests=4 * _ALONE).requests()
        await warm_up(target, found.words, first_turns(few, 1), stop)
        start = args.start_rate or await _alone(target, found, few, stop)

        async def try_rate(rate: float) -> Point | None:
            if stop.is_set():
                return None
            count = max(traffic.num_requests or _DEFAULT_REQUESTS, math.ceil(rate * args.min_seconds))
            requests = dataclasses.replace(traffic, rate=rate, num_requests=count).requests()
            done = await measure(
                target, found.words, requests, concurrency=None, stop=stop, label=f"{rate:.3g} requests/s"
            )
            if done.run.interrupted:
                return None
            summary = summarize(done.run.records, objectives)
            num_met = sum(map(objectives.met, done.run.records))
            return Point(rate, num_met, summary, num_met / len(requests) >= args.attainment)

        result = await find_highest_rate(
            try_rate, start, resolution=args.resolution, max_rate=args.max_rate or math.inf
        )
        if not result.points:
            raise ConfigError("Stopped before the first rate was measured.")
        report = saturation_report(
            result, objectives, args.attainment, f"{target.model} at {target.client.base}"
        )
        report.command = command
        if stop.is_set():
            report.sections.insert(0, "Interrupted: the search had not ended.")
        report.data |= {"settings": settings_of(args), "interrupted": stop.is_set()}
        return report


async def _alone(
    target: Target, found: Calibration, few: Sequence[TraceRequest], stop: asyncio.Event
) -> float:
    """Requests a second of one user alone."""
    from gqa_serve.workbench.bench.measure import first_turns, measure

    done = await measure(
        target, found.words, first_turns(few, _ALONE), concurrency=1, stop=stop, label="one user alone"
    )
    good = [record for record in done.run.records if record.error is None]
    if not good:
        errors = [record.error for record in done.run.records]
        raise ConfigError(f"No request was answered: {errors[0] if errors else 'stopped'}")
    return 1 / max(1e-3, sum(record.e2e_s for record in good) / len(good))


def saturation_report(found: Found, objectives: Objectives, attainment: float, title: str) -> Report:
    """The answer, the points, the curves."""
    report = Report("bench saturate", title, "")
    report.sections = [
        _answer(found, attainment),
        _table(found.points),
        *_plots(found, objectives, attainment),
    ]
    report.data = {
        "max_rate": None if found.best is None else found.best.rate,
        "failed_rate": None if found.failed is None else found.failed.rate,
        "attainment": attainment,
        "objectives": vars(objectives),
        "points": [
            {"rate": point.rate, "met": point.attainment, "bounds": point.bounds, "passed": point.passed}
            | {"summary": point.summary.to_json()}
            for point in found.points
        ],
    }
    return report


def _answer(found: Found, attainment: float) -> str:
    best, failed = found.best, found.failed
    if best is None:
        lowest = found.points[0]
        return (
            f"Even at {lowest.rate:.3g} requests/s only {lowest.attainment:.1%} of the requests keep the "
            f"objectives ({attainment:.0%} are wanted): loosen them, or use a faster server."
        )
    low, high = best.bounds
    said = (
        f"Up to {best.rate:.3g} requests/s ({best.summary.output_rate:,.0f} output tokens/s) the objectives "
        f"are kept by {best.attainment:.1%} of the requests (95 % interval {low:.1%} to {high:.1%}; "
        f"{attainment:.0%} are wanted)"
    )
    if failed is None:
        return f"{said}; no higher rate was tried that failed, so the limit is above."
    return f"{said}; at {failed.rate:.3g} by {failed.attainment:.1%}."


def _table(points: Sequence[Point]) -> Table:
    columns = [
        Column("rate", "rate, requests/s", number(2)),
        Column("num_requests", "requests", number()),
        Column("met", "within objectives, %", percent()),
        Column("request_rate", "answered, requests/s", number(2)),
        Column("output_rate", "output tokens/s", number(1)),
        Column("ttft_p50", "TTFT p50, ms", scaled(1e3, 1)),
        Column("ttft_p99", "TTFT p99, ms", scaled(1e3, 1)),
        Column("tpot_p50", "TPOT p50, ms", scaled(1e3, 1)),
        Column("tpot_p99", "TPOT p99, ms", scaled(1e3, 1)),
        Column("failed", "failed", number()),
        Column("passed", "passed", lambda passed: "yes" if passed else "no"),
    ]
    rows: list[dict[str, Cell]] = []
    for point in points:
        summary = point.summary
        row: dict[str, Cell] = {
            "rate": point.rate,
            "num_requests": summary.num_requests,
            "met": point.attainment,
            "request_rate": summary.request_rate,
            "output_rate": summary.output_rate,
            "failed": summary.num_failed,
            "passed": point.passed,
        }
        for key in ("ttft", "tpot"):
            row |= {f"{key}_{at}": summary.latencies[f"{key}_s"].get(at) for at in ("p50", "p99")}
        rows.append(row)
    return Table("Rates tried", columns, rows)


def _plots(found: Found, objectives: Objectives, attainment: float) -> list[Plot]:
    points = [point for point in found.points if point.summary.num_failed < point.summary.num_requests]
    rates = [point.rate for point in points]
    answered = Series("answered", rates, [point.summary.request_rate for point in points])
    offered = Series("sent", rates, rates)
    met = Series("met", rates, [point.attainment * 100 for point in points])
    plots = [
        Plot("Answered over sent", "sent, requests/s", "answered, requests/s", [answered, offered]),
        Plot(
            "Requests within the objectives",
            "sent, requests/s",
            "within objectives, %",
            [met],
            bounds={"wanted": attainment * 100},
        ),
    ]
    for key, bound in (("ttft_s", objectives.ttft_s), ("tpot_s", objectives.tpot_s)):
        known = [point for point in points if point.summary.latencies[key]]
        known.sort(key=lambda point: point.summary.output_rate)
        series = [
            Series(
                at,
                [point.summary.output_rate for point in known],
                [point.summary.latencies[key][at] * 1e3 for point in known],
            )
            for at in ("p50", "p99")
        ]
        name = key[:-2].upper()
        plots.append(
            Plot(
                f"{name} over throughput",
                "output tokens/s",
                f"{name}, ms",
                series,
                log_y=True,
                bounds={} if bound is None else {"objective": bound * 1e3},
            )
        )
    return plots
