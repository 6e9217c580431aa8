"""From a chat request to a job for the engine: checks, chat template, sampling parameters, answer format.

Owns what a conversation must look like and how it becomes a prompt; every endpoint that chats (OpenAI's chat
completions and responses, Anthropic's messages) translates its body to a `ChatRequest` and comes through
`prepare_chat`. Knows neither HTTP nor the shape of answers. Invariant: a message part this server cannot read
is refused, never dropped.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import msgspec

from gqa_serve.api.errors import shorten
from gqa_serve.api.message_parts import MessageParser, PlainParser
from gqa_serve.api.params import check_capacity, choice_count, sampling_params
from gqa_serve.api.protocol import ChatMessage, ChatRequest, ContentPart, ToolCall
from gqa_serve.api.serving import LARGE_TEXT_CHARS, Job, ServingContext, fingerprint, off_loop
from gqa_serve.api.structured_fields import structured_grammar
from gqa_serve.api.thinking import Thinking, find_thinking
from gqa_serve.api.tools.choice import ToolPlan, read_tools
from gqa_serve.api.tools.grammar import answer_grammar
from gqa_serve.api.tools.prompt import (
    describe_tools,
    new_call_id,
    new_short_id,
    one_call_each,
    with_description,
    with_short_ids,
    without_tool_turns,
)
from gqa_serve.api.tools.syntax import HERMES
from gqa_serve.engine.chat_prompt import encode_chat
from gqa_serve.engine.chat_template import ChatTemplate, check_template_kwargs
from gqa_serve.engine.request import MAX_LOGPROBS
from gqa_serve.errors import RequestError

MAX_MESSAGES = 10_000
MESSAGE_COST_CHARS = 256  # rendering a message costs about as much as so many characters, however short it is
SLOW_TEMPLATE_S = 0.02  # a template that took so long once renders beside the loop
REASONING_EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh")
_THINKING_SWITCHES = ("enable_thinking", "thinking")  # what templates of hybrid models call it
_ENCODE_OPTIONS = frozenset({"add_special_tokens", "max_model_len"})  # encode_chat's own
ROLES = ("system", "developer", "user", "assistant", "tool")


@dataclasses.dataclass(frozen=True)
class ChatJob:
    """A job whose answers are messages: how to take their text apart, and how many logprobs to show.

    `echo` is text that comes before the answer's. `shows_ids`: the answer tells its and the prompt's tokens.
    """

    job: Job
    new_parser: Callable[[], MessageParser]
    num_logprobs: int | None
    tools: ToolPlan | None = None
    echo: str = ""
    num_prompt_logprobs: int | None = None
    shows_ids: bool = False

    @property
    def names_tool(self) -> bool:
        """Whether the request named the function to call."""
        return self.tools is not None and self.tools.is_named


async def prepare_chat(
    context: ServingContext, fields: ChatRequest, size: int, *, kind: str = "chat", prefix: str = "chatcmpl"
) -> ChatJob:
    """Check, render and tokenize a conversation whose JSON has `size` bytes. Raises RequestError.

    `kind` is what the log calls the request, `prefix` begins its id.
    """
    model = context.check_model(fields.model)
    n = choice_count(fields)
    conversation = await _read(context, fields, size)
    messages, plan = conversation.messages, conversation.plan
    echo = _echo(fields, messages)
    num_logprobs = _num_logprobs(fields)
    for limit in ("max_tokens", "max_completion_tokens"):
        if getattr(fields, limit) == 0:
            raise RequestError(f"{limit} must be at least 1.", param=limit)
    info = context.ready_info()
    check_capacity(info, 1, n)
    text_grammar = await structured_grammar(fields, context.tokenizer)
    params = sampling_params(
        fields,
        info.generation_config,
        default_max_tokens=None,
        logprobs=num_logprobs,
        prompt_logprobs=_num_prompt_logprobs(fields),
        vocab_size=info.vocab_size,
        grammar=text_grammar,
    )
    prompt = await _encode(context, fields, conversation, info.max_model_len)
    thinking = find_thinking(context, messages, prompt, bool(fields.continue_final_message))
    grammar = await answer_grammar(context, plan, thinking, text_grammar)
    # Stop strings end texts; a call that must come is none.
    stop = [] if plan is not None and plan.must_call else params.stop
    params = msgspec.structs.replace(params, grammar=grammar, stop=stop)
    job = Job.new(
        prefix,
        kind=kind,
        model=model,
        fingerprint=fingerprint(info),
        fields=fields,
        prompts=[prompt],
        params=[params.fit(len(prompt), info.max_model_len, param="messages")],
        n=n,
        shown_ids=_shown_ids(context, plan, thinking),
        end_ids=tuple(id for id in context.end_of_turn_ids if id < info.vocab_size),
        new_counter=thinking and thinking.new_counter,
    )
    return ChatJob(
        job,
        _parsers(context, plan, thinking),
        num_logprobs,
        tools=plan,
        echo=echo,
        num_prompt_logprobs=fields.prompt_logprobs,
        shows_ids=bool(fields.return_token_ids),
    )


async def encode_request(
    context: ServingContext, fields: ChatRequest, size: int, max_model_len: int
) -> list[int]:
    """The prompt of a chat request as token ids, for who only counts them. Raises RequestError."""
    return await _encode(context, fields, await _read(context, fields, size), max_model_len)


@dataclasses.dataclass(frozen=True)
class _Conversation:
    """Messages and tools of a request, checked; `size` says what it costs to work on them, in characters."""

    messages: list[dict[str, Any]]
    plan: ToolPlan | None
    size: int


async def _read(context: ServingContext, fields: ChatRequest, size: int) -> _Conversation:
    # Many small messages must count as well as a few large ones.
    size += MESSAGE_COST_CHARS * (len(fields.messages) + len(fields.tools or []))
    messages = await off_loop(size, lambda: checked_messages(fields.messages))
    plan = read_tools(fields)
    if plan is not None and context.chat_format.syntax is None:
        raise RequestError(
            "This server was started with --tool-call-parser none, so it makes no tool calls; "
            'leave tools out or send tool_choice "none".',
            param="tools",
        )
    return _Conversation(messages, plan, size)


def _echo(fields: ChatRequest, messages: list[dict[str, Any]]) -> str:
    """The text of the last message, if the answer is to begin with it. Raises RequestError."""
    if not fields.echo:
        return ""
    last = messages[-1]
    if last["role"] != "assistant":
        raise RequestError(
            "echo puts the last message before the answer, so that must be the assistant's.", param="echo"
        )
    content = last["content"]
    return content if isinstance(content, str) else "\n".join(part["text"] for part in content)


def _shown_ids(context: ServingContext, plan: ToolPlan | None, thinking: Thinking | None) -> frozenset[int]:
    """Control tokens that the parsers have to see."""
    syntax = context.chat_format.syntax
    shown = frozenset[int]() if thinking is None else thinking.tag_ids
    if plan is not None and syntax is not None:
        shown |= syntax.shown_ids(context.tokenizer)
    return shown & context.tokenizer.special_ids


def _parsers(
    context: ServingContext, plan: ToolPlan | None, thinking: Thinking | None
) -> Callable[[], MessageParser]:
    """How to make the parser of one choice."""
    format = context.chat_format
    new_id = new_short_id if format.needs_short_ids else new_call_id

    def new_parser() -> MessageParser:
        parser: MessageParser = PlainParser()
        if plan is not None and format.syntax is not None:
            parser = format.syntax.parser(new_id, plan.names)
        return parser if thinking is None else thinking.parser(parser)

    return new_parser


async def _encode(
    context: ServingContext, fields: ChatRequest, conversation: _Conversation, max_model_len: int
) -> list[int]:
    """The rendered conversation as token ids; control tokens in it are the template's."""
    messages, plan, size = conversation.messages, conversation.plan, conversation.size
    options = template_options(fields, context.chat_template)
    final = bool(fields.continue_final_message)
    if final and messages[-1]["role"] != "assistant":
        raise RequestError("continue_final_message needs an assistant message at the end.", param="messages")
    if final and "tool_calls" in messages[-1]:
        raise RequestError(
            "continue_final_message continues text, not a message that calls.", param="messages"
        )
    add_prompt = not final if fields.add_generation_prompt is None else fields.add_generation_prompt

    def encode(turns: list[dict[str, Any]], options: dict[str, Any]) -> list[int]:
        return encode_chat(
            context.tokenizer,
            context.chat_template,
            turns,
            add_special_tokens=bool(fields.add_special_tokens),
            max_model_len=max_model_len,
            add_generation_prompt=add_prompt,
            continue_final_message=final,
            documents=fields.documents,
            **options,
        )

    def render_and_encode() -> list[int]:
        context.tokenizer.check_length(_content_chars(messages), max_model_len, param="messages")
        turns, tools = _with_tools(context, messages, plan)
        all_options = {**options, "tools": tools}
        try:
            return encode(turns, all_options)
        except RequestError as error:
            kwargs = fields.chat_template_kwargs
            if kwargs and error.code is None:
                # If this fails too, it is the messages' fault.
                encode(turns, {name: value for name, value in all_options.items() if name not in kwargs})
                raise RequestError(
                    f"These chat_template_kwargs cannot be used: {error.message}",
                    param="chat_template_kwargs",
                ) from error
            raise

    if context.chat_template.slowest_s > SLOW_TEMPLATE_S:  # it may be slow again, however short the messages
        size = max(size, LARGE_TEXT_CHARS)
    prompt = await off_loop(size, render_and_encode)
    if not prompt:
        raise RequestError("The messages render to an empty prompt.", param="messages")
    return prompt


