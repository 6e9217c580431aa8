"""The arguments of the Ray application: sorted, checked, completed, or refused with the cure."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from gqa_serve.config import EngineConfig, ServerConfig
from gqa_serve.deploy.ray_settings import _REFUSED, RaySettings, Settings, read_arguments
from gqa_serve.errors import ConfigError


def read(**arguments: Any) -> Settings:
    return read_arguments({"model": "demo", **arguments})


def test_each_argument_finds_its_place() -> None:
    settings = read(max_num_seqs="32", served_model_name="a,b", kv_cache_memory="1GiB", min_replicas="2")
    assert (settings.engine.model, settings.engine.max_num_seqs) == ("demo", 32)
    assert settings.engine.kv_cache_memory == 2**30
    assert settings.server.served_model_name == ("a", "b")
    assert (settings.ray.min_replicas, settings.ray.most_replicas) == (2, 2)
    assert read(**{"max-replicas": 4}).ray.most_replicas == 4  # as on a command line


def test_names_are_unique_so_that_an_argument_has_one_meaning() -> None:
    names = [
        field.name
        for config in (EngineConfig, ServerConfig, RaySettings)
        for field in dataclasses.fields(config)
    ]
    assert len(names) == len(set(names))


def test_targets_follow_the_engine() -> None:
    ray = read(max_num_seqs=32, max_num_batched_tokens=1024).ray
    assert (ray.target_requests, ray.target_waiting_tokens) == (16, 4096)
    ray = read(target_requests=3, target_waiting_tokens=5).ray
    assert (ray.target_requests, ray.target_waiting_tokens) == (3, 5)


@pytest.mark.parametrize(
    ("given", "device", "threads", "cpus", "gpus"),
    [
        ({}, "cpu", 1, 1, 0),
        ({"cpus": 8}, "cpu", 8, 8, 0),
        ({"threads": 4}, "cpu", 4, 4, 0),
        ({"threads": 4, "cpus": 6}, "cpu", 4, 6, 0),
        ({"tensor_parallel_size": 2, "cpus": 8}, "cpu", 4, 8, 0),
        ({"tensor_parallel_size": 2, "threads": 3}, "cpu", 3, 6, 0),
        ({"device": "cuda"}, "cuda", None, 1, 1),
        ({"device": "cuda", "tensor_parallel_size": 4}, "cuda", None, 4, 4),
        ({"gpus": 1}, "cuda", None, 1, 1),
        ({"gpus": 1, "cpus": 4}, "cuda", None, 4, 1),
        ({"device": "mps"}, "mps", None, 1, 0),
    ],
)
def test_an_engine_uses_what_ray_accounts_for_it(
    given: dict[str, Any], device: str, threads: int | None, cpus: int, gpus: int
) -> None:
    settings = read(**given)
    assert (settings.engine.device, settings.engine.threads) == (device, threads)
    assert (settings.ray.cpus, settings.ray.gpus) == (cpus, gpus)


def test_what_ray_would_not_account_for_is_refused() -> None:
    with pytest.raises(ConfigError, match="8 threads on cpus=4"):
        read(cpus=4, threads=4, tensor_parallel_size=2)
    with pytest.raises(ConfigError, match="2 threads on cpus=1"):
        read(cpus=1, tensor_parallel_size=2)
    with pytest.raises(ConfigError, match="gpus=1 are of no use with device=cpu"):
        read(device="cpu", gpus=1)
    with pytest.raises(ConfigError, match="leave gpus out"):
        read(device="cuda", gpus=3)


@pytest.mark.parametrize("name", sorted(_REFUSED))
def test_what_makes_no_sense_there_is_refused_with_the_cure(name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name} is not for Ray. .+"):
        read(**{name: "1"})


def test_refused_names_exist_or_will() -> None:
    fields = {field.name for config in (EngineConfig, ServerConfig) for field in dataclasses.fields(config)}
    assert set(_REFUSED) - fields <= {"config", "data_parallel_size"}


def test_mistakes_are_named() -> None:
    with pytest.raises(ConfigError, match=r"no setting 'min_replica'.*Did you mean 'min_replicas'"):
        read(min_replica=1)
    with pytest.raises(ConfigError, match="min_replicas must be at least 1"):
        read(min_replicas=0)
    with pytest.raises(ConfigError, match=r"max_replicas \(2\) must be at least min_replicas \(3\)"):
        read(min_replicas=3, max_replicas=2)
    with pytest.raises(ConfigError, match="Which model"):
        read_arguments({"min_replicas": 1})
    with pytest.raises(ConfigError, match="cpus must be a whole number"):
        read(cpus="a few")


def test_nothing_is_read_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GQA_SERVE_MAX_NUM_SEQS", "3")
    assert read().engine.max_num_seqs == EngineConfig().max_num_seqs


def test_responses_are_not_stored() -> None:
    assert read().server.max_stored_responses == 0


def test_every_argument_of_rays_is_documented() -> None:
    text = (Path(__file__).parents[2] / "docs" / "scaling.md").read_text(encoding="utf-8")
    section = text[text.index("## Several machines: Ray Serve") :]
    rows = dict(re.findall(r"^\| `(\w+)` \| (.+?) \|", section, re.MULTILINE))
    fields = {field.name: field.default for field in dataclasses.fields(RaySettings)}
    assert list(rows) == list(fields)
    for name, default in fields.items():
        if default is not None:
            assert float(rows[name]) == default, name


def test_serving_without_ray_needs_no_ray() -> None:
    run("import gqa_serve.server, gqa_serve.deploy.ray_settings; assert 'ray' not in sys.modules")


def test_without_ray_the_cure_is_named() -> None:
    result = run("sys.modules['ray'] = None; import gqa_serve.deploy.ray_app", status=1)
    assert result.endswith("gqa_serve.deploy.ray_app needs Ray Serve: pip install 'gqa-serve[ray]'\n")


def run(statement: str, status: int = 0) -> str:
    """What a fresh interpreter says on standard error."""
    command = [sys.executable, "-c", f"import sys; {statement}"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == status, done.stderr
    return done.stderr
