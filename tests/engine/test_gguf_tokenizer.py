"""GGUF tokenizers give llama.cpp's ids (recorded in tests/data) on hard text; damaged metadata is refused."""

from __future__ import annotations

import unicodedata
from typing import Any

import pytest
from tokenizer_cases import (
    HARD_TEXTS,
    demo_tokenizer,
    gguf_metadata,
    read_data,
    small_bpe,
    small_spm,
)

from gqa_serve.engine.gguf_tokenizer import build_gguf_tokenizer
from gqa_serve.engine.pre_tokenizers import PRE_TOKENIZERS
from gqa_serve.errors import ModelError, UnsupportedModelError

RECORDED: dict[str, Any] = read_data("llamacpp_ids.json")

# Where llama.cpp departs from the model's own tokenizer, which is followed instead: it does not bring text
# to NFC for Qwen, and it replaces Unicode case classes and marks by ASCII approximations for tekken/gpt-4o.
CASED_OR_MARKED = ("Привет МИР", "नमस्ते", "สวัสดี", "e\u0301 n\u0303")
DIVERGENT = {
    "qwen2": ("e\u0301 n\u0303", "\u1100\u1161\u11a8"),
    "tekken": CASED_OR_MARKED,
    "gpt-4o": CASED_OR_MARKED,
}


def recorded(key: str) -> list[list[list[int]]]:
    value = RECORDED[key]
    return recorded(value) if isinstance(value, str) else value


@pytest.mark.parametrize("pre", PRE_TOKENIZERS)
def test_byte_level_ids_are_those_of_llamacpp(pre: str) -> None:
    tokenizer = small_bpe(pre)
    divergent = set()
    for text, (literal, parsed) in zip(HARD_TEXTS, recorded(f"bpe/{pre}"), strict=True):
        ids = tokenizer.encode(text, add_special_tokens=False), tokenizer.encode(text, parse_special=True)
        if ids != (literal, parsed):
            divergent.add(next((start for start in DIVERGENT.get(pre, ()) if text.startswith(start)), text))
    assert divergent == set(DIVERGENT.get(pre, ()))


def test_every_recorded_name_is_supported_and_the_rules_differ() -> None:
    assert {key.split("/")[1] for key in RECORDED if key.startswith("bpe/")} == set(PRE_TOKENIZERS)
    distinct = {id(value) for value in map(RECORDED.get, RECORDED) if not isinstance(value, str)}
    assert len(distinct) >= 9  # otherwise the vocabulary could not tell the rules apart


def test_qwen_text_is_normalized_as_the_model_was_trained() -> None:
    tokenizer = small_bpe("qwen2")
    for decomposed in ("e\u0301 n\u0303", "\u1100\u1161\u11a8"):
        composed = unicodedata.normalize("NFC", decomposed)
        assert composed != decomposed
        assert tokenizer.encode(decomposed) == tokenizer.encode(composed)
    assert small_bpe("deepseek-r1-qwen").encode("e\u0301") != small_bpe("deepseek-r1-qwen").encode("é")


@pytest.mark.parametrize(
    ("pre", "text", "words"),
    [
        ("tekken", "ПриветМир नमस्ते", ["Привет", "Мир", " नमस्ते"]),
        ("tekken", "iPhone XMLHttp don't 42", ["i", "Phone", " XMLHttp", " don", "'t", " ", "4", "2"]),
        ("gpt-4o", "don't CAN'T 12345", ["don't", " CAN'T", " ", "123", "45"]),
        ("llama-bpe", "don't CAN'T 12345", ["don", "'t", " CAN", "'T", " ", "123", "45"]),
        ("qwen2", "123 a\n\n b", ["1", "2", "3", " a", "\n\n", " b"]),
        ("gpt-2", "CAN'T 123  x", ["CAN", "'", "T", " 123", " ", " x"]),
        ("smollm", "a 12", ["a", " ", "1", "2"]),
    ],
)
def test_words_are_those_of_the_published_pattern(pre: str, text: str, words: list[str]) -> None:
    pieces = PRE_TOKENIZERS[pre].build().pre_tokenize_str(text)
    assert [text[start:end] for _, (start, end) in pieces] == words


