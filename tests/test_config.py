"""Settings from flags, environment and file: one class, one precedence, errors that name their source."""

from __future__ import annotations

import argparse
import runpy
from pathlib import Path

import pytest

from gqa_serve.config import (
    ChatConfig,
    EngineConfig,
    ServerConfig,
    collect,
    engine_environment,
    omp_num_threads,
    openai_api_key,
)
from gqa_serve.errors import ConfigError
from gqa_serve.settings import add_flags, flag_of, from_settings, parse_size


def load(words: str = "", environ: dict[str, str] | None = None) -> tuple[EngineConfig, ServerConfig]:
    parser = argparse.ArgumentParser()
    add_flags(parser, EngineConfig, ServerConfig)
    engine, server = collect(
        [EngineConfig, ServerConfig], vars(parser.parse_args(words.split())), environ or {}
    )
    return engine, server


def test_defaults_need_nothing() -> None:
    engine, server = load()
    assert (engine, server) == (EngineConfig(), ServerConfig())


def test_flags_win_over_environment_over_file(tmp_path: Path) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text(
        "port: 1\nmax-model-len: 100\nblock_size: 32\nserved-model-name: [a, b]\nprefix-caching: off\n"
    )
    environ = {"GQA_SERVE_PORT": "2", "GQA_SERVE_MAX_MODEL_LEN": "200", "GQA_SERVE_CONFIG": str(file)}
    engine, server = load("--port 3", environ)
    assert (server.port, engine.max_model_len, engine.block_size) == (3, 200, 32)
    assert server.served_model_name == ("a", "b")
    assert engine.prefix_caching is False


