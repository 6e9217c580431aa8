"""Where a model's config comes from: a loopback hub, directories, files, quantized checkpoints."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from hub_server import HubServer, Repo
from huggingface_hub import constants

from gqa_serve.cli import main
from gqa_serve.engine.weights import hub
from gqa_serve.errors import ConfigError, GqaServeError, HubError, ModelError
from gqa_serve.workbench.model_source import group_counts, read_model

CONFIGS = Path(__file__).parent / "configs"
ID = "someone/llama"
CONFIG = (CONFIGS / "llama-3-8b.json").read_bytes()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubServer]:
    with HubServer() as running:
        monkeypatch.setattr(constants, "ENDPOINT", running.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", running.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.delenv("HF_TOKEN", raising=False)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", "/nonexistent/token")
        monkeypatch.setattr(hub, "RETRY_DELAYS_S", (0.0, 0.0))
        running.repos[ID] = Repo({"config.json": CONFIG, "model.safetensors": b"x" * 1000})
        yield running


def test_a_hub_id_costs_its_config_alone(server: HubServer) -> None:
    source = read_model(ID)
    assert source.num_parameters == 8_030_261_248
    assert server.downloads() == ["config.json"]
    assert read_model(ID, revision="main").config == source.config


def test_the_cache_answers_when_the_hub_does_not(server: HubServer) -> None:
    found = read_model(ID)
    server.repos[ID].fail_with = 503
    assert read_model(ID) == found
    assert read_model(ID, offline=True) == found


def test_uptrain_finds_hub_ids_as_the_other_tools_do(
    server: HubServer, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["uptrain", "--model", ID, "--budget-only", "--device", "cuda"]
    assert main([*words, "--offline"]) == 1
    assert "offline mode is on" in capsys.readouterr().err
    assert main([*words, "--revision", "main"]) == 0
    server.repos[ID].fail_with = 404
    assert main([*words, "--teacher", ID, "--offline"]) == 0
    assert "8.03 B" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("repo", "model", "message"),
    [
        (None, "someone/nothing", "neither a local path nor on the hub"),
        (Repo({"config.json": CONFIG}, token="secret"), ID, "is gated; accept its terms"),
        (Repo({"model.gguf": b""}), ID, "has no config.json; use a repository in transformers' layout"),
        (
            Repo({"config.json": CONFIG}, fail_with=503),
            ID,
            "not in the cache and the hub answered with status",
        ),
        (Repo({"config.json": CONFIG}), "no id at all", "neither an existing path nor a valid hub id"),
        (Repo({"config.json": b"{"}), ID, "is not valid JSON"),
        (Repo({"config.json": b'{"model_type": "bert"}'}), ID, "bert"),
    ],
)
def test_what_goes_wrong_with_a_hub(server: HubServer, repo: Repo | None, model: str, message: str) -> None:
    if repo is not None:
        server.repos[ID] = repo
    with pytest.raises(GqaServeError, match=message):
        read_model(model)


def test_revisions_and_offline(server: HubServer) -> None:
    with pytest.raises(HubError, match="has no revision 'v9'"):
        read_model(ID, revision="v9")
    with pytest.raises(HubError, match="not in the cache and offline mode is on"):
        read_model(ID, offline=True)
    with pytest.raises(ConfigError, match="--revision is for models on the hub"):
        read_model(str(CONFIGS / "llama-3-8b.json"), revision="main")


def test_directories_and_files(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(CONFIG)
    assert read_model(str(tmp_path)).config == read_model(str(CONFIGS / "llama-3-8b.json")).config
    for name, message in (
        ("model.safetensors", "no GGUF file and no config.json"),
        ("wrong.gguf", "is empty; download it again"),
        ("empty.json", "is not valid JSON"),
    ):
        (tmp_path / name).write_bytes(b"")
        with pytest.raises(ModelError, match=message):
            read_model(str(tmp_path / name))
    with pytest.raises(ModelError, match="does not exist; check the path"):
        read_model("./nowhere")
    (tmp_path / "folder").mkdir()
    with pytest.raises(ModelError, match=r"config\.json is missing"):
        read_model(str(tmp_path / "folder"))


@pytest.mark.parametrize(
    ("quantized", "bits"),
    [
        ({"quant_method": "awq", "bits": 4, "group_size": 128}, 4),
        ({"quant_method": "gptq", "bits": 8, "group_size": 64}, 8),
        ({"quant_method": "fp8"}, 8),
        (
            {
                "quant_method": "compressed-tensors",
                "format": "pack-quantized",
                "config_groups": {"group_0": {"weights": {"num_bits": 4, "type": "int", "group_size": 32}}},
            },
            4,
        ),
        (
            {
                "quant_method": "compressed-tensors",
                "format": "int-quantized",
                "config_groups": {"group_0": {"weights": {"num_bits": 8, "type": "int"}}},
            },
            8,
        ),
    ],
)
def test_quantized_checkpoints(tmp_path: Path, quantized: dict[str, object], bits: int) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(CONFIG), "quantization_config": quantized}))
    source = read_model(str(path))
    assert source.weights is not None
    assert source.head is not None
    assert (source.weights.bits, source.head.bits) == (bits, 16)


def test_a_quantization_that_is_not_served(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    for quantized, message in ((3, "is not an object"), ({"quant_method": "aqlm"}, "'aqlm' is not served")):
        path.write_text(json.dumps({**json.loads(CONFIG), "quantization_config": quantized}))
        with pytest.raises(ModelError, match=message):
            read_model(str(path))


def test_numbers_of_kv_heads() -> None:
    source = read_model("demo")
    assert (source.num_parameters, group_counts(source.config)) == (134_515_008, [9, 3, 1])
    assert source.with_kv_heads(9).group_size == 1
    with pytest.raises(ConfigError, match="2 KV heads do not divide the 9 heads of demo; use 9, 3, 1"):
        source.with_kv_heads(2)
