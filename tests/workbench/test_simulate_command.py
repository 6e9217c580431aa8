"""The command: what it prints and writes, what it refuses, and that processes change nothing."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from gqa_serve.errors import ConfigError
from gqa_serve.workbench.records import read_records
from gqa_serve.workbench.simulate.command import run
from gqa_serve.workbench.step_samples import StepSample, write_samples

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "torch_dtype": "bfloat16",
}


@pytest.fixture
def model(tmp_path: Path) -> str:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(CONFIG))
    return str(path)


def simulated(tmp_path: Path, *words: str) -> dict[str, Any]:
    """The JSON of a run."""
    path = tmp_path / "out.json"
    run([*words, "--json", str(path)])
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def test_fewer_kv_heads_serve_more_where_memory_is_short(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--rate", "20", "--num-requests", "300", "--output-len", "200", "--price", "2.5")
    found = simulated(tmp_path, "--model", model, "--num-kv-heads", "32,8,1", *words)
    rates = [one["summary"]["output_rate"] for one in found["runs"]]
    assert rates == sorted(rates)
    rows = found["tables"]["Engines"]
    assert [row["num_kv_heads"] for row in rows] == [32, 8, 1]
    # The same memory holds tokens as the heads divide them, to a block.
    assert rows[1]["kv_tokens"] == pytest.approx(4 * rows[0]["kv_tokens"], rel=0.05)
    for row, one in zip(rows, found["runs"], strict=True):
        seconds = one["summary"]["duration_s"]
        assert row["cost"] == pytest.approx(2.5 * seconds / 3600 / one["summary"]["output_tokens"] * 1e6)
        assert row["speed"] > 0
    assert "8 KV heads" in capsys.readouterr().out


@pytest.mark.parametrize("routing", ["round-robin", "prefix-affinity"])
def test_processes_change_nothing(model: str, tmp_path: Path, routing: str) -> None:
    words = ("--model", model, "--rate", "60", "--num-requests", "60", "--prefixes", "3", "--replicas", "3")
    words += ("--routing", routing, "--num-kv-heads", "32,8", "--output-len", "uniform:1-40")
    alone = simulated(tmp_path, *words, "--processes", "1")
    apart = simulated(tmp_path, *words, "--processes", "2")
    for one, two in zip(alone["runs"], apart["runs"], strict=True):
        assert one["summary"] == two["summary"]
        counts = [{**of["counts"], "busy_s": None} for of in (one, two)]
        assert counts[0] == counts[1]
        assert one["counts"]["busy_s"] == pytest.approx(two["counts"]["busy_s"])
        assert one["over_time"] == two["over_time"]


def test_a_run_that_serves_nothing_is_reported(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--model", model, "--prompt-len", "5000", "--num-requests", "3", "--slo-ttft", "1s")
    (found,) = simulated(tmp_path, *words, "--concurrency", "3")["runs"]
    assert found["summary"]["num_failed"] == 3
    assert found["summary"]["output_rate"] == found["summary"]["goodput"] == 0
    assert "longer than the context" in capsys.readouterr().out


def test_affinity_finds_more_prefixes_than_turns(model: str, tmp_path: Path) -> None:
    words = ("--model", model, "--rate", "8", "--num-requests", "120", "--turns", "4", "--think", "1")
    found = simulated(tmp_path, *words, "--replicas", "6", "--compare", "routing=round-robin,prefix-affinity")
    turns, affinity = (one["counts"]["num_hit_tokens"] for one in found["runs"])
    assert affinity > 1.5 * turns


def test_fit_save_and_validate(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A cost model fitted to samples of known factors predicts the run that those factors gave."""
    samples = [
        StepSample(
            num_decode=rows,
            decode_context_tokens=rows * context,
            chunks=((prompt, prompt),) if prompt else (),
            num_sampled=rows,
            seconds=0.01 + 1e-4 * rows + 1e-7 * rows * context + 2e-5 * prompt,
            forward_s=0.01,
        )
        for rows in (0, 1, 4, 16)
        for context in (100, 1000, 3000)
        for prompt in (0, 64, 512, 2000)
    ]
    steps, cost, records = (tmp_path / name for name in ("steps.jsonl", "cost.json", "records.jsonl"))
    write_samples(steps, samples)
    base = ["--model", model, "--num-blocks", "4000"]
    run([*base, "--fit", str(steps), "--save-cost-model", str(cost), "--num-requests", "5"])
    traffic = ["--rate", "2", "--num-requests", "40", "--records", str(records)]
    run([*base, "--cost-model", str(cost), *traffic])
    assert len(read_records(records)) == 40
    found = simulated(tmp_path, *base, "--cost-model", str(cost), "--validate", str(records))
    rows = {row["name"]: row for row in found["tables"]["Predicted and measured"]}
    for name in ("output tokens/s", "ITL mean, ms", "TTFT mean, ms"):
        assert abs(rows[name]["error"]) < 1e-3
    assert rows["ITL mean, ms"]["measured"] > 10
    assert "Fitted times" in capsys.readouterr().out


