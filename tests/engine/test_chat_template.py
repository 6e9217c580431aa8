"""Chat templates render as transformers renders them, come from the right file, fail as request errors."""

from __future__ import annotations

import copy
import itertools
import json
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from tokenizer_cases import demo_path, small_bpe
from transformers import PreTrainedTokenizerFast

from gqa_serve.engine import chat_template
from gqa_serve.engine.chat_messages import normalise_messages
from gqa_serve.engine.chat_prompt import end_of_turn
from gqa_serve.engine.chat_template import ChatTemplate
from gqa_serve.engine.chat_template_files import FALLBACK_TEMPLATE, load_chat_template
from gqa_serve.engine.known_templates import KNOWN_TEMPLATES, fitting_templates
from gqa_serve.engine.tokenizer import load_tokenizer
from gqa_serve.errors import ConfigError, ModelError, RequestError

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}

# Written for these tests; between them they use what published templates use.
TEMPLATES = {
    "header": (
        "{{- bos_token }}\n"
        "{%- if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] | trim %}"
        "{% set rest = messages[1:] %}{% else %}{% set system = '' %}{% set rest = messages %}{% endif %}\n"
        "{%- if tools is not none and tools %}{{ '[TOOLS]' + tools | tojson + '[/TOOLS]' }}{% endif -%}\n"
        "{{- '[SYS]' ~ system ~ '[/SYS]\\n' }}\n"
        "{%- for message in rest %}\n"
        "    {%- if message.role == 'tool' %}{{ '[RESULT]' + message.content + '[/RESULT]' }}\n"
        "    {%- elif message.tool_calls is defined %}\n"
        "        {%- for call in message.tool_calls %}\n"
        "        {{- '[CALL]' + call.function.name + ' ' + call.function.arguments | tojson(indent=2) }}\n"
        "        {%- endfor %}\n"
        "    {%- else %}{{ '[' + message.role | upper + ']' }}{{ message.content | trim + eos_token }}\n"
        "    {%- endif %}\n"
        "{%- endfor %}\n"
        "{%- if add_generation_prompt %}{{ '[ASSISTANT]' }}{% endif %}"
    ),
    "plain": (
        "{% for message in messages %}\n"
        "{% if not loop.first and message.role == messages[loop.index0 - 1].role %}\n"
        "{{ raise_exception('Roles must alternate, got ' + message.role) }}\n"
        "{% endif %}\n"
        "  {% generation %}\n"
        "{{ message.role }}: {{ message.content }}"
        "{{ eos_token if not loop.last or not add_generation_prompt }}\n"
        "  {% endgeneration %}\n"
        "{% endfor %}\n"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    ),
    "loops": (
        "{% set ns = namespace(n=0, last='') %}"
        "{% macro show(m) %}<{{ m.role }}>"
        "{{ m.content if m.content is string else m.content[0].text }}{% endmacro %}"
        "{% for m in messages %}{% if m.role == 'tool' %}{% continue %}{% endif %}"
        "{% set ns.n = ns.n + 1 %}{% if ns.n > 3 %}{% break %}{% endif %}"
        "{{ show(m) }}{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}"
        "{% endfor %}|{{ ns.n }}|{{ custom | default('no') }}|{{ documents | length if documents else 0 }}"
        "{{ dict(a=1) | tojson }}{{ {'b': 'é<&>', 'a': [1, none, true]} | tojson(sort_keys=true) }}"
    ),
    "parts": (
        "{% for m in messages %}<{{ m.role }}>{% if m.content is string %}{{ m.content }}{% else %}"
        "{% for part in m.content %}{% if part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %}"
        "{% endif %}\n{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
    ),
}

TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": 'Wetter für <Ort> & "Tag" 天气',
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
CALL = {"id": "a1", "type": "function", "function": {"name": "get_weather", "arguments": {"city": "Zürich"}}}

