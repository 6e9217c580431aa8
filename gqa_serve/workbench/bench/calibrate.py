"""Finds out how to write prompts of a wanted number of tokens for one server.

Owns the order in which ways to count are tried: the tokenizer that was named, the server's /tokenize (vLLM's
and llama.cpp's forms), the usage of requests. What the server puts around a prompt is always measured by
usage, because only that sees the template. Invariant: what is not known is said in `Calibration.how`.
"""

from __future__ import annotations

from dataclasses import dataclass

import msgspec

from gqa_serve.engine.tokenizer import Tokenizer
from gqa_serve.errors import ConfigError
from gqa_serve.workbench.bench.connection import HttpError
from gqa_serve.workbench.bench.target import Message, Target
from gqa_serve.workbench.bench.words import Count, Words, single_tokens

_MEASURED_WORDS = 16


@dataclass(frozen=True)
class Calibration:
    """`words` to write prompts with; `how` tokens are counted, in words; `has_usage`: the server tells."""

    words: Words
    how: str
    has_usage: bool


async def calibrate(target: Target, tokenizer: Tokenizer | None, *, multi_turn: bool) -> Calibration:
    """Measure. Raises ConfigError if tokens can't be counted in any way."""
    probe = await target.probe()
    has_usage = probe.usage is not None
    count, how = await _counter(target, tokenizer, has_usage)
    words = await single_tokens(count)
    if not has_usage:
        return Calibration(
            Words(words), f"{how}; the server tells no usage, so its template isn't seen", False
        )
    overhead = await _overhead(target, Words(words), 1)
    turn = await _overhead(target, Words(words), 3) - overhead if multi_turn else 0
    return Calibration(Words(words, overhead, max(0, turn)), how, True)


async def _counter(target: Target, tokenizer: Tokenizer | None, has_usage: bool) -> tuple[Count, str]:
    if tokenizer is not None:

        async def local(text: str) -> int:
            return len(tokenizer.encode(text, add_special_tokens=False))

        return local, "by the tokenizer"

    async def asked(text: str) -> int:
        tokens = await _tokenize(target, text)
        if tokens is None:
            raise ConfigError(f"{target.client.base} stopped answering /tokenize.")
        return tokens

    if await _tokenize(target, " the") is not None:
        return asked, "by the server's /tokenize"
    if has_usage:
        return _usage_counter(target), "by the usage that the server tells"
    raise ConfigError(
        f"{target.client.base} tells neither usage nor tokens; give --tokenizer a hub id, a directory or a "
        "GGUF file of its model."
    )


def _usage_counter(target: Target) -> Count:
    async def count(text: str) -> int:
        return await _prompt_tokens(target, [{"role": "user", "content": text}])

    return count


async def _tokenize(target: Target, text: str) -> int | None:
    """Tokens of a text by the server's endpoint; None if it has none."""
    body = msgspec.json.encode({"model": target.model, "prompt": text, "content": text})
    for fields in (body, msgspec.json.encode({"model": target.model, "prompt": text})):
        try:
            status, answer = await target.client.exchange("POST", "/tokenize", fields)
            if status == 200:
                return len(msgspec.json.decode(answer)["tokens"])
        except (HttpError, msgspec.MsgspecError, LookupError, TypeError):
            return None
    return None


async def _prompt_tokens(target: Target, messages: list[Message]) -> int:
    answer, _ = await target.ask(messages, 1)
    if answer.error is not None or answer.usage is None:
        raise ConfigError(f"The server did not count a prompt: {answer.error or 'it told no usage'}")
    return answer.usage.prompt_tokens


async def _overhead(target: Target, words: Words, num_messages: int) -> int:
    """Tokens of a conversation that are not its words."""
    messages = [
        {"role": ("user", "assistant")[index % 2], "content": words.text(_MEASURED_WORDS, f"{index}")}
        for index in range(num_messages)
    ]
    return await _prompt_tokens(target, messages) - num_messages * _MEASURED_WORDS
