"""Prompts as /v1/completions and /v1/embeddings take them: text or token ids, one or many.

Owns the reading of these forms, their limits, and the truncation a client may ask for. Knows no engine.
Invariant: token ids are used exactly as they came, and what comes out has tokens, all in the vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from gqa_serve.api.protocol import Prompt
from gqa_serve.api.serving import off_loop
from gqa_serve.engine.request import ModelInfo
from gqa_serve.engine.tokenizer import Tokenizer
from gqa_serve.errors import ContextLengthError, RequestError


@dataclasses.dataclass(frozen=True)
class PromptInput:
    """One prompt: its token ids, its text if that is how it came whole, and its name in errors."""

    ids: list[int]
    text: str | None
    param: str


def count_prompts(prompt: Prompt) -> int:
    """How many prompts `prompt` holds: a string or a list of ids is one, a list of those many."""
    return 1 if isinstance(prompt, str) or not prompt or isinstance(prompt[0], int) else len(prompt)


def split_prompt(
    prompt: Prompt, max_length: int | None, name: str = "prompt"
) -> list[tuple[str | list[int], str]]:
    """`prompt` as single prompts, each with the path that names it in errors. Raises RequestError.

    Lists of more than `max_length` ids (None: of any length) are refused before their members are looked at.
    """
    if isinstance(prompt, str):
        return [(prompt, name)]
    if not prompt:
        raise RequestError(f"{name} must not be empty.", param=name)
    if isinstance(prompt[0], int):
        _check_size(prompt, max_length, name)
    if all(isinstance(item, int) for item in prompt):
        return [([item for item in prompt if isinstance(item, int)], name)]
    items: list[tuple[str | list[int], str]] = []
    for number, item in enumerate(prompt):
        if isinstance(item, int) or not isinstance(item, type(prompt[0])):
            raise RequestError(
                f"{name} must be a string, a list of strings, a list of token ids or a list of such lists.",
                param=name,
            )
        if isinstance(item, list):
            _check_size(item, max_length, f"{name}[{number}]")
        items.append((item, f"{name}[{number}]"))
    return items


def _check_size(ids: Sequence[object], max_length: int | None, param: str) -> None:
    if max_length is not None and len(ids) > max_length:
        raise ContextLengthError(len(ids), max_length, param=param)


@dataclasses.dataclass(frozen=True)
class Truncation:
    """Keep the last `keep` tokens of each prompt; None keeps all."""

    keep: int | None = None

    @classmethod
    def read(cls, asked: int | None, max_tokens: int, max_model_len: int) -> Truncation:
        """What `truncate_prompt_tokens` asks for; -1 is as much as leaves room for `max_tokens`.

        Raises RequestError.
        """
        if asked is None:
            return cls()
        if asked == -1:
            return cls(max(1, max_model_len - max_tokens))
        if not 1 <= asked <= max_model_len:
            raise RequestError(
                f"truncate_prompt_tokens must be between 1 and {max_model_len}, or -1 for what fits; "
                f"got {asked}.",
                param="truncate_prompt_tokens",
            )
        return cls(asked)

    def apply(self, ids: list[int]) -> list[int]:
        """The ids that are left."""
        return ids if self.keep is None else ids[-self.keep :]


async def encode_prompts(
    items: Sequence[tuple[str | list[int], str]],
    tokenizer: Tokenizer,
    info: ModelInfo,
    encode: Callable[[str | list[int]], list[int]],
    truncation: Truncation,
    extra_chars: int = 0,
) -> list[PromptInput]:
    """Every prompt as token ids, none empty, each id in the vocabulary. Raises RequestError.

    `encode` makes the tokens of one item, whose text may be no longer than a prompt that fits could be; it
    reads `extra_chars` beside it.
    """

    def encode_all() -> list[PromptInput]:
        prompts = []
        for item, param in items:
            if isinstance(item, str):
                tokenizer.check_length(len(item), info.max_model_len, param=param)
            else:
                check_ids(item, info.vocab_size, param)
            whole = encode(item)
            ids = truncation.apply(whole)
            text = item if isinstance(item, str) and len(ids) == len(whole) else None
            if not ids:
                raise RequestError(
                    "The prompt has no tokens, and this model adds none by itself; send some text.",
                    param=param,
                )
            prompts.append(PromptInput(ids, text, param))
        return prompts

    return await off_loop(sum(len(item) + extra_chars for item, _ in items), encode_all)


def check_ids(ids: Sequence[int], vocab_size: int, param: str) -> None:
    """Raises RequestError if `ids` holds one outside the vocabulary."""
    if ids and not (min(ids) >= 0 and max(ids) < vocab_size):
        raise RequestError(f"{param} holds token ids outside 0..{vocab_size - 1}.", param=param)
