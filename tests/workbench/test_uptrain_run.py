"""Whole runs of the command on a tiny model: resumption after a kill, refusals, what comes out."""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny import tiny_config, tiny_model

from gqa_serve.cli import main
from gqa_serve.workbench.uptrain.folder_lock import alone

WORDS = [
    "heads",
    "share",
    "keys",
    "and",
    "values",
    "so",
    "that",
    "the",
    "cache",
    "is",
    "small",
    "\n",
    "17",
    "é",
]


def write_text(folder: Path, *, count: int = 6) -> Path:
    """Some documents of random words."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = random.Random(5)
    for index in range(count):
        words = generator.choices(WORDS, k=400)
        (folder / f"{index}.txt").write_text(" ".join(words), encoding="utf-8")
    lines = [json.dumps({"text": " ".join(generator.choices(WORDS, k=30))}) for _ in range(40)]
    (folder / "short.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def write_config(path: Path, **overrides: Any) -> Path:
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 300, "hidden_size": 32,
        "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4,
        "max_position_embeddings": 128, "rms_norm_eps": 1e-5, "tie_word_embeddings": True, **overrides,
    }  # fmt: skip
    path.write_text(json.dumps(config), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model trained from scratch for a few steps; its text is beside it."""
    folder = tmp_path_factory.mktemp("uptrain")
    text = write_text(folder / "text")
    config = write_config(folder / "config.json")
    words = ["--from-config", str(config), "--train-tokenizer", "300", "--text", str(text)]
    words += ["--output", str(folder / "model"), "--tokens", "2k", *SMALL]
    assert main(["uptrain", *words]) == 0
    return folder / "model"


SMALL = [
    "--seq-len",
    "64",
    "--batch-size",
    "4",
    "--micro-batch-size",
    "2",
    "--threads",
    "1",
    "--dtype",
    "float32",
]


