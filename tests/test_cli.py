"""The command line: help that helps, errors in one sentence with exit status 1."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from gqa_serve import __version__, cli


def run(*words: str, **environ: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "gqa_serve.cli", *words],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={"PATH": "", "COLUMNS": "100", **environ},
    )


@pytest.mark.parametrize("words", [["--help"], ["serve", "--help"]])
def test_help_is_grouped_and_short(words: list[str]) -> None:
    result = run(*words)
    assert result.returncode == 0
    for heading in (
        "model:",
        "memory:",
        "limits:",
        "server:",
        "observability:",
        "commands: serve (default), chat",
    ):
        assert heading in result.stdout
    assert len(result.stdout.splitlines()) < 140


def test_chat_has_its_own_help() -> None:
    result = run("chat", "--help")
    assert result.returncode == 0
    assert "--url" in result.stdout
    assert "--port" not in result.stdout


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out.strip() == f"gqa-serve {__version__}"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "Which model?"),
        (["--model", "/nowhere/at/all"], "/nowhere/at/all"),
        (["--model", "demo", "--block-size", "0"], "--block-size must be at least 1"),
        (["--model", "demo", "--host", "256.1.1.1"], "Cannot listen on 256.1.1.1:8000"),
        (["--model", "x" * 5000], "File name too long"),
        (["serv", "--model", "demo"], "There is no command 'serv'. Did you mean 'serve'?"),
        (["Qwen/Qwen3-0.6B"], "A model is given as --model Qwen/Qwen3-0.6B."),
        (["--model", "demo", "--drain-timeout", "nan"], "--drain-timeout must be a finite number"),
        (["chat"], "Give --url of a running server, or --model"),
        (["chat", "--url", ""], "--url is empty"),
        (["chat", "--url", "http://127.0.0.1:9", "--dtype", "float32"], "leave out --dtype, or give --model"),
        (["chat", "--url", "http://127.0.0.1:9", "--config", "f"], "leave out --config, or give --model"),
        (["chat", "--model", "demo", "--api-key", "k"], "--api-key is for a server"),
        (["chat", "--model", "demo", "--log-level", "loud"], "--log-level must be one of debug"),
        (["chat", "--model", "demo", "--chat-template", "/nowhere.jinja"], "'/nowhere.jinja' is neither"),
        (["chat", "--url", "http://127.0.0.1:9", "--model", "demo"], "either --url or --model"),
        (["chat", "--url", "http://127.0.0.1:9"], "127.0.0.1:9"),
    ],
)
def test_mistakes_are_one_sentence_and_status_1(words: list[str], says: str) -> None:
    result = run(*words)
    assert result.returncode == 1, result.stderr
    assert result.stderr.startswith("gqa-serve: error: ")
    assert says in result.stderr
    assert "Traceback" not in result.stderr
    assert not result.stderr.rstrip().endswith("..")
    assert len(result.stderr.strip().splitlines()) == 1


def test_a_port_in_use_is_said(tmp_path: Path) -> None:
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        result = run("--model", str(tmp_path), "--port", str(taken.getsockname()[1]))
    assert result.returncode == 1
    assert "Choose another --port" in result.stderr


def test_unknown_flags_are_refused() -> None:
    result = run("--model", "demo", "--no-such-flag")
    assert result.returncode == 2
    assert "--no-such-flag" in result.stderr


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--modle", "demo"], "--modle: Did you mean --model?"),
        (["--model", "demo", "--prot=80"], "--prot: Did you mean --port?"),
        (["chat", "--ulr", "http://127.0.0.1:9"], "--ulr: Did you mean --url?"),
    ],
)
def test_flags_with_typos_get_a_hint(words: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(words)
    assert caught.value.code == 2
    assert says in " ".join(capsys.readouterr().err.split())


def test_a_defect_keeps_its_traceback_and_asks_for_a_report(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(words: list[str]) -> None:
        raise ZeroDivisionError("oops")

    monkeypatch.setattr(cli, "_serve", broken)
    assert cli.main([]) == 1
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[0].startswith("Traceback")
    assert "ZeroDivisionError: this is a defect" in lines[-1]
    assert "please report" in lines[-1]


@pytest.mark.parametrize(("flag", "sent"), [(["--api-key", "flag"], "flag"), ([], "variable")])
def test_the_key_for_a_server(flag: list[str], sent: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from gqa_serve import chat

    calls: list[dict[str, object]] = []
    monkeypatch.setattr(chat, "run_chat", lambda **options: calls.append(options))
    monkeypatch.setenv("OPENAI_API_KEY", "variable")
    monkeypatch.setenv("GQA_SERVE_PORT", "tcp://10.0.0.1:80")  # is serve's alone
    assert cli.main(["chat", "--url", "http://127.0.0.1:9", *flag]) == 0
    assert [call["api_key"] for call in calls] == [sent]
