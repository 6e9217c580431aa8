"""The work: every candidate loaded in turn, scored, asked, timed, and compared with the reference.

Owns the order of the work. The reference is loaded first and stays, because what is compared token by token
or second by second is computed side by side: log-probabilities of a whole vocabulary are too many to keep.
Beside it one candidate is loaded at a time. Invariant: a result is handed to `on_result` as soon as it is
complete.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np

from gqa_serve.engine.tokenizer import Tokenizer, load_tokenizer
from gqa_serve.errors import CacheCapacityError, ConfigError, ModelError
from gqa_serve.workbench.evaluate.candidates import Candidate
from gqa_serve.workbench.evaluate.engines import (
    LoadedModel,
    answers,
    compare_tokens,
    hidden_before_scored,
    score_tokens,
    window_batches,
)
from gqa_serve.workbench.evaluate.meter import Meter
from gqa_serve.workbench.evaluate.results import CandidateResult, Held, TextScores, Trial
from gqa_serve.workbench.evaluate.retrieval import Haystack, Needle, Prompt, holds_key
from gqa_serve.workbench.evaluate.speed import measure_speed
from gqa_serve.workbench.evaluate.text import Corpus
from gqa_serve.workbench.evaluate.windows import TokenizedCorpus, tokenize

_MORE_ANSWER_TOKENS = 6  # than the key has: room for a quote, "the", an article


@dataclass(frozen=True, kw_only=True)
class Work:
    """What is measured of each candidate. `tests`: of "text", "passkey", "needle", "speed"."""

    tests: Sequence[str]
    corpus: Corpus
    window: int
    stride: int
    agreement: bool
    lengths: Sequence[int]
    depths: Sequence[float]
    samples: int
    haystack: str | None
    needle: Needle | None
    seed: int
    context: int
    requests: int
    prefill_tokens: int

    @property
    def tasks(self) -> list[str]:
        """The retrieval tasks."""
        return [test for test in self.tests if test in ("passkey", "needle")]

    @property
    def keeps_reference(self) -> bool:
        """Whether the reference is needed beside each candidate."""
        return ("text" in self.tests and self.agreement) or "speed" in self.tests

    def describe(self) -> dict[str, Any]:
        """What the numbers depend on, for the key of a result."""
        plain = {
            name: value for name, value in vars(self).items() if name not in ("corpus", "needle", "tests")
        }
        texts = [document.text for document in self.corpus.documents]
        needle = None if self.needle is None else vars(self.needle)
        return {**plain, "tests": sorted(self.tests), "texts": texts, "needle": needle}

    def longest(self) -> int:
        """Tokens of the longest sequence of any test."""
        lengths = [self.window] if "text" in self.tests else []
        lengths += [max(self.lengths) + self.answer_room] if self.tasks else []
        lengths += [self.context, self.prefill_tokens] if "speed" in self.tests else []
        return max(lengths)

    @property
    def answer_room(self) -> int:
        """Tokens that a prompt of a retrieval task may be followed by: more than any key has."""
        own = 0 if self.needle is None else 4 * len(self.needle.answer)
        return 32 + own


class Evaluation:
    """Evaluates `candidates`, comparing each with `reference`, one of them. `known`: results by key."""

    def __init__(
        self,
        candidates: Sequence[Candidate],
        reference: Candidate,
        work: Work,
        known: Mapping[str, CandidateResult],
        on_result: Callable[[CandidateResult], None],
    ) -> None:
        self._order = [reference, *(candidate for candidate in candidates if candidate is not reference)]
        self._reference = reference
        self._work = work
        self._known = known
        self._on_result = on_result
        self._tokenizers: dict[str, Tokenizer] = {}
        self._corpora: dict[str, TokenizedCorpus] = {}

    def run(self) -> list[CandidateResult]:
        """The results, the reference's first."""
        todo = [candidate for candidate in self._order if self._key(candidate) not in self._known]
        results = {
            candidate.name: msgspec.structs.replace(
                known, name=candidate.name
            )  # it may have had another name
            for candidate in self._order
            if (known := self._known.get(self._key(candidate))) is not None
        }
        kept: LoadedModel | None = None
        meter = Meter(len(todo), sum(self._num_tokens(candidate) for candidate in todo))
        try:
            needs_reference = self._work.keeps_reference and any(c is not self._reference for c in todo)
            if needs_reference and self._reference not in todo:
                kept = self._load(self._reference, meter)
            for candidate in todo:
                model = self._load(candidate, meter)
                beside = kept if candidate is not self._reference else None
                result = self._evaluate(candidate, model, beside, meter)
                results[candidate.name] = result
                self._on_result(result)
                meter.finished(candidate.name, result.seconds)
                if candidate is self._reference and needs_reference:
                    kept = model
                else:
                    model.close()
        finally:
            meter.close()
        return [results[candidate.name] for candidate in self._order]

    def _key(self, candidate: Candidate) -> str:
        reference = None if candidate is self._reference else self._reference.key({})
        return candidate.key({"reference": reference, "work": self._work.describe()})

    def _load(self, candidate: Candidate, meter: Meter) -> LoadedModel:
        work = self._work
        longest = work.longest()
        rows = max(8, work.requests if "speed" in work.tests else 0)
        kv_tokens = max(longest, candidate.config.max_num_batched_tokens + rows * work.answer_room)
        if "speed" in work.tests:
            kv_tokens = max(kv_tokens, work.requests * work.context)
        meter.loading(candidate.name)
        try:
            return LoadedModel(candidate.path, candidate.sized(longest, kv_tokens, rows))
        except CacheCapacityError as error:
            raise ConfigError(
                f"{candidate.name} needs a KV cache of {kv_tokens} tokens for these tests: {error} "
                "Here --context and --requests, --window and --lengths decide."
            ) from error

    def _tokenizer(self, candidate: Candidate) -> Tokenizer:
        path = str(candidate.path)
        if path not in self._tokenizers:
            self._tokenizers[path] = load_tokenizer(candidate.path)
        return self._tokenizers[path]

    def _corpus(self, candidate: Candidate) -> TokenizedCorpus:
        path = str(candidate.path)
        if path not in self._corpora:
            work = self._work
            self._corpora[path] = tokenize(work.corpus, self._tokenizer(candidate), work.window, work.stride)
        return self._corpora[path]

    def _num_tokens(self, candidate: Candidate) -> int:
        """Tokens to compute for a candidate, so that progress is measured in something that takes time."""
        work = self._work
        count = 0
        if "text" in work.tests:
            twice = 2 if work.agreement and candidate is not self._reference else 1
            count += twice * sum(len(window.token_ids) for window in self._corpus(candidate).windows)
        count += len(work.tasks) * len(work.depths) * work.samples * sum(work.lengths)
        return count

    def _evaluate(
        self, candidate: Candidate, model: LoadedModel, beside: LoadedModel | None, meter: Meter
    ) -> CandidateResult:
        began = time.perf_counter()
        info, work = model.info, self._work
        result = CandidateResult(
            name=candidate.name,
            key=self._key(candidate),
            settings=candidate.settings(),
            held=Held(
                num_heads=info.num_heads,
                num_kv_heads=info.num_kv_heads,
                weight_bytes=info.weight_bytes,
                kv_bytes_per_token=info.kv_bytes_per_token,
                block_size=info.block_size,
                weights=info.dtype if info.quantization == "none" else info.quantization,
                kv_dtype=info.kv_dtype,
                backend=info.backend,
                device=info.device,
            ),
        )
        if "text" in work.tests:
            meter.phase(candidate.name, "text")
            why_not = self._why_no_agreement(candidate, model, beside)
            corpus = self._corpus(candidate)
            result.text = score_text(model, None if why_not else beside, corpus, meter.advance)
            result.text.no_agreement = why_not
            _check_numbers(candidate.name, result.text.nll)
        for task in work.tasks:
            meter.phase(candidate.name, task)
            result.trials += self._ask(candidate, model, task, meter)
            _check_numbers(candidate.name, [value for trial in result.trials for value in trial.logprobs])
        if "speed" in work.tests:
            meter.phase(candidate.name, "speed")
            result.speed = measure_speed(
                model,
                beside,
                context=work.context,
                requests=work.requests,
                prefill_tokens=work.prefill_tokens,
            )
        result.seconds = time.perf_counter() - began
        return result

    def _why_no_agreement(self, candidate: Candidate, model: LoadedModel, beside: LoadedModel | None) -> str:
        """Why log-probabilities can't be compared with the reference's; empty if they can."""
        if candidate is self._reference:
            return "it is the reference"
        if not self._work.agreement or beside is None:
            return "--no-agreement"
        mine, other = self._tokenizer(candidate), self._tokenizer(self._reference)
        if mine is other:
            return ""
        if model.info.vocab_size != beside.info.vocab_size:
            sizes = f"{model.info.vocab_size} tokens, the reference {beside.info.vocab_size}"
            return f"another vocabulary ({sizes})"
        if any(mine.token(token) != other.token(token) for token in range(model.info.vocab_size)):
            return "another vocabulary of the same size"
        same = np.array_equal(self._corpus(candidate).token_ids, self._corpus(self._reference).token_ids)
        return (
            "" if same and mine.encode("") == other.encode("") else "its tokenizer cuts this text differently"
        )

    def _ask(self, candidate: Candidate, model: LoadedModel, task: str, meter: Meter) -> list[Trial]:
        work, tokenizer = self._work, self._tokenizer(candidate)
        haystack = Haystack(tokenizer, work.haystack, work.needle, work.seed)
        trials = []
        for length in work.lengths:
            prompts = [
                haystack.prompt(task, length, depth, sample)
                for depth in work.depths
                for sample in range(work.samples)
            ]
            most = max(len(prompt.key_ids) for prompt in prompts) + _MORE_ANSWER_TOKENS
            ids, keys = [p.token_ids for p in prompts], [p.key_ids for p in prompts]
            for prompt, (output, logprobs) in zip(prompts, answers(model, ids, keys, most), strict=True):
                trials.append(_trial(prompt, tokenizer.decode(output), logprobs))
                meter.advance(length)
        return trials


