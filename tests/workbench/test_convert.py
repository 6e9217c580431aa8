"""Conversions of every family, judged by transformers running the checkpoint that was written."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

from gqa_serve.engine.weights.safetensors_writer import CheckpointWriter
from gqa_serve.errors import ConfigError
from gqa_serve.workbench.convert.forward import CalibrationText, Variant, measure
from gqa_serve.workbench.convert.heads import LayerMerge, check_counts, neighbours
from gqa_serve.workbench.convert.methods import METHODS, fit_keys, fit_values, read_back
from gqa_serve.workbench.convert.output import describe, write_checkpoint
from gqa_serve.workbench.convert.source import Source, open_source
from tests.tiny import FAMILIES, tiny_checkpoint

IDS = torch.randint(3, 128, (2, 24), generator=torch.Generator().manual_seed(1))


def logits(path: Path) -> torch.Tensor:
    model = transformers.AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, attn_implementation="eager"
    )
    with torch.inference_mode():
        return model.eval()(IDS).logits.double()  # type: ignore[no-any-return]


def convert(source: Path | Source, output: Path, merges: list[LayerMerge], **options: Any) -> Path:
    source = open_source(str(source)) if isinstance(source, Path) else source
    write_checkpoint(
        source, output, merges, describe(source, "test", merges, None), **{"dtype": None, **options}
    )
    return output


def neighbouring(path: Path, new: int, pooling: Any = "mean") -> list[LayerMerge]:
    config = open_source(str(path)).config
    return [LayerMerge(neighbours(config.num_kv_heads, new), pooling)] * config.num_layers


def calibration(windows: int = 16, length: int = 24) -> CalibrationText:
    generator = torch.Generator().manual_seed(2)
    return CalibrationText(torch.randint(3, 128, (windows, length), generator=generator), windows // 2, "x")


@pytest.mark.parametrize("family", FAMILIES)
def test_moving_heads_alone_changes_nothing(tmp_path: Path, family: str) -> None:
    path = tiny_checkpoint(family, tmp_path, num_key_value_heads=4, num_attention_heads=8)
    orders = [(2, 0, 3, 1), (1, 0, 2, 3), (3, 2, 1, 0), (0, 1, 2, 3)]
    moved = convert(
        path, tmp_path / "moved", [LayerMerge(tuple((head,) for head in order)) for order in orders]
    )
    assert not torch.equal(weights(path)[k_name(path)], weights(moved)[k_name(path)])
    torch.testing.assert_close(logits(moved), logits(path), rtol=1e-4, atol=1e-4)


def weights(path: Path) -> dict[str, torch.Tensor]:
    return load_file(path / "model.safetensors")


def k_name(path: Path) -> str:
    return next(
        name
        for name in weights(path)
        if name.endswith(("0.self_attn.k_proj.weight", "0.self_attn.qkv_proj.weight"))
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_more_heads_by_repetition_and_back_is_exact(tmp_path: Path, family: str) -> None:
    path = tiny_checkpoint(family, tmp_path, num_attention_heads=8)
    more = convert(path, tmp_path / "mha", neighbouring(path, 8))
    torch.testing.assert_close(logits(more), logits(path), rtol=1e-4, atol=1e-4)
    back = convert(more, tmp_path / "back", neighbouring(more, 2))
    assert weights(back).keys() == weights(path).keys()
    for name, tensor in weights(path).items():
        assert torch.equal(weights(back)[name], tensor), name


@pytest.mark.parametrize("family", FAMILIES)
def test_measured_losses_are_those_of_the_written_checkpoints(tmp_path: Path, family: str) -> None:
    path = tiny_checkpoint(family, tmp_path, num_key_value_heads=4, num_attention_heads=8)
    source, text = open_source(str(path)), calibration()
    variants = measure(source, 2, ["mean", "fitted"], text, 0, lambda _: None)
    assert variants[0].loss == pytest.approx(oracle_loss(path, text), rel=1e-5)
    for variant in variants[1:]:
        output = convert(source, tmp_path / str(variant.method), variant.merges)
        assert variant.loss == pytest.approx(oracle_loss(output, text), rel=1e-4), variant.method


def oracle_loss(path: Path, text: CalibrationText) -> float:
    model = transformers.AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    held = text.tokens[text.num_fitted :]
    with torch.inference_mode():
        return float(model(held, labels=held).loss)


def test_mean_pooling_is_the_paper_s(tmp_path: Path) -> None:
    path = tiny_checkpoint("qwen2", tmp_path, num_key_value_heads=4)
    old, new = weights(path), weights(convert(path, tmp_path / "mqa", neighbouring(path, 2)))
    for part in ("k_proj.weight", "v_proj.bias"):
        name = f"model.layers.1.self_attn.{part}"
        heads = old[name].view(2, 2, 16, -1)
        expected = ((heads[:, 0].double() + heads[:, 1].double()) / 2).float()
        assert torch.equal(new[name].view(2, 16, -1), expected)
    first = weights(convert(path, tmp_path / "first", neighbouring(path, 2, "first")))
    name = "model.layers.0.self_attn.v_proj.weight"
    assert torch.equal(first[name].view(2, 16, -1), old[name].view(4, 16, -1)[::2])


def test_grouped_finds_the_copies_and_is_exact(tmp_path: Path) -> None:
    """Heads 0 and 3, and 1 and 2, are copies: neighbours are the wrong groups, the copies lose nothing."""
    path = tiny_checkpoint("llama", tmp_path, num_attention_heads=4)
    copies = convert(path, tmp_path / "copies", neighbouring(path, 4))
    source = open_source(str(copies))
    crossed = convert(source, tmp_path / "crossed", [LayerMerge(tuple((head,) for head in (0, 2, 3, 1)))] * 4)
    variants = measure(open_source(str(crossed)), 2, METHODS, calibration(), 0, lambda _: None)
    by_method = {variant.method: variant for variant in variants}
    for merge in by_method["grouped"].merges:
        assert merge.groups == ((0, 3), (1, 2))
    for method in ("grouped", "fitted"):
        found = by_method[method]  # type: ignore[index]
        assert max(found.k_errors + found.v_errors) < 1e-10
        output = convert(crossed, tmp_path / str(method), found.merges)
        torch.testing.assert_close(logits(output), logits(path), rtol=1e-4, atol=1e-4)
    assert max(by_method["mean"].k_errors) > 0.1
    assert all(map(math.isnan, by_method["random"].k_errors))


def test_fitted_reads_back_better_than_mean_on_text_it_has_not_seen(tmp_path: Path) -> None:
    path = tiny_checkpoint("llama", tmp_path, num_key_value_heads=4)
    variants = measure(open_source(str(path)), 2, ["mean", "fitted"], calibration(64), 0, lambda _: None)
    mean, fitted = (errors(variant) for variant in variants[1:])
    assert all(fit < pooled for fit, pooled in zip(fitted, mean, strict=True))


def errors(variant: Variant) -> list[float]:
    return variant.k_errors + variant.v_errors


@pytest.mark.parametrize("rotary_dim", [0, 4, 8])
def test_the_fit_of_keys_commutes_with_the_rotation(rotary_dim: int) -> None:
    keys = torch.randn(200, 4, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    fitted = fit_keys(keys, ((0, 2), (1, 3)), rotary_dim)
    angles = torch.rand(rotary_dim // 2, dtype=torch.float64) * 7
    turn = torch.eye(8, dtype=torch.float64)
    half = rotary_dim // 2
    for j, angle in enumerate(angles):
        turn[j, j] = turn[j + half, j + half] = angle.cos()
        turn[j, j + half], turn[j + half, j] = -angle.sin(), angle.sin()
    for matrix in (*fitted.encode, *fitted.decode):
        torch.testing.assert_close(turn @ matrix, matrix @ turn)


def test_the_fit_of_values_is_the_best_of_its_rank() -> None:
    """Eckart-Young: the error is the sum of the squared singular values that are left out."""
    values = torch.randn(100, 4, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    groups = ((0, 3), (1, 2))
    merge = LayerMerge(groups, v=fit_values(values, groups))
    left_out = sum(
        float(torch.linalg.svdvals(values[:, list(group)].flatten(1))[6:].square().sum()) for group in groups
    )
    error = float((read_back(values.float(), merge, merge.v) - values).square().sum())
    assert error == pytest.approx(left_out, rel=1e-4)


@pytest.mark.parametrize("new", [0, 3, 5, 4, 24])
def test_impossible_numbers_of_heads_are_refused_with_the_possible_ones(new: int) -> None:
    with pytest.raises(ConfigError, match=r"can be: 1, 2, 8, 16"):
        check_counts(16, 4, new)
    check_counts(16, 4, 8)
    with pytest.raises(ConfigError, match="can be: 1, 9"):
        check_counts(9, 3, 2)


def test_config_and_files_are_kept_but_for_the_heads(tmp_path: Path) -> None:
    path = tiny_checkpoint("qwen3", tmp_path)
    (path / "LICENSE").write_text("free")
    (path / "tokenizer.json").write_text("{}")
    (path / "optimizer.bin").write_text("x")
    out = convert(path, tmp_path / "out", neighbouring(path, 1), dtype="bfloat16", max_shard_bytes=40_000)
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (path, out))
    assert after.pop("num_key_value_heads") == 1
    assert before.pop("num_key_value_heads") == 2
    assert after.pop("dtype") == "bfloat16"
    assert before.pop("dtype") == "float32"
    assert after == before
    assert (out / "LICENSE").read_text() == "free"
    assert not (out / "optimizer.bin").exists()
    assert (out / "model.safetensors.index.json").exists()
    note = json.loads((out / "gqa_conversion.json").read_text())
    assert note["groups"] == [[[0, 1]]] * 4
    assert note["num_key_value_heads_before"] == 2
    assert logits(out).isfinite().all()


def test_pooling_is_rounded_once(tmp_path: Path) -> None:
    path = tiny_checkpoint("llama", tmp_path, num_key_value_heads=4)
    half = convert(path, tmp_path / "half", [LayerMerge(((0,), (1,), (2,), (3,)))] * 4, dtype="bfloat16")
    out = convert(half, tmp_path / "out", neighbouring(half, 1))
    name = "model.layers.2.self_attn.k_proj.weight"
    heads = weights(half)[name].double().view(4, 16, -1)
    assert weights(out)[name].dtype == torch.bfloat16
    assert torch.equal(weights(out)[name], heads.mean(0).bfloat16())


def test_one_tensor_is_alive_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors that were handed to the writer are gone once the next one comes."""
    path = tiny_checkpoint("llama", tmp_path)
    alive: list[weakref.ref[torch.Tensor]] = []
    most = 0
    write = CheckpointWriter.write

    def counted(writer: CheckpointWriter, name: str, tensor: torch.Tensor) -> None:
        nonlocal most
        alive.append(weakref.ref(tensor))
        most = max(most, sum(reference() is not None for reference in alive))
        write(writer, name, tensor)

    monkeypatch.setattr(CheckpointWriter, "write", counted)
    convert(path, tmp_path / "out", neighbouring(path, 1))
    assert len(alive) == len(open_source(str(path)).slots)
    assert most <= 2  # the one that is written, and the loop's last


