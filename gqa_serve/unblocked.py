"""Unblocked: a text stream onto a file descriptor that nobody ever waits for.

For standard error: whoever reads it may have gone, may have stopped reading, or its disk may be full, and
none of that may hold up a server. Owns nothing but the count of what was lost, which is told with the next
line that gets through. Knows nothing of logging.
"""

from __future__ import annotations

import contextlib
import io
import os
import select
from collections.abc import Callable
from typing import TextIO

_ATOMIC_BYTES = 512
"""A pipe that can be written to takes at least so many bytes at once (POSIX's least PIPE_BUF)."""


class Unblocked(io.TextIOBase):
    """In the place of `stream`, which must have a file descriptor; see `unblocked`."""

    def __init__(self, stream: TextIO, tell_lost: Callable[[int], str] | None = None) -> None:
        self._fd = stream.fileno()
        self._tell_lost = tell_lost or _in_words
        self._num_lost = 0
        self._is_cut = False
        """Whether the last that was written is the beginning of a message whose end was lost."""

    def fileno(self) -> int:
        """The descriptor."""
        return self._fd

    def writable(self) -> bool:
        """It is."""
        return True

    def write(self, text: str) -> int:
        """Write what can be written without waiting; the rest is lost."""
        lost = "\n" * self._is_cut + (self._tell_lost(self._num_lost) + "\n" if self._num_lost else "")
        if self._put((lost + text).encode("utf-8", "backslashreplace")):
            self._num_lost, self._is_cut = 0, False
        else:
            self._num_lost += 1
        return len(text)

    def _put(self, data: bytes) -> bool:
        with contextlib.suppress(OSError):  # nobody reads, no room, too large: said once somebody does
            while data:
                if not select.select([], [self._fd], [], 0)[1]:
                    return False
                written = os.write(self._fd, data[:_ATOMIC_BYTES])
                self._is_cut = data[written - 1 : written] != b"\n"
                data = data[written:]
            return True
        return False


def _in_words(num_lost: int) -> str:
    return f"({num_lost} messages could not be written here)"


def unblocked(stream: TextIO, tell_lost: Callable[[int], str] | None = None) -> TextIO | Unblocked:
    """`stream`, unblocked if it is a file, a pipe or a terminal; as it is otherwise.

    `tell_lost` makes the line that says how many messages were lost before it.
    """
    try:
        return Unblocked(stream, tell_lost)
    except (OSError, ValueError):  # io.UnsupportedOperation is both; a closed stream is a ValueError
        return stream
