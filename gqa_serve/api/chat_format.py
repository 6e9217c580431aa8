"""What a model's chat template knows of tools and thinking, found out by rendering small conversations.

Owns the choice of the syntax of tool calls (the family whose parser reads back the call that the template
wrote) and of the handling of thinking. Knows no requests. Invariant: it never looks at a model's name.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import re
from collections.abc import Sequence
from typing import Any

from gqa_serve.api.message_parts import ArgumentsPart, ToolCallPart, merge_parts
from gqa_serve.api.reasoning import CLOSING, OPENING
from gqa_serve.api.tools.syntax import HERMES, LLAMA3, MISTRAL, MISTRAL_ARGS, SYNTAXES, ToolSyntax
from gqa_serve.engine.chat_messages import normalise_messages
from gqa_serve.engine.chat_template import ChatTemplate
from gqa_serve.errors import RequestError

_SHORT_ID = "qzprobe01"  # the form that Mistral's templates insist on
_LONG_ID = "call_qzprobe0123456789"
_NAME, _ABOUT, _RESULT = "qzfunction", "qzdescription", "qzresult"
_ARGUMENTS = {"qzkey": "qzvalue"}
_ASKED, _ANSWERED, _THOUGHT = "qzasked", "qzanswered", "qzthought"
_TOOLS = [
    {
        "type": "function",
        "function": {
            "name": _NAME,
            "description": _ABOUT,
            "parameters": {"type": "object", "properties": {"qzkey": {"type": "string"}}},
        },
    }
]

_HEADER_CHARS = 12  # enough to tell "assistant" from a marker of calls

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class ChatFormat:
    """How to talk about tools with a model, and what to look for in its answers.

    `syntax` None: no tools. `is_native`: the template shows tools, calls and results by itself;
    `keeps_calls`: it shows the calls and results of a conversation whose request has no tools. Where it does
    not, messages say it in words (`tools/prompt.py`). `needs_short_ids`: it takes ids of 9 letters and digits
    only. `takes_system`: it has a system message. `reasons`: answers may begin with thinking.
    `takes_many_calls`: one message may hold several.
    """

    syntax: ToolSyntax | None
    is_native: bool
    keeps_calls: bool
    needs_short_ids: bool
    takes_system: bool
    reasons: bool
    takes_many_calls: bool = True


TEXT_ONLY = ChatFormat(
    syntax=None, is_native=False, keeps_calls=False, needs_short_ids=False, takes_system=True, reasons=False
)
"""Neither tools nor thinking."""


def find_format(template: ChatTemplate, *, tool_call_parser: str, reasoning_parser: str) -> ChatFormat:
    """The format of a template; the arguments are the server's settings of these names."""
    rendered, needs_short_ids = _render_calls(template, _TOOLS)
    is_native = rendered is not None and all(word in rendered for word in (_ABOUT, _RESULT, "qzvalue"))
    found = _recognise(rendered, template) if rendered is not None and is_native else None
    syntax: ToolSyntax | None = found or HERMES
    if tool_call_parser == "none":
        syntax = None
    elif tool_call_parser != "auto" and (found is None or found.name != tool_call_parser):
        syntax = next(syntax for syntax in SYNTAXES if syntax.name == tool_call_parser)
    elif found is None:
        is_native = False  # calls in a spelling that nobody here can read
    bare, short_bare = _render_calls(template, None)
    keeps_calls = bare is not None and _RESULT in bare and "qzvalue" in bare
    tools = ([_TOOLS] if is_native else []) + ([None] if keeps_calls else [])
    format = ChatFormat(
        syntax=syntax,
        is_native=is_native,
        keeps_calls=keeps_calls,
        needs_short_ids=needs_short_ids or short_bare,
        takes_system=_takes_system(template),
        reasons=reasoning_parser == "think" or (reasoning_parser == "auto" and _reasons(template)),
        takes_many_calls=all(_shows_two_calls(template, given) for given in tools),
    )
    logger.info(
        "Tool calls: %s; thinking: %s.",
        "none"
        if syntax is None
        else f"{syntax.name}, shown by {'the template' if is_native else 'a message'}",
        "<think> apart" if format.reasons else "not looked for",
    )
    return format


