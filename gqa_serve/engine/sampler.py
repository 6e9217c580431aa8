"""From logits to tokens and log-probabilities, all rows of a step at once.

Owns penalties, filters and the random draw. Knows nothing of text, scheduling or how logits came about.

A row's result is a function of its logits, its request's tokens and parameters, and (seed, position):
the draw inverts the row's cumulative distribution at one uniform number hashed from seed and position, so
that neither batching nor preemption can move it. Log-probabilities are those of the unmodified logits.
"""

from __future__ import annotations

import hashlib
import math
import struct
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch

from gqa_serve.engine.request import Request, SamplingParams, TokenLogprobs

_SAMPLING_EPS = 1e-5
_FIRST_CANDIDATES = 256


class Sample(NamedTuple):
    """The chosen token of one row; None if its logits are not finite or leave no token to choose."""

    token_id: int | None
    logprobs: TokenLogprobs | None


class RowOperations(Protocol):
    """What a sampler does with whole rows of logits [R, V] float32; a backend may have its own."""

    def argmax(self, logits: torch.Tensor) -> list[int]:
        """The first index of each row's largest value, -1 for a row that holds a value that is not finite."""

    def draw(
        self,
        logits: torch.Tensor,
        rows: Sequence[int],
        params: Sequence[SamplingParams],
        units: Sequence[float],
    ) -> list[int]:
        """For each of `rows` the token at `units[i]` of the distribution that its parameters leave.

        Temperature, then top-k, top-p, min-p; tokens that tie with the last one kept are kept. Logits may be
        -inf. Rows without a finite logit give any number.
        """


class Sampler:
    """Stateless but for the token counts of requests that use penalties."""

    def __init__(self, eos_token_ids: Iterable[int], operations: RowOperations | None = None) -> None:
        self._eos = sorted(eos_token_ids)
        self._operations = operations if operations is not None else TorchRows()
        self._counts: dict[str, _TokenCounts] = {}

    def forget(self, request_id: str) -> None:
        """Drop what is remembered of an ended request."""
        self._counts.pop(request_id, None)

    def sample(self, logits: torch.Tensor, requests: Sequence[Request]) -> list[Sample]:
        """One token per row of `logits` [R, V] float32; row r belongs to `requests[r]`."""
        if not requests:
            return []
        tokens = self._operations.argmax(logits)
        finite = [token >= 0 for token in tokens]
        logprobs = self._logprobs_rows(logits, requests)
        touched = [row for row, request in enumerate(requests) if _changes_logits(request)]
        if touched:
            logits = self._adjust(logits, requests, touched)
            # Penalties may overflow and bans may leave nothing to choose: those rows have no token either.
            best = logits[touched].max(dim=-1)
            usable = torch.isfinite(best.values).tolist()
            for row, token, ok in zip(touched, best.indices.tolist(), usable, strict=True):
                tokens[row] = token
                finite[row] &= ok
        drawn = [row for row, request in enumerate(requests) if request.params.temperature > _SAMPLING_EPS]
        if drawn:
            params = [requests[row].params for row in drawn]
            units = [random_unit(requests[row].seed, requests[row].num_tokens) for row in drawn]
            for row, token in zip(drawn, self._operations.draw(logits, drawn, params, units), strict=True):
                tokens[row] = token
                finite[row] &= token >= 0
        result = []
        for row, (token_id, ok) in enumerate(zip(tokens, finite, strict=True)):
            entry = None
            if ok and row in logprobs:
                count = requests[row].params.logprobs or 0
                entry = token_logprobs(logprobs[row][None], [token_id], count)[0]
            result.append(Sample(token_id if ok else None, entry))
        return result

    def _logprobs_rows(self, logits: torch.Tensor, requests: Sequence[Request]) -> dict[int, torch.Tensor]:
        """Log-probabilities [V] of the rows that asked for them."""
        wanted = [row for row, request in enumerate(requests) if request.params.logprobs is not None]
        if not wanted:
            return {}
        values = torch.log_softmax(logits[wanted], dim=-1)
        return dict(zip(wanted, values, strict=True))

    def _adjust(
        self, logits: torch.Tensor, requests: Sequence[Request], touched: Sequence[int]
    ) -> torch.Tensor:
        """A copy of the logits with min_tokens, penalties and bias applied to the rows `touched`."""
        logits = logits.clone()
        penalised = [row for row in touched if _has_penalty(requests[row].params)]
        if penalised:
            self._apply_penalties(logits, penalised, [requests[row] for row in penalised])
        added: list[tuple[int, int, float]] = []  # row, token, what to add
        for row in touched:
            params = requests[row].params
            added += [(row, token, bias) for token, bias in (params.logit_bias or {}).items()]
            if requests[row].num_output_tokens < params.min_tokens:
                added += [(row, token, -torch.inf) for token in {*self._eos, *params.stop_token_ids}]
        if added:
            rows, columns, values = zip(*added, strict=True)
            index = torch.tensor([rows, columns], device=logits.device)
            delta = torch.tensor(values, dtype=logits.dtype, device=logits.device)
            logits.index_put_((index[0], index[1]), delta, accumulate=True)
        return logits

    def _apply_penalties(
        self, logits: torch.Tensor, rows: Sequence[int], requests: Sequence[Request]
    ) -> None:
        """Repetition penalty over prompt and output, then presence and frequency over output, in place."""
        counts = [self._counts.setdefault(r.request_id, _TokenCounts(r)) for r in requests]
        for count, request in zip(counts, requests, strict=True):
            count.update(request.tokens)
        device = logits.device

        def flat(parts: list[np.ndarray]) -> tuple[torch.Tensor, torch.Tensor]:
            lengths = [len(part) for part in parts]
            row_index = np.repeat(np.asarray(rows, np.int64), lengths)
            return torch.from_numpy(row_index).to(device), torch.from_numpy(np.concatenate(parts)).to(device)

        def per_token(name: str, index: torch.Tensor) -> torch.Tensor:
            by_row = torch.zeros(logits.shape[0], dtype=logits.dtype, device=device)
            by_row[list(rows)] = torch.tensor(
                [getattr(r.params, name) for r in requests], dtype=logits.dtype, device=device
            )
            return by_row[index]

        row, token = flat([count.seen_ids() for count in counts])
        values = logits[row, token]
        penalty = per_token("repetition_penalty", row)
        logits[row, token] = torch.where(values > 0, values / penalty, values * penalty)
        row, token = flat([count.output_ids() for count in counts])
        times = torch.from_numpy(np.concatenate([count.output_counts() for count in counts])).to(device)
        delta = per_token("presence_penalty", row) + per_token("frequency_penalty", row) * times
        logits[row, token] -= delta.to(logits.dtype)


