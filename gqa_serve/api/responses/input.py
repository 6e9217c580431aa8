"""Input of the Responses API: items as clients send them -> complete items -> chat messages.

Owns which items are understood, and how neighbouring items of the assistant (reasoning, text, calls) become
one chat message. Knows neither the store (it is handed a function that looks references up) nor the engine.
Invariant: an item or part this server cannot read is refused with its path, never dropped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from gqa_serve.api.errors import shorten
from gqa_serve.api.protocol import ChatMessage, ContentPart, FunctionCall, ToolCall
from gqa_serve.api.responses.protocol import (
    FunctionCallItem,
    FunctionOutputItem,
    InputItem,
    InputMessage,
    InputPart,
    InputText,
    Item,
    OutputMessage,
    OutputText,
    ReasoningItem,
    ReasoningText,
    Refusal,
    SummaryText,
    new_id,
)
from gqa_serve.errors import RequestError

INPUT_ROLES = ("user", "system", "developer")
_TEXT_TYPES = ("input_text", "output_text", "text", "reasoning_text", "summary_text")

Resolve = Callable[[str, str], Item]


def read_input(value: str | Sequence[InputItem] | None, resolve: Resolve) -> list[Item]:
    """The request's `input`, complete. `resolve(id, param)` finds a referenced item. Raises RequestError."""
    if value is None:
        return []
    if isinstance(value, str):
        return [InputMessage(id=new_id("msg_"), role="user", content=[InputText(value)])]
    return [_read_item(item, f"input[{number}]", resolve) for number, item in enumerate(value)]


def is_reference(item: InputItem) -> bool:
    """Whether it stands for an item of an earlier response; `type` may be left out."""
    if item.type is None:
        return item.role is None and item.id is not None
    return item.type == "item_reference"


def _read_item(item: InputItem, where: str, resolve: Resolve) -> Item:
    match "item_reference" if is_reference(item) else item.type or "message":
        case "message":
            return _read_message(item, where)
        case "function_call":
            return FunctionCallItem(
                id=item.id or new_id("fc_"),
                call_id=_needed(item.call_id, f"{where}.call_id"),
                name=_needed(item.name, f"{where}.name"),
                arguments=item.arguments or "{}",
            )
        case "function_call_output":
            return FunctionOutputItem(
                id=item.id or new_id("fco_"),
                call_id=_needed(item.call_id, f"{where}.call_id"),
                output=_read_output(item, where),
            )
        case "reasoning":
            content = item.content or []
            if isinstance(content, str):
                content = [InputPart("reasoning_text", content)]
            return ReasoningItem(
                id=item.id or new_id("rs_"),
                summary=[SummaryText(text) for text in _texts(item.summary or [], f"{where}.summary")],
                content=[ReasoningText(text) for text in _texts(content, f"{where}.content")],
            )
        case "item_reference":
            return resolve(_needed(item.id, f"{where}.id"), f"{where}.id")
        case other:
            raise RequestError(
                f"{where}: input items of type {shorten(other)!r} are not supported; messages, function "
                "calls, their outputs, reasoning and item references are.",
                param=f"{where}.type",
            )


def _needed(value: str | None, param: str) -> str:
    if not value:
        raise RequestError(f"Missing required field: {param}.", param=param)
    return value


def _read_message(item: InputItem, where: str) -> InputMessage | OutputMessage:
    id = item.id or new_id("msg_")
    if item.content is None:
        raise RequestError(f"Missing required field: {where}.content.", param=f"{where}.content")
    parts = [InputPart("text", item.content)] if isinstance(item.content, str) else item.content
    if item.role == "assistant":
        content: list[OutputText | Refusal] = []
        for number, part in enumerate(parts):
            if part.type == "refusal" and part.refusal is not None:
                content.append(Refusal(part.refusal))
            else:
                content.append(OutputText(_text(part, f"{where}.content[{number}]")))
        return OutputMessage(id=id, content=content)
    if item.role not in INPUT_ROLES:
        raise RequestError(
            f"{where}.role must be one of {', '.join(INPUT_ROLES)}, assistant; "
            f"got {shorten(str(item.role))!r}.",
            param=f"{where}.role",
        )
    texts = _texts(parts, f"{where}.content")
    return InputMessage(id=id, role=item.role, content=[InputText(text) for text in texts])


