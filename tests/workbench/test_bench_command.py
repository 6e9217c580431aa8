"""`gqa-serve bench` as users run it: over a replayed server, over the demo, interrupted, and misused."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from scripted_server import Step, obedient, scripted

from gqa_serve.cli import main
from gqa_serve.engine.weights.hub import resolve_model
from gqa_serve.errors import ModelError
from gqa_serve.workbench.bench.selftest_command import replay_server
from gqa_serve.workbench.records import read_records
from gqa_serve.workbench.trace import read_trace

if TYPE_CHECKING:
    from demo_server import RunningServer

SMALL = ("--prompt-len", "uniform:30-60", "--output-len", "8", "--num-requests", "6")


@pytest.fixture(scope="module")
def replay() -> Iterator[str]:
    with replay_server() as url:
        yield url


def test_a_run_writes_everything_it_measured(
    replay: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = {name: tmp_path / f"x.{name}" for name in ("json", "html", "records", "trace")}
    words = ["bench", "--url", replay, *SMALL, "--rate", "200", "--slo-ttft", "5s", "--label", "mine"]
    words += ["--json", str(paths["json"]), "--html", str(paths["html"])]
    words += ["--records", str(paths["records"]), "--write-trace", str(paths["trace"])]
    assert main(words) == 0
    shown = capsys.readouterr().out
    assert "Prompts had exactly the wanted tokens" in shown
    assert "KV-cache demand" in shown

    document = json.loads(paths["json"].read_text())
    assert (document["label"], document["tool"], document["model"]) == ("mine", "bench", "replay")
    assert document["settings"]["rate"] == 200
    summary = document["summary"]
    assert (summary["num_requests"], summary["num_failed"], summary["output_tokens"]) == (6, 0, 48)
    assert summary["goodput"] == pytest.approx(summary["request_rate"])
    records, trace = read_records(paths["records"]), read_trace(paths["trace"])
    assert [record.prompt_tokens for record in records] == [one.prompt_tokens for one in trace]
    assert summary["prompt_tokens"] == sum(record.prompt_tokens for record in records)
    assert paths["html"].read_text().count("<svg") == 4

    again = ["bench", "--url", replay, "--trace", str(paths["trace"]), "--speed", "2", "--label", "again"]
    assert main([*again, "--json", str(tmp_path / "again.json")]) == 0
    assert main(["bench", "compare", str(paths["json"]), str(tmp_path / "again.json")]) == 0
    assert "ratio to mine" in capsys.readouterr().out


def test_an_interrupted_run_reports_what_it_measured(tmp_path: Path) -> None:
    """Ctrl-C with the 20th request, while that one and another run."""
    words = ["bench", "--concurrency", "2", "--output-len", "8", "--num-requests", "1000", "--warmup", "0"]
    words += ["--records", str(tmp_path / "r"), "--json", str(tmp_path / "j")]

    async def go() -> str:
        def script(request: dict[str, Any]) -> list[Step]:
            if request["max_tokens"] < 8:
                return obedient(request)  # a question of the calibration
            asked.append(request)
            if len(asked) == 20:
                process.send_signal(signal.SIGINT)
            return [*obedient(request)[:-1], 30.0] if len(asked) >= 19 else obedient(request)

        asked: list[dict[str, Any]] = []
        async with scripted(script) as server:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "gqa_serve.cli", *words, "--url", server.url),
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
            )
            shown, _ = await process.communicate()
        assert process.returncode == 0, shown
        return shown.decode()

    assert "Interrupted: 18 of 1000 requests had ended; 2 that were running" in " ".join(
        asyncio.run(go()).split()
    )
    assert json.loads((tmp_path / "j").read_text())["interrupted"] is True
    records = read_records(tmp_path / "r")
    assert len(records) == 18
    assert all(record.error is None and len(record.token_s) == 8 for record in records)


def test_saturation_of_a_server_without_a_limit_stops_at_the_highest_rate(
    replay: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["bench", "saturate", "--url", replay, *SMALL, "--slo-e2e", "20s", "--min-seconds", "0.1"]
    words += [
        "--start-rate",
        "50",
        "--max-rate",
        "150",
        "--json",
        str(tmp_path / "j"),
        "--html",
        str(tmp_path / "h"),
    ]
    assert main(words) == 0
    document = json.loads((tmp_path / "j").read_text())
    assert (document["max_rate"], document["failed_rate"]) == (150, None)
    assert [point["rate"] for point in document["points"]] == [50, 100, 150]
    assert "no higher rate was tried that failed" in " ".join(capsys.readouterr().out.split())
    assert (tmp_path / "h").read_text().count("<svg") == 4


def test_an_objective_that_nothing_keeps_is_said(replay: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["bench", "saturate", "--url", replay, "--output-len", "4", "--num-requests", "3"]
    words += ["--body", '{"replay_interval_s": 0.02}', "--min-seconds", "1e-6", "--start-rate", "1e6"]
    assert main([*words, "--slo-ttft", "1ms"]) == 0
    assert "are wanted): loosen them, or use a faster server" in " ".join(capsys.readouterr().out.split())


def test_the_selftest_sees_every_event(tmp_path: Path) -> None:
    words = ["bench", "selftest", "--streams", "8", "--events", "20", "--json", str(tmp_path / "j")]
    assert main(words) == 0
    (rows,) = json.loads((tmp_path / "j").read_text())["tables"].values()
    assert [row["name"] for row in rows] == ["one by one", "as fast as they come"]


def test_the_demo_server_is_measured(
    demo_server: RunningServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exact prompts, forced lengths, shared prefixes and conversations, through the real chat template."""
    words = ["bench", "--url", demo_server.url, "--endpoint", "chat", "--turns", "2", "--num-requests", "4"]
    words += ["--prompt-len", "uniform:80-90", "--output-len", "8", "--prefixes", "1", "--prefix-len", "64"]
    words += ["--records", str(tmp_path / "r"), "--json", str(tmp_path / "j"), "--model-config", "demo"]
    assert main(words) == 0
    records = read_records(tmp_path / "r")
    assert [record.error for record in records] == [None] * 4
    assert {record.output_tokens for record in records} == {8}
    later = [record for record in records if record.turn]
    # A later turn finds at least the whole blocks of the turn before it in the cache.
    assert all((record.cached_tokens or 0) >= 64 for record in later)
    assert "Prompts had" in capsys.readouterr().out
    rows = json.loads((tmp_path / "j").read_text())["tables"]["KV-cache demand"]
    assert rows[0]["mean_bytes"] == pytest.approx(rows[0]["mean"] * 2 * 30 * 3 * 64 * 2)  # SmolLM2-135M


