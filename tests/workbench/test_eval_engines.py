"""Scores of the served path against transformers in float64, and against the engine itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from backend_choice import BACKENDS
from eval_checkpoints import checkpoint, loaded, transformers_model
from fake_runner import request, run, tokens_of

from gqa_serve.config import EngineConfig
from gqa_serve.engine.core import Engine
from gqa_serve.engine.tokenizer import load_tokenizer
from gqa_serve.errors import ConfigError
from gqa_serve.workbench.evaluate.engines import (
    LoadedModel,
    answers,
    compare_tokens,
    hidden_before_scored,
    score_tokens,
)
from gqa_serve.workbench.evaluate.run import score_text
from gqa_serve.workbench.evaluate.speed import measure_speed
from gqa_serve.workbench.evaluate.text import Corpus, Document
from gqa_serve.workbench.evaluate.windows import Window, tokenize

TEXT = "It rained all day, and the river rose. " * 9
SHORT = "A second document, which fits."


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint(tmp_path_factory.mktemp("one"))


@pytest.fixture(scope="module")
def other_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Other weights, one KV head."""
    return checkpoint(tmp_path_factory.mktemp("two"), seed=5, num_key_value_heads=1)


def oracle_logprobs(model: Any, ids: list[int]) -> torch.Tensor:
    """[T, V] float64: what follows each token."""
    with torch.inference_mode():
        return torch.log_softmax(model(torch.tensor([ids])).logits[0].double(), dim=-1)


def oracle_scores(model: Any, ids: list[int], begin: int) -> list[float]:
    """Of tokens `begin` and later of a window."""
    logprobs = oracle_logprobs(model, ids)
    return [float(logprobs[index - 1, ids[index]]) for index in range(begin, len(ids))]


@pytest.mark.parametrize(("family", "bos"), [("llama", False), ("gemma3", True), ("qwen2", False)])
def test_perplexity_is_transformers(tmp_path: Path, family: str, bos: bool) -> None:
    path = checkpoint(tmp_path, family, bos=bos)
    corpus = tokenize(
        Corpus([Document("a", TEXT), Document("b", SHORT)], 128), load_tokenizer(path), window=64, stride=24
    )
    model = transformers_model(path)
    wanted = np.zeros(corpus.num_blocks)
    for window in corpus.windows:
        begin = len(window.token_ids) - window.num_scored
        for offset, logprob in enumerate(oracle_scores(model, list(window.token_ids), begin)):
            wanted[corpus.blocks[window.first + offset]] -= logprob
    text = score_text(loaded(path), None, corpus)
    assert text.nll == pytest.approx(wanted.tolist(), rel=1e-5, abs=1e-3)
    assert sum(text.num_tokens) == len(TEXT + SHORT) - (0 if bos else 2)
    assert sum(text.num_bytes) == sum(text.num_tokens)  # a token is a byte
    assert text.divergence is None


def test_chunks_and_company_change_no_score(path: Path) -> None:
    corpus = tokenize(Corpus([Document("a", TEXT)], 64), load_tokenizer(path), window=100, stride=50)
    whole = score_text(loaded(path), None, corpus)
    chunked = score_text(loaded(path, max_num_batched_tokens=33), None, corpus)  # windows in four chunks
    alone = score_text(loaded(path, max_num_batched_tokens=128), None, corpus)  # one window at a time
    assert chunked.nll == pytest.approx(whole.nll, rel=1e-5)
    assert alone.nll == pytest.approx(whole.nll, rel=1e-5)


def test_agreement_is_transformers(path: Path, other_path: Path) -> None:
    corpus = tokenize(Corpus([Document("a", TEXT)], 64), load_tokenizer(path), window=80, stride=40)
    text = score_text(loaded(other_path), loaded(path), corpus)
    assert text.divergence is not None
    assert text.same_top is not None
    models = transformers_model(path), transformers_model(other_path)
    divergence, same = np.zeros(corpus.num_blocks), np.zeros(corpus.num_blocks)
    for window in corpus.windows:
        reference, got = (oracle_logprobs(model, list(window.token_ids)) for model in models)
        begin = len(window.token_ids) - window.num_scored
        for offset in range(window.num_scored):
            row, block = begin + offset - 1, corpus.blocks[window.first + offset]
            divergence[block] += float((reference[row].exp() * (reference[row] - got[row])).sum())
            same[block] += int(reference[row].argmax()) == int(got[row].argmax())
    assert text.divergence == pytest.approx(divergence.tolist(), rel=1e-4)
    assert text.same_top == same.astype(int).tolist()
    assert 0 < sum(text.same_top) < sum(text.num_tokens)


