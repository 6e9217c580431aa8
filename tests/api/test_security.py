"""What docs/security.md claims and no other test shows: keys stay secret, the page names tests that exist."""

from __future__ import annotations

import logging
import re
from pathlib import Path

import httpx2
import pytest
from fake_engine import FakeEngine, Script, serving
from test_api_raw import CHAT, HI, TEXT

from gqa_serve.api.access import ApiKeys
from gqa_serve.config import ServerConfig

KEY = "sk-secret-0123456789"
ROOT = Path(__file__).parents[2]


def test_keys_are_kept_as_digests() -> None:
    guard = ApiKeys(lambda scope, receive, send: None, [KEY])  # type: ignore[arg-type,return-value]
    assert KEY not in repr(vars(guard))
    assert KEY not in repr(ServerConfig(api_key=(KEY,)))
    assert KEY not in str(ServerConfig(api_key=(KEY,)))


def test_a_key_is_shown_nowhere(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    """Not in answers, errors, metrics or logs, tracebacks included; nor is a wrong one that somebody sent."""
    wrong = "sk-wrong-9876543210"
    file = tmp_path / "keys"
    file.write_text(KEY)
    said = []
    engine = FakeEngine()
    with caplog.at_level(logging.DEBUG), serving(engine, api_key_file=str(file), log_level="debug") as server:
        for key in (KEY, wrong):
            headers = {"Authorization": f"Bearer {key}", "x-api-key": key}
            paths = ("/metrics", "/v1/models", "/openapi.json", "/load", "/nothing", "/health")
            said += [httpx2.get(server.url + path, headers=headers, verify=False).text for path in paths]
            engine.script = lambda request: Script(fault=RuntimeError("a bug"))
            said += [
                httpx2.post(server.url + path, json=body, headers=headers, verify=False).text
                for path, body in ((CHAT, HI), (TEXT, {"prompt": 3}), (TEXT, {"prompt": "a"}))
            ]
    shown = "\n".join([*said, caplog.text])
    assert "invalid_api_key" in shown
    assert KEY not in shown
    assert wrong not in shown


def test_prompts_and_answers_are_not_logged(caplog: pytest.LogCaptureFixture) -> None:
    engine = FakeEngine()
    with caplog.at_level(logging.DEBUG), serving(engine) as server:
        server.post(CHAT, {"messages": [{"role": "user", "content": "qzsecretprompt"}]})
        server.post(CHAT, {"messages": [{"role": "user", "content": "qzsecretprompt"}], "temperature": -1})
    logged = "\n".join(
        record.getMessage() for record in caplog.records if record.name.startswith("gqa_serve")
    )
    assert "chat" in logged
    assert "qzsecretprompt" not in logged
    assert "Hello world" not in logged


def test_the_page_names_tests_that_exist() -> None:
    page = (ROOT / "docs" / "security.md").read_text(encoding="utf-8")
    named = re.findall(r"`(test_\w+)\.py::(test_\w+)`", page)
    assert len(named) > 20
    for file, name in named:
        (path,) = ROOT.joinpath("tests").rglob(f"{file}.py")
        assert re.search(rf"^(async )?def {name}\(", path.read_text(encoding="utf-8"), re.MULTILINE), (
            file,
            name,
        )
