"""The CUDA backend on a CPU, its kernels interpreted: families, graphs, lookahead, determinism."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_runner import assert_conserved, request, run, tokens_of
from tiny import tiny_model

from gqa_serve.config import EngineConfig
from gqa_serve.engine import model_runner
from gqa_serve.engine.backends.cuda import CudaBackend
from gqa_serve.engine.backends.cuda_graphs import DecodeGraphs, ladder
from gqa_serve.engine.backends.cuda_step import StepArrays, StepBuffer, decode_capacities
from gqa_serve.engine.batch import PlanRow, StepPlan
from gqa_serve.engine.core import Engine
from gqa_serve.engine.kernels.triton import sampling
from gqa_serve.engine.model_runner import ModelRunner
from gqa_serve.engine.request import SamplingParams
from gqa_serve.engine.row_kernels import KernelRows
from gqa_serve.engine.sampler import TorchRows

CPU = torch.device("cpu")
SMALL = {"num_hidden_layers": 2, "vocab_size": 64, "intermediate_size": 48}


class Again:
    """Stands for a captured graph: computes it anew, into the tensor that the first time returned."""

    def __init__(self, function: Callable[[], torch.Tensor], result: torch.Tensor) -> None:
        self.function = function
        self.result = result
        self.replays = 0

    def replay(self) -> None:
        self.result.copy_(self.function())
        self.replays += 1


class Captures:
    """A `Capture` that keeps what it made."""

    def __init__(self) -> None:
        self.made: list[Again] = []

    def __call__(self, function: Callable[[], torch.Tensor]) -> tuple[Again, torch.Tensor]:
        self.made.append(Again(function, function()))
        return self.made[-1], self.made[-1].result


def engine(
    path: Path, monkeypatch: pytest.MonkeyPatch, backend: dict[str, Any] | None, **settings: Any
) -> Engine:
    """An engine over the interpreted CUDA backend, or over the reference where `backend` is None."""
    if backend is not None:
        made = CudaBackend(CPU, torch.float32, max_num_seqs=settings.get("max_num_seqs", 4), **backend)
        monkeypatch.setattr(model_runner, "create_backend", lambda device, options: made)
    config = EngineConfig(
        model="tiny",
        device="cpu",
        **{
            "backend": "reference",
            "kv_cache_memory": 1 << 20,
            "max_num_seqs": 4,
            "max_num_batched_tokens": 16,
            "seed": 0,
            **settings,
        },
    )
    result = Engine(ModelRunner(path, config), config)
    monkeypatch.undo()
    return result


def generate(made: Engine, **params: Any) -> dict[str, list[int]]:
    """Three requests, of which two share the beginning of their prompt; one asks for log-probabilities."""
    shared = [(7 * i) % 60 + 3 for i in range(19)]
    for name, prompt in (("a", shared), ("b", [*shared[:17], 5]), ("c", [9])):
        made.add(request(name, prompt, max_tokens=4, logprobs=2 if name == "c" else None, **params))
    outputs = run(made)
    assert_conserved(made)
    return {name: tokens_of(parts) for name, parts in outputs.items()}


@pytest.fixture(scope="module")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Windows, soft caps, four norms, MQA, head_dim that is no power of two."""
    path = tmp_path_factory.mktemp("gemma")
    sizes = {"num_attention_heads": 4, "num_key_value_heads": 1, **SMALL}
    tiny_model("gemma2", **sizes).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llama")
    tiny_model("llama", **SMALL).save_pretrained(path)
    return path


def logprobs_of(made: Engine, prompt: list[int]) -> list[float]:
    made.add(request("p", prompt, max_tokens=0, prompt_logprobs=0))
    (output,) = run(made)["p"]
    assert output.prompt_logprobs is not None
    return [entry.logprob for entry in output.prompt_logprobs if entry is not None]


