"""Draws the plots of a report as SVG. The only place that knows matplotlib, and imported only to draw.

Invariant: figures are drawn without a display and without pyplot's global state.
"""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter

from gqa_serve.workbench.report import HeatMap, Plot, Series

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")  # Okabe and Ito
_INSIDE = 3  # series that a legend among them names; one of more would hide them
_NAMES_WIDTH = 85  # characters that fit below an axis
_MARKERS = "osD^vPX*"  # one more than colors: 56 series differ
_DASHES = ("-", (0, (6, 2)), (0, (2, 2)))  # lines that lie on each other are all seen


def to_svg(plot: Plot | HeatMap) -> str:
    """The drawing as an <svg> element."""
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    if isinstance(plot, HeatMap):
        _draw_heat_map(figure, axes, plot)
    else:
        _draw(axes, plot)
        if len(plot.series) > _INSIDE:
            figure.legend(fontsize=8, loc="outside right upper")
        elif len(plot.series) > 1:
            axes.legend(fontsize=8)
    axes.set_title(plot.title, loc="left")
    axes.set_xlabel(plot.x_label)
    axes.set_ylabel(plot.y_label)
    _turn_long_names(axes, plot)
    buffer = io.StringIO()
    with rc_context({"svg.hashsalt": "gqa-serve"}):  # ids are the same each time
        figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def _turn_long_names(axes: Axes, plot: Plot | HeatMap) -> None:
    """Names below an axis that would run into each other stand aslant."""
    places = plot.x if isinstance(plot, HeatMap) else plot.series[0].x if plot.series else ()
    if sum(len(place) + 3 for place in places if isinstance(place, str)) > _NAMES_WIDTH:
        for label in axes.get_xticklabels():
            label.set(rotation=20, ha="right", rotation_mode="anchor")


def _draw(axes: Axes, plot: Plot) -> None:
    for index, series in enumerate(plot.series):
        color = _COLORS[index % len(_COLORS)]
        if plot.kind == "bar":
            _draw_bars(axes, plot, series, index, color)
            continue
        alone = plot.kind == "point" or not series.joined
        marker = _MARKERS[index % len(_MARKERS)] if len(series.x) <= 50 or alone else ""
        axes.errorbar(
            series.x,
            series.y,
            yerr=_reach(series),
            label=series.label,
            color=color,
            marker=marker,
            markersize=4,
            linestyle="" if alone else _DASHES[index % len(_DASHES)],
            drawstyle="steps-post" if plot.kind == "step" else "default",
            capsize=3,
        )
    for label, y in plot.bounds.items():
        axes.axhline(y, color="#666666", linestyle="--", linewidth=1)
        axes.annotate(label, (0.01, y), xycoords=("axes fraction", "data"), va="bottom", fontsize=8)
    if plot.log_x:
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:g}")
    if plot.log_y:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(LogFormatter())  # 60, not 6 x 10^1
        axes.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(1, 0.4)))
    elif plot.kind == "bar":
        axes.set_ylim(bottom=0)
    elif not any(y for series in plot.series for y in series.y):
        axes.set_ylim(0, 1)  # nothing happened: not from -0.05 to 0.05
    axes.grid(axis="y", color="#dddddd")
    axes.set_axisbelow(True)


def _reach(series: Series) -> list[list[float]] | None:
    """Error bars as matplotlib takes them: all reaches below, then all above."""
    if series.errors is None:
        return None
    pairs = [error if isinstance(error, tuple) else (error, error) for error in series.errors]
    return [[below for below, _ in pairs], [above for _, above in pairs]]


def _draw_bars(axes: Axes, plot: Plot, series: Series, index: int, color: str) -> None:
    width = 0.8 / len(plot.series)
    places = [place - 0.4 + width * (index + 0.5) for place in range(len(series.x))]
    axes.bar(places, series.y, width, yerr=_reach(series), label=series.label, color=color, capsize=3)
    axes.set_xticks(range(len(series.x)), [str(x) for x in series.x])


def _draw_heat_map(figure: Figure, axes: Axes, plot: HeatMap) -> None:
    numbers = [[float("nan") if value is None else value for value in row] for row in plot.values]
    known = [value for row in plot.values for value in row if value is not None]
    low = plot.low if plot.low is not None else min(known, default=0.0)
    high = plot.high if plot.high is not None else max(known, default=1.0)
    image = axes.imshow(numbers, aspect="auto", cmap="viridis", vmin=low, vmax=high)
    axes.set_xticks(range(len(plot.x)), plot.x)
    axes.set_yticks(range(len(plot.y)), plot.y)
    for row, values in enumerate(plot.values):
        for column, value in enumerate(values):
            if value is not None:
                color = "black" if value - low > 0.6 * (high - low) else "white"
                axes.text(column, row, f"{value:.2g}", ha="center", va="center", fontsize=8, color=color)
    figure.colorbar(image, label=plot.value_label)
