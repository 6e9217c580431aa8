"""`gqa-serve simulate`: what is asked, in which order it is answered, and the bar meanwhile.

Owns flags and their combinations. Imports no torch.
"""

from __future__ import annotations

import argparse
import itertools
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from gqa_serve.command_line import Parser, make_parser
from gqa_serve.errors import ConfigError
from gqa_serve.settings import flag_of
from gqa_serve.workbench.bench.setup import add_objective_flags, read_objectives
from gqa_serve.workbench.records import RequestRecord, read_records, write_records
from gqa_serve.workbench.report import Report, Section, add_output_flags, check_output_flags
from gqa_serve.workbench.simulate.case import Case, add_case_flags, make_case
from gqa_serve.workbench.simulate.fit import factors_table, fit, read_measurements, require_scipy
from gqa_serve.workbench.simulate.fitted import FittedCost, write_cost_model
from gqa_serve.workbench.simulate.results import fill, validation_table
from gqa_serve.workbench.simulate.runs import CaseResult, run_cases
from gqa_serve.workbench.simulate.validate import trace_of
from gqa_serve.workbench.trace import TraceRequest
from gqa_serve.workbench.traffic import LENGTHS_HELP, add_traffic_flags, traffic_from

_MOST_CASES = 64
_STEP_TIME = (
    "model", "revision", "num_kv_heads", "hardware", "tensor_parallel", "quantization", "kv_cache_dtype",
)  # fmt: skip
_EPILOG = f"""examples:
  gqa-serve simulate --model meta-llama/Meta-Llama-3-8B --rate 10 --num-requests 2000
  gqa-serve simulate --model meta-llama/Llama-2-70b-hf --tensor-parallel 8 --num-kv-heads 64,8,1 --price 2.5
  gqa-serve simulate --model Qwen/Qwen3-8B --rate 40 --compare replicas=2,4 --compare max-num-seqs=64,256
  gqa-serve simulate --model demo --hardware cpu --fit steps.jsonl --save-cost-model cost.json
  gqa-serve simulate --model demo --hardware cpu --cost-model cost.json --validate records.jsonl

{LENGTHS_HELP}
"""


def run(words: list[str]) -> None:
    """Answer `words` and print. Raises ConfigError, ModelError, HubError."""
    parser = _parser()
    args = parser.parse(words)
    check_output_flags(args)
    _check(args)
    objectives = read_objectives(args)
    sections: list[Section] = []
    cost = None
    if args.fit:
        cost = _fit(args, sections)
    measured = None if args.validate is None else read_records(args.validate)
    variants = _variants(parser, words, args)
    _check_fitted([variant for _, variant in variants])
    cases = [make_case(variant, label, cost) for label, variant in variants]
    traces = _traces(args, [variant for _, variant in variants], measured)
    bar = _Bar(sum(map(len, traces)))
    try:
        results = run_cases(cases, traces, args.processes or _num_cores(), bar.update)
    finally:
        bar.close()
    report = Report("simulate", "Simulation", "gqa-serve simulate " + shlex.join(words), sections)
    report.sections.append(_describe(cases[0], traces[0]))
    if measured is not None:
        report.sections.append(validation_table(_served(measured), results[0].records))
    fill(report, results, objectives)
    report.sections.append(_caveat(cases))
    if (guessed := _extrapolated(results)) is not None:
        report.sections.append(guessed)
    if args.records is not None:
        write_records(args.records, results[0].records)
    report.deliver(args)


def _parser() -> Parser:
    parser = make_parser(
        "gqa-serve simulate",
        "Run the engine's own scheduler and prefix cache over traffic, in virtual time: hours in seconds.",
        usage="gqa-serve simulate --model MODEL [--hardware H] [traffic] [options]",
        epilog=_EPILOG,
    )
    add_case_flags(parser)
    add_traffic_flags(parser)
    group = parser.add_argument_group("fitting and validating")
    add = group.add_argument
    add(
        "--fit",
        type=Path,
        nargs="+",
        metavar="FILE",
        help="fit step times to steps or records that bench wrote",
    )
    add("--save-cost-model", type=Path, metavar="FILE", help="write what was fitted, for --cost-model")
    add("--validate", type=Path, metavar="RECORDS", help="predict the run that bench recorded, and compare")
    group = parser.add_argument_group("comparing")
    add = group.add_argument
    add(
        "--compare",
        action="append",
        default=[],
        metavar="NAME=A,B",
        help="run with each of several values of a flag: max-num-seqs=64,256; again for all combinations",
    )
    add_objective_flags(parser)
    add_output_flags(parser)
    add("--records", type=Path, metavar="FILE", help="write one JSON object per request")
    add("--processes", type=int, metavar="N", help="processes that compute; default: one per core")
    return parser


