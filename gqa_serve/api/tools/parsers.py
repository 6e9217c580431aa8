"""Finds tool calls in the text of a model, for each family's way to spell them, while the text comes.

Owns the markers of the families and what stands between them; `call_object.py` reads the JSON inside. Knows
no requests and no tokens. Invariants: however a text is cut into pieces, the parts (merged) are the same;
what turns out to be no call is text, every character of it; blanks next to a call belong to the syntax.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from gqa_serve.api.message_parts import ArgumentsPart, Part, TextPart, ToolCallPart
from gqa_serve.api.tools.call_object import BLANKS, CallObject, JsonValue, NotACallError

MISTRAL_HEAD_CHARS = 256
_MISTRAL_HEAD = re.compile(
    r"\s*([\w.:/-]{1,128})\s*(?:\[CALL_ID\][A-Za-z0-9_-]*)?\s*(?:\[ARGS\])?\s*", re.ASCII
)
_MISTRAL_HEAD_CHAR = re.compile(r"[\w.:/\-\[\]\s]", re.ASCII)


class ToolParser:
    """Text until `trigger`, then a call, then text again; subclasses know what a call looks like.

    `new_id` makes the ids of calls; `names` are the functions of the request.
    """

    trigger: str

    def __init__(self, new_id: Callable[[], str], names: frozenset[str] = frozenset()) -> None:
        self._new_id = new_id
        self._names = names
        self._run = re.compile(rf"[^\s{re.escape(self.trigger[0])}]+|[{BLANKS}]+")
        self._input = ""
        self._position = 0
        self._parts: list[Part] = []
        self._num_calls = 0
        self._is_quiet = False  # nothing but blanks since the last call
        self._fill: list[str] = []  # blanks before what may become a marker, one by one: there can be many
        self._hold = ""  # read, but not known to be text yet
        self._head = 0  # how much of `_hold` is marker rather than call
        self._call = CallObject()
        self._step: Callable[[], None] = self._text

    @property
    def is_cut(self) -> bool:
        """Once all was fed: whether the text ended within the arguments of a call."""
        return self._step == self._in_call and self._call.begun

    def feed(self, text: str, *, final: bool = False) -> list[Part]:
        """The parts that became certain with `text`; with `final`, all that is left."""
        self._requeue(text, at_end=True)
        self._work()
        if final:
            self._finish()
        parts, self._parts = self._parts, []
        return parts

    def _work(self) -> None:
        while self._position < len(self._input):
            self._step()
        self._input, self._position = "", 0

    def _finish(self) -> None:
        """No more text comes: what is held is text, but for the syntax of calls that were read."""
        while self._is_undecided():
            self._give_up()
            self._work()
        self._join_fill()
        if self._step == self._text and not (self._is_quiet and not self._hold.strip(BLANKS)):
            self._say(self._hold)
        self._hold = ""

    def _is_undecided(self) -> bool:
        """Whether what is held may still become a call."""
        return self._step == self._in_call and not self._call.begun

    def _take(self, end: int | None = None) -> str:
        start, self._position = self._position, self._position + 1 if end is None else end
        return self._input[start : self._position]

    def _untake(self, chars: str) -> None:
        """`chars`, which were just taken, are to be read again."""
        self._position -= len(chars)

    def _requeue(self, text: str, *, at_end: bool = False) -> None:
        """`text` is to be read (again). Copies what is unread, so it is for rare cases."""
        rest = self._input[self._position :]
        self._input, self._position = rest + text if at_end else text + rest, 0

    def _is_fill(self, chars: str, fill: str = BLANKS) -> bool:
        """Whether `chars` are nothing but more of the fill before a marker; they are kept if so."""
        if self._hold or chars.strip(fill):
            self._join_fill()
            return False
        self._fill.append(chars)
        return True

    def _join_fill(self) -> None:
        """What was kept counts as held."""
        self._hold = "".join(self._fill) + self._hold
        self._fill.clear()

    def _say(self, text: str) -> None:
        if text:
            self._parts.append(TextPart(text))
            self._is_quiet = False

    def _text(self) -> None:
        """Outside of calls: holds back blanks and what may become the trigger."""
        match = None if self._hold else self._run.match(self._input, self._position)
        chars = self._take(match.end() if match else None)
        if self._is_fill(chars):
            return
        held = self._hold + chars
        marker = held.lstrip(BLANKS)
        if self.trigger.startswith(marker):
            self._hold = held
            if marker == self.trigger:
                self._begin()
            return
        if self._hold:
            # Of a trigger only the first character can begin another one.
            held, self._hold = self._hold, ""
            self._say(held)
            self._untake(chars)
        else:
            self._say(chars)

    def _begin(self) -> None:
        """The trigger was read."""
        self._begin_object()

    def _begin_object(self, known: frozenset[str] | None = None, *, needs_arguments: bool = False) -> None:
        self._head = len(self._hold)
        self._call = CallObject(known, needs_arguments=needs_arguments)
        self._step = self._in_call

    def _in_call(self) -> None:
        call, was_begun = self._call, self._call.begun
        chars = self._take(call.run(self._input, self._position))
        try:
            text = call.push(chars)
        except NotACallError:
            self._untake(chars)
            (self._end_call if call.begun else self._give_up)()
            return
        if not call.begun:
            self._hold += chars
        elif not was_begun and call.name is not None:
            self._hold = ""
            self._announce(call.name)
        if text:
            self._parts.append(ArgumentsPart(self._num_calls - 1, text))
        if call.done:
            self._end_call()

    def _announce(self, name: str) -> None:
        self._parts.append(ToolCallPart(self._num_calls, self._new_id(), name))
        self._num_calls += 1
        self._is_quiet = True

    def _end_call(self) -> None:
        """What comes after a call's object."""
        self._step = self._text

    def _give_up(self) -> None:
        """No call: the marker is text, and what followed it is read again."""
        held, self._hold = self._hold, ""
        self._step = self._text
        self._say(held[: self._head])
        self._requeue(held[self._head :])


