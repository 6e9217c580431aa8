"""Fill-in-the-middle prompts: each family's markers in its order, and texts that are nothing but text."""

from __future__ import annotations

from typing import Any

import pytest
import tokenizers
from tokenizer_cases import byte_level_backend, demo_tokenizer, gguf_metadata, read_data, small_spm
from tokenizers import AddedToken, decoders, models

from gqa_serve.engine.fill_in_middle import find_fill_in_middle
from gqa_serve.engine.gguf_tokenizer import build_gguf_tokenizer
from gqa_serve.engine.tokenizer import Tokenizer


def coder(*markers: str, special: bool = True) -> Tokenizer:
    """Bytes, with a beginning of sequence and these markers."""
    backend = byte_level_backend()
    backend.add_tokens([AddedToken(marker, special=special, normalized=False) for marker in markers])
    return Tokenizer(backend, special_tokens={"bos_token": "<s>", "eos_token": "</s>"})


def spelled(tokenizer: Tokenizer, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False)


@pytest.mark.parametrize(
    ("markers", "prompt"),
    [
        (
            ("<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>"),
            "<s><|fim_prefix|>A<|fim_suffix|>B<|fim_middle|>",
        ),
        (("<fim_prefix>", "<fim_suffix>", "<fim_middle>"), "<s><fim_prefix>A<fim_suffix>B<fim_middle>"),
        (("<fim-prefix>", "<fim-suffix>", "<fim-middle>"), "<s><fim-prefix>A<fim-suffix>B<fim-middle>"),
        (("▁<PRE>", "▁<SUF>", "▁<MID>", "▁<EOT>"), "<s>▁<PRE>A▁<SUF>B▁<MID>"),
        (
            ("<｜fim▁hole｜>", "<｜fim▁begin｜>", "<｜fim▁end｜>"),
            "<s><｜fim▁begin｜>A<｜fim▁hole｜>B<｜fim▁end｜>",
        ),
        (("[PREFIX]", "[SUFFIX]"), "<s>[SUFFIX]B[PREFIX]A"),
    ],
)
def test_families(markers: tuple[str, ...], prompt: str) -> None:
    tokenizer = coder(*markers)
    found = find_fill_in_middle(tokenizer)
    assert found is not None
    after = found.encode_suffix(tokenizer, "B")
    ids = found.encode(tokenizer, "A", after, add_special_tokens=True)
    assert spelled(tokenizer, ids) == prompt
    assert len(ids) == 3 + len(found.ids)
    assert found.encode(tokenizer, "A", after, add_special_tokens=False) == ids[1:]
    given = tokenizer.encode("A", add_special_tokens=False)
    assert found.encode(tokenizer, given, after, add_special_tokens=True) == ids  # ids as they are
    assert set(found.ids) <= found.end_ids
    assert found.end_ids == {tokenizer.token_id(marker) for marker in markers}


@pytest.mark.parametrize("special", [False, True])
def test_a_marker_spelled_in_a_text_is_text(special: bool) -> None:
    """Also where the vocabulary has it as an added token that is not special, as Qwen's has."""
    tokenizer = coder("<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", special=special)
    found = find_fill_in_middle(tokenizer)
    assert found is not None
    text = "é<|fim_middle|><|fim_suffix|> </s>x"
    ids = found.encode(tokenizer, text, found.encode_suffix(tokenizer, text), add_special_tokens=False)
    assert [ids.index(marker) for marker in found.ids] == [0, 1 + len(text.encode()), len(ids) - 1]
    assert [ids.count(marker) for marker in found.ids] == [1, 1, 1]
    assert spelled(tokenizer, ids).count(text) == 2


@pytest.mark.parametrize("missing", [0, 1, 2])
def test_all_markers_must_be_there(missing: int) -> None:
    markers = ["<fim_prefix>", "<fim_suffix>", "<fim_middle>"]
    del markers[missing]
    assert find_fill_in_middle(coder(*markers)) is None


def test_markers_are_whole_tokens_and_not_words_of_the_vocabulary() -> None:
    vocabulary = byte_level_backend().get_vocab(with_added_tokens=False)
    words = {"[PREFIX]": len(vocabulary), "[SUFFIX]": len(vocabulary) + 1}
    backend = tokenizers.Tokenizer(models.BPE(vocab={**vocabulary, **words}, merges=[]))
    backend.decoder = decoders.ByteLevel()
    tokenizer = Tokenizer(backend)
    assert tokenizer.token_id("[PREFIX]") == len(vocabulary)
    assert find_fill_in_middle(tokenizer) is None


def test_ordinary_models_have_none() -> None:
    assert find_fill_in_middle(small_spm()) is None
    assert find_fill_in_middle(demo_tokenizer()) is None


def spm_with(**keys: Any) -> Tokenizer:
    """SentencePiece with a space before each text, and three user-defined markers named by the file."""
    vocabulary = read_data("small_spm.json")
    tokens = [*vocabulary["tokens"], "<A>", "<B>", "<C>"]
    first = len(vocabulary["tokens"])
    vocabulary = {
        **vocabulary,
        "tokens": tokens,
        "types": [*vocabulary["types"], 3, 3, 3],
        "scores": [*vocabulary["scores"], 0.0, 0.0, 0.0],
    }
    ids = {name: first + offset for name, offset in keys.items()}
    return build_gguf_tokenizer(gguf_metadata(vocabulary, **ids))


@pytest.mark.parametrize(
    "names",
    [
        ("fim_pre_token_id", "fim_suf_token_id", "fim_mid_token_id"),
        ("prefix_token_id", "suffix_token_id", "middle_token_id"),
    ],
)
def test_a_gguf_file_says_which_tokens_they_are(names: tuple[str, str, str]) -> None:
    tokenizer = spm_with(**{name: offset for offset, name in enumerate(names)})
    found = find_fill_in_middle(tokenizer)
    assert found is not None
    assert [tokenizer.token(id_) for id_ in found.ids] == ["<A>", "<B>", "<C>"]
    assert find_fill_in_middle(spm_with(**{names[0]: 0})) is None


def test_sentencepiece_puts_no_space_before_the_suffix() -> None:
    tokenizer = spm_with(fim_pre_token_id=0, fim_suf_token_id=1, fim_mid_token_id=2)
    found = find_fill_in_middle(tokenizer)
    assert found is not None
    ids = found.encode(tokenizer, "the", found.encode_suffix(tokenizer, "the"), add_special_tokens=True)
    assert ids[0] == tokenizer.bos_token_id
    words = [tokenizer.token(id_) for id_ in ids[1:]]
    cut = words.index("<B>")
    assert (words[0], words[-1]) == ("<A>", "<C>")
    assert "".join(words[1:cut]) == "▁the"
    assert "".join(words[cut + 1 : -1]) == "the"
