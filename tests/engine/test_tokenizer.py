"""`Tokenizer` and checkpoint directories: as transformers encodes and decodes; control tokens; bad files."""

from __future__ import annotations

import json
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_cases import (
    DATA,
    HARD_TEXTS,
    byte_level_backend,
    demo_tokenizer,
    many_tokenizers,
    read_data,
    small_bpe,
    small_spm,
)
from tokenizers import decoders, models
from transformers import PreTrainedTokenizerFast

from gqa_serve.engine.tokenizer import LONG_TEXT_CHARS, Tokenizer, load_tokenizer
from gqa_serve.errors import ModelError, RequestError, UnsupportedModelError


def write_directory(path: Path, config: dict[str, Any] | None = None, **files: Any) -> Path:
    byte_level_backend().save(str(path / "tokenizer.json"))
    if config is not None:
        (path / "tokenizer_config.json").write_text(json.dumps(config))
    for name, value in files.items():
        (path / f"{name}.json").write_text(json.dumps(value))
    return path


CONFIGS: list[dict[str, Any]] = [
    {},
    {"bos_token": "<s>", "eos_token": "</s>"},
    {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True},
    {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True, "add_eos_token": True},
    {
        "bos_token": {"__type": "AddedToken", "content": "<s>", "special": True},
        "add_bos_token": True,
        "add_eos_token": True,
    },
    {"bos_token": None, "eos_token": "</s>", "add_bos_token": True, "add_eos_token": False},
    {"eos_token": "<think>"},
    {"eos_token": "<new end>", "additional_special_tokens": ["<extra>", "</s>"]},
    {
        "eos_token": "</s>",
        "added_tokens_decoder": {
            "261": {"content": "<late>", "special": False, "normalized": False},
            "262": {"content": "<later>", "special": True, "normalized": False},
        },
    },
]


@pytest.mark.parametrize("config", CONFIGS, ids=range(len(CONFIGS)))
def test_directories_are_read_as_transformers_reads_them(tmp_path: Path, config: dict[str, Any]) -> None:
    path = write_directory(tmp_path, {**config, "tokenizer_class": "PreTrainedTokenizerFast"})
    ours, oracle = load_tokenizer(path), PreTrainedTokenizerFast.from_pretrained(path)
    assert ours.vocab_size == len(oracle)
    assert (ours.bos_token_id, ours.eos_token_id) == (oracle.bos_token_id, oracle.eos_token_id)
    assert ours.special_tokens == oracle.special_tokens_map
    added = "<s>a</s> <think>b<late>c<later> <extra><new end>two words é"
    for text in [*HARD_TEXTS, added]:
        assert ours.encode(text, parse_special=True) == oracle.encode(text)
        literal = oracle.encode(text, add_special_tokens=False, split_special_tokens=True)
        assert ours.encode(text, add_special_tokens=False) == literal
        ids = oracle.encode(text)
        for skip in (True, False):
            expected = oracle.decode(ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False)
            assert ours.decode(ids, skip_special_tokens=skip) == expected


def test_special_tokens_map_fills_what_the_config_leaves_open(tmp_path: Path) -> None:
    write_directory(
        tmp_path, {"eos_token": "</s>"}, special_tokens_map={"bos_token": "<s>", "eos_token": "<s>"}
    )
    assert load_tokenizer(tmp_path).special_tokens == {"bos_token": "<s>", "eos_token": "</s>"}


def test_truncation_and_padding_stored_in_the_file_are_ignored(tmp_path: Path) -> None:
    backend = byte_level_backend()
    backend.enable_truncation(3)
    backend.enable_padding(length=50, pad_token="</s>")
    backend.save(str(tmp_path / "tokenizer.json"))
    assert len(load_tokenizer(tmp_path).encode("hello world")) == 12  # with the <s> that the file adds


