"""safetensors directories: single, sharded, damaged."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from gqa_serve.engine.weights.checkpoint import open_checkpoint
from gqa_serve.engine.weights.safetensors import read_weight_index
from gqa_serve.errors import ModelError, UnsupportedModelError

CONFIG = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}


def tiny_llama(dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    return LlamaForCausalLM(config).to(dtype)


def write_config(directory: Path, **extra: object) -> None:
    (directory / "config.json").write_text(json.dumps({**CONFIG, **extra}))


def write_sharded(directory: Path) -> dict[str, torch.Tensor]:
    tensors = {f"layer.{i}.weight": torch.full((4, 4), float(i)) for i in range(4)}
    files = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    for number, file in enumerate(files):
        save_file(
            {name: tensors[name] for name in list(tensors)[2 * number : 2 * number + 2]}, directory / file
        )
    weight_map = {name: files[i // 2] for i, name in enumerate(tensors)}
    (directory / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map})
    )
    write_config(directory)
    return tensors


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shard_size", ["1GB", "3KB"])
def test_reads_what_transformers_saved(tmp_path: Path, dtype: torch.dtype, shard_size: str) -> None:
    model = tiny_llama(dtype)
    model.save_pretrained(tmp_path, max_shard_size=shard_size)
    sharded = (tmp_path / "model.safetensors.index.json").exists()
    assert sharded == (shard_size == "3KB")
    checkpoint = open_checkpoint(tmp_path)
    expected = model.state_dict()
    found = {name: tensor.clone() for name, tensor in checkpoint.tensors()}
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert tensor.dtype == dtype
        assert torch.equal(tensor, expected[name]), name
    assert checkpoint.num_tensors == len(expected)
    assert checkpoint.weight_bytes == sum(t.numel() * t.element_size() for t in expected.values())
    assert checkpoint.raw_config["num_key_value_heads"] == 2
    assert checkpoint.generation_config["eos_token_id"] == 2


def test_generation_config_is_optional(tmp_path: Path) -> None:
    write_config(tmp_path)
    save_file({"a.weight": torch.zeros(2)}, tmp_path / "model.safetensors")
    assert open_checkpoint(tmp_path).generation_config == {}


def test_tensors_are_mapped_not_read(tmp_path: Path) -> None:
    write_config(tmp_path)
    save_file(
        {"a.weight": torch.zeros(1 << 20), "b.weight": torch.ones(1 << 20)}, tmp_path / "model.safetensors"
    )
    mapped = {}
    for name, tensor in open_checkpoint(tmp_path).tensors():
        start = tensor.data_ptr()
        for line in Path("/proc/self/maps").read_text().splitlines():
            low, high = (int(part, 16) for part in line.split(maxsplit=1)[0].split("-"))
            if low <= start < high:
                mapped[name] = line.endswith("model.safetensors")
    assert mapped == {"a.weight": True, "b.weight": True}


def test_a_single_file_wins_and_duplicates_are_ignored(tmp_path: Path) -> None:
    write_sharded(tmp_path)
    save_file({"only.weight": torch.zeros(2)}, tmp_path / "model.safetensors")
    save_file({"other.weight": torch.zeros(2)}, tmp_path / "consolidated.safetensors")
    assert [name for name, _ in open_checkpoint(tmp_path).tensors()] == ["only.weight"]


def test_sharded_values(tmp_path: Path) -> None:
    tensors = write_sharded(tmp_path)
    (tmp_path / "model-00003-of-00003.safetensors").write_bytes(b"not listed, not read")
    found = {name: tensor.clone() for name, tensor in open_checkpoint(tmp_path).tensors()}
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)


def test_missing_shard_and_index_mismatch(tmp_path: Path) -> None:
    write_sharded(tmp_path)
    second = tmp_path / "model-00002-of-00002.safetensors"
    save_file({"layer.2.weight": torch.zeros(2)}, second)
    with pytest.raises(ModelError, match=r"model-00002-of-00002\.safetensors lacks layer\.3\.weight"):
        open_checkpoint(tmp_path)
    second.unlink()
    with pytest.raises(
        ModelError, match=r"model-00002-of-00002\.safetensors is missing.*download the model again"
    ):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("index", "sentence"),
    [
        ("{}", "has no weight_map"),
        ('{"weight_map": {}}', "has no weight_map"),
        ('{"weight_map": ["a"]}', "has no weight_map"),
        ('{"weight_map": {"a": "../outside.safetensors"}}', "not to a file beside it"),
        ('{"weight_map": {"a": "/etc/passwd"}}', "not to a file beside it"),
        ('{"weight_map": {"a": 3}}', "not to a file beside it"),
        ('{"weight_map": {"a": "pytorch_model.bin"}}', "which is not safetensors"),
        ("[]", "does not hold a JSON object"),
        ("{", "is not valid JSON"),
    ],
)
def test_bad_index(tmp_path: Path, index: str, sentence: str) -> None:
    file = tmp_path / "model.safetensors.index.json"
    file.write_text(index)
    with pytest.raises(ModelError, match=sentence):
        read_weight_index(file)


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        (b"", "is not valid JSON"),
        (b"\xff\xfe", "is not valid JSON"),
        (b"[" * 100_000, "is not valid JSON"),
        (b'{"a": ' + b"9" * 5000 + b"}", "is not valid JSON"),
        (b"3", "does not hold a JSON object"),
        (None, "is missing"),
    ],
)
def test_bad_config(tmp_path: Path, config: bytes | None, sentence: str) -> None:
    save_file({"a.weight": torch.zeros(2)}, tmp_path / "model.safetensors")
    if config is not None:
        (tmp_path / "config.json").write_bytes(config)
    with pytest.raises(ModelError, match=rf"config\.json {sentence}"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("files", "sentence"),
    [
        (["pytorch_model.bin"], "only pickled weights, which are never loaded.*convert them to safetensors"),
        (["model.pth"], "only pickled weights"),
        (["consolidated.safetensors"], r"neither model\.safetensors nor"),
        (["adapter_config.json", "adapter_model.safetensors"], "merge it into its base model"),
        (["a.gguf", "b.gguf"], r"holds GGUF weights; pass one of them.*: --model /.*/a\.gguf$"),
        (["only.gguf"], r"holds GGUF weights; pass that file: --model /.*/only\.gguf$"),
        ([], r"has no weights; give a directory with model\.safetensors, or a \.gguf file"),
    ],
)
def test_directories_without_safetensors(tmp_path: Path, files: list[str], sentence: str) -> None:
    write_config(tmp_path)
    for file in files:
        (tmp_path / file).write_bytes(b"x")
    with pytest.raises(ModelError, match=sentence):
        open_checkpoint(tmp_path)


def test_a_pickle_is_never_opened(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[object, ...]:
            return (Path.touch, (tmp_path / "exploded",))

    write_config(tmp_path)
    torch.save({"a": Bomb()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ModelError):
        open_checkpoint(tmp_path)
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn])
def test_quantized_weights_are_refused(tmp_path: Path, dtype: torch.dtype) -> None:
    write_config(tmp_path)
    save_file({"a.weight": torch.zeros(4).to(dtype)}, tmp_path / "model.safetensors")
    with pytest.raises(
        UnsupportedModelError, match=r"stores a\.weight as .*use the original bf16/fp16 model"
    ):
        open_checkpoint(tmp_path)


def test_other_paths(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="does not exist"):
        open_checkpoint(tmp_path / "gone")
    file = tmp_path / "model.safetensors"
    save_file({"a": torch.zeros(2)}, file)
    with pytest.raises(ModelError, match="give the directory"):
        open_checkpoint(file)
    (tmp_path / "x.bin").write_bytes(b"x")
    with pytest.raises(ModelError, match="is not a GGUF file"):
        open_checkpoint(tmp_path / "x.bin")


def check_damaged(directory: Path, data: bytes) -> None:
    """Reading `data` as the weights either works or is a ModelError of one line that names the file."""
    (directory / "model.safetensors").write_bytes(data)
    try:
        for _, tensor in open_checkpoint(directory).tensors():
            tensor.clone()
    except ModelError as error:
        assert "model.safetensors" in str(error)  # noqa: PT017 - not every mutation is an error
        assert "\n" not in str(error)  # noqa: PT017


GOOD = save({"a.weight": torch.arange(12.0).reshape(3, 4), "b.weight": torch.ones(5, dtype=torch.bfloat16)})


@pytest.mark.parametrize("length", [*range(24), len(GOOD) // 2, len(GOOD) - 1])
def test_truncated_weights(tmp_path: Path, length: int) -> None:
    write_config(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(GOOD[:length])
    with pytest.raises(ModelError, match=r"model\.safetensors is damaged or incomplete .*download it again"):
        open_checkpoint(tmp_path)


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(data=st.data())
def test_damaged_weights_never_crash(tmp_path: Path, data: st.DataObject) -> None:
    write_config(tmp_path)
    damaged = bytearray(GOOD)
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, len(GOOD) - 1))] = data.draw(st.integers(0, 255))
    check_damaged(tmp_path, bytes(damaged[: data.draw(st.integers(0, len(GOOD)))]))


@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(junk=st.binary(max_size=200))
def test_junk_never_crashes(tmp_path: Path, junk: bytes) -> None:
    write_config(tmp_path)
    check_damaged(tmp_path, junk)
