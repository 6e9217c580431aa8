"""POST /v1/completions: one or many prompts, as text or token ids, continued, scored or filled in.

Owns the reading of the request's own fields and the legacy shape of the answer; `prompts.py` reads prompts
and `serving.py` runs the generation. Knows no engine. Invariant: choices are ordered prompt-major (prompt 0's
`n` choices, then prompt 1's), and token ids are used exactly as they came.
"""

from __future__ import annotations

import functools

from starlette.requests import Request
from starlette.responses import Response

from gqa_serve.api.answers import LegacyLogprobs, TextChoice, TextCompletion, Usage
from gqa_serve.api.chunks import ChunkReply
from gqa_serve.api.json_guard import read_request
from gqa_serve.api.logprobs import LegacyLogprobsWriter, finite, join_legacy, prompt_logprobs
from gqa_serve.api.params import (
    DEFAULT_COMPLETION_TOKENS,
    FieldRules,
    candidate_count,
    check_capacity,
    choice_count,
    sampling_params,
)
from gqa_serve.api.prompts import PromptInput, Truncation, count_prompts, encode_prompts, split_prompt
from gqa_serve.api.protocol import CompletionRequest
from gqa_serve.api.serving import Job, ServingContext, answer, fingerprint
from gqa_serve.api.structured_fields import structured_grammar
from gqa_serve.api.text_stream import TextEvent
from gqa_serve.engine.fill_in_middle import FillInMiddle, find_fill_in_middle
from gqa_serve.engine.request import MAX_LOGPROBS, ModelInfo, SamplingParams
from gqa_serve.errors import ContextLengthError, RequestError


class Completions:
    """The endpoint."""

    def __init__(self, context: ServingContext) -> None:
        self._context = context
        self._rules = FieldRules.completion()
        self._markers = find_fill_in_middle(context.tokenizer)

    async def post(self, request: Request) -> Response:
        """Decode, check, tokenize, generate. Raises RequestError."""
        context = self._context
        context.engine.check_room()  # a full queue refuses before it reads a megabyte
        fields, raw = await read_request(request, context.bodies, CompletionRequest)
        model = context.check_model(fields.model)
        num_prompts = count_prompts(fields.prompt)
        n = choice_count(fields, num_prompts)
        self._rules.check(raw)
        candidates = candidate_count(fields, n, num_prompts)
        info = context.ready_info()
        check_capacity(info, num_prompts, candidates, name="best_of" if candidates > n else "n")
        markers = self._fill_in_middle(fields, info)
        grammar = await structured_grammar(fields, context.tokenizer)
        params = self._params(fields, info, grammar, ranks=candidates > n)
        prompts = await self._encode(fields, info, params, markers)
        ends = () if markers is None else sorted(id for id in markers.end_ids if id < info.vocab_size)
        job = Job.new(
            "cmpl",
            kind="completion",
            model=model,
            fingerprint=fingerprint(info),
            fields=fields,
            prompts=[prompt.ids for prompt in prompts],
            params=[
                params.fit(len(prompt.ids), info.max_model_len, param=prompt.param) for prompt in prompts
            ],
            n=candidates,
            end_ids=tuple(ends),
        )
        return await answer(request, context, CompletionReply(context, job, prompts, fields, n))

    def _fill_in_middle(self, fields: CompletionRequest, info: ModelInfo) -> FillInMiddle | None:
        """The markers to use, if there is a suffix. Raises RequestError if the model cannot fill in."""
        if not fields.suffix:
            return None
        if self._markers is None or max(self._markers.ids) >= info.vocab_size:
            raise RequestError(
                "suffix needs a model with fill-in-the-middle tokens, which this one does not have; "
                "leave it out.",
                param="suffix",
                code="unsupported_parameter",
            )
        if fields.echo and fields.logprobs is not None:
            raise RequestError(
                "echo with logprobs cannot be combined with suffix; use prompt_logprobs.", param="echo"
            )
        if fields.truncate_prompt_tokens is not None:
            raise RequestError(
                "truncate_prompt_tokens cannot be combined with suffix: it would cut the markers off.",
                param="truncate_prompt_tokens",
            )
        return self._markers

    def _params(
        self, fields: CompletionRequest, info: ModelInfo, grammar: str | None, *, ranks: bool
    ) -> SamplingParams:
        """What every choice is sampled with. Ranking needs log-probabilities, asked for or not."""
        asked = fields.prompt_logprobs
        if asked is not None and not 0 <= asked <= MAX_LOGPROBS:
            raise RequestError(
                f"prompt_logprobs must be between 0 and {MAX_LOGPROBS}, got {asked}.", param="prompt_logprobs"
            )
        wanted = [count for count in (asked, fields.logprobs if fields.echo else None) if count is not None]
        return sampling_params(
            fields,
            info.generation_config,
            default_max_tokens=DEFAULT_COMPLETION_TOKENS,
            logprobs=0 if ranks and fields.logprobs is None else fields.logprobs,
            prompt_logprobs=max(wanted, default=None),
            vocab_size=info.vocab_size,
            grammar=grammar,
        )

    async def _encode(
        self,
        fields: CompletionRequest,
        info: ModelInfo,
        params: SamplingParams,
        markers: FillInMiddle | None,
    ) -> list[PromptInput]:
        """The prompts as the engine gets them. Raises RequestError."""
        tokenizer = self._context.tokenizer
        add_special = fields.add_special_tokens is not False
        truncation = Truncation.read(
            fields.truncate_prompt_tokens, params.max_tokens or 0, info.max_model_len
        )
        suffix = fields.suffix or ""
        tokenizer.check_length(len(suffix), info.max_model_len, param="suffix")

        @functools.cache  # once, however many prompts there are
        def after() -> list[int]:
            ids = [] if markers is None else markers.encode_suffix(tokenizer, suffix)
            if len(ids) >= info.max_model_len:
                raise ContextLengthError(len(ids), info.max_model_len, param="suffix")
            return ids

        def encode(item: str | list[int]) -> list[int]:
            if markers is not None:
                return markers.encode(tokenizer, item, after(), add_special_tokens=add_special)
            if isinstance(item, list):
                return item
            return tokenizer.encode(item, add_special_tokens=add_special, parse_special=True)

        items = split_prompt(fields.prompt, None if truncation.keep else info.max_model_len)
        return await encode_prompts(items, tokenizer, info, encode, truncation, extra_chars=len(suffix))


