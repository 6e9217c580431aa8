"""`gqa-serve chat`: a conversation in the terminal, with a server (`--url`) or a model in this process.

Owns the prompt, the commands and the printing; the two `Source`s own where answers come from. Knows the HTTP
API only as any client does. Invariant: an answer that was stopped or failed leaves the history as it was
before the question, except for the text the user has seen.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import json
import sys
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import httpx2
import msgspec
from rich.console import Console
from rich.text import Text

from gqa_serve.engine.request import SamplingParams
from gqa_serve.errors import GqaServeError

Message = dict[str, str]

_PROMPT = "> "
# Bold and cyan. readline needs to know which characters take no room (between \\1 and \\2), or it draws the
# line in the wrong place; rich's own prompt would be unknown to it and vanish when the line is redrawn.
_EDITED_PROMPT = f"\1\33[1;36m\2{_PROMPT}\1\33[0m\2"

HELP = """\
/reset   forget the conversation (a system message stays)
/help    this list
/exit    leave (or Ctrl-D)
Ctrl-C   stop the current answer"""


class ChatError(GqaServeError):
    """The conversation cannot go on; the message says what to do."""


class ChatLLM(Protocol):
    """The part of `LLM` used here."""

    default_sampling_params: SamplingParams

    def chat_stream(
        self, messages: Sequence[Mapping[str, Any]], sampling_params: SamplingParams | None = None
    ) -> Iterator[str]: ...


class Source(Protocol):
    """Something that answers a conversation."""

    def stream(self, messages: list[Message]) -> Iterator[str]:
        """The answer, piece by piece; closing the iterator stops it."""


class LocalSource:
    """A model in this process."""

    def __init__(self, llm: ChatLLM, options: Mapping[str, Any]) -> None:
        self._llm = llm
        self._params = msgspec.structs.replace(llm.default_sampling_params, **options)

    def stream(self, messages: list[Message]) -> Iterator[str]:
        """The answer, piece by piece."""
        yield from self._llm.chat_stream(messages, self._params)


class HttpSource:
    """A server that speaks the OpenAI API. `url` may end in /v1 or not."""

    def __init__(self, url: str, options: Mapping[str, Any], api_key: str | None = None) -> None:
        base = url.rstrip("/").removesuffix("/v1")
        if "://" not in base:
            base = f"http://{base}"
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._base = base
        self._options = options
        # Between two tokens a busy server may think long; connecting must not.
        self._client = httpx2.Client(headers=headers, timeout=httpx2.Timeout(600.0, connect=10.0))
        try:
            self.model = self._first_model()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def _first_model(self) -> str:
        with self._errors():
            response = self._client.get(f"{self._base}/v1/models")
            self._check(response)
            try:
                model: str = response.json()["data"][0]["id"]
            except (ValueError, LookupError, TypeError) as error:
                raise ChatError(
                    f"{self._base} does not list models as an OpenAI-compatible server does."
                ) from error
            return model

    def stream(self, messages: list[Message]) -> Iterator[str]:
        """The answer, piece by piece. Raises ChatError."""
        body = {**self._options, "model": self.model, "messages": messages, "stream": True}
        with (
            self._errors(),
            self._client.stream("POST", f"{self._base}/v1/chat/completions", json=body) as response,
        ):
            if response.status_code != 200:
                response.read()
                self._check(response)
            for line in response.iter_lines():
                if not line.startswith("data:"):
                    continue  # a comment or the blank line between events
                data = line.removeprefix("data:").strip()
                if data == "[DONE]":
                    return
                yield self._text(data)

    @staticmethod
    def _text(data: str) -> str:
        chunk = json.loads(data)
        if error := chunk.get("error"):
            raise ChatError(str(error.get("message", error)))
        choices = chunk.get("choices") or [{}]
        return choices[0].get("delta", {}).get("content") or ""

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        """Network failures as one sentence each."""
        try:
            yield
        except httpx2.ConnectError as error:
            raise ChatError(
                f"No server answers at {self._base}. Start one with: gqa-serve --model demo"
            ) from error
        except (httpx2.HTTPError, httpx2.InvalidURL, ValueError) as error:
            reason = str(error).rstrip(".") or type(error).__name__
            raise ChatError(f"Talking to {self._base} failed: {reason}.") from error

    def _check(self, response: httpx2.Response) -> None:
        if response.status_code == 200:
            return
        message: object = None
        with contextlib.suppress(ValueError, LookupError, TypeError):  # not every server sends our JSON
            message = response.json()["error"]["message"]
        cure = " Give --api-key, or set OPENAI_API_KEY." if response.status_code == 401 else ""
        reason = f"{message or response.reason_phrase}"
        raise ChatError(f"{self._base} answered {response.status_code}: {reason}{cure}")


class Conversation:
    """The loop: read a line, stream an answer, remember both."""

    def __init__(
        self,
        source: Source,
        system: str | None,
        console: Console,
        read_line: Callable[[], str],
    ) -> None:
        self._source = source
        self._start = [{"role": "system", "content": system}] if system else []
        self._console = console
        self._read_line = read_line
        self.messages: list[Message] = list(self._start)

    def run(self) -> None:
        """Until /exit or the end of input. Ctrl-C at the prompt only clears the line."""
        while True:
            try:
                line = self._read_line().strip()
            except EOFError:
                self._console.print()
                return
            except KeyboardInterrupt:
                self._console.print(Text("\nCtrl-D or /exit leaves.", style="dim"))
                continue
            if line == "/exit":
                return
            if line == "/reset":
                self.messages = list(self._start)
                self._console.print(Text("The conversation starts anew.", style="dim"))
            elif line.startswith("/"):
                if line != "/help":
                    self._console.print(Text(f"There is no command {line.split()[0]}.", style="red"))
                self._console.print(Text(HELP, style="dim"))
            elif line:
                self.ask(line)

    def ask(self, question: str) -> None:
        """One question. An answer cut short stays in the history as far as it was shown."""
        self.messages.append({"role": "user", "content": question})
        shown: list[str] = []
        try:
            with contextlib.closing(_closable(self._source.stream(self.messages))) as pieces:
                for piece in pieces:
                    shown.append(piece)
                    self._write(piece)
            self._write("\n")
        except KeyboardInterrupt:
            self._console.print(Text("\n(stopped)", style="dim"))
        except GqaServeError as error:
            if shown:
                self._write("\n")
            self._console.print(Text(str(error), style="red"))
        if shown:
            self.messages.append({"role": "assistant", "content": "".join(shown)})
        else:
            self.messages.pop()

    def _write(self, text: str) -> None:
        """Model text as it is: no markup, no emoji codes, no re-wrapping."""
        self._console.file.write(_printable(text))
        self._console.file.flush()


def _closable(pieces: Iterator[str]) -> Any:
    """`pieces` as something with close(), so that a stopped answer ends at once."""
    if hasattr(pieces, "close"):
        return pieces
    return (piece for piece in pieces)


def _printable(text: str) -> str:
    """Without control characters: a model must not move the cursor or retitle the window."""
    return "".join(char for char in text if char in "\n\t" or unicodedata.category(char) != "Cc")


def run_chat(
    url: str | None = None,
    llm: ChatLLM | None = None,
    system: str | None = None,
    options: Mapping[str, Any] | None = None,
    *,
    api_key: str | None = None,
    console: Console | None = None,
    read_line: Callable[[], str] | None = None,
) -> None:
    """Chat in the terminal with the server at `url` or with `llm` (exactly one of them).

    `options` are fields of SamplingParams; what they leave out, the server or the checkpoint decides.
    Raises ChatError if the server cannot be reached or is not OpenAI-compatible.
    """
    if (url is None) == (llm is None):
        raise ChatError("Chat needs either --url or --model, not both.")
    console = console or Console(highlight=False)
    read_line = read_line or _line_reader(console)
    options = options or {}
    if url is not None:
        http = HttpSource(url, options, api_key)
        console.print(Text(f"Talking to {http.model}. /help lists commands.", style="dim"))
        with contextlib.closing(http):
            Conversation(http, system, console, read_line).run()
    elif llm is not None:
        console.print(Text("/help lists commands.", style="dim"))
        Conversation(LocalSource(llm, options), system, console, read_line).run()


def _line_reader(console: Console) -> Callable[[], str]:
    """Asks for a line, with arrow keys and history where this Python has readline."""
    if console.is_terminal and sys.stdin.isatty() and importlib.util.find_spec("readline") is not None:
        importlib.import_module("readline")  # from here on input() edits
        if console.color_system is not None:
            return lambda: input(_EDITED_PROMPT)
        return lambda: input(_PROMPT)
    return lambda: console.input(Text(_PROMPT, style="bold cyan"))
