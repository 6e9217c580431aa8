"""The JSON of the Responses API as msgspec structs: requests, items, the response object.

Owns field names, types and null rules of `/v1/responses`. An item as a client sends it (`InputItem`) is
loose, because clients leave out ids, types and statuses; an item as this server keeps and shows it (`Item`)
is complete. Knows no prompt and no engine. Invariant: what is answered here validates against the types of
the `openai` package.
"""

from __future__ import annotations

import uuid
from typing import Any, Literal

import msgspec

from gqa_serve.api.answers import ChatTokenLogprob
from gqa_serve.api.protocol import Int, StreamOptions

ItemStatus = Literal["in_progress", "completed", "incomplete"]


def new_id(prefix: str) -> str:
    """A fresh id, such as `msg_…`."""
    return prefix + uuid.uuid4().hex


# --- requests ----------------------------------------------------------------------------------------------


class InputPart(msgspec.Struct):
    """A part of a message, of a tool's output or of reasoning; `type` decides which field counts."""

    type: str
    text: str | None = None
    refusal: str | None = None


class InputItem(msgspec.Struct):
    """One input item; `type` (a message without one) decides which fields count."""

    type: str | None = None
    id: str | None = None
    role: str | None = None
    content: str | list[InputPart] | None = None
    call_id: str | None = None
    name: str | None = None
    arguments: str | None = None
    output: str | list[InputPart] | None = None
    summary: list[InputPart] | None = None


class ResponseTool(msgspec.Struct):
    """A tool; only those of type "function" can be used."""

    type: str
    name: str | None = None
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class AllowedTool(msgspec.Struct):
    """One entry of `tool_choice.tools`."""

    type: str
    name: str | None = None


class ResponseToolChoice(msgspec.Struct):
    """A tool to call, or the tools that may be called."""

    type: str
    name: str | None = None
    mode: str | None = None
    tools: list[AllowedTool] | None = None


class TextFormat(msgspec.Struct, omit_defaults=True):
    """What the text must be; `schema` and its company belong to json_schema."""

    type: str
    name: str | None = None
    schema: dict[str, Any] | None = None
    strict: bool | None = None
    description: str | None = None


class TextConfig(msgspec.Struct):
    """How the answer's text is to look."""

    format: TextFormat | None = None
    verbosity: str | None = None


class ReasoningConfig(msgspec.Struct):
    """How much to think, and what to show of it."""

    effort: str | None = None
    summary: str | None = None
    generate_summary: str | None = None
    context: str | None = None
    mode: str | None = None


class ResponsesRequest(msgspec.Struct, kw_only=True):
    """Body of POST /v1/responses; after the blank line, fields beyond OpenAI's, as in chat completions."""

    model: str | None = None
    input: str | list[InputItem] | None = None
    instructions: str | None = None
    previous_response_id: str | None = None
    store: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    tools: list[ResponseTool] | None = None
    tool_choice: str | ResponseToolChoice | None = None
    parallel_tool_calls: bool | None = None
    max_tool_calls: Int | None = None
    max_output_tokens: Int | None = None
    text: TextConfig | None = None
    reasoning: ReasoningConfig | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_logprobs: Int | None = None
    include: list[str] | None = None
    truncation: str | None = None
    metadata: dict[str, str] | None = None
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    service_tier: str | None = None

    top_k: Int | None = None
    min_p: float | None = None
    min_tokens: Int | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    seed: Int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[Int] | None = None
    ignore_eos: bool | None = None
    priority: Int | None = None
    cache_salt: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None


# --- items -------------------------------------------------------------------------------------------------


class InputText(msgspec.Struct):
    """Text of a user's, system's or developer's message, or of a tool's output."""

    text: str
    type: str = "input_text"


class OutputText(msgspec.Struct):
    """Text of the assistant."""

    text: str
    type: str = "output_text"
    annotations: list[Any] = []
    logprobs: list[ChatTokenLogprob] = []


class Refusal(msgspec.Struct):
    """An assistant's refusal, from other servers: this one never writes any."""

    refusal: str
    type: str = "refusal"


class ReasoningText(msgspec.Struct):
    """Text of the thinking before an answer."""

    text: str
    type: str = "reasoning_text"