CONVERSATIONS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": "Hi"}],
    [{"role": "system", "content": " Be brief. "}, {"role": "user", "content": "  Grüße 你好 👋 <b>&</b>  "}],
    [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b "},
        {"role": "user", "content": "c"},
    ],
    [
        {"role": "user", "content": "w?"},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "a1", "content": '{"t": 3}'},
        {"role": "user", "content": "ok", "name": None},
    ],
    [{"role": "user", "content": "q"}, {"role": "assistant", "content": "Sure, here is  "}],
    [{"role": "user", "content": "q"}, {"role": "assistant", "content": "Sure {{ 7*7 }}\n\n"}],
    [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "x", "reasoning": "thinking"},
        {"role": "user", "content": "r"},
    ],
    [{"role": "user", "content": "q"}, {"role": "assistant", "content": ""}],
    [{"role": "user", "content": [{"type": "text", "text": "part1"}, {"type": "text", "text": "part2 "}]}],
    [{"role": "user", "content": "x"}, {"role": "user", "content": "y"}],
    [{"role": "user"}],
]


def oracle(source: str) -> PreTrainedTokenizerFast:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=small_bpe("gpt-2")._backend, **SPECIAL)
    tokenizer.chat_template = source
    return tokenizer


def sources() -> dict[str, str]:
    return {**TEMPLATES, "fallback": FALLBACK_TEMPLATE, "demo": load_chat_template(demo_path()).source}


@pytest.mark.parametrize("name", [*TEMPLATES, "fallback", "demo"])
def test_rendering_is_that_of_transformers(name: str) -> None:
    source = sources()[name]
    ours, theirs = ChatTemplate(source, special_tokens=SPECIAL), oracle(source)
    rendered = refused = 0
    for chat, tools, (generate, continued), extra in itertools.product(
        CONVERSATIONS,
        (None, [TOOL]),
        ((True, False), (False, False), (False, True)),
        ({}, {"custom": "yes", "documents": [{"title": "t", "text": "x"}], "bos_token": "<other>"}),
    ):
        options = {
            "tools": tools,
            "add_generation_prompt": generate,
            "continue_final_message": continued,
            **extra,
        }
        before = copy.deepcopy(chat)
        try:
            expected = theirs.apply_chat_template(copy.deepcopy(chat), tokenize=False, **options)
        except Exception:  # whatever transformers lets out, we refuse as a request error
            expected = None
        if expected is None:
            refused += 1
            with pytest.raises(RequestError) as caught:
                ours.render(chat, **options)
            assert caught.value.param == "messages"
        else:
            rendered += 1
            assert ours.render(chat, **options) == expected, (chat, options)
        assert chat == before
    assert rendered > 60
    assert name == "loops" or refused > 0


def test_the_demo_model_prompt() -> None:
    template = load_chat_template(demo_path())
    text = template.render([{"role": "user", "content": "Hi"}])
    assert text.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    assert template.source_name == demo_path().name


def test_time_is_that_of_the_given_clock() -> None:
    template = ChatTemplate("{{ strftime_now('%d %b %Y') }}", now=lambda: datetime(2024, 7, 26))
    assert template.render([{"role": "user", "content": ""}]) == "26 Jul 2024"


# Failures


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("{{ raise_exception('no system role') }}", "no system role"),
        ("{{ messages[0].content.missing.deeper }}", "undefined|no attribute"),
        ("{{ messages[5].content }}", "undefined|no element"),
        ("{{ 1 / (messages | length - 1) }}", "division"),
        ("{{ messages[0].content + 3 }}", "str"),
        ("{{ unknown | tojson }}", "JSON"),
        ("{{ messages.append(1) }}", "not safely callable|unsafe"),
        ("{{ messages[0].update({'a': 1}) }}", "not safely callable|unsafe"),
        ("{{ messages.__class__.__mro__ }}", "unsafe|undefined"),
        ("{{ raise_exception.__globals__['json'] }}", "unsafe|undefined"),
        ("{{ ''.__class__.__base__.__subclasses__() }}", "unsafe|undefined"),
        ("{% for i in range(10 ** 9) %}x{% endfor %}", "Range too big"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
        ("{{ raise_exception('x' * 5000) }}", r"x{100}\.*"),
    ],
)
def test_whatever_goes_wrong_while_rendering_is_a_request_error(source: str, says: str) -> None:
    with pytest.raises(RequestError, match=says) as caught:
        ChatTemplate(source).render([{"role": "user", "content": "hi"}])
    assert caught.value.param == "messages"
    assert len(caught.value.message) < 500


