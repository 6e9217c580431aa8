"""From logits to tokens and log-probabilities, all rows of a step at once.

Owns penalties, masks, filters and the random draw. Knows nothing of text, scheduling or what made the
logits.

A row's result is a function of its logits, its request's tokens and parameters, and (seed, position):
the draw inverts the row's cumulative distribution at one uniform number hashed from seed and position, so
that neither batching nor preemption can move it. Log-probabilities are those of the unmodified logits.

Choosing comes in two halves: `Sampler.launch` only tells the device what to do, `Pending.result` waits for
it. No value that the device computes is looked at in between, but by `TorchRows.draw` for rows with filters.
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
import torch.nn.functional as F

from gqa_serve.engine.request import Request, SamplingParams, TokenLogprobs
from gqa_serve.engine.transfer import HostCopy, select_rows, to_device

SCORING_ROWS = 256
"""Rows of prompt logits turned into log-probabilities at a time: bounds [rows, V] temporaries."""

_SAMPLING_EPS = 1e-5
_FIRST_CANDIDATES = 256


class Sample(NamedTuple):
    """The chosen token of one row; None if its logits are not finite or leave no token to choose."""

    token_id: int | None
    logprobs: TokenLogprobs | None


def _log_softmax(logits: torch.Tensor) -> torch.Tensor:
    """[R, V]. On a GPU the order of its sums depends on where a row begins in memory: rows are padded."""
    vocab = logits.shape[1]
    if logits.is_cuda and vocab % 4:
        padded = F.pad(logits, (0, -vocab % 4), value=-torch.inf)
        return torch.log_softmax(padded, dim=-1)[:, :vocab]
    return torch.log_softmax(logits, dim=-1)


class PendingScores:
    """Log-probabilities of `tokens` [R] int64, none < 0, in the rows of `logits` [R, V], soon on the host.

    With each come its rank and the `count` likeliest tokens.
    """

    def __init__(self, logits: torch.Tensor, tokens: torch.Tensor, count: int) -> None:
        logprobs = _log_softmax(logits)
        values = logprobs.gather(-1, tokens[:, None])  # [R, 1]
        ranks = (logprobs > values).sum(dim=-1) + 1
        top = logprobs.topk(count, dim=-1)
        self._copy = HostCopy(tokens, values[:, 0], ranks, top.indices, top.values)

    def result(self) -> list[TokenLogprobs]:
        """One entry per row; waits for the device."""
        tokens, values, ranks, top_ids, top_values = (tensor.tolist() for tensor in self._copy.wait())
        return [
            TokenLogprobs(token, value, rank, list(zip(ids, best, strict=True)))
            for token, value, rank, ids, best in zip(tokens, values, ranks, top_ids, top_values, strict=True)
        ]


class Pending:
    """What a step chose: `tokens` [R] int64 on the device, -1 for a row without one, and soon on the host.

    `scores`: log-probabilities of the tokens of some rows, with the numbers of those rows.
    """

    def __init__(self, tokens: torch.Tensor, scores: Sequence[tuple[Sequence[int], PendingScores]]) -> None:
        self.tokens = tokens
        self._scores = scores
        self._copy = HostCopy(tokens)

    def result(self) -> list[Sample]:
        """One sample per row; waits for the device."""
        (tokens,) = self._copy.wait()
        samples = [Sample(token if token >= 0 else None, None) for token in tokens.tolist()]
        for rows, scores in self._scores:
            for row, entry in zip(rows, scores.result(), strict=True):
                if samples[row].token_id is not None:
                    samples[row] = samples[row]._replace(logprobs=entry)
        return samples


class PendingStates:
    """Hidden states [R, E] as they are, in float32, soon on the host."""

    def __init__(self, hidden: torch.Tensor) -> None:
        self._copy = HostCopy(hidden.float())

    def result(self) -> np.ndarray:
        """[R, E] float32; waits for the device."""
        (states,) = self._copy.wait()
        return states.numpy()


class RowOperations(Protocol):
    """What a sampler does with whole rows of logits [R, V] float32; a backend may have its own.

    Results are int64 on the device of the logits. On a GPU no operation waits for it.
    """

    def mask(self, logits: torch.Tensor, rows: Sequence[int], masks: Sequence[bytes]) -> torch.Tensor:
        """In each of `rows` make the logits of tokens -inf that its mask lacks, in place. `rows` ascend.

        Token t is bit t % 8 (the lowest first) of byte t // 8; what is beyond the last byte is not allowed.
        Returns [S]: the first index of the largest value left in each row, -1 if that is not finite.
        """

    def argmax(self, logits: torch.Tensor) -> torch.Tensor:
        """[R]: the first index of each row's largest value, -1 for a row with a value that is not finite."""

    def draw(
        self,
        logits: torch.Tensor,
        rows: Sequence[int],
        params: Sequence[SamplingParams],
        units: Sequence[float],
    ) -> torch.Tensor:
        """[S]: for each of S `rows` the token at `units[i]` of the distribution that its parameters leave.

        Temperature, then top-k, top-p, min-p; tokens that tie with the last one kept are kept. Logits may be
        -inf. Rows without a finite logit give any number. `rows` ascend.
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

    @torch.inference_mode()
    def launch(self, logits: torch.Tensor, requests: Sequence[Request]) -> Pending:
        """Choose one token per row of `logits` [R, V] float32; row r belongs to `requests[r]`. R > 0.

        The logits may be changed.
        """
        tokens = self._operations.argmax(logits)
        modified = logits
        touched = [row for row, request in enumerate(requests) if _changes_logits(request)]
        if touched:
            # In place unless the unmodified logits are still to be looked at.
            scored = any(requests[row].params.logprobs is not None for row in touched)
            modified = self._adjust(logits.clone() if scored else logits, requests, touched)
            # Penalties may overflow and bans may leave nothing to choose: those rows have no token either.
            masked = {row: c.mask() for row in touched if (c := requests[row].constraint) is not None}
            if masked:
                best = self._operations.mask(modified, list(masked), list(masked.values()))
                tokens = _choose(tokens, list(masked), best)
            if others := [row for row in touched if row not in masked]:
                values, indices = select_rows(modified, others).max(dim=-1)
                tokens = _choose(tokens, others, torch.where(torch.isfinite(values), indices, -1))
        drawn = [row for row, request in enumerate(requests) if request.params.temperature > _SAMPLING_EPS]
        if drawn:
            params = [requests[row].params for row in drawn]
            units = [random_unit(requests[row].seed, requests[row].num_tokens) for row in drawn]
            tokens = _choose(tokens, drawn, self._operations.draw(modified, drawn, params, units))
        return Pending(tokens, self._score_choices(logits, tokens, requests))

    def nothing(self, hidden: torch.Tensor) -> Pending:
        """For a step that chooses no token, so that it is waited for like one that does. hidden [R, E]."""
        return Pending(hidden.new_empty(0, dtype=torch.int64), [])

    def states(self, hidden: torch.Tensor) -> PendingStates:
        """Hidden states [R, E] that nothing is chosen from: who asked for them pools them."""
        return PendingStates(hidden)

    def score(self, logits: torch.Tensor, token_ids: Sequence[int], count: int) -> PendingScores:
        """Log-probabilities of given tokens, one per row of `logits` [R, V], beside the `count` likeliest."""
        return PendingScores(logits, to_device(token_ids, logits.device), count)

    def _score_choices(
        self, logits: torch.Tensor, tokens: torch.Tensor, requests: Sequence[Request]
    ) -> list[tuple[list[int], PendingScores]]:
        """Log-probabilities for the rows that asked for them, those with the same number of alternatives at
        once: how many the neighbours want must not decide the order of tokens that tie."""
        rows_of: dict[int, list[int]] = {}
        for row, request in enumerate(requests):
            if request.params.logprobs is not None:
                rows_of.setdefault(request.params.logprobs, []).append(row)
        return [
            (rows, PendingScores(select_rows(logits, rows), select_rows(tokens, rows).clamp(min=0), count))
            for count, rows in rows_of.items()
        ]

    def _adjust(
        self, logits: torch.Tensor, requests: Sequence[Request], touched: Sequence[int]
    ) -> torch.Tensor:
        """The logits with penalties, bias, min_tokens, allowed tokens applied to rows `touched`, in place."""
        penalised = [row for row in touched if requests[row].params.has_penalties]
        if penalised:
            self._apply_penalties(logits, penalised, [requests[row] for row in penalised])
        added: list[tuple[int, int, float]] = []  # row, token, what to add
        for row in touched:
            params = requests[row].params
            added += [(row, token, bias) for token, bias in (params.logit_bias or {}).items()]
            if requests[row].num_output_tokens < params.min_tokens:
                # A constraint's own mask says when the sequence may end.
                ends = self._eos if requests[row].constraint is None else ()
                banned = {*ends, *requests[row].spec.end_token_ids, *params.stop_token_ids}
                added += [(row, token, -torch.inf) for token in banned]
        if added:
            rows, columns, values = zip(*added, strict=True)
            index = to_device(np.asarray([rows, columns]), logits.device)
            delta = to_device(np.asarray(values, np.float32), logits.device)
            logits.index_put_((index[0], index[1]), delta, accumulate=True)
        allowed = {r: ids for r in touched if (ids := requests[r].params.allowed_token_ids) is not None}
        if allowed:
            self._operations.mask(logits, list(allowed), [_bits(ids) for ids in allowed.values()])
        return logits

    def _apply_penalties(
        self, logits: torch.Tensor, rows: Sequence[int], requests: Sequence[Request]
    ) -> None:
        """Repetition penalty over prompt and output, then presence and frequency over output, in place.

        The host must know all tokens of these requests: `Request.needs_last_token`.
        """
        counts = [self._counts.setdefault(r.request_id, _TokenCounts(r)) for r in requests]
        for count, request in zip(counts, requests, strict=True):
            count.update(request.tokens)
        device = logits.device

        def flat(parts: list[np.ndarray]) -> tuple[torch.Tensor, torch.Tensor]:
            row_index = np.repeat(np.asarray(rows, np.int64), [len(part) for part in parts])
            return to_device(row_index, device), to_device(np.concatenate(parts), device)

        def per_token(name: str, index: torch.Tensor) -> torch.Tensor:
            by_row = np.zeros(logits.shape[0], np.float32)
            by_row[rows] = [getattr(r.params, name) for r in requests]
            return to_device(by_row, device)[index]

        row, token = flat([count.seen_ids() for count in counts])
        values = logits[row, token]
        penalty = per_token("repetition_penalty", row)
        logits[row, token] = torch.where(values > 0, values / penalty, values * penalty)
        row, token = flat([count.output_ids() for count in counts])
        times = to_device(np.concatenate([count.output_counts() for count in counts]), device)
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


def _changes_logits(request: Request) -> bool:
    params = request.params
    bans = params.allowed_token_ids is not None or request.num_output_tokens < params.min_tokens
    return request.constraint is not None or bans or bool(params.logit_bias) or params.has_penalties


def _bits(token_ids: Sequence[int]) -> bytes:
    """The tokens as a mask of `RowOperations.mask`."""
    bits = np.zeros(max(token_ids) + 1, np.uint8)
    bits[token_ids] = 1
    return np.packbits(bits, bitorder="little").tobytes()


def _choose(tokens: torch.Tensor, rows: Sequence[int], choices: torch.Tensor) -> torch.Tensor:
    """`tokens` [R] with `choices` [len(rows)] in their place, but for rows that have no token already."""
    if len(rows) == tokens.shape[0]:
        return torch.where(tokens < 0, tokens, choices)
    index = to_device(rows, tokens.device)
    kept = tokens[index]
    return tokens.index_put((index,), torch.where(kept < 0, kept, choices))


class TorchRows:
    """RowOperations in plain torch, on any device; `draw` waits for it where rows have filters."""

    def argmax(self, logits: torch.Tensor) -> torch.Tensor:
        finite = torch.isfinite(logits).all(dim=-1)  # [R]
        return torch.where(finite, logits.argmax(dim=-1), -1)

    def mask(self, logits: torch.Tensor, rows: Sequence[int], masks: Sequence[bytes]) -> torch.Tensor:
        return mask_rows(logits, rows, masks)

    def draw(
        self,
        logits: torch.Tensor,
        rows: Sequence[int],
        params: Sequence[SamplingParams],
        units: Sequence[float],
    ) -> torch.Tensor:
        logits = select_rows(logits, rows)  # [S, V]
        numbers = to_device(np.asarray([[p.temperature for p in params], units]), logits.device)  # float64
        scaled = logits / numbers[0].to(logits.dtype)[:, None]
        filtered = [row for row, p in enumerate(params) if p.top_k > 0 or p.top_p < 1 or p.min_p > 0]
        if filtered:
            floor = _filter_floor(scaled[filtered], [params[row] for row in filtered])
            scaled[filtered] = scaled[filtered].masked_fill(scaled[filtered] < floor[:, None], -torch.inf)
        cumulative = torch.softmax(scaled.double(), dim=-1).cumsum(dim=-1)  # [S, V]
        total = cumulative[:, -1]
        target = numbers[1] * total
        target = torch.minimum(target, torch.nextafter(total, torch.zeros_like(total)))
        target = target.nan_to_num()  # rows without a finite logit
        # right=True: the first token whose cumulative probability exceeds the target, never one of no mass
        drawn = torch.searchsorted(cumulative, target[:, None], right=True)[:, 0]
        return drawn.clamp_(max=logits.shape[-1] - 1)


def mask_rows(logits: torch.Tensor, rows: Sequence[int], masks: Sequence[bytes]) -> torch.Tensor:
    """`RowOperations.mask` in plain torch, on any device, without waiting for it."""
    size = -(-logits.shape[1] // 8)
    padded = b"".join(mask[:size].ljust(size, b"\0") for mask in masks)
    packed = to_device(np.frombuffer(padded, np.uint8).reshape(len(rows), size).copy(), logits.device)
    bits = packed[:, :, None] >> torch.arange(8, dtype=torch.uint8, device=logits.device)  # [S, size, 8]
    banned = ((bits & 1) == 0).view(len(rows), -1)[:, : logits.shape[1]]
    index = to_device(rows, logits.device)
    left = logits[index].masked_fill(banned, -torch.inf)
    logits.index_put_((index,), left)
    best = left.max(dim=-1)
    return torch.where(torch.isfinite(best.values), best.indices, -1)


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