def test_a_model_agrees_with_itself(path: Path) -> None:
    model = loaded(path)
    window = Window(load_tokenizer(path).encode(SHORT), 10, 0)
    (hidden,) = hidden_before_scored(model, [window])
    divergence, same = compare_tokens(model, loaded(path), (hidden, hidden))
    assert divergence == [0.0] * 10
    assert same == [True] * 10


def test_a_reference_with_smaller_batches_is_compared_all_the_same(path: Path, other_path: Path) -> None:
    corpus = tokenize(Corpus([Document("a", TEXT)], 64), load_tokenizer(path), window=60, stride=30)
    wanted = score_text(loaded(other_path), loaded(path), corpus)
    got = score_text(loaded(other_path), loaded(path, max_num_batched_tokens=60, max_num_seqs=2), corpus)
    assert got.divergence == pytest.approx(wanted.divergence, rel=1e-3)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kv_cache_dtype", ["float32", "int8"])
def test_scores_are_the_engines_prompt_logprobs(path: Path, backend: str, kv_cache_dtype: str) -> None:
    settings = {"backend": backend, "kv_cache_dtype": kv_cache_dtype}
    model = loaded(path, **settings)
    ids = load_tokenizer(path).encode(SHORT)
    engine = Engine(model.runner, EngineConfig(model=str(path), max_num_seqs=8, **settings))
    engine.add(request("score", ids, prompt_logprobs=0, max_tokens=0))
    (output,) = run(engine)["score"]
    assert output.prompt_logprobs is not None
    wanted = [entry.logprob for entry in output.prompt_logprobs[1:] if entry is not None]
    (hidden,) = hidden_before_scored(model, [Window(ids, len(ids) - 1, 0)])
    assert score_tokens(model, hidden, ids[1:]) == pytest.approx(wanted, abs=2e-5)


def test_answers_are_the_engines_and_keys_are_scored_as_transformers_does(path: Path) -> None:
    model, oracle = loaded(path, max_num_seqs=3), transformers_model(path)
    tokenizer = load_tokenizer(path)
    prompts = [
        tokenizer.encode(text) for text in ("The key is", "Seventeen years ago, the", "No", "Yes, " * 9)
    ]
    keys = [tokenizer.encode(text) for text in (" 12345", " z", " behind the clock", " 9")]
    engine = Engine(model.runner, EngineConfig(model=str(path), max_num_seqs=3))
    for index, prompt in enumerate(prompts):
        engine.add(request(str(index), prompt, max_tokens=9))
    wanted = run(engine)
    found = list(answers(model, prompts, keys, max_tokens=9))
    assert [output for output, _ in found] == [tokens_of(wanted[str(index)]) for index in range(4)]
    for (_, logprobs), prompt, key in zip(found, prompts, keys, strict=True):
        assert logprobs == pytest.approx(oracle_scores(oracle, prompt + key, len(prompt)), abs=1e-3)


def test_an_answer_ends_with_the_end_of_sequence(path: Path) -> None:
    model = loaded(path)
    prompt = load_tokenizer(path).encode("The key is")
    ((free, _),) = answers(model, [prompt], [[1, 2]], max_tokens=6)
    stop = free[2]
    model.eos_token_ids = frozenset([stop])
    ((ended, _),) = answers(model, [prompt], [[1, 2]], max_tokens=6)
    assert ended == free[: free.index(stop) + 1]


def test_what_the_cache_does_not_hold_is_refused(path: Path) -> None:
    model = loaded(path, kv_cache_memory=2**17)
    with pytest.raises(ConfigError, match=r"The KV cache holds \d+ tokens"):
        model.blocks(0, model.num_kv_tokens + 1)


def test_speed_measures_both_in_each_round(path: Path, other_path: Path) -> None:
    options = {"context": 64, "requests": 3, "prefill_tokens": 20, "rounds": 2}
    speed = measure_speed(loaded(path), loaded(other_path), **options)
    for times in (speed.decode_s, speed.prefill_s, speed.reference_decode_s, speed.reference_prefill_s):
        assert times is not None
        assert len(times) == 2
        assert min(times) > 0
    assert measure_speed(loaded(path), None, **options).reference_decode_s is None


def test_a_closed_model_is_gone(path: Path) -> None:
    model: LoadedModel = loaded(path)
    model.close()
    assert not hasattr(model, "runner")
