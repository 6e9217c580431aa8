"""How a byte-level BPE model cuts text into words: the table behind `tokenizer.ggml.pre`.

A GGUF file stores the vocabulary and merges of its tokenizer, but only the *name* of the rule that splits
text first. This module maps each supported name to that rule. The regular expressions are those of the
models' own tokenizer.json files (Oniguruma syntax); where llama.cpp approximates one of them, the original
is used, because the model was trained with it. Invariant: a name that is not in the table is refused, never
replaced by a similar one.
"""

from __future__ import annotations

from dataclasses import dataclass

import tokenizers
from tokenizers import normalizers, pre_tokenizers

from gqa_serve.errors import UnsupportedModelError

_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"


def _words_like_cl100k(number: str) -> str:
    return rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{number}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}"


def _words_like_o200k(number: str, contraction: str) -> str:
    return (
        rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{contraction}"
        rf"|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{contraction}"
        rf"|{number}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"
    )


@dataclass(frozen=True)
class PreTokenizer:
    """Splitting rule: each regex in turn cuts what the previous ones left; matches and gaps are both words.

    `ignore_merges`: a word that is a vocabulary entry is that token, whatever the merges say. `add_bos` is
    used where the file has no `add_bos_token`. `nfc`: text is brought to Unicode NFC first.
    """

    regexes: tuple[str, ...]
    ignore_merges: bool = False
    add_bos: bool = False
    nfc: bool = False

    def build(self) -> pre_tokenizers.PreTokenizer:
        splits = [
            pre_tokenizers.Split(tokenizers.Regex(regex), behavior="isolated") for regex in self.regexes
        ]
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=False)
        return pre_tokenizers.Sequence([*splits, byte_level])

    def build_normalizer(self) -> normalizers.Normalizer | None:
        return normalizers.NFC() if self.nfc else None


_LLAMA3 = PreTokenizer((_words_like_cl100k(r"\p{N}{1,3}"),), ignore_merges=True, add_bos=True)
_CL100K = PreTokenizer((_words_like_cl100k(r"\p{N}{1,3}"),))
_QWEN2 = PreTokenizer((_words_like_cl100k(r"\p{N}"),), nfc=True)
_ONE_DIGIT = PreTokenizer((_words_like_cl100k(r"\p{N}"),))
_TEKKEN = PreTokenizer((_words_like_o200k(r"\p{N}", ""),), ignore_merges=True, add_bos=True)
_GPT4O = PreTokenizer((_words_like_o200k(r"\p{N}{1,3}", _CONTRACTION + "?"),))
_GPT2_WORDS = PreTokenizer((_GPT2,))
_GPT2_DIGITS = PreTokenizer((r"\p{N}", _GPT2))
_DEFAULT = PreTokenizer((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]"))

PRE_TOKENIZERS: dict[str, PreTokenizer] = {
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "falcon3": _LLAMA3,
    "pixtral": _LLAMA3,
    "dbrx": _CL100K,
    "smaug-bpe": _CL100K,
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _ONE_DIGIT,
    "tekken": _TEKKEN,
    "gpt-4o": _GPT4O,
    "gpt-2": _GPT2_WORDS,
    "phi-2": _GPT2_WORDS,
    "olmo": _GPT2_WORDS,
    "smollm": _GPT2_DIGITS,
    "starcoder": _GPT2_DIGITS,
    "refact": _GPT2_DIGITS,
    "minerva-7b": _GPT2_DIGITS,
    "default": _DEFAULT,
}


def find_pre_tokenizer(name: str) -> PreTokenizer:
    """The rule called `name`; UnsupportedModelError naming the supported ones if there is none."""
    if name not in PRE_TOKENIZERS:
        raise UnsupportedModelError(
            f"The GGUF file's pre-tokenizer {name!r} (tokenizer.ggml.pre) is not supported; supported are "
            f"{', '.join(sorted(PRE_TOKENIZERS))}. Serve the original checkpoint with its tokenizer.json "
            "instead."
        )
    return PRE_TOKENIZERS[name]
