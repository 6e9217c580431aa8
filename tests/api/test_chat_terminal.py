"""The terminal chat: over HTTP against the real application, and with a model in the process."""

from __future__ import annotations

import contextlib
import io
import os
import pty
import select
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import httpx2
import pytest
from fake_engine import FakeEngine, Script, Server, wait_until
from rich.console import Console

from gqa_serve.chat import ChatError, HttpSource, run_chat
from gqa_serve.engine.request import EngineRequest, SamplingParams


def typing(*lines: str | BaseException) -> Callable[[], str]:
    """A user who types these lines, then Ctrl-D."""
    left = iter(lines)

    def read_line() -> str:
        line = next(left, EOFError())
        if isinstance(line, BaseException):
            raise line
        return line

    return read_line


class Screen:
    def __init__(self) -> None:
        self.file = io.StringIO()
        self.console = Console(file=self.file, width=100)

    @property
    def text(self) -> str:
        return self.file.getvalue()


def spoken(request: EngineRequest) -> str:
    return bytes(token for token in request.prompt if token < 256).decode()


@pytest.mark.parametrize("suffix", ["", "/", "/v1", "/v1/"])
def test_conversation_over_http(server: Server, engine: FakeEngine, suffix: str) -> None:
    screen = Screen()
    run_chat(
        url=server.url.removeprefix("http://") + suffix,
        system="Be brief.",
        options={"temperature": 0.0, "max_tokens": 50},
        console=screen.console,
        read_line=typing("Hi", "", "And then?", "/reset", "Anew"),
    )
    assert screen.text.count("Hello world\n") == 3
    first, second, third = engine.requests
    assert spoken(first) == "system\nBe brief.\nuser\nHi\nassistant\n"
    assert spoken(second).startswith("system\nBe brief.\nuser\nHi\nassistant\nHello world\nuser\nAnd then?")
    assert spoken(third) == "system\nBe brief.\nuser\nAnew\nassistant\n"
    assert (first.params.temperature, first.params.max_tokens) == (0, 50)


def test_options_left_out_are_the_servers(server: Server, engine: FakeEngine) -> None:
    run_chat(url=server.url, console=Screen().console, read_line=typing("Hi"))
    assert engine.requests[0].params.temperature == 1.0
    assert engine.requests[0].params.max_tokens is not None


def test_commands(server: Server, engine: FakeEngine) -> None:
    screen = Screen()
    lines = typing("/help", "/nonsense", KeyboardInterrupt(), "/exit", "never read")
    run_chat(url=server.url, console=screen.console, read_line=lines)
    assert screen.text.count("/reset") == 2  # for /help and for the unknown command
    assert "no command /nonsense" in screen.text
    assert "Ctrl-D" in screen.text
    assert engine.requests == []


def test_an_error_is_shown_and_the_question_forgotten(server: Server, engine: FakeEngine) -> None:
    scripts = iter([Script([], finish="error", error="It broke."), Script(["fine"])])
    engine.script = lambda request: next(scripts)
    screen = Screen()
    run_chat(url=server.url, console=screen.console, read_line=typing("first", "second"))
    assert "It broke." in screen.text
    assert "fine\n" in screen.text
    assert spoken(engine.requests[1]) == "user\nsecond\nassistant\n"


def test_ctrl_c_stops_the_answer_on_the_server(server: Server, engine: FakeEngine) -> None:
    engine.script = lambda request: Script(["Once upon", " a time"], hold_at=1)

    class Impatient(io.StringIO):
        def write(self, text: str) -> int:
            if text == "Once upon":
                super().write(text)
                raise KeyboardInterrupt
            return super().write(text)

    file = Impatient()
    run_chat(url=server.url, console=Console(file=file, width=100), read_line=typing("Tell me a story"))
    assert "(stopped)" in file.getvalue()
    wait_until(lambda: engine.num_running == 0)
    assert engine.ends() == ["abort"]


