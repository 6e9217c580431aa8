"""Real weights: the demo model and Gemma 3 270M score as transformers does, and find what is hidden."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from demo_model import demo_path, oracle

from gqa_serve.config import EngineConfig
from gqa_serve.engine.tokenizer import Tokenizer, load_tokenizer
from gqa_serve.workbench.evaluate import compare
from gqa_serve.workbench.evaluate.engines import LoadedModel, answers
from gqa_serve.workbench.evaluate.retrieval import Haystack, holds_key
from gqa_serve.workbench.evaluate.run import score_text
from gqa_serve.workbench.evaluate.text import Corpus, builtin_documents
from gqa_serve.workbench.evaluate.windows import TokenizedCorpus, tokenize

NUM_DOCUMENTS = 6


def load(path: Path, **settings: Any) -> LoadedModel:
    options = {"max_model_len": 1024, "max_num_seqs": 4, "kv_cache_memory": 2**28}
    return LoadedModel(path, EngineConfig(model=str(path), **{**options, **settings}))


def oracle_perplexity(path: Path, corpus: TokenizedCorpus) -> float:
    """By transformers' own reading of the file, float32, sums in float64."""
    model = oracle(path)
    total, count = 0.0, 0
    for window in corpus.windows:
        ids = torch.tensor([list(window.token_ids)])
        with torch.inference_mode():
            logprobs = torch.log_softmax(model(ids).logits[0].double(), dim=-1)
        first = ids.shape[1] - window.num_scored
        total += float(logprobs[first - 1 : -1].gather(-1, ids[0, first:, None]).sum())
        count += window.num_scored
    return math.exp(-total / count)


def short_corpus(tokenizer: Tokenizer) -> TokenizedCorpus:
    return tokenize(Corpus(builtin_documents()[:NUM_DOCUMENTS], None), tokenizer, window=96, stride=48)


def found(model: LoadedModel, tokenizer: Tokenizer, length: int) -> list[bool]:
    haystack = Haystack(tokenizer, None, None, seed=0)
    prompts = [haystack.prompt("passkey", length, depth, 0) for depth in (0.0, 0.5, 1.0)]
    ids, keys = [prompt.token_ids for prompt in prompts], [prompt.key_ids for prompt in prompts]
    outputs = answers(model, ids, keys, max_tokens=12)
    return [
        holds_key(tokenizer.decode(output), prompt.key)
        for prompt, (output, _) in zip(prompts, outputs, strict=True)
    ]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_demo_model(demo: Path) -> None:
    tokenizer = load_tokenizer(demo)
    corpus = short_corpus(tokenizer)
    exact = load(demo, quantization="none", kv_cache_dtype="float32")
    scores = score_text(exact, None, corpus)
    assert compare.perplexity(scores).value == pytest.approx(oracle_perplexity(demo, corpus), rel=1e-4)
    rough = score_text(load(demo, quantization="none", kv_cache_dtype="int8"), exact, corpus)
    divergence = compare.divergence(rough)
    assert divergence is not None
    assert 1e-5 < divergence.value < 0.02
    assert found(exact, tokenizer, 400) == [True] * 3


@pytest.fixture
def demo() -> Path:
    return demo_path()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_gemma3_270m(gemma3_270m_gguf: Path) -> None:
    tokenizer = load_tokenizer(gemma3_270m_gguf)
    corpus = short_corpus(tokenizer)
    assert corpus.scored.all()  # Gemma begins a text with <bos>
    exact = load(gemma3_270m_gguf, quantization="none", kv_cache_dtype="float32")
    scores = score_text(exact, None, corpus)
    wanted = oracle_perplexity(gemma3_270m_gguf, corpus)
    assert compare.perplexity(scores).value == pytest.approx(wanted, rel=1e-4)
    assert found(exact, tokenizer, 700) == [True] * 3  # beyond its windows of 512 tokens