def _mean_logprob(event: TextEvent) -> float:
    """Log-probability per generated token, the one that ended the text included."""
    entries = [*(event.logprobs or []), *([event.stop_logprobs] if event.stop_logprobs else [])]
    if not entries:
        return float("-inf")
    return sum(finite(entry.logprob) for entry in entries) / len(entries)


class CompletionReply(ChunkReply):
    """Completion answers, whole and in chunks. The job may have more candidates per prompt than `n`."""

    def __init__(
        self,
        context: ServingContext,
        job: Job,
        prompts: list[PromptInput],
        fields: CompletionRequest,
        n: int,
    ) -> None:
        super().__init__(job)
        self._tokenizer = context.tokenizer
        self._prompts = prompts
        self._fields = fields
        self._n = n
        self._as_ids = bool(fields.return_tokens_as_token_ids)
        self._show_special = not job.params[0].skip_special_tokens
        self._writers: dict[int, LegacyLogprobsWriter] = {}

    def _piece(self, event: TextEvent) -> TextChoice:
        """What an event adds to its choice; the first one brings what is told of the prompt."""
        fields = self._fields
        prompt = self._prompts[event.index // self.job.n]
        piece = TextChoice(event.text, event.index, self._logprobs(event, prompt), event.finish_reason)
        if event.finish_reason is not None:
            piece.stop_reason = event.stop_reason
        if fields.return_token_ids:
            piece.token_ids = event.token_ids
        if not event.is_first:
            return piece
        if fields.echo:
            piece.text = self._prompt_text(prompt) + piece.text
        if fields.return_token_ids:
            piece.prompt_token_ids = prompt.ids
        if fields.prompt_logprobs is not None and event.prompt_logprobs is not None:
            piece.prompt_logprobs = prompt_logprobs(
                prompt.ids,
                event.prompt_logprobs,
                fields.prompt_logprobs,
                self._tokenizer,
                as_ids=self._as_ids,
            )
        return piece

    def _prompt_text(self, prompt: PromptInput) -> str:
        if prompt.text is not None:
            return prompt.text
        return self._tokenizer.decode(prompt.ids, skip_special_tokens=not self._show_special)

    def _logprobs(self, event: TextEvent, prompt: PromptInput) -> LegacyLogprobs | None:
        if self._fields.logprobs is None:
            return None
        if event.index not in self._writers:
            self._writers[event.index] = LegacyLogprobsWriter(
                self._tokenizer, self._fields.logprobs, self._show_special, as_ids=self._as_ids
            )
        writer = self._writers[event.index]
        pieces = []
        if event.prompt_logprobs is not None and self._fields.echo:
            text = self._prompt_text(prompt)
            pieces.append(writer.prompt(prompt.ids, event.prompt_logprobs, text))
        pieces.append(writer.output(event.logprobs or [], event.stop_logprobs))
        return join_legacy(pieces)

    def _completion(self, choices: list[TextChoice]) -> TextCompletion:
        job = self.job
        return TextCompletion(
            id=job.id,
            created=job.created,
            model=job.model,
            system_fingerprint=job.fingerprint,
            choices=choices,
        )

    def chunks(self, event: TextEvent) -> list[TextCompletion]:
        """One chunk per event that shows anything."""
        piece = self._piece(event)
        shows = piece.text or piece.finish_reason or (piece.logprobs is not None and piece.logprobs.tokens)
        return [self._completion([piece])] if shows or self._fields.return_token_ids else []

    def usage_chunk(self) -> TextCompletion:
        """No choices: clients must not look for text here."""
        return self._completion([])

    def whole(self, events: list[TextEvent], usage: Usage) -> TextCompletion:
        """All choices at once, of each prompt's candidates the best."""
        pieces = [self._piece(event) for event in self._best(events)]
        for index, piece in enumerate(pieces):
            piece.index = index
        completion = self._completion(pieces)
        completion.usage = usage
        return completion

    def _best(self, events: list[TextEvent]) -> list[TextEvent]:
        """Of each prompt's candidates the `n` of the highest log-probability per token, best first."""
        size = self.job.n
        if size == self._n:
            return events
        best: list[TextEvent] = []
        for begin in range(0, len(events), size):
            ranked = sorted(events[begin : begin + size], key=_mean_logprob, reverse=True)
            best += ranked[: self._n]
        return best