def _check(args: argparse.Namespace) -> None:
    if args.fit:
        require_scipy()
        if args.cost_model is not None:
            raise ConfigError("Give either --cost-model or --fit, not both.")
    elif args.save_cost_model is not None:
        raise ConfigError("--save-cost-model writes what --fit found; give --fit FILE too.")
    if args.processes is not None and args.processes < 1:
        raise ConfigError(f"--processes must be 1 or more; got {args.processes}.")
    if args.concurrency is not None and (args.rate is not None or args.arrivals is not None):
        raise ConfigError(
            "With --concurrency requests are sent when others end; leave out --rate and --arrivals."
        )
    if args.validate is not None and (given := _generated(args)):
        raise ConfigError(
            f"--validate replays what was measured: leave out {', '.join(map(flag_of, given))}. The --trace "
            "that bench wrote tells which prompts share a prefix."
        )
    if args.concurrency is not None and args.trace is not None and args.validate is None:
        raise ConfigError("A --trace has its own times; leave out --concurrency.")
    for path in (args.save_cost_model, args.records):
        if path is not None and not path.parent.is_dir():
            raise ConfigError(f"There is no folder {path.parent} to write {path.name} into.")


def _fit(args: argparse.Namespace, sections: list[Section]) -> FittedCost:
    samples, records = read_measurements(args.fit)
    cost, residuals = fit(samples, records)
    sections += [factors_table(cost), residuals]
    if args.save_cost_model is not None:
        write_cost_model(args.save_cost_model, cost)
    return cost


# --- what is compared --------------------------------------------------------------------------------------


def _variants(
    parser: Parser, words: list[str], args: argparse.Namespace
) -> list[tuple[str, argparse.Namespace]]:
    """(label, flags) of every combination of what --num-kv-heads and --compare list."""
    axes: list[list[tuple[str, list[str]]]] = []
    heads = args.num_kv_heads
    if heads is not None and len(heads) > 1:
        axes.append([(f"{count} KV heads", ["--num-kv-heads", str(count)]) for count in heads])
    axes += [_axis(parser, text) for text in args.compare]
    flags_of = [axis[0][1][0].replace("--no-", "--") for axis in axes]
    if len(set(flags_of)) < len(flags_of):
        raise ConfigError("The same flag is compared twice; list all its values in one place.")
    combinations = list(itertools.product(*axes))
    if len(combinations) > _MOST_CASES:
        raise ConfigError(
            f"That is {len(combinations)} runs; compare fewer values, at most {_MOST_CASES} runs."
        )
    if len(combinations) > 1 and (args.records is not None or args.validate is not None):
        raise ConfigError("--records and --validate are for one run; leave out what is compared.")
    found = []
    for parts in combinations:
        flags = parser.parse([*words, *(word for _, more in parts for word in more)])
        flags.num_kv_heads = flags.num_kv_heads[0] if flags.num_kv_heads else None
        _check(flags)
        found.append((", ".join(label for label, _ in parts) or "simulated", flags))
    return found


def _check_fitted(variants: Sequence[argparse.Namespace]) -> None:
    """Refuse to compare by one fit what changes the time of a step, which the fit would not."""
    seen: dict[object, argparse.Namespace] = {}
    for variant in variants:
        if not variant.fit and variant.cost_model is None:
            continue
        other = seen.setdefault(variant.cost_model, variant)
        for name in _STEP_TIME:
            if getattr(other, name, None) != getattr(variant, name, None):
                raise ConfigError(
                    f"A fit says what steps take for one {flag_of(name)}, so that it cannot compare several. "
                    "Measure and fit each, and simulate each with its own --cost-model; or leave the fit out "
                    "and compare by the roofline."
                )


