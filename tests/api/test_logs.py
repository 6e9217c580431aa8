"""What is in the log: one line a request, as text or as JSON, and never a prompt or a key unless asked."""

from __future__ import annotations

import json
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
from fake_engine import MODEL, FakeEngine, Script, Server, fake_info, serving, wait_until
from scraped import scrape
from test_api_raw import CHAT, chat, get, post, send

from gqa_serve.api import observed
from gqa_serve.logs import JsonFormatter, configure_logging

SECRET = "the moon is made of cheese"


@pytest.fixture
def restored() -> Iterator[None]:
    """The root logger as it was."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    levels = {name: logging.getLogger(name).level for name in list(logging.root.manager.loggerDict)}
    yield
    root.handlers[:], root.level = handlers, level
    for name in logging.root.manager.loggerDict:
        logging.getLogger(name).setLevel(levels.get(name, logging.NOTSET))
    logging.captureWarnings(False)


def fields_of(caplog: pytest.LogCaptureFixture, logger: str) -> list[dict[str, Any]]:
    return [record.fields for record in caplog.records if record.name == logger and hasattr(record, "fields")]


# --- requests ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
def test_the_fields_of_a_request(server: Server, caplog: pytest.LogCaptureFixture, stream: bool) -> None:
    server.engine.script = lambda request: Script(num_cached_tokens=16, queue_s=0.125)
    body = {"messages": [{"role": "user", "content": "Hi"}], "stream": stream, "n": 2}
    with caplog.at_level(logging.INFO):
        reply = send(server, post(CHAT, json.dumps(body).encode(), "x-request-id: trace-1"))
        wait_until(lambda: bool(fields_of(caplog, "gqa_serve.api.account")))
    (fields,) = fields_of(caplog, "gqa_serve.api.account")
    times = {name: fields.pop(name) for name in ("queue_s", "ttft_s", "tpot_s", "e2e_s")}
    assert fields.pop("id") in reply.body.decode()
    num_prompt = fields.pop("prompt")
    assert fields == {
        "request_id": "trace-1", "kind": "chat", "stream": stream, "model": MODEL, "choices": 2, "cached": 16,
        "output": 24, "thinking": 0, "finish": "stop:2", "abort": None,
    }  # fmt: skip
    assert num_prompt > 16
    assert times["queue_s"] == 0.125
    assert 0 <= times["tpot_s"] <= times["ttft_s"] + times["e2e_s"]
    assert times["ttft_s"] <= times["e2e_s"]


def test_refusals_leave_a_line_each_until_there_are_many(
    server: Server, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [1e9]
    monkeypatch.setattr(observed, "REFUSAL_PERIOD_S", 1e6)
    monkeypatch.setattr(observed.time, "monotonic", lambda: clock[0])
    with caplog.at_level(logging.INFO):
        send(server, post(CHAT, b'{"messages": []}', "x-request-id: trace-2"))
        for _ in range(observed.REFUSAL_LINES + 5):
            send(server, get("/nowhere/at/all"))
        assert len(fields_of(caplog, "gqa_serve.api.observed")) == observed.REFUSAL_LINES
        clock[0] += 2e6
        send(server, get("/again"))
        wait_until(lambda: len(fields_of(caplog, "gqa_serve.api.observed")) == observed.REFUSAL_LINES + 1)
    first, second, *_, last = fields_of(caplog, "gqa_serve.api.observed")
    assert first["request_id"] == "trace-2"
    assert (first["path"], first["status"], first["reason"]) == (CHAT, 400, "bad_request")
    assert first["param"] == "messages"
    assert (second["path"], second["status"], second["reason"]) == ("/nowhere/at/all", 404, "not_found")
    assert last["left_out"] == 6


def test_a_path_cannot_forge_lines(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        send(server, get("/x%0aINFO%20forged%1b[31m"))
        wait_until(lambda: "refused" in caplog.text)
    assert all("\n" not in record.getMessage() for record in caplog.records)
    assert "\x1b" not in caplog.text


@pytest.mark.parametrize("log_prompts", [False, True])
@pytest.mark.parametrize("stream", [False, True])
def test_words_only_if_asked_for(caplog: pytest.LogCaptureFixture, log_prompts: bool, stream: bool) -> None:
    answer = "Green.\nOr blue. " * 400
    script = Script([answer[:10], answer[10:]])
    engine = FakeEngine(lambda request: script)
    with serving(engine, log_prompts=log_prompts) as server, caplog.at_level(logging.DEBUG, "gqa_serve"):
        chat(server, messages=[{"role": "user", "content": SECRET}], stream=stream, max_tokens=20)
        server.engine.script = lambda request: Script([], finish="error", error="x")
        chat(server, messages=[{"role": "user", "content": SECRET}], stream=stream)
        chat(server, messages=[{"role": "user", "content": SECRET}], temperature=99)
        wait_until(lambda: scrape(server.url).get("request_success_total", finished_reason="error") == 1)
    assert (SECRET in caplog.text) is log_prompts
    assert ("Green." in caplog.text) is log_prompts
    if log_prompts:
        (line, failed) = [one for one in fields_of(caplog, "gqa_serve.api.account") if "prompts" in one]
        assert SECRET in line["prompts"][0]
        assert line["answers"] == [answer[:20]]
        assert failed["answers"] == [""]
        assert all("\n" not in record.getMessage() for record in caplog.records if not record.exc_info)


def test_long_words_are_shortened(caplog: pytest.LogCaptureFixture) -> None:
    script = Script(["a" * 300] * 12)
    with serving(FakeEngine(lambda request: script), log_prompts=True) as server:
        server.engine.model_info = fake_info(max_model_len=20_000)
        with caplog.at_level(logging.INFO):
            chat(server, messages=[{"role": "user", "content": "x" * 9000}])
            wait_until(lambda: any("prompts" in one for one in fields_of(caplog, "gqa_serve.api.account")))
    (line,) = [one for one in fields_of(caplog, "gqa_serve.api.account") if "prompts" in one]
    assert len(line["prompts"][0]) <= 2000
    assert line["answers"] == ["a" * 2000]


# --- the two formats ---------------------------------------------------------------------------------------


def test_json_is_one_ascii_object_a_line(restored: None, capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging("info", "json", process="engine")
    logger = logging.getLogger("gqa_serve.test")
    logger.info("two\nlines %s", "caf\u00e9 \ud800", extra={"fields": {"id": "x", "abort": None, "n": 2}})
    try:
        raise ValueError("deep\nbelow")
    except ValueError:
        logger.exception("went wrong")
    logging.getLogger("uvicorn.error").error("its own")
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        logging.captureWarnings(True)  # anew: pytest and catch_warnings put their own in place
        warnings.warn("so does this", stacklevel=1)
    lines = capsys.readouterr().err.splitlines()
    assert all(line.isascii() for line in lines)
    first, second, third, fourth = map(json.loads, lines)
    assert first["message"] == "two\nlines caf\u00e9 \ud800"
    assert (first["level"], first["logger"], first["process"]) == ("info", "gqa_serve.test", "engine")
    assert (first["id"], first["n"], "abort" in first) == ("x", 2, False)
    assert first["time"].endswith("+00:00")
    assert "ValueError: deep\nbelow" in second["exception"]
    assert (third["logger"], third["level"]) == ("uvicorn.error", "error")
    assert "so does this" in fourth["message"]


def test_what_was_lost_is_told_in_the_same_format(restored: None, monkeypatch: pytest.MonkeyPatch) -> None:
    read, write = os.pipe()
    with os.fdopen(write, "w") as file, os.fdopen(read, "rb", 0) as reader:
        monkeypatch.setattr("sys.stderr", file)
        configure_logging("info", "json", process="engine")
        logger = logging.getLogger("gqa_serve.test")
        for number in range(5000):  # far more than a pipe holds
            logger.info("line %d, which nobody reads", number)
        reader.read(1 << 20)
        logger.info("again")
        lines = [line for line in reader.read(1 << 20).splitlines() if line]
    told, again = map(json.loads, lines)
    assert (told["level"], told["process"], again["message"]) == ("warning", "engine", "again")
    assert told["message"].endswith(" messages could not be written here.")


def test_text_as_ever(restored: None, capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging("info")
    logging.getLogger("gqa_serve.test").info("a line", extra={"fields": {"id": "x"}})
    assert capsys.readouterr().err.endswith("INFO    gqa_serve.test: a line\n")


def test_one_of_several_engines_names_its_replica(restored: None, capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging("info", process="engine", replica=1)
    logging.getLogger("gqa_serve.test").info("a line")
    assert capsys.readouterr().err.endswith("INFO    gqa_serve.test [replica 1]: a line\n")
    configure_logging("info", "json", process="engine", replica=0)
    logging.getLogger("gqa_serve.test").info("a line")
    line = json.loads(capsys.readouterr().err)
    assert (line["process"], line["replica"], line["message"]) == ("engine", 0, "a line")


def test_debug_shows_no_answers(restored: None) -> None:
    configure_logging("debug")
    assert not logging.getLogger("sse_starlette.sse").isEnabledFor(logging.DEBUG)
    assert logging.getLogger("gqa_serve.api").isEnabledFor(logging.DEBUG)


def test_what_cannot_be_written_as_json_is_shown(restored: None) -> None:
    record = logging.LogRecord("n", logging.INFO, "f", 1, "m", (), None)
    record.fields = {"path": sys}
    assert "module" in json.loads(JsonFormatter("api").format(record))["path"]


def test_a_message_that_cannot_be_formatted_is_a_line_all_the_same() -> None:
    record = logging.LogRecord("x", logging.ERROR, __file__, 1, "%d of %d", ("a",), None)
    assert json.loads(JsonFormatter("api").format(record))["message"] == "%d of %d ('a',)"
