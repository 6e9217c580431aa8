"""`gqa-serve bench compare`: runs side by side, with ratios, and intervals where runs were repeated.

Owns the grouping of files into runs and the statistics over repeats:

    mean of n repeats     +- t(0.975, n - 1) * s / sqrt(n)                           Student
    ratio of two runs     exp of Welch's interval for the difference of the mean logarithms

Repeats are whole runs: requests of one run are not independent of each other, so no interval is taken from
within a run. Reads what `bench --json` and `simulate --json` write. Knows no server.
"""

from __future__ import annotations

import json
import math
import shlex
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gqa_serve.command_line import make_parser
from gqa_serve.errors import ConfigError
from gqa_serve.workbench.report import (
    Cell,
    Column,
    Plot,
    Report,
    Section,
    Series,
    Table,
    add_output_flags,
    check_output_flags,
    number,
)

_EPILOG = """examples:
  gqa-serve bench compare a.json b.json               the second in ratio to the first
  gqa-serve bench compare gqa=g1.json,g2.json,g3.json mha=m1.json,m2.json,m3.json     repeats, with intervals
  gqa-serve bench compare runs/*.json                 files with the same --label are repeats of one run
"""
_LEVEL = 0.95
_RATES = {"request_rate": "requests/s", "output_rate": "output tokens/s", "goodput": "goodput, requests/s"}
_POINTS = ("mean", "p50", "p99")


@dataclass(frozen=True)
class Interval:
    """An estimate with its bounds; without bounds it is from one run."""

    value: float
    low: float | None = None
    high: float | None = None


def run(words: list[str]) -> None:
    """Parse, compare, report. Raises ConfigError."""
    parser = make_parser(
        "gqa-serve bench compare",
        "Compare measured (bench --json) and predicted (simulate --json) runs with the first of them.",
        usage="gqa-serve bench compare [NAME=]FILE[,FILE...] ... [options]",
        epilog=_EPILOG,
    )
    parser.add_argument("runs", nargs="+", metavar="[NAME=]FILE[,FILE...]", help="files of runs")
    add_output_flags(parser)
    args = parser.parse(words)
    check_output_flags(args)
    groups = read_groups(args.runs)
    report = compare(groups)
    report.command = shlex.join(["gqa-serve", "bench", "compare", *words])
    report.deliver(args)


def read_groups(texts: Sequence[str]) -> dict[str, list[dict[str, Any]]]:
    """Documents by name of the run: repeats of one another. Raises ConfigError."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for text in texts:
        name, given, files = text.partition("=")
        for file in (files if given else text).split(","):
            documents = _read(Path(file))
            for document in documents:
                label = str(document.get("label") or Path(file).stem)
                whole = f"{name} {label}" if len(documents) > 1 else name
                groups.setdefault(whole if given else label, []).append(document)
    if len(groups) == 1 and len(texts) > 1 and not any("=" in text for text in texts):
        (name,) = groups
        raise ConfigError(
            f"All files are called {name!r}, so they count as repeats of one run; "
            "name them: before=a.json after=b.json"
        )
    return groups


def compare(groups: Mapping[str, Sequence[Mapping[str, Any]]]) -> Report:
    """Values of every run, ratios to the first, and what makes the comparison doubtful."""
    values = {name: _values(documents) for name, documents in groups.items()}
    first, *others = values
    titles = _titles(values)
    report = Report("bench compare", "Comparison of runs", "")
    report.sections = [_value_table(values, titles)]
    ratios = {name: _ratios(values[first], values[name], titles) for name in others}
    if ratios:
        report.sections.append(_ratio_table(first, ratios, titles))
        report.sections.append(_ratio_plot(first, ratios, titles))
    report.sections += _doubts(groups)
    report.data = {
        "runs": {
            name: {metric: vars(mean_interval(of)) for metric, of in found.items()}
            for name, found in values.items()
        },
        "ratios": {
            name: {metric: vars(of) for metric, of in found.items()} for name, found in ratios.items()
        },
    }
    return report


def mean_interval(values: Sequence[float]) -> Interval:
    """Mean with Student's 95 % interval; no bounds for one value."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return Interval(mean)
    from scipy import stats

    half = float(stats.t.ppf((1 + _LEVEL) / 2, len(values) - 1)) * statistics.stdev(values)
    half /= math.sqrt(len(values))
    return Interval(mean, mean - half, mean + half)


