"""What a tool found: tables for the terminal, JSON for programs, one HTML file with plots for people.

Owns how tables and plots look everywhere. Knows no tool: each builds a `Report`. Plots are declared here as
data and drawn by `plots.py` with matplotlib, which only `--html` needs.
Invariant: a unit stands in every column and axis that has one; the JSON holds the numbers that the tables
show, unrounded, and the HTML file needs no other file.
"""

from __future__ import annotations

import argparse
import datetime
import html
import importlib.util
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.table import Table as RichTable

from gqa_serve import __version__
from gqa_serve.errors import ConfigError

Cell = str | int | float | bool | None
Format = Callable[[Any], str]
"""A value as it is shown."""


@dataclass(frozen=True)
class Column:
    """`key` in the rows and in JSON; `title` with its unit, as shown; how a value is written."""

    key: str
    title: str
    show: Format = str


@dataclass(frozen=True)
class Table:
    """Rows by column key. A missing or None value is shown as a dash. `note` stands below.

    `printed` False: too long for a terminal, only in the files.
    """

    title: str
    columns: Sequence[Column]
    rows: Sequence[Mapping[str, Cell]]
    note: str = ""
    printed: bool = True

    def cells(self) -> list[list[str]]:
        """Every row as shown."""
        return [
            ["-" if (value := row.get(column.key)) is None else column.show(value) for column in self.columns]
            for row in self.rows
        ]


@dataclass(frozen=True)
class Series:
    """One line or set of bars: y over x, with error bars where they are known: half-widths, or how far each
    reaches (below, above) its value. `joined` False: points among the plot's lines.
    """

    label: str
    x: Sequence[float | str]
    y: Sequence[float]
    errors: Sequence[float] | Sequence[tuple[float, float]] | None = None
    joined: bool = True


@dataclass(frozen=True)
class Plot:
    """Lines, points or bars. Axis labels carry units. `bounds`: horizontal lines with their labels."""

    title: str
    x_label: str
    y_label: str
    series: Sequence[Series]
    kind: Literal["line", "step", "point", "bar"] = "line"
    log_x: bool = False
    log_y: bool = False
    bounds: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class HeatMap:
    """values[row][column], each written into its field; None is an empty field."""

    title: str
    x_label: str
    y_label: str
    x: Sequence[str]
    y: Sequence[str]
    values: Sequence[Sequence[float | None]]
    value_label: str
    low: float | None = None
    high: float | None = None


Section = Table | Plot | HeatMap | str
"""A str is a paragraph."""


@dataclass
class Report:
    """`command`, the words typed, tells how to make it again; `data` goes into the JSON as it is."""

    tool: str
    title: str
    command: str
    sections: list[Section] = field(default_factory=list)
    data: dict[str, Any] = field(default_factory=dict)

    def print(self, console: Console | None = None) -> None:
        """Tables and paragraphs to standard output; a table too wide for it with rows as columns."""
        console = console or Console()
        for section in self.sections:
            if isinstance(section, str):
                console.print(section, highlight=False, markup=False, soft_wrap=False)
            elif isinstance(section, Table) and section.printed:
                _print_table(console, section)

    def as_json(self) -> dict[str, Any]:
        """Tables as lists of rows under their titles, and `data`."""
        tables = {part.title: list(part.rows) for part in self.sections if isinstance(part, Table)}
        return {
            "tool": self.tool,
            "version": __version__,
            "command": self.command,
            "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            **self.data,
            "tables": tables,
        }

    def write_json(self, path: Path) -> None:
        """Write `as_json`. Raises ConfigError if the file can't be written."""
        write_text(path, json.dumps(self.as_json(), indent=1, allow_nan=False) + "\n")

    def write_html(self, path: Path) -> None:
        """Write a page that holds everything. Raises ConfigError without matplotlib, or if it can't write."""
        require_plots()
        write_text(path, _page(self))

    def deliver(self, args: argparse.Namespace) -> None:
        """Print it, and write the files that `add_output_flags` put into `args`."""
        self.print()
        if args.json is not None:
            self.write_json(args.json)
        if args.html is not None:
            self.write_html(args.html)


def add_output_flags(parser: argparse.ArgumentParser) -> None:
    """--json and --html, as all tools have them; `check_output_flags` before the work, `deliver` after it."""
    group = parser.add_argument_group("output")
    group.add_argument("--json", type=Path, metavar="FILE", help="write every number to FILE")
    group.add_argument("--html", type=Path, metavar="FILE", help="write a page with tables and plots to FILE")


def check_output_flags(args: argparse.Namespace) -> None:
    """Raise ConfigError now for what would else fail after the work: no folder, no matplotlib."""
    if args.html is not None:
        require_plots()
    for path in (args.json, args.html):
        if path is not None and not path.parent.is_dir():
            raise ConfigError(f"There is no folder {path.parent} to write {path.name} into.")
        if path is not None and path.is_dir():
            raise ConfigError(f"{path} is a folder; give the name of a file.")


