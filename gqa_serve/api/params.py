"""What request fields mean: refusals, no-ops, defaults, and the `SamplingParams` of each choice.

Owns the rule "honour or refuse": a documented field that is not built is a 400 unless it is null or says
what happens anyway; a field nobody documents is ignored with one logged warning per name. Knows no HTTP and
no engine. Invariant: the `SamplingParams` returned here have been validated.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import Any

import msgspec

from gqa_serve.api.errors import shorten
from gqa_serve.api.json_guard import RawFields, decode_field
from gqa_serve.api.protocol import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    EmbeddingRequest,
    SamplingFields,
    TokenizeRequest,
)
from gqa_serve.engine.request import MAX_LOGPROBS, ModelInfo, SamplingParams, sampling_defaults
from gqa_serve.errors import RequestError

MAX_CHOICES = 1024  # prompts times n; more is a mistake, and each choice is a request to the engine
MAX_CANDIDATES = 128  # best_of
MAX_WARNED_FIELDS = 64
MAX_HARMLESS_BYTES = 256  # of a refused field's JSON: none of the harmless values is longer
DEFAULT_COMPLETION_TOKENS = 16  # OpenAI's, for /v1/completions only

# Accepted because they ask for nothing this server could do otherwise: it stores nothing, has one service
# tier and caches by content.
NO_OPS = frozenset(
    {"user", "metadata", "store", "service_tier", "safety_identifier"}
    | {"prompt_cache_key", "prompt_cache_retention", "prompt_cache_options"}
)

# Field -> the values (besides null) that describe what happens anyway.
_REFUSED: dict[str, tuple[Any, ...]] = {
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "web_search_options": (),
    "verbosity": ("medium",),
    "moderation": (),
    "chat_template": (),
    "guided_decoding_backend": ("auto", "guidance"),
    "guided_whitespace_pattern": (),
    "structural_tag": (),
    "prompt_embeds": (),
    "use_beam_search": (False,),
    "length_penalty": (1.0,),
    "bad_words": ([],),
    "logits_processors": ([],),
}
_REFUSED_CHAT = {
    **_REFUSED,
    "best_of": (1,),
    "suffix": ("",),
    "truncate_prompt_tokens": (),
}
_REFUSED_EMBEDDING: dict[str, tuple[Any, ...]] = {
    "messages": (),
    "normalize": (True,),
    "embed_dtype": ("float32",),
    "endianness": ("native", "little"),
}
_REFUSED_COMPLETION = {
    **_REFUSED,
    "top_logprobs": (0,),
    "reasoning_effort": (),
    "documents": ([],),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
}

# What chat does where these are silent; an endpoint without the field does that too.
_CHAT_DEFAULTS: dict[str, tuple[Any, ...]] = {
    "add_generation_prompt": (True,),
    "skip_special_tokens": (True,),
    "top_logprobs": (0,),
    **dict.fromkeys(("add_special_tokens", "continue_final_message", "echo", "logprobs"), (False,)),
    **dict.fromkeys(
        ("include_stop_str_in_output", "return_token_ids", "return_tokens_as_token_ids"), (False,)
    ),
    "spaces_between_special_tokens": (False,),
}

_CURES = {
    "functions": "send tools, which replaced it",
    "function_call": "send tool_choice, which replaced it",
}

logger = logging.getLogger(__name__)


class FieldRules:
    """The fields one endpoint knows, refuses and ignores; remembers which unknown ones it has logged."""

    def __init__(
        self,
        type: type[msgspec.Struct],
        refused: Mapping[str, tuple[Any, ...]],
        no_ops: Iterable[str] = NO_OPS,
    ) -> None:
        self.fields = frozenset(type.__struct_fields__)
        self.refused = refused  # field -> the values, besides null, that are not refused
        self.no_ops = frozenset(no_ops)
        self._warned: set[str] = set()

    @classmethod
    def chat(cls) -> FieldRules:
        """The rules of /v1/chat/completions."""
        return cls(ChatRequest, _REFUSED_CHAT)

    @classmethod
    def beside_chat(
        cls,
        type: type[msgspec.Struct],
        refused: Mapping[str, tuple[Any, ...]],
        no_ops: Iterable[str] = NO_OPS,
    ) -> FieldRules:
        """The rules of an endpoint that asks for chats in words of its own.

        It refuses what chat completions know and it does not: nobody sends that to be ignored.
        """
        own = {*type.__struct_fields__, *no_ops}
        others = ({*ChatRequest.__struct_fields__} | _REFUSED_CHAT.keys()) - own
        plain = {name: _REFUSED_CHAT.get(name, _CHAT_DEFAULTS.get(name, ())) for name in others}
        return cls(type, {**plain, **refused}, no_ops)

    @classmethod
    def completion(cls) -> FieldRules:
        """The rules of /v1/completions."""
        return cls(CompletionRequest, _REFUSED_COMPLETION)

    @classmethod
    def embedding(cls) -> FieldRules:
        """The rules of /v1/embeddings."""
        return cls(EmbeddingRequest, _REFUSED_EMBEDDING)

    @classmethod
    def tokenize(cls) -> FieldRules:
        """The rules of /tokenize: those of chat."""
        return cls(TokenizeRequest, _REFUSED_CHAT)

    @classmethod
    def detokenize(cls) -> FieldRules:
        """The rules of /detokenize."""
        return cls(DetokenizeRequest, {})

    def covers(self, name: str) -> bool:
        """Whether a field is honoured, a documented no-op or refused, rather than unknown."""
        return name in self.fields or name in self.no_ops or name in self.refused

    def check(self, raw: RawFields) -> None:
        """Raises RequestError for a field that promises something this server does not do."""
        for name, value in raw.items():
            if name in self.refused:
                self._refuse(name, _small_value(name, value))
            elif not self.covers(name):
                self._warn(name)

    def _refuse(self, name: str, value: Any) -> None:
        harmless = self.refused[name]
        if value is None or any(_same(value, other) for other in harmless):
            return
        cure = _CURES.get(name, "leave it out")
        allowed = ", ".join([msgspec.json.encode(other).decode() for other in harmless] + ["null"])
        raise RequestError(
            f"{name} is not supported by this server; {cure} (or send {allowed}).",
            param=name,
            code="unsupported_parameter",
        )

    def _warn(self, name: str) -> None:
        if name in self._warned or len(self._warned) >= MAX_WARNED_FIELDS:
            return
        self._warned.add(name)
        logger.warning("Ignoring unknown request field %r.", shorten(name))


def _same(value: object, other: object) -> bool:
    """Equal as JSON values, where 0 is not false."""
    return value == other and isinstance(value, bool) == isinstance(other, bool)


def _small_value(name: str, raw: msgspec.Raw) -> object:
    """The field's value, or a stand-in equal to nothing if it is too large to be any of those looked for."""
    return decode_field(name, raw) if memoryview(raw).nbytes <= MAX_HARMLESS_BYTES else object()


