"""Server-sent events out of bytes that may be split anywhere.

Owns the framing of the WHATWG standard (section 9.2.6): lines end in \\n, \\r or \\r\\n, an empty line ends
an event, several `data` lines are joined by \\n, lines that begin with a colon are comments. Knows nothing of
what the data means. Invariant: how the bytes are cut into pieces does not matter.
"""

from __future__ import annotations


class EventParser:
    """Feed bytes, get the data of the events that they complete."""

    def __init__(self) -> None:
        self._rest = b""
        self._data: list[bytes] = []
        self._started = False
        self._after_return = False

    def feed(self, piece: bytes) -> list[bytes]:
        """The data of every event that ends in `piece`; an event without data is none."""
        if self._after_return and piece:
            piece = piece.removeprefix(b"\n")  # the second half of \r\n
            self._after_return = False
        text = self._rest + piece if self._rest else piece
        if not self._started:
            if len(text) < 3 and b"\xef\xbb\xbf".startswith(text):
                self._rest = text  # perhaps a byte order mark
                return []
            text = text.removeprefix(b"\xef\xbb\xbf")
            self._started = True
        if b"\r" in text:
            self._after_return = text.endswith(b"\r")
            text = text.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        *lines, rest = text.split(b"\n")
        self._rest = rest
        events = []
        for line in lines:
            if line:
                self._line(line)
            elif self._data:
                events.append(b"\n".join(self._data) if len(self._data) > 1 else self._data[0])
                self._data = []
        return events

    @property
    def pending(self) -> bool:
        """Whether an event has begun and not ended: at the end of a stream, that it was cut."""
        return bool(self._data) or bool(self._rest.strip())

    def _line(self, line: bytes) -> None:
        if line.startswith(b"data:"):
            self._data.append(line[6:] if line[5:6] == b" " else line[5:])
        elif line == b"data":
            self._data.append(b"")
