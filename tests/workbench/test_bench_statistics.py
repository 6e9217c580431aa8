"""KV demand against brute force; comparisons against scipy; the search against servers with a known limit."""

from __future__ import annotations

import asyncio
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from gqa_serve.errors import ConfigError
from gqa_serve.workbench.bench.compare_command import compare, mean_interval, ratio_interval, read_groups
from gqa_serve.workbench.bench.kv_demand import kv_demand, kv_tables
from gqa_serve.workbench.bench.load import Run, Sent
from gqa_serve.workbench.bench.run_report import RunFacts, notes
from gqa_serve.workbench.bench.saturate_command import least_seconds
from gqa_serve.workbench.bench.search import Point, find_highest_rate, wilson
from gqa_serve.workbench.records import Objectives, RequestRecord, summarize
from gqa_serve.workbench.trace import TraceRequest

BLOCK = 16

records = st.builds(
    lambda sent, prompt, gaps: RequestRecord(
        sent_s=float(sent),
        prompt_tokens=prompt,
        output_tokens=len(gaps),
        token_s=[float(at) for at in np.cumsum(gaps)],
        e2e_s=float(sum(gaps)),
    ),
    st.integers(0, 40),
    st.integers(1, 60),
    st.lists(st.integers(0, 5), min_size=1, max_size=30).filter(lambda gaps: sum(gaps) > 0),
)


@settings(deadline=None)
@given(st.lists(records, min_size=1, max_size=8))
def test_demand_is_what_a_walk_over_time_finds(made: list[RequestRecord]) -> None:
    """All times are whole seconds here, so that each second has one value."""
    demand = kv_demand(made, block_size=BLOCK)
    assert demand is not None
    longest = max(record.prompt_tokens + record.output_tokens for record in made)
    begin = int(min(record.sent_s for record in made))
    end = int(max(record.sent_s + record.token_s[-1] for record in made))
    held, blocks, reserved = [], [], []
    for second in range(begin, end):
        own = [
            record.prompt_tokens + sum(record.sent_s + at <= second for at in record.token_s)
            for record in made
            if record.sent_s <= second < record.sent_s + record.token_s[-1]
        ]
        held.append(sum(own))
        blocks.append(sum(math.ceil(tokens / BLOCK) * BLOCK for tokens in own))
        reserved.append(len(own) * longest)
    for values, expected in ((demand.held, held), (demand.blocks, blocks), (demand.reserved, reserved)):
        found = demand.over_time(values)
        assert found["mean"] == pytest.approx(np.mean(expected))
        assert found["max"] == max(expected)
        assert found["p50"] == np.percentile(expected, 50, method="inverted_cdf")
        assert found["p99"] == np.percentile(expected, 99, method="inverted_cdf")
        assert values[-1] == 0
    assert (demand.held <= demand.blocks).all()
    assert (demand.held <= demand.reserved).all()


def test_demand_in_bytes_is_tokens_times_the_models_bytes() -> None:
    from gqa_serve.workbench.cost_tables import LLAMA_3_8B

    record = RequestRecord(sent_s=0, prompt_tokens=100, output_tokens=2, token_s=[1.0, 2.0], e2e_s=2.0)
    demand = kv_demand([record])
    assert demand is not None
    (table,) = kv_tables(demand, LLAMA_3_8B)
    assert table.rows[0]["max_bytes"] == 102 * 128 * 1024  # 128 KiB a token in bf16
    (plain,) = kv_tables(demand, None)
    assert "max_bytes" not in plain.rows[0]


def test_failed_requests_demand_nothing() -> None:
    record = RequestRecord(sent_s=0, prompt_tokens=1, output_tokens=1, token_s=[1.0], error="cut")
    assert kv_demand([record]) is None


SAMPLES = st.lists(st.floats(0.5, 100), min_size=2, max_size=8).filter(lambda values: np.std(values) > 1e-3)


