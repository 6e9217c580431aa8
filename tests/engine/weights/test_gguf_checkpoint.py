"""The GGUF container, dequantizing, the demo file, split files, damage."""

from __future__ import annotations

import dataclasses
import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf.quants import dequantize, quantize
from gguf_files import (
    add,
    base_metadata,
    convert_tensors,
    numbers,
    permute,
    randomize,
    reference_dequantize,
    write_gguf,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from gqa_serve.engine.weights import gguf_file
from gqa_serve.engine.weights.block_tensor import BlockTensor
from gqa_serve.engine.weights.checkpoint import open_checkpoint
from gqa_serve.engine.weights.gguf import GgufCheckpoint, read_gguf_metadata
from gqa_serve.engine.weights.gguf_file import GgufTensor
from gqa_serve.engine.weights.gguf_keys import short_float
from gqa_serve.engine.weights.hub import resolve_model
from gqa_serve.errors import ModelError, UnsupportedModelError

Q = gguf.GGMLQuantizationType
UNQUANTIZED = {Q.F32: "float32", Q.F16: "float16", Q.BF16: "bfloat16"}


def tiny_llama() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=48, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    randomize(model)
    return model


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return tiny_llama()


def write(path: Path, model: LlamaForCausalLM, quantization: Q = Q.F32, **extra: Any) -> Path:
    metadata = base_metadata(model.config) | extra
    return write_gguf(path, "llama", metadata, convert_tensors(model, "llama"), quantization)


@pytest.mark.parametrize("kind", [Q.F32, Q.F16, Q.BF16, Q.Q8_0, Q.Q4_0, Q.Q4_1, Q.Q5_0, Q.Q5_1, Q.MXFP4])
def test_tensors_equal_the_librarys_dequantization(tmp_path: Path, model: LlamaForCausalLM, kind: Q) -> None:
    checkpoint = open_checkpoint(write(tmp_path / "m.gguf", model, kind))
    expected = model.state_dict()
    found = {name: numbers(tensor) for name, tensor in checkpoint.tensors()}
    assert found.keys() == expected.keys()
    matrix_dtype = getattr(torch, UNQUANTIZED.get(kind, "float32"))
    for name, tensor in found.items():
        assert tensor.dtype == (torch.float32 if tensor.ndim == 1 else matrix_dtype)
        wanted = expected[name] if tensor.ndim == 1 else reference_dequantize(expected[name], kind)
        assert torch.equal(tensor.float(), wanted), (
            name
        )  # rows are permuted, quantized, and back: the same bits
    assert checkpoint.raw_config.get("dtype") == UNQUANTIZED.get(kind)
    assert checkpoint.num_tensors == len(expected)
    stored = sum(t.n_bytes for t in gguf.GGUFReader(tmp_path / "m.gguf").tensors)
    assert checkpoint.weight_bytes == stored


@pytest.mark.parametrize("kind", [Q.Q8_0, Q.Q4_0, Q.Q4_1])
def test_quantized_matrices_keep_their_blocks_with_rows_in_order(
    tmp_path: Path, model: LlamaForCausalLM, kind: Q
) -> None:
    """The bytes that the library makes of a Hugging Face matrix, though the file permutes q and k."""
    expected = model.state_dict()
    blocks = 0
    for name, tensor in open_checkpoint(write(tmp_path / "m.gguf", model, kind)).tensors():
        assert isinstance(tensor, BlockTensor) == (expected[name].ndim == 2)
        if isinstance(tensor, BlockTensor):
            assert (tensor.name, tensor.type, tensor.shape) == (name, kind.name, tuple(expected[name].shape))
            wanted = torch.from_numpy(quantize(expected[name].numpy(), kind))
            assert tensor.rows.dtype == torch.uint8
            assert torch.equal(tensor.rows, wanted)
            blocks += 1
    assert blocks == 2 * 7 + 2
    q_proj = expected["model.layers.0.self_attn.q_proj.weight"]
    assert not torch.equal(permute(q_proj, 4), q_proj)  # else the above would prove nothing


def test_half_precision_numbers_at_odd_addresses(tmp_path: Path, model: LlamaForCausalLM) -> None:
    path = write(tmp_path / "m.gguf", model, Q.BF16)
    aligned = open_checkpoint(path)
    assert isinstance(aligned, GgufCheckpoint)
    for name, tensor in list(aligned._tensors.items()):
        if len(tensor.shape) == 2:
            shifted = np.zeros(tensor.num_bytes + 1, np.uint8)[1:]
            shifted[:] = tensor.data
            aligned._tensors[name] = dataclasses.replace(tensor, data=shifted)
    matrices = {n: numbers(t) for n, t in aligned.tensors() if len(t.shape) == 2}
    assert matrices
    for name, tensor in matrices.items():
        assert torch.equal(tensor, model.state_dict()[name].bfloat16()), name


DEQUANTIZABLE = [kind for kind in Q if kind in gguf.quants._type_traits or kind in (Q.F32, Q.F16)]


@pytest.mark.parametrize("kind", DEQUANTIZABLE, ids=lambda kind: kind.name)
@pytest.mark.parametrize("chunk", [1 << 16, 512])
def test_every_type_the_library_can_dequantize(kind: Q, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Random bytes are valid blocks of any type; chunking must not change a bit."""
    monkeypatch.setattr(gguf_file, "WEIGHTS_PER_CHUNK", chunk)
    block_size, type_size = gguf.GGML_QUANT_SIZES[kind]
    rows, columns = 6, 4 * max(block_size, 32)
    num_bytes = rows * columns // block_size * type_size
    data = np.random.default_rng(0).integers(0, 256, num_bytes, dtype=np.uint8)
    with np.errstate(all="ignore"):
        found = GgufTensor("t", kind, (rows, columns), num_bytes, data).to_float32()
        expected = dequantize(data.reshape(rows, -1), kind)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, expected)


def test_a_type_the_library_cannot_dequantize() -> None:
    tensor = GgufTensor("blk.0.ffn_up.weight", Q.Q8_K, (1, 256), 292, np.zeros(292, dtype=np.uint8))
    blocks = BlockTensor("model.up", "Q8_K", (1, 256), torch.zeros(1, 292, dtype=torch.uint8))
    with pytest.raises(
        UnsupportedModelError, match=r"blk\.0\.ffn_up\.weight is stored as Q8_K, .*such as Q4_K_M"
    ):
        tensor.to_float32()
    with pytest.raises(UnsupportedModelError, match=r"model\.up is stored as Q8_K"):
        blocks.dequantize()


def test_file_and_tensors_outlive_the_checkpoint(tmp_path: Path, model: LlamaForCausalLM) -> None:
    tensors = dict(open_checkpoint(write(tmp_path / "m.gguf", model)).tensors())
    tensors["model.norm.weight"].add_(1.0)  # copy-on-write: the file must not change
    again = dict(open_checkpoint(tmp_path / "m.gguf").tensors())
    assert torch.equal(again["model.norm.weight"], model.state_dict()["model.norm.weight"])


@pytest.fixture(scope="module")
def demo() -> Path:
    return resolve_model("demo")


def test_metadata_equals_the_librarys_reader(tmp_path: Path) -> None:
    """Every value type, by the library's writer and reader."""
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    values: dict[str, Any] = {
        "a.bool": True, "a.int": 7, "a.float": 0.1, "a.text": "naïve 😀 \n", "a.empty": "",
        "a.ints": [1, -2, 3], "a.floats": [0.5, -1.25], "a.bools": [True, False],
        "a.texts": ["", "x", "日本"],
    }  # fmt: skip
    for key, value in values.items():
        add(writer, key, value)
    for size, value in (("uint8", 255), ("int8", -1), ("uint16", 65535), ("int16", -5), ("int32", -9)):
        getattr(writer, f"add_{size}")(f"b.{size}", value)
    for size, value in (("uint64", 2**63), ("int64", -(2**40)), ("float64", 1e300)):
        getattr(writer, f"add_{size}")(f"b.{size}", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = read_gguf_metadata(tmp_path / "m.gguf")
    fields = gguf.GGUFReader(tmp_path / "m.gguf").fields
    assert found == {key: field.contents() for key, field in fields.items() if not key.startswith("GGUF.")}
    assert found["a.texts"] == ["", "x", "日本"]
    assert found["b.uint64"] == 2**63


def test_demo_config_and_names(demo: Path) -> None:
    checkpoint = open_checkpoint(demo)
    raw = checkpoint.raw_config
    wanted = {
        "model_type": "llama", "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64,
        "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "vocab_size": 49152,
        "max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0},
    }  # fmt: skip
    assert {key: raw[key] for key in wanted} == wanted
    assert "dtype" not in raw
    assert checkpoint.generation_config == {"eos_token_id": [2], "bos_token_id": 1}
    assert checkpoint.num_tensors == 272
    assert checkpoint.weight_bytes == 96_576_768
    metadata = read_gguf_metadata(demo)
    assert metadata["tokenizer.ggml.pre"] == "smollm"
    assert len(metadata["tokenizer.ggml.tokens"]) == 49152


def test_demo_equals_transformers_own_gguf_loading(demo: Path) -> None:
    with torch.device("meta"):  # only its parameter names are used
        names = LlamaForCausalLM(LlamaConfig(**open_checkpoint(demo).raw_config))
    expected = load_gguf_checkpoint(demo, return_tensors=True, model_to_load=names)["tensors"]
    count = 0
    for name, tensor in open_checkpoint(demo).tensors():
        assert torch.equal(numbers(tensor), expected.pop(name)), name
        count += 1
    assert count == 272
    assert not expected


def test_split_file(tmp_path: Path, model: LlamaForCausalLM) -> None:
    metadata = base_metadata(model.config)
    tensors = convert_tensors(model, "llama")
    write_gguf(tmp_path / "m.gguf", "llama", metadata, tensors, split_max_tensors=8)
    parts = sorted(tmp_path.glob("m-*.gguf"))
    assert [part.name for part in parts] == [f"m-0000{i}-of-00003.gguf" for i in (1, 2, 3)]
    found = {name: tensor.clone() for name, tensor in open_checkpoint(parts[0]).tensors()}
    assert found.keys() == model.state_dict().keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in model.state_dict().items())
    with pytest.raises(ModelError, match=r"not the first of its 3 parts; give .*m-00001-of-00003\.gguf"):
        open_checkpoint(parts[1])
    parts[2].unlink()
    with pytest.raises(ModelError, match=r"m-00003-of-00003\.gguf cannot be read"):
        open_checkpoint(parts[0])
    renamed = parts[0].rename(tmp_path / "renamed.gguf")
    with pytest.raises(ModelError, match=r"rename it to end in -00001-of-00003\.gguf"):
        open_checkpoint(renamed)


def test_end_tokens_and_sampling_defaults(tmp_path: Path, model: LlamaForCausalLM) -> None:
    tokens = ["<s>", "<|endoftext|>", "<|end|>", "<|im_end|>", "a", "<|eot_id|>"]
    extra = {
        "tokenizer.ggml.eos_token_id": 1, "tokenizer.ggml.bos_token_id": 0, "tokenizer.ggml.eom_token_id": 4,
        "tokenizer.ggml.eot_token_id": 2, "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3, 3, 3, 1, 1, 3], "general.sampling.temp": 0.7,
        "general.sampling.top_k": 20, "general.sampling.top_p": 0.95,
    }  # fmt: skip
    generation = open_checkpoint(write(tmp_path / "m.gguf", model, **extra)).generation_config
    # <|im_end|> has the type of an ordinary token here (the tokenizer makes it a control token all the same),
    # and the metadata names neither it nor <|eot_id|>.
    assert generation["eos_token_id"] == [1, 2, 4, 3, 5]
    assert generation["bos_token_id"] == 0
    assert (generation["temperature"], generation["top_k"], generation["top_p"]) == (0.7, 20, 0.95)


@pytest.mark.parametrize("value", [1e-5, 1e-6, 0.7, 0.22, 10000.0, 500000.0, 1e6, 0.0, 1.0, 0.015625, 3.4e38])
def test_short_float_undoes_the_cast_to_float32(value: float) -> None:
    assert short_float(float(np.float32(value))) == value


def test_unknown_architecture_and_tensor(tmp_path: Path, model: LlamaForCausalLM) -> None:
    tensors = {"token_embd.weight": torch.zeros(4, 4)}
    path = write_gguf(tmp_path / "m.gguf", "mamba", {}, tensors)
    with pytest.raises(
        UnsupportedModelError, match="'mamba' is not supported; supported are gemma2, gemma3, granite"
    ):
        open_checkpoint(path)
    extra = convert_tensors(model, "llama") | {"blk.0.ffn_gate_exps.weight": torch.zeros(2, 4)}
    path = write_gguf(tmp_path / "n.gguf", "llama", base_metadata(model.config), extra)
    with pytest.raises(
        UnsupportedModelError, match=r"'blk\.0\.ffn_gate_exps\.weight' is not part of a supported"
    ):
        open_checkpoint(path)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"embedding_length": "wide"}, "llama.embedding_length is 'wide', not an integer"),
        ({"embedding_length": 32}, "token_embd.weight is missing or not 32 wide"),
        ({"block_count": 0}, "llama.block_count is 0, not an integer of at least 1"),
        ({"attention.layer_norm_rms_epsilon": float("nan")}, "is nan, not a finite number"),
        ({"attention.head_count_kv": 4}, "attn_k.weight has 32 rows, not the 4 heads of 16"),
        ({"rope.dimension_count": 8}, "rope.dimension_count is not the head dimension 16"),
        (
            {"rope.scaling.type": "yarn", "rope.scaling.factor": 0.0},
            "rope.scaling.factor is missing or not positive",
        ),
        ({"rope.scaling.type": "longrope"}, "longrope needs the tensors"),
        ({"general.alignment": 3}, "the alignment is 3"),
    ],
)
def test_wrong_metadata(
    tmp_path: Path, model: LlamaForCausalLM, change: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(ModelError, match=sentence):
        open_checkpoint(write(tmp_path / "m.gguf", model, **change))


def test_missing_key_is_named(tmp_path: Path, model: LlamaForCausalLM) -> None:
    metadata = base_metadata(model.config)
    del metadata["context_length"]
    path = write_gguf(tmp_path / "m.gguf", "llama", metadata, convert_tensors(model, "llama"))
    with pytest.raises(ModelError, match=r"metadata key llama\.context_length is missing"):
        open_checkpoint(path)


def header(tensors: int = 0, keys: int = 0, version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, keys)


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


STRING, ARRAY, U32 = 8, 9, 4


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (b"", "is empty"),
        (b"GGU", "ends inside the header"),
        (b"PK\x03\x04 a zip file", "is not a GGUF file"),
        (header(version=1), "is GGUF version 1"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "only little-endian"),
        (header(keys=2**63), "ends inside a metadata key"),
        (header(tensors=2**63), "ends inside a tensor name"),
        (header(keys=1) + struct.pack("<Q", 2**63), "ends inside a metadata key"),
        (header(keys=1) + text("k") + struct.pack("<IIQ", ARRAY, U32, 2**62), "ends inside the value of 'k'"),
        (
            header(keys=1) + text("k") + struct.pack("<IIQ", ARRAY, STRING, 2**62),
            "ends inside the value of 'k'",
        ),
        (header(keys=1) + text("k") + struct.pack("<IIQ", ARRAY, ARRAY, 1), "array of arrays"),
        (header(keys=1) + text("k") + struct.pack("<I", 99), "unknown type 99"),
        (header(keys=1) + struct.pack("<Q", 1) + b"\xff" + struct.pack("<II", U32, 0), "not UTF-8"),
        (header(keys=2) + 2 * (text("k") + struct.pack("<II", U32, 0)), "the key 'k' appears twice"),
        (header(tensors=1) + text("t") + struct.pack("<I", 9), "has 9 dimensions"),
        (header(tensors=1) + text("t") + struct.pack("<IQIQ", 1, 2**60, 0, 0), "ends inside the tensor 't'"),
        (header(tensors=1) + text("t") + struct.pack("<IQIQ", 1, 4, 0, 2**63), "ends inside the tensor 't'"),
        (header(tensors=1) + text("t") + struct.pack("<IQIQ", 1, 0, 0, 0), r"has the shape \[0\]"),
        (header(tensors=1) + text("t") + struct.pack("<IQIQ", 1, 33, 2, 0), r"has the shape \[33\]"),
        (header(tensors=1) + text("t") + struct.pack("<IQIQ", 1, 4, 777, 0), "unknown quantization type 777"),
        (header(), "does not name its architecture"),
    ],
)
def test_damaged_headers(tmp_path: Path, data: bytes, sentence: str) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(data)
    with pytest.raises(ModelError, match=sentence) as caught:
        GgufCheckpoint(path)
    assert str(path) in str(caught.value)


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory, model: LlamaForCausalLM) -> bytes:
    extra = {"tokenizer.ggml.tokens": ["a", "b"], "tokenizer.ggml.token_type": [1, 3], "rope.freq_base": 1e4}
    return write(tmp_path_factory.mktemp("good") / "m.gguf", model, Q.Q4_0, **extra).read_bytes()


