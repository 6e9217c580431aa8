"""The JSON of the OpenAI API as msgspec structs: requests as clients send them; `answers.py` has the rest.

Owns field names, types and null rules, nothing else: `params.py` says what the values mean. Unknown fields
are dropped here (and logged by `params.py`). Invariant: every optional field takes an explicit null.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import UNSET

# Bounded by 64 bits, so that no later arithmetic meets a 5,000-digit number.
Int = Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)]
Prompt = str | list[str | int | list[int]]


class StreamOptions(msgspec.Struct):
    """What a stream carries besides text."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: bool | None = None  # nothing to obfuscate: chunks are not padded


class JsonSchemaFormat(msgspec.Struct):
    """`response_format.json_schema`. The schema is enforced with `strict` and without."""

    schema: Any = UNSET
    name: str | None = None
    description: str | None = None
    strict: bool | None = None


class ResponseFormat(msgspec.Struct):
    """What the whole output must be; `schema` is llama.cpp's, beside json_object."""

    type: str
    json_schema: JsonSchemaFormat | None = None
    schema: Any = UNSET


class StructuredOutputs(msgspec.Struct, forbid_unknown_fields=True):
    """vLLM's way to ask for structured output: exactly one of the first five."""

    json: Any = UNSET
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    disable_fallback: bool | None = None  # nothing falls back here
    disable_any_whitespace: Literal[False] | None = None
    disable_additional_properties: Literal[False] | None = None
    whitespace_pattern: None = None
    structural_tag: None = None


class SamplingFields(msgspec.Struct, kw_only=True):
    """What chat and plain completions have in common."""

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Int | None = None
    max_tokens: Int | None = None
    max_completion_tokens: Int | None = None
    min_tokens: Int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: Int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    seed: Int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[Int] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    priority: Int | None = None
    cache_salt: str | None = None
    add_special_tokens: bool | None = None
    repeat_penalty: float | None = None
    spaces_between_special_tokens: bool | None = None
    allowed_token_ids: list[Int] | None = None
    prompt_logprobs: Int | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: Any = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    json_schema: Any = None
    regex: str | None = None
    ebnf: str | None = None
    grammar: str | None = None


class ContentPart(msgspec.Struct):
    """One part of a message's content; `type` decides which field counts."""

    type: str
    text: str | None = None
    refusal: str | None = None


class FunctionCall(msgspec.Struct):
    """A function the assistant called earlier; `arguments` is JSON text."""

    name: str
    arguments: str | None = None


class ToolCall(msgspec.Struct):
    """A tool call of an earlier assistant message."""

    function: FunctionCall
    id: str | None = None
    type: str | None = None


class ChatMessage(msgspec.Struct):
    """One message, including an assistant message as the SDK dumps it (nulls, refusal, annotations)."""

    role: str
    content: str | list[ContentPart] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    refusal: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    function_call: Any = None  # what tool_calls replaced; refused unless null
    audio: Any = None


class FunctionDefinition(msgspec.Struct):
    """A function the model may call; `parameters` is the JSON schema of its arguments."""

    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(msgspec.Struct):
    """A tool of the request; `type` "function" is the only one there is."""

    type: str
    function: FunctionDefinition | None = None


class FunctionName(msgspec.Struct):
    """A function chosen by its name."""

    name: str


class NamedTool(msgspec.Struct):
    """A tool of the request, named."""

    type: str
    function: FunctionName | None = None


class AllowedTools(msgspec.Struct):
    """Some tools of the request, of which the model may ("auto") or must ("required") call one."""

    mode: str
    tools: list[NamedTool]


class ToolChoice(msgspec.Struct):
    """`tool_choice` as an object: `type` "function" names one tool, "allowed_tools" narrows the choice."""

    type: str
    function: FunctionName | None = None
    allowed_tools: AllowedTools | None = None


class ChatRequest(SamplingFields):
    """Body of POST /v1/chat/completions."""

    messages: list[ChatMessage]
    tools: list[Tool] | None = None
    tool_choice: str | ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    documents: list[dict[str, Any]] | None = None
    echo: bool | None = None
    logprobs: bool | None = None
    top_logprobs: Int | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    reasoning_effort: str | None = None


class CompletionRequest(SamplingFields):
    """Body of POST /v1/completions."""

    prompt: Prompt
    suffix: str | None = None
    logprobs: Int | None = None
    echo: bool | None = None
    best_of: Int | None = None
    truncate_prompt_tokens: Int | None = None


class EmbeddingRequest(msgspec.Struct, kw_only=True):
    """Body of POST /v1/embeddings; `pooling` and what follows it are not OpenAI's."""

    input: Prompt
    model: str | None = None
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Int | None = None
    pooling: Literal["last", "mean"] | None = None
    add_special_tokens: bool | None = None
    truncate_prompt_tokens: Int | None = None
    priority: Int | None = None
    cache_salt: str | None = None


class TokenizeRequest(ChatRequest, kw_only=True):
    """Body of POST /tokenize: a prompt, or any chat request, whose `messages` are counted as chat would."""

    messages: list[ChatMessage] | None = None  # type: ignore[assignment]
    prompt: str | None = None
    return_token_strs: bool | None = None


class DetokenizeRequest(msgspec.Struct, kw_only=True):
    """Body of POST /detokenize."""

    tokens: list[Int]
    model: str | None = None
