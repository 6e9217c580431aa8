"""Settings from flags, environment and file: one class, one precedence, errors that name their source."""

from __future__ import annotations

import argparse
import runpy
from pathlib import Path

import pytest

from gqa_serve.config import EngineConfig, ServerConfig, add_flags, collect, parse_size
from gqa_serve.errors import ConfigError


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
        "max_num_batched_tokens": "99", "max_waiting": "5", "kv_cache_memory": "1MiB",
        "prefix_caching": "false", "host": "h", "port": "9", "served_model_name": "n",
        "chat_template": "t", "max_body_bytes": "2MiB", "drain_timeout": "1.5", "log_level": "debug",
    }  # fmt: skip
    by_env = load(environ={f"GQA_SERVE_{name.upper()}": value for name, value in values.items()})
    file = tmp_path / "settings.yaml"
    file.write_text("".join(f"{name.replace('_', '-')}: {value}\n" for name, value in values.items()))
    flags = " ".join(
        ("--offline" if name == "offline" else "--no-prefix-caching")
        if name in ("offline", "prefix_caching")
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
        ("--max-num-batched-tokens 8", {}, "must be at least --max-num-seqs"),
        ("", {"GQA_SERVE_OFFLINE": "maybe"}, "GQA_SERVE_OFFLINE must be true or false"),
        ("", {"GQA_SERVE_PORT": "tcp://10.0.0.1:8000"}, "enableServiceLinks"),
        ("--config /nowhere.yaml", {}, "/nowhere.yaml: No such file"),
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


def test_help_has_every_setting_and_its_default() -> None:
    parser = argparse.ArgumentParser()
    add_flags(parser, EngineConfig, ServerConfig)
    text = " ".join(parser.format_help().split())
    for config in (EngineConfig, ServerConfig):
        for name in config.__dataclass_fields__:
            assert f"--{name.replace('_', '-')}" in text
    assert "tokens per KV block (16)" in text


def test_the_page_of_settings_is_up_to_date() -> None:
    pages = Path(__file__).parents[1] / "docs"
    scope = runpy.run_path(str(pages / "make_configuration.py"))
    assert (pages / "configuration.md").read_text(encoding="utf-8") == scope["page"]()