def test_every_field_is_a_flag_a_variable_and_a_line(tmp_path: Path) -> None:
    values = {
        "model": "m", "revision": "r", "download_dir": "d", "offline": "true", "dtype": "float16",
        "device": "cpu", "seed": "3", "max_model_len": "77", "max_num_seqs": "4", "block_size": "8",
        "backend": "reference", "quantization": "int8", "kv_cache_dtype": "int8", "threads": "3",
        "cpu_isa": "avx2", "deterministic": "true", "enforce_eager": "true",
        "attention_backend": "flashinfer", "gpu_memory_utilization": "0.5",
        "max_num_batched_tokens": "99", "max_waiting": "5", "kv_cache_memory": "1MiB",
        "prefix_caching": "false", "host": "h", "port": "9", "served_model_name": "n",
        "chat_template": "t", "tool_call_parser": "hermes", "reasoning_parser": "think",
        "max_body_bytes": "2MiB", "drain_timeout": "1.5", "log_level": "debug",
        "pooling": "mean",
        "api_key": "k", "api_key_file": "f", "cors_origins": "http://o",
        "root_path": "/r", "max_stored_responses": "7",
        "max_waiting_tokens": "8", "queue_timeout": "2.5", "engine_timeout": "11", "request_timeout": "12",
        "read_timeout": "3", "send_timeout": "4", "max_connections": "13", "key_max_requests": "2",
        "key_tokens_per_minute": "14", "allowed_hosts": "a.example", "ui": "false", "open_metrics": "true",
        "data_parallel_size": "2", "tensor_parallel_size": "3",
        "otlp_endpoint": "http://127.0.0.1:1", "log_format": "json", "log_prompts": "true",
    }  # fmt: skip
    by_env = load(environ={f"GQA_SERVE_{name.upper()}": value for name, value in values.items()})
    file = tmp_path / "settings.yaml"
    file.write_text("".join(f"{name.replace('_', '-')}: {value}\n" for name, value in values.items()))
    flags = " ".join(
        (flag_of(name) if value == "true" else f"--no-{name.replace('_', '-')}")
        if value in ("true", "false")
        else f"--{name.replace('_', '-')} {value}"
        for name, value in values.items()
    )
    assert by_env == load(f"--config {file}") == load(flags)
    defaults = (EngineConfig(), ServerConfig())
    for config, default in zip(by_env, defaults, strict=True):
        for name in config.__dataclass_fields__:
            assert getattr(config, name) != getattr(default, name), name


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("512MiB", 512 * 2**20),
        ("2GiB", 2**31),
        ("1.5GB", 1_500_000_000),
        ("123", 123),
        (7, 7),
        ("1 KiB", 1024),
    ],
)
def test_sizes_have_units(text: str | int, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    ("words", "environ", "says"),
    [
        ("--kv-cache-memory lots", {}, "--kv-cache-memory: 'lots' is not a size"),
        ("--port x", {}, "--port must be a whole number; got 'x'"),
        ("--port 70000", {}, "--port must be at most 65535"),
        ("--dtype int3", {}, "--dtype must be one of auto, float32"),
        ("--block-size 0", {}, "--block-size must be at least 1"),
        ("--threads 0", {}, "--threads must be at least 1"),
        ("--quantization int3", {}, "--quantization must be one of auto, none, int8, int4, fp8"),
        ("--kv-cache-dtype int4", {}, "--kv-cache-dtype must be one of auto, float32"),
        ("", {"GQA_SERVE_CPU_ISA": "sse2"}, "GQA_SERVE_CPU_ISA must be one of auto, avx2, avx512, amx, neon"),
        ("--max-num-batched-tokens 8", {}, "must be at least --max-num-seqs"),
        ("", {"GQA_SERVE_OFFLINE": "maybe"}, "GQA_SERVE_OFFLINE must be true or false"),
        ("", {"GQA_SERVE_PORT": "tcp://10.0.0.1:8000"}, "enableServiceLinks"),
        ("--config /nowhere.yaml", {}, "/nowhere.yaml: No such file"),
        ("--drain-timeout nan", {}, "--drain-timeout must be a finite number; got nan"),
        ("--drain-timeout inf", {}, "--drain-timeout must be a finite number; got inf"),
        ("--kv-cache-memory " + "9" * 400, {}, "is not a size"),
        ("--kv-cache-memory 99999999TiB", {}, "is not a size"),
        ("--max-num-seqs " + "9" * 5000, {}, "--max-num-seqs must be a whole number"),
        ("", {"GQA_SERVE_PORT": "70000"}, "GQA_SERVE_PORT must be at most 65535"),
        ("", {"GQA_SERVE_DTYPE": "int3"}, "GQA_SERVE_DTYPE must be one of auto"),
        ("", {"GQA_SERVE_NO_PREFIX_CACHING": "1", "GQA_SERVE_PREFIX_CACHING": "1"}, "are one setting"),
        ("", {"GQA_SERVE_NO_OFFLINE": "maybe"}, "GQA_SERVE_NO_OFFLINE must be true or false"),
        ("", {"GQA_SERVE_SERVED_MODEL_NAME": "a,,b"}, "GQA_SERVE_SERVED_MODEL_NAME must be text or a list"),
        ("--cors-origins https://a/", {}, "--cors-origins must be * or origins such as https://"),
        ("--cors-origins a.org", {}, "--cors-origins must be * or origins such as https://"),
        ("--root-path llm", {}, "--root-path must look like /llm"),
        ("--root-path /llm/", {}, "--root-path must look like /llm"),
        ("--root-path /v1", {}, "--root-path must not begin with /v1"),
    ],
)
def test_errors_name_the_setting_and_the_cure(words: str, environ: dict[str, str], says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(words, environ)
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("max-model-lem: 4", "Did you mean 'max-model-len'?"),
        ("- a\n- b", "must hold lines such as"),
        ("a: [", "is not valid YAML"),
        ("port: 1.5", "port must be a whole number"),
        ("port: true", "port must be a whole number"),
        ("port:", "needs a value"),
        ("revision: 1.10", "revision must be text; got 1.1. Put it in quotes."),
        ("revision: 2024-01-02", "Put it in quotes."),
        ("revision: 2024-99-99", "is not valid YAML"),
        ("model: {a: 1}", "settings.yaml: model must be text; got {'a': 1}."),
        ("dtype: [float32]", "settings.yaml: dtype must be text"),
        ("served-model-name: [1]", "served-model-name must be text or a list"),
        ("served-model-name: 1", "served-model-name must be text or a list"),
        ("max-model-len: x", "settings.yaml: max-model-len must be a whole number"),
        ("max-model-len: 0", "settings.yaml: max-model-len must be at least 1"),
        ("max_model_len: 0", "settings.yaml: max_model_len must be at least 1"),
        ("drain-timeout: true", "drain-timeout must be a number"),
        ("drain-timeout: .nan", "drain-timeout must be a finite number"),
        ("port: 1\nport: 2", "port is given twice"),
        ("max-model-len: 1\nmax_model_len: 2", "max_model_len is given twice"),
        ("prefix-caching: on\nno-prefix-caching: on", "no-prefix-caching is given twice"),
        ("1: 2", "unknown setting '1'"),
        ("port: " + "9" * 5000, "is not valid YAML"),
        ("port: [1", "is not valid YAML"),
    ],
)
def test_files_with_mistakes(tmp_path: Path, text: str, says: str) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load(f"--config {file}")
    assert says in str(caught.value)


