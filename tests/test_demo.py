"""The demo model, real weights: greedy text equals transformers', alone and in any company."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from backend_choice import BACKENDS
from demo_model import demo_engine, demo_path, oracle, oracle_greedy
from fake_runner import assert_conserved, request, run, tokens_of

from gqa_serve import LLM, SamplingParams
from gqa_serve.engine.backends import native_is_built
from gqa_serve.engine.core import Engine
from gqa_serve.engine.request import Pooling
from gqa_serve.engine.tokenizer import Tokenizer, load_tokenizer

TEXTS = [
    "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n",
    "The history of the printing press begins in Mainz, where",
    "def fibonacci(n):\n    if n",
    "Once upon a time in a land far away, there lived a " + "very " * 60 + "old king who",
]
NUM_TOKENS = 24


@pytest.fixture(scope="module")
def path() -> Path:
    return demo_path()


@pytest.fixture(scope="module")
def tokenizer(path: Path) -> Tokenizer:
    return load_tokenizer(path)


@pytest.fixture(scope="module")
def prompts(tokenizer: Tokenizer) -> list[list[int]]:
    return [tokenizer.encode(text, parse_special=True) for text in TEXTS]


@pytest.fixture(scope="module")
def model(path: Path) -> Any:
    return oracle(path)


@pytest.fixture(scope="module")
def wanted(model: Any, prompts: list[list[int]]) -> list[list[int]]:
    return [oracle_greedy(model, prompt, NUM_TOKENS) for prompt in prompts]


@pytest.fixture(scope="module", params=BACKENDS)
def exact(request: pytest.FixtureRequest) -> dict[str, Any]:
    """Settings of a backend that computes with the file's exact weights."""
    return {"backend": request.param, "quantization": "none"}


@pytest.fixture(scope="module")
def engine(path: Path, exact: dict[str, Any]) -> Engine:
    return demo_engine(path, max_num_seqs=32, max_num_batched_tokens=512, **exact)


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_pooled_states_equal_transformers(
    engine: Engine, model: Any, prompts: list[list[int]], pooling: Pooling
) -> None:
    for number, prompt in enumerate(prompts):
        engine.add(request(str(number), prompt, pooling=pooling, max_tokens=0))
    outputs = run(engine)
    for number, prompt in enumerate(prompts):
        with torch.inference_mode():
            hidden = model.base_model(torch.tensor([prompt])).last_hidden_state[0].double()
        wanted = (hidden[-1] if pooling == "last" else hidden.mean(dim=0)).numpy()
        (output,) = outputs[str(number)]
        assert output.pooled is not None
        got = np.frombuffer(output.pooled, "<f4")
        np.testing.assert_allclose(got, wanted, atol=1e-3 * np.abs(wanted).max())


def test_logits_equal_transformers(engine: Engine, model: Any, prompts: list[list[int]]) -> None:
    prompt = prompts[3]
    engine.add(request("score", prompt, prompt_logprobs=0, max_tokens=0))
    (output,) = run(engine)["score"]
    with torch.inference_mode():
        logprobs = torch.log_softmax(model(torch.tensor([prompt])).logits[0].double(), -1)
    assert output.prompt_logprobs is not None
    for position, entry in enumerate(output.prompt_logprobs[1:], 1):
        assert entry is not None
        assert entry.logprob == pytest.approx(float(logprobs[position - 1, prompt[position]]), abs=1e-4)


def test_greedy_alone_equals_transformers(
    engine: Engine, prompts: list[list[int]], wanted: list[list[int]]
) -> None:
    for number, prompt in enumerate(prompts):
        engine.add(request(f"alone{number}", prompt, max_tokens=NUM_TOKENS))
        assert tokens_of(run(engine)[f"alone{number}"]) == wanted[number]