def _with_tools(
    context: ServingContext, messages: list[dict[str, Any]], plan: ToolPlan | None
) -> tuple[list[dict[str, Any]], list[dict[str, Any]] | None]:
    """Messages that the template can render, and the tools to give it: None if messages describe them."""
    format = context.chat_format
    syntax = format.syntax or HERMES
    in_words = not (format.keeps_calls if plan is None else format.is_native)
    if in_words and any(message["role"] == "tool" or "tool_calls" in message for message in messages):
        messages = without_tool_turns(messages, syntax)
    elif not in_words:
        messages = with_short_ids(messages) if format.needs_short_ids else messages
        messages = messages if format.takes_many_calls else one_call_each(messages)
    if plan is None:
        return messages, None
    tools = plan.described()
    if not in_words:
        return messages, tools
    description = describe_tools(tools, syntax, must_call=plan.must_call)
    return with_description(messages, description, takes_system=format.takes_system), None


def _content_chars(messages: list[dict[str, Any]]) -> int:
    """Characters of all contents: about the least that a template can make of the messages."""
    total = 0
    for message in messages:
        content = message["content"]
        total += len(content) if isinstance(content, str) else sum(len(part["text"]) for part in content)
    return total


def template_options(fields: ChatRequest, template: ChatTemplate) -> dict[str, Any]:
    """Variables for the template: `chat_template_kwargs` and `reasoning_effort`. Raises RequestError."""
    options = dict(fields.chat_template_kwargs or {})
    if fields.documents and not template.reads_variable("documents"):
        raise RequestError(
            "This model's chat template takes no documents; put their text into a message.",
            param="documents",
            code="unsupported_parameter",
        )
    check_template_kwargs(options)
    if clash := sorted(_ENCODE_OPTIONS & options.keys()):
        raise RequestError(
            f"chat_template_kwargs must not contain {', '.join(clash)}.", param="chat_template_kwargs"
        )
    effort = fields.reasoning_effort
    if effort is None:
        return options
    if effort not in REASONING_EFFORTS:
        raise RequestError(
            f"reasoning_effort must be one of {', '.join(REASONING_EFFORTS)}; got {shorten(effort)!r}.",
            param="reasoning_effort",
        )
    if template.reads_variable("reasoning_effort"):
        options.setdefault("reasoning_effort", effort)
        return options
    switches = [name for name in _THINKING_SWITCHES if template.reads_variable(name)]
    if switches and effort == "none":
        options.setdefault(switches[0], False)
        return options
    if switches:
        raise RequestError(
            f'This model\'s chat template knows no such reasoning_effort; send "none", or set '
            f"chat_template_kwargs.{switches[0]}.",
            param="reasoning_effort",
            code="unsupported_parameter",
        )
    if effort != "none":
        raise RequestError(
            'This model\'s chat template has no reasoning_effort; leave it out (or send null or "none").',
            param="reasoning_effort",
            code="unsupported_parameter",
        )
    return options


