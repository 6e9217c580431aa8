"""What a request says about tools: which functions, and whether the model may or must call them.

Owns the checks of `tools`, `tool_choice` and `parallel_tool_calls`. Knows neither templates nor how a model
spells a call. Invariant: a plan names at least one function, every name once.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import msgspec

from gqa_serve.api.errors import shorten
from gqa_serve.api.protocol import (
    AllowedTools,
    ChatRequest,
    FunctionDefinition,
    FunctionName,
    NamedTool,
    Tool,
    ToolChoice,
)
from gqa_serve.errors import RequestError

MAX_TOOLS = 512
MAX_NAME_CHARS = 128  # OpenAI takes 64, Anthropic and MCP 128
_NAME = re.compile(rf"[a-zA-Z0-9_.:/-]{{1,{MAX_NAME_CHARS}}}")
_MODES = ("none", "auto", "required")


@dataclasses.dataclass(frozen=True)
class ToolPlan:
    """The functions a model is told of, and how free it is to call them.

    `must_call`: the answer is a call. `is_named`: of the one function there is. Without `is_parallel` there
    is at most one call.
    """

    functions: tuple[FunctionDefinition, ...]
    params: tuple[str, ...]  # where in the request each function stands
    must_call: bool = False
    is_named: bool = False
    is_parallel: bool = True

    @property
    def names(self) -> frozenset[str]:
        """What may be called."""
        return frozenset(function.name for function in self.functions)

    @property
    def is_enforced(self) -> bool:
        """Whether the answer must follow a grammar: not where every answer is as good as another."""
        return self.must_call or not self.is_parallel or any(function.strict for function in self.functions)

    def described(self) -> list[dict[str, Any]]:
        """The functions as chat templates take them."""
        return [{"type": "function", "function": _described(function)} for function in self.functions]

    def schema(self, function: FunctionDefinition) -> dict[str, Any]:
        """What the arguments of `function` must fit: its parameters if the model has to keep to them."""
        if not (self.must_call or function.strict):
            return {"type": "object"}
        if not function.parameters:
            return {"type": "object", "properties": {}, "additionalProperties": False}
        return {**function.parameters, "type": "object"}


def _described(function: FunctionDefinition) -> dict[str, Any]:
    """With every key, since some templates take none to be missing."""
    return {
        "name": function.name,
        "description": function.description or "",
        "parameters": function.parameters or {"type": "object", "properties": {}},
    }


def read_tools(fields: ChatRequest) -> ToolPlan | None:
    """The plan; None if the model is not to call anything. Raises RequestError naming what is wrong."""
    tools, choice = fields.tools or [], fields.tool_choice
    if len(tools) > MAX_TOOLS:
        raise RequestError(f"tools takes at most {MAX_TOOLS} tools, got {len(tools)}.", param="tools")
    functions = [_checked(tool, f"tools[{number}]") for number, tool in enumerate(tools)]
    places: dict[str, int] = {}
    for number, function in enumerate(functions):
        if places.setdefault(function.name, number) != number:
            where = f"tools[{number}].function.name"
            raise RequestError(f"{where}: there is another tool {function.name!r}.", param=where)
    if isinstance(choice, str) and choice not in _MODES:
        raise RequestError(
            f"tool_choice must be one of {', '.join(_MODES)} or an object that names a function; "
            f"got {shorten(choice)!r}.",
            param="tool_choice",
        )
    if not functions and choice not in (None, "none", "auto"):
        raise RequestError("tool_choice needs tools; the request has none.", param="tool_choice")
    if not functions or choice == "none":
        return None
    chosen, must_call, is_named = list(range(len(functions))), choice == "required", False
    if isinstance(choice, ToolChoice):
        chosen, must_call, is_named = _chosen(choice, places)
    return ToolPlan(
        functions=tuple(functions[number] for number in chosen),
        params=tuple(f"tools[{number}].function.parameters" for number in chosen),
        must_call=must_call,
        is_named=is_named,
        is_parallel=fields.parallel_tool_calls is not False and not is_named,
    )


def _checked(tool: Tool, where: str) -> FunctionDefinition:
    if tool.type != "function":
        raise RequestError(
            f"{where}.type must be 'function', got {shorten(tool.type)!r}: this server runs no tools.",
            param=f"{where}.type",
        )
    function = tool.function
    if function is None:
        raise RequestError(f"Missing required field: {where}.function.", param=f"{where}.function")
    if not _NAME.fullmatch(function.name):
        raise RequestError(
            f"{where}.function.name must be 1 to {MAX_NAME_CHARS} letters, digits or any of _-.:/; "
            f"got {shorten(function.name)!r}.",
            param=f"{where}.function.name",
        )
    # Go's clients write an empty list or object as null.
    parameters = {key: value for key, value in (function.parameters or {}).items() if value is not None}
    place = f"{where}.function.parameters"
    if parameters.get("type", "object") != "object":
        raise RequestError(f"{place}.type must be 'object': arguments are named.", param=f"{place}.type")
    if not isinstance(parameters.get("properties", {}), dict):
        raise RequestError(f"{place}.properties must be an object.", param=f"{place}.properties")
    return msgspec.structs.replace(function, parameters=parameters or None)


def _chosen(choice: ToolChoice, places: dict[str, int]) -> tuple[list[int], bool, bool]:
    """Which tools an object chooses, whether one must be called, and whether it was named."""
    if choice.type == "function":
        where = "tool_choice.function"
        return [_place(choice.function, places, where)], True, True
    if choice.type != "allowed_tools":
        raise RequestError(
            f"tool_choice.type must be 'function' or 'allowed_tools', got {shorten(choice.type)!r}.",
            param="tool_choice.type",
        )
    where = "tool_choice.allowed_tools"
    if choice.allowed_tools is None:
        raise RequestError(f"Missing required field: {where}.", param=where)
    return _allowed(choice.allowed_tools, places, where), choice.allowed_tools.mode == "required", False


def _allowed(allowed: AllowedTools, places: dict[str, int], where: str) -> list[int]:
    if allowed.mode not in ("auto", "required"):
        raise RequestError(f"{where}.mode must be 'auto' or 'required'.", param=f"{where}.mode")
    if not 0 < len(allowed.tools) <= MAX_TOOLS:
        raise RequestError(f"{where}.tools must name 1 to {MAX_TOOLS} tools.", param=f"{where}.tools")
    numbers = [
        _place(_function(tool, f"{where}.tools[{number}]"), places, f"{where}.tools[{number}].function")
        for number, tool in enumerate(allowed.tools)
    ]
    return sorted(set(numbers))


def _function(tool: NamedTool, where: str) -> FunctionName | None:
    if tool.type != "function":
        raise RequestError(f"{where}.type must be 'function'.", param=f"{where}.type")
    return tool.function


def _place(function: FunctionName | None, places: dict[str, int], where: str) -> int:
    if function is None:
        raise RequestError(f"Missing required field: {where}.", param=where)
    if function.name not in places:
        raise RequestError(
            f"{where}.name: there is no tool {shorten(function.name)!r}.", param=f"{where}.name"
        )
    return places[function.name]
