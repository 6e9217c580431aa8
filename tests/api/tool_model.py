"""A chat template that knows tools and thinking, what a model with it writes, and a server that has it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from fake_engine import FakeEngine, Server, serving

TOOL_TEMPLATE = """\
{%- if tools %}<tools>{{ tools | tojson }}</tools>{% endif %}
{%- for m in messages %}
{{- '<|im_start|>' + m.role + '\\n' }}
{%- if m.reasoning_content %}{{ '<think>' + m.reasoning_content + '</think>' }}{% endif %}
{{- m.content }}
{%- for call in m.tool_calls or [] %}
{{- '<tool_call>{"name": "' + call.function.name + '", "arguments": ' }}{{ call.function.arguments | tojson }}
{{- '}</tool_call>' }}
{%- endfor %}
{%- if not (loop.last and continue_final_message) %}{{ '<|im_end|>\\n' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}
{%- if enable_thinking is defined and not enable_thinking %}{{ '<think></think>' }}{% endif %}
{%- endif %}"""


@contextmanager
def tool_server() -> Iterator[Server]:
    """A server whose model has this template."""
    with serving(FakeEngine(), template=TOOL_TEMPLATE) as running:
        yield running


def think(text: str) -> str:
    """Thinking, as the model writes it."""
    return f"<think>{text}</think>"


def call(name: str, arguments: str) -> str:
    """A tool call, as the model writes it."""
    return f'<tool_call>{{"name": "{name}", "arguments": {arguments}}}</tool_call>'