def _axis(parser: Parser, text: str) -> list[tuple[str, list[str]]]:
    """(label, words) for each value of NAME=A,B."""
    name, _, values = text.partition("=")
    flag = flag_of(name.strip().lstrip("-"))
    known = {option: action for action in parser._actions for option in action.option_strings}
    fixed = ("--compare", "--json", "--html", "--records", "--fit", "--validate", "--processes", "--help")
    if not values or flag not in known or flag in (*fixed, "--save-cost-model", "--version"):
        raise ConfigError(
            f"--compare takes the name of a flag and its values, such as max-num-seqs=64,256; got {text!r}."
        )
    parts = [value.strip() for value in values.split(",")]
    if isinstance(known[flag], argparse.BooleanOptionalAction):
        words = {"on": flag, "true": flag, "off": f"--no-{flag[2:]}", "false": f"--no-{flag[2:]}"}
        if not set(parts) <= set(words):
            raise ConfigError(f"--compare {name}: its values are on and off.")
        return [(f"{name} {value}", [words[value]]) for value in parts]
    return [(f"{name} {value}", [flag, value]) for value in parts]


def _traces(
    args: argparse.Namespace, variants: Sequence[argparse.Namespace], measured: list[RequestRecord] | None
) -> list[list[TraceRequest]]:
    """The traffic of each variant; the same list where it is the same."""
    if measured is not None and args.trace is None:
        return [trace_of(measured)] * len(variants)
    made: dict[str, list[TraceRequest]] = {}
    traffic = argparse.ArgumentParser()
    add_traffic_flags(traffic)
    names = [action.dest for action in traffic._actions if action.dest != "help"]
    traces = []
    for variant in variants:
        key = repr([getattr(variant, name) for name in names])
        if key not in made:
            made[key] = traffic_from(variant)
        traces.append(made[key])
    return traces


def _generated(args: argparse.Namespace) -> list[str]:
    """The flags given that make up traffic."""
    names = ("num_requests", "prompt_len", "output_len", "rate", "arrivals", "burstiness", "seed", "prefixes")
    more = ("prefix_len", "prefix_skew", "turns", "think", "dataset", "speed")
    return [name for name in (*names, *more) if getattr(args, name) is not None]


def _served(records: Sequence[RequestRecord]) -> list[RequestRecord]:
    return [record for record in records if record.error is None]


# --- around it ---------------------------------------------------------------------------------------------


def _describe(case: Case, trace: Sequence[TraceRequest]) -> str:
    prompts = sum(request.prompt_tokens for request in trace)
    outputs = sum(request.output_tokens for request in trace)
    return (
        f"{case.source.name} on {case.device_name}: {len(trace)} requests, {prompts:,} prompt tokens, "
        f"{outputs:,} output tokens."
    )


def _caveat(cases: Sequence[Case]) -> str:
    kind = cases[0].cost.to_json()["kind"]
    if kind == "fitted":
        return (
            "Step times are fitted to measurements: they hold for that model, those settings and that "
            "machine, within what was measured."
        )
    efficiency = cases[0].cost.to_json()["efficiency"]
    return (
        f"Step times are the roofline's over an efficiency of {efficiency:g}: bytes and operations at the "
        "data sheet's peak, which no kernel beats. Measure with `gqa-serve bench engine --steps FILE` on the "
        "machine itself and give --fit FILE for times that hold there."
    )


def _extrapolated(results: Sequence[CaseResult]) -> str | None:
    """Where fitted times were asked for more than was measured."""
    beyond: dict[str, None] = {}
    for result in results:
        served = [record for record in result.records if record.error is None]
        if not isinstance(result.case.cost, FittedCost) or not served:
            continue
        found = result.case.cost.beyond(
            most_requests=max(timeline.peak_running for timeline in result.timelines),
            longest_context=max(record.prompt_tokens + record.output_tokens for record in served),
            longest_prompt=max(record.prompt_tokens for record in served),
        )
        beyond |= dict.fromkeys(found)
    if not beyond:
        return None
    return (
        f"Beyond what was measured: {'; '.join(beyond)}. Times there are extrapolated, and may be several "
        "times off: a term that hardly varied in the measurements is not known. Measure such steps too."
    )


class _Bar:
    """Requests ended, virtual time, and how long it will take; on a terminal only."""

    def __init__(self, total: int) -> None:
        console = Console(file=sys.stderr)
        columns = (
            "simulating",
            BarColumn(),
            MofNCompleteColumn(),
            "requests,",
            TextColumn("{task.fields[at]}"),
        )
        self._progress = Progress(
            *columns, TimeRemainingColumn(), console=console, disable=not sys.stderr.isatty(), transient=True
        )
        self._task = self._progress.add_task("simulating", total=total, at="")
        self._progress.start()

    def update(self, ended: int, now: float) -> None:
        """So many requests have ended by the virtual time `now`."""
        self._progress.update(self._task, completed=ended, at=f"{now:,.1f} s of virtual time")

    def close(self) -> None:
        self._progress.stop()


def _num_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