class SummaryText(msgspec.Struct):
    """A summary of such a text, from other servers."""

    text: str
    type: str = "summary_text"


class InputMessage(msgspec.Struct, kw_only=True):
    """A message of a user, the system or a developer."""

    id: str
    type: str = "message"
    status: ItemStatus = "completed"
    role: str
    content: list[InputText]


class OutputMessage(msgspec.Struct, kw_only=True):
    """A message of the assistant."""

    id: str
    type: str = "message"
    status: ItemStatus = "completed"
    role: str = "assistant"
    content: list[OutputText | Refusal]


class FunctionCallItem(msgspec.Struct, kw_only=True):
    """The assistant calls a function."""

    id: str
    type: str = "function_call"
    status: ItemStatus = "completed"
    call_id: str
    name: str
    arguments: str


class FunctionOutputItem(msgspec.Struct, kw_only=True):
    """What the function returned."""

    id: str
    type: str = "function_call_output"
    status: ItemStatus = "completed"
    call_id: str
    output: str | list[InputText]


class ReasoningItem(msgspec.Struct, kw_only=True):
    """What the assistant thought; never summarized here."""

    id: str
    type: str = "reasoning"
    status: ItemStatus = "completed"
    summary: list[SummaryText] = []
    content: list[ReasoningText]


OutputItem = OutputMessage | FunctionCallItem | ReasoningItem
Item = InputMessage | FunctionOutputItem | OutputItem


class ItemList(msgspec.Struct, kw_only=True):
    """Answer of GET /v1/responses/{id}/input_items."""

    object: str = "list"
    data: list[Item]
    first_id: str
    last_id: str
    has_more: bool


# --- the response ------------------------------------------------------------------------------------------


class InputTokensDetails(msgspec.Struct):
    """How much of the prompt came from the prefix cache; nothing is billed, so nothing was "written"."""

    cached_tokens: int
    cache_write_tokens: int = 0


class OutputTokensDetails(msgspec.Struct):
    """How much of the output was thinking."""

    reasoning_tokens: int


class ResponseUsage(msgspec.Struct):
    """Token counts."""

    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: OutputTokensDetails
    total_tokens: int


class ResponseFailure(msgspec.Struct):
    """Why a response failed."""

    code: str
    message: str


class IncompleteDetails(msgspec.Struct):
    """Why a response is incomplete."""

    reason: str


class FunctionTool(msgspec.Struct, kw_only=True):
    """A function tool, as the response repeats it."""

    type: str = "function"
    name: str
    description: str | None
    parameters: dict[str, Any] | None
    strict: bool | None


class ReasoningEcho(msgspec.Struct):
    """The reasoning options, as the response repeats them."""

    effort: str | None
    summary: str | None


class TextEcho(msgspec.Struct):
    """The text options, as the response repeats them."""

    format: TextFormat
    verbosity: str = "medium"  # whatever was asked for: the model writes as it was trained to


class ResponseObject(msgspec.Struct, kw_only=True):
    """A response, under way or over."""

    id: str
    object: str = "response"
    created_at: int
    completed_at: int | None = None
    status: Literal["in_progress", "completed", "incomplete", "failed"] = "in_progress"
    background: bool = False
    error: ResponseFailure | None = None
    incomplete_details: IncompleteDetails | None = None
    instructions: str | None
    max_output_tokens: int | None
    max_tool_calls: int | None
    metadata: dict[str, str]
    model: str
    output: list[OutputItem] = []
    parallel_tool_calls: bool
    previous_response_id: str | None
    prompt_cache_key: str | None
    reasoning: ReasoningEcho
    safety_identifier: str | None
    service_tier: str = "default"
    store: bool
    temperature: float
    text: TextEcho
    tool_choice: str | dict[str, Any]
    tools: list[FunctionTool]
    top_logprobs: int
    top_p: float
    truncation: str
    usage: ResponseUsage | None = None
    user: str | None


class DeletedResponse(msgspec.Struct):
    """Answer of DELETE /v1/responses/{id}."""

    id: str
    object: str = "response"
    deleted: bool = True