def _check_numbers(name: str, values: Sequence[float]) -> None:
    """Raise ModelError if a model computes what is no number, as float16 does for some models."""
    if not np.isfinite(values).all():
        raise ModelError(
            f"{name} computes log-probabilities that are no finite numbers: its checkpoint is broken, or "
            "activations are too large for its format; try --dtype bfloat16 or float32."
        )


def _trial(prompt: Prompt, text: str, logprobs: list[float]) -> Trial:
    return Trial(
        task=prompt.task,
        length=prompt.length,
        depth=prompt.depth,
        sample=prompt.sample,
        key=prompt.key,
        answer=text,
        correct=holds_key(text, prompt.key),
        logprobs=logprobs,
    )


def score_text(
    model: LoadedModel,
    reference: LoadedModel | None,
    corpus: TokenizedCorpus,
    advance: Callable[[int], None] = lambda _: None,
) -> TextScores:
    """Score every window, and where a reference is given, compare with it position by position.

    `advance` is called with the tokens computed since it was last called.
    """
    logprobs = np.zeros(len(corpus.token_ids))
    divergence, same = np.zeros(len(corpus.token_ids)), np.zeros(len(corpus.token_ids))
    for windows in window_batches(model, corpus.windows):
        mine = hidden_before_scored(model, windows)
        theirs = _reference_hidden(reference, windows) if reference is not None else None
        for index, window in enumerate(windows):
            place = slice(window.first, window.first + window.num_scored)
            logprobs[place] = score_tokens(model, mine[index], window.token_ids[-window.num_scored :])
            if reference is not None and theirs is not None:
                pair = compare_tokens(reference, model, (theirs[index], mine[index]))
                divergence[place], same[place] = pair
            advance(len(window.token_ids) * (1 if reference is None else 2))
    count, where = corpus.num_blocks, corpus.blocks

    def sums(values: np.ndarray) -> np.ndarray:
        return np.bincount(where[corpus.scored], values[corpus.scored], minlength=count)

    ones = np.ones(len(corpus.token_ids))
    return TextScores(
        nll=sums(-logprobs).tolist(),
        num_tokens=sums(ones).astype(int).tolist(),
        num_bytes=sums(corpus.num_bytes).tolist(),
        divergence=None if reference is None else sums(divergence).tolist(),
        same_top=None if reference is None else sums(same).astype(int).tolist(),
    )


def _reference_hidden(reference: LoadedModel, windows: Sequence[Any]) -> list[Any]:
    """The same windows by the reference, whose batches may be smaller."""

    def parts() -> Iterator[Any]:
        for batch in window_batches(reference, windows):
            yield from hidden_before_scored(reference, batch)

    return list(parts())
