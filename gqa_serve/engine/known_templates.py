"""Chat templates for models that bring none: `--chat-template chatml` and so on, each in its plainest form.

Owns these templates and the hint which of them a vocabulary speaks for. They are never used unasked: a base
model's vocabulary often holds the control tokens of its instruct sibling, whose meaning it never learned.
They know nothing of tools.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple


class KnownTemplate(NamedTuple):
    """A template and the control tokens without which it makes no sense."""

    source: str
    needs: frozenset[str]


_CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

_LLAMA3 = (
    "{{ bos_token if bos_token is defined }}{% for message in messages %}"
    "<|start_header_id|>{{ message['role'] }}<|end_header_id|>\n\n{{ message['content'] | trim }}<|eot_id|>"
    "{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)

_PHI3 = (
    "{% for message in messages %}<|{{ message['role'] }}|>\n{{ message['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)

# Gemma and Mistral have no system role: what it says goes before the first user message.
_SYSTEM_FIRST = (
    "{% set system = messages[0]['content'] ~ '\n\n' if messages[0]['role'] == 'system' else '' %}"
    "{% set turns = messages[1:] if system else messages %}"
    "{{ bos_token if bos_token is defined }}{% for message in turns %}"
    "{% set text = (system if loop.first else '') ~ message['content'] | trim %}"
)

_GEMMA = (
    _SYSTEM_FIRST + "<start_of_turn>{{ 'model' if message['role'] == 'assistant' else message['role'] }}\n"
    "{{ text }}<end_of_turn>\n"
    "{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)

_MISTRAL = (
    _SYSTEM_FIRST + "{% if message['role'] == 'assistant' %} {{ text }}{{ eos_token }}"
    "{% else %}[INST] {{ text }}[/INST]{% endif %}"
    "{% endfor %}"
)

KNOWN_TEMPLATES = {
    "chatml": KnownTemplate(_CHATML, frozenset({"<|im_start|>", "<|im_end|>"})),
    "llama3": KnownTemplate(_LLAMA3, frozenset({"<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"})),
    "gemma": KnownTemplate(_GEMMA, frozenset({"<start_of_turn>", "<end_of_turn>"})),
    "mistral": KnownTemplate(_MISTRAL, frozenset({"[INST]", "[/INST]"})),
    "phi3": KnownTemplate(_PHI3, frozenset({"<|user|>", "<|assistant|>", "<|end|>"})),
}


def fitting_templates(special_texts: Collection[str]) -> list[str]:
    """Names of the templates all of whose control tokens are among `special_texts`."""
    texts = set(special_texts)
    return [name for name, template in KNOWN_TEMPLATES.items() if template.needs <= texts]