def test_the_page_has_the_plots(model: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    page = tmp_path / "page.html"
    run(["--model", model, "--num-requests", "20", "--html", str(page)])
    text = page.read_text()
    assert text.count("<svg") == 5


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--efficiency", "2"], "--efficiency must be"),
        (["--replicas", "0"], "--replicas must be 1 or more"),
        (["--concurrency", "4", "--rate", "2"], "leave out --rate"),
        (["--save-cost-model", "x.json"], "give --fit"),
        (["--compare", "nonsense=1"], "--compare takes the name of a flag"),
        (["--compare", "max-num-seqs="], "--compare takes the name of a flag"),
        (["--num-kv-heads", "7"], "do not divide"),
        (["--compare", "replicas=1,2", "--compare", "replicas=3,4"], "compared twice"),
        (["--num-kv-heads", "32,8", "--records", "x.jsonl"], "are for one run"),
        (["--tensor-parallel", "500"], "cannot be divided over 500 ranks"),
        (["--hardware", "l4", "--max-num-seqs", "4000"], "--max-num-batched-tokens"),
        (["--kv-cache-memory", "1KiB"], "fits 0 blocks"),
        (["--max-model-len", "4000", "--num-blocks", "100"], "holds 1600 tokens"),
        (["--kv-cache-memory", "90GiB"], "asks for 90.0 GiB, but H100 SXM has only"),
        (["--kv-cache-memory", "1GiB", "--num-blocks", "100"], "give one"),
        (["--slo-ttft", "soon"], "500ms"),
        (["--html", "/nowhere/x.html"], "There is no folder"),
    ],
)
def test_what_makes_no_sense_is_refused(model: str, words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        run(["--model", model, *words])


def test_a_fitted_cost_model_has_its_own_efficiency(model: str, tmp_path: Path) -> None:
    cost = tmp_path / "cost.json"
    names = ("step_s", "decode_s", "context_s", "prefill_s", "pair_s", "request_s")
    cost.write_text(json.dumps({"kind": "fitted", **dict.fromkeys(names, 0.001)}))
    with pytest.raises(ConfigError, match="are for the roofline"):
        run(["--model", model, "--cost-model", str(cost), "--efficiency", "0.5"])


@pytest.mark.parametrize(
    "words",
    [
        ["--num-kv-heads", "32,8"],
        ["--compare", "hardware=h100,a100"],
        ["--compare", "quantization=none,int8"],
    ],
)
def test_one_fit_does_not_compare_what_changes_step_times(
    model: str, tmp_path: Path, words: list[str]
) -> None:
    cost = tmp_path / "cost.json"
    names = ("step_s", "decode_s", "context_s", "prefill_s", "pair_s", "request_s")
    cost.write_text(json.dumps({"kind": "fitted", **dict.fromkeys(names, 1e-6)}))
    with pytest.raises(ConfigError, match="with its own --cost-model"):
        run(["--model", model, "--cost-model", str(cost), *words])
    run(["--model", model, "--cost-model", str(cost), "--num-requests", "3", "--compare", "replicas=1,2"])


def test_what_lies_beyond_the_measurements_is_said(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Measured with 4 requests at most, which says little about 40."""
    steps, cost = tmp_path / "steps.jsonl", tmp_path / "cost.json"
    samples = [
        StepSample(
            num_decode=rows,
            decode_context_tokens=rows * context,
            chunks=((600, 600),) if context == 900 else (),
            num_sampled=rows,
            seconds=0.01 + 1e-4 * rows,
            forward_s=0.01,
        )
        for rows in (1, 2, 4)
        for context in (100, 400, 900)
    ]
    write_samples(steps, samples)
    few = ["--model", model, "--num-requests", "8", "--prompt-len", "500", "--output-len", "50"]
    run([*few, "--fit", str(steps), "--save-cost-model", str(cost), "--concurrency", "4"])
    assert "Beyond what was measured" not in capsys.readouterr().out
    many = [*few, "--cost-model", str(cost), "--concurrency", "8"]
    run([*many, "--max-num-seqs", "4"])
    assert "Beyond what was measured" not in capsys.readouterr().out
    run(many)
    assert "requests at once up to 8 (measured: 4)." in " ".join(capsys.readouterr().out.split())


def test_no_torch_is_imported(model: str) -> None:
    code = (
        "import sys; from gqa_serve.workbench.simulate.command import run; "
        f"run(['--model', {model!r}, '--num-requests', '5']); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, capture_output=True).returncode == 0
