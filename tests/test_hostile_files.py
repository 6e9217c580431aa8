"""Model files that mean harm: each is read or refused in one line, within bounds, and none runs code."""

from __future__ import annotations

import json
import struct
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gqa_serve.engine.chat_template_files import load_chat_template
from gqa_serve.engine.model_config import ModelConfig
from gqa_serve.engine.tokenizer import load_tokenizer
from gqa_serve.engine.weights.checkpoint import open_checkpoint
from gqa_serve.engine.weights.gguf_file import GgufFile
from gqa_serve.errors import ModelError

DATA = Path(__file__).parent / "data"
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "eos_token_id": 2,
}
many = settings(
    max_examples=100,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=9)
    | st.sampled_from([0, -1, 2**31, 2**63, 2**200, "", "llama", 1e308, 1e-308])
)
values = scalars | st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


def refused_or_read(work: Any) -> None:
    """Anything but a ModelError of one line fails the test."""
    try:
        work()
    except ModelError as error:
        assert "\n" not in str(error)  # noqa: PT017 - not everything is an error
        assert len(str(error)) < 2000  # noqa: PT017


# --- config.json -------------------------------------------------------------------------------------------

FIELDS = [*CONFIG, "rope_scaling", "head_dim", "sliding_window", "layer_types", "quantization_config"]


@many
@given(changes=st.dictionaries(st.sampled_from(FIELDS), values, max_size=3), kind=values, also=values)
def test_any_config_is_read_or_refused(changes: dict[str, Any], kind: Any, also: Any) -> None:
    changed = {**CONFIG, **changes}
    refused_or_read(lambda: ModelConfig.from_hf(changed, {"eos_token_id": also}))
    scaling = {
        "rope_type": kind,
        "factor": also,
        "low_freq_factor": also,
        "original_max_position_embeddings": kind,
    }
    refused_or_read(lambda: ModelConfig.from_hf({**CONFIG, "rope_scaling": scaling}))