class _TokenCounts:
    """How often each token occurs in a request's output, and which tokens its prompt holds."""

    def __init__(self, request: Request) -> None:
        self._prompt = set(request.tokens[: request.num_prompt_tokens])
        self._output: Counter[int] = Counter()
        self._num_seen = request.num_prompt_tokens

    def update(self, tokens: Sequence[int]) -> None:
        self._output.update(tokens[self._num_seen :])
        self._num_seen = len(tokens)

    def seen_ids(self) -> np.ndarray:
        both = self._prompt | self._output.keys()
        return np.fromiter(both, np.int64, len(both))

    def output_ids(self) -> np.ndarray:
        return np.fromiter(self._output.keys(), np.int64, len(self._output))

    def output_counts(self) -> np.ndarray:
        return np.fromiter(self._output.values(), np.float32, len(self._output))


def _has_penalty(params: SamplingParams) -> bool:
    neutral = params.repetition_penalty == 1 and params.presence_penalty == 0
    return not (neutral and params.frequency_penalty == 0)


def _changes_logits(request: Request) -> bool:
    params = request.params
    return bool(params.logit_bias) or _has_penalty(params) or request.num_output_tokens < params.min_tokens


class TorchRows:
    """RowOperations in plain torch, on any device."""

    def argmax(self, logits: torch.Tensor) -> list[int]:
        finite = torch.isfinite(logits).all(dim=-1)  # [R]
        tokens: list[int] = torch.where(finite, logits.argmax(dim=-1), -1).tolist()
        return tokens

    def draw(
        self,
        logits: torch.Tensor,
        rows: Sequence[int],
        params: Sequence[SamplingParams],
        units: Sequence[float],
    ) -> list[int]:
        if len(rows) != len(logits):
            logits = logits[list(rows)]  # [S, V]
        device = logits.device
        temperature = torch.tensor([p.temperature for p in params], dtype=logits.dtype, device=device)
        scaled = logits / temperature[:, None]
        filtered = [row for row, p in enumerate(params) if p.top_k > 0 or p.top_p < 1 or p.min_p > 0]
        if filtered:
            floor = _filter_floor(scaled[filtered], [params[row] for row in filtered])
            scaled[filtered] = scaled[filtered].masked_fill(scaled[filtered] < floor[:, None], -torch.inf)
        cumulative = torch.softmax(scaled.double(), dim=-1).cumsum(dim=-1)  # [S, V]
        total = cumulative[:, -1]
        target = torch.tensor(units, dtype=torch.float64, device=device) * total
        target = torch.minimum(target, torch.nextafter(total, torch.zeros_like(total)))
        target = target.nan_to_num()  # rows without a finite logit
        # right=True: the first token whose cumulative probability exceeds the target, never one of no mass
        drawn = torch.searchsorted(cumulative, target[:, None], right=True)[:, 0]
        tokens: list[int] = drawn.clamp_(max=logits.shape[-1] - 1).tolist()
        return tokens


