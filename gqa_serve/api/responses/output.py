"""Output of the Responses API: parts of a message -> output items, and the events that tell of them.

Owns the order of events within an output: an item is added, its content part is added, deltas come, and all
is done in the opposite order before the next item begins. Knows neither HTTP nor where parts come from.
Invariant: the items, put together from the events, equal `items`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from gqa_serve.api.answers import ChatTokenLogprob
from gqa_serve.api.message_parts import ArgumentsPart, Part, ReasoningPart, TextPart, ToolCallPart
from gqa_serve.api.responses.protocol import (
    FunctionCallItem,
    ItemStatus,
    OutputItem,
    OutputMessage,
    OutputText,
    ReasoningItem,
    ReasoningText,
    new_id,
)

Event = dict[str, Any]


class Output:
    """The output items of a response, growing."""

    def __init__(self) -> None:
        self.items: list[OutputItem] = []
        self._open = False  # the last item may grow
        self._pieces: list[str] = []  # its text or arguments so far

    def add(self, part: Part, logprobs: list[ChatTokenLogprob]) -> Iterator[Event]:
        """The events of one more part; `logprobs` are those of its tokens, if it is text."""
        match part:
            case TextPart(text):
                yield from self._continue(OutputMessage)
                yield from self._delta("output_text", text, content_index=0, logprobs=logprobs)
                self._text_part().logprobs += logprobs
            case ReasoningPart(text):
                yield from self._continue(ReasoningItem)
                yield from self._delta("reasoning_text", text, content_index=0)
            case ToolCallPart(id=call_id, name=name):
                yield from self.end("completed")
                call = FunctionCallItem(id=new_id("fc_"), call_id=call_id, name=name, arguments="")
                yield from self._begin(call)
            case ArgumentsPart(text=text):
                if not (self._open and isinstance(self.items[-1], FunctionCallItem)):
                    raise TypeError("arguments came before their call")
                yield from self._delta("function_call_arguments", text)

    def end(self, status: ItemStatus) -> Iterator[Event]:
        """The events that end the item under way, if there is one."""
        if not self._open:
            return
        self._open = False
        item, text = self.items[-1], "".join(self._pieces)
        item.status = status
        if isinstance(item, FunctionCallItem):
            item.arguments = text
            yield self._event("function_call_arguments.done", arguments=text)
        else:
            part = item.content[0]
            extra: dict[str, Any] = {}
            if isinstance(part, OutputText):
                extra = {"logprobs": part.logprobs}
            if isinstance(part, OutputText | ReasoningText):
                part.text = text
                yield self._event(f"{part.type}.done", content_index=0, text=text, **extra)
            yield self._event("content_part.done", content_index=0, part=part)
        yield {"type": "response.output_item.done", "output_index": len(self.items) - 1, "item": item}

    def finish(self, status: ItemStatus) -> Iterator[Event]:
        """The last events. An answer of no token at all is an empty message."""
        if not self.items:
            yield from self._continue(OutputMessage)
        yield from self.end(status)

    def reasoning_text(self) -> str:
        """All thinking so far that has ended."""
        return "".join(
            part.text for item in self.items if isinstance(item, ReasoningItem) for part in item.content
        )

    def _continue(self, kind: type[OutputMessage] | type[ReasoningItem]) -> Iterator[Event]:
        """Begin an item of this kind, unless one is under way."""
        if self._open and isinstance(self.items[-1], kind):
            return
        yield from self.end("completed")
        if kind is OutputMessage:
            yield from self._begin(OutputMessage(id=new_id("msg_"), content=[OutputText("", logprobs=[])]))
        else:
            yield from self._begin(ReasoningItem(id=new_id("rs_"), content=[ReasoningText("")]))

    def _begin(self, item: OutputItem) -> Iterator[Event]:
        item.status = "in_progress"
        self.items.append(item)
        self._open = True
        self._pieces = []
        # A client puts the content together from the parts that follow.
        bare: Any = item
        if not isinstance(item, FunctionCallItem):
            bare = type(item)(id=item.id, status="in_progress", content=[])
        yield {"type": "response.output_item.added", "output_index": len(self.items) - 1, "item": bare}
        if not isinstance(item, FunctionCallItem):
            yield self._event("content_part.added", content_index=0, part=item.content[0])

    def _delta(self, kind: str, text: str, **values: Any) -> Iterator[Event]:
        self._pieces.append(text)
        yield self._event(f"{kind}.delta", delta=text, **values)

    def _text_part(self) -> OutputText:
        item = self.items[-1]
        part = item.content[0] if isinstance(item, OutputMessage) else None
        if not isinstance(part, OutputText):
            raise TypeError("no text is under way")
        return part

    def _event(self, name: str, **values: Any) -> Event:
        number = len(self.items) - 1
        return {
            "type": f"response.{name}",
            "item_id": self.items[-1].id,
            "output_index": number,
            **values,
        }
