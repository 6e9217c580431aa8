"""How many tokens of prompts a step may compute beside answers that somebody reads as they come.

Owns what tokens took lately on this machine, and the time that a step may take. Knows no requests and no
clock. What is computed in which step never changes a token, so neither does this. Invariant: `most` is at
least `MIN_TOKENS`, so that prompts always advance.
"""

from __future__ import annotations

STEP_S = 0.2
"""How long a step with answers in it should take; longer only if the answers alone take half of it."""
MIN_TOKENS = 16
FIRST_TOKENS = 64
"""Of a prompt beside answers, as long as nothing is known."""
_TRUST = 64  # tokens that count as much as all that was seen before
_ANSWERS_WEIGHT = 0.2  # of a step among those before it


class Pace:
    """Seconds that a step of answers takes, and that each token of a prompt adds."""

    def __init__(self) -> None:
        self._answers_s: dict[int, float] = {}  # by the number of bits of how many there are
        self._token_s: float | None = None
        self._scored_s: float | None = None

    def most(self, answers: int, *, scored: bool) -> int:
        """Tokens of a prompt, `scored` (log-probabilities of each) or not, that fit beside `answers`."""
        token_s = self._scored_s if scored else self._token_s
        if token_s is None:
            return FIRST_TOKENS
        answers_s = self._of_answers(answers)
        room_s = max(STEP_S, 2 * answers_s) - answers_s
        return max(MIN_TOKENS, int(room_s / max(token_s, 1e-9)))

    def took(self, seconds: float, *, answers: int, plain: int, scored: int) -> None:
        """A step of so many answers and tokens of prompts took `seconds`."""
        if not plain + scored:
            number = answers.bit_length()
            self._answers_s[number] = _mixed(self._answers_s.get(number), seconds, _ANSWERS_WEIGHT)
            return
        left = max(0.0, seconds - self._of_answers(answers))
        if scored:
            left = max(0.0, left - plain * (self._token_s or 0.0))
            self._scored_s = _mixed(self._scored_s, left / scored, scored / (scored + _TRUST))
        else:
            self._token_s = _mixed(self._token_s, left / plain, plain / (plain + _TRUST))

    def _of_answers(self, answers: int) -> float:
        known = [number for number in self._answers_s if number <= answers.bit_length()]
        return self._answers_s[max(known)] if known and answers else 0.0


def _mixed(before: float | None, now: float, weight: float) -> float:
    return now if before is None else before + weight * (now - before)
