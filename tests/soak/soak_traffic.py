"""What a soak asks for: good requests of all families, known ones whose text must never change, bad ones.

Owns the bodies and what a right answer to them is. Knows no connection. Invariant: whatever is random in a
request comes from the generator that its client brings.
"""

from __future__ import annotations

import dataclasses
import json
import random
import re
from collections.abc import Callable
from typing import Any

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 12}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
TOPICS = ("Mars", "rain", "bread", "Rome", "cats", "gold", "chess", "tea", "snow", "the sea")
_LONG = " ".join(f"{name} is {number} miles away." for number, name in enumerate(TOPICS * 12))


@dataclasses.dataclass(frozen=True)
class Asked:
    """One request: its kind, where it goes, what it says, and how its answer is judged."""

    kind: str
    path: str = ""
    body: Any = None
    raw: bytes | None = None
    statuses: tuple[int, ...] = (200,)
    known: str | None = None  # the key under which its text must always be the same
    check: Callable[[dict[int, str]], bool] | None = None  # of the texts by choice, unless `was_cut`

    def to_bytes(self, host: str, port: int) -> bytes:
        """The request as it is sent."""
        if self.raw is not None:
            return self.raw
        data = self.body if isinstance(self.body, bytes) else json.dumps(self.body).encode()
        head = f"POST {self.path} HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Type: application/json\r\n"
        return f"{head}Content-Length: {len(data)}\r\nConnection: close\r\n\r\n".encode() + data


def texts_of(body: bytes) -> dict[int, str]:
    """The text of every choice of an answer of any family, streamed or whole. Raises ValueError."""
    if not body.startswith((b"data:", b"event:", b":")):
        return _whole_texts(json.loads(body))
    texts: dict[int, str] = {}
    for line in body.split(b"\n"):
        if not line.startswith(b"data: {"):
            continue
        event = json.loads(line[6:])
        index, text = _event_text(event)
        texts[index] = texts.get(index, "") + text
    return texts


def _whole_texts(answer: dict[str, Any]) -> dict[int, str]:
    if "choices" in answer:
        return {choice["index"]: _choice_text(choice, "message") for choice in answer["choices"]}
    if "output" in answer:
        parts = [part for item in answer["output"] for part in item.get("content", [])]
        return {0: "".join(part.get("text", "") for part in parts)}
    if "data" in answer:
        return {entry["index"]: json.dumps(entry["embedding"]) for entry in answer["data"]}
    return {0: "".join(part.get("text", "") for part in answer["content"])}


def _choice_text(choice: dict[str, Any], name: str) -> str:
    if name not in choice:
        return str(choice.get("text") or "")
    message = choice[name]
    calls = "".join(call["function"].get("arguments") or "" for call in message.get("tool_calls") or [])
    return (message.get("content") or "") + calls


def _event_text(event: dict[str, Any]) -> tuple[int, str]:
    for choice in event.get("choices", []):
        return choice["index"], _choice_text(choice, "delta")
    if event.get("type") == "response.output_text.delta":
        return 0, event["delta"]
    if event.get("type") == "content_block_delta":
        return 0, event["delta"].get("text", "")
    return 0, ""


def was_cut(body: bytes) -> bool:
    """Whether the chat or completion in `body`, streamed or whole, ended at `max_tokens`.

    Such a text keeps to its form only as far as it goes.
    """
    return re.search(rb'"finish_reason": ?"length"', body) is not None


def stream_end(body: bytes) -> str:
    """How a stream ended: "complete", "error event", or "unfinished"."""
    tail = body[-20_000:]
    if b'"error":{' in tail or b"event: error" in tail or b"event: response.failed" in tail:
        return "error event"
    ends = (
        b"data: [DONE]",
        b"event: message_stop",
        b"event: response.completed",
        b"event: response.incomplete",
    )
    return "complete" if any(end in tail for end in ends) else "unfinished"


# --- good ones ---------------------------------------------------------------------------------------------


def _user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def known_requests() -> list[Asked]:
    """Greedy and seeded requests of all families. Those of one key must give one text, streamed or not."""
    asked = []
    for topic in TOPICS[:4]:
        messages = _user(f"Say something about {topic}.")
        for stream in (False, True):
            mode = " stream" if stream else ""
            common = {"model": "demo", "temperature": 0, "stream": stream}
            chat = {**common, "messages": messages, "max_tokens": 20}
            asked += [
                Asked("chat" + mode, "/v1/chat/completions", chat, known=f"chat {topic}"),
                Asked(
                    "completion" + mode,
                    "/v1/completions",
                    {**common, "prompt": f"A poem about {topic}:", "max_tokens": 20},
                    known=f"completion {topic}",
                ),
                Asked(
                    "responses" + mode,
                    "/v1/responses",
                    {**common, "input": f"Say something about {topic}.", "max_output_tokens": 20},
                    known=f"responses {topic}",
                ),
                Asked("messages" + mode, "/v1/messages", chat, known=f"messages {topic}"),
                Asked(
                    "n=3" + mode,
                    "/v1/chat/completions",
                    {**chat, "n": 3, "seed": 7, "temperature": 1.0, "max_tokens": 12},
                    known=f"n {topic}",
                ),
                Asked(
                    "long prompt" + mode,
                    "/v1/completions",
                    {**common, "prompt": f"{_LONG} And {topic}", "max_tokens": 8},
                    known=f"long {topic}",
                ),
            ]
    return asked


