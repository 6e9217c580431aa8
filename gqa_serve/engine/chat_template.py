"""`ChatTemplate`: renders a conversation to the prompt text a model was trained on.

Renders as transformers' apply_chat_template does: a sandboxed, immutable Jinja environment with the same
options, filters, globals and tags. Owns compiling, rendering and finding out what a template accepts;
`chat_template_files.py` finds the template, `chat_messages.py` prepares messages. Invariants: a request can
never change a template or reach Python through it, and nothing a request contains makes rendering fail other
than with a RequestError.

A template comes with the model; `template_sandbox.py` keeps it from running code and from going on forever,
and the rendered length is bounded here. Templates are never taken from a request.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from functools import cached_property
from typing import Any

import jinja2
import jinja2.meta
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Macro

from gqa_serve.engine.template_sandbox import TemplateEnvironment
from gqa_serve.errors import ModelError, RequestError

MAX_RENDERED_CHARS = 64 * 1024 * 1024
MAX_ERROR_CHARS = 300
RESERVED_VARIABLES = frozenset(
    {"messages", "tools", "documents", "add_generation_prompt", "continue_final_message", "chat_template"}
)
_REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")
_CONTINUE_TAG = "CONTINUE_FINAL_MESSAGE_TAG "
_PROBE = "qzprobeqz"

# What wrong input can make a sandboxed template raise, besides Jinja's own errors.
_RENDER_ERRORS = (
    jinja2.TemplateError,
    ArithmeticError,
    AttributeError,
    LookupError,
    MemoryError,
    RecursionError,
    TypeError,
    ValueError,
)


class _GenerationTag(Extension):
    """`{% generation %}...{% endgeneration %}` marks training targets; for a prompt it renders its body."""

    tags = {"generation"}  # noqa: RUF012 (Jinja's own spelling)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        # A call block, as in transformers, so that assignments inside stay inside.
        return nodes.CallBlock(self.call_method("_render"), [], [], body).set_lineno(line)

    def _render(self, caller: Macro) -> str:
        return str(caller())


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(str(message))


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes HTML; prompts are not HTML.
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _environment(now: Callable[[], datetime]) -> TemplateEnvironment:
    environment = TemplateEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, loopcontrols]
    )
    environment.add_filter("tojson", _tojson)
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda format: now().strftime(format)
    return environment


class ChatTemplate:
    """A compiled chat template, with the variant used when a request has tools, if the model has one.

    `special_tokens` (`bos_token`, `eos_token`, ...) are variables of the template. `source_name` says where
    the template came from. Raises ModelError if a source does not compile.
    """

    def __init__(
        self,
        source: str,
        *,
        tool_source: str | None = None,
        special_tokens: Mapping[str, str] | None = None,
        source_name: str = "inline template",
        now: Callable[[], datetime] = datetime.now,
    ) -> None:
        self._timing = threading.Lock()
        self.slowest_s = 0.0
        """How long the longest rendering took."""
        self.source = source
        self.source_name = source_name
        self._special_tokens = dict(special_tokens or {})
        self._environment = _environment(now)
        self._template = self._compile(source)
        self._tool_template = self._template if tool_source is None else self._compile(tool_source)
        self._sources = [source] if tool_source is None else [source, tool_source]

    def _compile(self, source: str) -> jinja2.Template:
        try:
            return self._environment.from_string(source)
        except (jinja2.TemplateError, RecursionError, SyntaxError, ValueError, MemoryError) as error:
            line = getattr(error, "lineno", None)
            where = f" (line {line})" if line else ""
            raise ModelError(
                f"The chat template from {self.source_name} does not compile: {_brief(error)}{where}. "
                "Pass a working one with --chat-template."
            ) from error

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        /,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        **kwargs: Any,
    ) -> str:
        """The prompt text of `messages`.

        `tools` are JSON schemas. `continue_final_message` leaves the last message open for the model to go
        on with (and excludes `add_generation_prompt`). Other keywords are variables of the template, and
        win over the special tokens. Raises RequestError (param "messages") if the template refuses.
        """
        check_template_kwargs(kwargs)
        if not messages:
            raise RequestError("messages must hold at least one message.", param="messages")
        if continue_final_message and add_generation_prompt:
            raise RequestError(
                "continue_final_message and add_generation_prompt exclude each other; set one to false.",
                param="continue_final_message",
            )
        chat = [_prepare(message) for message in messages]
        final_text = _open_final_message(chat) if continue_final_message else None
        variables: dict[str, Any] = {
            **self._special_tokens,
            **kwargs,
            "messages": chat,
            "tools": None if tools is None else [dict(tool) for tool in tools],
            "documents": None if documents is None else [dict(document) for document in documents],
            "add_generation_prompt": add_generation_prompt,
        }
        template = self._template if tools is None else self._tool_template
        start = time.perf_counter()
        try:
            with self._environment.limited():
                rendered = _render(template, variables)
        finally:
            with self._timing:  # several threads render at once
                self.slowest_s = max(self.slowest_s, time.perf_counter() - start)
        return rendered if final_text is None else _cut_at_tag(rendered, final_text)

    @cached_property
    def accepts_strings(self) -> bool:
        """Whether a message with string content comes out as text: the template is tried with one."""
        return self._shows_probe(_PROBE)

    @cached_property
    def accepts_parts(self) -> bool:
        """Whether content given as a list of text parts comes out as text, not as the printed list."""
        return self._shows_probe([{"type": "text", "text": _PROBE}])

    def _shows_probe(self, content: object) -> bool:
        messages = [{"role": "user", "content": content}]
        try:
            rendered = self.render(messages)
        except RequestError:
            return False
        before, found, after = rendered.partition(_PROBE)
        printed = before.endswith(("'", '"')) and after.startswith(("'", '"'))  # as Python or JSON shows it
        return bool(found) and not (printed and isinstance(content, list))

    @cached_property
    def knows_developer_role(self) -> bool:
        """Whether "developer" is one of the template's string constants."""
        parsed = [self._environment.parse(source) for source in self._sources]
        return any(
            constant.value == "developer" for tree in parsed for constant in tree.find_all(nodes.Const)
        )

    def reads_variable(self, name: str) -> bool:
        """Whether setting `name` in a request can change anything: the template (or its variant) reads it."""
        return name in self._variables

    @cached_property
    def _variables(self) -> frozenset[str]:
        parsed = [self._environment.parse(source) for source in self._sources]
        return frozenset().union(*map(jinja2.meta.find_undeclared_variables, parsed))


