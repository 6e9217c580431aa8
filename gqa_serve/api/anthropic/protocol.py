"""The JSON of Anthropic's Messages API as msgspec structs: requests and messages.

Owns field names, types and null rules of `/v1/messages`. Knows nothing of what the values mean. Invariant:
what is answered here validates against the types of the `anthropic` package.
"""

from __future__ import annotations

from typing import Any

import msgspec

from gqa_serve.api.protocol import Int


class Block(msgspec.Struct):
    """One block of a message's content, as clients send it; `type` decides which fields count."""

    type: str
    text: str | None = None
    thinking: str | None = None
    id: str | None = None
    name: str | None = None
    input: dict[str, Any] | None = None
    tool_use_id: str | None = None
    content: str | list[Block] | None = None
    is_error: bool | None = None


class Message(msgspec.Struct):
    """One message of the conversation."""

    role: str
    content: str | list[Block]


class MessageTool(msgspec.Struct):
    """A tool; those with a `type` other than "custom" are Anthropic's own."""

    name: str | None = None
    type: str | None = None
    description: str | None = None
    input_schema: dict[str, Any] | None = None
    strict: bool | None = None
    input_examples: list[Any] | None = None
    allowed_callers: list[str] | None = None


class MessageToolChoice(msgspec.Struct):
    """Whether to call a tool, or which."""

    type: str
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class Thinking(msgspec.Struct):
    """Whether to think before the answer."""

    type: str
    budget_tokens: Int | None = None
    display: str | None = None


class OutputFormat(msgspec.Struct):
    """A JSON schema that the text must match."""

    type: str
    schema: dict[str, Any] | None = None


class OutputConfig(msgspec.Struct):
    """How the answer is to look."""

    effort: str | None = None
    format: OutputFormat | None = None


class CountRequest(msgspec.Struct, kw_only=True):
    """Body of POST /v1/messages/count_tokens."""

    model: str | None = None
    messages: list[Message]
    system: str | list[Block] | None = None
    tools: list[MessageTool] | None = None
    tool_choice: MessageToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    output_format: OutputFormat | None = None  # where output_config.format was before
    chat_template_kwargs: dict[str, Any] | None = None


class MessagesRequest(CountRequest, kw_only=True):
    """Body of POST /v1/messages; after the blank line, fields beyond Anthropic's, as in chat completions."""

    max_tokens: Int
    stream: bool | None = None
    stop_sequences: list[str] | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: Int | None = None

    min_p: float | None = None
    min_tokens: Int | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    seed: Int | None = None
    stop_token_ids: list[Int] | None = None
    ignore_eos: bool | None = None
    priority: Int | None = None
    cache_salt: str | None = None


# --- answers -----------------------------------------------------------------------------------------------


class TextBlock(msgspec.Struct):
    """Text."""

    text: str
    type: str = "text"
    citations: None = None


class ThinkingBlock(msgspec.Struct):
    """Thinking; it is shown as it is, so there is nothing to sign."""

    thinking: str
    type: str = "thinking"
    signature: str = ""


class ToolUseBlock(msgspec.Struct):
    """A tool call."""

    id: str
    name: str
    input: Any
    type: str = "tool_use"


AnswerBlock = TextBlock | ThinkingBlock | ToolUseBlock


class MessageTokensDetails(msgspec.Struct):
    """How much of the output was thinking."""

    thinking_tokens: int


class MessageUsage(msgspec.Struct):
    """Token counts; the prompt is the sum of the first three."""

    input_tokens: int
    cache_creation_input_tokens: int
    cache_read_input_tokens: int
    output_tokens: int
    output_tokens_details: MessageTokensDetails
    service_tier: str = "standard"


class AnswerMessage(msgspec.Struct, kw_only=True):
    """The generated message."""

    id: str
    type: str = "message"
    role: str = "assistant"
    model: str
    content: list[AnswerBlock] = []
    stop_reason: str | None = None
    stop_sequence: str | None = None
    usage: MessageUsage


class TokenCount(msgspec.Struct):
    """Answer of POST /v1/messages/count_tokens."""

    input_tokens: int


class MessageErrorDetail(msgspec.Struct):
    """What went wrong."""

    type: str
    message: str


class MessageError(msgspec.Struct):
    """The whole JSON body of an error."""

    error: MessageErrorDetail
    request_id: str | None
    type: str = "error"
