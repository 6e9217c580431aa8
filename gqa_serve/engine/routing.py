"""Router: which of several engines gets a request.

Owns the account of what each engine still has to compute, and what its prefix cache is likely to hold. Knows
no processes, no streams and no clock. The rule: a request goes where the fewest tokens stand before its
answer, its own prompt included; of equals, to the one that waited longest for a request.

    replica 0   outstanding 5,000   holds 4,096 of the prompt's 4,200 tokens   ->  5,104
    replica 1   outstanding   800   holds nothing of it                        ->  5,000   gets it

So a cached prefix attracts requests by exactly what it saves, and an engine that is busier than that by more
does not get them. Invariants: what a request added to the account is taken out again, once, however it ends;
an engine's known prefixes never stand for more tokens than its KV cache holds.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import NamedTuple

MIN_CHUNK_TOKENS = 64
"""Prefixes are compared in chunks of whole blocks, at least so long; less is not worth a detour."""
MAX_OUTPUT_TOKENS = 256
"""What an answer counts for at most: `max_tokens` is mostly far above what is generated, or not given."""


class Prompt(NamedTuple):
    """What routing needs of a prompt: `chunks` as of `chunks_of`, and one `max_tokens` for each choice."""

    num_tokens: int
    chunks: Sequence[int]
    max_tokens: Sequence[int]


def chunk_tokens(block_size: int) -> int:
    """Tokens of a chunk: as few whole blocks as make `MIN_CHUNK_TOKENS`."""
    return block_size * -(-MIN_CHUNK_TOKENS // block_size)


def chunks_of(prompt: Sequence[int], size: int, salt: str | None = None) -> list[int]:
    """A hash for each full chunk of `size` tokens, which covers all that precedes it, and the cache's salt.

    Two different prefixes may have one hash: then a request goes where it saves nothing, and no more happens.
    """
    chain = hash(salt or "")
    chunks = []
    for start in range(0, len(prompt) - size + 1, size):
        chain = hash((chain, tuple(prompt[start : start + size])))
        chunks.append(chain)
    return chunks


class Ticket:
    """One choice under way, in the account of its replica."""

    __slots__ = ("_num_output_tokens", "_num_prompt_tokens", "_replica")

    def __init__(self, replica: _Replica, num_prompt_tokens: int, num_output_tokens: int) -> None:
        self._replica = replica
        self._num_prompt_tokens = num_prompt_tokens
        self._num_output_tokens = num_output_tokens
        replica.outstanding += num_prompt_tokens + num_output_tokens

    def answered(self) -> None:
        """Its first output came, so its prompt has been computed."""
        self._replica.outstanding -= self._num_prompt_tokens
        self._num_prompt_tokens = 0

    def ended(self) -> None:
        """It is over."""
        self._replica.outstanding -= self._num_prompt_tokens + self._num_output_tokens
        self._num_prompt_tokens = self._num_output_tokens = 0


class _Replica:
    """The account of one engine."""

    def __init__(self) -> None:
        self.outstanding = 0
        """Tokens to compute: of prompts until the first output, of answers as they were guessed."""
        self.last_turn = 0
        """The turn in which it got a request; 0 if it never did."""
        self._max_chunks = 0
        self._known: OrderedDict[int, None] = OrderedDict()  # chunks, those of the latest requests last

    def renew(self, max_chunks: int) -> None:
        """It has an empty KV cache of so many chunks."""
        self._max_chunks = max_chunks
        self._known.clear()

    @property
    def num_known(self) -> int:
        """Chunks that its cache is thought to hold."""
        return len(self._known)

    def num_held(self, chunks: Sequence[int]) -> int:
        """How many of them, from the first on, its cache is thought to hold."""
        for number, chunk in enumerate(chunks):
            if chunk not in self._known:
                return number
        return len(chunks)

    def learn(self, chunks: Sequence[int]) -> None:
        """Its cache will hold them. The end of a prefix is forgotten before its beginning, as it is there."""
        known = self._known
        for chunk in reversed(chunks[: self._max_chunks]):
            known[chunk] = None
            known.move_to_end(chunk)
        while len(known) > self._max_chunks:
            known.popitem(last=False)


class Router:
    """Over `num_replicas` engines, whose prefixes are compared in chunks of `chunk_tokens`."""

    def __init__(self, num_replicas: int, chunk_tokens: int) -> None:
        self.chunk_tokens = chunk_tokens
        self._replicas = [_Replica() for _ in range(num_replicas)]
        self._turn = 0

    def outstanding(self, replica: int) -> int:
        """Tokens that it has to compute."""
        return self._replicas[replica].outstanding

    def num_known(self, replica: int) -> int:
        """Chunks of prefixes that it is thought to hold."""
        return self._replicas[replica].num_known

    def renew(self, replica: int, cache_tokens: int) -> None:
        """It begins with an empty KV cache of so many tokens: whatever it held before is gone."""
        self._replicas[replica].renew(cache_tokens // self.chunk_tokens)

    def order(self, prompts: Iterable[Prompt], among: Iterable[int]) -> list[int]:
        """These replicas, the one that should get the prompts (all of them together) first."""
        prompts = list(prompts)

        def tokens_before_answer(number: int) -> tuple[int, int]:
            replica = self._replicas[number]
            return replica.outstanding - self._saved(replica, prompts), replica.last_turn

        return sorted(among, key=tokens_before_answer)

    def enter(self, replica: int, prompts: Iterable[Prompt]) -> list[Ticket]:
        """The replica got the prompts: a ticket for each choice, in order.

        A prompt counts with its first choice, less what is cached; the others share its blocks.
        """
        account = self._replicas[replica]
        self._turn += 1
        account.last_turn = self._turn
        tickets = []
        for prompt in prompts:
            to_compute = prompt.num_tokens - account.num_held(prompt.chunks) * self.chunk_tokens
            account.learn(prompt.chunks)
            for max_tokens in prompt.max_tokens:
                tickets.append(Ticket(account, to_compute, min(max_tokens, MAX_OUTPUT_TOKENS)))
                to_compute = 0
        return tickets

    def _saved(self, replica: _Replica, prompts: Sequence[Prompt]) -> int:
        return sum(replica.num_held(prompt.chunks) for prompt in prompts) * self.chunk_tokens