@given(SAMPLES)
def test_the_interval_of_a_mean_is_students(values: list[float]) -> None:
    found = mean_interval(values)
    low, high = stats.t.interval(0.95, len(values) - 1, np.mean(values), stats.sem(values))
    assert (found.value, found.low, found.high) == pytest.approx((np.mean(values), low, high))


@given(SAMPLES, SAMPLES)
def test_the_interval_of_a_ratio_is_welchs_over_logarithms(base: list[float], other: list[float]) -> None:
    found = ratio_interval(base, other)
    test = stats.ttest_ind(np.log(other), np.log(base), equal_var=False)
    expected = test.confidence_interval(0.95)
    assert found.value == pytest.approx(stats.gmean(other) / stats.gmean(base))
    assert (found.low, found.high) == pytest.approx((np.exp(expected.low), np.exp(expected.high)), rel=1e-6)


def test_one_value_has_no_interval() -> None:
    assert vars(mean_interval([3.0])) == {"value": 3.0, "low": None, "high": None}
    assert vars(ratio_interval([2.0], [3.0])) == pytest.approx({"value": 1.5, "low": None, "high": None})
    assert vars(ratio_interval([2.0, 2.0], [3.0, 3.0])) == pytest.approx(
        {"value": 1.5, "low": 1.5, "high": 1.5}
    )


@given(st.integers(1, 200).flatmap(lambda count: st.tuples(st.integers(0, count), st.just(count))))
def test_the_interval_of_a_part_is_wilsons(pair: tuple[int, int]) -> None:
    expected = stats.binomtest(*pair).proportion_ci(method="wilson")
    assert wilson(*pair) == pytest.approx((expected.low, expected.high), abs=1e-9)


def document(path: Path, label: str, seconds: float, **fields: Any) -> Path:
    made = [
        RequestRecord(
            sent_s=0, prompt_tokens=9, output_tokens=2, token_s=[seconds, 2 * seconds], e2e_s=2 * seconds
        )
    ]
    path.write_text(json.dumps({"label": label, "summary": summarize(made).to_json(), **fields}))
    return path


def test_files_become_runs_with_ratios(tmp_path: Path) -> None:
    files = [document(tmp_path / f"{n}.json", "a" if n < 3 else "b", 0.1 + 0.01 * n) for n in range(6)]
    report = compare(read_groups([str(file) for file in files]))
    ratio = report.data["ratios"]["b"]["ttft_s.mean"]
    expected = ratio_interval([0.1, 0.11, 0.12], [0.13, 0.14, 0.15])
    assert ratio == pytest.approx(vars(expected))
    assert report.data["runs"]["a"]["ttft_s.mean"]["value"] == pytest.approx(0.11)
    json.dumps(report.as_json(), allow_nan=False)


def test_names_on_the_command_line_go_before_labels(tmp_path: Path) -> None:
    one, two = (document(tmp_path / f"{n}.json", "same", 0.1 * (n + 1)) for n in range(2))
    with pytest.raises(ConfigError, match=r"before=a\.json"):
        read_groups([str(one), str(two)])
    assert list(read_groups([f"x={one}", f"y={two}"])) == ["x", "y"]
    assert len(read_groups([f"x={one},{two}"])["x"]) == 2


def test_predicted_runs_stand_beside_a_measured_one(tmp_path: Path) -> None:
    measured = document(tmp_path / "m.json", "measured", 0.1, settings={"rate": 1})
    runs = [
        {"name": name, "summary": json.loads(document(tmp_path / "x", name, seconds).read_text())["summary"]}
        for name, seconds in (("GQA", 0.11), ("MHA", 0.3))
    ]
    (tmp_path / "s.json").write_text(json.dumps({"tool": "simulate", "runs": runs}))
    report = compare(read_groups([str(measured), str(tmp_path / "s.json")]))
    assert report.data["ratios"]["GQA"]["ttft_s.p50"]["value"] == pytest.approx(1.1)
    assert report.data["ratios"]["MHA"]["ttft_s.p50"]["value"] == pytest.approx(3)
    assert not any("settings" in part for part in report.sections if isinstance(part, str))


