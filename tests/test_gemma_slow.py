"""Gemma 3 270M, real weights: one KV head for four query heads, windows on most layers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from demo_model import demo_engine, oracle, oracle_greedy
from fake_runner import request, run, tokens_of

from gqa_serve.engine.chat_prompt import encode_chat
from gqa_serve.engine.chat_template_files import load_chat_template
from gqa_serve.engine.tokenizer import load_tokenizer

# Longer than the sliding window of 512 tokens.
LONG = "The river ran past the mill and the old bridge. " * 70 + "Then, one morning, the miller"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_gemma3_270m_equals_transformers(gemma3_270m_gguf: Path) -> None:
    tokenizer = load_tokenizer(gemma3_270m_gguf)
    model = oracle(gemma3_270m_gguf)
    engine = demo_engine(gemma3_270m_gguf, max_num_batched_tokens=256, max_num_seqs=8)
    assert (engine.info.num_heads, engine.info.num_kv_heads) == (4, 1)
    prompts = {
        "short": tokenizer.encode("The capital of France is"),
        "chat": encode_chat(
            tokenizer,
            load_chat_template(gemma3_270m_gguf),
            [{"role": "user", "content": "Name three colours."}],
        ),
        "long": tokenizer.encode(LONG),
    }
    assert len(prompts["long"]) > 600
    with torch.inference_mode():
        wanted_logprobs = torch.log_softmax(model(torch.tensor([prompts["long"]])).logits[0].double(), -1)
    engine.add(request("score", prompts["long"], prompt_logprobs=0, max_tokens=0))
    (scored,) = run(engine)["score"]
    assert scored.prompt_logprobs is not None
    for position, entry in enumerate(scored.prompt_logprobs[1:], 1):
        assert entry is not None
        wanted = float(wanted_logprobs[position - 1, prompts["long"][position]])
        assert entry.logprob == pytest.approx(wanted, abs=1e-3)
    for name, prompt in prompts.items():
        engine.add(request(name, prompt, max_tokens=20))
    together = run(engine)
    for name, prompt in prompts.items():
        assert tokens_of(together[name]) == oracle_greedy(model, prompt, 20), name