def test_the_rendered_length_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_template, "MAX_RENDERED_CHARS", 1000)
    endless = "{% for i in range(99999) %}{% for j in range(99999) %}xxxx{% endfor %}{% endfor %}"
    with pytest.raises(RequestError, match="exceeds 1000"):
        ChatTemplate(endless).render([{"role": "user", "content": "hi"}])


def test_a_template_that_does_not_compile_is_a_model_error() -> None:
    with pytest.raises(ModelError, match=r"somewhere does not compile.*line 2.*--chat-template"):
        ChatTemplate("ok\n{% if %}", source_name="somewhere")


def test_arguments_are_checked() -> None:
    template = ChatTemplate("{{ messages[0].content }}")
    with pytest.raises(RequestError, match="at least one"):
        template.render([])
    with pytest.raises(RequestError, match="exclude each other"):
        template.render([{"role": "user", "content": "a"}], continue_final_message=True)
    reserved: dict[str, Any] = {"messages": []}
    with pytest.raises(RequestError, match="messages") as caught:
        template.render([{"role": "user", "content": "a"}], **reserved)
    assert caught.value.param == "chat_template_kwargs"


# Where templates come from


def write_config(path: Path, chat_template: object) -> None:
    (path / "tokenizer_config.json").write_text(
        json.dumps({"bos_token": "<s>", "chat_template": chat_template})
    )


HELLO = [{"role": "user", "content": "hello"}]


def test_precedence_of_template_files(tmp_path: Path) -> None:
    assert load_chat_template(tmp_path).source == FALLBACK_TEMPLATE
    (tmp_path / "chat_template.json").write_text('{"chat_template": "legacy"}')
    assert load_chat_template(tmp_path).render(HELLO) == "legacy"
    write_config(tmp_path, "{{ bos_token }} config")
    assert load_chat_template(tmp_path).render(HELLO) == "<s> config"
    (tmp_path / "chat_template.jinja").write_text("{{ bos_token }} file é", encoding="utf-8")
    template = load_chat_template(tmp_path)
    assert (template.render(HELLO), template.source_name) == ("<s> file é", "chat_template.jinja")
    assert load_chat_template(tmp_path, "{{ bos_token }} inline").render(HELLO) == "<s> inline"
    own = tmp_path / "own.jinja"
    own.write_text("from a file")
    assert load_chat_template(tmp_path, str(own)).render(HELLO) == "from a file"
    with pytest.raises(ConfigError, match="neither a readable file nor"):
        load_chat_template(tmp_path, str(tmp_path / "missing.jinja"))


def test_named_templates(tmp_path: Path) -> None:
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "default"}]
    write_config(tmp_path, named)
    template = load_chat_template(tmp_path)
    assert template.render(HELLO) == "default"
    assert template.render(HELLO, tools=[TOOL]) == template.render(HELLO, tools=[]) == "tools"
    for folder in ("chat_templates", "additional_chat_templates"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "tool_use.jinja").write_text(folder)
        (tmp_path / "chat_template.jinja").write_text("main")
        template = load_chat_template(tmp_path)
        assert (template.render(HELLO), template.render(HELLO, tools=[TOOL])) == ("main", folder)
        (tmp_path / folder / "tool_use.jinja").unlink()
    (tmp_path / "chat_template.jinja").unlink()
    write_config(tmp_path, named[:1])
    with pytest.raises(ModelError, match=r"tool_use but no default.*--chat-template"):
        load_chat_template(tmp_path)
    for damaged in ([{"name": "default"}], 3, {"default": "x"}, [["default", "x"]]):
        write_config(tmp_path, damaged)
        with pytest.raises(ModelError, match="list of"):
            load_chat_template(tmp_path)


