"""Traffic as a list of requests: what `bench` sends, what `simulate` replays, what both write down.

One JSON object a line:

    {"arrival_s": 0.31, "prompt_tokens": 812, "output_tokens": 97}
    {"arrival_s": 0.44, "prompt_tokens": 900, "output_tokens": 40, "prefix": "support", "prefix_tokens": 640}
    {"arrival_s": 2.00, "prompt_tokens": 120, "output_tokens": 60, "conversation": "c7", "turn": 0}
    {"think_s": 4.5, "prompt_tokens": 320, "output_tokens": 80, "conversation": "c7", "turn": 1}

Owns the format. Knows no server, no clock, no tokenizer: lengths are in tokens, and what two requests share
is said by name. Imports no torch.
Invariant: a TraceRequest that exists is consistent; a list of them is sorted by arrival, and the turns of a
conversation are complete and in order.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gqa_serve.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class TraceRequest:
    """One request.

    `prompt_tokens` counts the whole prompt, with the shared prefix and, in a later turn, with the earlier
    prompts and answers of the conversation, which it begins with. The first `prefix_tokens` are the same in
    all requests with this `prefix`. A first turn, or a request without a conversation, arrives `arrival_s`
    after the start; a later turn `think_s` after the end of the turn before it. `prompt` is the text, where
    the traffic is real and is to be sent as it was; in a conversation, what the user says in this turn.
    """

    prompt_tokens: int
    output_tokens: int
    arrival_s: float = 0.0
    prefix: str | None = None
    prefix_tokens: int = 0
    conversation: str | None = None
    turn: int = 0
    think_s: float = 0.0
    prompt: str | None = None

    def __post_init__(self) -> None:
        if self.prompt_tokens < 1 or self.output_tokens < 1:
            raise ConfigError("prompt_tokens and output_tokens must be 1 or more.")
        if not (0 <= self.arrival_s < math.inf and 0 <= self.think_s < math.inf and self.turn >= 0):
            raise ConfigError("arrival_s, think_s and turn must be finite and not negative.")
        if not 0 <= self.prefix_tokens <= self.prompt_tokens or (self.prefix_tokens and self.prefix is None):
            raise ConfigError("prefix_tokens must be at most prompt_tokens, and 0 without a prefix.")
        if self.turn and self.conversation is None:
            raise ConfigError("A later turn needs the name of its conversation.")

    def to_json(self) -> dict[str, Any]:
        """Its line; what is at its default is left out."""
        shown = {
            name: value
            for name in self.__dataclass_fields__
            if (value := getattr(self, name)) != self.__dataclass_fields__[name].default
        }
        return {"arrival_s": self.arrival_s, **shown} if not self.turn else shown


def read_trace(path: Path) -> list[TraceRequest]:
    """The requests of a file, sorted by arrival. Raises ConfigError that names the line."""
    requests = []
    try:
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    requests.append(_parse(line, f"{path}, line {number}"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"Could not read the trace {path}: {error}.") from error
    if not requests:
        raise ConfigError(f"The trace {path} holds no request.")
    return checked(requests, str(path))


def write_trace(path: Path, requests: Iterable[TraceRequest]) -> None:
    """Write the format that `read_trace` reads. Raises ConfigError if the file can't be written."""
    try:
        with path.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(request.to_json()) + "\n" for request in requests)
    except OSError as error:
        raise ConfigError(f"Could not write the trace {path}: {error.strerror}.") from error


def checked(requests: Sequence[TraceRequest], where: str) -> list[TraceRequest]:
    """Sorted by arrival, later turns behind their first; raises ConfigError where turns are missing."""
    turns: dict[str, list[TraceRequest]] = {}
    for request in requests:
        if request.conversation is not None:
            turns.setdefault(request.conversation, []).append(request)
    starts = {}
    for name, own in turns.items():
        own.sort(key=lambda request: request.turn)
        if [request.turn for request in own] != list(range(len(own))):
            raise ConfigError(f"{where}: conversation {name!r} must have the turns 0, 1, 2, ... once each.")
        for earlier, later in itertools.pairwise(own):
            if later.prompt_tokens <= earlier.prompt_tokens + earlier.output_tokens:
                raise ConfigError(
                    f"{where}: conversation {name!r}, turn {later.turn}: its prompt must be longer than the "
                    "prompt and answer before it, which it begins with."
                )
        starts[name] = own[0].arrival_s

    def key(request: TraceRequest) -> tuple[float, int]:
        name = request.conversation
        return (request.arrival_s if name is None else starts[name], request.turn)

    return sorted(requests, key=key)


def _parse(line: str, where: str) -> TraceRequest:
    try:
        fields = json.loads(line)
    except ValueError as error:
        raise ConfigError(f"{where}: not JSON ({error}).") from error
    known = TraceRequest.__dataclass_fields__
    if not isinstance(fields, dict) or set(fields) - set(known):
        raise ConfigError(f"{where}: expected an object with some of {', '.join(known)}.")
    for name, value in fields.items():
        expected: tuple[type, ...] = (str, type(None))
        if name.endswith("_s"):
            expected = (int, float)
        elif name.endswith("_tokens") or name == "turn":
            expected = (int,)
        if isinstance(value, bool) or not isinstance(value, expected):
            raise ConfigError(f"{where}: {name} must be {' or '.join(kind.__name__ for kind in expected)}.")
    try:
        return TraceRequest(**fields)
    except TypeError as error:
        raise ConfigError(f"{where}: prompt_tokens and output_tokens are needed.") from error
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error