def _is_person(texts: dict[int, str]) -> bool:
    person = json.loads(texts[0])
    return set(person) == {"name", "age"} and 0 <= person["age"] <= 120 and len(person["name"]) <= 12


def _is_call(texts: dict[int, str]) -> bool:
    return set(json.loads(texts[0])) == {"city"}


def _is_code(texts: dict[int, str]) -> bool:
    return re.fullmatch("[A-Z]{3}-[0-9]{2}", texts[0]) is not None


def other_requests(rng: random.Random) -> list[Asked]:
    """Requests whose text nobody knows beforehand, some with a form that it must have."""
    topic = rng.choice(TOPICS)
    stream = rng.random() < 0.5
    seed = rng.randrange(2**31)
    mode = " stream" if stream else ""
    common = {"model": "demo", "temperature": 1.0, "seed": seed, "stream": stream}
    chat = {**common, "messages": _user(f"Describe {topic} {seed}.")}
    schema = {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON}}
    return [
        Asked(
            "schema" + mode,
            "/v1/chat/completions",
            {**chat, "max_tokens": 200, "response_format": schema},
            check=_is_person,
        ),
        Asked(
            "tool" + mode,
            "/v1/chat/completions",
            {**chat, "max_tokens": 200, "tools": [WEATHER], "tool_choice": "required"}
            | {"parallel_tool_calls": False},
            check=_is_call,
        ),
        Asked(
            "regex" + mode,
            "/v1/completions",
            {**common, "prompt": "A code: ", "max_tokens": 20, "guided_regex": "[A-Z]{3}-[0-9]{2}"},
            check=_is_code,
        ),
        Asked("sampled" + mode, "/v1/chat/completions", {**chat, "max_tokens": rng.randrange(1, 60)}),
        Asked(
            "logprobs" + mode,
            "/v1/chat/completions",
            {**chat, "max_tokens": 10, "logprobs": True, "top_logprobs": 5},
        ),
        Asked(
            "long answer" + mode,
            "/v1/completions",
            {**common, "prompt": topic, "max_tokens": rng.randrange(60, 160), "ignore_eos": True},
        ),
        Asked("embeddings", "/v1/embeddings", {"model": "demo", "input": [topic, f"{topic} {seed % 10}"]}),
    ]


# --- bad ones ----------------------------------------------------------------------------------------------


def bad_requests(host: str) -> list[Asked]:
    """Requests to be refused, each with the status that says so."""
    chat, plain = "/v1/chat/completions", "/v1/completions"
    messages = _user("x")
    line = f"HTTP/1.1\r\nHost: {host}\r\n".encode()

    def bad(path: str, body: Any, status: int = 400) -> Asked:
        return Asked("bad", path, body, statuses=(status,))

    def raw(data: bytes, status: int) -> Asked:
        return Asked("bad", raw=data, statuses=(status,))

    return [
        bad(chat, b'{"model": "demo", "messages": ['),
        bad(chat, b"\xff\xfe\x00"),
        bad(chat, {"model": "demo"}),
        bad(chat, {"model": "nobody", "messages": messages}, 404),
        bad(chat, {"model": "demo", "messages": messages, "temperature": -1}),
        bad(chat, {"model": "demo", "messages": messages, "n": 100_000}),
        bad(chat, {"model": "demo", "messages": messages, "tools": [{"type": "nothing"}]}),
        bad(plain, {"model": "demo", "prompt": [0, 10**6]}),
        bad(plain, {"model": "demo", "prompt": "x " * 20_000, "max_tokens": 4}),
        bad(plain, {"model": "demo", "prompt": "x", "guided_regex": "(["}),
        bad(plain, {"model": "demo", "prompt": "x", "max_tokens": "many"}),
        bad("/v1/messages", {"model": "demo", "messages": messages}),
        bad("/v1/responses", {"model": "demo", "input": 5}),
        bad("/v1/nothing", {}, 404),
        raw(b"GET /v1/completions " + line + b"Connection: close\r\n\r\n", 405),
        raw(b"NONSENSE\r\n\r\n", 400),
        raw(b"POST /v1/completions " + line + b"Content-Length: 99999999999\r\n\r\n", 413),
    ]
