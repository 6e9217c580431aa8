"""`Account`: what a generation leaves behind: metrics while it runs, a log line and maybe a trace at its end.

Owns which moments are told to `Metrics` and the fields of the line (docs/observability.md lists them). Knows
generations and jobs, not HTTP answers. Invariant: neither prompts nor answers are in the log unless
`--log-prompts` asked for them; a request is told as aborted at most once.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from typing import TYPE_CHECKING, Any

from starlette.types import Scope

from gqa_serve.api.errors import shorten
from gqa_serve.api.exchange import exchange_of
from gqa_serve.api.http_protocol import lost_reason
from gqa_serve.api.request_ids import client_request_id
from gqa_serve.api.text_stream import Choice, Generation

if TYPE_CHECKING:
    from gqa_serve.api.serving import Job, ServingContext

LOGGED_CHARS = 2000  # of a prompt, and of an answer, with --log-prompts
_LOGGED_TOKENS = 600  # at each end of a long prompt: tokens have a character or more, as a rule

# What may end an accepted request early, by the code of the error that its client is told.
_ABORTS = {
    "engine_error": "engine_error",
    "engine_unavailable": "shutdown",
    "queue_timeout": "queue_timeout",
    "request_timeout": "request_timeout",
}

logger = logging.getLogger(__name__)


class Account:
    """Of one HTTP request; a `Meter` for its generation."""

    def __init__(self, context: ServingContext, job: Job, scope: Scope) -> None:
        exchange = exchange_of(scope)
        exchange.is_accepted = True
        self.arrived_s = exchange.began_s
        self.request_id = client_request_id(scope) or job.id
        self._scope = scope
        self._job = job
        self._context = context
        self._metrics = context.metrics
        self.kept_chars = LOGGED_CHARS if context.config.log_prompts else 0

    def began(self, choice: Choice, num_tokens: int) -> None:
        """The first output of a choice came, with so many tokens; none if only its prompt was wanted."""
        self._metrics.prompt_computed(len(choice.request.prompt), choice.num_cached_tokens)
        if num_tokens and choice.first_s is not None:
            self._metrics.first_tokens(choice.first_s - self.arrived_s, num_tokens)

    def tokens(self, num_tokens: int, gap_s: float) -> None:
        """Later tokens came, `gap_s` after the tokens before them."""
        self._metrics.tokens(num_tokens, gap_s / num_tokens)

    def end(self, generation: Generation) -> None:
        """Tell how it went."""
        now = time.monotonic()
        for choice in generation.choices:
            self._metrics.finished(choice, self.arrived_s, generation.started, now)
        self._metrics.params(self._job.n, self._job.params[0].max_tokens)
        reason = self._abort_reason(generation)
        if reason is not None:
            self._metrics.aborted(reason)
        self._log(generation, now, reason)

    def _abort_reason(self, generation: Generation) -> str | None:
        """Why it did not come to its end; None if it did."""
        if all(choice.finish_reason in ("stop", "length") for choice in generation.choices):
            return None
        if generation.abort_reason is not None:
            return generation.abort_reason
        if generation.error is None:
            return lost_reason(self._scope) or "client_left"
        code = getattr(generation.error, "code", None)
        return _ABORTS.get(code or "", "internal_error")

    def _log(self, generation: Generation, now: float, abort_reason: str | None) -> None:
        job, choices = self._job, generation.choices
        usage = job.usage(generation)
        # An answer without a reason was cut off by its client, or by the failure of another choice.
        reasons = Counter(choice.finish_reason or "cancelled" for choice in choices)
        queued = [choice.queue_s for choice in choices if choice.queue_s is not None]
        firsts = [choice.first_s for choice in choices if choice.first_s is not None and choice.num_tokens]
        num_gaps = sum(max(0, choice.num_tokens - 1) for choice in choices)
        decode_s = sum(choice.decode_s for choice in choices)
        fields: dict[str, Any] = {
            "id": job.id,
            "request_id": self.request_id,
            "kind": job.kind,
            "stream": bool(job.fields.stream),
            "model": job.model,
            "choices": len(choices),
            "prompt": usage.prompt_tokens,
            "cached": usage.prompt_tokens_details.cached_tokens,
            "output": usage.completion_tokens,
            "thinking": sum(choice.num_thinking_tokens for choice in choices),
            "finish": ",".join(
                name if count == 1 else f"{name}:{count}" for name, count in sorted(reasons.items())
            ),
            "abort": abort_reason,
            "queue_s": _rounded(max(queued)) if queued else None,
            "ttft_s": _rounded(min(firsts) - self.arrived_s) if firsts else None,
            "tpot_s": _rounded(decode_s / num_gaps) if num_gaps else None,
            "e2e_s": _rounded(now - self.arrived_s),
        }
        if self._context.tracing is not None:
            fields["trace_id"] = self._context.tracing.record(
                job, generation, self._scope, fields, self.arrived_s, now
            )
        logger.info(
            "%s%s %s%s prompt=%d cached=%d output=%d finish=%s %.2fs%s%s",
            job.id,
            "" if self.request_id == job.id else f" ({self.request_id})",
            job.kind,
            " stream" if job.fields.stream else "",
            fields["prompt"],
            fields["cached"],
            fields["output"],
            fields["finish"],
            now - self.arrived_s,
            "" if fields["ttft_s"] is None else f" ttft={fields['ttft_s']:.3f}s",
            "" if fields["tpot_s"] is None else f" tpot={fields['tpot_s']:.4f}s",
            extra={"fields": fields},
        )
        if self.kept_chars:
            self._log_words(choices)

    def _log_words(self, choices: list[Choice]) -> None:
        """The ends of long prompts, the beginnings of long answers; in quotes, so that a line stays one."""
        prompts = [shorten(self._text(prompt), LOGGED_CHARS) for prompt in self._job.prompts]
        answers = [choice.kept for choice in choices]
        logger.info(
            "%s prompts=%s answers=%s",
            self._job.id,
            ascii(prompts),
            ascii(answers),
            extra={"fields": {"id": self._job.id, "prompts": prompts, "answers": answers}},
        )

    def _text(self, ids: Any) -> str:
        decode = self._context.tokenizer.decode
        if len(ids) <= 2 * _LOGGED_TOKENS:
            return decode(list(ids), skip_special_tokens=False)
        ends = (list(ids[:_LOGGED_TOKENS]), list(ids[-_LOGGED_TOKENS:]))
        return "…".join(decode(end, skip_special_tokens=False) for end in ends)


def _rounded(seconds: float) -> float:
    return round(max(0.0, seconds), 6)
