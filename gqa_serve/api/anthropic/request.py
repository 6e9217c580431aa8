"""What the fields of an Anthropic Messages request mean, as a chat request.

Owns the endpoint's checks, the fields it refuses, and the translation of blocks to chat messages. Knows no
engine and nothing of answers. Invariant: a block or documented field is honoured, says what happens anyway,
or is refused by its path; `cache_control` is accepted anywhere, because prompts are always cached by content.
"""

from __future__ import annotations

from typing import Any

import msgspec

from gqa_serve.api.anthropic.protocol import Block, CountRequest, MessagesRequest, MessageTool, OutputFormat
from gqa_serve.api.client_names import ClientNames
from gqa_serve.api.errors import shorten
from gqa_serve.api.params import FieldRules
from gqa_serve.api.protocol import (
    ChatMessage,
    ChatRequest,
    ContentPart,
    FunctionCall,
    FunctionDefinition,
    FunctionName,
    JsonSchemaFormat,
    ResponseFormat,
    Tool,
    ToolCall,
    ToolChoice,
)
from gqa_serve.engine.chat_template import ChatTemplate
from gqa_serve.errors import RequestError

MIN_THINKING_BUDGET = 1024  # Anthropic's
# Field -> the values (besides null) that describe what happens anyway.
_REFUSED: dict[str, tuple[Any, ...]] = {
    "container": (),
    "mcp_servers": ([],),
    "context_management": (
        {"edits": []},
        # Claude Code's: all thinking is kept, as far as the chat template keeps it.
        {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
    ),
    "diagnostics": (),
    "inference_geo": (),
    "speed": ("standard",),
    "n": (1,),
}
_NO_OPS = ("cache_control", "user_profile_id", "workspace_id", "metadata", "service_tier")
_SAME_NAMES = frozenset(ChatRequest.__struct_fields__) & frozenset(MessagesRequest.__struct_fields__)
_TRANSLATED = frozenset({"messages", "tools", "tool_choice", "chat_template_kwargs"})
_CHOICES = {"auto": "auto", "any": "required", "none": "none"}
_THINKING = ("enabled", "disabled", "adaptive", "between_tools")
_EFFORTS = {"low": "low", "medium": "medium", "high": "high", "xhigh": "xhigh", "max": "xhigh"}
_THINKING_SWITCHES = ("enable_thinking", "thinking")  # what templates of hybrid models call it
# Claude Code puts a line of its own in front of the system prompt that differs from request to request. It is
# for Anthropic's accounting; in a prompt it would keep all that follows from being found in the prefix cache.
_BILLING_LINE = "x-anthropic-billing-header:"


def field_rules(type: type[msgspec.Struct]) -> FieldRules:
    """The rules of /v1/messages; of count_tokens, where fields that shape no prompt mean nothing."""
    return FieldRules.beside_chat(type, _REFUSED, [*_NO_OPS, *MessagesRequest.__struct_fields__])


def chat_request(
    fields: MessagesRequest | CountRequest, template: ChatTemplate
) -> tuple[ChatRequest, ClientNames]:
    """The request as a chat request, and how its fields are called here. Raises RequestError."""
    writer = _Messages()
    if fields.system is not None:
        writer.system(fields.system)
    for number, message in enumerate(fields.messages):
        writer.add(message.role, message.content, f"messages[{number}]")
    names = {f"messages[{number}]": path for number, path in enumerate(writer.paths)}
    names |= {"stop": "stop_sequences", "response_format": _format_path(fields)}
    names |= {
        "response_format.json_schema": _format_path(fields),
        "reasoning_effort": "output_config.effort",
    }
    names |= {"tool_choice.function": "tool_choice"}
    for number in range(len(fields.tools or [])):
        names[f"tools[{number}].function"] = f"tools[{number}]"
        names[f"tools[{number}].function.parameters"] = f"tools[{number}].input_schema"
    values: dict[str, Any] = {name: getattr(fields, name, None) for name in _SAME_NAMES - _TRANSLATED}
    values |= _choice(fields) | _output(fields, template)
    if isinstance(fields, MessagesRequest):
        _check_sampling(fields)
        values["stop"] = fields.stop_sequences
    tools = [_tool(tool, f"tools[{number}]") for number, tool in enumerate(fields.tools or [])]
    request = ChatRequest(
        **values,
        messages=writer.messages,
        tools=tools or None,
        chat_template_kwargs=_template_kwargs(fields, template),
    )
    last = writer.messages[-1] if writer.messages else None
    if last is not None and last.role == "assistant":  # the answer is to continue it
        if last.tool_calls:
            raise RequestError(
                "The conversation ends with a tool_use; send its tool_result after it.", param="messages"
            )
        request.continue_final_message = True
    return request, ClientNames(names)


def _check_sampling(fields: MessagesRequest) -> None:
    if fields.max_tokens < 1:
        raise RequestError("max_tokens must be at least 1.", param="max_tokens")
    if fields.temperature is not None and not 0 <= fields.temperature <= 1:
        raise RequestError("temperature must be between 0 and 1.", param="temperature")


def _choice(fields: CountRequest) -> dict[str, Any]:
    """`tool_choice` and `parallel_tool_calls`."""
    choice = fields.tool_choice
    if choice is None:
        return {}
    parallel = False if choice.disable_parallel_tool_use else None
    if choice.type == "tool":
        if not choice.name:
            raise RequestError("Missing required field: tool_choice.name.", param="tool_choice.name")
        named = ToolChoice("function", function=FunctionName(choice.name))
        return {"tool_choice": named, "parallel_tool_calls": parallel}
    if choice.type not in _CHOICES:
        raise RequestError(
            f"tool_choice.type must be one of auto, any, tool, none; got {shorten(choice.type)!r}.",
            param="tool_choice.type",
        )
    return {"tool_choice": _CHOICES[choice.type], "parallel_tool_calls": parallel}


def _tool(tool: MessageTool, where: str) -> Tool:
    if tool.type not in (None, "custom"):
        raise RequestError(
            f"Tools of type {shorten(tool.type)!r} are Anthropic's own and not run here; describe a "
            "tool of yours by name and input_schema.",
            param=f"{where}.type",
            code="unsupported_parameter",
        )
    for name in ("name", "input_schema"):
        if getattr(tool, name) is None:
            raise RequestError(f"Missing required field: {where}.{name}.", param=f"{where}.{name}")
    if tool.input_examples:
        raise RequestError(
            f"{where}.input_examples is not supported; put examples into the description.",
            param=f"{where}.input_examples",
            code="unsupported_parameter",
        )
    if tool.allowed_callers is not None and "direct" not in tool.allowed_callers:
        raise RequestError(
            f'{where}.allowed_callers must hold "direct": the model is the only caller here.',
            param=f"{where}.allowed_callers",
            code="unsupported_parameter",
        )
    definition = FunctionDefinition(str(tool.name), tool.description, tool.input_schema, tool.strict)
    return Tool("function", definition)


def _template_kwargs(fields: CountRequest, template: ChatTemplate) -> dict[str, Any] | None:
    """`chat_template_kwargs`, with the template's switch for thinking set as `thinking` says."""
    thinking = fields.thinking
    if thinking is None:
        return fields.chat_template_kwargs
    if thinking.type not in _THINKING:
        raise RequestError(
            f"thinking.type must be one of {', '.join(_THINKING)}; got {shorten(thinking.type)!r}.",
            param="thinking.type",
        )
    if thinking.type == "enabled" and thinking.budget_tokens is None:
        raise RequestError("Missing required field: thinking.budget_tokens.", param="thinking.budget_tokens")
    if thinking.budget_tokens is not None and thinking.budget_tokens < MIN_THINKING_BUDGET:
        raise RequestError(
            f"thinking.budget_tokens must be at least {MIN_THINKING_BUDGET}.", param="thinking.budget_tokens"
        )
    if thinking.display not in (None, "summarized", "omitted"):
        raise RequestError('thinking.display must be "summarized" or "omitted".', param="thinking.display")
    if thinking.type in ("adaptive", "between_tools"):
        return fields.chat_template_kwargs
    enabled = thinking.type == "enabled"
    switches = {name: enabled for name in _THINKING_SWITCHES if template.reads_variable(name)}
    return {**switches, **(fields.chat_template_kwargs or {})} or None


def _output(fields: CountRequest, template: ChatTemplate) -> dict[str, Any]:
    """`response_format` and `reasoning_effort`."""
    config = fields.output_config
    values: dict[str, Any] = {}
    if config is not None and config.effort is not None:
        if config.effort not in _EFFORTS:
            raise RequestError(
                f"output_config.effort must be one of {', '.join(_EFFORTS)}; got {shorten(config.effort)!r}.",
                param="output_config.effort",
            )
        # A wish, which agents send with every request: where a template knows no effort, nothing can be done.
        if template.reads_variable("reasoning_effort"):
            values["reasoning_effort"] = _EFFORTS[config.effort]
    if config is not None and config.format is not None:
        values["response_format"] = _format(config.format, "output_config.format")
    elif fields.output_format is not None:
        values["response_format"] = _format(fields.output_format, "output_format")
    return values


def _format_path(fields: CountRequest) -> str:
    """Where the request says what the text must be."""
    config = fields.output_config
    return "output_format" if config is None or config.format is None else "output_config.format"


def _format(format: OutputFormat, where: str) -> ResponseFormat:
    if format.type != "json_schema":
        raise RequestError(
            f'{where}.type must be "json_schema"; got {shorten(format.type)!r}.', param=f"{where}.type"
        )
    if format.schema is None:
        raise RequestError(f"Missing required field: {where}.schema.", param=f"{where}.schema")
    return ResponseFormat("json_schema", JsonSchemaFormat(format.schema))


# --- blocks -> messages ------------------------------------------------------------------------------------


class _Messages:
    """Chat messages, growing, each with the path of what it came from."""

    def __init__(self) -> None:
        self.messages: list[ChatMessage] = []
        self.paths: list[str] = []
        self._calls: set[str] = set()

    def system(self, content: str | list[Block]) -> None:
        """The system prompt."""
        if isinstance(content, list):
            texts = [_text(block, f"system[{number}]") for number, block in enumerate(content)]
            kept = [text for text in texts if not text.startswith(_BILLING_LINE)]
            if kept:
                self._append("system", _parts(kept), "system")
        elif content:
            self._append("system", content, "system")

    def add(self, role: str, content: str | list[Block], where: str) -> None:
        """One message, which becomes several if it holds tool results. Raises RequestError."""
        if role not in ("user", "assistant", "system"):
            raise RequestError(
                f"{where}.role must be user, assistant or system; got {shorten(role)!r}.",
                param=f"{where}.role",
            )
        if isinstance(content, str):
            self._append(role, content, where)
        elif role == "assistant":
            self._assistant(content, where)
        else:
            self._others(role, content, where)

    def _others(self, role: str, blocks: list[Block], where: str) -> None:
        """A user's message: its tool results each become a message of their own, in order."""
        texts: list[str] = []
        for number, block in enumerate(blocks):
            path = f"{where}.content[{number}]"
            if block.type == "tool_result" and role == "user":
                if texts:
                    self._append(role, _parts(texts), where)
                    texts = []
                self._tool_result(block, path)
            else:
                texts.append(_text(block, path))
        if texts or not blocks:
            self._append(role, _parts(texts), where)

    def _tool_result(self, block: Block, where: str) -> None:
        id = _needed(block.tool_use_id, f"{where}.tool_use_id")
        if id not in self._calls:
            raise RequestError(
                f"{where}: no tool_use before this result has the id {shorten(id)!r}.",
                param=f"{where}.tool_use_id",
            )
        content = block.content
        if content is None or isinstance(content, str):
            texts = [content or ""]
        else:
            texts = [_text(part, f"{where}.content[{number}]") for number, part in enumerate(content)]
        if block.is_error:  # chat templates know no failed tools: the model has to read it
            texts = ["Error:", *texts]
        self._append("tool", _parts(texts), where).tool_call_id = id

    def _assistant(self, blocks: list[Block], where: str) -> None:
        message = self._append("assistant", "", where)
        texts: list[str] = []
        for number, block in enumerate(blocks):
            path = f"{where}.content[{number}]"
            match block.type:
                case "thinking":
                    thought = _needed(block.thinking, f"{path}.thinking", empty=True)
                    message.reasoning_content = (message.reasoning_content or "") + thought
                case "redacted_thinking":
                    pass  # another server's, and unreadable by design
                case "tool_use":
                    message.tool_calls = message.tool_calls or []
                    message.tool_calls.append(self._tool_use(block, path))
                case _:
                    texts.append(_text(block, path))
        message.content = "".join(texts)

    def _tool_use(self, block: Block, where: str) -> ToolCall:
        id = _needed(block.id, f"{where}.id")
        name = _needed(block.name, f"{where}.name")
        if block.input is None:
            raise RequestError(f"Missing required field: {where}.input.", param=f"{where}.input")
        self._calls.add(id)
        arguments = msgspec.json.encode(block.input).decode()
        return ToolCall(FunctionCall(name, arguments), id=id, type="function")

    def _append(self, role: str, content: str | list[ContentPart], where: str) -> ChatMessage:
        message = ChatMessage(role, content)
        self.messages.append(message)
        self.paths.append(where)
        return message


def _parts(texts: list[str]) -> str | list[ContentPart]:
    """One text as a string, which every template takes."""
    return texts[0] if len(texts) == 1 else [ContentPart("text", text) for text in texts]


def _text(block: Block, where: str) -> str:
    if block.type != "text":
        raise RequestError(
            f"{where}: blocks of type {shorten(block.type)!r} are not supported here; send text.", param=where
        )
    return _needed(block.text, f"{where}.text", empty=True)


def _needed(value: str | None, param: str, *, empty: bool = False) -> str:
    if value is None or not (value or empty):
        raise RequestError(f"Missing required field: {param}.", param=param)
    return value
