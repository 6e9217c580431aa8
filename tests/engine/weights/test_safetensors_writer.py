"""Checkpoints as they are written: read back by safetensors, transformers and our own reader."""

from __future__ import annotations

import errno
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file
from tiny import tiny_model

from gqa_serve.engine.weights.safetensors import DirectoryCheckpoint
from gqa_serve.engine.weights.safetensors_writer import (
    CheckpointWriter,
    TensorSpec,
    new_folder,
    write_tensors,
)
from gqa_serve.errors import ConfigError


def some_tensors() -> dict[str, torch.Tensor]:
    """Every dtype, an odd number of 16-bit numbers before 32-bit ones, a scalar, an empty one."""
    torch.manual_seed(0)
    return {
        "a.weight": torch.randn(3, 5).bfloat16(),
        "b.weight": torch.randn(7),
        "c.weight": torch.randn(2, 2).half(),
        "d.weight": torch.randn(1).double(),
        "scalar": torch.tensor(2.5),
        "positions": torch.arange(5),
        "empty": torch.empty(0, 4),
        "größe": torch.randn(9, 4).T,  # neither ASCII nor contiguous
    }


def layout_of(tensors: dict[str, torch.Tensor]) -> dict[str, TensorSpec]:
    return {
        name: TensorSpec(tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))
        for name, tensor in tensors.items()
    }


def read(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        part = load_file(file)
        assert not found.keys() & part.keys()
        found |= part
    return found


def assert_same(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> None:
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        assert got[name].dtype == tensor.dtype
        assert torch.equal(got[name], tensor), name


@pytest.mark.parametrize("max_shard_bytes", [10**9, 64, 1])
def test_what_is_written_in_any_order_is_read_back(max_shard_bytes: int, tmp_path: Path) -> None:
    tensors = some_tensors()
    backwards = reversed(list(tensors.items()))
    write_tensors(tmp_path, layout_of(tensors), backwards, max_shard_bytes=max_shard_bytes)
    assert_same(read(tmp_path), tensors)
    files = sorted(file.name for file in tmp_path.glob("*.safetensors"))
    if max_shard_bytes == 10**9:
        assert files == ["model.safetensors"]
        assert not (tmp_path / "model.safetensors.index.json").exists()
        return
    count = len(files)
    assert count > 2
    assert files == [f"model-{n:05d}-of-{count:05d}.safetensors" for n in range(1, count + 1)]
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    for name, file in index["weight_map"].items():
        with safe_open(tmp_path / file, framework="pt") as shard:
            assert name in shard.keys()  # noqa: SIM118
            assert shard.metadata() == {"format": "pt"}
    for file in files:
        names = [name for name, where in index["weight_map"].items() if where == file]
        assert len(names) == 1 or sum(tensors[name].nbytes for name in names) <= max_shard_bytes


@pytest.mark.parametrize("max_shard_bytes", [10**9, 30_000])
def test_transformers_and_our_reader_load_it(max_shard_bytes: int, tmp_path: Path) -> None:
    model = tiny_model("llama")
    tensors = {name: tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight"} | {
        "lm_head.weight": model.lm_head.weight.detach()
    }
    write_tensors(tmp_path, layout_of(tensors), tensors.items(), max_shard_bytes=max_shard_bytes)
    model.config.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert_same(loaded.state_dict(), model.state_dict())
    checkpoint = DirectoryCheckpoint(tmp_path)
    ours = {name: tensor.clone() for name, tensor in checkpoint.tensors() if isinstance(tensor, torch.Tensor)}
    assert_same(ours, tensors)
    assert checkpoint.weight_bytes == sum(tensor.nbytes for tensor in tensors.values())


def test_numbers_are_rounded_to_the_layouts_dtype(tmp_path: Path) -> None:
    tensor = torch.randn(4, 4)
    write_tensors(tmp_path, {"a": TensorSpec((4, 4), "bfloat16")}, [("a", tensor)])
    assert_same(read(tmp_path), {"a": tensor.bfloat16()})


def test_a_wrong_missing_or_repeated_tensor_is_an_error(tmp_path: Path) -> None:
    layout = {"a": TensorSpec((2,), "float32"), "b": TensorSpec((2,), "float32")}
    writer = CheckpointWriter(tmp_path, layout)
    writer.write("a", torch.ones(2))
    with pytest.raises(ValueError, match="written before"):
        writer.write("a", torch.ones(2))
    with pytest.raises(ValueError, match="shape"):
        writer.write("b", torch.ones(3))
    with pytest.raises(ValueError, match="1 tensors were not written, such as b"):
        writer.finish()
    with pytest.raises(ConfigError, match="complex64"):
        TensorSpec((2,), "complex64")


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    output = tmp_path / "deep" / "out"
    with new_folder(output) as folder:
        (folder / "config.json").write_text("{}")
        assert not output.exists()
        assert folder.parent == output.parent
    assert [file.name for file in output.iterdir()] == ["config.json"]
    assert output.stat().st_mode & 0o777 == 0o755
    other = tmp_path / "deep" / "other"
    with pytest.raises(KeyboardInterrupt), new_folder(other) as folder:  # noqa: PT012
        (folder / "config.json").write_text("{}")
        raise KeyboardInterrupt
    assert [path.name for path in output.parent.iterdir()] == ["out"]


def test_an_existing_output_is_refused_unless_empty(tmp_path: Path) -> None:
    full, empty, file = tmp_path / "full", tmp_path / "empty", tmp_path / "file"
    full.mkdir()
    (full / "x").touch()
    empty.mkdir()
    file.touch()
    for output in (full, file):
        with pytest.raises(ConfigError, match="another --output"), new_folder(output):
            pytest.fail("must not begin")
    with new_folder(empty) as folder:
        (folder / "y").touch()
    assert (empty / "y").exists()
    assert (full / "x").exists()


def test_a_full_disk_is_told_before_and_during(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layout = {"a": TensorSpec((1000,), "float32")}
    usage = shutil.disk_usage(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=100))
        with pytest.raises(ConfigError, match="GiB free; free some"):
            CheckpointWriter(tmp_path, layout)
    assert not list(tmp_path.iterdir())

    writer = CheckpointWriter(tmp_path, layout)
    opened = Path.open

    def full(path: Path, *args: Any, **kwargs: Any) -> Any:
        if path.suffix == ".safetensors":
            raise OSError(errno.ENOSPC, "No space left on device")
        return opened(path, *args, **kwargs)

    monkeypatch.setattr(Path, "open", full)
    with pytest.raises(ConfigError, match=r"No space left on device.*free some space"):
        writer.write("a", torch.ones(1000))
