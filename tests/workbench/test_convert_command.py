"""`gqa-serve convert` as it is typed: the demo model from its GGUF file, and what is refused."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import transformers

from gqa_serve.cli import main
from gqa_serve.engine.tokenizer import load_tokenizer
from gqa_serve.workbench.model_source import read_model
from tests.demo_model import demo_path
from tests.tiny import tiny_checkpoint


def test_the_demo_becomes_mqa_with_its_tokenizer(tmp_path: Path) -> None:
    gguf = demo_path()
    out = tmp_path / "mqa"
    assert (
        main(["convert", "--model", "demo", "--num-kv-heads", "1", "--no-measure", "--output", str(out)]) == 0
    )
    source = read_model(str(out))
    assert (source.config.num_heads, source.config.num_kv_heads, source.config.dtype) == (9, 1, "bfloat16")
    ours, theirs = load_tokenizer(out), transformers.AutoTokenizer.from_pretrained(out)
    text = "Élan: 3 bottles <|im_end|> of été\n\tcost 12.50"
    expected = load_tokenizer(gguf).encode(text, parse_special=True)
    assert ours.encode(text, parse_special=True) == theirs.encode(text) == expected
    messages = [{"role": "user", "content": "Hi"}]
    assert "<|im_start|>user\nHi<|im_end|>" in theirs.apply_chat_template(messages, tokenize=False)
    model = transformers.AutoModelForCausalLM.from_pretrained(out)
    assert model.config.num_key_value_heads == 1
    assert model.model.layers[3].self_attn.k_proj.weight.shape == (64, 576)


def test_a_run_that_is_ended_leaves_nothing(tmp_path: Path) -> None:
    words = ["convert", "--model", "demo", "--num-kv-heads", "1", "--no-measure", "--dtype", "float32"]
    command = [sys.executable, "-m", "gqa_serve.cli", *words, "--output", str(tmp_path / "mqa")]
    child = subprocess.Popen(command)
    while child.poll() is None and not list(tmp_path.glob(".mqa.*/*")):
        time.sleep(0.002)
    child.send_signal(signal.SIGTERM)
    assert child.wait(timeout=60) == 128 + signal.SIGTERM
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "cure"),
    [
        (["--num-kv-heads", "3"], "can be: 1, 4"),
        (["--num-kv-heads", "0"], "1 (MQA) or more"),
        (["--num-kv-heads", "4", "--method", "mean"], "leave out --method"),
        (["--num-kv-heads", "1", "--method", "fitted", "--no-measure"], "leave out --no-measure"),
        (["--num-kv-heads", "1", "--no-measure", "--window", "64"], "not used with --no-measure"),
        (["--num-kv-heads", "1", "--seed", "1"], "--seed is for"),
        (["--num-kv-heads", "1", "--compare", "--dtype", "float32"], "leave out --method and --dtype"),
        (["--num-kv-heads", "1", "--output", "."], "exists and is not empty"),
    ],
)
def test_what_makes_no_sense_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], cure: str
) -> None:
    path = tiny_checkpoint("llama", tmp_path)
    output = [] if "--output" in words or "--compare" in words else ["--output", str(tmp_path / "out")]
    assert main(["convert", "--model", str(path), *words, *output]) == 1
    assert cure in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out").exists()


def test_a_model_that_is_served_no_way_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tiny_checkpoint("llama", tmp_path)
    raw = json.loads((path / "config.json").read_text()) | {"architectures": ["MixtralForCausalLM"]}
    (path / "config.json").write_text(json.dumps(raw))
    assert (
        main(["convert", "--model", str(path), "--num-kv-heads", "1", "--output", str(tmp_path / "o")]) == 1
    )
    assert "is not supported; supported:" in capsys.readouterr().err
