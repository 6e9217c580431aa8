"""Constraints from grammars, compiled and computed beside the engine's own work.

Owns the threads: one compiles grammars (and loads the tokenizer when the first comes), a few compute masks;
llguidance lets go of the interpreter's lock. Knows no scheduler and no logits. Invariant: a request's matcher
is used by one thread at a time: by the engine's until its mask is asked for, by a mask thread until that is
there.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, cast

from gqa_serve.engine.constraints import Constraint, ConstraintError
from gqa_serve.engine.cpus import usable_cores
from gqa_serve.engine.grammars import one_line
from gqa_serve.errors import ModelError

if TYPE_CHECKING:
    from llguidance import LLMatcher

    from gqa_serve.engine.grammar_compiler import GrammarCompiler
    from gqa_serve.engine.tokenizer import Tokenizer


_MAX_MASK_THREADS = 4

logger = logging.getLogger(__name__)


class GrammarConstraint:
    """A matcher that follows one request's output."""

    def __init__(self, matcher: LLMatcher, eos_token_ids: Iterable[int]) -> None:
        self._matcher = matcher
        self._eos = tuple(eos_token_ids)
        self._mask: Future[None] | None = None
        self._bits = b""
        self.error: str | None = None

    @property
    def finished(self) -> bool:
        """Whether nothing but the end of the sequence may follow."""
        return self._matcher.is_stopped() and not self._matcher.is_error()

    def append(self, tokens: Sequence[int]) -> None:
        """`tokens` were added to the output. Raises ConstraintError if they may not be there."""
        with _native():
            followed = self._matcher.consume_tokens(list(tokens))
        if not followed:
            raise ConstraintError(_failure(self._matcher))

    def forced(self) -> list[int]:
        """Tokens that must come next. Raises ConstraintError."""
        with _native():
            return self._matcher.compute_ff_tokens()

    def mask(self) -> bytes:
        """Which tokens may come next, once that is computed; no bits and an `error` after a failure."""
        assert self._mask is not None, "no mask was asked for"
        self._mask.result()
        return self._bits

    def has_mask(self, timeout_s: float) -> bool:
        """Whether `mask` returns at once; waits that long for it."""
        assert self._mask is not None, "no mask was asked for"
        return self._mask.done() or bool(wait([self._mask], timeout=timeout_s).done)

    def compute(self, avoid_end: bool) -> None:
        """What `mask` returns; in a mask thread."""
        self._bits = b""
        try:
            with _native():
                bits = self._matcher.compute_bitmask()
        except ConstraintError as error:
            self.error = str(error)
            return
        if self._matcher.is_error():
            self.error = _failure(self._matcher)
            return
        self._bits = self._without_end(bits) if avoid_end else bits

    def await_mask(self, computed: Future[None]) -> None:
        """`computed` ends when `compute` is done."""
        self._mask = computed

    def _without_end(self, bits: bytes) -> bytes:
        """Without the tokens that end a sequence, if there are others."""
        others = bytearray(bits)
        for token in self._eos:
            if token < 8 * len(others):
                others[token // 8] &= ~(1 << token % 8)
        return bytes(others) if any(others) else bits


class GrammarService:
    """Constraints over one model's vocabulary; `load_tokenizer` is called when the first is asked for."""

    def __init__(self, load_tokenizer: Callable[[], Tokenizer], eos_token_ids: Iterable[int]) -> None:
        self._load_tokenizer = load_tokenizer
        self._eos = tuple(eos_token_ids)
        self._compiler: GrammarCompiler | None = None
        self._compiling = ThreadPoolExecutor(1, "grammar-compiler")
        self._masks = ThreadPoolExecutor(min(_MAX_MASK_THREADS, usable_cores()), "grammar-masks")

    @classmethod
    def for_model(cls, path: Path, eos_token_ids: Iterable[int]) -> GrammarService:
        """Over the tokenizer of a checkpoint directory or .gguf file."""

        def load() -> Tokenizer:
            from gqa_serve.engine.tokenizer import load_tokenizer

            return load_tokenizer(path)

        return cls(load, eos_token_ids)

    def warm_up(self) -> None:
        """Get ready for the first grammar, which would hold up everyone while the vocabulary is read."""
        self._compiling.submit(self._warm_up)

    def _warm_up(self) -> None:
        try:
            self._get_compiler().warm_up()
        except Exception:  # the first request with a grammar is told; others need none
            logger.warning("This model's vocabulary cannot be read for grammars.", exc_info=True)

    def _get_compiler(self) -> GrammarCompiler:
        from gqa_serve.engine.grammar_compiler import GrammarCompiler

        if self._compiler is None:
            self._compiler = GrammarCompiler(self._load_tokenizer(), self._eos)
        return self._compiler

    def begin(self, grammar: str) -> Future[Constraint]:
        """A constraint at the beginning of an output; the future raises ConstraintError.

        A grammar that was compiled before does not wait for others that are being compiled.
        """
        made = self._compiler.find(grammar) if self._compiler is not None else None
        if made is None:
            return self._compiling.submit(self._begin, grammar)
        done: Future[Constraint] = Future()
        done.set_result(GrammarConstraint(made, self._eos))
        return done

    def prepare(self, constraints: Sequence[tuple[Constraint, bool]]) -> None:
        """Compute the masks of `constraints`, all of which are this service's, in the mask threads."""
        for constraint, avoid_end in cast("Sequence[tuple[GrammarConstraint, bool]]", constraints):
            constraint.await_mask(self._masks.submit(constraint.compute, avoid_end))

    def _begin(self, grammar: str) -> Constraint:
        from gqa_serve.engine.grammar_compiler import GrammarError

        try:
            return GrammarConstraint(self._get_compiler().compile(grammar), self._eos)
        except (GrammarError, ModelError) as error:
            raise ConstraintError(str(error), is_ours=isinstance(error, ModelError)) from error
        except Exception as error:  # no thread, no memory, no file: this request's end, not the engine's
            logger.exception("A grammar could not be compiled.")
            message = "The engine could not compile this grammar; its log says why."
            raise ConstraintError(message, is_ours=True) from error


@contextmanager
def _native() -> Iterator[None]:
    """What llguidance raises inside, its panics included, is a ConstraintError: one request's end."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit):  # somebody wants to stop, offline
        raise
    except BaseException as error:  # a panic of native code is no Exception
        logger.exception("A grammar could not be followed.")
        raise ConstraintError("The engine could not follow this grammar; its log says why.") from error


def _failure(matcher: LLMatcher) -> str:
    """What went wrong, for the client."""
    reason = one_line(matcher.get_error()) or "it does not allow this output"
    return f"The grammar could not be followed any further: {reason}."
