"""`gqa-serve eval` from words to report, on tiny checkpoints: several candidates, resuming, and refusals."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from eval_checkpoints import byte_tokenizer, checkpoint

from gqa_serve import cli
from gqa_serve.config import EngineConfig
from gqa_serve.errors import ConfigError
from gqa_serve.workbench.evaluate.candidates import Candidate, expand, find
from gqa_serve.workbench.evaluate.command import run
from gqa_serve.workbench.hardware import H100
from gqa_serve.workbench.kernel_cost import DEFAULT
from gqa_serve.workbench.model_source import read_model
from gqa_serve.workbench.step_cost import decode_step

FAST = ["--backend", "reference", "--context", "64", "--requests", "2"]
RETRIEVAL = ["--lengths", "300", "--depths", "0,1", "--samples", "2"]
TEXT = "A short text that is scored. " * 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints four, two, one (KV heads), wide (another vocabulary), and text0.txt to text4.txt."""
    folder = tmp_path_factory.mktemp("checkpoints")
    for name, heads in (("four", 4), ("two", 2), ("one", 1)):
        checkpoint(folder / name, num_key_value_heads=heads, seed=heads)
    wide = checkpoint(folder / "wide", vocab_size=300)
    byte_tokenizer(bos=False, merges=[("t", "h"), ("s", "c")]).save(str(wide / "tokenizer.json"))
    for number in range(5):
        (folder / f"text{number}.txt").write_text(f"{number}. {TEXT}", encoding="utf-8")
    return folder


def texts(folder: Path) -> list[str]:
    return [str(folder / f"text{number}.txt") for number in range(5)]


def model(folder: Path, name: str) -> list[str]:
    return ["--model", str(folder / name / "llama")]


