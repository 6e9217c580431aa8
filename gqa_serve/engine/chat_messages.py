"""Brings the messages of a chat request into the shape that chat templates expect.

Clients send content as strings or lists of parts, tool-call arguments as JSON text, and the newer
"developer" role; templates know some of that and not the rest. This module owns that translation and knows
nothing of HTTP or of how a template renders: it asks the template what it accepts. The caller's messages are
never changed.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any, Protocol

from gqa_serve.errors import RequestError

Message = dict[str, Any]

_TEXT_KEYS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}


class TemplateAbilities(Protocol):
    """What a template can do with messages (see ChatTemplate, which finds out by trying)."""

    @property
    def accepts_parts(self) -> bool: ...

    @property
    def accepts_strings(self) -> bool: ...

    @property
    def knows_developer_role(self) -> bool: ...


def normalise_messages(messages: Iterable[Mapping[str, Any]], template: TemplateAbilities) -> list[Message]:
    """Messages as `template` expects them. Raises RequestError (param names the message) for other content.

    * Text parts stay parts for a template that reads parts and become one string (parts joined by newlines)
      for one that does not; a string becomes one part where the template reads only parts.
    * Role "developer" becomes "system" unless the template knows it.
    * `tool_calls[].function.arguments` given as a JSON object in a string becomes that object.
    * Content that is null, as in an assistant message that only calls tools, stays null.
    """
    return [_normalise(dict(message), index, template) for index, message in enumerate(messages)]


def _normalise(message: Message, index: int, template: TemplateAbilities) -> Message:
    if message.get("role") == "developer" and not template.knows_developer_role:
        message["role"] = "system"
    content = message.get("content")
    if isinstance(content, list):
        where = f"messages[{index}].content"
        parts = [_text_part(part, f"{where}[{number}]") for number, part in enumerate(content)]
        joined = "\n".join(part["text"] for part in parts)
        message["content"] = parts if template.accepts_parts else joined
    elif isinstance(content, str):
        if template.accepts_parts and not template.accepts_strings:
            message["content"] = [{"type": "text", "text": content}]
    elif content is not None:
        raise RequestError(
            "Message content must be a string, a list of text parts, or null.",
            param=f"messages[{index}].content",
        )
    if isinstance(message.get("tool_calls"), list):
        message["tool_calls"] = [_parse_arguments(call) for call in message["tool_calls"]]
    return message


def _text_part(part: object, param: str) -> dict[str, str]:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    kind = part.get("type") if isinstance(part, Mapping) else None
    key = _TEXT_KEYS.get(kind) if isinstance(kind, str) else None
    text = part.get(key) if isinstance(part, Mapping) and key is not None else None
    if not isinstance(text, str):
        raise RequestError(
            "Content parts must be text ({'type': 'text', 'text': ...}); "
            f"a part of type {str(kind)[:40]!r} is not supported.",
            param=param,
        )
    return {"type": "text", "text": text}


def _parse_arguments(call: object) -> object:
    """Templates print arguments with tojson or loop over them; both want the object, not its JSON text."""
    if not isinstance(call, Mapping) or not isinstance(call.get("function"), Mapping):
        return call
    function = call["function"]
    arguments = function.get("arguments")
    if not isinstance(arguments, str):
        return call
    try:
        parsed = json.loads(arguments or "{}")
        if "\\u" in arguments:
            json.dumps(parsed, ensure_ascii=False).encode()  # an escaped lone surrogate is no text
    except (ValueError, RecursionError):
        return call  # a model may have produced it; the template shows the text as it is
    if not isinstance(parsed, dict):
        return call
    return {**call, "function": {**function, "arguments": parsed}}