def test_greedy_among_31_neighbours_with_chunks_hits_and_preemptions_equals_transformers(
    path: Path, exact: dict[str, Any], prompts: list[list[int]], wanted: list[list[int]]
) -> None:
    # The same weights over a pool so small that requests must give way, chunks of at most 48 tokens.
    rng = random.Random(0)
    small = demo_engine(
        path, max_num_seqs=32, max_num_batched_tokens=48, kv_cache_memory=40 * 16 * 46080, **exact
    )
    small.scheduler._pace = None  # chunks of 48 however slow this machine is: shorter ones need fewer blocks
    order = ["wanted"] * len(prompts) + ["random"] * 31
    rng.shuffle(order)
    ours = list(range(len(prompts)))
    outputs: dict[str, list[Any]] = {}
    for number, kind in enumerate(order):
        if kind == "wanted":
            index = ours.pop()
            small.add(request(f"w{index}", prompts[index], max_tokens=NUM_TOKENS))
        else:
            length = rng.randint(2, 90)
            common = prompts[3][: rng.choice([0, 40])]  # some neighbours share a prefix
            prompt = common + [rng.randrange(100, 40_000) for _ in range(length)]
            small.add(request(f"n{number}", prompt, temperature=1.0, max_tokens=rng.randint(2, 30)))
        for output in small.step():
            outputs.setdefault(output.request_id, []).append(output)
    for name, more in run(small).items():
        outputs.setdefault(name, []).extend(more)
    assert small.scheduler.num_preemptions > 0
    assert_conserved(small)
    for index, tokens in enumerate(wanted):
        assert tokens_of(outputs[f"w{index}"]) == tokens
    # A prefix hit changes nothing either.
    small.add(request("again", prompts[3], max_tokens=NUM_TOKENS))
    again = run(small)["again"]
    assert again[0].num_cached_tokens > 0
    assert tokens_of(again) == wanted[3]


def test_llm_generates_chats_and_streams(
    prompts: list[list[int]], wanted: list[list[int]], tokenizer: Tokenizer
) -> None:
    llm = LLM("demo", quantization="none", kv_cache_memory="128MiB", progress=False)
    greedy = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True)
    output, other = llm.generate([TEXTS[1], prompts[2]], greedy)
    assert output.outputs[0].token_ids == wanted[1]
    assert output.outputs[0].text == tokenizer.decode(wanted[1])
    assert other.outputs[0].token_ids == wanted[2]

    conversation = [{"role": "user", "content": "What is the capital of France?"}]
    (answer,) = llm.chat(conversation, SamplingParams(temperature=0, max_tokens=20))
    assert answer.outputs[0].text == "The capital of France is Paris."
    assert answer.outputs[0].finish_reason == "stop"
    streamed = "".join(llm.chat_stream(conversation, SamplingParams(temperature=0, max_tokens=20)))
    assert streamed == answer.outputs[0].text

    stopped = llm.chat(conversation, SamplingParams(temperature=0, max_tokens=20, stop=["is P"]))[0].outputs[
        0
    ]
    assert (stopped.text, stopped.stop_reason) == ("The capital of France ", "is P")
    for _ in llm.chat_stream(conversation, SamplingParams(max_tokens=50)):
        break  # leaving early must not leave a request behind
    assert not llm.engine.has_work

    several = llm.generate(TEXTS[1], SamplingParams(n=3, seed=1, max_tokens=8))[0]
    assert len({choice.text for choice in several.outputs}) == 3
    assert [choice.index for choice in several.outputs] == [0, 1, 2]


@pytest.mark.skipif(not native_is_built(), reason="the native kernels are not built")
def test_the_files_own_blocks_stay_close(path: Path, model: Any, prompts: list[list[int]]) -> None:
    """4-bit weights as they are and 8-bit activations change the next token's distribution little."""
    served = demo_engine(path, backend="native", quantization="auto", dtype="auto")
    assert served.info.weight_bytes < 1.02 * path.stat().st_size
    prompt = prompts[3]
    served.add(request("score", prompt, prompt_logprobs=0, max_tokens=0))
    (output,) = run(served)["score"]
    with torch.inference_mode():
        exact = torch.log_softmax(model(torch.tensor([prompt])).logits[0].double(), -1)
    assert output.prompt_logprobs is not None
    errors = [
        abs(entry.logprob - float(exact[position, prompt[position + 1]]))
        for position, entry in enumerate(output.prompt_logprobs[1:])
        if entry is not None
    ]
    assert sum(errors) / len(errors) < 0.05