def test_sentencepiece_model_files_give_sentencepiece_ids(tmp_path: Path) -> None:
    shutil.copy(DATA / "small_spm.model", tmp_path / "tokenizer.model")
    tokenizer = load_tokenizer(tmp_path)
    for text, ids in zip(HARD_TEXTS, read_data("sentencepiece_ids.json"), strict=True):
        if "<tool>" not in text:  # sentencepiece puts no space around user-defined pieces; Llama's rule does
            assert tokenizer.encode(text, add_special_tokens=False) == ids, text
    assert tokenizer.encode("a") == [1, *tokenizer.encode("a", add_special_tokens=False)]
    assert tokenizer.special_tokens == {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (tmp_path / "tokenizer_config.json").write_text('{"add_bos_token": false, "add_eos_token": true}')
    assert load_tokenizer(tmp_path).encode("a")[-1] == 2


@pytest.mark.parametrize("name", ["bpe", "spm", "spm without prefix", "bytes"])
@pytest.mark.parametrize(
    "spelling", ["<s>", "</s>", "<|im_end|>", "<|im_start|>", "<unk>", "<｜end▁of▁sentence｜>"]
)
def test_text_that_spells_a_control_token_stays_text(name: str, spelling: str) -> None:
    tokenizer = many_tokenizers()[name]
    ids = tokenizer.encode(f"x {spelling}{spelling} y", add_special_tokens=False)
    assert not tokenizer.special_ids & set(ids)
    assert tokenizer.decode(ids).replace("▁", " ") == f"x {spelling}{spelling} y".replace("▁", " ")
    token_id = tokenizer.token_id(spelling)
    if token_id in tokenizer.special_ids:
        assert token_id in tokenizer.encode(spelling, add_special_tokens=False, parse_special=True)


def test_added_tokens_that_are_not_special_are_read_in_any_text() -> None:
    tokenizer = many_tokenizers()["bytes"]
    for parse_special in (False, True):
        ids = tokenizer.encode("<think>", add_special_tokens=False, parse_special=parse_special)
        assert ids == [tokenizer.token_id("<think>")]


def test_encoding_is_safe_from_many_threads() -> None:
    tokenizer = small_bpe("llama-bpe")
    text = "<|im_end|>" * 20
    expected = {flag: tokenizer.encode(text, parse_special=flag) for flag in (True, False)}
    wrong: list[bool] = []

    def work(flag: bool) -> None:
        results = [tokenizer.encode(text, parse_special=flag) for _ in range(300)]
        wrong.extend(flag for ids in results if ids != expected[flag])

    threads = [threading.Thread(target=work, args=(index % 2 == 0,)) for index in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert expected[True] != expected[False]
    assert not wrong


@given(text=st.text(max_size=60))
@settings(deadline=None, max_examples=150)
def test_any_text_is_encoded_and_byte_level_text_comes_back(text: str) -> None:
    assert small_bpe("llama-bpe").decode(small_bpe("llama-bpe").encode(text)) == text
    assert b"".join(map(small_bpe("smollm").token_bytes, small_bpe("smollm").encode(text))) == text.encode()
    assert small_spm(False).decode(small_spm(False).encode(text)) == text.replace("▁", " ")


def test_lone_surrogates_are_a_request_error() -> None:
    with pytest.raises(RequestError, match="surrogate"):
        demo_tokenizer().encode("a\ud800b")


def test_token_bytes() -> None:
    spm, byte_level = small_spm(), many_tokenizers()["bytes"]
    assert spm.token_bytes(spm.token_id("<0x0A>") or -1) == b"\n"
    assert spm.token_bytes(spm.token_id("▁a") or -1) == b" a"
    assert spm.token_bytes(spm.token_id("<|im_end|>") or -1) == b"<|im_end|>"
    assert byte_level.token_bytes(byte_level.token_id("Ġ") or -1) == b" "
    assert byte_level.token_bytes(byte_level.token_id("Ã") or -1) == b"\xc3"
    assert (
        byte_level.token_bytes(byte_level.token_id("<｜end▁of▁sentence｜>") or -1)
        == "<｜end▁of▁sentence｜>".encode()
    )
    for unknown in (-1, byte_level.vocab_size, 2**40):
        assert byte_level.token_bytes(unknown) == b""
    assert byte_level.decode([byte_level.vocab_size]) == ""


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("tokenizer.json", "{", "not a tokenizer"),
        ("tokenizer.json", '{"model": {"type": "Nonsense"}}', "not a tokenizer"),
        ("tokenizer.model", "garbage", "not a SentencePiece model"),
        ("tokenizer.model", "", "holds no pieces"),
        ("other", "", r"neither tokenizer.json nor tokenizer.model.*save_pretrained"),
    ],
)
def test_missing_or_damaged_files_are_one_clear_error(
    tmp_path: Path, name: str, content: str, says: str
) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(ModelError, match=says):
        load_tokenizer(tmp_path)


