"""The engine on a GPU with the demo model: against the reference, graphs against kernels, bytes, waiting."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from fake_runner import request

from gqa_serve.config import EngineConfig
from gqa_serve.engine.core import Engine
from gqa_serve.engine.model_runner import ModelRunner
from gqa_serve.engine.request import TokenOutput
from gqa_serve.engine.weights.hub import resolve_model

PROMPTS = [
    [(17 * i + 3 * n) % 40000 + 20 for i in range(length)] for n, length in enumerate((5, 300, 60, 130))
]


def engine(**settings: Any) -> Engine:
    config = EngineConfig(
        model="demo",
        **{"device": "cuda", "kv_cache_memory": 1 << 30, "max_num_seqs": 16, "seed": 0, **settings},
    )
    return Engine(ModelRunner(resolve_model("demo"), config), config)


def run(made: Engine, max_tokens: int = 40, **params: Any) -> dict[str, list[TokenOutput]]:
    outputs: dict[str, list[TokenOutput]] = {}
    for index, prompt in enumerate(PROMPTS):
        made.add(request(str(index), prompt, max_tokens=max_tokens, **params))
    while made.has_work:
        for output in made.step():
            assert output.error is None
            outputs.setdefault(output.request_id, []).append(output)
    return outputs


def tokens(outputs: dict[str, list[TokenOutput]]) -> dict[str, list[int]]:
    return {name: [token for part in parts for token in part.token_ids] for name, parts in outputs.items()}


def numbers(outputs: dict[str, list[TokenOutput]]) -> dict[str, list[str]]:
    """Log-probabilities as hexadecimal floats."""
    return {
        name: [entry.logprob.hex() for part in parts for entry in part.logprobs or []]
        for name, parts in outputs.items()
    }


def test_float32_generates_what_the_reference_does(gpu: torch.device) -> None:
    exact = {"dtype": "float32", "quantization": "none"}
    assert tokens(run(engine(**exact))) == tokens(run(engine(backend="reference", **exact)))


@pytest.mark.parametrize("quantization", ["none", "auto", "int8"])
def test_half_precision_is_near_the_reference(gpu: torch.device, quantization: str) -> None:
    """Prompt log-probabilities: bfloat16 keeps 8 bits."""

    def scored(made: Engine) -> torch.Tensor:
        parts = run(made, max_tokens=0, prompt_logprobs=0)
        entries = [parts[str(i)][0].prompt_logprobs for i in range(len(PROMPTS))]
        return torch.tensor([e.logprob for listed in entries for e in listed or [] if e is not None])

    expected = scored(engine(backend="reference", dtype="float32", quantization="none"))
    difference = (scored(engine(quantization=quantization)) - expected).abs()
    assert difference.mean() < 0.15
    assert difference.mean() > 0


@pytest.mark.parametrize("kv", ["auto", "int8"])
def test_graphs_compute_what_kernels_do(gpu: torch.device, kv: str) -> None:
    """To the bit: the same kernels run. With --deterministic, since padding changes what cuBLAS does."""
    settings = {"deterministic": True, "kv_cache_dtype": kv}
    made, replayed = engine(**settings), []
    captured = made.runner._forward.graphs
    replay = captured.run

    def watched(*args: Any) -> torch.Tensor | None:
        replayed.append(replay(*args))
        return replayed[-1]

    captured.run = watched
    graphs = run(made, logprobs=0)
    assert sum(hidden is not None for hidden in replayed) >= 30
    kernels = run(engine(enforce_eager=True, **settings), logprobs=0)
    assert tokens(graphs) == tokens(kernels)
    assert numbers(graphs) == numbers(kernels)


@pytest.mark.parametrize("quantization", ["none", "auto"])
def test_deterministic_bytes(gpu: torch.device, quantization: str) -> None:
    """Alone, and in company that is chunked otherwise."""
    together = numbers(
        run(engine(deterministic=True, quantization=quantization, max_num_batched_tokens=64), logprobs=0)
    )
    made = engine(deterministic=True, quantization=quantization)
    for index, prompt in enumerate(PROMPTS):
        made.add(request(str(index), prompt, max_tokens=40, logprobs=0))
        outputs: list[TokenOutput] = []
        while made.has_work:
            outputs += made.step()
        assert numbers({str(index): outputs}) == {str(index): together[str(index)]}


@pytest.mark.parametrize(
    "params", [{}, {"temperature": 0.8, "top_p": 0.9, "top_k": 40, "min_p": 0.02}], ids=str
)
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
def test_decoding_waits_for_nothing(gpu: torch.device, params: dict[str, Any]) -> None:
    """But for the event of the step before's results: torch raises at anything that synchronizes."""
    made = engine()
    for index, prompt in enumerate(PROMPTS):
        made.add(request(str(index), prompt, max_tokens=60, **params))
    for _ in range(10):
        made.step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(30):
            made.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    while made.has_work:
        made.step()
