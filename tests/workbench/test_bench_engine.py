"""`bench engine` on the fake runner and on tiny models: what is measured is what was asked for.

Times are a fake clock's: no test depends on how fast the machine is.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from fake_runner import FakeRunner, logits_of
from tiny import FAMILIES, tiny_checkpoint

from gqa_serve.config import EngineConfig
from gqa_serve.engine.batch import StepPlan
from gqa_serve.engine.core import Engine
from gqa_serve.engine.model_config import ModelConfig
from gqa_serve.engine.model_runner import ModelRunner
from gqa_serve.engine.request import EngineRequest, SamplingParams
from gqa_serve.errors import ConfigError, EngineStepError
from gqa_serve.workbench.bench import engine_command
from gqa_serve.workbench.bench.engine_cases import (
    DECODE_STEPS,
    CaseRunner,
    DecodeCase,
    MixedCase,
    PrefillCase,
)
from gqa_serve.workbench.bench.engine_measure import FIT, fitting
from gqa_serve.workbench.bench.engine_replay import Replay
from gqa_serve.workbench.bench.kv_fill import fill_cache
from gqa_serve.workbench.bench.limits import Ceiling, Limits, Work
from gqa_serve.workbench.bench.loaded_engine import step_work
from gqa_serve.workbench.bench.measured import Measured, num_runs, rounds_of
from gqa_serve.workbench.bench.random_weights import RandomCheckpoint
from gqa_serve.workbench.bench.step_recorder import StepRecorder, StepTimer
from gqa_serve.workbench.hardware import H100
from gqa_serve.workbench.records import read_records
from gqa_serve.workbench.step_samples import StepSample, read_samples
from gqa_serve.workbench.trace import TraceRequest, write_trace

LOOKAHEAD = pytest.mark.parametrize("lookahead", [False, True])


class Clock:
    """Moves by a second whenever it is read, and as long as one sleeps."""

    def __init__(self) -> None:
        self.time = 0.0
        self.slept: list[float] = []

    def __call__(self) -> float:
        self.time += 1.0
        return self.time

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.time += seconds


def fake_config(**settings: object) -> EngineConfig:
    return EngineConfig(
        model="fake", **{"block_size": 4, "max_num_seqs": 8, "max_num_batched_tokens": 32, **settings}
    )


class AheadRunner(FakeRunner):
    """A device that works on its own, and whose tensors anybody may look at."""

    def __init__(self, *sizes: int) -> None:
        super().__init__(True, *sizes)
        self.row_operations = None

    def execute(self, plan: StepPlan, previous: torch.Tensor | None = None) -> torch.Tensor:
        return super().execute(plan, previous).as_subclass(torch.Tensor)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return logits_of(hidden)


def fake_recorder(lookahead: bool = False, num_blocks: int = 256, max_model_len: int = 128) -> StepRecorder:
    sizes = (num_blocks, 4, max_model_len)
    return StepRecorder(AheadRunner(*sizes) if lookahead else FakeRunner(False, *sizes))


# --- statistics --------------------------------------------------------------------------------------------


def test_median_and_spread() -> None:
    measured = Measured((2.0, 1.0, 6.0))
    assert (measured.median, measured.low, measured.high) == (2.0, 1.0, 6.0)
    assert measured.spread == pytest.approx(1.25)
    assert measured.per(12).values == (6.0, 12.0, 2.0)


def test_rounds_go_through_all_cases_and_the_warm_up_is_dropped() -> None:
    seen: list[str] = []
    count = itertools.count()
    cases = [lambda name=name: (seen.append(name), next(count))[1] for name in "abc"]
    told: list[int] = []
    results = rounds_of(cases, 2, on_done=told.append)
    assert seen == [*"cba", *"abc", *"cba"]
    assert results == [[3, 8], [4, 7], [5, 6]]
    assert told == list(range(1, 10))
    assert num_runs(3, 2) == 9
    assert rounds_of(cases, 1, warm_up=False) == [[9], [10], [11]]


# --- limits ------------------------------------------------------------------------------------------------


def test_the_longer_of_memory_and_arithmetic_is_the_limit() -> None:
    ceiling = Ceiling("x", bandwidth=100.0, product_ops=10.0, attention_ops=5.0)
    assert ceiling.seconds(Work(1000.0, 20.0, 10.0)) == 10.0
    assert ceiling.bound(Work(1000.0, 20.0, 10.0)) == "memory"
    assert ceiling.seconds(Work(100.0, 20.0, 10.0)) == 4.0
    assert ceiling.bound(Work(100.0, 20.0, 10.0)) == "arithmetic"


@pytest.mark.parametrize(
    ("weights", "tiles", "product"),
    [
        ("int4", 90.0, 50.0),
        ("int8", 0.0, 50.0),
        ("bfloat16", 90.0, 30.0),
        ("bfloat16", 0.0, 7.0),
        ("float32", 90.0, 7.0),
        ("float16", 90.0, 7.0),
    ],
)
def test_a_cpu_multiplies_each_format_by_its_own_units(weights: str, tiles: float, product: float) -> None:
    ceiling = Ceiling.of_cpu(Limits(3.0, 7.0, 50.0, tiles), weights)
    assert (ceiling.bandwidth, ceiling.product_ops, ceiling.attention_ops) == (3.0, product, 7.0)


def test_a_data_sheet_is_a_ceiling_too() -> None:
    assert Ceiling.of_sheet(H100, "bfloat16").product_ops == H100.bf16_flops
    assert Ceiling.of_sheet(H100, "fp8").product_ops == H100.fp8_flops
    assert Ceiling.of_sheet(H100, "float32").product_ops == H100.float32_flops


# --- cases -------------------------------------------------------------------------------------------------


@LOOKAHEAD
def test_decode_steps_are_of_the_batch_at_its_context(lookahead: bool) -> None:
    case = DecodeCase(3, 50)
    timing = CaseRunner(fake_recorder(lookahead), fake_config(), now=Clock()).run(case)
    assert len(timing.samples) == DECODE_STEPS
    assert {sample.num_decode for sample in timing.samples} == {3}
    assert {sample.num_sampled for sample in timing.samples} == {3}
    assert not any(sample.chunks for sample in timing.samples)
    contexts = [sample.decode_context_tokens for sample in timing.samples]
    assert [later - earlier for earlier, later in itertools.pairwise(contexts)] == [3] * (DECODE_STEPS - 1)
    assert abs(sum(contexts) / len(contexts) / 3 - 50) <= 2
    assert timing.seconds == DECODE_STEPS  # each step is between two looks at the clock
    assert timing.step_s == 1.0


@LOOKAHEAD
def test_prompts_of_decoding_requests_are_left_out_and_those_that_are_timed_are_not(lookahead: bool) -> None:
    recorder = fake_recorder(lookahead)
    runner = recorder.runner
    assert isinstance(runner, FakeRunner)
    runner.plans.clear()
    cases = CaseRunner(recorder, fake_config(), now=Clock())
    cases.run(DecodeCase(3, 50))
    assert {len(row.token_ids) for plan in runner.plans for row in plan.rows} == {1}
    cases.run(PrefillCase(2, 40))
    assert (
        sum(len(row.token_ids) for plan in runner.plans for row in plan.rows if len(row.token_ids) > 1) == 80
    )
    runner.plans.clear()
    CaseRunner(recorder, fake_config(), compute_prompts=True, now=Clock()).run(DecodeCase(3, 50))
    prompts = [len(row.token_ids) for plan in runner.plans for row in plan.rows if len(row.token_ids) > 1]
    assert prompts == [DecodeCase(3, 50).prompt_len] * 3


@LOOKAHEAD
def test_samples_are_what_the_scheduler_planned(lookahead: bool) -> None:
    """Against the rows that the runner under the recorder was given, counted here."""
    recorder = fake_recorder(lookahead)
    planned: list[StepPlan] = []
    runner = recorder.runner
    assert isinstance(runner, FakeRunner)
    runner.on_execute = planned.append
    timing = CaseRunner(recorder, fake_config(), now=Clock()).run(PrefillCase(3, 45))
    counted = []
    for plan in planned:
        ones = [row for row in plan.rows if len(row.token_ids) == 1]
        more = [row for row in plan.rows if len(row.token_ids) > 1]
        counted.append(
            (
                len(ones),
                sum(row.start + 1 for row in ones),
                tuple((len(row.token_ids), row.start + len(row.token_ids)) for row in more),
                sum(1 for row in plan.rows if row.num_logits),
            )
        )
    assert counted == [
        (sample.num_decode, sample.decode_context_tokens, sample.chunks, sample.num_sampled)
        for sample in timing.samples
    ]
    assert sum(count[3] for count in counted) == 3
    assert max(sum(query for query, _ in count[2]) for count in counted) <= 32  # the user's budget


@LOOKAHEAD
def test_a_prompt_beside_a_batch(lookahead: bool) -> None:
    timing = CaseRunner(fake_recorder(lookahead), fake_config(), now=Clock()).run(MixedCase(4, 30, 50))
    assert {sample.num_decode for sample in timing.alone} == {4}
    assert not any(sample.chunks for sample in timing.alone)
    chunks = [chunk for sample in timing.samples for chunk in sample.chunks]
    ones = sum(sample.num_decode - 4 for sample in timing.samples)
    assert sum(query for query, _ in chunks) + ones == 50
    assert max(context for _, context in chunks) + ones == 50
    assert all(
        sum(query for query, _ in sample.chunks) + sample.num_decode <= 32 for sample in timing.samples
    )


def test_an_engine_is_empty_after_a_case_and_the_next_finds_nothing_cached() -> None:
    recorder = fake_recorder()
    cases = CaseRunner(recorder, fake_config(), now=Clock())
    first, second = cases.run(PrefillCase(1, 60)), cases.run(PrefillCase(1, 60))
    assert [sample.chunks for sample in first.samples] == [sample.chunks for sample in second.samples]


@pytest.mark.parametrize(
    ("case", "cure"),
    [
        (DecodeCase(9, 8), "--max-num-seqs 9"),
        (DecodeCase(1, 500), "shorter"),
        (PrefillCase(8, 127), "raise --kv-cache-memory"),
    ],
)
def test_what_does_not_fit_is_refused(case: DecodeCase | PrefillCase, cure: str) -> None:
    with pytest.raises(ConfigError, match=cure):
        CaseRunner(fake_recorder(num_blocks=200), fake_config(), now=Clock()).run(case)
    fits, too_large = fitting([case, DecodeCase(1, 8)], max_model_len=128, kv_tokens=800, max_num_seqs=8)
    assert (fits, too_large) == ([DecodeCase(1, 8)], [case])


def test_a_step_that_fails_is_no_measurement() -> None:
    recorder = fake_recorder()
    runner = recorder.runner
    assert isinstance(runner, FakeRunner)

    def fail(plan: StepPlan) -> None:
        raise ValueError("broken")

    runner.on_execute = fail
    with pytest.raises(EngineStepError):
        CaseRunner(recorder, fake_config(), now=Clock()).run(PrefillCase(1, 10))


def test_the_grid_for_a_fit_tells_batch_context_and_chunks_apart() -> None:
    """The matrix of what a step costs (steps, tokens, contexts, pairs of chunks) has full rank."""
    recorder = StepRecorder(FakeRunner(False, 4096, 16, 4200))
    config = EngineConfig(model="fake", max_num_seqs=40)
    cases = CaseRunner(recorder, config, now=Clock())
    small = dataclasses.replace(
        FIT, batch_sizes=(1, 4, 16), context_lens=(64, 512), prompt_lens=(16, 256, 1024)
    )
    rows = []
    for case in small.cases(("decode", "prefill", "mixed")):
        for sample in cases.run(case).samples:
            queries = [query for query, _ in sample.chunks]
            pairs = sum(query * (context - query / 2) for query, context in sample.chunks)
            features = (1, sample.num_decode, sample.decode_context_tokens, sum(queries), pairs, len(queries))
            rows.append(features)
    matrix = torch.tensor(rows, dtype=torch.float64)
    matrix = matrix / matrix.norm(dim=0)
    assert torch.linalg.cond(matrix) < 50


# --- a trace -----------------------------------------------------------------------------------------------


def replay(requests: list[TraceRequest], lookahead: bool = False, **settings: object) -> tuple[Replay, Clock]:
    clock = Clock()
    recorder = fake_recorder(lookahead)
    timer = StepTimer(Engine(recorder, fake_config(**settings)), recorder, clock)
    run = Replay(timer, requests, lambda text: [5] * len(text), now=clock, sleep=clock.sleep)
    run.run()
    return run, clock


@LOOKAHEAD
def test_each_request_gets_its_tokens_and_times_count_from_when_it_was_due(lookahead: bool) -> None:
    traffic = [
        TraceRequest(prompt_tokens=20, output_tokens=5),
        TraceRequest(prompt_tokens=30, output_tokens=7, arrival_s=4.0),
        TraceRequest(prompt_tokens=10, output_tokens=2, arrival_s=500.0),
    ]
    run, clock = replay(traffic, lookahead)
    assert [(record.prompt_tokens, record.output_tokens) for record in run.records] == [
        (20, 5),
        (30, 7),
        (10, 2),
    ]
    assert [record.sent_s for record in run.records] == [0.0, 4.0, 500.0]
    for record in run.records:
        assert len(record.token_s) == record.output_tokens
        assert record.token_s == sorted(record.token_s)
        assert record.e2e_s == record.token_s[-1]
        assert record.finish_reason == "length"
    assert sum(clock.slept) > 300  # idle between the second and the third
    assert sum(sample.num_sampled for sample in run.samples) == 14


def test_turns_follow_each_other_and_share_what_came_before() -> None:
    traffic = [
        TraceRequest(prompt_tokens=40, output_tokens=9, conversation="a"),
        TraceRequest(prompt_tokens=60, output_tokens=3, conversation="a", turn=1, think_s=50.0),
        TraceRequest(prompt_tokens=70, output_tokens=3, conversation="a", turn=2, think_s=10.0),
    ]
    run, _ = replay(traffic)
    first, second, third = run.records
    assert second.sent_s == pytest.approx(first.sent_s + first.e2e_s + 50)
    assert third.sent_s == pytest.approx(second.sent_s + second.e2e_s + 10)
    assert first.cached_tokens == 0
    assert (
        second.cached_tokens == 48
    )  # of 40 + 9 tokens, the last of which was never computed: whole blocks of 4
    assert third.cached_tokens == 60
    assert [record.turn for record in run.records] == [0, 1, 2]


def test_shared_prefixes_are_shared_and_nothing_else_is() -> None:
    traffic = [
        TraceRequest(
            prompt_tokens=40, output_tokens=1, prefix="a", prefix_tokens=24, arrival_s=float(100 * n)
        )
        for n in range(2)
    ]
    traffic.append(
        TraceRequest(prompt_tokens=40, output_tokens=1, prefix="b", prefix_tokens=24, arrival_s=300.0)
    )
    run, _ = replay(traffic)
    assert [record.cached_tokens for record in run.records] == [0, 24, 0]
    off, _ = replay(traffic, prefix_caching=False)
    assert [record.cached_tokens for record in off.records] == [0, 0, 0]


def test_text_is_sent_as_it_is_and_what_is_refused_is_a_failed_record() -> None:
    traffic = [
        TraceRequest(prompt_tokens=3, output_tokens=2, prompt="seven.."),
        TraceRequest(prompt_tokens=400, output_tokens=2),
    ]
    run, _ = replay(traffic)
    assert run.records[0].prompt_tokens == 7
    assert run.records[1].error is not None
    assert "maximum context length" in run.records[1].error
    assert run.records[1].output_tokens == 0


def test_preemptions_are_counted_at_whom_they_hit() -> None:
    recorder = fake_recorder(num_blocks=20)
    clock = Clock()
    engine = Engine(recorder, fake_config())
    run = Replay(
        StepTimer(engine, recorder, clock),
        [TraceRequest(prompt_tokens=20, output_tokens=30) for _ in range(3)],
        now=clock,
        sleep=clock.sleep,
    )
    run.run()
    assert engine.scheduler.num_preemptions > 0
    assert sum(record.preemptions or 0 for record in run.records) == engine.scheduler.num_preemptions
    assert run.records[0].preemptions == 0  # the first in order never gives way


# --- real models -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint("llama", tmp_path_factory.mktemp("bench"), num_attention_heads=4)


@pytest.mark.parametrize("family", [*FAMILIES])
@pytest.mark.parametrize("num_kv_heads", [4, 1])
def test_random_weights_load_in_every_family(family: str, num_kv_heads: int) -> None:
    from tiny import tiny_config

    raw = {**tiny_config(family, num_key_value_heads=num_kv_heads).to_dict(), "architectures": None}
    config = ModelConfig.from_hf(raw)
    settings = EngineConfig(model="random", backend="reference", kv_cache_memory=2**20)
    runner = ModelRunner(RandomCheckpoint(config), settings, model_config=config)
    assert runner.info.num_kv_heads == num_kv_heads
    assert runner.info.kv_bytes_per_token == config.kv_bytes_per_token(4)
    engine = Engine(runner, settings)
    params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
    engine.add(EngineRequest(request_id="a", prompt=[1, 2, 3], params=params))
    outputs = [output for _ in range(4) for output in engine.step()]
    assert [output.error for output in outputs] == [None] * 4


@pytest.mark.parametrize(
    "settings", [{"backend": "reference"}, {"backend": "reference", "kv_cache_dtype": "int8"}]
)
def test_a_filled_cache_holds_no_zero_pages(tiny_llama: Path, settings: dict[str, str]) -> None:
    config = EngineConfig(model=str(tiny_llama), kv_cache_memory=2**20, **settings)
    runner = ModelRunner(tiny_llama, config)
    fill_cache(runner)
    for tensor in (*runner.cache.k, *runner.cache.v):  # type: ignore[attr-defined]
        assert tensor.float().flatten(1).std(dim=1).min() > 0


def test_a_filled_native_cache_is_read_by_the_kernels(tiny_llama: Path) -> None:
    pytest.importorskip("gqa_serve.engine.kernels.cpu._native")
    config = EngineConfig(model=str(tiny_llama), backend="native", kv_cache_memory=2**20)
    empty, full = ModelRunner(tiny_llama, config), ModelRunner(tiny_llama, config)
    told: list[tuple[int, int]] = []
    fill_cache(full, lambda done, total: told.append((done, total)))
    assert told[-1] == (full.info.num_blocks * 16, full.info.num_blocks * 16)
    from gqa_serve.engine.batch import PlanRow

    for first in (0, full.info.num_blocks - 2):
        plan = StepPlan([PlanRow([5], 20, [first, first + 1], 1)])
        assert not torch.allclose(empty.execute(plan), full.execute(plan))


def test_the_least_work_of_a_step_by_hand(tiny_llama: Path) -> None:
    """4 layers of 64, 4 heads over 2 of 16, MLP of 96, vocabulary of 128, float32, embeddings not tied."""
    config = EngineConfig(model=str(tiny_llama), backend="reference", kv_cache_memory=2**20)
    runner = ModelRunner(tiny_llama, config)
    layer = 64 * (64 + 2 * 32) + 64 * 64 + 3 * 64 * 96
    norms = (2 * 4 + 1) * 64
    sample = StepSample(
        num_decode=2, decode_context_tokens=30, chunks=((5, 9),), num_sampled=2, seconds=1.0, forward_s=1.0
    )
    work = step_work(runner, sample)
    assert work.read_bytes == 4 * (4 * layer + 128 * 64 + norms) + (30 + 9) * 2 * 4 * 2 * 16 * 4
    assert work.product_ops == 2 * 7 * 4 * layer + 2 * 2 * 128 * 64
    seen = 30 + (5 + 6 + 7 + 8 + 9)
    assert work.attention_ops == 4 * 4 * 16 * seen * 4
    none = step_work(runner, dataclasses.replace(sample, num_sampled=0))  # the middle of a prompt: no logits
    assert none.product_ops == 2 * 7 * 4 * layer


@pytest.fixture
def quiet(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No two seconds of measuring the machine, and no environment of an engine process for other tests."""
    monkeypatch.setattr(Limits, "measure", classmethod(lambda cls, *args: cls(1e10, 1e11, 1e12, 0.0)))
    monkeypatch.setattr(engine_command, "adopt_engine_environment", lambda: None)
    monkeypatch.setattr("torch.set_num_threads", lambda count: None)
    return iter(())