def _num_logprobs(fields: ChatRequest) -> int | None:
    """How many alternatives per token; None for no logprobs. Raises RequestError."""
    if not fields.logprobs:
        if fields.top_logprobs:
            raise RequestError("top_logprobs needs logprobs: true.", param="top_logprobs")
        return None
    num_top = fields.top_logprobs or 0
    if not 0 <= num_top <= MAX_LOGPROBS:
        raise RequestError(
            f"top_logprobs must be between 0 and {MAX_LOGPROBS}, got {num_top}.", param="top_logprobs"
        )
    return num_top


def _num_prompt_logprobs(fields: ChatRequest) -> int | None:
    """How many alternatives per prompt token; None for no logprobs of the prompt. Raises RequestError."""
    asked = fields.prompt_logprobs
    if asked is not None and not 0 <= asked <= MAX_LOGPROBS:
        raise RequestError(
            f"prompt_logprobs must be between 0 and {MAX_LOGPROBS}, got {asked}.", param="prompt_logprobs"
        )
    if asked is not None and fields.stream:
        raise RequestError("prompt_logprobs cannot be streamed; leave stream out.", param="prompt_logprobs")
    return asked


def checked_messages(messages: list[ChatMessage]) -> list[dict[str, Any]]:
    """The messages as chat templates take them. Raises RequestError naming the message and part."""
    if not messages:
        raise RequestError("messages must hold at least one message.", param="messages")
    if len(messages) > MAX_MESSAGES:
        raise RequestError(
            f"messages must hold at most {MAX_MESSAGES} messages, got {len(messages)}.", param="messages"
        )
    checked = [_checked(message, f"messages[{number}]") for number, message in enumerate(messages)]
    names = {call["id"]: call["function"]["name"] for item in checked for call in item.get("tool_calls", [])}
    for item in checked:
        if item["role"] == "tool" and (name := names.get(item.get("tool_call_id"))):
            item.setdefault("name", name)  # some templates print it
    return checked