@pytest.mark.parametrize("family", ["qwen2", "gemma3", "olmo2", "smollm3"])
def test_families_equal_the_reference(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layers = {"num_hidden_layers": 4} if family in ("gemma3", "smollm3") else {}  # of several kinds
    tiny_model(family, **{**SMALL, **layers}).save_pretrained(tmp_path)
    prompt = [(11 * i) % 60 + 3 for i in range(14)]
    expected = logprobs_of(engine(tmp_path, monkeypatch, None), prompt)
    got = logprobs_of(engine(tmp_path, monkeypatch, {}), prompt)
    assert got == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("model", ["llama", "gemma"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_graphs_and_kernel_by_kernel_generate_what_the_reference_does(
    model: str, temperature: float, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = request.getfixturevalue(model)
    params = {"temperature": temperature, "seed": 3}
    expected = generate(engine(path, monkeypatch, None), **params)
    captures = Captures()
    assert generate(engine(path, monkeypatch, {"capture": captures}), **params) == expected
    assert sum(graph.replays for graph in captures.made) >= 2
    assert generate(engine(path, monkeypatch, {}), **params) == expected


@pytest.mark.parametrize("form", [torch.int8, torch.float8_e4m3fn])
def test_quantized_caches_generate_what_the_reference_does(
    form: torch.dtype, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "int8" if form == torch.int8 else "fp8"
    expected = generate(engine(llama, monkeypatch, None, kv_cache_dtype=name))
    assert generate(engine(llama, monkeypatch, {"kv_dtype": form})) == expected


def test_what_is_compiled_before_the_first_request(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts, decode steps, and draws with each set of filters; nobody's blocks are written afterwards."""
    made = engine(llama, monkeypatch, {})
    runner: Any = made.runner
    plans: list[list[int]] = []
    forward = runner._forward

    def watched(plan: StepPlan, cache: Any, previous: torch.Tensor | None = None) -> torch.Tensor:
        plans.append([len(row.token_ids) for row in plan.rows])
        return forward(plan, cache, previous)

    runner._forward = watched
    with torch.inference_mode():
        cache = runner.backend.allocate_cache(runner.config, 2, 16)
        runner._compile_kernels(torch.randn(1, runner.config.hidden_size), cache, 3)
    assert plans == [[20], [32], [1], [1, 1, 1]]
    assert not any(tensor.any() for tensor in (*runner.cache.k, *runner.cache.v))


@pytest.mark.usefixtures("ordered_dot")
def test_deterministic_bytes_do_not_depend_on_chunks_and_neighbours(
    gemma: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = [(11 * i) % 60 + 3 for i in range(21)]
    results = []
    for tokens in (64, 7):
        made = engine(gemma, monkeypatch, {"deterministic": True}, max_num_batched_tokens=tokens)
        if tokens == 7:
            made.add(request("other", prompt[5:9], max_tokens=3))
        results.append([value.hex() for value in logprobs_of(made, prompt)])
    assert results[0] == results[1]


# --- a step's integers ---


def plan() -> StepPlan:
    """A prompt's end, two decoding requests (one's token is known to the device alone), a new prompt."""
    return StepPlan(
        [
            PlanRow([4, 5, 6], 30, [3, 1, 9], 1),
            PlanRow([7], 600, list(range(10, 48)), 1),
            PlanRow([0], 16, [2, 8], 1, 3),
            PlanRow([1] * 20, 0, [50, 51], 0),
        ]
    )


def test_step_arrays() -> None:
    regions = StepArrays.from_plan(plan(), 16, [None, 300], tile_tokens=8).regions
    listed = {name: array.tolist() for name, array in regions.items()}
    assert listed["token_ids"] == [4, 5, 6, 7, 0] + [1] * 20
    assert listed["positions"] == [30, 31, 32, 600, 16, *range(20)]
    assert listed["slots"][:5] == [1 * 16 + 14, 1 * 16 + 15, 9 * 16, 47 * 16 + 8, 8 * 16]
    assert listed["slots"][5:] == [*range(800, 816), *range(816, 820)]
    assert listed["previous_rows"] == [-1, -1, -1, -1, 3] + [-1] * 20
    assert listed["logit_rows"] == [2, 3, 4]
    assert listed["context_lens"] == [33, 601, 17, 20]
    assert listed["last_rows"] == [2, 3, 4, 24]
    assert listed["query_starts"] == [0, 3, 4, 5, 25]
    assert listed["block_starts"] == [0, 3, 41, 43]
    assert listed["block_ids"] == [3, 1, 9, *range(10, 48), 2, 8, 50, 51]
    assert listed["item_starts0"] == [0, 0, 3, 4, 4]
    assert listed["item_requests0"] == [1, 1, 1, 2]
    assert listed["item_splits0"] == [0, 1, 2, 0]
    assert listed["item_splits1"] == [1, 2, 0]  # 601 - 300 lies in the second split
    assert listed["chunk_requests"] == [0, 3, 3, 3]
    assert listed["chunk_firsts"] == [0, 0, 8, 16]


def decode_plan(count: int, context: int = 20) -> StepPlan:
    return StepPlan([PlanRow([5 + i], context, [2 * i, 2 * i + 1], 1) for i in range(count)])


def test_padding_rows_have_no_blocks_and_no_work() -> None:
    arrays = StepArrays.from_plan(decode_plan(3), 16, [None], 8)
    assert arrays.is_decode
    before = {name: array.copy() for name, array in arrays.regions.items()}
    arrays.pad(5)
    for name, array in arrays.regions.items():
        assert array[: len(before[name])].tolist() == before[name].tolist(), name
    listed = {name: array.tolist() for name, array in arrays.regions.items()}
    assert listed["slots"][3:] == [-1, -1]
    assert listed["context_lens"][3:] == [0, 0]
    assert listed["last_rows"][3:] == [3, 4]
    assert listed["query_starts"] == [0, 1, 2, 3, 4, 5]
    assert listed["item_starts0"] == [0, 1, 2, 3, 3, 3]
    assert len(listed["item_requests0"]) == 3


@pytest.mark.parametrize("most", [1, 2, 3, 4, 5, 8, 31, 64, 100, 300])
def test_ladder(most: int) -> None:
    rungs = ladder(most)
    assert rungs[-1] == most
    assert rungs == sorted(set(rungs))
    for wanted in range(1, most + 1):
        rung = min(rung for rung in rungs if rung >= wanted)
        step = 2 if wanted <= 4 else 4 if wanted <= 8 else 8 if wanted <= 64 else 16 if wanted <= 256 else 32
        assert rung - wanted < step


def test_step_buffers_keep_their_place_and_their_values() -> None:
    sizes = decode_capacities(4, 1, most_items=9000, most_blocks=70)
    buffer = StepBuffer(CPU, sizes)
    first = buffer.load(StepArrays.from_plan(decode_plan(4), 16, [None], 8))
    places = {name: tensor.data_ptr() for name, tensor in first.items()}
    arrays = StepArrays.from_plan(decode_plan(4, context=25), 16, [None], 8)
    for name, tensor in buffer.load(arrays).items():
        assert tensor.data_ptr() == places[name]
        assert len(tensor) == sizes[name]
        assert tensor[: len(arrays.regions[name])].tolist() == arrays.regions[name].tolist()


def test_a_growing_buffer_holds_any_step() -> None:
    buffer = StepBuffer(CPU)
    for step in (decode_plan(1), plan(), decode_plan(9), plan()):
        arrays = StepArrays.from_plan(step, 16, [None, 300], 8)
        for name, tensor in buffer.load(arrays).items():
            assert tensor.tolist() == arrays.regions[name].tolist()


def test_graphs_serve_what_fits_them() -> None:
    """The rung above the number of requests is replayed; tables longer than was reserved are not served."""
    seen: list[list[int]] = []

    def forward(regions: Any, previous: torch.Tensor) -> torch.Tensor:
        tokens = torch.where(
            regions["previous_rows"] < 0, regions["token_ids"], previous[regions["previous_rows"].clamp(0)]
        )
        seen.append(tokens.tolist())
        return tokens[:, None].float()

    def capacities(rung: int) -> dict[str, int]:
        return decode_capacities(rung, 1, most_items=8, most_blocks=8)

    captures = Captures()
    graphs = DecodeGraphs(6, capacities, forward, captures, CPU)
    assert [len(tokens) for tokens in seen] == [6, 4, 2, 1]
    step = decode_plan(3)
    step.rows[1].previous_row = 1
    hidden = graphs.run(StepArrays.from_plan(step, 16, [None], 8), torch.tensor([40, 41]))
    assert hidden is not None
    assert hidden[:, 0].tolist() == [5, 41, 7]
    assert seen[-1] == [5, 41, 7, 0]
    assert [graph.replays for graph in captures.made] == [0, 1, 0, 0]
    assert graphs.run(StepArrays.from_plan(decode_plan(5), 16, [None], 8), None) is None  # 10 blocks
    assert graphs.run(StepArrays.from_plan(plan(), 16, [None], 8), None) is None
    assert graphs.run(StepArrays.from_plan(decode_plan(7, 10), 16, [None], 8), None) is None


# --- rows of logits ---


def test_rows_are_the_samplers() -> None:
    """Parameters of many kinds, and rows chosen among others, against plain torch."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 300, generator=generator) * 3
    logits[2, 7] = torch.nan
    params = [
        SamplingParams(temperature=0.7),
        SamplingParams(temperature=1.0, top_k=5),
        SamplingParams(temperature=1.3, top_p=0.6, top_k=2**40),
        SamplingParams(temperature=1.0, min_p=0.2, top_k=-1),
    ]
    rows, units = [0, 1, 3, 5], [0.1, 0.5, 0.77, 0.999]
    ours, theirs = KernelRows(sampling), TorchRows()
    assert ours.argmax(logits).tolist() == theirs.argmax(logits).tolist()
    for chosen in ([0], [1], [2, 3], [0, 1, 2, 3]):
        of = ([rows[i] for i in chosen], [params[i] for i in chosen], [units[i] for i in chosen])
        assert ours.draw(logits, *of).tolist() == theirs.draw(logits, *of).tolist()
