"""Requests with a grammar, where they differ from others: they wait for a constraint, and masks fall due.

Owns the requests that the scheduler must not see yet. Knows no grammar (`structured.py` does) and no tokens.
Invariant: a request is here from `add` until `take` or `discard`, and nowhere else meanwhile.
"""

from __future__ import annotations

import time
from concurrent.futures import FIRST_COMPLETED, Future, wait
from typing import NamedTuple

from gqa_serve.engine.constraints import Constraint, ConstraintError, ConstraintService
from gqa_serve.engine.request import Request, SamplingParams
from gqa_serve.engine.scheduler import Scheduled
from gqa_serve.errors import RequestError

MASK_PATIENCE_S = 0.05  # how long a step waits for the masks of its requests
PATIENCE_S = 0.02  # how long a step with nothing else to do waits for a constraint


def with_masks(scheduled: Scheduled) -> Scheduled:
    """What can be computed now: those whose masks are late are left for a later step, as others go on."""
    end = time.monotonic() + MASK_PATIENCE_S
    return [
        (request, row)
        for request, row in scheduled
        if request.constraint is None or request.constraint.has_mask(max(0.0, end - time.monotonic()))
    ]


class Made(NamedTuple):
    """A request whose constraint is there, or the reason why it never will be."""

    request: Request
    error: ConstraintError | None


class ConstrainedRequests:
    """The engine's requests with a grammar, over a service that makes constraints, if there is one."""

    def __init__(self, service: ConstraintService | None) -> None:
        self._service = service
        self._waiting: dict[str, tuple[Request, Future[Constraint]]] = {}
        self._due: list[tuple[Constraint, bool]] = []

    def __len__(self) -> int:
        """Requests whose constraint is being made."""
        return len(self._waiting)

    @property
    def requests(self) -> list[Request]:
        """Those whose constraint is being made, in order of arrival."""
        return [request for request, _ in self._waiting.values()]

    def __contains__(self, request_id: object) -> bool:
        return request_id in self._waiting

    def check(self, params: SamplingParams) -> None:
        """Raises RequestError if there is a grammar that nobody can make a constraint of."""
        if params.grammar is not None and self._service is None:
            raise RequestError("This engine has no grammars.", param="grammar")

    def add(self, request: Request) -> bool:
        """Have the request's constraint made; False if it needs none, and the scheduler may have it."""
        params = request.params
        if self._service is None or params.grammar is None or params.max_tokens == 0:
            return False
        self._waiting[request.request_id] = request, self._service.begin(params.grammar)
        return True

    def discard(self, request_id: str) -> bool:
        """Forget a request that waits; False if it does not."""
        waiting = self._waiting.pop(request_id, None)
        if waiting is None:
            return False
        waiting[1].cancel()  # a grammar nobody waits for need not be compiled
        return True

    def take(self, *, idle: bool) -> list[Made]:
        """The requests that need not wait any longer; if the engine is `idle`, some time is spent on that."""
        if idle and self._waiting:
            futures = [future for _, future in self._waiting.values()]
            wait(futures, timeout=PATIENCE_S, return_when=FIRST_COMPLETED)
        made = []
        for request, future in list(self._waiting.values()):
            if future.done():
                del self._waiting[request.request_id]
                try:
                    request.constraint = future.result()
                    made.append(Made(request, None))
                except ConstraintError as error:
                    made.append(Made(request, error))
        return made

    def moved_on(self, constraint: Constraint, *, avoid_end: bool) -> None:
        """A new mask is due; with `avoid_end` the sequence may end only where nothing else is left."""
        self._due.append((constraint, avoid_end))

    def prepare_masks(self) -> None:
        """Have the masks computed that are due, beside what the engine does next."""
        if self._due and self._service is not None:
            self._service.prepare(self._due)
            self._due = []
