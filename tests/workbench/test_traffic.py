"""Traffic from flags: distributions and arrivals against their definitions, and what goes together."""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from gqa_serve.errors import ConfigError
from gqa_serve.workbench.arrivals import arrival_times
from gqa_serve.workbench.distributions import parse_distribution
from gqa_serve.workbench.trace import TraceRequest, read_trace, write_trace
from gqa_serve.workbench.traffic import add_traffic_flags, read_traffic, traffic_from

ENOUGH = 0.01  # a sample as unlikely as this, with the seeds here, would mean a defect


def parsed(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_traffic_flags(parser)
    return parser.parse_args(list(words))


def made(*words: str) -> list[TraceRequest]:
    return traffic_from(parsed(*words))


@pytest.mark.parametrize(
    ("text", "law"),
    [
        ("uniform:100-800", stats.uniform(100, 700)),
        ("normal:512,100", stats.norm(512, 100)),
        ("lognormal:512,0.8", stats.lognorm(0.8, scale=512 / np.exp(0.32))),
        ("exponential:512", stats.expon(scale=512)),
    ],
)
def test_a_distribution_is_what_it_is_called(text: str, law: stats.rv_continuous) -> None:
    drawn = parse_distribution(text, "--x").draw(20_000, np.random.default_rng(1))
    assert stats.kstest(drawn, law.cdf).pvalue > ENOUGH
    assert law.mean() == pytest.approx({"uniform:100-800": 450}.get(text, 512))


def test_whole_numbers_hold_both_ends_of_a_range_equally() -> None:
    drawn = parse_distribution("uniform:3-6", "--x").draw_counts(20_000, np.random.default_rng(2))
    assert set(drawn) == {3, 4, 5, 6}
    assert stats.chisquare(np.bincount(drawn)[3:]).pvalue > ENOUGH


def test_bounds_and_one_are_kept() -> None:
    drawn = parse_distribution("lognormal:50,2:16-100", "--x").draw_counts(5000, np.random.default_rng(3))
    assert (min(drawn), max(drawn)) == (16, 100)
    assert min(parse_distribution("exponential:1", "--x").draw_counts(5000, np.random.default_rng(3))) == 1


@pytest.mark.parametrize(
    "text", ["512", "uniform:1-9", "normal:5,2", "lognormal:50,0.5:1-99", "exponential:4"]
)
def test_a_distribution_is_written_as_it_was_read(text: str) -> None:
    assert str(parse_distribution(text, "--x")) == text


@pytest.mark.parametrize(
    "text",
    ["", "many", "zipf:3", "uniform:5", "uniform:9-3", "normal:5", "normal:5,-1", "lognormal:0,1", "nan",
     "constant:1,2", "exponential:inf", "normal:5,1:9-3", "0.5", "-4"],
)  # fmt: skip
def test_what_is_no_distribution_is_refused_with_the_flag(text: str) -> None:
    with pytest.raises(ConfigError, match=r"^--prompt-len"):
        parse_distribution(text, "--prompt-len", low=1)


@pytest.mark.parametrize(("process", "burstiness"), [("poisson", 1.0), ("gamma", 0.5), ("gamma", 2.0)])
def test_arrivals_have_the_gaps_of_their_process(process: str, burstiness: float) -> None:
    times = arrival_times(process, 20_001, 8.0, np.random.default_rng(4), burstiness=burstiness)
    gaps = np.diff(times)
    shape = burstiness**-2
    assert stats.kstest(gaps, stats.gamma(shape, scale=1 / (8 * shape)).cdf).pvalue > ENOUGH
    assert gaps.std() / gaps.mean() == pytest.approx(burstiness, rel=0.05)
    assert times[0] == 0


def test_even_arrivals_and_all_at_once() -> None:
    random = np.random.default_rng(0)
    assert arrival_times("constant", 4, 2.0, random) == [0, 0.5, 1.0, 1.5]
    assert arrival_times("all", 3, 1.0, random) == [0, 0, 0]


def test_another_rate_is_the_same_traffic_faster() -> None:
    slow, fast = (
        made("--rate", "2", "--prompt-len", "uniform:5-50"),
        made("--rate", "8", "--prompt-len", "uniform:5-50"),
    )
    assert [one.prompt_tokens for one in slow] == [one.prompt_tokens for one in fast]
    assert [one.arrival_s for one in slow] == pytest.approx([one.arrival_s * 4 for one in fast])


def test_one_property_leaves_the_others_as_they_are() -> None:
    base = ("--rate", "2", "--prompt-len", "uniform:5-50", "--output-len", "uniform:5-50")
    plain, other = made(*base), made(*base[:-1], "exponential:9", "--prefixes", "3", "--prefix-len", "10")
    assert [one.prompt_tokens + 10 for one in plain] == [one.prompt_tokens for one in other]
    assert [one.arrival_s for one in plain] == [one.arrival_s for one in other]
    assert plain != made(*base, "--seed", "1")
    assert plain == made(*base)


def test_more_requests_begin_with_the_fewer() -> None:
    flags = (
        "--rate",
        "2",
        "--prompt-len",
        "lognormal:90,1",
        "--prefixes",
        "4",
        "--prefix-len",
        "uniform:5-9",
    )
    assert made(*flags, "--num-requests", "40") == made(*flags, "--num-requests", "90")[:40]


def test_the_rate_counts_requests_whatever_the_turns() -> None:
    requests = made("--rate", "5", "--turns", "4", "--num-requests", "8000")
    starts = [one.arrival_s for one in requests if one.turn == 0]
    assert len(starts) == 2000
    assert 8000 / max(starts) == pytest.approx(5, rel=0.07)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 60), st.sampled_from(["1", "3", "uniform:1-5"]), st.integers(0, 3), st.integers(0, 2**32)
)
def test_conversations_begin_with_all_that_came_before(
    count: int, turns: str, prefixes: int, seed: int
) -> None:
    flags = [
        "--num-requests",
        str(count),
        "--turns",
        turns,
        "--seed",
        str(seed),
        "--prompt-len",
        "uniform:1-9",
    ]
    flags += ["--prefixes", str(prefixes), "--prefix-len", "uniform:5-9"] if prefixes else []
    requests = made(*flags)
    assert len(requests) == count
    by_name: dict[str | None, list[TraceRequest]] = {}
    for one in requests:
        by_name.setdefault(one.conversation, []).append(one)
    by_name.pop(None, None)
    for own in by_name.values():
        for earlier, later in itertools.pairwise(own):
            assert 1 <= later.prompt_tokens - earlier.prompt_tokens - earlier.output_tokens <= 9
            assert (later.prefix, later.prefix_tokens) == (earlier.prefix, earlier.prefix_tokens)
    lengths = {(one.prefix, one.prefix_tokens) for one in requests}
    assert len({name for name, _ in lengths}) == len(lengths) <= max(1, prefixes)