def candidate_count(fields: CompletionRequest, n: int, num_prompts: int) -> int:
    """How many candidates each prompt gets, to return `n` of: `best_of`, else `n`. Raises RequestError."""
    best_of = n if fields.best_of is None else fields.best_of
    if not n <= best_of <= MAX_CANDIDATES or best_of * num_prompts > MAX_CHOICES:
        raise RequestError(
            f"best_of must be between n ({n}) and {MAX_CANDIDATES}, and at most {MAX_CHOICES} over all "
            f"prompts; got {best_of}.",
            param="best_of",
        )
    if best_of > n and fields.stream:
        raise RequestError("best_of cannot rank choices that are streamed; send n alone.", param="best_of")
    return best_of


def choice_count(fields: SamplingFields, num_prompts: int = 1) -> int:
    """`n`, checked against its range and against `MAX_CHOICES` over all prompts. Raises RequestError."""
    n = 1 if fields.n is None else fields.n
    if not 1 <= n <= 128:
        raise RequestError(f"n must be between 1 and 128, got {n}.", param="n")
    if n * num_prompts > MAX_CHOICES:
        raise RequestError(
            f"{num_prompts} prompts with n={n} are more than {MAX_CHOICES} choices. Send several requests.",
            param="prompt",
        )
    return n