def ratio_interval(base: Sequence[float], other: Sequence[float]) -> Interval:
    """other / base: ratio of geometric means with Welch's 95 % interval; values above 0."""
    logs = [math.log(value) for value in base], [math.log(value) for value in other]
    difference = statistics.fmean(logs[1]) - statistics.fmean(logs[0])
    if min(map(len, logs)) < 2:
        return Interval(math.exp(difference))
    from scipy import stats

    parts = [statistics.variance(sample) / len(sample) for sample in logs]
    variance = sum(parts)
    if variance == 0:
        return Interval(math.exp(difference), math.exp(difference), math.exp(difference))
    squares = sum(part**2 / (len(sample) - 1) for part, sample in zip(parts, logs, strict=True))
    half = float(stats.t.ppf((1 + _LEVEL) / 2, variance**2 / squares)) * math.sqrt(variance)
    return Interval(math.exp(difference), math.exp(difference - half), math.exp(difference + half))


def _read(path: Path) -> list[dict[str, Any]]:
    """The runs of a file: one that `bench` measured, or all that `simulate` predicted."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"Could not read {path}: {error}.") from error
    runs = document.get("runs") if isinstance(document, dict) else None
    if isinstance(runs, list):  # their settings are another tool's, and not to be held against bench's
        found = [
            {"label": run.get("name"), "summary": run.get("summary")} for run in runs if isinstance(run, dict)
        ]
    else:
        found = [document] if isinstance(document, dict) else []
    whole = [run for run in found if _has_latencies(run.get("summary"))]
    if not whole or len(whole) < len(found):
        raise ConfigError(
            f"{path} holds no summary of a run; make one with: gqa-serve bench ... --json {path}"
        )
    return whole


def _has_latencies(summary: object) -> bool:
    return isinstance(summary, dict) and isinstance(summary.get("latencies"), dict)


def _values(documents: Sequence[Mapping[str, Any]]) -> dict[str, list[float]]:
    """Every number of every repeat; one that a repeat lacks is left out of all."""
    found: dict[str, list[float]] = {}
    for document in documents:
        summary = document["summary"]
        own = {name: summary.get(name) for name in _RATES}
        for name, of in summary["latencies"].items():
            own |= {f"{name}.{point}": of.get(point) for point in _POINTS}
        own["failed"] = summary["num_failed"] / summary["num_requests"]
        for name, value in own.items():
            if value is not None:
                found.setdefault(name, []).append(float(value))
    return {name: values for name, values in found.items() if len(values) == len(documents)}


def _titles(values: Mapping[str, Mapping[str, Sequence[float]]]) -> dict[str, str]:
    """Metric -> its title with a unit, of those that any run has."""
    names = {"ttft_s": "TTFT", "tpot_s": "TPOT", "itl_s": "ITL", "e2e_s": "end to end"}
    titles = dict(_RATES)
    titles |= {f"{key}.{point}": f"{name} {point}, ms" for key, name in names.items() for point in _POINTS}
    titles["failed"] = "failed, %"
    return {metric: title for metric, title in titles.items() if any(metric in of for of in values.values())}


def _scale(metric: str) -> float:
    return 1e3 if "_s." in metric else 100.0 if metric == "failed" else 1.0


def _value_table(values: Mapping[str, Mapping[str, Sequence[float]]], titles: Mapping[str, str]) -> Table:
    columns = [Column("metric", "")]
    repeated = {name: len(next(iter(of.values()))) for name, of in values.items()}
    for name, count in repeated.items():
        columns.append(Column(name, f"{name} (mean of {count})" if count > 1 else name, number(2)))
        if count > 1:
            columns.append(Column(f"{name} +-", "+-", number(2)))
    rows = []
    for metric, title in titles.items():
        row: dict[str, Cell] = {"metric": title}
        for name, of in values.items():
            if metric in of:
                found = mean_interval(of[metric])
                row[name] = found.value * _scale(metric)
                if found.high is not None:
                    row[f"{name} +-"] = (found.high - found.value) * _scale(metric)
        rows.append(row)
    note = "+- is the half-width of the 95 % interval of the mean." if max(repeated.values()) > 1 else ""
    return Table("Runs", columns, rows, note)


def _ratios(
    base: Mapping[str, Sequence[float]], other: Mapping[str, Sequence[float]], titles: Mapping[str, str]
) -> dict[str, Interval]:
    return {
        metric: ratio_interval(base[metric], other[metric])
        for metric in titles
        if metric in base and metric in other and min(*base[metric], *other[metric]) > 0
    }


def _ratio_table(
    first: str, ratios: Mapping[str, Mapping[str, Interval]], titles: Mapping[str, str]
) -> Table:
    columns = [Column("metric", f"ratio to {first}")]
    for name in ratios:
        columns.append(Column(name, name, number(3)))
        if any(of.low is not None for of in ratios[name].values()):
            columns += [Column(f"{name} low", "from", number(3)), Column(f"{name} high", "to", number(3))]
    rows = []
    for metric, title in titles.items():
        row: dict[str, Cell] = {"metric": title.rpartition(", ")[0] or title}
        for name, of in ratios.items():
            if metric in of:
                found = of[metric]
                row |= {name: found.value, f"{name} low": found.low, f"{name} high": found.high}
        if len(row) > 1:
            rows.append(row)
    single = any(interval.low is None for of in ratios.values() for interval in of.values())
    note = "An interval that holds 1 shows no difference (95 %, Welch)."
    if single:
        note = "One run of a kind shows no spread; repeat runs (3 or more) for intervals."
    return Table("Ratios", columns, rows, note)


def _ratio_plot(first: str, ratios: Mapping[str, Mapping[str, Interval]], titles: Mapping[str, str]) -> Plot:
    shown = ("output_rate", "ttft_s.p50", "ttft_s.p99", "itl_s.mean", "e2e_s.mean")
    series = []
    for name, of in ratios.items():
        known = [metric for metric in shown if metric in of]
        errors = [_reach(of[metric]) for metric in known]
        repeated = any(of[metric].low is not None for metric in known)
        x = [titles[metric].rpartition(", ")[0] or titles[metric] for metric in known]
        series.append(Series(name, x, [of[metric].value for metric in known], errors if repeated else None))
    return Plot(f"Ratios to {first}", "", "ratio", series, kind="bar", bounds={"no difference": 1.0})


def _reach(interval: Interval) -> tuple[float, float]:
    """How far the interval goes below and above its value."""
    if interval.low is None or interval.high is None:
        return 0.0, 0.0
    return interval.value - interval.low, interval.high - interval.value


def _doubts(groups: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[Section]:
    """Sentences on what else differs between the runs."""
    found: list[Section] = []
    settings = {name: [document.get("settings") for document in of] for name, of in groups.items()}
    known = [one for of in settings.values() for one in of if isinstance(one, dict)]
    names = sorted({name for one in known for name in one})
    differing = [name for name in names if len({json.dumps(one.get(name)) for one in known}) > 1]
    if differing:
        found.append(f"The runs were made with different settings: {', '.join(differing)}.")
    cut = [name for name, of in groups.items() if any(document.get("interrupted") for document in of)]
    if cut:
        found.append(f"Interrupted before the end: {', '.join(cut)}; their longest answers are missing.")
    return found