@pytest.mark.slow
def test_a_server_of_its_own_is_measured_and_stopped(tmp_path: Path) -> None:
    words = [
        "bench",
        "--model",
        "demo",
        *SMALL,
        "--json",
        str(tmp_path / "j"),
        "--",
        "--kv-cache-memory",
        "256MiB",
    ]
    assert main(words) == 0
    assert json.loads((tmp_path / "j").read_text())["summary"]["num_failed"] == 0


@pytest.mark.parametrize(
    ("words", "cure"),
    [
        ([], "Give --url of a running server, or --model"),
        (["--url", "h", "--model", "demo"], "not both"),
        (["--url", "h", "--", "--port", "1"], "with --url it runs already"),
        (["--url", "h", "--concurrency", "0"], "--concurrency must be 1 or more"),
        (["--url", "h", "--slo-ttft", "500"], "a time like 500ms or 2s"),
        (["--url", "h", "--body", "{"], "--body is not JSON"),
        (["--url", "h", "--body", '{"n": 2}'], "--body can't set n"),
        (["--url", "h", "--timeout", "0"], "--timeout"),
        (["--url", "h", "--warmup", "-1"], "--warmup"),
        (["--url", "h", "--records", "/no/such/folder/x"], "folder that exists"),
        (["--url", "h", "--model-config", "no/such/thing.json"], "no/such/thing.json"),
        (["--url", "http://127.0.0.1:9"], "Start one with: gqa-serve --model demo"),
        (["compair"], "compare"),
        (["saturate", "--url", "h"], "--slo-ttft"),
        (["saturate", "--url", "h", "--slo-tpot", "50ms"], "give --slo-ttft or --slo-e2e too"),
        (["saturate", "--url", "h", "--slo-ttft", "1s", "--rate", "3"], "leave out --rate"),
        (["saturate", "--url", "h", "--slo-ttft", "1s", "--attainment", "1.5"], "at most 1"),
        (["selftest", "--events", "1"], "--events 2 or more"),
    ],
)
def test_misuse_is_told_with_the_cure(
    words: list[str], cure: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", *words]) == 1
    error = capsys.readouterr().err
    assert error.startswith("gqa-serve: error: ")
    assert cure in error


@pytest.mark.parametrize("command", [[], ["compare"], ["saturate"], ["selftest"]])
def test_help_needs_nothing_and_shows_examples(command: list[str]) -> None:
    code = f"from gqa_serve.cli import main; main({['bench', *command, '--help']!r})"
    heavy = "{'torch', 'scipy', 'matplotlib'}"
    check = f"import sys\ntry:\n {code}\nfinally:\n assert not {heavy} & set(sys.modules)"
    found = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert "gqa-serve bench" in found.stdout


def test_a_dataset_is_sent_as_it_is_and_counted(
    replay: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        resolve_model("demo")
    except ModelError as error:
        pytest.skip(str(error))
    path = tmp_path / "own.jsonl"
    path.write_text('{"prompt": "how are you today", "output_tokens": 9, "output": "fine thanks"}\n')
    words = ["bench", "--url", replay, "--dataset", str(path), "--num-requests", "3"]
    assert main(words) == 1
    assert "--tokenizer" in capsys.readouterr().err
    words += ["--tokenizer", "demo", "--records", str(tmp_path / "r"), "--concurrency", "1"]
    assert main(words) == 0
    assert "Your texts have 4.0 tokens on average" in " ".join(capsys.readouterr().out.split())
    records = read_records(tmp_path / "r")
    assert [(record.prompt_tokens, record.output_tokens) for record in records] == [(4, 2)] * 3
