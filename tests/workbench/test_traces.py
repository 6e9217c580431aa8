"""Traces, records and step samples: formats that tools hand to each other, and the latencies' definitions."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gqa_serve.errors import ConfigError
from gqa_serve.workbench.records import (
    Objectives,
    RequestRecord,
    comparison_table,
    describe,
    latency_table,
    read_records,
    summarize,
    write_records,
)
from gqa_serve.workbench.step_samples import StepSample, read_samples, write_samples
from gqa_serve.workbench.trace import TraceRequest, checked, read_trace, write_trace

REQUESTS = [
    TraceRequest(arrival_s=0.25, prompt_tokens=10, output_tokens=4),
    TraceRequest(arrival_s=1.0, prompt_tokens=20, output_tokens=4, prefix="p", prefix_tokens=8),
    TraceRequest(arrival_s=2.0, prompt_tokens=5, output_tokens=3, conversation="c"),
    TraceRequest(think_s=1.5, prompt_tokens=12, output_tokens=3, conversation="c", turn=1),
    TraceRequest(arrival_s=3.0, prompt_tokens=2, output_tokens=1, prompt="Hello there"),
]


def test_a_trace_comes_back_as_it_was(tmp_path: Path) -> None:
    write_trace(tmp_path / "t.jsonl", REQUESTS)
    assert read_trace(tmp_path / "t.jsonl") == REQUESTS
    first = json.loads((tmp_path / "t.jsonl").read_text().splitlines()[0])
    assert first == {"arrival_s": 0.25, "prompt_tokens": 10, "output_tokens": 4}


@given(order=st.permutations(REQUESTS))
def test_any_order_is_sorted_by_arrival_with_turns_behind_their_first(order: list[TraceRequest]) -> None:
    assert checked(order, "here") == REQUESTS


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "not JSON"),
        ("[]", "expected an object"),
        ('{"prompt_tokens": 3}', "are needed"),
        ('{"prompt_tokens": 3, "output_tokens": 2, "speed": 1}', "expected an object with some of"),
        ('{"prompt_tokens": "3", "output_tokens": 2}', "prompt_tokens must be int"),
        ('{"prompt_tokens": true, "output_tokens": 2}', "prompt_tokens must be int"),
        ('{"prompt_tokens": 0, "output_tokens": 2}', "1 or more"),
        ('{"prompt_tokens": 3, "output_tokens": 2, "arrival_s": -1}', "negative"),
        ('{"prompt_tokens": 3, "output_tokens": 2, "arrival_s": NaN}', "finite"),
        ('{"prompt_tokens": 3, "output_tokens": 2, "prefix_tokens": 2}', "without a prefix"),
        ('{"prompt_tokens": 3, "output_tokens": 2, "prefix": "a", "prefix_tokens": 4}', "at most"),
        ('{"prompt_tokens": 3, "output_tokens": 2, "turn": 1}', "name of its conversation"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str, reason: str) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text(f'{{"prompt_tokens": 1, "output_tokens": 1}}\n\n{line}\n')
    with pytest.raises(ConfigError, match=rf"line 3: .*{reason}"):
        read_trace(path)


def test_conversations_must_be_whole_and_grow() -> None:
    late = TraceRequest(prompt_tokens=30, output_tokens=2, conversation="c", turn=2)
    with pytest.raises(ConfigError, match="turns 0, 1, 2"):
        checked([*REQUESTS, late, late], "here")
    short = TraceRequest(prompt_tokens=15, output_tokens=2, conversation="c", turn=2)
    with pytest.raises(ConfigError, match="must be longer"):
        checked([*REQUESTS, short], "here")


def test_files_that_are_not_there_or_empty(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="Could not read"):
        read_trace(tmp_path / "none")
    (tmp_path / "empty").write_text("\n")
    with pytest.raises(ConfigError, match="no request"):
        read_trace(tmp_path / "empty")
    with pytest.raises(ConfigError, match="Could not write"):
        write_trace(tmp_path, REQUESTS)


def record(**values: object) -> RequestRecord:
    fields: dict[str, object] = {"sent_s": 0.0, "prompt_tokens": 10, "output_tokens": 4, "e2e_s": 0.9}
    return RequestRecord(**{**fields, "token_s": [0.3, 0.4, 0.4, 0.9], **values})  # type: ignore[arg-type]


def test_latencies_are_what_the_drawing_says() -> None:
    one = record()
    assert one.ttft_s == 0.3
    assert one.tpot_s == pytest.approx(0.6 / 3)
    assert one.itl_s == pytest.approx([0.1, 0.5])
    assert record(token_s=[0.3], output_tokens=1).tpot_s is None
    assert record(token_s=[], error="cut").ttft_s is None


@given(st.lists(st.floats(0, 100), min_size=1, max_size=50))
def test_percentiles_are_those_of_numpy(values: list[float]) -> None:
    found = describe(values)
    assert found["p99"] == np.percentile(values, 99)
    assert found["max"] == max(values)
    assert found["mean"] == pytest.approx(float(np.mean(values)))


def test_a_summary_counts_what_ended_well() -> None:
    records = [
        record(),
        record(sent_s=1.0, cached_tokens=4),
        record(sent_s=1.5, e2e_s=0.5, error="status 500"),
    ]
    summary = summarize(records, Objectives(ttft_s=0.5, e2e_s=0.8))
    assert (summary.num_requests, summary.num_failed, summary.duration_s) == (3, 1, 2.0)
    assert (summary.prompt_tokens, summary.output_tokens, summary.cached_tokens) == (20, 8, 4)
    assert (summary.request_rate, summary.output_rate, summary.goodput) == (1.0, 4.0, 0.0)
    assert summarize(records, Objectives(ttft_s=0.5)).goodput == 1.0
    silent = record(output_tokens=0, token_s=[])
    assert not Objectives(ttft_s=5.0).met(silent)
    assert Objectives(e2e_s=5.0).met(silent)
    assert summarize(records).goodput is None
    assert summary.latencies["ttft_s"]["p50"] == 0.3
    assert latency_table(summary).rows[0]["mean"] == 0.3
    assert comparison_table({"a": summary}).rows[0]["failed"] == pytest.approx(1 / 3)
    assert json.loads(json.dumps(summary.to_json()))["output_rate"] == 4.0


def test_a_run_in_which_all_failed_has_no_latencies() -> None:
    summary = summarize([record(error="refused", token_s=[])])
    assert summary.latencies["ttft_s"] == {}
    assert latency_table(summary).cells()[0][1:] == ["-"] * 6
    with pytest.raises(ConfigError, match="no request"):
        summarize([])


def test_records_and_samples_come_back_as_they_were(tmp_path: Path) -> None:
    records = [record(), record(error="cut", token_s=[], conversation="c", turn=1)]
    write_records(tmp_path / "r.jsonl", records)
    assert read_records(tmp_path / "r.jsonl") == records
    sample = StepSample(
        num_decode=2, decode_context_tokens=64, chunks=((8, 8),), num_sampled=3, seconds=0.1, forward_s=0.09
    )
    write_samples(tmp_path / "s.jsonl", [sample])
    assert read_samples(tmp_path / "s.jsonl") == [sample]
    for wrong in ("Infinity", "-1", '"long"'):
        line = (tmp_path / "s.jsonl").read_text().replace("0.1,", f"{wrong},")
        (tmp_path / "bad").write_text(line)
        with pytest.raises(ConfigError, match="line 1"):
            read_samples(tmp_path / "bad")
    for read in (read_records, read_samples):
        (tmp_path / "bad").write_text('{"sent_s": 1}\n')
        with pytest.raises(ConfigError, match="line 1"):
            read(tmp_path / "bad")


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"sent_s": "soon"}, "sent_s"),
        ({"token_s": ["x"]}, "token_s"),
        ({"token_s": 0.5}, "token_s"),
        ({"prompt_tokens": 1.5}, "prompt_tokens"),
        ({"speed": 1}, "unknown field speed"),
        ({"e2e_s": float("nan")}, "malformed"),
    ],
)
def test_a_record_with_a_wrong_field_is_named_not_met_later(
    tmp_path: Path, fields: dict[str, object], reason: str
) -> None:
    path = tmp_path / "r.jsonl"
    line = json.dumps({"sent_s": 0.0, "prompt_tokens": 1, "output_tokens": 1, **fields})
    path.write_text(f'\n{{"sent_s": 0, "prompt_tokens": 1, "output_tokens": 1}}\n{line}\n')
    with pytest.raises(ConfigError, match=f"line 3: no record of a request .*{reason}"):
        read_records(path)
