"""Stop strings in text that arrives in pieces: `StopStrings` (compiled) and `StopMatcher` (one per text).

An Aho-Corasick automaton over characters (Aho and Corasick, 1975): one step per character however many stop
strings there are. Its state is the longest suffix of the text that begins some stop string, which is exactly
the text that must not be shown yet. Knows no tokens. Invariants: a `StopStrings` never changes, so all
choices of a request share one; what a matcher has returned, plus what it holds, is all text fed so far; the
result does not depend on how the text was cut into pieces.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence


class StopStrings:
    """The automaton of `stops`: time and memory in proportion to their characters. Immutable."""

    def __init__(self, stops: Sequence[str]) -> None:
        self.children: list[dict[str, int]] = [{}]
        self.depth = [0]
        self.match: list[str | None] = [None]
        for stop in stops:
            self._insert(stop)
        self.fail = self._link()

    def _insert(self, stop: str) -> None:
        node = 0
        for char in stop:
            child = self.children[node].get(char)
            if child is None:
                child = len(self.children)
                self.children[node][char] = child
                self.children.append({})
                self.depth.append(self.depth[node] + 1)
                self.match.append(None)
            node = child
        self.match[node] = stop

    def _link(self) -> list[int]:
        """Failure links, breadth first; a node inherits its link's match, which is shorter than its own."""
        fail = [0] * len(self.children)
        queue = deque(self.children[0].values())
        while queue:
            node = queue.popleft()
            for char, child in self.children[node].items():
                link = fail[node]
                while link and char not in self.children[link]:
                    link = fail[link]
                fail[child] = self.children[link].get(char, 0)
                queue.append(child)
            if self.match[node] is None:
                self.match[node] = self.match[fail[node]]
        return fail

    def step(self, state: int, char: str) -> int:
        """The state after `char`."""
        while state and char not in self.children[state]:
            state = self.fail[state]
        return self.children[state].get(char, 0)


class StopMatcher:
    """Feeds on text, returns the text that is safe to show, until one of `stops` is complete.

    The match that is complete first wins; of several complete at the same character, the longest. With
    `include` the stop string stays in the text, otherwise the text ends before it.
    """

    def __init__(self, stops: StopStrings, *, include: bool = False) -> None:
        self._stops = stops
        self._include = include
        self._state = 0
        self.held = ""

    def feed(self, text: str, *, enabled: bool = True) -> tuple[str, str | None]:
        """(text safe to show, matched stop string or None). After a match, feed nothing more.

        With `enabled` False a stop string that ends in `text` is ignored (but may begin in it).
        """
        stops = self._stops
        buffer = self.held + text
        for index, char in enumerate(text, start=len(self.held)):
            self._state = stops.step(self._state, char)
            matched = stops.match[self._state]
            if matched is None:
                continue
            if enabled:
                end = index + 1
                self.held, self._state = "", 0
                return buffer[: end if self._include else end - len(matched)], matched
            while self._state and not stops.children[self._state]:
                self._state = stops.fail[self._state]  # nothing longer can grow from here
        safe = len(buffer) - stops.depth[self._state]
        self.held = buffer[safe:]
        return buffer[:safe], None

    def flush(self) -> str:
        """The held text, when it is certain that nothing follows."""
        held, self.held, self._state = self.held, "", 0
        return held