def check_template_kwargs(kwargs: Mapping[str, Any]) -> None:
    """Raises RequestError (param "chat_template_kwargs") for names that a request may not set this way."""
    if clash := sorted(RESERVED_VARIABLES & kwargs.keys()):
        raise RequestError(
            f"chat_template_kwargs must not contain {', '.join(clash)}; use the request's own fields.",
            param="chat_template_kwargs",
        )


def _prepare(message: Mapping[str, Any]) -> dict[str, Any]:
    """A copy without null fields (templates test presence) and with reasoning under every name in use."""
    copy = {key: value for key, value in message.items() if value is not None}
    reasoning = next((copy[name] for name in _REASONING_FIELDS if name in copy), None)
    if reasoning is not None:
        copy = {"thinking": reasoning, **copy, "reasoning_content": reasoning}
    return copy


def _render(template: jinja2.Template, variables: Mapping[str, Any]) -> str:
    chunks: list[str] = []
    length = 0
    try:
        for chunk in template.generate(variables):
            chunks.append(chunk)
            length += len(chunk)
            if length > MAX_RENDERED_CHARS:
                raise RequestError(
                    f"The rendered chat exceeds {MAX_RENDERED_CHARS} characters; shorten the messages.",
                    param="messages",
                )
    except _RENDER_ERRORS as error:
        raise RequestError(
            f"The model's chat template rejected the messages: {_brief(error)}", param="messages"
        ) from error
    return "".join(chunks)


def _open_final_message(chat: list[dict[str, Any]]) -> str:
    """Appends a tag to the last message's text (in a copy), to be found again in the rendered chat."""
    content = chat[-1].get("content")
    if isinstance(content, str):
        chat[-1]["content"] = content + _CONTINUE_TAG
        return content
    parts = list(content) if isinstance(content, list) else []
    for index in reversed(range(len(parts))):
        text = parts[index].get("text") if isinstance(parts[index], Mapping) else None
        if isinstance(text, str):
            parts[index] = {**parts[index], "text": text + _CONTINUE_TAG}
            chat[-1]["content"] = parts
            return text
    raise RequestError(
        "continue_final_message needs text in the last message's content to continue.", param="messages"
    )


def _cut_at_tag(rendered: str, final_text: str) -> str:
    """Cuts the rendered chat where the final message's text ends.

    A template that trims messages has eaten the tag's trailing space; then the text before it is trimmed too.
    """
    tag = rendered.rfind(_CONTINUE_TAG.strip())
    if tag < 0 or final_text.strip() not in rendered:
        raise RequestError(
            "continue_final_message cannot be used with these messages: the model's chat template does not "
            "keep the last message's text.",
            param="messages",
        )
    kept = rendered[:tag]
    return kept if rendered.startswith(_CONTINUE_TAG, tag) else kept.rstrip()


def _brief(error: BaseException) -> str:
    text = str(error) or type(error).__name__
    return text if len(text) <= MAX_ERROR_CHARS else text[: MAX_ERROR_CHARS - 3] + "..."