def _render(template: ChatTemplate, messages: Sequence[dict[str, Any]], **options: Any) -> str | None:
    """The rendered messages; None if the template refuses them."""
    try:
        return template.render(normalise_messages(messages, template), **options)
    except RequestError:
        return None


def _render_calls(
    template: ChatTemplate, tools: list[dict[str, Any]] | None, number: int = 1
) -> tuple[str | None, bool]:
    """A conversation with calls and a result, and whether only a short id of the call is taken."""
    for call_id in (_LONG_ID, _SHORT_ID):
        function = {"name": _NAME, "arguments": json.dumps(_ARGUMENTS)}
        call = {"id": call_id, "type": "function", "function": function}
        messages: list[dict[str, Any]] = [
            {"role": "user", "content": _ASKED},
            {"role": "assistant", "content": "", "tool_calls": [call] * number},
            {"role": "tool", "content": _RESULT, "tool_call_id": call_id, "name": _NAME},
        ]
        rendered = _render(template, messages, tools=tools)
        if rendered is not None:
            return rendered, call_id == _SHORT_ID
    return None, False


def _shows_two_calls(template: ChatTemplate, tools: list[dict[str, Any]] | None) -> bool:
    rendered, _ = _render_calls(template, tools, number=2)
    return rendered is not None and rendered.count("qzvalue") > 1


def _recognise(rendered: str, template: ChatTemplate) -> ToolSyntax | None:
    """The family whose parser finds the call in what the template wrote."""
    for syntax in (HERMES, MISTRAL):
        if _reads_call(syntax, rendered):
            listed = re.search(r"\[TOOL_CALLS\]\s*\[", rendered)
            return syntax if syntax is HERMES or listed else MISTRAL_ARGS
    header = _header(template)
    for start in re.finditer(r'\{\s*"(?:name|type)"', rendered):
        before = rendered[: start.start()].rstrip().removesuffix(LLAMA3.tag).rstrip()
        # The object is the whole message: it comes where an answer would begin.
        if before.endswith(header) and _reads_call(LLAMA3, rendered[start.start() :]):
            return LLAMA3
    return None


def _header(template: ChatTemplate) -> str:
    """The end of what the template writes before an answer."""
    messages = [{"role": "user", "content": _ASKED}, {"role": "assistant", "content": _ANSWERED}]
    before, found, _ = (_render(template, messages, add_generation_prompt=False) or "").partition(_ANSWERED)
    return before.rstrip()[-_HEADER_CHARS:] if found else _ANSWERED


def _reads_call(syntax: ToolSyntax, text: str) -> bool:
    parts = merge_parts(syntax.parser(str, frozenset({_NAME})).feed(text, final=True))
    names = [part.name for part in parts if isinstance(part, ToolCallPart)]
    arguments = [part.text for part in parts if isinstance(part, ArgumentsPart)]
    return _NAME in names and any(_is_probe(text) for text in arguments)


def _is_probe(text: str) -> bool:
    try:
        return bool(json.loads(text) == _ARGUMENTS)
    except ValueError:
        return False


def _takes_system(template: ChatTemplate) -> bool:
    system, user = {"role": "system", "content": _ABOUT}, {"role": "user", "content": _ASKED}
    return _ABOUT in (_render(template, [system, user]) or "")


def _reasons(template: ChatTemplate) -> bool:
    """Whether the template opens thinking, closes it where it is switched off, or shows or drops it."""
    user = {"role": "user", "content": _ASKED}
    prompts = [
        _render(template, [user]),
        _render(template, [user], enable_thinking=False),
        _render(template, [user], enable_thinking=True),
    ]
    answer = {"role": "assistant", "content": _ANSWERED, "reasoning_content": _THOUGHT}
    shown = _render(template, [user, answer], add_generation_prompt=False) or ""
    inline = {"role": "assistant", "content": f"{OPENING}{_THOUGHT}{CLOSING}{_ANSWERED}"}
    cut = _render(template, [user, inline, user], add_generation_prompt=True) or _THOUGHT
    return (
        any(OPENING in (prompt or "") for prompt in prompts)
        or (_THOUGHT in shown and OPENING in shown)
        or (_ANSWERED in cut and _THOUGHT not in cut)
    )