class HermesParser(ToolParser):
    """Hermes, Qwen and others: `<tool_call>{"name": ..., "arguments": ...}</tool_call>`, any number."""

    trigger = "<tool_call>"
    _closing = "</tool_call>"

    def _end_call(self) -> None:
        self._step = self._close

    def _close(self) -> None:
        """The closing marker, which models forget, or precede by a brace too many."""
        char = self._take()
        if self._is_fill(char, BLANKS + "}"):
            return
        self._hold += char
        marker = self._hold.lstrip(BLANKS + "}")
        if marker == self._closing:
            self._hold, self._step = "", self._text
        elif not self._closing.startswith(marker):
            held, self._hold = self._hold, ""
            self._step = self._text
            self._requeue(held)


class Llama3Parser(ToolParser):
    """Llama 3: a message that is `{"name": ..., "parameters": ...}`, or that after `<|python_tag|>`.

    Without the marker only an object that names one of the request's functions is a call: an answer may be
    JSON too.
    """

    trigger = "<|python_tag|>"

    def __init__(self, new_id: Callable[[], str], names: frozenset[str] = frozenset()) -> None:
        super().__init__(new_id, names)
        self._step = self._start

    def _start(self) -> None:
        self._between(BLANKS)

    def _next(self) -> None:
        self._between(BLANKS + ";,")

    def _end_call(self) -> None:
        self._step = self._next

    def _between(self, separators: str) -> None:
        """Before the first call, and between calls: the next one, or text."""
        char = self._take()
        if self._is_fill(char, separators):
            return
        self._hold += char
        marker = self._hold.lstrip(separators)
        if marker == "{":
            self._untake("{")
            self._hold = self._hold[:-1]
            self._begin_object(self._names, needs_arguments=True)
            self._head = len(self._hold) + 1
        elif marker == self.trigger:
            self._begin()
        elif not self.trigger.startswith(marker):
            held, self._hold = self._hold, ""
            self._step = self._text
            self._requeue(held)

    def _finish(self) -> None:
        self._join_fill()
        if self._step == self._next and not self._hold.strip(BLANKS + ";,"):
            self._hold = ""
        elif self._step in (self._start, self._next):
            self._head = len(self._hold)
            self._give_up()
        super()._finish()


class MistralParser(ToolParser):
    """Mistral: `[TOOL_CALLS]` before a list of call objects, or before `name[ARGS]{...}` (repeated)."""

    trigger = "[TOOL_CALLS]"

    def __init__(self, new_id: Callable[[], str], names: frozenset[str] = frozenset()) -> None:
        super().__init__(new_id, names)
        self._name = ""  # after the marker
        self._arguments = JsonValue()
        self._is_listed = False

    @property
    def is_cut(self) -> bool:
        """Whether the text ended within the arguments of a call."""
        return self._step == self._in_arguments or super().is_cut

    def _begin(self) -> None:
        self._head = len(self._hold)
        self._name = ""
        self._step = self._in_head

    def _is_undecided(self) -> bool:
        in_list = self._step == self._in_list and bool(self._hold)
        return in_list or self._step == self._in_head or super()._is_undecided()

    def _in_head(self) -> None:
        """What follows the marker: "[" of a list, "{" of a lone object, or a name and its markers."""
        char = self._take()
        head = self._name.strip()
        if not head and char == "[":
            self._hold += char
            self._step = self._in_list
        elif not head and char == "{":
            self._untake(char)
            self._begin_in(is_listed=False)
        elif char == "{" and (match := _MISTRAL_HEAD.fullmatch(self._name)):
            self._hold = ""
            self._announce(match[1])
            self._arguments = JsonValue()
            self._untake(char)
            self._step = self._in_arguments
        else:
            self._name += char
            self._hold += char
            if not _MISTRAL_HEAD_CHAR.match(char) or len(self._name) > MISTRAL_HEAD_CHARS:
                self._give_up()

    def _begin_in(self, *, is_listed: bool) -> None:
        self._is_listed = is_listed
        head = self._head if self._hold else 0
        self._begin_object()
        self._head = head

    def _in_list(self) -> None:
        char = self._take()
        if char == "{":
            self._untake(char)
            self._begin_in(is_listed=True)
        elif char == "]" and not self._hold:
            self._step = self._text
        elif char in BLANKS + ",":
            self._hold += char if self._hold else ""
        elif self._hold:
            self._hold += char
            self._give_up()
        else:
            self._step = self._text
            self._untake(char)

    def _end_call(self) -> None:
        self._step = self._in_list if self._call.done and self._is_listed else self._text

    def _in_arguments(self) -> None:
        chars = self._take(self._arguments.run(self._input, self._position))
        try:
            self._arguments.takes(chars)
        except NotACallError:
            self._step = self._text
            self._untake(chars)
            return
        self._parts.append(ArgumentsPart(self._num_calls - 1, chars))
        if self._arguments.done:
            self._step = self._text
