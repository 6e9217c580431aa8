"""ModelRunner: settings on their way to the backend, and what it reports of a loaded model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_runner import request, run, tokens_of
from tiny import tiny_checkpoint

from gqa_serve.config import EngineConfig
from gqa_serve.engine import model_runner
from gqa_serve.engine.backends import BackendOptions
from gqa_serve.engine.backends.reference import ReferenceBackend
from gqa_serve.engine.batch import PlanRow, StepPlan
from gqa_serve.engine.core import Engine
from gqa_serve.engine.model_runner import ModelRunner
from gqa_serve.engine.request import TokenOutput
from gqa_serve.errors import CacheCapacityError, ConfigError

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint("llama", tmp_path_factory.mktemp("runner"))


@pytest.fixture(autouse=True)
def same_threads_afterwards() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def runner(path: Path, *, num_blocks: int | None = None, **settings: Any) -> ModelRunner:
    settings = {"backend": "reference", "kv_cache_memory": 2**20, **settings}
    return ModelRunner(path, EngineConfig(model="tiny", **settings), num_blocks=num_blocks)


def test_what_is_reported(path: Path) -> None:
    info = runner(path, kv_cache_dtype="bfloat16").info
    assert (info.backend, info.dtype, info.quantization) == ("reference", "float32", "none")
    assert (info.kv_dtype, info.kv_bytes_per_token) == ("bfloat16", 2 * 4 * 2 * 16 * 2)
    assert info.num_blocks * info.block_size * info.kv_bytes_per_token == 2**20
    info = runner(path, dtype="bfloat16").info
    assert (info.dtype, info.kv_dtype) == ("bfloat16", "bfloat16")
    for kv_dtype in ("int8", "fp8"):
        info = runner(path, kv_cache_dtype=kv_dtype).info
        assert (info.kv_dtype, info.kv_bytes_per_token) == (kv_dtype, 2 * 4 * 2 * (16 + 4))


def test_a_restarted_engine_has_the_blocks_it_had(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other replicas have taken their caches meanwhile: a share of what they left would be less each time."""
    settings: dict[str, Any] = {"kv_cache_memory": None, "max_model_len": 64, "max_num_seqs": 64}
    block_bytes = 16 * runner(path).info.kv_bytes_per_token
    free = 400 * block_bytes
    monkeypatch.setattr(model_runner, "free_memory", lambda device: free)
    assert runner(path, **settings).info.num_blocks == 200
    free = 150 * block_bytes
    assert runner(path, **settings).info.num_blocks == 75
    assert runner(path, num_blocks=150, **settings).info.num_blocks == 150
    assert runner(path, num_blocks=151, **settings).info.num_blocks == 75
    free = 6 * block_bytes
    with pytest.raises(CacheCapacityError, match="--max-model-len 64 does not fit"):
        runner(path, **settings)
    assert runner(path, num_blocks=5, **settings).info.num_blocks == 5


def test_the_cache_and_its_account_are_the_backends(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A backend that keeps scales beside K and V: its blocks are larger, so there are fewer."""

    class Scaled(ReferenceBackend):
        block_multiple = 16

        def block_bytes(self, config: Any, block_size: int) -> int:
            return super().block_bytes(config, block_size) + config.num_layers * block_size * 2 * 2 * 4

    monkeypatch.setattr(model_runner, "create_backend", lambda device, options: Scaled(device, torch.float32))
    info = runner(path).info
    assert info.kv_bytes_per_token == 2 * 4 * 2 * 16 * 4 + 4 * 2 * 2 * 4
    assert info.num_blocks == 2**20 // (16 * info.kv_bytes_per_token)
    with pytest.raises(ConfigError, match="--block-size 24 is not a multiple of 16, which the reference"):
        runner(path, block_size=24)


def test_a_compiled_forward_pass_is_what_runs(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Compiled(ReferenceBackend):
        def compile(self, decoder: Any) -> Any:
            return lambda plan, cache, previous=None: torch.full(
                (sum(row.num_logits for row in plan.rows), 64), 2.0
            )

    monkeypatch.setattr(
        model_runner, "create_backend", lambda device, options: Compiled(device, torch.float32)
    )
    hidden = runner(path).execute(StepPlan([PlanRow([3, 4, 5], 0, [0], 2)]))
    assert hidden.tolist() == [[2.0] * 64] * 2


@pytest.mark.parametrize(("setting", "environment", "threads"), [(2, 3, 2), (None, 3, 3), (None, None, 5)])
def test_threads(
    setting: int | None, environment: int | None, threads: int, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[BackendOptions] = []

    def create(device: torch.device, options: BackendOptions) -> ReferenceBackend:
        given.append(options)
        return ReferenceBackend(device, torch.float32)

    monkeypatch.setattr(model_runner, "create_backend", create)
    monkeypatch.setattr(model_runner, "omp_num_threads", lambda: environment)
    monkeypatch.setattr(model_runner, "usable_cores", lambda: 5)
    runner(path, threads=setting)
    assert torch.get_num_threads() == threads == given[0].threads


def test_a_model_gives_the_same_whichever_way_the_engine_steps(path: Path) -> None:
    """Over real hidden states: prompts in chunks, preemption, filters, penalties and scored prompts."""

    kinds: list[dict[str, Any]] = [
        {},
        {"temperature": 0.9, "top_p": 0.9, "seed": 1},
        {"repetition_penalty": 1.3},
        {"prompt_logprobs": 1, "logprobs": 2},
        {"temperature": 1.0, "seed": 2, "logprobs": 0},
    ]

    def serve(lookahead: bool) -> dict[str, list[TokenOutput]]:
        config = EngineConfig(
            model="tiny",
            backend="reference",
            kv_cache_memory=16 * 2**10 * 8,
            max_num_batched_tokens=24,
            max_num_seqs=8,
            max_model_len=64,
        )
        model = ModelRunner(path, config)
        model.backend.lookahead = lookahead
        engine = Engine(model, config)
        for number, params in enumerate(kinds):
            prompt = [(7 * number + i * i) % 90 + 3 for i in range(9 + 6 * number)]
            engine.add(request(f"r{number}", prompt, **{"max_tokens": 20, **params}))
        outputs = run(engine)
        assert engine.scheduler.num_preemptions > 0
        return outputs

    ahead, at_once = serve(True), serve(False)
    assert len(at_once) == 5
    for name, outputs in at_once.items():
        assert tokens_of(ahead[name]) == tokens_of(outputs)
        assert len(tokens_of(outputs)) == 20


def test_a_share_of_a_gpu_that_is_not_there(path: Path) -> None:
    with pytest.raises(
        ConfigError, match="--gpu-memory-utilization is for CUDA, not for cpu; use --kv-cache"
    ):
        runner(path, gpu_memory_utilization=0.5)
