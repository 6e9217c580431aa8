"""Reports: what is shown, what is written, and what is refused before the work begins."""

from __future__ import annotations

import argparse
import dataclasses
import errno
import io
import json
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from gqa_serve.errors import ConfigError
from gqa_serve.workbench import plots
from gqa_serve.workbench import report as reports
from gqa_serve.workbench.report import (
    Column,
    HeatMap,
    Plot,
    Report,
    Series,
    Table,
    gib,
    number,
    percent,
    scaled,
)

TABLE = Table(
    "Runs",
    [
        Column("name", "run"),
        Column("rate", "tokens/s", number(1)),
        Column("wait_s", "wait, ms", scaled(1e3)),
        Column("share", "share, %", percent()),
        Column("memory", "memory, GiB", gib()),
    ],
    [
        {"name": "a [bold]", "rate": 1234.56, "wait_s": 0.0123, "share": 0.5, "memory": 2**31},
        {"name": "b", "rate": None, "wait_s": 1.0},
    ],
    note="Ten <requests> each.",
)


def printed(section: Table, width: int) -> str:
    console = Console(file=io.StringIO(), width=width, color_system=None)
    Report("bench", "A title", "gqa-serve bench", [section]).print(console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_values_are_shown_in_the_units_of_their_columns() -> None:
    assert TABLE.cells() == [["a [bold]", "1,234.6", "12.3", "50.0", "2.00"], ["b", "-", "1,000.0", "-", "-"]]
    text = printed(TABLE, 120)
    assert re.search(r"a \[bold\] +│ +1,234.6 │ +12.3 │ +50.0 │ +2.00", text)
    assert "Ten <requests> each." in text


def test_a_table_too_wide_for_the_terminal_shows_rows_as_columns() -> None:
    text = printed(TABLE, 45)
    assert re.search(r"tokens/s +│ +1,234.6 │ +- ", text)
    assert max(map(len, text.splitlines())) <= 45


def test_a_long_table_is_left_to_the_files() -> None:
    table = dataclasses.replace(TABLE, printed=False)
    assert printed(table, 120) == ""
    assert Report("bench", "A title", "gqa-serve bench", [table]).as_json()["tables"]["Runs"] == TABLE.rows


def test_json_holds_the_numbers_unrounded(tmp_path: Path) -> None:
    report = Report("bench", "A title", "gqa-serve bench --url x", [TABLE, "Words."], {"seed": 7})
    report.write_json(tmp_path / "out.json")
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["tables"]["Runs"][0]["rate"] == 1234.56
    assert (found["tool"], found["command"], found["seed"]) == ("bench", "gqa-serve bench --url x", 7)


def test_json_refuses_what_json_cannot_say(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        Report("bench", "t", "c", [], {"rate": float("nan")}).write_json(tmp_path / "out.json")


def test_the_page_holds_everything_and_escapes_it(tmp_path: Path) -> None:
    plot = Plot("Rate", "batch", "tokens/s", [Series("one", [1, 2], [3, 4]), Series("two", [1, 2], [4, 9])])
    bars = Plot("Bars", "heads", "tokens/s", [Series("one", ["MHA", "GQA"], [3, 4], [0.1, 0.2])], kind="bar")
    heat = HeatMap("Found", "tokens", "depth", ["1k", "2k"], ["0", "1"], [[0.25, 1.0], [None, 0.5]], "share")
    report = Report("eval", "A <b>title</b>", "gqa-serve eval", [TABLE, plot, bars, heat, "One & two."])
    report.write_html(tmp_path / "out.html")
    page = (tmp_path / "out.html").read_text()
    assert "A &lt;b&gt;title&lt;/b&gt;" in page
    assert "Ten &lt;requests&gt; each." in page
    assert "One &amp; two." in page
    drawings = re.findall(r"<svg.*?</svg>", page, re.DOTALL)
    assert len(drawings) == 3
    for drawing in drawings:
        ElementTree.fromstring(drawing)
    assert not re.search(
        r'(src|href)="(?!#|data:)', re.sub(r'xmlns\S*="[^"]*"', "", page)
    )  # of no other file


def test_a_table_too_wide_for_the_page_shows_rows_as_columns(tmp_path: Path) -> None:
    columns = [Column("name", "run"), *(Column(f"c{number}", f"column {number}") for number in range(9))]
    row = {"name": "a", **{f"c{number}": number for number in range(9)}}
    Report("plan", "t", "c", [Table("Wide", columns, [row])]).write_html(tmp_path / "out.html")
    assert "<tr><td>column 8</td><td>8</td></tr>" in (tmp_path / "out.html").read_text()


def test_drawings_are_the_same_each_time() -> None:
    plot = Plot(
        "Rate", "batch", "tokens/s", [Series("one", [1, 2], [3, 4])], bounds={"limit": 3.5}, log_x=True
    )
    assert plots.to_svg(plot) == plots.to_svg(plot)


def test_lines_on_each_other_and_many_series_can_be_told_apart() -> None:
    two = plots.to_svg(Plot("Rate", "s", "%", [Series("one", [1, 2], [3, 4]), Series("two", [1, 2], [3, 4])]))
    assert "stroke-dasharray: " in two
    looks = [
        (plots._COLORS[n % len(plots._COLORS)], plots._MARKERS[n % len(plots._MARKERS)]) for n in range(20)
    ]
    assert len(set(looks)) == 20


def test_long_names_of_bars_are_turned() -> None:
    names = [f"KV bfloat16, weights int8, model {number}" for number in range(4)]
    assert "rotate(-20)" in plots.to_svg(
        Plot("Rate", "run", "%", [Series("one", names, [3] * 4)], kind="bar")
    )
    assert "rotate(-20)" in plots.to_svg(
        Plot("Rate", "run", "%", [Series("one", names, [3] * 4)], kind="point")
    )
    assert "rotate(-20)" not in plots.to_svg(Plot("Rate", "run", "%", [Series("one", ["a", "b"], [3, 4])]))


def test_a_logarithmic_axis_is_labelled_with_plain_numbers() -> None:
    drawn = plots.to_svg(
        Plot("Time", "heads", "ms", [Series("one", [1, 8, 32], [2.1, 3.6, 14.8])], log_y=True)
    )
    assert "<!-- 10 -->" in drawn
    assert "<!-- 4 -->" in drawn
    assert "times" not in drawn


def arguments(**values: Path | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    reports.add_output_flags(parser)
    return parser.parse_args([word for name, path in values.items() for word in (f"--{name}", str(path))])


def test_flags_are_checked_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reports.check_output_flags(arguments(json=tmp_path / "a.json", html=tmp_path / "a.html"))
    with pytest.raises(ConfigError, match="no folder"):
        reports.check_output_flags(arguments(json=tmp_path / "none" / "a.json"))
    with pytest.raises(ConfigError, match="is a folder"):
        reports.check_output_flags(arguments(json=tmp_path))
    monkeypatch.setattr(reports.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'gqa-serve\[workbench\]'"):
        reports.check_output_flags(arguments(html=tmp_path / "a.html"))
    reports.check_output_flags(arguments(json=tmp_path / "a.json"))  # needs no drawing


def test_deliver_writes_what_was_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = arguments(json=tmp_path / "a.json", html=tmp_path / "a.html")
    Report("bench", "t", "c", [TABLE]).deliver(args)
    assert "tokens/s" in capsys.readouterr().out
    assert (tmp_path / "a.json").exists()
    assert (tmp_path / "a.html").exists()


def test_a_file_that_cannot_be_written_is_an_error_of_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="Could not write"):
        Report("bench", "t", "c").write_json(tmp_path)


def test_a_file_is_replaced_by_a_whole_one_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.json"
    Report("bench", "first", "c").write_json(path)
    before = path.read_text()

    def full_disk(self: Path, text: str, **_options: Any) -> None:
        with self.open("w") as file:
            file.write(text[:20])
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_text", full_disk)
        with pytest.raises(ConfigError, match="No space left"):
            Report("bench", "second", "c").write_json(path)
    assert path.read_text() == before
    assert [file.name for file in tmp_path.iterdir()] == ["a.json"]
    Report("bench", "third", "c").write_json(path)
    assert [file.name for file in tmp_path.iterdir()] == ["a.json"]


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    link = tmp_path / "link.json"
    link.symlink_to(tmp_path / "file.json")
    Report("bench", "t", "c").write_json(link)
    assert link.is_symlink()
    assert (tmp_path / "file.json").exists()


def test_a_report_without_plots_needs_no_matplotlib() -> None:
    code = (
        "import gqa_serve.workbench.report, sys; sys.exit(bool({'matplotlib', 'torch'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