def end_of_header(good: bytes) -> int:
    return good.index(b"blk.1.ffn_up.weight") + 64


def read_everything(path: Path, data: bytes) -> None:
    """Opening and reading either works or is a one-line ModelError; anything else fails the test."""
    path.write_bytes(data)
    try:
        with np.errstate(all="ignore"):  # damaged scales may overflow
            for _, tensor in open_checkpoint(path).tensors():
                numbers(tensor)
    except ModelError as error:
        assert "\n" not in str(error)  # noqa: PT017 - not every mutation is an error


@pytest.mark.parametrize("fraction", [0.0, 0.01, 0.1, 0.5, 0.9, 0.999])
def test_truncated_files(tmp_path: Path, good: bytes, fraction: float) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(good[: int(len(good) * fraction)])
    with pytest.raises(ModelError, match="download it again"):
        open_checkpoint(path)


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(data=st.data())
def test_damaged_files_never_crash(tmp_path: Path, good: bytes, data: st.DataObject) -> None:
    damaged = bytearray(good)
    limit = end_of_header(good) if data.draw(st.booleans()) else len(good)
    for _ in range(data.draw(st.integers(1, 3))):
        damaged[data.draw(st.integers(0, limit - 1))] = data.draw(st.sampled_from([0, 1, 2, 127, 128, 255]))
    read_everything(
        tmp_path / "m.gguf", bytes(damaged[: data.draw(st.sampled_from([len(good), len(good) // 2]))])
    )
