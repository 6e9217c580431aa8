"""The flags that all measurements over HTTP share, and the way from them to a server that is ready.

Owns what may go with what, and a server of our own (`--model`). Knows no report.
Invariant: everything that can be wrong without sending a request is refused before one is sent.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gqa_serve.config import openai_api_key
from gqa_serve.errors import ConfigError
from gqa_serve.workbench.records import Objectives

if TYPE_CHECKING:
    from gqa_serve.workbench.bench.calibrate import Calibration
    from gqa_serve.workbench.bench.target import Target

_DURATION = re.compile(r"(\d+\.?\d*|\.\d+)(ms|s)")


def add_server_flags(parser: argparse.ArgumentParser) -> None:
    """Where requests go, and how they are spelled."""
    group = parser.add_argument_group("server")
    add = group.add_argument
    add("--url", help="a running OpenAI-compatible server, e.g. http://127.0.0.1:8000")
    add("--model", metavar="MODEL", help="start a gqa-serve of this model; flags for it after --")
    add("--model-name", metavar="NAME", help="the model to ask for; default: the first of /v1/models")
    add("--endpoint", choices=("completions", "chat"), default="completions", help="default completions")
    add("--timeout", type=float, default=600.0, metavar="S", help="seconds an answer may take; default 600")
    add("--body", metavar="JSON", help="more fields of each request, e.g. '{\"temperature\": 0.8}'")


def add_objective_flags(parser: argparse.ArgumentParser) -> None:
    """What a good answer keeps."""
    group = parser.add_argument_group("objectives (SLO): goodput counts the requests that keep them all")
    for name, what in (
        ("ttft", "time to first token"),
        ("tpot", "time per output token after the first"),
        ("e2e", "time to the last token"),
    ):
        group.add_argument(f"--slo-{name}", metavar="TIME", help=f"longest {what}, e.g. 500ms or 2s")


def read_objectives(args: argparse.Namespace) -> Objectives | None:
    """The objectives, None without any. Raises ConfigError."""
    values = {f"{name}_s": _duration(args, f"slo_{name}") for name in ("ttft", "tpot", "e2e")}
    return Objectives(**values) if any(value is not None for value in values.values()) else None


def _duration(args: argparse.Namespace, name: str) -> float | None:
    text = getattr(args, name)
    if text is None:
        return None
    match = _DURATION.fullmatch(text.strip())
    if match is None or float(match[1]) <= 0:
        raise ConfigError(f"--{name.replace('_', '-')} must be a time like 500ms or 2s; got {text!r}.")
    return float(match[1]) / (1000 if match[2] == "ms" else 1)


@dataclass(frozen=True)
class ServerChoice:
    """The server flags, checked. `words`: flags for a server of our own."""

    url: str | None
    model: str | None
    words: tuple[str, ...]
    body: dict[str, Any]


def split_words(words: list[str]) -> tuple[list[str], list[str]]:
    """Our words, and those after `--`, which are for a server of our own."""
    if "--" not in words:
        return words, []
    at = words.index("--")
    return words[:at], words[at + 1 :]


def read_server(args: argparse.Namespace, server_words: list[str]) -> ServerChoice:
    """Raises ConfigError where the flags don't name one server."""
    if args.url is not None and args.model is not None:
        raise ConfigError("Give either --url of a running server or --model to start one, not both.")
    if args.url is None and args.model is None:
        raise ConfigError("Measure what? Give --url of a running server, or --model to start one, e.g. demo.")
    if args.url is not None and server_words:
        raise ConfigError(
            "Flags after -- are for the server that --model starts; with --url it runs already."
        )
    if not 0 < args.timeout < float("inf"):
        raise ConfigError("--timeout must be more than 0 seconds.")
    try:
        body = json.loads(args.body) if args.body is not None else {}
    except ValueError as error:
        raise ConfigError(f"--body is not JSON ({error}).") from error
    if not isinstance(body, dict):
        raise ConfigError('--body must be a JSON object, e.g. {"temperature": 0.8}.')
    taken = sorted({"model", "prompt", "messages", "stream", "stream_options", "max_tokens", "n"} & set(body))
    if taken:
        raise ConfigError(f"--body can't set {', '.join(taken)}: the measurement does.")
    return ServerChoice(args.url, args.model, tuple(server_words), body)


@contextlib.contextmanager
def server_url(choice: ServerChoice) -> Iterator[str]:
    """The address; a server of our own runs as long as the context."""
    if choice.url is not None:
        yield choice.url
        return
    from gqa_serve.workbench.bench.own_server import own_server

    with own_server(["--model", str(choice.model), *choice.words]) as url:
        yield url


@contextlib.asynccontextmanager
async def open_target(
    args: argparse.Namespace, choice: ServerChoice, url: str, *, multi_turn: bool
) -> AsyncIterator[tuple[Target, Calibration]]:
    """The server, asked once for what it understands and how it counts. Raises ConfigError, ModelError."""
    from gqa_serve.workbench.bench.calibrate import calibrate
    from gqa_serve.workbench.bench.connection import HttpClient
    from gqa_serve.workbench.bench.target import Target, find_model
    from gqa_serve.workbench.tokenizer_source import find_tokenizer

    tokenizer = None if args.tokenizer is None else find_tokenizer(args.tokenizer)
    client = HttpClient(url, api_key=openai_api_key() if choice.url is not None else None)
    try:
        model = args.model_name or await find_model(client)
        target = Target(client, args.endpoint, model, choice.body, args.timeout)
        yield target, await calibrate(target, tokenizer, multi_turn=multi_turn)
    finally:
        await client.close()
