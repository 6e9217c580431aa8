"""Throughput of the reference backend against transformers' `generate`, on the demo model, float32, CPU.

Each round times, one after the other: transformers alone, this engine alone, this engine with 16 concurrent
requests. Ratios are taken within a round, since the machine's speed drifts; the median is what to quote.

    make bench                  or: .venv/bin/python benchmarks/reference_vs_transformers.py --rounds 5
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
import transformers

from gqa_serve.config import EngineConfig
from gqa_serve.engine.core import Engine
from gqa_serve.engine.model_runner import ModelRunner
from gqa_serve.engine.request import EngineRequest, SamplingParams
from gqa_serve.engine.tokenizer import load_tokenizer
from gqa_serve.engine.weights.hub import resolve_model

PROMPT = "The history of the printing press begins in Mainz, where Johannes Gutenberg"


def ours(engine: Engine, prompts: list[list[int]], num_tokens: int) -> float:
    """Output tokens per second of `prompts` together, prefill included."""
    params = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True)
    start = time.perf_counter()
    for index, prompt in enumerate(prompts):
        engine.add(EngineRequest(request_id=str(index), prompt=prompt, params=params))
    count = 0
    while engine.has_work:
        count += sum(len(output.token_ids) for output in engine.step())
    return count / (time.perf_counter() - start)


def theirs(model: torch.nn.Module, prompt: list[int], num_tokens: int) -> float:
    """Output tokens per second of transformers' greedy `generate`, prefill included."""
    ids = torch.tensor([prompt])
    start = time.perf_counter()
    with torch.inference_mode():
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=num_tokens,
            min_new_tokens=num_tokens,
            do_sample=False,
        )
    return (out.shape[1] - len(prompt)) / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=64, help="output tokens per request")
    parser.add_argument("--concurrency", type=int, default=16)
    args = parser.parse_args()

    path = resolve_model("demo")
    prompt = load_tokenizer(path).encode(PROMPT)
    prompts = [[*prompt, 500 + index] for index in range(args.concurrency)]
    model = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    ).eval()
    config = EngineConfig(
        model="demo", backend="reference", dtype="float32", prefix_caching=False, kv_cache_memory=2**30
    )
    engine = Engine(ModelRunner(path, config), config)
    ours(engine, prompts, 4), theirs(model, prompt, 4)  # warm up
    print(f"{torch.get_num_threads()} threads, prompt {len(prompt)}, output {args.tokens} tokens; tokens/s")
    alone_ratios, batch_ratios = [], []
    for number in range(args.rounds):
        reference = theirs(model, prompt, args.tokens)
        alone = ours(engine, [prompt], args.tokens)
        batch = ours(engine, prompts, args.tokens)
        alone_ratios.append(alone / reference)
        batch_ratios.append(batch / reference)
        print(
            f"round {number + 1}: transformers {reference:6.1f}"
            f"   alone {alone:6.1f} ({alone_ratios[-1]:.2f}x)"
            f"   {args.concurrency} together {batch:6.1f} ({batch_ratios[-1]:.2f}x)"
        )
    print(
        f"median: alone {statistics.median(alone_ratios):.2f}x, "
        f"{args.concurrency} together {statistics.median(batch_ratios):.2f}x transformers alone"
    )


if __name__ == "__main__":
    main()