def require_plots() -> None:
    """Raise ConfigError without matplotlib."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("--html draws with matplotlib; run: pip install 'gqa-serve[workbench]'")


def write_text(path: Path, text: str) -> None:
    """Write a file of a tool: a file that is there is replaced only by a whole one. Raises ConfigError."""
    try:
        if path.is_symlink() or (path.exists() and not path.is_file()):  # /dev/stdout, a pipe
            path.write_text(text, encoding="utf-8")
            return
        partial = path.with_name(f".{path.name}.partial")
        try:
            partial.write_text(text, encoding="utf-8")
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)  # there only if something went wrong
    except OSError as error:
        raise ConfigError(f"Could not write {path}: {error.strerror}.") from error


# --- how values are written --------------------------------------------------------------------------------


def number(digits: int = 0) -> Format:
    """12,345.7 with so many digits after the point."""
    return lambda value: f"{value:,.{digits}f}"


def scaled(factor: float, digits: int = 1) -> Format:
    """The value times `factor`: `scaled(1e3)` shows seconds as milliseconds."""
    return lambda value: f"{value * factor:,.{digits}f}"


def percent(digits: int = 1) -> Format:
    """0.123 as 12.3 (the % belongs into the title)."""
    return scaled(100, digits)


def gib(digits: int = 2) -> Format:
    """Bytes as GiB."""
    return scaled(2.0**-30, digits)


# --- terminal and page -------------------------------------------------------------------------------------


def _print_table(console: Console, table: Table) -> None:
    head = [column.title for column in table.columns]
    shown = _rich_table(table.title, [head, *table.cells()])
    if _width(console, shown) > console.width:
        turned = _rich_table(table.title, [*map(list, zip(head, *table.cells(), strict=True))])
        shown = min(shown, turned, key=lambda drawn: _width(console, drawn))
    console.print(shown, highlight=False)
    if table.note:
        console.print(table.note, highlight=False, markup=False)


def _width(console: Console, table: RichTable) -> int:
    """Characters that it would take in a line, however long that is."""
    return table.__rich_measure__(console, console.options.update(max_width=10_000)).maximum


def _rich_table(title: str, cells: Sequence[Sequence[str]]) -> RichTable:
    """The first row is the head, the first column its labels."""
    shown = RichTable(title=title, title_justify="left", title_style="bold")
    for index, name in enumerate(cells[0]):
        shown.add_column(_plain(name), justify="left" if index == 0 else "right", overflow="fold")
    for row in cells[1:]:
        shown.add_row(*map(_plain, row))
    return shown


def _plain(text: str) -> str:
    return text.replace("[", r"\[")


_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums; }
caption { text-align: left; font-weight: 600; padding: .3rem 0; }
th, td { padding: .2rem .7rem; text-align: right; border-bottom: 1px solid #ddd; }
th:first-child, td:first-child { text-align: left; }
th { border-bottom: 2px solid #888; } code { background: #f3f3f3; padding: .1rem .3rem; }
svg { max-width: 100%; height: auto; } .wide { overflow-x: auto; } footer { color: #666; margin-top: 3rem; }
"""


_MOST_COLUMNS = 9  # that fit beside each other on a page


def _page(report: Report) -> str:
    parts = [
        f"<!doctype html><html lang='en'><meta charset='utf-8'><title>{html.escape(report.title)}</title>",
        f"<style>{_STYLE}</style><h1>{html.escape(report.title)}</h1>",
        f"<p><code>{html.escape(report.command)}</code></p>",
        *(_html(section) for section in report.sections),
        f"<footer>gqa-serve {__version__}, {datetime.date.today().isoformat()}</footer></html>\n",
    ]
    return "\n".join(parts)


def _html(section: Section) -> str:
    if isinstance(section, str):
        return f"<p>{html.escape(section)}</p>"
    if isinstance(section, Table):
        cells = [[column.title for column in section.columns], *section.cells()]
        if len(cells[0]) > _MOST_COLUMNS > len(cells):
            cells = [*map(list, zip(*cells, strict=True))]
        head, *rows = (
            "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in row)
            for row, tag in zip(cells, ["th", *["td"] * len(cells)], strict=False)
        )
        note = f"<p>{html.escape(section.note)}</p>" if section.note else ""
        body = "".join(f"<tr>{row}</tr>" for row in rows)
        caption = f"<caption>{html.escape(section.title)}</caption>"
        return f"<div class='wide'><table>{caption}<tr>{head}</tr>{body}</table></div>{note}"
    from gqa_serve.workbench import plots

    return f"<figure>{plots.to_svg(section)}</figure>"