def test_prefixes_are_chosen_by_their_skew() -> None:
    flags = ("--num-requests", "20000", "--prefixes", "3", "--prefix-len", "4", "--prefix-skew", "1")
    counts = [sum(one.prefix == f"p{index}" for one in made(*flags)) for index in range(3)]
    assert stats.chisquare(counts, np.array([6, 3, 2]) / 11 * 20_000).pvalue > ENOUGH


def test_think_time_is_between_turns() -> None:
    requests = made("--turns", "2", "--think", "exponential:3", "--num-requests", "8000")
    thinks = [one.think_s for one in requests if one.turn]
    assert stats.kstest(thinks, stats.expon(scale=3).cdf).pvalue > ENOUGH
    assert not any(one.think_s for one in requests if not one.turn)


def test_a_trace_is_replayed_faster_and_shorter(tmp_path: Path) -> None:
    written = made("--rate", "3", "--turns", "uniform:1-3", "--num-requests", "30", "--think", "2")
    write_trace(tmp_path / "t.jsonl", written)
    assert read_trace(tmp_path / "t.jsonl") == written
    replayed = made("--trace", str(tmp_path / "t.jsonl"), "--speed", "4", "--num-requests", "10")
    assert [one.arrival_s * 4 for one in replayed] == pytest.approx([one.arrival_s for one in written[:10]])