def test_no_server() -> None:
    with pytest.raises(ChatError, match=r"No server answers at http://127\.0\.0\.1:1\. Start one"):
        run_chat(url="http://127.0.0.1:1", console=Screen().console, read_line=typing())


@pytest.mark.parametrize("url", ["http://[", "http://", "ftp://127.0.0.1", "http://127.0.0.1:99999"])
def test_unusable_urls(url: str) -> None:
    with pytest.raises(ChatError) as caught:
        run_chat(url=url, console=Screen().console, read_line=typing())
    assert not str(caught.value).endswith("..")


def test_not_an_openai_server(server: Server) -> None:
    with pytest.raises(ChatError, match=r"answered 404: Unknown route"):
        run_chat(url=server.url + "/elsewhere", console=Screen().console, read_line=typing())


def test_url_and_model_exclude_each_other() -> None:
    with pytest.raises(ChatError):
        run_chat(console=Screen().console, read_line=typing())


class FakeLLM:
    def __init__(self) -> None:
        self.default_sampling_params = SamplingParams(temperature=0.5, top_k=3)
        self.calls: list[tuple[list[Mapping[str, Any]], SamplingParams | None]] = []
        self.closed = 0

    def chat_stream(
        self, messages: Sequence[Mapping[str, Any]], sampling_params: SamplingParams | None = None
    ) -> Iterator[str]:
        self.calls.append((list(messages), sampling_params))
        try:
            yield "[bold]\x1b[31m"
            yield ":smile:\n\u009b\tend"
        finally:
            self.closed += 1


def test_local_model_prints_text_as_it_is_without_control_characters() -> None:
    llm, screen = FakeLLM(), Screen()
    run_chat(llm=llm, options={"max_tokens": 7}, console=screen.console, read_line=typing("Hi"))
    assert "[bold][31m:smile:\n\tend\n" in screen.text
    ((messages, params),) = llm.calls
    assert messages == [{"role": "user", "content": "Hi"}]
    assert params == SamplingParams(temperature=0.5, top_k=3, max_tokens=7)
    assert llm.closed == 1


PROGRAM = """
from gqa_serve.chat import run_chat
from gqa_serve.engine.request import SamplingParams

class Echo:
    default_sampling_params = SamplingParams()

    def chat_stream(self, messages, sampling_params=None):
        yield f"[heard {messages[-1]['content']}]"

run_chat(llm=Echo())
"""


def test_lines_are_edited_with_arrow_keys_and_the_prompt_stays() -> None:
    pytest.importorskip("readline")
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "80", "INPUTRC": os.devnull}
    environment.pop("NO_COLOR", None)
    controller, terminal = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM], stdin=terminal, stdout=terminal, stderr=terminal, env=environment
    )
    os.close(terminal)
    unread = b""

    def read_until(text: bytes) -> bytes:
        """What came up to and with `text`; what follows it stays for the next call."""
        nonlocal unread
        while text not in unread:
            assert select.select([controller], [], [], 60)[0], unread
            unread += os.read(controller, 4096)
        before, _, unread = unread.partition(text)
        return before

    prompt = b"> \x1b[0m"
    try:
        read_until(prompt)
        os.write(controller, b"ab\x1b[DX\r")  # left, then an X between the letters
        read_until(b"[heard aXb]")
        read_until(prompt)
        os.write(controller, b"\x1b[A\r")  # up: the line before
        assert b"\x01" not in read_until(b"[heard aXb]")
        read_until(prompt)
        os.write(controller, b"\x04")
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()
        os.close(controller)


def test_a_server_that_wants_a_key(server: Server, engine: FakeEngine) -> None:
    screen = Screen()
    run_chat(url=server.url, api_key="k", console=screen.console, read_line=typing("Hi"))
    assert "Hello world" in screen.text
    source = HttpSource(server.url, {})
    with (
        contextlib.closing(source),
        pytest.raises(ChatError, match=r"answered 401: .*Give --api-key, or set"),
    ):
        source._check(httpx2.Response(401, json={"error": {"message": "No key."}}))
