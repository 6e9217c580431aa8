"""The server under test: what it is called there, how a request is spelled, what it understands.

Owns bodies of requests and the fields beyond OpenAI's (`ignore_eos`, special tokens shown), which are left
out where the server refuses them. Knows no traffic and no times but those of one request.
Invariant: `ask` always returns an Answer; whatever went wrong is its `error`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from gqa_serve.errors import ConfigError
from gqa_serve.workbench.bench.answer import Answer, refusal
from gqa_serve.workbench.bench.connection import HttpClient, HttpError

Message = dict[str, str]

PATHS = {"completions": "/v1/completions", "chat": "/v1/chat/completions"}
# Fields beyond OpenAI's, in the order in which they are given up when a server answers 400.
# Without skip_special_tokens, tokens that a model sends after an end that was ignored would not be seen.
_EXTRAS = ("skip_special_tokens", "ignore_eos", "stream_options")


@dataclass
class Target:
    """`endpoint`: "completions" or "chat". `body`: fields of the user's own, over everything else."""

    client: HttpClient
    endpoint: str
    model: str
    body: dict[str, Any]
    timeout_s: float
    refused: tuple[str, ...] = ()
    """Extra fields that the server does not take."""

    async def ask(
        self,
        messages: Sequence[Message],
        max_tokens: int,
        *,
        on_tokens: Callable[[int], None] | None = None,
    ) -> tuple[Answer, float]:
        """The answer to a conversation whose last message is the user's, and when it was sent.

        For completions the texts of all messages, one after the other, are the prompt.
        """
        body = msgspec.json.encode(self.request(messages, max_tokens))
        start = time.perf_counter()
        answer = Answer(start, on_tokens=on_tokens)
        exchange = self.client.exchange("POST", PATHS[self.endpoint], body, answer.feed)
        try:
            status, rest = await asyncio.wait_for(exchange, self.timeout_s)
        except asyncio.TimeoutError:
            answer.error = f"No end within {self.timeout_s:g} s (--timeout)."
        except HttpError as error:
            answer.error = answer.error or str(error)
        else:
            if status == 200:
                answer.end()
            else:
                answer.error = refusal(status, rest)
        return answer, start

    def request(self, messages: Sequence[Message], max_tokens: int) -> dict[str, Any]:
        """The JSON body."""
        body: dict[str, Any] = {
            "model": self.model,
            "max_tokens": max_tokens,
            "stream": True,
            "temperature": 0,
        }
        if self.endpoint == "chat":
            body["messages"] = list(messages)
        else:
            body["prompt"] = "".join(message["content"] for message in messages)
        if "stream_options" not in self.refused:
            body["stream_options"] = {"include_usage": True}
        if "ignore_eos" not in self.refused:
            body["ignore_eos"] = True
        if "skip_special_tokens" not in self.refused:
            body["skip_special_tokens"] = False
        return body | self.body

    async def probe(self) -> Answer:
        """Ask for two tokens, giving up extra fields one by one. Raises ConfigError without an answer."""
        while True:
            answer, _ = await self.ask([{"role": "user", "content": "the"}], 2)
            if answer.error is None:
                return answer
            if not answer.error.startswith(("HTTP 400", "HTTP 422")) or self.refused == _EXTRAS:
                raise ConfigError(
                    f"{self.client.base} does not answer {PATHS[self.endpoint]}: {answer.error} "
                    "(--endpoint chooses chat or completions; a key is taken from OPENAI_API_KEY)"
                )
            self.refused = _EXTRAS[: len(self.refused) + 1]


async def find_model(client: HttpClient) -> str:
    """The first model that the server lists. Raises ConfigError with the cure."""
    try:
        status, body = await asyncio.wait_for(client.exchange("GET", "/v1/models"), 30.0)
    except (HttpError, asyncio.TimeoutError) as error:
        reason = str(error) or "no answer within 30 s."
        raise ConfigError(
            f"No server answers at {client.base}: {reason} Start one with: gqa-serve --model demo"
        ) from error
    if status in (401, 403):
        raise ConfigError(
            f"{client.base} wants an API key: put it into OPENAI_API_KEY ({refusal(status, body)})."
        )
    try:
        name = msgspec.json.decode(body)["data"][0]["id"]
    except (msgspec.MsgspecError, LookupError, TypeError) as error:
        raise ConfigError(
            f"{client.base} does not list its models as an OpenAI-compatible server does "
            f"({refusal(status, body)[:200]}); name one with --model-name."
        ) from error
    return str(name)
