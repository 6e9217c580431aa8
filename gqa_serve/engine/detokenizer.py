"""From generated tokens to the text a client sees: `IncrementalDetokenizer` and `TextAssembler`.

Owns the order of things: tokens to characters (never half a character), characters to visible text (never
part of a stop string), and what the last delta says. Knows no HTTP and no engine. Invariants: the deltas of
a detokenizer joined together equal `Tokenizer.decode` of all its ids; no special token's text appears when
they are skipped; each token costs amortised constant time.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence

import msgspec

from gqa_serve.engine.request import FinishReason, SamplingParams, TokenLogprobs, TokenOutput
from gqa_serve.engine.stop_strings import StopMatcher, StopStrings
from gqa_serve.engine.token_pieces import incomplete_suffix
from gqa_serve.engine.tokenizer import Tokenizer

_SEED_TOKENS = 8


class IncrementalDetokenizer:
    """Text of a growing list of tokens.

    With `prompt_ids` the text is a continuation: a tokenizer that drops the space at the start of a text
    keeps it here, and a character that the prompt's last tokens began is completed. Byte tokens of
    SentencePiece vocabularies are shown when the run of them ends, because one invalid byte makes
    `tokenizers` replace every byte of its run by U+FFFD. `shown_ids` are special tokens that are text all
    the same.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        skip_special_tokens: bool = True,
        prompt_ids: Sequence[int] = (),
        shown_ids: frozenset[int] = frozenset(),
    ) -> None:
        self._pieces = tokenizer.pieces
        self._skipped = tokenizer.special_ids - shown_ids if skip_special_tokens else frozenset()
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._byte_run = bytearray()
        self._started = any(self._shows(token_id) for token_id in prompt_ids)
        self._strip = 0 if self._started else self._pieces.steps.strip_first
        self._begun = self._begun_character(prompt_ids)

    def _shows(self, token_id: int) -> bool:
        return token_id not in self._skipped and self._pieces.get(token_id) is not None

    def _begun_character(self, prompt_ids: Sequence[int]) -> bytes:
        """The bytes of a character that the prompt began and the first generated tokens may complete."""
        tail = b""
        for token_id in prompt_ids[-_SEED_TOKENS:]:
            piece = self._pieces.get(token_id) if token_id not in self._skipped else b""
            if isinstance(piece, bytes):
                tail += piece
            elif piece is not None:
                tail = b""
        return incomplete_suffix(tail)

    def push(self, token_id: int) -> str:
        """The characters that became certain with `token_id`, often one token's text, sometimes none."""
        if token_id in self._skipped:
            return ""
        piece = self._pieces.get(token_id) if self._started else self._pieces.get_first(token_id)
        if piece is None:
            return ""
        self._started = True
        begun, self._begun = self._begun, b""
        if isinstance(piece, str):
            return self._strip_start(self._end_byte_run() + piece)
        if begun and piece and piece[0] & 0xC0 == 0x80:
            piece = begun + piece
        if self._pieces.steps.byte_level:
            return self._utf8.decode(piece)
        self._byte_run += piece
        return ""

    def finish(self) -> str:
        """What is left when no more tokens come; an unfinished character becomes U+FFFD."""
        return self._strip_start(self._end_byte_run() + self._utf8.decode(b"", final=True))

    def _end_byte_run(self) -> str:
        if not self._byte_run:
            return ""
        run, self._byte_run = self._byte_run, bytearray()
        try:
            return run.decode()
        except UnicodeDecodeError:
            return "\ufffd" * len(run)

    def _strip_start(self, text: str) -> str:
        """Drops the first `_strip` spaces of the whole text; stops for good at another character."""
        while self._strip and text:
            if text[0] != " ":
                self._strip = 0
                break
            self._strip -= 1
            text = text[1:]
        return text


class TextDelta(msgspec.Struct, kw_only=True, omit_defaults=True):
    """What one `TokenOutput` adds to a choice.

    `token_ids` are the generated tokens it accounts for, the stop token included (usage counts it);
    `logprobs` has no entry for a stop token that is not shown; its entry is `stop_logprobs`. The last delta
    has a `finish_reason`; `stop_reason` is then the stop string that matched, or the `stop_token_ids` token
    that was generated, or None (end of sequence, or another reason).
    """

    text: str = ""
    token_ids: list[int] = []
    logprobs: list[TokenLogprobs] | None = None
    stop_logprobs: TokenLogprobs | None = None
    num_cached_tokens: int = 0
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    error: str | None = None


class TextAssembler:
    """Turns the `TokenOutput`s of one request into `TextDelta`s.

    If a delta has a finish_reason though its output had none, a stop string matched: the caller aborts the
    request in the engine and feeds nothing more. `prompt_ids` makes the text a continuation of the prompt
    (see IncrementalDetokenizer). `stops` is `params.stop` compiled, for callers with several choices.
    `shown_ids` are special tokens to show though others are skipped: a parser needs to see them.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        params: SamplingParams,
        prompt_ids: Sequence[int] = (),
        *,
        stops: StopStrings | None = None,
        shown_ids: frozenset[int] = frozenset(),
    ) -> None:
        self._params = params
        self._special_ids = tokenizer.special_ids
        self._detokenizer = IncrementalDetokenizer(
            tokenizer,
            skip_special_tokens=params.skip_special_tokens,
            prompt_ids=prompt_ids,
            shown_ids=shown_ids,
        )
        self._stops = StopMatcher(
            StopStrings(params.stop) if stops is None else stops, include=params.include_stop_str_in_output
        )
        self._num_generated = 0
        self._finished = False

    def feed(self, output: TokenOutput) -> TextDelta:
        """The delta of `output`. Raises RuntimeError after the last one."""
        if self._finished:
            raise RuntimeError("This request's text has ended; nothing may be fed after the last delta.")
        delta = TextDelta(num_cached_tokens=output.num_cached_tokens, error=output.error)
        texts: list[str] = []
        shown = 0
        matched = None
        for token_id in output.token_ids:
            self._num_generated += 1
            delta.token_ids.append(token_id)
            if len(delta.token_ids) == len(output.token_ids) and self._is_hidden_stop(output):
                break
            shown += 1
            text, matched = self._match(self._detokenizer.push(token_id))
            texts.append(text)
            if matched is not None:
                break
        if matched is None and output.finish_reason is not None:
            text, matched = self._match(self._detokenizer.finish())
            texts.append(text if matched is not None else text + self._stops.flush())
        delta.text = "".join(texts)
        if output.logprobs is not None:
            delta.logprobs = output.logprobs[:shown]
            if shown < len(delta.token_ids):
                delta.stop_logprobs = output.logprobs[shown]
        self._set_reason(delta, output, matched)
        return delta

    def _match(self, text: str) -> tuple[str, str | None]:
        return self._stops.feed(text, enabled=self._num_generated >= self._params.min_tokens)

    def _is_hidden_stop(self, output: TokenOutput) -> bool:
        """Whether the last token of `output` ended the request and is not part of the text."""
        if output.finish_reason != "stop" or output.stop_token_id is None:
            return False
        shown = self._params.include_stop_str_in_output and output.stop_token_id not in self._special_ids
        return not shown

    def _set_reason(self, delta: TextDelta, output: TokenOutput, matched: str | None) -> None:
        if matched is not None:
            delta.finish_reason, delta.stop_reason, delta.error = "stop", matched, None
        elif output.finish_reason is not None:
            delta.finish_reason = output.finish_reason
            if output.stop_token_id in self._params.stop_token_ids:
                delta.stop_reason = output.stop_token_id
        self._finished = delta.finish_reason is not None