def test_gguf_templates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from gqa_serve.engine.weights import gguf

    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": ["a", "<b>"],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.chat_template": "{{ bos_token }}!",
        "tokenizer.chat_template.tool_use": "tools",
    }
    monkeypatch.setattr(gguf, "read_gguf_metadata", lambda path: metadata)
    template = load_chat_template(tmp_path / "model.gguf")
    assert (template.render(HELLO), template.render(HELLO, tools=[])) == ("<b>!", "tools")


def test_the_fallback_is_plain_and_says_so_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "special_tokens_map.json").write_text('{"bos_token": {"content": "<s>"}}')
    template = load_chat_template(tmp_path)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "--chat-template" in caplog.text
    chat = [{"role": "system", "content": "S"}, {"role": "user", "content": "U"}]
    assert template.render(chat) == "<s>System: S\nUser: U\nAssistant:"
    assert template.render(chat, add_generation_prompt=False) == "<s>System: S\nUser: U\n"
    assert template.source == FALLBACK_TEMPLATE


def test_known_templates_are_named_never_guessed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    chatml = KNOWN_TEMPLATES["chatml"]
    assert load_chat_template(tmp_path, None, chatml.needs).source == FALLBACK_TEMPLATE
    assert "or chatml." in caplog.text
    assert load_chat_template(tmp_path, "chatml").source == chatml.source
    assert fitting_templates({"<|im_start|>"}) == []
    with pytest.raises(ConfigError, match="chatml, llama3"):
        load_chat_template(tmp_path, "chatlm")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (
            "chatml",
            "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nU<|im_end|>\n<|im_start|>assistant\nA",
        ),
        ("gemma", "<s><start_of_turn>user\nS\n\nU<end_of_turn>\n<start_of_turn>model\nA"),
        ("mistral", "<s>[INST] S\n\nU[/INST] A"),
        ("phi3", "<|system|>\nS<|end|>\n<|user|>\nU<|end|>\n<|assistant|>\nA"),
        (
            "llama3",
            "<s><|start_header_id|>system<|end_header_id|>\n\nS<|eot_id|><|start_header_id|>user<|end_header_id|>"
            "\n\nU<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nA",
        ),
    ],
)
def test_known_templates(name: str, expected: str) -> None:
    known = KNOWN_TEMPLATES[name]
    template = ChatTemplate(known.source, special_tokens=SPECIAL)
    roles = zip(("system", "user", "assistant"), "SUA", strict=True)
    chat = [{"role": role, "content": text} for role, text in roles]
    rendered = template.render(chat, add_generation_prompt=False)
    assert rendered.startswith(expected)
    assert all(token in rendered for token in known.needs)
    # What the model is asked to go on from is what its answer followed.
    prompt = template.render(chat[:2])
    assert rendered.startswith(prompt)
    assert rendered[len(prompt) :].lstrip().startswith("A")


def test_the_end_of_a_turn() -> None:
    tokenizer = load_tokenizer(demo_path())
    assert end_of_turn(tokenizer, load_chat_template(demo_path())) == tokenizer.token_id("<|im_end|>")
    assert end_of_turn(tokenizer, ChatTemplate(FALLBACK_TEMPLATE)) is None
    assert end_of_turn(tokenizer, ChatTemplate("{{ raise_exception('no') }}")) is None
    assert end_of_turn(tokenizer, ChatTemplate("{{ messages[-1]['content'] }} <|endoftext|>")) == 0
    assert end_of_turn(tokenizer, ChatTemplate("{{ messages[-1]['content'] }} bye <|im_end|>")) is None


