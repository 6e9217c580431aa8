"""Prompts of a wanted number of tokens, out of words that are one token each.

Owns the words and finding out, for the server's own tokenizer, which of them are single tokens and how many
tokens stand around a prompt (beginning of sequence, chat template). A counter of tokens is all that is
needed: a tokenizer, a /tokenize endpoint, or the `usage.prompt_tokens` of a request.
Invariant: words are separated by the space they begin with, so that tokens of words add up, and texts that
begin with the same words begin with the same tokens.
"""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from gqa_serve.errors import ConfigError

Count = Callable[[str], Awaitable[int]]
"""Tokens of a text, give or take a constant."""

# Frequent English words: single tokens in nearly every vocabulary when a space stands before them.
_TEXT = (
    "the of and to in is for that with as on at this from or an but not are have be was by they you which "
    "one all were when we there can more if no man out other so what up its about into than them could time "
    "my only do some two first water new people made over did down long way now find day may part sound work "
    "place year back give most very after thing our just name good think say great where help through much "
    "before line right too mean old any same tell follow came want show also around form small set put end "
    "does another well large must big even such because turn here why ask went men read need land different "
    "home us move try kind hand picture again change off play point house page letter mother answer found "
    "study still learn should world high every near add food between own below country plant last school "
    "father keep tree never start city earth eye light thought head under story saw left few while along "
    "might close something seem next hard open example begin life always those both paper together got group "
    "often run important until children side feet car night walk white sea began grow took river four carry "
    "state once book hear stop without second later miss idea enough eat face watch far real almost let above"
)
WORDS = tuple(dict.fromkeys(_TEXT.split()))
_ENOUGH = 64


@dataclass(frozen=True)
class Words:
    """Words of one token each, and what the server adds: tokens of a request, and of every later turn."""

    words: tuple[str, ...]
    overhead: int = 0
    turn_overhead: int = 0

    def text(self, count: int, seed: str) -> str:
        """So many words, the same for the same seed."""
        return "".join(f" {word}" for word in random.Random(seed).choices(self.words, k=count))


async def single_tokens(count: Count, words: Sequence[str] = WORDS) -> tuple[str, ...]:
    """The words that add one token. Raises ConfigError if they are too few to write prompts with.

    Halves what does not add up, so that few calls are needed where most words pass.
    """
    base = await count(" the")

    async def passing(part: Sequence[str]) -> list[str]:
        if await count(" the" + "".join(f" {word}" for word in part)) - base == len(part):
            return list(part)
        if len(part) == 1:
            return []
        middle = len(part) // 2
        return [*await passing(part[:middle]), *await passing(part[middle:])]

    found: list[str] = []
    for begin in range(0, len(words), _ENOUGH):  # short enough for any context
        found += await passing(words[begin : begin + _ENOUGH])
        if begin == 0 and not found:
            break
    if len(found) < _ENOUGH:
        raise ConfigError(
            f"Only {len(found)} of {len(words)} common English words are single tokens here, too few to "
            "write prompts of exact lengths with; send real ones with --dataset."
        )
    return tuple(found)