def test_every_truncation_of_a_sentencepiece_model_is_refused_or_read(tmp_path: Path) -> None:
    whole = (DATA / "small_spm.model").read_bytes()
    for length in range(0, len(whole), 97):
        (tmp_path / "tokenizer.model").write_bytes(whole[:length])
        with pytest.raises(ModelError):
            load_tokenizer(tmp_path)


def test_other_kinds_of_sentencepiece_model_are_refused(tmp_path: Path) -> None:
    def field(number: int, payload: bytes) -> bytes:
        return bytes([number << 3 | 2, len(payload)]) + payload

    piece = field(1, field(1, b"a"))
    unigram = piece + field(2, bytes([3 << 3, 1]))
    normalizing = piece + field(2, bytes([3 << 3, 2])) + field(3, field(2, b"map"))
    stripping = piece + field(2, bytes([3 << 3, 2])) + field(3, bytes([4 << 3, 1]))
    for data, says in ((unigram, "BPE"), (normalizing, "normalizes"), (stripping, "whitespace")):
        (tmp_path / "tokenizer.model").write_bytes(data)
        with pytest.raises(UnsupportedModelError, match=says):
            load_tokenizer(tmp_path)


def test_damaged_settings_are_one_clear_error(tmp_path: Path) -> None:
    write_directory(tmp_path)
    for content in ("[1]", "{", "\xff"):
        (tmp_path / "tokenizer_config.json").write_text(content, encoding="latin-1")
        with pytest.raises(ModelError, match=r"tokenizer_config\.json"):
            load_tokenizer(tmp_path)


@pytest.mark.parametrize("decoder", [None, decoders.WordPiece(), decoders.CTC(), decoders.Strip(" ", 0, 1)])
def test_decoders_that_cannot_be_streamed_exactly_are_refused(decoder: Any) -> None:
    backend = tokenizers.Tokenizer(models.BPE({"a": 0}, []))
    if decoder is not None:
        backend.decoder = decoder
    with pytest.raises(UnsupportedModelError, match="decoder"):
        Tokenizer(backend)


class BatchOnly:
    """A tokenizers.Tokenizer whose `encode` must not be called."""

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        self.encode_batch_fast = backend.encode_batch_fast


@pytest.mark.parametrize("name", sorted(many_tokenizers()))
def test_long_texts_take_the_call_that_frees_the_lock_and_get_the_same_ids(name: str) -> None:
    tokenizer = many_tokenizers()[name]
    special = "".join(tokenizer.special_texts[:2])
    text = (special + " ".join(HARD_TEXTS)) * (LONG_TEXT_CHARS // len(special + " ".join(HARD_TEXTS)) + 2)
    for parse_special, attribute in ((True, "_backend"), (False, "_literal")):
        backend = getattr(tokenizer, attribute)
        for add in (True, False):
            expected = backend.encode(text, add_special_tokens=add).ids
            setattr(tokenizer, attribute, BatchOnly(backend))
            ids = tokenizer.encode(text, add_special_tokens=add, parse_special=parse_special)
            setattr(tokenizer, attribute, backend)
            assert ids == expected
    with pytest.raises(RequestError, match="lone surrogate"):
        tokenizer.encode("x" * LONG_TEXT_CHARS + "\ud800")


@pytest.mark.parametrize("name", sorted(many_tokenizers()))
def test_the_length_check_refuses_only_what_cannot_fit(name: str) -> None:
    tokenizer = many_tokenizers()[name]
    text = "".join(HARD_TEXTS)
    num_tokens = len(tokenizer.encode(text, add_special_tokens=False))
    tokenizer.check_length(len(text), num_tokens, param="prompt")
    assert tokenizer.longest_piece >= max(len(text) for text in tokenizer.special_texts)
    with pytest.raises(RequestError, match="at least 10001 characters") as caught:
        tokenizer.check_length(10_001, 10_000 // tokenizer.longest_piece, param="prompt[3]")
    assert (caught.value.param, caught.value.code) == ("prompt[3]", "context_length_exceeded")
