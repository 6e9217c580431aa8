"""LLM: offline generation in this process, with the engine the server uses.

    from gqa_serve import LLM, SamplingParams

    llm = LLM("demo")
    for output in llm.generate(["The capital of France is"], SamplingParams(temperature=0, max_tokens=8)):
        print(output.outputs[0].text)

Owns an `Engine`, its tokenizer and chat template. Not thread safe: one call at a time.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from typing import Any, cast

import msgspec
import numpy as np

from gqa_serve.config import EngineConfig
from gqa_serve.engine.chat_prompt import encode_chat
from gqa_serve.engine.chat_template_files import load_chat_template
from gqa_serve.engine.constraints import ConstraintError
from gqa_serve.engine.core import Engine
from gqa_serve.engine.detokenizer import TextAssembler
from gqa_serve.engine.distributed.replica import load_runner
from gqa_serve.engine.pooling import unit_vector
from gqa_serve.engine.request import (
    EngineRequest,
    FinishReason,
    Pooling,
    SamplingParams,
    TokenLogprobs,
    TokenOutput,
    sampling_defaults,
)
from gqa_serve.engine.structured import GrammarService
from gqa_serve.engine.tokenizer import load_tokenizer
from gqa_serve.engine.weights.hub import resolve_model
from gqa_serve.errors import EngineStepError, RequestError
from gqa_serve.progress import ProgressBar
from gqa_serve.settings import from_settings

Prompt = str | Sequence[int]


@dataclasses.dataclass
class CompletionOutput:
    """One choice. `stop_reason` is the stop string or stop token id that ended it, if one did."""

    index: int
    text: str = ""
    token_ids: list[int] = dataclasses.field(default_factory=list)
    logprobs: list[TokenLogprobs] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None


@dataclasses.dataclass
class RequestOutput:
    """A prompt and its `n` choices."""

    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    num_cached_tokens: int = 0


@dataclasses.dataclass
class EmbeddingOutput:
    """A prompt and its vector [E] float32, of length 1."""

    prompt: str | None
    prompt_token_ids: list[int]
    embedding: np.ndarray


@dataclasses.dataclass
class _Choice:
    """A choice under way."""

    request: RequestOutput
    output: CompletionOutput
    assembler: TextAssembler


class LLM:
    """A model to generate with. `settings` are those of `EngineConfig`, sizes as numbers or as "2GiB".

    Raises ModelError, ConfigError or CacheCapacityError if it can't be loaded.
    """

    def __init__(
        self, model: str, *, chat_template: str | None = None, progress: bool = True, **settings: Any
    ) -> None:
        config = from_settings(EngineConfig, {"model": model, **settings})
        self._load(config, chat_template, progress)

    @classmethod
    def from_config(cls, config: EngineConfig, chat_template: str | None = None) -> LLM:
        """The model that `config` describes."""
        llm = cls.__new__(cls)
        llm._load(config, chat_template, progress=True)
        return llm

    def _load(self, config: EngineConfig, chat_template: str | None, progress: bool) -> None:
        path = resolve_model(
            config.model,
            revision=config.revision,
            download_dir=config.download_dir,
            offline=config.offline,
            progress=progress,
        )
        self.tokenizer = load_tokenizer(path)
        self.chat_template = load_chat_template(path, chat_template, self.tokenizer.special_texts)
        bar = ProgressBar("Loading weights") if progress else None
        runner = load_runner(path, config, bar.update if bar else None)
        self._grammars = GrammarService(lambda: self.tokenizer, runner.eos_token_ids)
        self.engine = Engine(runner, config, self._grammars)
        self._progress = progress
        self.default_sampling_params = SamplingParams(**sampling_defaults(self.engine.info.generation_config))
        self._counter = 0

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[RequestOutput]:
        """Complete prompts (text, or token ids taken as they are), all in one continuous batch.

        One `sampling_params` for all, or one for each; None is `default_sampling_params`. Raises
        RequestError, before anything is computed, if a prompt or parameter can't be used, and EngineStepError
        if computing one fails (the others are dropped).
        """
        listed = _as_list(prompts)
        if sampling_params is None:
            sampling_params = self.default_sampling_params
        if isinstance(sampling_params, SamplingParams):
            sampling_params = [sampling_params] * len(listed)
        if len(sampling_params) != len(listed):
            raise RequestError(
                f"There are {len(listed)} prompts but {len(sampling_params)} sampling_params; "
                "give one, or one for each prompt."
            )
        choices: dict[str, _Choice] = {}
        specs: list[EngineRequest] = []
        results = []
        for prompt, params in zip(listed, map(_checked, sampling_params), strict=True):
            ids = self._encode(prompt)
            result = RequestOutput(prompt if isinstance(prompt, str) else None, ids, [])
            results.append(result)
            for spec in self._specs(ids, params):
                output = CompletionOutput(len(result.outputs))
                result.outputs.append(output)
                assembler = TextAssembler(self.tokenizer, spec.params, ids)
                choices[spec.request_id] = _Choice(result, output, assembler)
                specs.append(spec)
        bar = ProgressBar("Generating") if self._progress and len(specs) > 1 else None
        try:
            num_ended = 0
            for choice, _ in self._run(specs, choices):
                num_ended += choice.output.finish_reason is not None
                if bar is not None:
                    bar.update(num_ended, len(specs))
        finally:
            if bar is not None:
                bar.close()
        return results

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]] | Sequence[Sequence[Mapping[str, Any]]],
        sampling_params: SamplingParams | None = None,
        **template_options: Any,
    ) -> list[RequestOutput]:
        """Answer one conversation or several; `template_options` go to the chat template."""
        single = bool(messages) and isinstance(messages[0], Mapping)
        conversations = cast("Sequence[Sequence[Mapping[str, Any]]]", [messages] if single else messages)
        prompts = [self.encode_chat(conversation, **template_options) for conversation in conversations]
        return self.generate(prompts, sampling_params)

    def chat_stream(
        self, messages: Sequence[Mapping[str, Any]], sampling_params: SamplingParams | None = None
    ) -> Iterator[str]:
        """Answer one conversation, yielding text as it comes. Leaving the loop early ends the request."""
        ids = self.encode_chat(messages)
        params = _checked(sampling_params or self.default_sampling_params)
        if params.n != 1:
            raise RequestError("chat_stream gives one answer; n must be 1.", param="n")
        (spec,) = self._specs(ids, params)
        result = RequestOutput(None, ids, [CompletionOutput(0)])
        choice = _Choice(result, result.outputs[0], TextAssembler(self.tokenizer, spec.params, ids))
        for _, text in self._run([spec], {spec.request_id: choice}):
            yield text

    def embed(
        self, prompts: Prompt | Sequence[Prompt], *, pooling: Pooling = "last", dimensions: int | None = None
    ) -> list[EmbeddingOutput]:
        """Vectors of prompts, in one continuous batch: the hidden state after the final norm of the last
        token, or the mean over all tokens, cut to its first `dimensions`, then scaled to length 1.

        Raises RequestError, before anything is computed, if a prompt or an argument can't be used, and
        EngineStepError if computing one fails.
        """
        if pooling not in ("last", "mean"):
            raise RequestError(f"pooling must be 'last' or 'mean', got {pooling!r}.", param="pooling")
        size = self.engine.info.hidden_size
        if dimensions is not None and not 1 <= dimensions <= size:
            raise RequestError(f"dimensions must be between 1 and {size}.", param="dimensions")
        listed = _as_list(prompts)
        nothing = SamplingParams(max_tokens=0)
        specs = [
            msgspec.structs.replace(spec, pooling=pooling)
            for prompt in listed
            for spec in self._specs(self._encode(prompt), nothing)
        ]
        vectors: dict[str, np.ndarray] = {}
        for output in self._outputs(specs):
            if output.pooled is None:
                raise EngineStepError(output.error or "The engine gave no vector.")
            vectors[output.request_id] = unit_vector(output.pooled, dimensions)
        return [
            EmbeddingOutput(
                prompt if isinstance(prompt, str) else None, spec.prompt, vectors[spec.request_id]
            )
            for prompt, spec in zip(listed, specs, strict=True)
        ]

    def encode_chat(self, messages: Sequence[Mapping[str, Any]], **template_options: Any) -> list[int]:
        """Token ids of a conversation rendered by the chat template."""
        return encode_chat(self.tokenizer, self.chat_template, messages, **template_options)

    def _encode(self, prompt: object) -> list[int]:
        if isinstance(prompt, str):
            return self.tokenizer.encode(prompt, parse_special=True)  # a prompt is the model's raw input
        if not isinstance(prompt, Sequence) or not all(isinstance(token, int) for token in prompt):
            raise RequestError("A prompt is a string or a list of token ids.", param="prompt")
        return list(prompt)

    def _specs(self, ids: list[int], params: SamplingParams) -> list[EngineRequest]:
        """One engine request per choice; those of one prompt share its blocks."""
        if self.engine.num_requests:
            raise RequestError("This LLM is generating already (an open chat_stream?); finish that first.")
        self._counter += 1
        name = f"llm-{self._counter}"
        params.validate(self.engine.info.vocab_size)
        self._check_grammar(params.grammar)
        fitted = params.fit(len(ids), self.engine.info.max_model_len)
        return [
            EngineRequest(
                request_id=f"{name}-{index}",
                prompt=ids,
                params=fitted.for_choice(index),
                group=name if params.n > 1 else None,
            )
            for index in range(params.n)
        ]

    def _check_grammar(self, grammar: str | None) -> None:
        """Raises RequestError for a grammar that cannot be enforced."""
        if grammar is not None:
            try:
                self._grammars.begin(grammar).result()
            except ConstraintError as error:
                raise RequestError(str(error), param="grammar") from error

    def _run(
        self, specs: Iterable[EngineRequest], choices: dict[str, _Choice]
    ) -> Iterator[tuple[_Choice, str]]:
        """Step until every choice has ended, yielding text deltas."""
        with contextlib.closing(self._outputs(specs)) as outputs:
            for output in outputs:
                choice = choices[output.request_id]
                delta = choice.assembler.feed(output)
                if delta.error is not None:
                    raise EngineStepError(delta.error)
                if delta.finish_reason is not None and output.finish_reason is None:
                    self.engine.abort(output.request_id)  # a stop string matched
                result, into = choice.request, choice.output
                into.text += delta.text
                into.token_ids += delta.token_ids
                if delta.logprobs is not None:
                    into.logprobs = (into.logprobs or []) + delta.logprobs
                into.finish_reason, into.stop_reason = delta.finish_reason, delta.stop_reason
                result.prompt_logprobs = output.prompt_logprobs or result.prompt_logprobs
                if into.index == 0:
                    result.num_cached_tokens = output.num_cached_tokens
                yield choice, delta.text

    def _outputs(self, specs: Iterable[EngineRequest]) -> Generator[TokenOutput, None, None]:
        """What the engine gives until all has ended, step by step; whatever happens, nothing stays queued."""
        added: list[str] = []
        try:
            for spec in specs:
                self.engine.add(spec)
                added.append(spec.request_id)
            while self.engine.has_work:
                yield from self.engine.step()
        finally:
            for request_id in added:
                self.engine.abort(request_id)


def _checked(params: object) -> SamplingParams:
    if not isinstance(params, SamplingParams):
        raise RequestError(f"sampling_params must be SamplingParams, got {type(params).__name__}.")
    return params


def _as_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    if not isinstance(prompts, Sequence):
        raise RequestError(
            "prompts must be a string, a list of token ids, or a list of such.", param="prompt"
        )
    if isinstance(prompts, str) or (prompts and isinstance(prompts[0], int)):
        return [cast("Prompt", prompts)]
    return list(cast("Iterable[Prompt]", prompts))