_CONVERT_WITH_LITTLE_MEMORY = """
import re, sys, threading
from pathlib import Path
import torch
from gqa_serve.workbench.convert.heads import LayerMerge, neighbours
from gqa_serve.workbench.convert.output import write_checkpoint
from gqa_serve.workbench.convert.source import open_source

def anonymous():
    return 1024 * int(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

source = open_source(sys.argv[1])
merges = [LayerMerge(neighbours(source.config.num_kv_heads, 1))] * source.config.num_layers
before = peak = anonymous()
done = threading.Event()

def watch():
    global peak
    while not done.wait(0.002):
        peak = max(peak, anonymous())

watcher = threading.Thread(target=watch)
watcher.start()
written = write_checkpoint(source, Path(sys.argv[2]), merges, {}, dtype=None)
done.set()
watcher.join()
print(source.checkpoint.weight_bytes, written, peak - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_is_a_fraction_of_the_checkpoint(tmp_path: Path) -> None:
    """Of a checkpoint of 0.4 GB no more than a tenth is ever in the process's own memory."""
    config = {
        "num_hidden_layers": 24,
        "hidden_size": 1024,
        "intermediate_size": 1024,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
    }
    path = tiny_checkpoint("llama", tmp_path, **config)
    words = [sys.executable, "-c", _CONVERT_WITH_LITTLE_MEMORY, str(path), str(tmp_path / "out")]
    output = subprocess.run(words, check=True, capture_output=True, text=True).stdout
    stored, written, peak = map(int, output.split())
    assert stored > 300e6
    assert written > 0.5 * stored
    assert peak < stored / 10


def test_a_fused_checkpoint_keeps_its_queries(tmp_path: Path) -> None:
    path = tiny_checkpoint("phi3", tmp_path, num_key_value_heads=4)
    old, new = weights(path), weights(convert(path, tmp_path / "out", neighbouring(path, 2)))
    name = "model.layers.0.self_attn.qkv_proj.weight"
    assert new[name].shape == (64 + 2 * 32, 64)
    assert torch.equal(new[name][:64], old[name][:64])
    values = old[name][128:].view(2, 2, 16, 64).double().mean(1).float()
    assert torch.equal(new[name][96:].view(2, 16, 64), values)


def test_random_depends_on_its_seed_alone(tmp_path: Path) -> None:
    path = tiny_checkpoint("llama", tmp_path)
    merges = neighbouring(path, 1, "random")
    name = "model.layers.0.self_attn.k_proj.weight"
    one, again = (weights(convert(path, tmp_path / part, merges))[name] for part in "ab")
    other = convert(path, tmp_path / "c", [replace(merge, seed=1) for merge in merges])
    assert torch.equal(one, again)
    assert not torch.equal(one, weights(other)[name])
    assert float(one.std() / weights(path)[name].std()) == pytest.approx(1, abs=0.1)