def test_candidates_side_by_side(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = folder / "one" / "llama"
    words = ["--candidate", f"int8:model={folder}/four/llama,kv-cache-dtype=int8"]
    words += ["--candidate", f"full:model={folder}/four/llama", "--candidate", f"one:model={one}"]
    words += ["--reference", "full", *FAST]
    words += ["--text", *texts(folder), "--window", "128", *RETRIEVAL]
    words += ["--json", str(tmp_path / "out.json"), "--html", str(tmp_path / "out.html")]
    run([*words, "--tests", "text,passkey,speed"])
    shown = capsys.readouterr()
    data = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    names = [candidate["name"] for candidate in data["candidates"]]
    assert names == ["full", "int8", "one"]  # the reference first
    assert "3 of 3 done" in shown.err
    rows = data["tables"]["Memory, speed, quality"]
    held = [candidate["held"] for candidate in data["candidates"]]
    assert [row["heads"] for row in rows] == ["4/4", "4/4", "4/1"]
    assert rows[0]["memory_bytes"] == held[0]["weight_bytes"] + 2 * 64 * held[0]["kv_bytes_per_token"]
    assert held[0]["kv_bytes_per_token"] == 2 * 4 * 4 * 16 * 4  # K and V, layers, KV heads, dimensions, bytes
    assert held[2]["kv_bytes_per_token"] == held[0]["kv_bytes_per_token"] // 4
    text = data["tables"]["Text"]
    assert text[0]["divergence"] is None
    assert 0 < text[1]["divergence"] < 0.1 < text[2]["divergence"]  # int8 is near, other weights are not
    assert text[1]["divergence_low"] <= text[1]["divergence"] <= text[1]["divergence_high"]
    assert len(data["cells"]) == 3 * 2
    assert all(cell["trials"] == 2 and 0 <= cell["low"] <= cell["high"] <= 1 for cell in data["cells"])
    page = (tmp_path / "out.html").read_text(encoding="utf-8")
    assert page.count("<svg") == 2 + 3 * 2  # perplexity, memory; two maps of each candidate
    assert "Perplexity over KV heads" in page


def test_an_evaluation_that_was_stopped_goes_on_where_it_was(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.json"
    words = [*FAST, "--tests", "text", "--text", *texts(folder), "--json", str(out), "--resume"]
    run([*model(folder, "four"), *words])
    first = json.loads(out.read_text(encoding="utf-8"))["candidates"]
    capsys.readouterr()
    run([*model(folder, "four"), *model(folder, "two"), *words])
    shown = capsys.readouterr()
    both = json.loads(out.read_text(encoding="utf-8"))["candidates"]
    assert "1 of 1 done" in shown.err
    # The name tells candidates apart, so it may change; the numbers are those that were there.
    assert both[0]["seconds"] == first[0]["seconds"]
    assert both[1]["text"]["divergence"] is not None
    run([*model(folder, "four"), *model(folder, "two"), *words])
    assert "done" not in capsys.readouterr().err
    run([*model(folder, "four"), "--kv-cache-dtype", "auto,int8", *words])
    renamed = json.loads(out.read_text(encoding="utf-8"))["candidates"]
    assert [(one["name"], one["seconds"] == first[0]["seconds"]) for one in renamed] == [
        ("KV auto", True),
        ("KV int8", False),
    ]
    capsys.readouterr()
    run([*model(folder, "four"), *words, "--window", "100"])  # another question
    assert "1 of 1 done" in capsys.readouterr().err


def test_another_tokenizer_is_compared_by_bytes_and_not_by_tokens(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*model(folder, "four"), *model(folder, "wide"), *FAST, "--tests", "text"]
    run([*words, "--text", *texts(folder)])
    shown = " ".join(capsys.readouterr().out.split())
    assert "not compared token by token: another vocabulary (300 tokens, the reference 260)" in shown
    assert "wide" in shown


def test_the_reference_can_be_any(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [*model(folder, "four"), "--kv-cache-dtype", "float32,int8", *FAST, "--tests", "text"]
    run([*words, "--reference", "KV int8", "--no-agreement", "--text", *texts(folder)])
    assert "KV float32: perplexity" in capsys.readouterr().out


def test_other_hardware_is_the_account_of_plan(folder: Path, tmp_path: Path) -> None:
    words = [*model(folder, "four"), *model(folder, "one"), *FAST, "--tests", "speed", "--hardware", "h100"]
    run([*words, "--json", str(tmp_path / "out.json")])
    rows = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))["tables"]["Roofline on h100"]
    source = read_model(str(folder / "one" / "llama"))
    cost = decode_step(source.config, 2, 64, DEFAULT)
    assert rows[1]["tokens_per_s"] == pytest.approx(2 / cost.seconds(H100))
    assert rows[1]["ratio"] > 1


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "Evaluate what?"),
        (["--tests", "speeed"], "there is no such test"),
        (["--tests", "speed", "--window", "64"], "--window is for the text test"),
        (["--tests", "text", "--lengths", "64"], "--lengths is for the passkey or needle test"),
        (["--tests", "text", "--prefill-tokens", "64"], "--prefill-tokens is for the speed test"),
        (["--tests", "speed", "--no-agreement"], "--no-agreement is for the text test"),
        (["--needle", "a b", "--needle-answer", "b"], "give all three"),
        (["--resume"], "--resume takes up the results"),
        (["--margin", "0"], "--margin must be above 0"),
        (["--samples", "0"], "--samples must be at least 1"),
        (["--lengths", "many"], "--lengths many: write whole numbers"),
        (["--depths", "0,2"], "a depth is between 0"),
        (["--lengths", "500"], "has a context of 512 tokens, of which 32 are left"),
        (["--context", "1024"], "--context 1024: .* has a context of 512"),
        (["--stride", "600", "--window", "512"], "--stride 600 must be between 1 and 512"),
        (["--tests", "speed", "--requests", "9000000"], "needs a KV cache of .* tokens for these tests"),
        (["--hardware", "h1000"], "There is no hardware"),
        (["--reference", "best"], "--reference best names no candidate; there are: llama"),
        (
            ["--quantization", "none,int8", "--backend", "reference"],
            "Candidate weights int8 can't be evaluated",
        ),
        (["--quantization", "int7"], "--quantization must be one of"),
        (["--kv-cache-dtype", "int8,int8"], "Two candidates are named"),
        (["--html", "/nowhere/at/all.html"], "no folder /nowhere/at"),
        (["--tests", "needle", "--haystack", "/nowhere.txt"], "--haystack /nowhere.txt: No such file"),
        (["--text", "/nowhere.txt"], "--text /nowhere.txt: No such file"),
        (["--candidate", "small"], "write NAME:key=value"),
        (["--candidate", "small:quantisation=int8"], "Did you mean 'quantization'"),
        (["--candidate", "x:dtype=float32", "--kv-cache-dtype", "int8,float32"], "does not say which"),
    ],
)
def test_refusals(folder: Path, words: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    import re

    given = model(folder, "four") if words else []
    assert cli.main(["eval", *given, *words]) == 1
    error = capsys.readouterr().err
    assert re.search(says, error), error
    assert "Traceback" not in error


def test_a_file_of_something_else_is_not_resumed(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "other.json"
    path.write_text('{"tool": "plan"}', encoding="utf-8")
    assert cli.main(["eval", *model(folder, "four"), "--json", str(path), "--resume"]) == 1
    assert "--resume" in capsys.readouterr().err
    assert path.read_text(encoding="utf-8") == '{"tool": "plan"}'


def test_help_and_mistakes_need_no_torch() -> None:
    code = (
        "import sys\nfrom gqa_serve import cli\n"
        "try: cli.main(['eval', '--help'])\nexcept SystemExit: pass\n"
        "cli.main(['eval'])\nsys.exit('torch' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    for heading in ("candidates:", "tests:", "text:", "retrieval:", "memory and speed:", "examples:"):
        assert heading in result.stdout


def names(*words: Any) -> list[str]:
    return [name for name, _ in expand(*words)]


def test_names_say_what_differs() -> None:
    assert names(["demo"], {}, [], None) == ["demo"]
    assert names(["a/x", "b/y"], {}, [], None) == ["x", "y"]
    assert names(["a/x", "b/x"], {}, [], None) == ["a/x", "b/x"]
    assert names(["demo"], {"quantization": "none,int8"}, [], None) == ["weights none", "weights int8"]
    product = {"quantization": "none,int8", "kv_cache_dtype": "auto,int8"}
    assert names(["x", "y"], product, [], None)[-1] == "y, KV int8, weights int8"
    assert len(names(["x", "y"], product, [], None)) == 8


def test_named_candidates_take_the_rest_from_the_flags() -> None:
    found = expand(
        ["demo"], {"dtype": "float32"}, ["small:kv-cache-dtype=int8", "other:model=x,threads=2"], None
    )
    assert [name for name, _ in found] == ["demo", "small", "other"]
    assert [config.dtype for _, config in found] == ["float32"] * 3
    assert found[1][1].kv_cache_dtype == "int8"
    assert (found[1][1].model, found[2][1].model, found[2][1].threads) == ("demo", "x", 2)
    assert names([], {}, ["a:model=x", "b:model=y"], None) == ["a", "b"]


def test_the_context_of_a_stretched_rotary_embedding_stays(tmp_path: Path) -> None:
    scaling = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    plain = checkpoint(tmp_path / "plain")
    stretched = checkpoint(tmp_path / "stretched", rope_parameters=scaling)
    (one, other) = find(expand([str(plain), str(stretched)], {"backend": "reference"}, [], None))
    assert one.sized(100, 200, 8).max_model_len == 112 - 12
    assert other.sized(100, 200, 8).max_model_len is None
    given = Candidate("x", EngineConfig(model="x", max_model_len=300), plain, one.model, one.block_bytes)
    assert given.sized(100, 200, 8).max_model_len == 300


def test_a_candidate_whose_checkpoint_changed_is_another(folder: Path) -> None:
    (candidate,) = find(expand([str(folder / "one" / "llama")], {"backend": "reference"}, [], None))
    before = candidate.key({})
    assert candidate.key({}) == before
    assert candidate.key({"seed": 1}) != before
    (folder / "one" / "llama" / "config.json").touch()
    assert candidate.key({}) != before


def test_impossible_settings_are_found_before_anything_is_loaded(folder: Path) -> None:
    named = expand(
        [str(folder / "one" / "llama")], {"backend": "reference", "quantization": "int8"}, [], None
    )
    with pytest.raises(ConfigError, match="does not serve --quantization int8"):
        find(named)
