"""From grammar text to a matcher over one vocabulary, within bounds of memory, stack and time.

Owns the view of a tokenizer that llguidance needs, and the matchers made so far. Knows nothing of requests.
Invariant: a matcher handed out has no error and is at its beginning; nobody else has it.
"""

from __future__ import annotations

import os
import re
import sys
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import TypeVar

from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper

from gqa_serve.engine.grammars import one_line
from gqa_serve.engine.request import MAX_GRAMMAR_CHARS
from gqa_serve.engine.tokenizer import Tokenizer

_MAX_CACHED_GRAMMARS = 64
_MAX_CACHED_CHARS = 1024 * 1024  # compiled, a character takes up to 70 bytes
# The compiler calls itself for each rule or $ref that leads to the next, of which a text can hold many.
# Memory is taken only as far as the stack is used.
_STACK_BYTES = 512 * 1024 * 1024
# Masks are put together from those of parts of the vocabulary whose tokens match one of these as a whole:
# white space, and insides of JSON strings by length, so that a string near its maxLength is as fast as any.
_STRING_LENGTHS = (*range(1, 11), 12, 14, 16, 20, 24, 30)
_SLICES = [
    r"[\x20\x0A\x0D\x09]+",
    *(rf'[^"\\\x00-\x1F\x7F]{{1,{length}}}' for length in _STRING_LENGTHS),
    r'[^"\\\x00-\x1F\x7F]+',
]
_NICE = 10  # of threads that compile
_MARK = "\x02"  # a character that no vocabulary merges with what follows it

T = TypeVar("T")
_stack_size_lock = threading.Lock()


class GrammarError(Exception):
    """A grammar that cannot be enforced; the message names the keyword or the line."""


def parser_limits() -> LLParserLimits:
    """What one step of one request may cost: about 50 ms and some tens of MiB at worst."""
    return LLParserLimits(
        initial_lexer_fuel=1_000_000,
        step_lexer_fuel=200_000,
        step_max_items=50_000,
        max_lexer_states=50_000,
        max_grammar_size=500_000,
        verbose_errors=False,
    )


class _Vocabulary:
    """A `Tokenizer` in the shape that llguidance asks for."""

    def __init__(self, tokenizer: Tokenizer, eos_token_ids: list[int]) -> None:
        self._tokenizer = tokenizer
        self.eos_token_id = eos_token_ids[0]
        self.bos_token_id = tokenizer.bos_token_id
        self.tokens = [tokenizer.token_bytes(token) for token in range(tokenizer.vocab_size)]
        self.special_token_ids = sorted(tokenizer.special_ids | set(eos_token_ids))
        encoded = b"".join(self.tokens[token] for token in self._encode("a"))
        self._mark = [] if encoded == b"a" else self._encode(_MARK)  # it puts a blank before every text

    def _encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False)

    def __call__(self, text: str) -> list[int]:
        """Tokens of a text in the middle of another."""
        if not self._mark:
            return self._encode(text)
        ids = self._encode(_MARK + text)
        return ids[len(self._mark) :] if ids[: len(self._mark)] == self._mark else self._encode(text)


def make_ll_tokenizer(tokenizer: Tokenizer, eos_token_ids: Iterable[int]) -> LLTokenizer:
    """llguidance's view of the vocabulary; takes some tenths of a second."""
    eos = [token for token in sorted(set(eos_token_ids)) if token < tokenizer.vocab_size]
    if not eos:
        raise GrammarError("This model has no end-of-sequence token, so no grammar can end an answer.")
    wrapper = TokenizerWrapper(_Vocabulary(tokenizer, eos))
    return LLTokenizer(wrapper, n_vocab=tokenizer.vocab_size, eos_token=eos, slices=_SLICES)


