"""POST /v1/completions: one or many prompts, as text or token ids, continued.

Owns the reading of `prompt`, `echo` and the legacy logprobs; `serving.py` runs the generation. Knows no
engine. Invariant: choices are ordered prompt-major (prompt 0's `n` choices, then prompt 1's), and token ids
are used exactly as they came.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from starlette.requests import Request
from starlette.responses import Response

from gqa_serve.api.chunks import ChunkReply
from gqa_serve.api.json_guard import read_request
from gqa_serve.api.logprobs import LegacyLogprobsWriter, join_legacy
from gqa_serve.api.params import (
    DEFAULT_COMPLETION_TOKENS,
    FieldRules,
    check_capacity,
    choice_count,
    sampling_params,
)
from gqa_serve.api.protocol import (
    CompletionRequest,
    LegacyLogprobs,
    Prompt,
    TextChoice,
    TextCompletion,
    Usage,
)
from gqa_serve.api.serving import Job, ServingContext, answer, fingerprint, off_loop
from gqa_serve.api.structured_fields import structured_grammar
from gqa_serve.api.text_stream import TextEvent
from gqa_serve.engine.request import ModelInfo
from gqa_serve.engine.tokenizer import Tokenizer
from gqa_serve.errors import ContextLengthError, RequestError


@dataclasses.dataclass(frozen=True)
class PromptInput:
    """One prompt: its token ids, and its text if that is how it came."""

    ids: list[int]
    text: str | None
    param: str


class Completions:
    """The endpoint."""

    def __init__(self, context: ServingContext) -> None:
        self._context = context
        self._rules = FieldRules.completion()

    async def post(self, request: Request) -> Response:
        """Decode, check, tokenize, generate. Raises RequestError."""
        context = self._context
        fields, raw = await read_request(request, context.config.max_body_bytes, CompletionRequest)
        model = context.check_model(fields.model)
        num_prompts = count_prompts(fields.prompt)
        n = choice_count(fields, num_prompts)
        self._rules.check(raw, n)
        info = context.ready_info()
        check_capacity(info, num_prompts, n)
        items = split_prompt(fields.prompt, info.max_model_len)
        scores_prompt = fields.echo and fields.logprobs is not None
        params = sampling_params(
            fields,
            info.generation_config,
            default_max_tokens=DEFAULT_COMPLETION_TOKENS,
            logprobs=fields.logprobs,
            prompt_logprobs=fields.logprobs if scores_prompt else None,
            vocab_size=info.vocab_size,
            grammar=await structured_grammar(fields, context.tokenizer),
        )
        add_special = fields.add_special_tokens is not False
        prompts = await _encode_all(items, context.tokenizer, info, add_special)
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
            n=n,
        )
        return await answer(request, context, CompletionReply(context, job, prompts, fields))


def count_prompts(prompt: Prompt) -> int:
    """How many prompts `prompt` holds: a string or a list of ids is one, a list of those many."""
    return 1 if isinstance(prompt, str) or not prompt or isinstance(prompt[0], int) else len(prompt)


def split_prompt(prompt: Prompt, max_model_len: int) -> list[tuple[str | list[int], str]]:
    """`prompt` as single prompts, each with the path that names it in errors. Raises RequestError.

    Lists of more than `max_model_len` ids are refused before anything is done with their members.
    """
    if isinstance(prompt, str):
        return [(prompt, "prompt")]
    if not prompt:
        raise RequestError("prompt must not be empty.", param="prompt")
    if isinstance(prompt[0], int):
        _check_size(prompt, max_model_len, "prompt")
    if all(isinstance(item, int) for item in prompt):
        return [([item for item in prompt if isinstance(item, int)], "prompt")]
    items: list[tuple[str | list[int], str]] = []
    for number, item in enumerate(prompt):
        if isinstance(item, int) or not isinstance(item, type(prompt[0])):
            raise RequestError(
                "prompt must be a string, a list of strings, a list of token ids or a list of such lists.",
                param="prompt",
            )
        if isinstance(item, list):
            _check_size(item, max_model_len, f"prompt[{number}]")
        items.append((item, f"prompt[{number}]"))
    return items


def _check_size(ids: Sequence[object], max_model_len: int, param: str) -> None:
    if len(ids) > max_model_len:
        raise ContextLengthError(len(ids), max_model_len, param=param)


async def _encode_all(
    items: list[tuple[str | list[int], str]], tokenizer: Tokenizer, info: ModelInfo, add_special_tokens: bool
) -> list[PromptInput]:
    """Every prompt as token ids, none empty, each id in the vocabulary. Raises RequestError."""

    def encode() -> list[PromptInput]:
        prompts = []
        for item, param in items:
            if isinstance(item, str):
                tokenizer.check_length(len(item), info.max_model_len, param=param)
                ids = tokenizer.encode(item, add_special_tokens=add_special_tokens, parse_special=True)
                prompts.append(PromptInput(ids, item, param))
            else:
                prompts.append(PromptInput(item, None, param))
                _check_ids(item, info.vocab_size, param)
            if not prompts[-1].ids:
                raise RequestError(
                    "The prompt has no tokens, and this model adds none by itself; send some text.",
                    param=param,
                )
        return prompts

    return await off_loop(sum(len(item) for item, _ in items), encode)


def _check_ids(ids: list[int], vocab_size: int, param: str) -> None:
    if ids and not (min(ids) >= 0 and max(ids) < vocab_size):
        raise RequestError(f"{param} holds token ids outside 0..{vocab_size - 1}.", param=param)


class CompletionReply(ChunkReply):
    """Completion answers, whole and in chunks."""

    def __init__(
        self,
        context: ServingContext,
        job: Job,
        prompts: list[PromptInput],
        fields: CompletionRequest,
    ) -> None:
        super().__init__(job)
        self._tokenizer = context.tokenizer
        self._prompts = prompts
        self._echo = bool(fields.echo)
        self._num_logprobs = fields.logprobs
        self._show_special = not job.params[0].skip_special_tokens
        self._writers: dict[int, LegacyLogprobsWriter] = {}

    def _piece(self, event: TextEvent) -> TextChoice:
        """What an event adds to its choice; the first one brings the echoed prompt."""
        text, logprobs = event.text, self._logprobs(event)
        if event.is_first and self._echo:
            text = self._prompt_text(self._prompts[event.index // self.job.n]) + text
        return TextChoice(text, event.index, logprobs, event.finish_reason)

    def _prompt_text(self, prompt: PromptInput) -> str:
        if prompt.text is not None:
            return prompt.text
        return self._tokenizer.decode(prompt.ids, skip_special_tokens=not self._show_special)

    def _logprobs(self, event: TextEvent) -> LegacyLogprobs | None:
        if self._num_logprobs is None:
            return None
        if event.index not in self._writers:
            self._writers[event.index] = LegacyLogprobsWriter(
                self._tokenizer, self._num_logprobs, self._show_special
            )
        writer = self._writers[event.index]
        pieces = []
        if event.prompt_logprobs is not None and self._echo:
            ids = self._prompts[event.index // self.job.n].ids
            text = self._prompt_text(self._prompts[event.index // self.job.n])
            pieces.append(writer.prompt(ids, event.prompt_logprobs, text))
        pieces.append(writer.output(event.logprobs or []))
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
        return [self._completion([piece])] if shows else []

    def usage_chunk(self) -> TextCompletion:
        """No choices: clients must not look for text here."""
        return self._completion([])

    def whole(self, events: list[TextEvent], usage: Usage) -> TextCompletion:
        """All choices at once."""
        completion = self._completion([self._piece(event) for event in events])
        completion.usage = usage
        return completion