@pytest.mark.parametrize(
    ("words", "cure"),
    [
        (["--arrivals", "gamma"], "needs a --rate"),
        (["--arrivals", "all", "--rate", "2"], "leave one of them out"),
        (["--rate", "2", "--burstiness", "2"], "--arrivals gamma"),
        (["--rate", "0"], "--rate must be more than 0"),
        (["--rate", "nan"], "--rate must be more than 0"),
        (["--num-requests", "0"], "--num-requests"),
        (["--think", "3"], "--turns"),
        (["--prefix-skew", "1"], "--prefixes"),
        (["--speed", "2"], "--trace"),
        (["--trace", "x", "--rate", "2"], "Leave out --rate"),
        (["--dataset", "x", "--prompt-len", "5"], "Leave out --prompt-len"),
        (["--dataset", "x", "--turns", "uniform:1-3"], "--turns is a number"),
        (["--seed", "-1"], "--seed"),
    ],
)
def test_what_makes_no_sense_is_refused_with_the_cure(words: list[str], cure: str) -> None:
    with pytest.raises(ConfigError, match=cure):
        read_traffic(parsed(*words))


SHAREGPT = [
    {"conversations": [{"from": "human", "value": "a b c"}, {"from": "gpt", "value": "d e"},
                       {"from": "human", "value": "f"}, {"from": "gpt", "value": "g h i j"}]},
    {"conversations": [{"from": "gpt", "value": "an answer without a question"}]},
    {"conversations": [{"from": "system", "value": "s"}, {"from": "human", "value": "k l"},
                       {"from": "gpt", "value": "m"}]},
]  # fmt: skip


def count_words(text: str) -> int:
    return len(text.split())


def test_sharegpt_files_give_conversations(tmp_path: Path) -> None:
    path = tmp_path / "sharegpt.json"
    path.write_text(json.dumps(SHAREGPT))
    requests = traffic_from(
        parsed("--dataset", str(path), "--turns", "2", "--num-requests", "3"), count_words
    )
    long = [one for one in requests if one.conversation]
    assert [(one.prompt_tokens, one.output_tokens, one.prompt) for one in long] == [
        (3, 2, "a b c"),
        (6, 4, "f"),
    ]
    (short,) = (one for one in requests if not one.conversation)
    assert (short.prompt_tokens, short.output_tokens, short.prompt) == (3, 1, "s\nk l")


def test_json_lines_of_text_and_of_lengths(tmp_path: Path) -> None:
    path = tmp_path / "own.jsonl"
    lines = [
        {"prompt_tokens": 812, "output_tokens": 97, "user": "x"},
        {"prompt": "a b", "completion": "c d e"},
        {"messages": [{"role": "user", "content": "q r"}, {"role": "assistant", "content": "s"}]},
    ]
    path.write_text("\n".join(map(json.dumps, lines)) + "\n")
    requests = traffic_from(parsed("--dataset", str(path), "--num-requests", "6"), count_words)
    expected = [(812, 97, None), (2, 3, "a b"), (2, 1, "q r")]
    found = [(one.prompt_tokens, one.output_tokens, one.prompt) for one in requests]
    assert sorted(found[:3], key=str) == sorted(expected, key=str)  # each once before any comes again
    assert sorted(found[3:], key=str) == sorted(expected, key=str)
    longer = traffic_from(parsed("--dataset", str(path), "--output-len", "5"), count_words)
    assert {one.output_tokens for one in longer} == {5}


@pytest.mark.parametrize(
    ("text", "cure"),
    [
        ('{"prompt": "text", "output": "t"}', "--tokenizer"),
        ('{"prompt_tokens": 3}', "whole numbers"),
        ('{"prompt_tokens": "3", "output_tokens": 3}', "whole numbers"),
        ("[1]", "expected an object"),
        ("{}", "expected prompt"),
        ("nope", "line 1: not JSON"),
        ("[]", "no request"),
    ],
)
def test_a_bad_dataset_is_refused_with_its_place(tmp_path: Path, text: str, cure: str) -> None:
    path = tmp_path / "bad.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=cure):
        made("--dataset", str(path))


def test_a_dataset_without_answers_needs_a_length(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "a b"}')
    with pytest.raises(ConfigError, match="--output-len"):
        traffic_from(parsed("--dataset", str(path)), count_words)
    (one,) = traffic_from(
        parsed("--dataset", str(path), "--output-len", "7", "--num-requests", "1"), count_words
    )
    assert one.output_tokens == 7


def test_lengths_in_tokens_need_no_torch() -> None:
    import subprocess

    code = (
        "import argparse, sys; from gqa_serve.workbench.traffic import *;"
        "p = argparse.ArgumentParser(); add_traffic_flags(p); traffic_from(p.parse_args([]));"
        "sys.exit('torch' in sys.modules or 'tokenizers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
