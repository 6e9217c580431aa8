"""What the fields of a Responses request mean, as a chat request.

Owns the endpoint's checks, the fields it refuses, and the translation to `ChatRequest`; input items are
`input.py`'s. Knows no store and no engine. Invariant: a documented field is honoured, says what
happens anyway, or is refused by its name.
"""

from __future__ import annotations

import logging
from typing import Any

from gqa_serve.api.client_names import ClientNames
from gqa_serve.api.errors import shorten
from gqa_serve.api.params import FieldRules
from gqa_serve.api.protocol import (
    AllowedTools,
    ChatMessage,
    ChatRequest,
    FunctionDefinition,
    FunctionName,
    JsonSchemaFormat,
    NamedTool,
    ResponseFormat,
    Tool,
    ToolChoice,
)
from gqa_serve.api.responses.input import Conversation
from gqa_serve.api.responses.protocol import (
    FunctionTool,
    ReasoningConfig,
    ReasoningEcho,
    ResponseObject,
    ResponsesRequest,
    ResponseToolChoice,
    TextEcho,
    TextFormat,
)
from gqa_serve.errors import RequestError

# Field -> the values (besides null) that describe what happens anyway.
_REFUSED: dict[str, tuple[Any, ...]] = {
    "background": (False,),
    "background_options": (),
    "conversation": (),
    "prompt": (),
    "context_management": ([],),
    "access_programs": (),
    "image": (),
    "n": (1,),
}
_LOGPROBS = "message.output_text.logprobs"
# What `include` may ask for: log-probabilities; what reasoning items carry anyway (their text, in the open);
# and data of calls and files that never occur here.
INCLUDABLE = (
    _LOGPROBS,
    "reasoning.encrypted_content",
    "file_search_call.results",
    "web_search_call.results",
    "web_search_call.action.sources",
    "computer_call_output.output.image_url",
    "code_interpreter_call.outputs",
    "message.input_image.image_url",
)
_TEXT_FORMATS = ("text", "json_object", "json_schema")
_SAME_NAMES = frozenset(ChatRequest.__struct_fields__) & frozenset(ResponsesRequest.__struct_fields__)
_TRANSLATED = frozenset({"tools", "tool_choice"})  # same names, other shapes
MAX_METADATA, MAX_KEY_CHARS, MAX_VALUE_CHARS = 16, 64, 512

logger = logging.getLogger(__name__)


def field_rules() -> FieldRules:
    """The rules of /v1/responses."""
    return FieldRules.beside_chat(ResponsesRequest, _REFUSED)


def wants_logprobs(fields: ResponsesRequest) -> bool:
    """Whether `include` asks for them."""
    return _LOGPROBS in (fields.include or [])


def check_fields(fields: ResponsesRequest) -> None:
    """Raises RequestError for a value that is refused whatever the rest says."""
    check_include(fields.include)
    if fields.top_logprobs and not wants_logprobs(fields):
        raise RequestError(f'top_logprobs needs include: ["{_LOGPROBS}"].', param="top_logprobs")
    if fields.truncation not in (None, "auto", "disabled"):
        raise RequestError('truncation must be "auto" or "disabled".', param="truncation")
    if fields.max_tool_calls is not None and fields.max_tool_calls < 1:
        raise RequestError("max_tool_calls must be at least 1.", param="max_tool_calls")
    if fields.text is not None and fields.text.verbosity not in (None, "low", "medium", "high"):
        raise RequestError('text.verbosity must be "low", "medium" or "high".', param="text.verbosity")
    _check_reasoning(fields.reasoning or ReasoningConfig())
    metadata = fields.metadata or {}
    if len(metadata) > MAX_METADATA or any(
        len(key) > MAX_KEY_CHARS or len(value) > MAX_VALUE_CHARS for key, value in metadata.items()
    ):
        raise RequestError(
            f"metadata holds at most {MAX_METADATA} pairs, keys of at most {MAX_KEY_CHARS} characters and "
            f"values of at most {MAX_VALUE_CHARS}.",
            param="metadata",
        )


def check_include(include: list[str] | None) -> None:
    """Raises RequestError for a value that `include` does not know."""
    for number, name in enumerate(include or []):
        if name not in INCLUDABLE:
            raise RequestError(
                f"include[{number}] must be one of {', '.join(INCLUDABLE)}; got {shorten(name)!r}.",
                param=f"include[{number}]",
            )


def _check_reasoning(reasoning: ReasoningConfig) -> None:
    for name in ("summary", "generate_summary"):
        if getattr(reasoning, name) not in (None, "auto", "concise", "detailed"):
            raise RequestError(
                f'reasoning.{name} must be "auto", "concise" or "detailed".', param=f"reasoning.{name}"
            )
    if reasoning.context not in (None, "auto"):
        raise _unsupported("reasoning.context", "the chat template decides what is kept", "auto")
    if reasoning.mode not in (None, "standard"):
        raise _unsupported("reasoning.mode", "there is one mode", "standard")


def _unsupported(param: str, why: str, harmless: str) -> RequestError:
    return RequestError(
        f'{param} is not supported: {why}; leave it out (or send "{harmless}").',
        param=param,
        code="unsupported_parameter",
    )


class Tools:
    """The function tools among a request's tools; which others were passed over is logged once per type."""

    def __init__(self) -> None:
        self._warned: set[str] = set()

    def usable(self, fields: ResponsesRequest) -> list[tuple[str, FunctionTool]]:
        """Function tools with their paths. Raises RequestError."""
        found = []
        for number, tool in enumerate(fields.tools or []):
            path = f"tools[{number}]"
            if tool.type != "function":
                self._warn(tool.type)
            elif not tool.name:
                raise RequestError(f"Missing required field: {path}.name.", param=f"{path}.name")
            else:
                function = FunctionTool(
                    name=tool.name,
                    description=tool.description,
                    parameters=tool.parameters,
                    strict=tool.strict,
                )
                found.append((path, function))
        return found

    def _warn(self, type: str) -> None:
        if type not in self._warned and len(self._warned) < 64:
            self._warned.add(type)
            logger.warning("Passing over tools of type %r: this server runs no tools.", shorten(type))


