"""Facts hidden in long texts: prompts of exact lengths, and whether an answer holds the key.

Owns the tasks "passkey" (a number in filler, after Mohtashami and Jaggi 2023, "Landmark attention") and
"needle" (a sentence in a text that is about other things, after Kamradt 2023, "Needle in a haystack").
Computes nothing. Invariant: a prompt has exactly the tokens asked for, and is a function of task, length,
depth, sample and seed.

    beginning | introduction | filler up to the depth | the fact | filler | question
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gqa_serve.errors import ConfigError

if TYPE_CHECKING:
    from gqa_serve.engine.tokenizer import Tokenizer

TASKS = ("passkey", "needle")

_FILLER = (
    "The road runs along the river. The sky above it is grey. A cart goes by, and then another one. "
    "Nothing happens for a while. The wind moves the reeds. "
)
_COLORS = ("red", "blue", "green", "yellow", "white", "black", "brown", "orange", "purple", "pink", "silver")
_TOWNS = ("Arlen", "Brockwell", "Cressing", "Dunmore", "Eastvale", "Farrow", "Gilden", "Harwick", "Ilmar")


@dataclass(frozen=True)
class Needle:
    """A fact of the user's own: `sentence` is hidden, `question` ends where the `answer` begins."""

    sentence: str
    question: str
    answer: str


@dataclass(frozen=True)
class Prompt:
    """Token ids that end where the key is expected, and the key: as text and as the tokens that say it."""

    task: str
    length: int
    depth: float
    sample: int
    token_ids: list[int]
    key: str
    key_ids: list[int]


@dataclass(frozen=True)
class _Fact:
    introduction: str
    sentence: str
    question: str
    key: str


def _passkey(draw: random.Random) -> _Fact:
    key = f"{draw.randrange(100_000):05d}"
    return _Fact(
        "Somewhere in the following text a pass key is given. Remember it: you will be asked for it.\n\n",
        f" The pass key is {key}. Remember that {key} is the pass key. ",
        "\n\nQuestion: What is the pass key?\nAnswer: The pass key is",
        key,
    )


def _needle(draw: random.Random) -> _Fact:
    town = draw.choice(_TOWNS)
    first, second = draw.sample(_COLORS, 2)
    return _Fact(
        "Read the following text. You will be asked a question about it.\n\n",
        f" The clock tower of {town} is painted {first} and {second}. ",
        f"\n\nQuestion: How is the clock tower of {town} painted?\n"
        f"Answer: The clock tower of {town} is painted",
        f"{first} and {second}",
    )


class Haystack:
    """Builds prompts for one tokenizer. `text`: the user's own haystack; None is the built-in one."""

    def __init__(self, tokenizer: Tokenizer, text: str | None, needle: Needle | None, seed: int) -> None:
        self._tokenizer = tokenizer
        self._needle = needle
        self._seed = seed
        self._beginning = tokenizer.encode("")
        self._filler = {
            "passkey": self._encode(_FILLER * 40 if text is None else text),
            "needle": self._encode(_passages() if text is None else text),
        }

    def prompt(self, task: str, length: int, depth: float, sample: int) -> Prompt:
        """A prompt of `length` tokens. Raises ConfigError if the fact and its question take more."""
        draw = random.Random(f"{self._seed} {task} {length} {depth} {sample}")
        fact = self._fact(task, draw)
        head = self._beginning + self._encode(fact.introduction)
        sentence, question = self._encode(fact.sentence), self._encode(fact.question)
        room = length - len(head) - len(sentence) - len(question)
        if room < 0:
            raise ConfigError(
                f"--lengths {length}: the {task} and its question take {length - room} tokens; use longer."
            )
        filler = self._stretch(task, room, draw)
        before = self._boundary(filler, round(depth * room))
        return Prompt(
            task,
            length,
            depth,
            sample,
            head + filler[:before] + sentence + filler[before:] + question,
            fact.key,
            self._encode(" " + fact.key),
        )

    def _fact(self, task: str, draw: random.Random) -> _Fact:
        if task == "passkey":
            return _passkey(draw)
        if self._needle is None:
            return _needle(draw)
        own = self._needle
        introduction = "Read the following text. You will be asked a question about it.\n\n"
        return _Fact(introduction, f" {own.sentence} ", f"\n\n{own.question}", own.answer)

    def _stretch(self, task: str, count: int, draw: random.Random) -> list[int]:
        """`count` tokens of filler from a random place on, around its end if need be."""
        filler = self._filler[task]
        begin = draw.randrange(len(filler))
        turned = filler[begin:] + filler[:begin]
        return (turned * (count // len(turned) + 1))[:count]

    def _boundary(self, filler: Sequence[int], place: int) -> int:
        """The end of a sentence nearest to `place`, if there is one within 50 tokens, else `place`."""
        for distance in range(51):
            for candidate in (place - distance, place + distance):
                if candidate in (0, len(filler)):
                    return candidate
                if 0 < candidate < len(filler) and self._ends_sentence(filler[candidate - 1]):
                    return candidate
        return place

    def _ends_sentence(self, token: int) -> bool:
        return self._tokenizer.token_bytes(token).rstrip().endswith((b".", b"!", b"?"))

    def _encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False)


def _passages() -> str:
    from gqa_serve.workbench.evaluate.text import builtin_documents

    return "\n\n".join(document.text for document in builtin_documents())


def holds_key(answer: str, key: str) -> bool:
    """Whether an answer says the key: its words in this order, and no longer word or number around them;
    upper or lower case and the number of spaces do not matter."""
    words = r"\s+".join(map(re.escape, key.split()))
    # Only where the key begins or ends like a Latin word: other scripts have no spaces around words.
    begin = "(?<![A-Za-z0-9])" if re.match("[A-Za-z0-9]", key.strip()) else ""
    end = "(?![A-Za-z0-9])" if re.search("[A-Za-z0-9]$", key.strip()) else ""
    return re.search(begin + words + end, answer, re.IGNORECASE) is not None


def check_needle(needle: Needle) -> None:
    """Raise ConfigError if its answer could not be found in it."""
    if not needle.answer.strip() or not holds_key(needle.sentence, needle.answer):
        raise ConfigError(
            "--needle does not hold --needle-answer, so it can't be found; write the answer as it is there."
        )
