"""Finds a model's chat template: beside the weights, inside a GGUF file, or where the user says.

Order, the first that exists wins (as in transformers): `--chat-template`; `chat_template.jinja` and the
named templates of `additional_chat_templates/` or `chat_templates/`; `chat_template` in
tokenizer_config.json (one template, or a list of named ones); chat_template.json (older processors). Of
named templates "default" is used, and "tool_use" for requests with tools. A model without any gets
FALLBACK_TEMPLATE and a warning, which names the known templates (known_templates.py) that fit its vocabulary.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from gqa_serve.engine.chat_template import ChatTemplate
from gqa_serve.engine.known_templates import KNOWN_TEMPLATES, fitting_templates
from gqa_serve.engine.tokenizer_files import named_special_tokens, read_optional_json, read_tokenizer_settings
from gqa_serve.errors import ConfigError, ModelError

logger = logging.getLogger(__name__)

# For base models: "Role: text" lines, as in a transcript, and an open "Assistant:" line to complete.
FALLBACK_TEMPLATE = (
    "{{ bos_token if bos_token is defined }}"
    "{% for message in messages %}"
    "{{ message['role'] | capitalize }}: {{ message['content'] }}\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)

_TEMPLATE_FOLDERS = ("additional_chat_templates", "chat_templates")


def load_chat_template(
    path: Path, override: str | None = None, special_texts: Collection[str] = ()
) -> ChatTemplate:
    """The chat template of the checkpoint directory or .gguf file `path`.

    `override` is the name of a file or of a known template, or a template itself; `special_texts`, the texts
    of the vocabulary's control tokens, are for the hint where there is no template. Raises ConfigError for
    an unusable override, ModelError for a damaged or ambiguous template.
    """
    templates, special_tokens, origin = _read_directory(path) if path.is_dir() else _read_gguf(path)
    if override is not None:
        templates, origin = {"default": _read_override(override)}, "--chat-template"
    if not templates:
        logger.warning(
            "%s has no chat template, so chats are rendered as plain 'Role: text' lines, which suits base "
            "models. If it is made for chats, pass its template: --chat-template FILE%s.",
            path,
            "".join(f", or {name}" for name in fitting_templates(special_texts)),
        )
        templates, origin = {"default": FALLBACK_TEMPLATE}, "the built-in fallback"
    if "default" not in templates:
        raise ModelError(
            f"{origin} has the chat templates {', '.join(sorted(templates))} but no default; "
            "pass one with --chat-template."
        )
    return ChatTemplate(
        templates["default"],
        tool_source=templates.get("tool_use"),
        special_tokens=special_tokens,
        source_name=origin,
    )


def _read_override(override: str) -> str:
    if "{{" in override or "{%" in override:
        return override
    if override in KNOWN_TEMPLATES:
        return KNOWN_TEMPLATES[override].source
    try:
        return Path(override).expanduser().read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"--chat-template {override!r} is neither a readable file nor a Jinja template ({error}), "
            f"nor one of {', '.join(KNOWN_TEMPLATES)}."
        ) from error


def _read_directory(path: Path) -> tuple[dict[str, str], dict[str, str], str]:
    settings = read_tokenizer_settings(path)
    special_tokens = named_special_tokens(settings)
    if templates := _read_jinja_files(path):
        return templates, special_tokens, "chat_template.jinja"
    for name, values in (
        ("tokenizer_config.json", settings),
        ("chat_template.json", read_optional_json(path / "chat_template.json")),
    ):
        if templates := _named_templates(values.get("chat_template"), name):
            return templates, special_tokens, name
    return {}, special_tokens, ""


def _read_jinja_files(path: Path) -> dict[str, str]:
    files = {"default": path / "chat_template.jinja"}
    for folder in _TEMPLATE_FOLDERS:
        files |= {file.stem: file for file in sorted((path / folder).glob("*.jinja"))}
    try:
        return {name: file.read_text(encoding="utf-8") for name, file in files.items() if file.is_file()}
    except (OSError, ValueError) as error:
        raise ModelError(f"The chat template in {path} cannot be read: {error}") from error


def _named_templates(value: object, origin: str) -> dict[str, str]:
    if not value:
        return {}
    if isinstance(value, str):
        return {"default": value}
    named: dict[str, str] = {}
    for item in value if isinstance(value, list) else [value]:
        match item:
            case {"name": str(name), "template": str(template)}:
                named[name] = template
            case _:
                raise ModelError(
                    f"chat_template in {origin} must be a string or a list of {{name, template}} objects; "
                    "pass a template with --chat-template."
                )
    return named


def _read_gguf(path: Path) -> tuple[dict[str, str], dict[str, str], str]:
    from gqa_serve.engine.gguf_tokenizer import gguf_special_tokens
    from gqa_serve.engine.weights.gguf import read_gguf_metadata

    metadata: Mapping[str, Any] = read_gguf_metadata(path)
    keys = {"default": "tokenizer.chat_template", "tool_use": "tokenizer.chat_template.tool_use"}
    templates = {name: metadata[key] for name, key in keys.items() if metadata.get(key)}
    if not all(isinstance(template, str) for template in templates.values()):
        raise ModelError(f"{path} has a chat template that is no text; pass one with --chat-template.")
    return templates, gguf_special_tokens(metadata), f"{path.name}"
