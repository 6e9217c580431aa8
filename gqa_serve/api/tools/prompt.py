"""Tools in plain words, for chat templates that do not know them; and ids as some templates demand them.

Owns the sentence that tells a model of its tools, and how calls and results look as ordinary turns. Knows no
template. Invariant: nothing of a message is lost; the caller's messages are not changed.
"""

from __future__ import annotations

import hashlib
import json
import re
import secrets
import string
from collections.abc import Sequence
from typing import Any

from gqa_serve.api.tools.syntax import ToolSyntax

_SHORT_ID = re.compile(r"[a-zA-Z0-9]{9}")
_LETTERS = string.ascii_letters + string.digits
Message = dict[str, Any]


def describe_tools(tools: Sequence[dict[str, Any]], syntax: ToolSyntax, *, must_call: bool) -> str:
    """What the system message says."""
    lines = "\n".join(json.dumps(tool["function"], ensure_ascii=False) for tool in tools)
    example = syntax.spell("NAME", '{"PARAMETER": VALUE}')
    when = "Answer with a call of one" if must_call else "If one helps, answer with a call"
    return (
        f"These functions can be called; each line is one, with the JSON schema of its parameters:\n{lines}\n"
        f"{when}, written exactly like this:\n{example}\nThe result comes with the next message."
    )


def with_description(messages: Sequence[Message], description: str, *, takes_system: bool) -> list[Message]:
    """The description at the end of the first system message, in a new one, or before the first turn."""
    first, rest = messages[0], list(messages[1:])
    is_system = first["role"] in ("system", "developer")
    if not is_system and takes_system:
        return [{"role": "system", "content": description}, *messages]
    text = _text(first)
    joined = f"{text}\n\n{description}" if is_system else f"{description}\n\n{text}"
    return [{**first, "content": joined}, *rest]


def without_tool_turns(messages: Sequence[Message], syntax: ToolSyntax) -> list[Message]:
    """Calls as text of the assistant, results as text of the user; a result's neighbours join its turn."""
    turns: list[Message] = []
    was_result = False
    for message in messages:
        is_result = message["role"] == "tool"
        turn = message
        if is_result:
            turn = {"role": "user", "content": f"<tool_response>\n{_text(message)}\n</tool_response>"}
        elif message.get("tool_calls"):
            turn = {key: value for key, value in message.items() if key != "tool_calls"}
            calls = [_spelled(call["function"], syntax) for call in message["tool_calls"]]
            turn["content"] = "\n".join([*([text] if (text := _text(message)) else []), *calls])
        if was_result and turn["role"] == "user":
            turns[-1] = {**turns[-1], "content": f"{turns[-1]['content']}\n{_text(turn)}"}
        else:
            turns.append(turn)
        was_result = is_result
    return turns


def one_call_each(messages: Sequence[Message]) -> list[Message]:
    """Messages with several calls as several messages, each followed by the result of its call."""
    turns: list[Message] = []
    waiting: list[Message] = []  # calls whose message is still to come
    for message in messages:
        if message["role"] == "tool":
            while waiting and all(call["id"] != message.get("tool_call_id") for call in _calls(turns[-1:])):
                turns.append(waiting.pop(0))
        else:
            turns += waiting
            waiting = []
        calls = message.get("tool_calls") or []
        turns.append({**message, "tool_calls": calls[:1]} if calls else message)
        waiting += [{**message, "content": "", "tool_calls": [call]} for call in calls[1:]]
    return turns + waiting


def _calls(messages: Sequence[Message]) -> list[dict[str, Any]]:
    return [call for message in messages for call in message.get("tool_calls") or []]


def _spelled(function: dict[str, Any], syntax: ToolSyntax) -> str:
    return syntax.spell(function["name"], function["arguments"])


def _text(message: Message) -> str:
    content = message["content"]
    return content if isinstance(content, str) else "\n".join(part["text"] for part in content)


def with_short_ids(messages: Sequence[Message]) -> list[Message]:
    """Ids of calls as 9 letters and digits; equal ones stay equal."""
    result = []
    for message in messages:
        copy = dict(message)
        if "tool_call_id" in copy:
            copy["tool_call_id"] = _short(copy["tool_call_id"])
        if "tool_calls" in copy:
            copy["tool_calls"] = [{**call, "id": _short(call["id"] or "")} for call in copy["tool_calls"]]
        result.append(copy)
    return result


def _short(call_id: str) -> str:
    if _SHORT_ID.fullmatch(call_id):
        return call_id
    number = int.from_bytes(
        hashlib.blake2b(call_id.encode("utf-8", "replace"), digest_size=16).digest(), "big"
    )
    return "".join(_LETTERS[number // len(_LETTERS) ** place % len(_LETTERS)] for place in range(9))


def new_call_id() -> str:
    """An id as OpenAI writes them."""
    return f"call_{secrets.token_hex(12)}"


def new_short_id() -> str:
    """An id for templates that take 9 letters and digits."""
    return "".join(secrets.choice(_LETTERS) for _ in range(9))