SMALL = "--batch-size 1 2 --context-len 24 40 --prompt-len 20 --mixed-batch-size 2 --mixed-prompt-len 20"
TINY = [*SMALL.split(" "), "--rounds", "2", "--max-num-seqs", "8"]


@pytest.mark.usefixtures("quiet")
def test_the_command_measures_and_writes(
    tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    steps, numbers, page = tmp_path / "steps.jsonl", tmp_path / "n.json", tmp_path / "p.html"
    files = ["--steps", str(steps), "--json", str(numbers), "--html", str(page), "--num-prompts", "1"]
    engine_command.run(["--model", str(tiny_llama), *TINY, *files])
    shown = capsys.readouterr().out
    for title in ("Decoding", "Prompts", "A prompt beside decoding"):
        assert title in shown
    document = json.loads(numbers.read_text())
    tables = document["tables"]
    assert [len(case["step_s"]) for case in document["rounds"]] == [2] * 6
    assert [(row["batch_size"], row["context_len"]) for row in tables["Decoding"]] == [
        (1, 24), (2, 24), (1, 40), (2, 40)
    ]  # fmt: skip
    for row in tables["Decoding"]:
        assert row["tokens_per_s"] == pytest.approx(row["batch_size"] / row["step_s"])
        assert row["kv_bytes"] == row["batch_size"] * row["context_len"] * 2 * 4 * 2 * 16 * 4
    samples = read_samples(steps)
    decode = [sample for sample in samples if not sample.chunks]
    assert len(decode) == (4 + 1) * 2 * DECODE_STEPS  # and those before the prompt of the mixed case
    assert sum(query for sample in samples for query, _ in sample.chunks) == (20 + 20) * 2
    assert "<svg" in page.read_text()


@pytest.mark.usefixtures("quiet")
def test_kv_heads_side_by_side(tiny_llama: Path, tmp_path: Path) -> None:
    numbers = tmp_path / "n.json"
    words = ["--model", str(tiny_llama / "config.json"), *TINY, "--only", "decode", "--json", str(numbers)]
    engine_command.run([*words, "--num-kv-heads", "all"])  # a config.json is enough: no weights are read
    tables = json.loads(numbers.read_text())["tables"]
    (variants,) = [rows for title, rows in tables.items() if "KV heads" in title]
    assert [row["variant"] for row in variants] == ["4 (MHA)", "2 (GQA)", "1 (MQA)"]
    assert [row["kv_share"] for row in variants] == [1.0, 0.5, 0.25]
    assert len(tables["Decoding"]) == 4 * 3


@pytest.mark.usefixtures("quiet")
def test_the_command_replays_a_trace(tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    trace, records, steps = (tmp_path / name for name in ("t.jsonl", "r.jsonl", "s.jsonl"))
    write_trace(trace, [TraceRequest(prompt_tokens=30, output_tokens=n, arrival_s=0.01 * n) for n in (3, 5)])
    words = [
        "--model",
        str(tiny_llama),
        "--trace",
        str(trace),
        "--records",
        str(records),
        "--max-num-seqs",
        "8",
    ]
    engine_command.run(words)
    assert [record.output_tokens for record in read_records(records)] == [3, 5]
    assert "Decoding" not in capsys.readouterr().out
    engine_command.run([*words, *TINY, "--steps", str(steps), "--only", "prefill"])
    samples = read_samples(steps)
    chunks = sum(query for sample in samples for query, _ in sample.chunks)
    # What of the trace's prompts is in a chunk and what is a row of its own depends on the time.
    computed = chunks + sum(sample.num_decode for sample in samples)
    assert computed == 2 * 20 + 2 * 30 + (3 - 1) + (5 - 1)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--records", "r.jsonl"], "give a --trace"),
        (["--trace", "t", "--num-kv-heads", "1"], "leave out --num-kv-heads"),
        (["--steps", "s", "--num-kv-heads", "1"], "leave out --num-kv-heads"),
        (["--trace", "t", "--batch-size", "1"], "add --only"),
        (["--batch-size", "0"], "--batch-size must be at least 1"),
        (["--rounds", "-1"], "--rounds must be at least 1"),
        (["--steps", "nowhere/s"], "no folder nowhere"),
        (["--queue-timeout", "3"], "is for a server"),
        (["--hardware", "h100"], "not what computes here"),
        (["--num-kv-heads", "3"], "do not divide"),
        (["--num-kv-heads", "many"], "takes numbers, or all"),
        (["--context-len", "5000"], "shorter"),
    ],
)
@pytest.mark.usefixtures("quiet")
def test_what_makes_no_sense_is_refused(tiny_llama: Path, words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        engine_command.run(["--model", str(tiny_llama), "--device", "cpu", *words])


def test_a_model_is_needed() -> None:
    with pytest.raises(ConfigError, match="Which model"):
        engine_command.run(["--quick"])