def test_an_unknown_variable_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    load(environ={"GQA_SERVE_PROT": "8000"})
    assert "GQA_SERVE_PROT names no setting" in caplog.text
    assert "Did you mean GQA_SERVE_PORT?" in caplog.text


def test_an_empty_variable_is_unset(caplog: pytest.LogCaptureFixture) -> None:
    environ = {"GQA_SERVE_PORT": "", "GQA_SERVE_SEED": "", "GQA_SERVE_CONFIG": "", "GQA_SERVE_PROT": ""}
    assert load(environ=environ) == (EngineConfig(), ServerConfig())
    assert caplog.text == ""


def test_switches_can_be_spelled_as_their_no_flag(tmp_path: Path) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text("no-prefix-caching: true\nno-offline: false\n")
    for engine, _ in (
        load(f"--config {file}"),
        load(environ={"GQA_SERVE_NO_PREFIX_CACHING": "1", "GQA_SERVE_NO_OFFLINE": "0"}),
    ):
        assert (engine.prefix_caching, engine.offline) == (False, True)
    engine, _ = load("--prefix-caching", {"GQA_SERVE_NO_PREFIX_CACHING": "1"})
    assert engine.prefix_caching is True


def test_a_command_passes_over_the_settings_of_others(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "both.yaml"
    file.write_text("port: 9\nblock-size: 8\nlog-level: debug\n")
    environ = {"GQA_SERVE_PORT": "tcp://10.0.0.1:80", "GQA_SERVE_CONFIG": str(file)}
    assert collect([EngineConfig], {}, environ) == [EngineConfig(block_size=8)]
    engine, chat = collect([EngineConfig, ChatConfig], {}, environ)
    assert (engine.block_size, chat.log_level, ChatConfig().log_level) == (8, "debug", "warning")
    assert caplog.text == ""
    file.write_text("prot: 9")
    with pytest.raises(ConfigError, match="Did you mean 'port'"):
        collect([EngineConfig], {}, environ)


def test_settings_by_keyword() -> None:
    settings = {"model": Path("m"), "kv_cache_memory": "1KiB", "prefix_caching": False}
    assert from_settings(EngineConfig, settings) == EngineConfig(
        model="m", kv_cache_memory=1024, prefix_caching=False
    )
    with pytest.raises(ConfigError, match=r"no setting 'max_num_seq'\. Did you mean 'max_num_seqs'"):
        from_settings(EngineConfig, {"max_num_seq": 1})
    with pytest.raises(ConfigError, match="seed must be a whole number"):
        from_settings(EngineConfig, {"seed": 1.5})


@pytest.mark.parametrize(
    ("environ", "key"), [({}, None), ({"OPENAI_API_KEY": ""}, None), ({"OPENAI_API_KEY": "k"}, "k")]
)
def test_the_key_of_openais_clients(environ: dict[str, str], key: str | None) -> None:
    assert openai_api_key(environ) == key


@pytest.mark.parametrize(
    ("value", "threads"), [("3", 3), ("4,2", 4), (" 2 ", 2), ("", None), ("0", None), ("many", None)]
)
def test_openmps_own_variable_is_a_default(value: str, threads: int | None) -> None:
    assert omp_num_threads({"OMP_NUM_THREADS": value}) == threads
    assert omp_num_threads({}) is None


def test_help_has_every_setting_and_its_default() -> None:
    parser = argparse.ArgumentParser()
    add_flags(parser, EngineConfig, ServerConfig)
    text = " ".join(parser.format_help().split())
    for config in (EngineConfig, ServerConfig):
        for name in config.__dataclass_fields__:
            assert f"--{name.replace('_', '-')}" in text
    assert "most requests computed at once (128)" in text


def test_the_page_of_settings_is_up_to_date() -> None:
    pages = Path(__file__).parents[1] / "docs"
    scope = runpy.run_path(str(pages / "make_configuration.py"))
    assert (pages / "configuration.md").read_text(encoding="utf-8") == scope["page"]()


@pytest.mark.parametrize(
    ("environ", "spin"),
    [({}, "1000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, None)],
)
def test_the_engine_process_spins_briefly_unless_told(
    monkeypatch: pytest.MonkeyPatch, environ: dict[str, str], spin: str | None
) -> None:
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("SOMETHING_ELSE", "kept")
    result = engine_environment()
    assert result.get("GOMP_SPINCOUNT") == spin
    assert result["SOMETHING_ELSE"] == "kept"