def _read_output(item: InputItem, where: str) -> str | list[InputText]:
    if item.output is None:
        raise RequestError(f"Missing required field: {where}.output.", param=f"{where}.output")
    if isinstance(item.output, str):
        return item.output
    return [InputText(text) for text in _texts(item.output, f"{where}.output")]


def _texts(parts: Sequence[InputPart], where: str) -> list[str]:
    return [_text(part, f"{where}[{number}]") for number, part in enumerate(parts)]


def _text(part: InputPart, where: str) -> str:
    if part.type not in _TEXT_TYPES:
        raise RequestError(
            f"{where}: content parts of type {shorten(part.type)!r} are not supported; send text.",
            param=where,
        )
    if part.text is None:
        raise RequestError(f"Missing required field: {where}.text.", param=f"{where}.text")
    return part.text


# --- items -> messages -------------------------------------------------------------------------------------


class Conversation:
    """Chat messages of a series of items, each with the path of the item it began with."""

    def __init__(self) -> None:
        self.messages: list[ChatMessage] = []
        self.paths: list[str] = []
        self._calls: set[str] = set()
        self._assistant: ChatMessage | None = None  # the last message, while items may still join it

    @classmethod
    def of(cls, items: Iterable[tuple[str, Item]]) -> Conversation:
        """The messages of `items`, given with their paths. Raises RequestError."""
        conversation = cls()
        for path, item in items:
            conversation._add(path, item)
        return conversation

    def _add(self, path: str, item: Item) -> None:
        match item:
            case InputMessage(role=role, content=content):
                self._append(path, ChatMessage(role, _parts(content)))
            case FunctionOutputItem(call_id=call_id, output=output):
                if call_id not in self._calls:
                    raise RequestError(
                        f"{path}: no function_call before this output has the call_id {shorten(call_id)!r}.",
                        param=f"{path}.call_id",
                    )
                text = output if isinstance(output, str) else _parts(output)
                self._append(path, ChatMessage("tool", text, tool_call_id=call_id))
            case OutputMessage(content=parts):
                self._join(
                    path, lambda message: not message.content and not message.tool_calls
                ).content = "".join(
                    part.text if isinstance(part, OutputText) else part.refusal for part in parts
                )
            case ReasoningItem(content=texts):
                if texts:
                    message = self._join(path, lambda message: not message.content and not message.tool_calls)
                    thought = "".join(text.text for text in texts)
                    message.reasoning_content = (message.reasoning_content or "") + thought
            case FunctionCallItem(call_id=call_id, name=name, arguments=arguments):
                self._calls.add(call_id)
                call = ToolCall(FunctionCall(name, arguments), id=call_id, type="function")
                message = self._join(path, lambda message: True)
                message.tool_calls = message.tool_calls or []
                message.tool_calls.append(call)

    def _append(self, path: str, message: ChatMessage) -> None:
        self.messages.append(message)
        self.paths.append(path)
        self._assistant = None

    def _join(self, path: str, fits: Callable[[ChatMessage], bool]) -> ChatMessage:
        """The assistant's message under way if the next item `fits` it, else a new one."""
        message = self._assistant
        if message is None or not fits(message):
            message = ChatMessage("assistant")
            self._append(path, message)
            self._assistant = message
        return message


def _parts(content: Sequence[InputText]) -> str | list[ContentPart]:
    """One text as a string, which every template takes."""
    if len(content) == 1:
        return content[0].text
    return [ContentPart("text", part.text) for part in content]


def turn_starts(items: Sequence[Item]) -> list[int]:
    """Where `items` may begin when older ones are dropped: at 0, or at a user's message.

    No function call is parted from its output that way.
    """
    later = (
        number
        for number, item in enumerate(items)
        if number > 0 and isinstance(item, InputMessage) and item.role == "user"
    )
    return [0, *later]


def without_oldest(items: Sequence[tuple[str, Item]], start: int) -> list[tuple[str, Item]]:
    """`items` from `start` on, and the system's and developer's messages before it."""
    kept = [
        (path, item)
        for path, item in items[:start]
        if isinstance(item, InputMessage) and item.role in ("system", "developer")
    ]
    return kept + list(items[start:])