# Preparing messages


def test_content_is_given_as_the_template_reads_it() -> None:
    parts = [
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "input_text", "text": "b"}]}
    ]
    strings = [{"role": "user", "content": "a"}]
    plain, both = ChatTemplate(TEMPLATES["plain"]), ChatTemplate(TEMPLATES["parts"])
    only_parts = ChatTemplate("{% for p in messages[0].content %}{{ p.text }}{% endfor %}")
    assert normalise_messages(parts, plain) == [{"role": "user", "content": "a\nb"}]
    assert normalise_messages(strings, plain) == normalise_messages(strings, both) == strings
    both_parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert normalise_messages(parts, both)[0]["content"] == both_parts
    assert normalise_messages(strings, only_parts)[0]["content"] == [{"type": "text", "text": "a"}]
    assert only_parts.render(normalise_messages(strings, only_parts)) == "a"


@pytest.mark.parametrize(
    ("source", "strings", "parts"),
    [
        (TEMPLATES["plain"], True, False),
        (TEMPLATES["parts"], True, True),
        ("{% for m in messages %}{{ m.content | tojson }}{% endfor %}", True, False),
        ("{% for p in messages[0].content %}{{ p.text }}{% endfor %}", False, True),
        ("{{ raise_exception('never') }}", False, False),
    ],
)
def test_a_template_is_tried_for_what_it_accepts(source: str, strings: bool, parts: bool) -> None:
    template = ChatTemplate(source)
    assert (template.accepts_strings, template.accepts_parts) == (strings, parts)


def test_the_developer_role_is_mapped_unless_known() -> None:
    chat = [{"role": "developer", "content": "d"}]
    unaware = ChatTemplate("the developer {{ messages[0].role }}")
    aware = ChatTemplate(
        "{% if messages[0].role in ['system', 'developer'] %}{{ messages[0].role }}{% endif %}"
    )
    assert normalise_messages(chat, unaware)[0]["role"] == "system"
    assert normalise_messages(chat, aware)[0]["role"] == "developer"
    assert chat[0]["role"] == "developer"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ('{"city": "Zürich"}', {"city": "Zürich"}),
        ("", {}),
        ({"a": 1}, {"a": 1}),
        ("not json", "not json"),
        ("[1]", "[1]"),
        ("[" * 100_000, "[" * 100_000),
        (r'{"a": "\ud83d\ude00"}', {"a": "\U0001f600"}),
        (r'{"a": "\ud800"}', r'{"a": "\ud800"}'),
        (None, None),
    ],
)
def test_tool_call_arguments_become_objects(arguments: object, expected: object) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": arguments}}
    chat = [{"role": "assistant", "content": None, "tool_calls": [call]}]
    (message,) = normalise_messages(chat, ChatTemplate("x"))
    assert message["tool_calls"][0]["function"] == {"name": "f", "arguments": expected}
    assert message["content"] is None
    assert chat[0]["tool_calls"] == [call]
    assert call["function"]["arguments"] == arguments


@pytest.mark.parametrize(
    ("content", "param"),
    [
        (7, "messages[1].content"),
        ({"type": "text"}, "messages[1].content"),
        ([{"type": "text", "text": "a"}, {"type": "image_url", "image_url": {}}], "messages[1].content[1]"),
        ([{"type": "text"}], "messages[1].content[0]"),
        ([{"type": ["text"], "text": "a"}], "messages[1].content[0]"),
        ([None], "messages[1].content[0]"),
    ],
)
def test_other_content_is_refused_by_name(content: object, param: str) -> None:
    with pytest.raises(RequestError) as caught:
        normalise_messages(
            [{"role": "user", "content": "a"}, {"role": "user", "content": content}], ChatTemplate("x")
        )
    assert caught.value.param == param