def test_what_makes_runs_unlike_is_said(tmp_path: Path) -> None:
    one = document(tmp_path / "1.json", "a", 0.1, settings={"rate": 2.0, "seed": 1})
    two = document(tmp_path / "2.json", "b", 0.1, settings={"rate": 4.0, "seed": 1}, interrupted=True)
    said = [part for part in compare(read_groups([str(one), str(two)])).sections if isinstance(part, str)]
    assert any("different settings: rate." in text for text in said)
    assert any("Interrupted before the end: b" in text for text in said)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"summary": {}}'])
def test_a_file_of_something_else_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"x\.json"):
        read_groups([str(path)])


def point(rate: float, passed: bool) -> Point:
    made = [RequestRecord(sent_s=0, prompt_tokens=1, output_tokens=1, token_s=[1.0], e2e_s=1.0)]
    return Point(rate, int(passed), summarize(made, Objectives()), passed)


@given(
    st.floats(0.01, 1000),
    st.floats(0.01, 1000),
    st.floats(0.02, 0.5),
    st.one_of(st.just(math.inf), st.floats(0.01, 1000)),
)
def test_the_search_finds_the_limit_of_a_server(
    limit: float, start: float, resolution: float, max_rate: float
) -> None:
    tried: list[float] = []

    async def try_rate(rate: float) -> Point:
        tried.append(rate)
        return point(rate, rate <= limit)

    found = asyncio.run(find_highest_rate(try_rate, start, resolution=resolution, max_rate=max_rate))
    assert (
        len(tried)
        == len(set(tried))
        <= 12 + 2 + math.ceil(math.log2(math.log(2) / math.log1p(resolution)) + 1)
    )
    assert all(rate <= max_rate for rate in tried)
    assert [one.rate for one in found.points] == sorted(tried)
    if found.best is not None:
        assert found.best.rate <= limit
        if found.failed is not None:
            assert limit < found.failed.rate <= found.best.rate * (1 + resolution) * (1 + 1e-9)
        else:
            assert found.best.rate == max_rate or found.best.rate >= start * 2**11
    else:
        assert min(tried) > limit


def test_a_search_that_is_stopped_tells_what_it_has() -> None:
    answers = iter([point(1.0, True), None])

    async def try_rate(rate: float) -> Point | None:
        return next(answers)

    found = asyncio.run(find_highest_rate(try_rate, 1.0))
    assert found.best is not None
    assert (found.best.rate, found.failed) == (1.0, None)


@given(st.floats(0.1, 100), st.floats(0.02, 0.5))
def test_a_rate_too_high_is_tried_until_its_queue_breaks_the_objective(bound: float, excess: float) -> None:
    tried = least_seconds(Objectives(e2e_s=bound), excess)
    assert tried >= 20.0
    assert excess * tried >= bound * (1 - 1e-9)


def test_the_end_of_a_closed_loop_is_told() -> None:
    """Two users and three requests: in the last third of the run only one of them works."""
    made = [
        RequestRecord(sent_s=at, prompt_tokens=4, output_tokens=2, token_s=[0.5, 1.0], e2e_s=1.0)
        for at in (0.0, 0.0, 1.0, 1.0, 2.0)
    ]
    request = TraceRequest(prompt_tokens=4, output_tokens=2)
    facts = RunFacts(
        label="", server="", model="", endpoint="", command="", settings={}, how_counted="", has_usage=True
    )

    def said(records: list[RequestRecord]) -> str:
        return " ".join(notes(Run([Sent(request, one) for one in records], False, len(records)), facts))

    assert "In the last 1.0 s (33% of the run)" in said(made)
    assert "until then 4.0 output tokens/s came" in said(made)
    assert "nothing new" not in said(made[:2])
