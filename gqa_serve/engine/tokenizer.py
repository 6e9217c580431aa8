"""`Tokenizer`: text to token ids and back, for one model; `load_tokenizer` reads it from a checkpoint.

The work is done by the `tokenizers` library. This module owns the choice between reading control tokens in
a text (rendered chat templates) and treating them as ordinary characters (everything a user typed), and the
two facts the rest of the package asks for: which ids are special, and which bytes a token stands for. It
knows no requests and no templates. Invariant: nothing is mutated after construction, so one instance serves
all threads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path

import tokenizers

from gqa_serve.engine.token_pieces import PieceTable
from gqa_serve.errors import ModelError, RequestError

LONG_TEXT_CHARS = 16 * 1024  # above this, encoding takes long enough to matter to other threads


class Tokenizer:
    """One model's tokenizer.

    `special_tokens` maps the usual names (`bos_token`, `eos_token`, `unk_token`, `pad_token`, ...) to token
    texts. `vocab_size` is one more than the largest id, unless given (a GGUF file says it).
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        special_tokens: Mapping[str, str] | None = None,
        vocab_size: int | None = None,
    ) -> None:
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = False
        self._backend = backend
        self._literal = _literal_view(backend)
        self.special_tokens: dict[str, str] = dict(special_tokens or {})
        self.pieces = PieceTable(backend)
        added = backend.get_added_tokens_decoder()
        self.special_ids: frozenset[int] = frozenset(id_ for id_, token in added.items() if token.special)
        self._added: dict[str, int] = {token.content: id_ for id_, token in added.items()}
        self.normalizes_special_texts = backend.normalizer is not None and any(
            token.special and token.normalized for token in added.values()
        )
        self.special_texts: list[str] = [token.content for token in added.values() if token.special]
        self.vocab_size: int = vocab_size or max(backend.get_vocab(with_added_tokens=True).values()) + 1
        self.bos_token_id: int | None = self._id_of("bos_token")
        self.eos_token_id: int | None = self._id_of("eos_token")

    def _id_of(self, name: str) -> int | None:
        text = self.special_tokens.get(name)
        token_id: int | None = None if text is None else self._backend.token_to_id(text)
        return token_id

    def save(self, path: Path) -> None:
        """Write a tokenizer.json, which transformers and `load_tokenizer` read. Raises OSError."""
        path.write_text(self._backend.to_str(pretty=True), encoding="utf-8")

    def encode(self, text: str, *, add_special_tokens: bool = True, parse_special: bool = False) -> list[int]:
        """Token ids of `text`.

        With `parse_special` False, text that spells a control token ("<|im_end|>") is encoded as the ordinary
        characters it is; with True it becomes the control token: for rendered chat templates and raw prompts.
        `add_special_tokens` adds what the model's own settings add (usually a beginning-of-sequence token).
        Raises RequestError for text that is not valid Unicode (lone surrogates).
        """
        backend = self._backend if parse_special else self._literal
        try:
            if len(text) > LONG_TEXT_CHARS:
                # Keeps the interpreter's lock for far less time than `encode`, and computes no offsets.
                (encoding,) = backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)
            else:
                encoding = backend.encode(text, add_special_tokens=add_special_tokens)
            ids: list[int] = encoding.ids
        except TypeError as error:
            raise RequestError("The text holds a lone surrogate, which is not valid Unicode.") from error
        return ids

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of `ids`, as transformers decodes with clean_up_tokenization_spaces=False.

        Ids outside the vocabulary (padding rows of the embedding) add nothing.
        """
        if len(ids) > LONG_TEXT_CHARS:  # keeps the interpreter's lock for less time
            (text,) = self._backend.decode_batch([list(ids)], skip_special_tokens=skip_special_tokens)
        else:
            text = self._backend.decode(list(ids), skip_special_tokens=skip_special_tokens)
        return str(text)

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes `token_id` adds to a text; a special token gives its own text, an unknown id nothing."""
        piece = self.pieces.get(token_id)
        if piece is None:
            return b""
        return piece if isinstance(piece, bytes) else piece.encode()

    @cached_property
    def longest_piece(self) -> int:
        """Characters of the longest vocabulary entry: no token stands for more text.

        In byte-level vocabularies an entry has one character per byte, so this is never too small.
        """
        return max(map(len, self._backend.get_vocab(with_added_tokens=True)))

    def check_length(self, num_chars: int, max_model_len: int, *, param: str) -> None:
        """Raises RequestError (`context_length_exceeded`) for a text too long to be worth tokenizing.

        The limit is `max_model_len` tokens of `longest_piece` characters each: texts within it may still
        have too many tokens, texts beyond it need not be tokenized to know.
        """
        limit = max_model_len * self.longest_piece
        if num_chars > limit:
            raise RequestError(
                f"The prompt has at least {num_chars} characters; this model's context of {max_model_len} "
                f"tokens takes at most {limit}. Shorten the prompt.",
                param=param,
                code="context_length_exceeded",
            )

    def token(self, token_id: int) -> str:
        """The vocabulary entry as it is spelled there ("Ġthe"); "" for an id outside the vocabulary."""
        text: str | None = self._backend.id_to_token(token_id)
        return text or ""

    def added_token_id(self, token: str) -> int | None:
        """The id of the added (control or user-defined) token spelled exactly `token`, or None."""
        return self._added.get(token)

    def token_id(self, token: str) -> int | None:
        """The id of the vocabulary entry spelled exactly `token`, or None."""
        token_id: int | None = self._backend.token_to_id(token)
        return token_id


def _literal_view(backend: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    """A second tokenizer over the same vocabulary (shared, not copied) that reads no control tokens.

    `encode_special_tokens` is a switch on the object, so two objects are what makes concurrent use safe.
    Added tokens that are not special are still recognised, as in transformers' split_special_tokens=True.
    """
    view = tokenizers.Tokenizer(backend.model)
    for part in ("normalizer", "pre_tokenizer", "post_processor", "decoder"):
        if (value := getattr(backend, part)) is not None:
            setattr(view, part, value)
    added = sorted(backend.get_added_tokens_decoder().items())
    view.add_tokens([token for _, token in added])
    view.encode_special_tokens = True
    if [id_ for id_, _ in sorted(view.get_added_tokens_decoder().items())] != [id_ for id_, _ in added]:
        raise ModelError("The tokenizer's added tokens have inconsistent ids; its tokenizer.json is damaged.")
    return view


def load_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer of a checkpoint directory or a .gguf file.

    Raises ModelError if it is missing or damaged, UnsupportedModelError if it is of a kind not served here.
    """
    if path.is_dir():
        from gqa_serve.engine.tokenizer_files import load_directory_tokenizer

        return load_directory_tokenizer(path)
    from gqa_serve.engine.gguf_tokenizer import build_gguf_tokenizer
    from gqa_serve.engine.weights.gguf import read_gguf_metadata

    return build_gguf_tokenizer(read_gguf_metadata(path))