def words_of(start: Path, output: Path, *more: str) -> list[str]:
    text = start.parent / "text"
    return ["uptrain", "--model", str(start), "--text", str(text), "--output", str(output), *SMALL, *more]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def same(one: Path, other: Path) -> bool:
    a, b = weights(one), weights(other)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_the_result_is_a_checkpoint_that_transformers_loads(start: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(start)
    tokenizer = transformers.AutoTokenizer.from_pretrained(start)
    ids = tokenizer("heads share keys", return_tensors="pt").input_ids
    assert torch.isfinite(model(ids).logits).all()
    log = [json.loads(line) for line in (start / "uptrain" / "log.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in log] == list(range(1, 9))
    assert (
        log[-1]["validation_loss"] < json.loads((start / "uptrain" / "run.json").read_text())["loss_before"]
    )
    assert not (start / "uptrain" / "state").exists()


@pytest.mark.parametrize("teacher", [False, True], ids=["text", "distilled"])
def test_killed_anywhere_it_ends_with_the_same_bits(start: Path, tmp_path: Path, teacher: bool) -> None:
    more = ["--tokens", "6k", "--save-steps", "3", "--learning-rate", "3e-3", "--validate-steps", "5"]
    more += ["--teacher", str(start), "--temperature", "2"] if teacher else []
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert main(words_of(start, whole, *more)) == 0
    generator = random.Random(int(teacher))
    kills = 0
    command = [sys.executable, "-m", "gqa_serve.cli", *words_of(start, killed, *more)]
    log = killed / "uptrain" / "log.jsonl"
    for _ in range(1 if teacher else 2):
        child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        before = count_lines(log)
        wanted = before + generator.randint(2, 7)
        while child.poll() is None and not before + 2 <= count_lines(log) >= wanted:
            time.sleep(0.002)
        if child.poll() is None:
            time.sleep(generator.random() * 0.02)
            child.send_signal(signal.SIGKILL)
        kills += child.wait() == -signal.SIGKILL
    assert kills > 0, "every run ended before it was killed: the test proves nothing"
    assert main(words_of(start, killed, *more)) == 0
    assert same(whole, killed)
    steps = [json.loads(line)["step"] for line in log.read_text().splitlines()]
    assert steps == list(range(1, 25))


def count_lines(path: Path) -> int:
    return path.read_text().count("\n") if path.exists() else 0


def test_a_stop_signal_saves_the_step_it_is_at(start: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    words = words_of(start, output, "--tokens", "50k")
    log = output / "uptrain" / "log.jsonl"
    child = subprocess.Popen(
        [sys.executable, "-m", "gqa_serve.cli", *words], stderr=subprocess.PIPE, text=True
    )
    while child.poll() is None and count_lines(log) < 3:
        time.sleep(0.01)
    child.send_signal(signal.SIGINT)
    _, said = child.communicate(timeout=60)
    assert child.returncode == 130
    done = count_lines(log)
    assert f"Stopped after step {done}" in said
    assert os.listdir(output / "uptrain" / "state") == [f"step-{done:08d}"]


def test_one_batch_is_its_micro_batches(start: Path, tmp_path: Path) -> None:
    for size in ("1", "4"):
        words = words_of(start, tmp_path / size, "--tokens", "1k", "--learning-rate", "1e-3")
        words[words.index("--micro-batch-size") + 1] = size
        assert main(words) == 0
    one, other = weights(tmp_path / "1"), weights(tmp_path / "4")
    for name, tensor in one.items():
        assert torch.allclose(tensor, other[name], atol=2e-4), name


@pytest.mark.parametrize("trained", ["attention", "kv"])
def test_what_is_not_trained_stays_to_the_bit(start: Path, tmp_path: Path, trained: str) -> None:
    assert main(words_of(start, tmp_path / "out", "--tokens", "1k", "--train", trained)) == 0
    before, after = weights(start), weights(tmp_path / "out")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    parts = ("k_proj", "v_proj") if trained == "kv" else ("q_proj", "k_proj", "v_proj", "o_proj")
    assert changed == {name for name in before if name.split(".")[-2] in parts}


def test_a_loss_that_is_not_finite_stops_it_with_the_cure(
    start: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in start.iterdir():
        if file.is_file():
            (broken / file.name).write_bytes(file.read_bytes())
    tensors = weights(start)
    tensors["model.norm.weight"] = tensors["model.norm.weight"].fill_(3e38)
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    words = words_of(start, tmp_path / "out", "--tokens", "1k", "--validation-share", "0")
    words[words.index("--model") + 1] = str(broken)
    assert main(words) == 1
    said = " ".join(capsys.readouterr().err.split())
    assert "broke down at step 1: loss" in said
    assert "no state was saved yet" in said
    assert "--restart --learning-rate 3.3e-05" in said
    assert not (tmp_path / "out" / "config.json").exists()


def test_another_run_in_the_same_folder_is_refused(
    start: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    assert main(words_of(start, output, "--tokens", "1k")) == 0
    assert main(words_of(start, output, "--tokens", "2k")) == 1
    assert "--tokens was 1000" in capsys.readouterr().err
    (start.parent / "text" / "extra.md").write_text("More text.", encoding="utf-8")
    try:
        assert main(words_of(start, output, "--tokens", "1k")) == 1
        assert "The text is not that of the run" in capsys.readouterr().err
    finally:
        (start.parent / "text" / "extra.md").unlink()
    assert main(words_of(start, output, "--tokens", "1k")) == 0  # done already: the report again
    assert main(words_of(start, output, "--tokens", "2k", "--restart")) == 0
    assert len((output / "uptrain" / "log.jsonl").read_text().splitlines()) == 8
    full = tmp_path / "full"
    full.mkdir()
    (full / "file").write_text("of somebody")
    assert main(words_of(start, full, "--tokens", "1k", "--restart")) == 1
    assert "is not empty and not of a run" in capsys.readouterr().err
    assert main(words_of(start, start, "--tokens", "1k")) == 1
    assert "--output is the folder of a model that is read" in capsys.readouterr().err


def test_a_second_run_in_the_folder_of_one_that_goes_on_is_refused(
    start: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    assert main(words_of(start, output, "--tokens", "1k")) == 0
    with alone(output / "uptrain"):
        for more in ([], ["--restart"]):
            assert main(words_of(start, output, "--tokens", "1k", *more)) == 1
            assert "Another process trains in" in capsys.readouterr().err
    assert main(words_of(start, output, "--tokens", "1k", "--restart")) == 0


def test_what_would_change_the_result_is_refused(
    start: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = shutil.copytree(start, tmp_path / "model", ignore=shutil.ignore_patterns("uptrain"))
    words = words_of(start, tmp_path / "out", "--tokens", "1k", "--train", "kv")
    words[words.index("--model") + 1] = str(model)
    assert main(words) == 0
    assert main([*words, "--save-dtype", "bfloat16"]) == 1
    assert "--save-dtype was auto" in capsys.readouterr().err
    tensors = weights(model)
    tensors["model.layers.0.self_attn.k_proj.weight"] *= 1.1
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    assert main(words) == 1
    assert "The model is not that of the run" in capsys.readouterr().err


def test_a_full_disk_while_text_is_tokenized_is_an_error_with_a_cure(
    start: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = words_of(start, tmp_path / "out", "--tokens", "1k")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        assert main(words) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    said = " ".join(capsys.readouterr().err.split())
    assert "is full (File too large); free space and run the same command again" in said
    assert main(words) == 0


def test_what_is_not_the_text_decoder_is_kept(start: Path, tmp_path: Path) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 4, "num_hidden_layers": 1}
    text = tiny_config("gemma3", vocab_size=300, **sizes, layer_types=["full_attention"])
    vision = transformers.SiglipVisionConfig(**{**sizes, "image_size": 28})
    config = transformers.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    model = transformers.Gemma3ForConditionalGeneration._from_config(config)
    model.save_pretrained(tmp_path / "mm")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(start / name, tmp_path / "mm")
    words = words_of(start, tmp_path / "out", "--tokens", "500", "--save-dtype", "bfloat16")
    words[words.index("--model") + 1] = str(tmp_path / "mm")
    assert main(words) == 0
    before, after = weights(tmp_path / "mm"), weights(tmp_path / "out")
    assert before.keys() == after.keys()
    for name, tensor in after.items():
        is_text = "language_model" in name
        assert tensor.dtype == torch.bfloat16
        assert is_text or torch.equal(tensor, before[name].bfloat16()), name
    transformers.Gemma3ForConditionalGeneration.from_pretrained(tmp_path / "out")


def test_the_folder_of_the_text_may_hold_the_output(start: Path, tmp_path: Path) -> None:
    text = write_text(tmp_path / "text")
    words = words_of(start, text / "out", "--tokens", "1k")
    words[words.index("--text") + 1] = str(text)
    assert main(words) == 0
    assert main(words) == 0  # the log of the run, a .jsonl, is no text
    assert main([*words, "--restart"]) == 0


def test_a_teacher_of_other_tokens_is_refused(
    start: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other"
    tiny_model("llama", vocab_size=300).save_pretrained(other)
    tokenizer = json.loads((start / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    (other / "tokenizer_config.json").write_bytes((start / "tokenizer_config.json").read_bytes())
    assert main(words_of(start, tmp_path / "out", "--tokens", "1k", "--teacher", str(other))) == 1
    assert "has another tokenizer" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "cure"),
    [
        ([], "--model a checkpoint to go on from"),
        (["--model", "m", "--from-config", "c"], "one of them"),
        (["--model", "m"], "Give --output"),
        (["--model", "m", "--output", "o"], "Give --text"),
        (["--model", "m", "--budget-only", "--temperature", "2"], "give --teacher MODEL too"),
        (["--model", "m", "--budget-only", "--tokens", "5", "--alpha", "0.1"], "leave out --alpha"),
        (["--model", "m", "--budget-only", "--tokens", "many"], "write it like 500k"),
        (["--model", "m", "--budget-only", "--batch-size", "6", "--micro-batch-size", "4"], "must divide"),
        (["--from-config", "c", "--output", "o", "--text", "t"], "needs --tokenizer FOLDER"),
        (["--from-config", "c", "--budget-only", "--original-tokens", "1T"], "no earlier pretraining"),
        (["--from-config", "c", "--budget-only", "--revision", "main"], "is of --model's repository"),
        (["--model", "m", "--output", "o", "--text", "/nowhere"], "There is no text /nowhere"),
    ],
)
def test_what_makes_no_sense_is_refused(
    words: list[str],
    cure: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["uptrain", *words]) == 1
    assert cure in capsys.readouterr().err
