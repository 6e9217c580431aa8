"""A request of a trace on its way through the twin, and the token ids that stand for its text.

Owns what the twin remembers of a request, and how tokens are made up so that two requests share exactly the
tokens that the trace says they share. Knows no scheduler.

Only equality matters to the prefix cache: each piece of text - a shared prefix, a turn's own words, an
answer - is one number, repeated as often as the piece has tokens. Where two requests hold the same pieces up
to a position they are equal there; at the first different piece they differ, and the cache looks no further.
Invariant: numbers of pieces are never used twice, and a million tokens are references to a few ints.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from gqa_serve.workbench.records import RequestRecord
from gqa_serve.workbench.trace import TraceRequest


@dataclass(eq=False)
class Job:
    """`number` is its place in the trace; `prompt_piece` and `answer_piece` are its own numbers.

    `history`: (tokens, piece) of the earlier prompts and answers of its conversation, the first of them with
    the shared prefix.
    """

    number: int
    request: TraceRequest
    prompt_piece: int
    answer_piece: int
    prefix_piece: int | None
    history: Sequence[tuple[int, int]]
    next_turn: Job | None = None
    sent_s: float = 0.0
    end_s: float = 0.0
    token_s: list[float] = field(default_factory=list)  # absolute; of tokens of one step the same object
    cached_tokens: int | None = None
    preemptions: int = 0
    replica: int | None = None
    error: str | None = None

    def tokens(self) -> list[int]:
        """The prompt's token ids."""
        tokens: list[int] = []
        if self.prefix_piece is not None:
            tokens += [self.prefix_piece] * self.request.prefix_tokens
        for count, piece in self.history:
            tokens += [piece] * (count - len(tokens))
        tokens += [self.prompt_piece] * (self.request.prompt_tokens - len(tokens))
        return tokens

    def record(self) -> RequestRecord:
        """What the client saw; times from the start of the run."""
        request, sent_s = self.request, self.sent_s
        return RequestRecord(
            sent_s=sent_s,
            prompt_tokens=request.prompt_tokens,
            output_tokens=len(self.token_s),
            token_s=[second - sent_s for second in self.token_s],
            e2e_s=self.end_s - sent_s,
            cached_tokens=self.cached_tokens,
            preemptions=self.preemptions,
            conversation=request.conversation,
            turn=request.turn,
            replica=self.replica,
            finish_reason="length" if self.error is None else None,
            error=self.error,
        )


def make_jobs(requests: Sequence[TraceRequest]) -> list[Job]:
    """A job for each request of a `checked` trace, later turns linked to earlier."""
    prefixes: dict[str, int] = {}
    last: dict[str, Job] = {}
    jobs = []
    for number, request in enumerate(requests):
        prefix = None
        if request.prefix is not None and request.prefix_tokens:
            prefix = -1 - prefixes.setdefault(request.prefix, len(prefixes))
        history: list[tuple[int, int]] = []
        earlier = last.get(request.conversation) if request.conversation is not None else None
        if earlier is not None:
            prompt = earlier.request.prompt_tokens
            answer = (prompt + earlier.request.output_tokens, earlier.answer_piece)
            history = [*earlier.history, (prompt, earlier.prompt_piece), answer]
        job = Job(number, request, 2 * number, 2 * number + 1, prefix, history)
        if earlier is not None:
            earlier.next_turn = job
        if request.conversation is not None:
            last[request.conversation] = job
        jobs.append(job)
    return jobs
