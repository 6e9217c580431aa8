"""The JSON of the OpenAI API as msgspec structs: answers as clients expect them.

Owns field names, types and which keys may be absent, nothing else; `protocol.py` has the requests.
Invariant: key order and presence follow OpenAI's, because clients compare and index them.
"""

from __future__ import annotations

from typing import Literal

import msgspec
from msgspec import UNSET, UnsetType

ApiFinishReason = Literal["stop", "length", "tool_calls"]


class PromptTokensDetails(msgspec.Struct):
    """How much of the prompt came from the prefix cache."""

    cached_tokens: int


class CompletionTokensDetails(msgspec.Struct):
    """How much of the output was thinking."""

    reasoning_tokens: int


class Usage(msgspec.Struct):
    """Token counts over all prompts and choices of a request."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: CompletionTokensDetails | UnsetType = UNSET


class TopLogprob(msgspec.Struct):
    """One alternative at a position."""

    token: str
    logprob: float
    bytes: list[int]


class ChatTokenLogprob(msgspec.Struct):
    """One generated token with its alternatives."""

    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[TopLogprob]


class ChatLogprobs(msgspec.Struct):
    """Logprobs of a chat choice or chunk."""

    content: list[ChatTokenLogprob]
    refusal: None = None


class AnswerFunction(msgspec.Struct):
    """The function a generated call names, and its arguments as JSON text."""

    name: str
    arguments: str


class AnswerToolCall(msgspec.Struct, kw_only=True):
    """A generated tool call."""

    id: str
    type: str = "function"
    function: AnswerFunction


class AssistantMessage(msgspec.Struct, kw_only=True):
    """The generated message; keys that come with reasoning and tools are absent without."""

    role: str = "assistant"
    content: str | None
    refusal: None = None
    reasoning_content: str | UnsetType = UNSET
    tool_calls: list[AnswerToolCall] | UnsetType = UNSET


class ChatChoice(msgspec.Struct):
    """One choice of a chat completion."""

    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: ApiFinishReason | None
    stop_reason: str | int | UnsetType | None = UNSET
    token_ids: list[int] | UnsetType = UNSET  # beyond OpenAI's, in vLLM's form


class ChatCompletion(msgspec.Struct, kw_only=True):
    """Answer of POST /v1/chat/completions."""

    id: str
    object: str = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    system_fingerprint: str
    prompt_token_ids: list[int] | UnsetType = UNSET
    prompt_logprobs: list[dict[str, PromptLogprob] | None] | UnsetType = UNSET


class DeltaFunction(msgspec.Struct):
    """The name, once, and pieces of the arguments of a tool call."""

    name: str | UnsetType = UNSET
    arguments: str | UnsetType = UNSET


class DeltaToolCall(msgspec.Struct):
    """What a chunk adds to tool call `index`; id, type and name come with its first."""

    index: int
    id: str | UnsetType = UNSET
    type: str | UnsetType = UNSET
    function: DeltaFunction | UnsetType = UNSET


class Delta(msgspec.Struct):
    """What a chunk adds to the message; absent keys add nothing."""

    role: str | UnsetType = UNSET
    content: str | UnsetType | None = UNSET
    reasoning_content: str | UnsetType = UNSET
    tool_calls: list[DeltaToolCall] | UnsetType = UNSET


class ChatChunkChoice(msgspec.Struct):
    """The one choice a chunk speaks of."""

    index: int
    delta: Delta
    logprobs: ChatLogprobs | None = None
    finish_reason: ApiFinishReason | None = None
    stop_reason: str | int | UnsetType | None = UNSET
    token_ids: list[int] | UnsetType = UNSET


class ChatChunk(msgspec.Struct, kw_only=True):
    """One SSE event of a chat stream; `usage` is absent unless asked for, then null but in the last."""

    id: str
    object: str = "chat.completion.chunk"
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChunkChoice]
    usage: Usage | UnsetType | None = UNSET
    prompt_token_ids: list[int] | UnsetType = UNSET


class PromptLogprob(msgspec.Struct):
    """What `prompt_logprobs` tells of one token at one place of a prompt, in vLLM's form."""

    logprob: float
    rank: int
    decoded_token: str


PromptLogprobs = list[dict[str, PromptLogprob] | None]
"""One entry per prompt token, by token id; null for the first, which nothing precedes."""


class LegacyLogprobs(msgspec.Struct):
    """Logprobs of a plain completion: four lists of one entry per token."""

    text_offset: list[int] = []
    token_logprobs: list[float | None] = []
    tokens: list[str] = []
    top_logprobs: list[dict[str, float] | None] = []


class TextChoice(msgspec.Struct):
    """One choice (or, in a stream, a piece of one) of a plain completion."""

    text: str
    index: int
    logprobs: LegacyLogprobs | None
    finish_reason: ApiFinishReason | None
    # beyond OpenAI's, in vLLM's form
    stop_reason: str | int | UnsetType | None = UNSET
    token_ids: list[int] | UnsetType = UNSET
    prompt_token_ids: list[int] | UnsetType = UNSET
    prompt_logprobs: PromptLogprobs | UnsetType = UNSET


class TextCompletion(msgspec.Struct, kw_only=True):
    """Answer of POST /v1/completions, and each SSE event of its stream."""

    id: str
    object: str = "text_completion"
    created: int
    model: str
    system_fingerprint: str
    choices: list[TextChoice]
    usage: Usage | UnsetType | None = UNSET


class Embedding(msgspec.Struct):
    """One input's vector: numbers, or base64 of little-endian float32."""

    index: int
    embedding: list[float] | str
    object: str = "embedding"


class EmbeddingUsage(msgspec.Struct):
    """Token counts over all inputs."""

    prompt_tokens: int
    total_tokens: int


class EmbeddingList(msgspec.Struct, kw_only=True):
    """Answer of POST /v1/embeddings."""

    object: str = "list"
    data: list[Embedding]
    model: str
    usage: EmbeddingUsage


class Tokenized(msgspec.Struct):
    """Answer of POST /tokenize; `token_strs` are vocabulary entries as they are spelled there."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class Detokenized(msgspec.Struct):
    """Answer of POST /detokenize."""

    prompt: str


class TokenizerInfo(msgspec.Struct, kw_only=True):
    """Answer of GET /tokenizer_info."""

    bos_token: str | None
    eos_token: str | None
    pad_token: str | None
    unk_token: str | None
    vocab_size: int


class ModelCard(msgspec.Struct, kw_only=True):
    """One entry of GET /v1/models."""

    id: str
    object: str = "model"
    created: int
    owned_by: str = "gqa-serve"
    root: str | None
    parent: None = None
    max_model_len: int | None


class ModelList(msgspec.Struct):
    """Answer of GET /v1/models."""

    data: list[ModelCard]
    object: str = "list"