def _checked(message: ChatMessage, where: str) -> dict[str, Any]:
    if message.role not in ROLES:
        raise RequestError(
            f"{where}.role must be one of {', '.join(ROLES)}; got {shorten(message.role)!r}.",
            param=f"{where}.role",
        )
    result: dict[str, Any] = {"role": message.role}
    if isinstance(message.content, list):
        result["content"] = [
            {"type": "text", "text": _part_text(part, f"{where}.content[{number}]")}
            for number, part in enumerate(message.content)
        ]
    elif message.content is not None:
        result["content"] = message.content
    elif message.role == "assistant":
        result["content"] = message.refusal or ""
    else:
        raise RequestError(
            f"{where}.content is missing; only assistant messages may leave it out.",
            param=f"{where}.content",
        )
    for name in ("function_call", "audio"):
        if getattr(message, name) is not None:
            raise RequestError(f"{where}.{name} is not supported.", param=f"{where}.{name}")
    if message.role != "assistant" and message.tool_calls:
        raise RequestError(
            f"{where}.tool_calls belongs to assistant messages only.", param=f"{where}.tool_calls"
        )
    if message.tool_calls:
        result["tool_calls"] = [
            _tool_call(call, f"{where}.tool_calls[{number}]")
            for number, call in enumerate(message.tool_calls)
        ]
    if message.name is not None:
        result["name"] = message.name
    if message.tool_call_id is not None:
        result["tool_call_id"] = message.tool_call_id
    if (reasoning := message.reasoning_content or message.reasoning) is not None:
        result["reasoning_content"] = reasoning
    return result


def _part_text(part: ContentPart, where: str) -> str:
    text = {"text": part.text, "refusal": part.refusal}.get(part.type)
    if text is not None:
        return text
    if part.type in ("text", "refusal"):
        raise RequestError(f"Missing required field: {where}.{part.type}.", param=f"{where}.{part.type}")
    raise RequestError(
        f"{where}: content parts of type {shorten(part.type)!r} are not supported; send text.",
        param=where,
    )


def _tool_call(call: ToolCall, where: str) -> dict[str, Any]:
    if call.type not in (None, "function"):
        raise RequestError(f"{where}.type must be 'function'.", param=f"{where}.type")
    function = {"name": call.function.name, "arguments": call.function.arguments or "{}"}
    return {"id": call.id, "type": call.type or "function", "function": function}
