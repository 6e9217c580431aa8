"""`StopMatcher`: finds stop strings in text that arrives in pieces, holding back as little as possible.

An Aho-Corasick automaton over characters (Aho and Corasick, 1975): one step per character however many stop
strings there are. Its state is the longest suffix of the text that begins some stop string, which is exactly
the text that must not be shown yet. Knows no tokens. Invariant: what has been returned, plus what is held,
is all text fed so far; the result does not depend on how the text was cut into pieces.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence


class StopMatcher:
    """Feeds on text, returns the text that is safe to show, until one of `stops` is complete.

    The match that is complete first wins; of several complete at the same character, the longest. With
    `include` the stop string stays in the text, otherwise the text ends before it.
    """

    def __init__(self, stops: Sequence[str], *, include: bool = False) -> None:
        self._include = include
        self._children: list[dict[str, int]] = [{}]
        self._depth = [0]
        self._match: list[str | None] = [None]
        for stop in stops:
            self._insert(stop)
        self._fail = self._link()
        self._state = 0
        self.held = ""

    def _insert(self, stop: str) -> None:
        node = 0
        for char in stop:
            child = self._children[node].get(char)
            if child is None:
                child = len(self._children)
                self._children[node][char] = child
                self._children.append({})
                self._depth.append(self._depth[node] + 1)
                self._match.append(None)
            node = child
        self._match[node] = stop

    def _link(self) -> list[int]:
        """Failure links, breadth first; a node inherits its link's match, which is shorter than its own."""
        fail = [0] * len(self._children)
        queue = deque(self._children[0].values())
        while queue:
            node = queue.popleft()
            for char, child in self._children[node].items():
                link = fail[node]
                while link and char not in self._children[link]:
                    link = fail[link]
                fail[child] = self._children[link].get(char, 0)
                queue.append(child)
            if self._match[node] is None:
                self._match[node] = self._match[fail[node]]
        return fail

    def feed(self, text: str, *, enabled: bool = True) -> tuple[str, str | None]:
        """(text safe to show, matched stop string or None). After a match, feed nothing more.

        With `enabled` False a stop string that ends in `text` is ignored (but may begin in it).
        """
        buffer = self.held + text
        for index, char in enumerate(text, start=len(self.held)):
            self._step(char)
            matched = self._match[self._state]
            if matched is None:
                continue
            if enabled:
                end = index + 1
                self.held, self._state = "", 0
                return buffer[: end if self._include else end - len(matched)], matched
            while self._state and not self._children[self._state]:
                self._state = self._fail[self._state]  # nothing longer can grow from here
        safe = len(buffer) - self._depth[self._state]
        self.held = buffer[safe:]
        return buffer[:safe], None

    def _step(self, char: str) -> None:
        state = self._state
        while state and char not in self._children[state]:
            state = self._fail[state]
        self._state = self._children[state].get(char, 0)

    def flush(self) -> str:
        """The held text, when it is certain that nothing follows."""
        held, self.held, self._state = self.held, "", 0
        return held