def test_code_beside_a_model_is_not_run(tmp_path: Path) -> None:
    """`auto_map` names it, as repositories do whose models need code of their own; nothing imports it."""
    ran = tmp_path / "ran"
    code = f"open({str(ran)!r}, 'w').close()\nclass X:\n    pass\n"
    for name in ("modeling_x.py", "configuration_x.py", "tokenization_x.py", "__init__.py"):
        (tmp_path / name).write_text(code)
    auto_map = {"AutoConfig": "configuration_x.X", "AutoModelForCausalLM": "modeling_x.X"}
    config = {
        **CONFIG,
        "auto_map": auto_map,
        "trust_remote_code": True,
        "custom_pipelines": {"x": {"impl": "x.X"}},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    tokenizer = {"auto_map": {"AutoTokenizer": ["tokenization_x.X", None]}, "tokenizer_class": "X"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    (tmp_path / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch " + str(ran).encode() + b"'\ntR.")
    with pytest.raises(ModelError, match="pickled weights, which are never loaded"):
        open_checkpoint(tmp_path)
    with pytest.raises(ModelError, match=r"tokenizer\.json"):
        load_tokenizer(tmp_path)
    load_chat_template(tmp_path)
    ModelConfig.from_hf(config)
    with pytest.raises(ModelError):
        ModelConfig.from_hf({**config, "architectures": ["X"], "model_type": "x"})
    assert not ran.exists()


# --- safetensors -------------------------------------------------------------------------------------------


def safetensors(header: bytes | dict[str, Any], data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(start: int, end: int, shape: list[int], dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


HOSTILE = {
    "a header of 2^60 bytes": safetensors({}, length=2**60),
    "a header of 2^63 bytes": safetensors({}, length=2**63),
    "a header that is cut": safetensors(b'{"a.weight":{"dtype":"F3', length=200),
    "overlap": safetensors({"a.weight": entry(0, 16, [4]), "b.weight": entry(8, 24, [4])}, bytes(24)),
    "a hole": safetensors({"a.weight": entry(0, 16, [4]), "b.weight": entry(24, 40, [4])}, bytes(40)),
    "beyond the end": safetensors({"a.weight": entry(0, 2**40, [2**38])}, bytes(16)),
    "backwards": safetensors({"a.weight": entry(16, 0, [4])}, bytes(16)),
    "another size than its shape says": safetensors({"a.weight": entry(0, 16, [400])}, bytes(16)),
    "a shape that overflows": safetensors({"a.weight": entry(0, 16, [2**32, 2**32, 4])}, bytes(16)),
    "a negative shape": safetensors({"a.weight": entry(0, 16, [-4])}, bytes(16)),
    "a type there is not": safetensors({"a.weight": entry(0, 16, [4], "F99")}, bytes(16)),
    "a type that lies": safetensors({"a.weight": entry(0, 16, [4], "F64")}, bytes(16)),
    "deep": safetensors(b'{"a":' + b"[" * 100_000),
    "a list": safetensors(b"[]"),
    "metadata that is none": safetensors(b'{"__metadata__":{"a":{}}}'),
    "no tensors": safetensors({}),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_safetensors_that_lie(tmp_path: Path, name: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "model.safetensors").write_bytes(HOSTILE[name])
    with pytest.raises(ModelError, match=r"model\.safetensors") as caught:
        open_checkpoint(tmp_path)
    assert len(str(caught.value)) < 2000


def test_a_name_given_twice_or_a_hundred_thousand_names(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    one = json.dumps(entry(0, 16, [4])).encode()
    (tmp_path / "model.safetensors").write_bytes(
        safetensors(b'{"a.weight":' + one + b',"a.weight":' + one + b"}", bytes(16))
    )
    refused_or_read(lambda: list(open_checkpoint(tmp_path).tensors()))
    names = {f"a{number}.weight": entry(4 * number, 4 * number + 4, [1]) for number in range(100_000)}
    (tmp_path / "model.safetensors").write_bytes(safetensors(names, bytes(400_000)))
    assert len(open_checkpoint(tmp_path).tensor_shapes()) == 100_000


@pytest.mark.parametrize(
    "name", ["../secret", "/etc/passwd", "..", "a/../../b.safetensors", "a\\..\\b.safetensors", ""]
)
def test_an_index_leads_nowhere_else(tmp_path: Path, name: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(ModelError, match=r"not to a file beside it|not safetensors"):
        open_checkpoint(tmp_path)


# --- GGUF --------------------------------------------------------------------------------------------------


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def gguf(
    *tensors: tuple[str, int, int], keys: bytes = b"", num_keys: int = 0, data: bytes = bytes(256)
) -> bytes:
    """One-dimensional F32 tensors as (name, length, offset)."""
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), num_keys) + keys
    for name, length, offset in tensors:
        head += text(name) + struct.pack("<IQIQ", 1, length, 0, offset)
    return head + bytes(-len(head) % 32) + data


def alignment(value: int) -> bytes:
    return text("general.alignment") + struct.pack("<II", 4, value)


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (gguf(("a", 8, 0), ("b", 8, 0)), "overlaps another"),
        (gguf(("a", 8, 32), ("b", 16, 0)), "overlaps another"),
        (gguf(("a", 2**61, 0)), "ends inside"),
        (gguf(("a", 2**63, 2**63)), "ends inside"),
        (gguf(("a", 8, 1)), "not aligned"),
        (gguf(("a", 8, 0), keys=alignment(0), num_keys=1), "the alignment is 0"),
        (gguf(("a", 8, 0), keys=alignment(3), num_keys=1), "the alignment is 3"),
        (gguf(("a", 8, 0), keys=alignment(2**31), num_keys=1), "ends inside"),
        (gguf(keys=text("k" * 10**6) + struct.pack("<I", 77), num_keys=1), "is damaged"),
        (gguf(("t" * 10**6, 0, 0)), "the tensor"),
    ],
)
def test_gguf_headers_that_lie(tmp_path: Path, data: bytes, says: str) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(data)
    tracemalloc.start()
    try:
        with pytest.raises(ModelError, match=says) as caught:
            GgufFile(path)
        assert len(str(caught.value)) < 2000
        assert tracemalloc.get_traced_memory()[1] < 64 * 2**20
    finally:
        tracemalloc.stop()


def test_a_template_in_a_gguf_file_is_a_text(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(gguf(keys=text("tokenizer.chat_template") + struct.pack("<II", 4, 7), num_keys=1))
    with pytest.raises(ModelError):
        load_chat_template(path)


# --- tokenizers --------------------------------------------------------------------------------------------


def mutated(data: st.DataObject, good: bytes) -> bytes:
    damaged = bytearray(good)
    for _ in range(data.draw(st.integers(1, 4))):
        position = data.draw(st.integers(0, len(damaged) - 1))
        kind = data.draw(st.sampled_from(["byte", "cut", "insert", "copy"]))
        if kind == "byte":
            damaged[position] = data.draw(st.sampled_from([0, 1, 34, 44, 48, 91, 123, 127, 128, 255]))
        elif kind == "cut":
            del damaged[position : position + data.draw(st.integers(1, 40))]
        elif kind == "insert":
            damaged[position:position] = data.draw(
                st.sampled_from([b"9" * 30, b"null", b"[[", b"\xff" * 9, b'"'])
            )
        else:
            damaged[position:position] = damaged[: data.draw(st.integers(0, 60))]
        if not damaged:
            break
    return bytes(damaged)


@many
@given(data=st.data())
def test_a_damaged_sentencepiece_model(tmp_path: Path, data: st.DataObject) -> None:
    good = (DATA / "small_spm.model").read_bytes()
    (tmp_path / "tokenizer.model").write_bytes(mutated(data, good))
    refused_or_read(lambda: load_tokenizer(tmp_path).encode("a b"))


SMALL = {
    "version": "1.0",
    "added_tokens": [
        {
            "id": 3,
            "content": "<s>",
            "special": True,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
        }
    ],
    "normalizer": None,
    "pre_tokenizer": {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": True,
    },
    "post_processor": None,
    "decoder": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
    "model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": [["a", "b"]]},
}


@many
@given(data=st.data())
def test_a_damaged_tokenizer(tmp_path: Path, data: st.DataObject) -> None:
    (tmp_path / "tokenizer.json").write_bytes(mutated(data, json.dumps(SMALL).encode()))
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "bos_token": "<s>",
                "added_tokens_decoder": data.draw(values),
                "chat_template": data.draw(values),
            }
        )
    )
    refused_or_read(lambda: load_tokenizer(tmp_path).encode("a b"))
    refused_or_read(lambda: load_chat_template(tmp_path))
