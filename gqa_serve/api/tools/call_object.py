"""`CallObject`: reads the JSON in which models spell a tool call, while it comes.

Owns where the name and the arguments of `{"name": ..., "arguments": {...}}` begin and end ("parameters" is
another word for arguments). Knows nothing of what stands around the object. Invariant: the arguments come
out as the model wrote them, and only once the name is known; they are not checked, since a client must get
what was written.
"""

from __future__ import annotations

import json
import re

BLANKS = " \t\r\n"
_ARGUMENTS = ("arguments", "parameters")
_SCALAR = frozenset("0123456789+-.eEtrufalsn")
_INSIDE = _SCALAR | frozenset(BLANKS + ",:")
_PLAIN = re.compile(r'[^"\\]+')
_BETWEEN = re.compile(r"[0-9+\-.eEtrufalsn \t\r\n,:]+")  # what `_INSIDE` holds


class NotACallError(ValueError):
    """What was read cannot be (more of) a call."""


class JsonValue:
    """The extent of one JSON value: follows strings and brackets, and checks little else."""

    def __init__(self) -> None:
        self.done = False
        self.has_begun = False
        self.in_string = False
        self._escaped = False
        self._depth = 0
        self._pieces: list[str] = []

    @property
    def text(self) -> str:
        """What was taken."""
        return "".join(self._pieces)

    def takes(self, char: str) -> bool:
        """Whether `char` belongs to the value; if not, the value (a number or word) ended before it.

        `char` may be a run of characters that `run` found. Raises NotACallError.
        """
        if self.in_string:
            self._string(char)
        elif char == '"' and (self._depth or not self.has_begun):
            self.in_string = True
        elif char in "{[" and (self._depth or not self.has_begun):
            self._depth += 1
        elif char in "}]" and self._depth:
            self._depth -= 1
            self.done = self._depth == 0
        elif not self._depth and self.has_begun and char in ",}]" + BLANKS:
            self.done = True
            return False
        elif not (_INSIDE if self._depth else _SCALAR).issuperset(char):
            raise NotACallError
        self.has_begun = True
        self._pieces.append(char)
        return True

    def _string(self, char: str) -> None:
        if self._escaped:
            self._escaped = False
        elif char == "\\":
            self._escaped = True
        elif char == '"':
            self.in_string = False
            self.done = self._depth == 0

    def run(self, text: str, start: int) -> int:
        """The end of what can be taken at once from `text[start:]`; at least one character."""
        match = None
        if self.in_string and not self._escaped:
            match = _PLAIN.match(text, start)
        elif self._depth and not self.in_string:
            match = _BETWEEN.match(text, start)
        return match.end() if match else start + 1


class CallObject:
    """One object, character by character.

    `begun` says that `name` is known and arguments come (or that there are none, and will be "{}").
    `known` are the names that make the object a call; None for any. With `needs_arguments` an object without
    is none.
    """

    def __init__(self, known: frozenset[str] | None = None, *, needs_arguments: bool = False) -> None:
        self.name: str | None = None
        self.begun = False
        self.done = False
        self._known = known
        self._needs_arguments = needs_arguments
        self._key: str | None = None
        self._arguments: str | None = None  # that came before the name
        self._value = JsonValue()
        self._streams = False
        self._read = self._open

    def run(self, text: str, start: int) -> int:
        """The end of what `push` may be given at once of `text[start:]`."""
        return self._value.run(text, start)

    def push(self, char: str) -> str:
        """More of the arguments, if `char` made any certain. Raises NotACallError."""
        return self._read(char)

    def _open(self, char: str) -> str:
        if char == "{":
            self._read = self._before_key
        elif char not in BLANKS:
            raise NotACallError
        return ""

    def _before_key(self, char: str) -> str:
        if char == "}":
            return self._end()
        if char == '"':
            self._value = JsonValue()
            self._read = self._in_key
            return self._in_key(char)
        if char not in BLANKS:
            raise NotACallError
        return ""

    def _in_key(self, char: str) -> str:
        self._value.takes(char)
        if self._value.done:
            self._key = str(_loads(self._value.text))
            self._read = self._colon
        return ""

    def _colon(self, char: str) -> str:
        if char == ":":
            self._value = JsonValue()
            self._read = self._in_value
        elif char not in BLANKS:
            raise NotACallError
        return ""

    def _in_value(self, char: str) -> str:
        if not self._value.has_begun:
            if char in BLANKS:
                return ""
            first = self._key in _ARGUMENTS and self._arguments is None and not self.begun
            self._streams = first and char == "{" and self.name is not None
            self.begun = self.begun or self._streams
        taken = self._value.takes(char)
        text = char if taken and self._streams else ""
        if self._value.done:
            self._read = self._after_value
            if not self._streams:
                text = self._end_value(self._value.text)
            self._streams = False
        return text if taken else text + self._after_value(char)

    def _end_value(self, text: str) -> str:
        if self._key == "name" and self.name is None:
            name = _loads(text)
            if not (isinstance(name, str) and name and (self._known is None or name in self._known)):
                raise NotACallError
            self.name = name
        elif self._key in _ARGUMENTS and self._arguments is None and not self.begun:
            self._arguments = _as_object(text)
        if self.name is None or self._arguments is None or self.begun:
            return ""
        self.begun = True
        return self._arguments

    def _after_value(self, char: str) -> str:
        if char == ",":
            self._read = self._before_key
        elif char == "}":
            return self._end()
        elif char not in BLANKS:
            raise NotACallError
        return ""

    def _end(self) -> str:
        if self.name is None or (self._needs_arguments and not self.begun):
            raise NotACallError
        self.done = True
        if self.begun:
            return ""
        self.begun = True
        return "{}"


def _loads(text: str) -> object:
    try:
        value: object = json.loads(text, strict=False)
    except (ValueError, RecursionError) as error:
        raise NotACallError from error
    return value


def _as_object(text: str) -> str:
    """Arguments as clients expect them: null is no arguments, an object in a string is that object."""
    if text == "null":
        return "{}"
    if not text.startswith('"'):
        return text
    inner = _loads(text)
    if not isinstance(inner, str) or not inner.strip():
        return "{}"
    try:
        return inner if isinstance(json.loads(inner), dict) else text
    except (ValueError, RecursionError):
        return text
