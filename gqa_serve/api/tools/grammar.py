"""The grammar of a chat answer: calls that fit their tools, text that has the form asked for, thinking first.

Owns how these combine, and that every grammar is checked before the engine sees it, with an error that names
the tool at fault. Knows no templates. Invariant: None means that any text will do.
"""

from __future__ import annotations

from gqa_serve.api.serving import ServingContext
from gqa_serve.api.structured_fields import compiling
from gqa_serve.api.thinking import Thinking
from gqa_serve.api.tools.choice import ToolPlan
from gqa_serve.engine.grammars import blaming, check_grammar, json_schema_grammar
from gqa_serve.errors import RequestError


async def answer_grammar(
    context: ServingContext, plan: ToolPlan | None, thinking: Thinking | None, text_grammar: str | None
) -> str | None:
    """What the whole answer must match; `text_grammar` is what its text must. Raises RequestError."""
    if plan is None:
        grammar = text_grammar
    elif plan.is_enforced or text_grammar is not None:
        grammar = await compiling(lambda: _tool_grammar(context, plan, text_grammar))
    else:
        grammar = None
    if grammar is None or thinking is None:
        return grammar
    grammar = thinking.before(grammar)
    param = "tools" if plan is not None else "response_format"
    await compiling(lambda: check_grammar(grammar, context.tokenizer, param=param))
    return grammar


def _tool_grammar(context: ServingContext, plan: ToolPlan, text_grammar: str | None) -> str:
    syntax = context.chat_format.syntax
    if syntax is None:
        raise RequestError("This server makes no tool calls.", param="tools")
    schemas = []
    for function, param in zip(plan.functions, plan.params, strict=True):
        with blaming(param):
            schemas.append(json_schema_grammar(plan.schema(function)))
    grammar = syntax.grammar(plan, context.tokenizer, text_grammar)
    try:
        check_grammar(grammar, context.tokenizer, param="tools")
    except RequestError:
        for schema, param in zip(schemas, plan.params, strict=True):
            check_grammar(schema, context.tokenizer, param=param)  # whose fault is it?
        raise
    return grammar
