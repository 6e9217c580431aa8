"""When a request ends by what was chosen for it.

Owns the meaning of end-of-sequence and stop tokens, `min_tokens`, `ignore_eos` and the length limits. Knows
no steps, no logits and no text. Invariant: what is decided of a token depends on the request and the tokens
before it alone, never on when it was computed.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from gqa_serve.engine.constraints import ConstraintError
from gqa_serve.engine.request import FinishReason, Request


class Ending(NamedTuple):
    """Why a request ends, and the end-of-sequence or stop token that says so, if one does.

    `refused`: an error that the request brought with it.
    """

    reason: FinishReason
    stop_token_id: int | None = None
    error: str | None = None
    refused: bool = False

    @classmethod
    def of_constraint(cls, error: ConstraintError) -> Ending:
        """The grammar cannot be followed."""
        return cls("error", error=str(error), refused=not error.is_ours)


class Endings:
    """For a model whose sequences end with one of `eos_token_ids`."""

    def __init__(self, eos_token_ids: Iterable[int]) -> None:
        self._eos = frozenset(eos_token_ids)

    def of(self, request: Request, token: int) -> Ending | None:
        """How `token`, the last that is known, ends the request; None if it does not."""
        params, num_known = request.params, len(request.tokens)  # a step in flight may be choosing one more
        if self._is_stop(request, token) and num_known - request.num_prompt_tokens > params.min_tokens:
            return Ending("stop", token)
        if request.constraint is not None and token in self._eos:
            return Ending("stop", token)  # its mask has weighed min_tokens and ignore_eos
        return Ending("length") if num_known >= request.max_num_tokens else None

    def _is_stop(self, request: Request, token: int) -> bool:
        params = request.params
        ends = token in self._eos or token in request.spec.end_token_ids
        return token in params.stop_token_ids or (ends and not params.ignore_eos)

    def bans(self, request: Request, token: int) -> bool:
        """Whether the sampler would refuse `token` as the next, whatever the constraint says."""
        params = request.params
        if params.allowed_token_ids is not None and token not in params.allowed_token_ids:
            return True
        ends = (*params.stop_token_ids, *request.spec.end_token_ids)
        return request.num_output_tokens < params.min_tokens and token in ends