@pytest.mark.parametrize(("key", "prefix"), [("spm/prefix", True), ("spm/no_prefix", False)])
def test_sentencepiece_ids_are_those_of_llamacpp(key: str, prefix: bool) -> None:
    tokenizer = small_spm(prefix)
    for text, (literal, parsed) in zip(HARD_TEXTS, recorded(key), strict=True):
        assert tokenizer.encode(text, add_special_tokens=False) == literal, text
        assert tokenizer.encode(text, parse_special=True) == parsed, text


def test_demo_model_ids_are_those_of_llamacpp() -> None:
    tokenizer = demo_tokenizer()
    for text, (literal, parsed) in zip(HARD_TEXTS, recorded("demo"), strict=True):
        assert tokenizer.encode(text, add_special_tokens=False) == literal, text
        assert tokenizer.encode(text, parse_special=True) == parsed, text
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.vocab_size) == (1, 2, 49152)
    assert tokenizer.special_tokens["eos_token"] == "<|im_end|>"


def test_demo_model_text_comes_back() -> None:
    tokenizer = demo_tokenizer()
    for text in HARD_TEXTS:
        assert tokenizer.decode(tokenizer.encode(text)) == text
        assert b"".join(map(tokenizer.token_bytes, tokenizer.encode(text))) == text.encode()


def test_sequence_tokens_follow_the_file_then_the_pre_tokenizer() -> None:
    vocabulary = read_data("small_bpe.json")
    bos, eos = vocabulary["bos"], vocabulary["eos"]

    def ends(**keys: Any) -> tuple[int, int]:
        ids = build_gguf_tokenizer(gguf_metadata(vocabulary, **keys)).encode("a")
        return ids.count(bos), ids.count(eos)

    assert ends(pre="llama-bpe") == (1, 0)
    assert ends(pre="llama-bpe", add_bos_token=False) == (0, 0)
    assert ends(pre="gpt-2") == (0, 0)
    assert ends(pre="gpt-2", add_bos_token=True, add_eos_token=True) == (1, 1)


def test_misfiled_control_tokens_are_still_control_tokens() -> None:
    vocabulary = read_data("small_bpe.json")
    end = vocabulary["tokens"].index("<|im_end|>")
    vocabulary["types"][end] = 1
    tokenizer = build_gguf_tokenizer(gguf_metadata(vocabulary, pre="gpt-2"))
    assert end in tokenizer.special_ids
    assert end not in tokenizer.encode("<|im_end|>")
    assert tokenizer.encode("<|im_end|>", parse_special=True) == [end]


def test_a_missing_pre_tokenizer_name_is_the_default_one_and_says_so(
    caplog: pytest.LogCaptureFixture,
) -> None:
    tokenizer = build_gguf_tokenizer(gguf_metadata(read_data("small_bpe.json")))
    assert "does not name its pre-tokenizer" in caplog.text
    assert [tokenizer.encode(text) for text in HARD_TEXTS] == [
        small_bpe("default").encode(text) for text in HARD_TEXTS
    ]


@pytest.mark.parametrize(
    ("keys", "error", "says"),
    [
        ({"pre": "no-such-rule"}, UnsupportedModelError, "'no-such-rule'.*llama-bpe.*smollm"),
        ({"model": "t5"}, UnsupportedModelError, "'t5'.*gpt2 and llama"),
        ({"model": None}, ModelError, "no tokenizer"),
        ({"tokens": []}, ModelError, "no vocabulary"),
        ({"tokens": ["a", "a"], "token_type": [1, 1], "pre": "gpt-2"}, ModelError, "twice"),
        ({"token_type": [1, 1], "pre": "gpt-2"}, ModelError, "token types"),
        ({"merges": None, "pre": "gpt-2"}, ModelError, "no merges"),
        ({"bos_token_id": None, "pre": "llama-bpe"}, ModelError, "bos_token"),
        ({"model": "llama"}, ModelError, "score"),
        (
            {"model": "llama", "tokens": ["a", "a"], "token_type": [1, 1], "scores": [0, 0]},
            ModelError,
            "twice",
        ),
        (
            {"model": "llama", "tokens": ["a"], "token_type": [1], "scores": [0.0]},
            ModelError,
            "unknown token",
        ),
    ],
)
def test_unusable_metadata_is_one_clear_error(
    keys: dict[str, Any], error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says):
        build_gguf_tokenizer(gguf_metadata(read_data("small_bpe.json"), **keys))
