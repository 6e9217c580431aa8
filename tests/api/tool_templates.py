"""Small chat templates written for these tests, each with its family's way to show tools and thinking."""

from __future__ import annotations

HERMES = """\
{%- if tools %}<|im_start|>system
{% if messages[0].role == 'system' %}{{ messages[0].content }}
{% endif %}# Tools
{% for tool in tools %}{{ tool | tojson }}
{% endfor %}Call as <tool_call>
{"name": NAME, "arguments": OBJECT}
</tool_call><|im_end|>
{% elif messages[0].role == 'system' %}<|im_start|>system
{{ messages[0].content }}<|im_end|>
{% endif %}
{%- for message in messages if message.role != 'system' %}
{%- if message.role == 'tool' %}<|im_start|>user
<tool_response>
{{ message.content }}
</tool_response><|im_end|>
{% else %}<|im_start|>{{ message.role }}
{{ message.content }}
{%- for call in message.tool_calls or [] %}
<tool_call>
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}
</tool_call>
{%- endfor %}<|im_end|>
{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""

# Hermes' tools, and thinking that the model opens itself or that is switched off.
QWEN3 = HERMES + (
    "{% if add_generation_prompt and enable_thinking is defined and not enable_thinking %}"
    "<think>\n\n</think>\n\n{% endif %}"
)

LLAMA3 = """\
{%- for message in messages %}<|im_start|>{{ message.role }}

{% if loop.first and tools %}Functions: {% for tool in tools %}{{ tool | tojson(indent=4) }}
{% endfor %}{% endif %}
{%- if message.tool_calls %}
{%- if message.tool_calls | length != 1 %}{{ raise_exception('one call at a time') }}{% endif %}
{%- set call = message.tool_calls[0].function %}
{"name": "{{ call.name }}", "parameters": {{ call.arguments | tojson }}}
{%- else %}
{{ message.content }}
{%- endif %}<|im_end|>
{%- endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant

{% endif %}"""

_MISTRAL = """\
{%- for message in messages %}
{%- if message.role == 'user' %}
{%- if tools and loop.first %}[AVAILABLE_TOOLS]{{ tools | tojson }}[/AVAILABLE_TOOLS]{% endif -%}
[INST]{{ message.content }}[/INST]
{%- elif message.role == 'tool' %}
{%- if message.tool_call_id | length != 9 %}{{ raise_exception('ids have 9 characters') }}{% endif -%}
[TOOL_RESULTS]{"content": {{ message.content | tojson }}, "call_id": "{{ message.tool_call_id }}"}
{%- elif message.tool_calls %}CALLS
{%- elif message.role == 'assistant' %}{{ message.content }}<|im_end|>
{%- else %}{{ raise_exception('roles are user, assistant and tool') }}
{%- endif %}
{%- endfor %}"""
MISTRAL = _MISTRAL.replace(
    "CALLS",
    """[TOOL_CALLS][{% for call in message.tool_calls %}{"name": "{{ call.function.name }}", """
    """"arguments": {{ call.function.arguments | tojson }}, "id": "{{ call.id }}"}"""
    """{{ ', ' if not loop.last }}{% endfor %}]""",
)
MISTRAL_ARGS = _MISTRAL.replace(
    "CALLS",
    """{% for call in message.tool_calls %}[TOOL_CALLS]{{ call.function.name }}[ARGS]"""
    """{{ call.function.arguments | tojson }}{% endfor %}""",
)

# Thinking opened by the prompt; earlier thinking is dropped; no tools.
DEEPSEEK = """\
{%- for message in messages %}<|im_start|>{{ message.role }}
{{ message.content.split('</think>')[-1] if message.role == 'assistant' else message.content }}<|im_end|>
{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
<think>
{% endif %}"""

# Knows neither tools nor a system message, and wants turns to alternate.
GEMMA = """\
{%- for message in messages %}
{%- if message.role == 'system' %}{{ raise_exception('no system message') }}{% endif %}
{%- set is_turn = (message.role == 'user') == (loop.index0 % 2 == 0) %}
{%- if not is_turn %}{{ raise_exception('turns alternate') }}{% endif -%}
<|im_start|>{{ message.role }}
{{ message.content | trim }}<|im_end|>
{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""

# Shows tools, but spells calls in a way nobody here reads.
FOREIGN = """\
{%- if tools %}{{ tools | tojson }}{% endif %}
{%- for message in messages %}<|im_start|>{{ message.role }}
{{ message.content }}
{%- for call in message.tool_calls or [] %}<tools>[{"name": "{{ call.function.name }}", "arguments":
{{- call.function.arguments | tojson }}}]</tools>{% endfor %}<|im_end|>
{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