class GrammarCompiler:
    """Matchers for one tokenizer, the latest kept. May be used by several threads."""

    def __init__(self, tokenizer: Tokenizer, eos_token_ids: Iterable[int]) -> None:
        self._tokenizer = tokenizer
        self._eos = list(eos_token_ids)
        self._vocabulary: LLTokenizer | None = None
        self._lock = threading.Lock()  # of `_made`
        self._compiling = threading.Lock()
        self._made: OrderedDict[str, LLMatcher | GrammarError] = OrderedDict()

    def compile(self, grammar: str) -> LLMatcher:
        """A matcher at the beginning of `grammar`. Raises GrammarError."""
        found = self._find(grammar)
        if found is None:
            with self._compiling:
                found = self._find(grammar)  # another thread may have been before
                if found is None:
                    found = _on_large_stack(lambda: self._compile(grammar))
                    self._keep(grammar, found)
        if isinstance(found, GrammarError):
            raise GrammarError(str(found))
        return found.deep_copy()

    def warm_up(self) -> None:
        """Read the vocabulary now: that holds the interpreter's lock for tenths of a second.

        A vocabulary that no grammar can be made for is left to whoever brings one.
        """
        with self._compiling, suppress(GrammarError):
            self._read_vocabulary()

    def _read_vocabulary(self) -> LLTokenizer:
        if self._vocabulary is None:
            self._vocabulary = make_ll_tokenizer(self._tokenizer, self._eos)
        return self._vocabulary

    def find(self, grammar: str) -> LLMatcher | None:
        """A matcher at the beginning of `grammar` if that was compiled before, without waiting."""
        found = self._find(grammar)
        return found.deep_copy() if isinstance(found, LLMatcher) else None

    def _find(self, grammar: str) -> LLMatcher | GrammarError | None:
        with self._lock:
            if grammar in self._made:
                self._made.move_to_end(grammar)
            return self._made.get(grammar)

    def _keep(self, grammar: str, made: LLMatcher | GrammarError) -> None:
        with self._lock:
            self._made[grammar] = made
            while len(self._made) > _MAX_CACHED_GRAMMARS or sum(map(len, self._made)) > _MAX_CACHED_CHARS:
                self._made.popitem(last=False)

    def _compile(self, grammar: str) -> LLMatcher | GrammarError:
        if len(grammar) > MAX_GRAMMAR_CHARS:
            return GrammarError(f"A grammar may have {MAX_GRAMMAR_CHARS} characters.")
        try:
            vocabulary = self._read_vocabulary()
        except GrammarError as error:
            return error
        matcher = LLMatcher(vocabulary, grammar, log_level=0, limits=parser_limits())
        if not matcher.is_error():
            # Some are too complex only when they are used. Copies keep what this finds out.
            matcher.compute_bitmask()
            if not matcher.is_error():
                return matcher
        return GrammarError(_explain(matcher.get_error()))


_compilers: weakref.WeakKeyDictionary[Tokenizer, GrammarCompiler] = weakref.WeakKeyDictionary()
_compilers_lock = threading.Lock()


def compiler_for(tokenizer: Tokenizer) -> GrammarCompiler:
    """The one compiler that only checks: for it any token may be the last."""
    with _compilers_lock:
        if tokenizer not in _compilers:
            eos = tokenizer.eos_token_id
            _compilers[tokenizer] = GrammarCompiler(tokenizer, [0 if eos is None else eos])
        return _compilers[tokenizer]


def _explain(message: str) -> str:
    """llguidance's message as one short sentence."""
    if unknown := re.search(r"Unimplemented keys: \[(.*?)\]", message):
        keywords = one_line(unknown[1].replace('\\"', '"'))
        return f"The JSON schema has keywords that cannot be enforced: {keywords}. Leave them out."
    return f"The grammar cannot be enforced: {one_line(message)}."


def _yield_to_others() -> None:
    """Take little of a core that steps or the event loop want: on Linux each thread has a priority."""
    if sys.platform == "linux":
        with suppress(OSError):  # not allowed here
            mine = max(_NICE, os.getpriority(os.PRIO_PROCESS, 0))
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), mine)


def _on_large_stack(work: Callable[[], T]) -> T:
    """`work()` in a thread of its own. Raises what it raises."""
    result: list[T] = []
    failure: list[Exception] = []

    def run() -> None:
        try:
            _yield_to_others()
            result.append(work())
        except Exception as error:
            failure.append(error)
        except BaseException as error:  # a panic of native code is no Exception, and nobody catches it
            failure.append(RuntimeError(f"The compiler of grammars failed: {error}"))

    thread = threading.Thread(target=run, name="grammar")
    with _stack_size_lock:
        before = threading.stack_size(_STACK_BYTES)
        try:
            thread.start()
        finally:
            threading.stack_size(before)
    thread.join()
    if failure:
        raise failure[0]
    return result[0]