def _tool_choice(choice: str | ResponseToolChoice | None) -> str | ToolChoice | None:
    if choice is None or isinstance(choice, str):
        return choice
    if choice.type == "function":
        if not choice.name:
            raise RequestError("Missing required field: tool_choice.name.", param="tool_choice.name")
        return ToolChoice("function", function=FunctionName(choice.name))
    if choice.type == "allowed_tools":
        names = []
        for number, tool in enumerate(choice.tools or []):
            if tool.type != "function" or not tool.name:
                raise _not_a_function(f"tool_choice.tools[{number}]", tool.type)
            names.append(NamedTool("function", FunctionName(tool.name)))
        return ToolChoice("allowed_tools", allowed_tools=AllowedTools(choice.mode or "auto", names))
    raise _not_a_function("tool_choice", choice.type)


def _not_a_function(path: str, type: str) -> RequestError:
    return RequestError(
        f"{path} names a tool of type {shorten(type)!r}; only function tools can be called here.",
        param=path,
        code="unsupported_parameter",
    )


def text_format(fields: ResponsesRequest) -> TextFormat:
    """What the text must be, checked. Raises RequestError."""
    format = None if fields.text is None else fields.text.format
    if format is None:
        return TextFormat("text")
    if format.type not in _TEXT_FORMATS:
        raise RequestError(
            f"text.format.type must be one of {', '.join(_TEXT_FORMATS)}; got {shorten(format.type)!r}.",
            param="text.format.type",
        )
    if format.type == "json_schema":
        for name in ("name", "schema"):
            if getattr(format, name) is None:
                raise RequestError(
                    f"Missing required field: text.format.{name}.", param=f"text.format.{name}"
                )
    return format


def chat_request(
    fields: ResponsesRequest, conversation: Conversation, tools: list[tuple[str, FunctionTool]]
) -> tuple[ChatRequest, ClientNames]:
    """The conversation and the rest of the fields, and how they are called here. Raises RequestError."""
    names = {
        "messages": "input",
        "max_tokens": "max_output_tokens",
        "response_format": "text.format",
        "response_format.json_schema": "text.format",
        "reasoning_effort": "reasoning.effort",
        "tool_choice.function": "tool_choice",
        "tool_choice.allowed_tools": "tool_choice",
    }
    messages = list(conversation.messages)
    paths = list(conversation.paths)
    if fields.instructions:
        messages.insert(0, ChatMessage("system", fields.instructions))
        paths.insert(0, "instructions")
    names |= {f"messages[{number}]": path for number, path in enumerate(paths)}
    if isinstance(fields.tool_choice, ResponseToolChoice):
        for number in range(len(fields.tool_choice.tools or [])):
            names[f"tool_choice.allowed_tools.tools[{number}].function"] = f"tool_choice.tools[{number}]"
    for number, (path, _) in enumerate(tools):
        names[f"tools[{number}]"] = names[f"tools[{number}].function"] = path
    format = text_format(fields)
    same: dict[str, Any] = {name: getattr(fields, name) for name in _SAME_NAMES - _TRANSLATED}
    request = ChatRequest(
        **same,
        messages=messages,
        tools=[_chat_tool(tool) for _, tool in tools] or None,
        tool_choice=_tool_choice(fields.tool_choice),
        max_tokens=fields.max_output_tokens,
        logprobs=wants_logprobs(fields),
        response_format=ResponseFormat(format.type, JsonSchemaFormat(format.schema)),
        reasoning_effort=None if fields.reasoning is None else fields.reasoning.effort,
    )
    return request, ClientNames(names)


def _chat_tool(tool: FunctionTool) -> Tool:
    return Tool("function", FunctionDefinition(tool.name, tool.description, tool.parameters, tool.strict))


def response_object(
    fields: ResponsesRequest, chat: ChatRequest, tools: list[tuple[str, FunctionTool]], **values: Any
) -> ResponseObject:
    """The response as it begins: the request's options, as they count here, and `values`."""
    choice = fields.tool_choice
    reasoning = fields.reasoning or ReasoningConfig()
    return ResponseObject(
        **values,
        instructions=fields.instructions,
        max_output_tokens=fields.max_output_tokens,
        max_tool_calls=fields.max_tool_calls,
        metadata=fields.metadata or {},
        parallel_tool_calls=fields.parallel_tool_calls is not False,
        previous_response_id=fields.previous_response_id,
        prompt_cache_key=fields.prompt_cache_key,
        reasoning=ReasoningEcho(chat.reasoning_effort, reasoning.summary and "auto"),  # all is shown
        safety_identifier=fields.safety_identifier,
        text=TextEcho(text_format(fields)),
        tool_choice=_choice_echo(choice),
        tools=[tool for _, tool in tools],
        top_logprobs=fields.top_logprobs or 0,
        truncation=fields.truncation or "disabled",
        user=fields.user,
    )


def _choice_echo(choice: str | ResponseToolChoice | None) -> str | dict[str, Any]:
    if choice is None or isinstance(choice, str):
        return choice or "auto"
    if choice.type == "function":
        return {"type": "function", "name": choice.name}
    tools = [{"type": tool.type, "name": tool.name} for tool in choice.tools or []]
    return {"type": choice.type, "mode": choice.mode or "auto", "tools": tools}