def _filter_floor(scaled: torch.Tensor, params: Sequence[SamplingParams]) -> torch.Tensor:
    """The smallest logit each row keeps, [S]. Ties with it are kept too.

    Only the largest candidates are sorted; the whole vocabulary only if a nucleus turns out to need it.
    """
    device = scaled.device
    vocab = scaled.shape[-1]
    top_k = torch.tensor([p.top_k if 0 < p.top_k < vocab else vocab for p in params], device=device)
    # Off is infinity, not 1: rounding may bring the cumulative probability to 1 before the last token.
    nucleus = [p.top_p if p.top_p < 1 else math.inf for p in params]
    top_p = torch.tensor(nucleus, dtype=torch.float64, device=device)
    limits = [p.top_k for p in params if 0 < p.top_k < vocab]
    size = min(vocab, max([_FIRST_CANDIDATES, *limits]))
    while True:
        best = scaled.topk(size, dim=-1).values.double()  # [S, size] descending
        rank = torch.arange(size, device=device)
        in_k = rank < top_k[:, None]
        within = torch.logsumexp(best.masked_fill(~in_k, -torch.inf), dim=-1)
        whole = torch.logsumexp(scaled.double(), dim=-1)
        mass = torch.where(top_k < vocab, within, whole)
        probs = (best - mass[:, None]).exp().masked_fill(~in_k, 0.0)
        before = probs.cumsum(dim=-1) - probs
        kept = in_k & ((before < top_p[:, None]) | (rank == 0))
        count = kept.sum(dim=-1)
        needs_more = (count == size) & (top_k > size) & (top_p < 1)
        if size == vocab or not bool(needs_more.any()):
            break
        size = min(vocab, size * 8)
    floor = best.gather(-1, (count - 1)[:, None])[:, 0]
    unfiltered = (top_k == vocab) & (top_p == math.inf)
    floor = floor.masked_fill(unfiltered, -torch.inf)
    min_p = torch.tensor([p.min_p for p in params], dtype=torch.float64, device=device)
    return torch.maximum(floor, best[:, 0] + min_p.log()).to(scaled.dtype)


def random_unit(seed: int, position: int) -> float:
    """A uniform number in [0, 1), a function of its arguments alone (BLAKE2b, counter-based)."""
    data = struct.pack("<qq", seed, position)
    (bits,) = struct.unpack("<Q", hashlib.blake2b(data, digest_size=8).digest())
    return float((bits >> 11) * 2.0**-53)


def token_logprobs(logprobs: torch.Tensor, token_ids: Sequence[int], count: int) -> list[TokenLogprobs]:
    """Entries for `token_ids[r]` in row r of `logprobs` [R, V], with the `count` likeliest tokens each."""
    chosen = torch.tensor(token_ids, device=logprobs.device)
    values = logprobs.gather(-1, chosen[:, None])  # [R, 1]
    ranks = (logprobs > values).sum(dim=-1) + 1
    top = logprobs.topk(count, dim=-1)
    return [
        TokenLogprobs(token_id, value, rank, list(zip(ids, best, strict=True)))
        for token_id, value, rank, ids, best in zip(
            token_ids,
            values[:, 0].tolist(),
            ranks.tolist(),
            top.indices.tolist(),
            top.values.tolist(),
            strict=True,
        )
    ]
