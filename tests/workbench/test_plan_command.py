"""`gqa-serve plan` as typed: what it prints, writes, refuses, and what it does without."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from gqa_serve.cli import main

CONFIGS = Path(__file__).parent / "configs"
LLAMA = str(CONFIGS / "llama-3-8b.json")


def plan(*words: str) -> int:
    return main(["plan", *words])


def as_json(folder: Path, *words: str) -> dict[str, Any]:
    path = folder / "plan.json"
    assert plan(*words, "--json", str(path)) == 0
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def answer(found: dict[str, Any], **wanted: object) -> dict[str, Any]:
    """The one row with these values."""
    (row,) = [row for row in found["answers"] if all(row[name] == value for name, value in wanted.items())]
    return row  # type: ignore[no-any-return]


def test_the_shortest_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert plan("--model", LLAMA) == 0
    shown = capsys.readouterr().out
    for expected in ("32 MHA", "8 GQA*", "1 MQA", "8.03B parameters", "H100 SXM", "never", "128.0"):
        assert expected in shown
    assert "cost of 1M" not in shown
    assert len(shown.splitlines()) < 50  # one screen
    assert max(map(len, shown.splitlines())) <= 110


def test_it_says_what_it_cannot_know(capsys: pytest.CaptureFixture[str]) -> None:
    plan("--model", LLAMA)
    shown = " ".join(capsys.readouterr().out.split())
    for tool in ("bench engine", "bench kernel", "bench --url", "simulate", "convert", "eval"):
        assert f"gqa-serve {tool}" in shown
    assert "it stays memory-bound" in shown
    assert "never turns compute-bound" in shown


def test_every_number_of_kv_heads(tmp_path: Path) -> None:
    found = as_json(tmp_path, "--model", LLAMA, "--hardware", "a100", "--price", "3.6")
    assert [row["num_kv_heads"] for row in found["answers"]] == [32, 16, 8, 4, 2, 1]
    row = answer(found, num_kv_heads=8)
    assert row["kv_bytes_per_token"] == 128 * 1024
    assert row["kv_bytes_per_request"] == 4096 * 128 * 1024
    assert row["cost_per_million_full"] == pytest.approx(1e3 / row["tokens_per_s_full"])
    assert row["tokens_per_s_full"] == pytest.approx(row["max_requests"] / row["step_s_full"])
    assert row["kv_read_bytes_per_step_full"] == row["max_requests"] * 4096 * 128 * 1024
    assert [point["batch"] for point in row["curve"]][-1] == row["max_requests"]
    assert found["model"]["num_parameters"] == 8_030_261_248
    assert found["hardware"]["bandwidth"] == 2.039e12
    (table,) = found["tables"].values()
    assert len(table) == 6
    assert "curve" not in table[0]


def test_cases(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--kv-dtypes", "bf16,int8,fp8", "--tensor-parallel", "1,8", "--context-lens", "1024,8192"]
    found = as_json(tmp_path, "--model", LLAMA, *words, "--num-kv-heads", "8,1")
    assert len(found["answers"]) == 3 * 2 * 2 * 2
    half = answer(found, num_kv_heads=8, kv_dtype="int8", ranks=1, context_len=1024)
    assert half["kv_bytes_per_token"] == 2 * 32 * 8 * (128 + 4)
    copied = answer(found, num_kv_heads=1, kv_dtype="bfloat16", ranks=8, context_len=1024)
    assert copied["kv_bytes_per_token"] == 8 * 16 * 1024
    assert "case by case" in capsys.readouterr().out
    assert len(found["tables"]["The model as it is, case by case"]) == 12


def test_as_many_devices_as_it_needs(tmp_path: Path) -> None:
    """Llama 3 70B, 141 GB in bf16: four of 80 GB, or two if nothing else is to fit."""
    found = as_json(tmp_path, "--model", str(CONFIGS / "llama-3-70b.json"), "--hardware", "h100")
    assert {row["ranks"] for row in found["answers"]} == {2}
    found = as_json(tmp_path, "--model", str(CONFIGS / "llama-3-70b.json"), "--hardware", "l40s")
    assert {row["ranks"] for row in found["answers"]} == {4}
    assert answer(found, num_kv_heads=8)["max_requests"] > 0
    found = as_json(tmp_path, "--model", LLAMA)
    assert {row["ranks"] for row in found["answers"]} == {1}


def test_what_ranks_cannot_divide_evenly_costs_what_the_busiest_holds(tmp_path: Path) -> None:
    """Qwen2.5 7B has 28 heads: of 7 KV heads over 2 ranks, one has 4."""
    qwen = str(CONFIGS / "qwen2.5-7b.json")
    found = as_json(tmp_path, "--model", qwen, "--tensor-parallel", "2")
    assert [row["num_kv_heads"] for row in found["answers"]] == [28, 14, 7, 4, 2, 1]
    per_token = {row["num_kv_heads"]: row["kv_bytes_per_token"] for row in found["answers"]}
    assert per_token[7] == per_token[4] * 2  # 4 on a rank, as of 8, and 2


def test_batches_and_prompts(tmp_path: Path) -> None:
    found = as_json(
        tmp_path, "--model", LLAMA, "--batch-sizes", "1,16,100000", "--prompt-lens", "512,2048,8192"
    )
    steps = next(rows for title, rows in found["tables"].items() if title.startswith("Decode step"))
    assert [row["batch"] for row in steps] == [1, 16, 100_000]
    assert steps[0]["8 GQA"] < steps[1]["8 GQA"] < steps[1]["32 MHA"]
    assert steps[2]["8 GQA"] is None
    prompts = next(rows for title, rows in found["tables"].items() if title.startswith("Least time"))
    times = [row["8 GQA"] for row in prompts]
    assert times[0] < times[1] < times[2]
    assert times[2] > 4 * times[1]  # attention grows with the square
    assert answer(found, num_kv_heads=8)["prompt_s"] == times[0]


def test_windows_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    plan("--model", str(CONFIGS / "gemma-3-1b.json"), "--context-lens", "32768")
    shown = " ".join(capsys.readouterr().out.split())
    assert "22 of 26 layers see only the last 512 tokens" in shown
    assert "keeps all of it until the request ends" in shown
    plan("--model", str(CONFIGS / "gemma-3-1b.json"), "--context-lens", "512")
    assert "makes no difference to requests of 512." in " ".join(capsys.readouterr().out.split())


def test_a_cpu_is_measured(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from gqa_serve.workbench import machine

    monkeypatch.setattr(machine, "read_rate", lambda threads: 2e10)
    monkeypatch.setattr(machine, "float32_rate", lambda: 2e11)
    assert plan("--model", "demo", "--hardware", "cpu", "--batch-sizes", "1,2") == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "This machine was measured with numpy" in shown
    assert "weights Q4_1, KV bfloat16" in shown
    assert "at most 4 GiB or one longest request" in shown


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "Which model? Give --model"),
        (["--model", "./nowhere"], "does not exist"),
        (["--model", LLAMA, "--hardware", "h1000"], "no hardware 'h1000'. Did you mean h100?"),
        (["--model", LLAMA, "--context-lens", "9000"], "9000 tokens are more than the 8192"),
        (["--model", LLAMA, "--prompt-lens", "9000"], "9000 tokens are more than the 8192"),
        (["--model", LLAMA, "--num-kv-heads", "3"], "3 KV heads do not divide the 32 heads"),
        (["--model", LLAMA, "--tensor-parallel", "33"], "32 heads cannot be divided over 33 ranks"),
        (["--model", LLAMA, "--hardware", "a100", "--kv-dtypes", "fp8"], "use int8"),
        (["--model", LLAMA, "--hardware", "a100", "--quantization", "fp8"], "use int8 or int4"),
        (["--model", LLAMA, "--kv-cache-memory", "80GiB"], "has only 58.8 GiB beside the weights"),
        (["--model", LLAMA, "--kv-cache-memory", "1GiB", "--memory-utilization", "0.8"], "leave one of"),
        (["--model", LLAMA, "--max-num-seqs", "4096"], "must be at least --max-num-seqs"),
        (["--model", LLAMA, "--block-size", "2000"], "--block-size must be at most 1024"),
        (["--model", LLAMA, "--json", "/nonexistent/x.json"], "no folder /nonexistent"),
        (["--model", LLAMA, "--hardware", "l4", "--reserve", "20GiB", "--batch-sizes", "1",
          "--tensor-parallel", "1"], "Nothing fits"),
    ],
)  # fmt: skip
def test_errors_are_one_sentence(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert plan(*words) == 1
    shown = capsys.readouterr()
    assert message in shown.err
    assert len(shown.err.splitlines()) == 1
    assert shown.out == ""


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--price", "-1"], "expected a price above 0, got '-1'"),
        (["--price", "nan"], "expected a price above 0"),
        (["--kv-dtypes", "fp4"], "expected some of auto, float32"),
        (["--context-lens", "1,,2"], "expected whole numbers from 1 on with commas between"),
        (["--gpu-memory-utilization", "1.5"], "expected a share above 0 and up to 1"),
        (["--kv-cache-memory", "much"], "expected a size such as 512MiB"),
        (["--block-size", "0"], "expected a whole number from 1 on"),
        (["--contextlens", "3"], "Did you mean --context-lens"),
    ],
)
def test_wrong_flags(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        plan("--model", LLAMA, *words)
    assert end.value.code == 2
    assert message in capsys.readouterr().err


def test_cpus_have_no_share(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    box = tmp_path / "box.yaml"
    box.write_text(
        "name: box\nmemory_bytes: 64e9\nbandwidth: 1e11\nfloat32_flops: 1e12\nbf16_flops: 1e12\nis_cpu: true"
    )
    words = ["--model", LLAMA, "--hardware", str(box)]
    for flag, value, cure in (
        ("--memory-utilization", "0.5", "use --kv-cache-memory"),
        ("--reserve", "1GiB", "use --kv-cache-memory"),
        ("--block-size", "8", "not a multiple of 16"),
    ):
        assert plan(*words, flag, value) == 1
        assert cure in capsys.readouterr().err
    assert plan(*words, "--kv-cache-memory", "8GiB") == 0
    assert plan(*words, "--tensor-parallel", "2") == 1
    assert "that has link_bandwidth" in capsys.readouterr().err


def test_it_runs_without_torch(tmp_path: Path) -> None:
    """Nor does it import matplotlib for tables. The last line is printed by the check itself."""
    code = (
        "import sys; sys.modules['torch'] = None; sys.modules['matplotlib'] = None\n"
        "from gqa_serve.cli import main\n"
        f"print(main(['plan', '--model', {LLAMA!r}, '--json', {str(tmp_path / 'x.json')!r}]))"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "0"


def test_the_page(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "plan.html"
    assert plan("--model", LLAMA, "--html", str(path)) == 0
    page = path.read_text()
    assert page.count("<svg") == 4
    for label in (
        "requests in the batch",
        "tokens/s of each request",
        "operations per byte",
        "KiB per token",
    ):
        assert label in page
    small = ["--hardware", "l4", "--tensor-parallel", "1", "--reserve", "20GiB"]
    assert plan("--model", LLAMA, "--html", str(path), *small) == 0  # nothing fits: no curves
    assert path.read_text().count("<svg") == 2


def test_help_has_examples(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        plan("--help")
    shown = capsys.readouterr().out
    assert "examples:" in shown
    assert "rtx4090" in shown


def test_the_document_shows_what_is_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """docs/workbench/plan.md, whose commands are run where the config lies."""
    document = Path(__file__).parents[2].joinpath("docs", "workbench", "plan.md").read_text(encoding="utf-8")
    (tmp_path / "llama-3-8b.json").write_bytes(Path(LLAMA).read_bytes())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    model = ["--model", "llama-3-8b.json", "--price", "2.5"]
    assert plan(*model, "--hardware", "h100") == 0
    shown = "\n".join(line.rstrip() for line in capsys.readouterr().out.splitlines())
    assert shown in document
    assert plan(*model, "--kv-dtypes", "bfloat16,fp8", "--tensor-parallel", "1,2") == 0
    first_table = capsys.readouterr().out.split("┘")[0]
    assert "\n".join(line.rstrip() for line in first_table.splitlines()) in document
