"""Texts, windows and hidden facts: every token once, exact lengths, the same blocks for every tokenizer."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from eval_checkpoints import byte_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from gqa_serve.engine.tokenizer import Tokenizer
from gqa_serve.errors import ConfigError
from gqa_serve.workbench.evaluate.retrieval import Haystack, Needle, check_needle, holds_key
from gqa_serve.workbench.evaluate.text import BLOCK_BYTES, Corpus, Document, read_corpus
from gqa_serve.workbench.evaluate.windows import cut, tokenize

BYTES = Tokenizer(byte_tokenizer(bos=False))
PAIRS = Tokenizer(byte_tokenizer(bos=False, merges=[("t", "h"), ("e", "r"), ("Ġ", "o")]))
BYTES_BOS = Tokenizer(byte_tokenizer(bos=True))


@given(st.integers(0, 200), st.integers(2, 40), st.data())
@settings(max_examples=200, deadline=None)
def test_every_token_is_scored_once_with_enough_before_it(
    length: int, size: int, data: st.DataObject
) -> None:
    stride = data.draw(st.integers(1, size))
    beginning = data.draw(st.sampled_from([[], [256]]))
    tokens = list(range(1000, 1000 + length))
    windows = cut(tokens, beginning, size, stride, first=5000)
    scored = [token for window in windows for token in window.token_ids[-window.num_scored :]]
    assert scored == tokens[0 if beginning else 1 :]
    place = 5000 + (0 if beginning else 1)
    for number, window in enumerate(windows):
        assert window.first == place
        place += window.num_scored
        assert len(window.token_ids) <= size + len(beginning)
        assert window.token_ids[: len(beginning)] == beginning
        context = len(window.token_ids) - window.num_scored
        assert context >= (1 if number == 0 else size - stride + len(beginning))


def test_blocks_are_the_same_bytes_whatever_the_tokenizer() -> None:
    corpus = Corpus([Document("a", "the other thing " * 700), Document("b", "short")], BLOCK_BYTES)
    one, other = (tokenize(corpus, tokenizer, 128, 64) for tokenizer in (BYTES, PAIRS))
    assert len(other.token_ids) < len(one.token_ids)
    assert one.num_blocks == other.num_blocks == 11_200 // BLOCK_BYTES + 1
    for tokenized in (one, other):
        sums = np.bincount(tokenized.blocks, tokenized.num_bytes, minlength=tokenized.num_blocks)
        assert sums == pytest.approx([2048] * 4 + [11_200 - 4 * 2048, 5], abs=2)  # a token may reach over
        assert tokenized.num_bytes.sum() == corpus.num_bytes


def test_a_first_token_is_scored_only_after_a_beginning() -> None:
    corpus = Corpus([Document("a", "abc"), Document("b", "de")], None)
    assert tokenize(corpus, BYTES, 16, 8).scored.tolist() == [False, True, True, False, True]
    assert tokenize(corpus, BYTES_BOS, 16, 8).scored.all()


def test_other_characters_than_ascii_have_their_bytes() -> None:
    text = "Zürich 東京 🚉\n"
    tokenized = tokenize(Corpus([Document("a", text)], None), BYTES, 16, 8)
    assert tokenized.num_bytes.tolist() == [1.0] * len(text.encode())


@pytest.mark.parametrize(("window", "stride"), [(16, 17), (16, 0), (1, 1)])
def test_strides_that_skip_tokens_are_refused(window: int, stride: int) -> None:
    with pytest.raises(ConfigError, match="--stride"):
        tokenize(Corpus([Document("a", "abc")], None), BYTES, window, stride)


def test_a_text_without_a_token_to_score_is_refused() -> None:
    with pytest.raises(ConfigError, match="no token that another precedes"):
        tokenize(Corpus([Document("a", "a")], None), BYTES, 16, 8)


def test_the_builtin_text_is_many_passages() -> None:
    corpus = read_corpus([], 2**20)
    assert corpus.block_bytes is None
    assert len(corpus.documents) >= 20
    assert all(200 < document.num_bytes < 1000 for document in corpus.documents)


def test_long_texts_are_thinned_evenly(tmp_path: Path) -> None:
    path = tmp_path / "long.txt"
    path.write_text("\n".join(f"Line {number} of many." for number in range(20_000)), encoding="utf-8")
    corpus = read_corpus([path], 40_000)
    assert corpus.num_bytes == pytest.approx(40_000, rel=0.1)
    assert corpus.num_bytes + corpus.left_out_bytes == path.stat().st_size
    numbers = [int(document.text.split()[1]) for document in corpus.documents]
    gaps = np.diff(numbers)
    assert numbers == sorted(numbers)
    assert gaps.max() < 1.5 * gaps.mean()
    assert numbers[0] == 0
    assert numbers[-1] > 18_000
    assert all(document.text.startswith("Line ") for document in corpus.documents)  # cut at line ends


@pytest.mark.parametrize(
    ("content", "says"), [(b"\xff\xfe", "not UTF-8"), (b" \n", "holds no text"), (None, "No such file")]
)
def test_texts_that_cannot_be_read(tmp_path: Path, content: bytes | None, says: str) -> None:
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=says):
        read_corpus([path], 1000)
    with pytest.raises(ConfigError, match="is a folder"):
        read_corpus([tmp_path], 1000)


@pytest.mark.parametrize("tokenizer", [BYTES, BYTES_BOS], ids=["plain", "bos"])
@pytest.mark.parametrize("task", ["passkey", "needle"])
def test_prompts_have_exactly_the_length_and_hold_the_fact_where_they_should(
    tokenizer: Tokenizer, task: str
) -> None:
    haystack = Haystack(tokenizer, None, None, seed=3)
    for length in (500, 1001):
        places = []
        for depth in (0.0, 0.25, 0.5, 1.0):
            prompt = haystack.prompt(task, length, depth, 0)
            assert len(prompt.token_ids) == length
            text = tokenizer.decode(prompt.token_ids)
            assert holds_key(text, prompt.key)
            assert not holds_key(text.rpartition("Answer:")[2], prompt.key)
            places.append(text.index("The pass key is" if task == "passkey" else "clock tower"))
            assert tokenizer.decode(prompt.key_ids) == " " + prompt.key
        assert places == sorted(places)
        assert places[-1] - places[0] > 0.5 * (length - 400)


def test_prompts_are_a_function_of_the_seed_and_differ_between_samples() -> None:
    one, same, other = (Haystack(BYTES, None, None, seed) for seed in (1, 1, 2))
    first = one.prompt("passkey", 400, 0.5, 0)
    assert same.prompt("passkey", 400, 0.5, 0) == first
    assert other.prompt("passkey", 400, 0.5, 0).key != first.key
    keys = {one.prompt("passkey", 400, 0.5, sample).key for sample in range(20)}
    assert len(keys) == 20


def test_a_fact_of_ones_own_in_a_text_of_ones_own() -> None:
    needle = Needle(
        "The cellar key hangs behind the clock.",
        "Where does the cellar key hang? It hangs",
        "behind the clock",
    )
    prompt = Haystack(BYTES, "Snow fell. " * 50, needle, 0).prompt("needle", 300, 0.5, 0)
    text = BYTES.decode(prompt.token_ids)
    assert len(prompt.token_ids) == 300
    assert " The cellar key hangs behind the clock. " in text
    assert text.endswith("It hangs")
    with pytest.raises(ConfigError, match="does not hold"):
        check_needle(Needle("The key is lost.", "Where?", "behind the clock"))


def test_a_prompt_too_short_for_the_fact_is_refused() -> None:
    with pytest.raises(ConfigError, match="--lengths 50: the passkey and its question take"):
        Haystack(BYTES, None, None, 0).prompt("passkey", 50, 0.5, 0)


@pytest.mark.parametrize(
    ("answer", "key", "wanted"),
    [
        (" 01234. Remember", "01234", True),
        ("012345", "01234", False),
        ("501234", "01234", False),
        ("It is RED  and\nblue.", "red and blue", True),
        ("redand blue", "red and blue", False),
        ("kinred and blue", "red and blue", False),
        ("答えは時計です", "時計", True),
        ("a+b", "a+b", True),
        ("aab", "a+b", False),
    ],
)
def test_what_counts_as_an_answer(answer: str, key: str, wanted: bool) -> None:
    assert holds_key(answer, key) is wanted