def check_capacity(
    info: ModelInfo, num_prompts: int, n: int, *, name: str = "n", prompts: str = "prompt"
) -> None:
    """Raises RequestError for more choices than the engine takes when it is idle: waiting cannot help."""
    limit = info.max_num_seqs + info.max_waiting
    if num_prompts * n > limit:
        asked = f"{name}={n}" if num_prompts == 1 else f"{num_prompts} {prompts}s"
        asked += f" with {name}={n}" if n > 1 and num_prompts > 1 else ""
        raise RequestError(
            f"{asked} is more than the {limit} choices this server can hold at once. Ask for fewer.",
            param=name if n > 1 else prompts,
        )


def sampling_params(
    fields: SamplingFields,
    generation_config: Mapping[str, Any],
    *,
    default_max_tokens: int | None,
    logprobs: int | None,
    prompt_logprobs: int | None,
    vocab_size: int,
    grammar: str | None = None,
) -> SamplingParams:
    """What `fields` ask for, the checkpoint's defaults where they are silent. Raises RequestError.

    `max_tokens` is not clamped to the context yet (`SamplingParams.fit`). `max_completion_tokens` wins
    over `max_tokens` where both are given, as in vLLM: it is the newer name.
    """
    limit_name = "max_tokens" if fields.max_completion_tokens is None else "max_completion_tokens"
    max_tokens: int | None = getattr(fields, limit_name)
    if max_tokens is not None and max_tokens < 0:
        raise RequestError(f"{limit_name} must not be negative, got {max_tokens}.", param=limit_name)
    if fields.top_k is not None and fields.top_k < -1:
        raise RequestError(f"top_k must be -1 (off) or at least 0, got {fields.top_k}.", param="top_k")
    if fields.spaces_between_special_tokens and fields.skip_special_tokens is False:
        raise RequestError(
            "spaces_between_special_tokens is not supported: special tokens are shown without spaces. "
            "Send false (or leave skip_special_tokens on).",
            param="spaces_between_special_tokens",
            code="unsupported_parameter",
        )
    values = sampling_defaults(generation_config)
    for name in SamplingParams.__struct_fields__:
        value = getattr(fields, name, None)
        if value is not None and name not in ("n", "logprobs", "prompt_logprobs", "max_tokens", "grammar"):
            values[name] = value
    if fields.repeat_penalty is not None:  # llama.cpp's name
        if fields.repetition_penalty not in (None, fields.repeat_penalty):
            raise RequestError(
                "repeat_penalty and repetition_penalty are one setting and differ; send one of them.",
                param="repeat_penalty",
            )
        values["repetition_penalty"] = fields.repeat_penalty
    if values.get("top_k") == -1:  # "off" as vLLM and transformers' users spell it
        values["top_k"] = 0
    if isinstance(fields.stop, str):
        values["stop"] = [fields.stop]
    if fields.logit_bias is not None:
        values["logit_bias"] = {_token_id(key): bias for key, bias in fields.logit_bias.items()}
    if logprobs is not None and not 0 <= logprobs <= MAX_LOGPROBS:
        raise RequestError(
            f"logprobs must be between 0 and {MAX_LOGPROBS}, got {logprobs}.", param="logprobs"
        )
    values["max_tokens"] = default_max_tokens if max_tokens is None else max_tokens
    params = SamplingParams(**values, logprobs=logprobs, prompt_logprobs=prompt_logprobs, grammar=grammar)
    params.validate(vocab_size)
    return params


def _token_id(key: str) -> int:
    if not (key.isascii() and key.isdigit() and len(key) <= 10):
        raise RequestError(
            f"logit_bias keys are token ids written as text, got {shorten(key)!r}.", param="logit_bias"
        )
    return int(key)
