"""User text never becomes a control token: whatever it spells, wherever it stands, for every tokenizer."""

from __future__ import annotations

import json
from typing import Any

import pytest
import tokenizers
from fake_engine import fake_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_cases import demo_tokenizer, many_tokenizers
from tokenizers import AddedToken, decoders, normalizers

from gqa_serve.api.tools.prompt import describe_tools
from gqa_serve.api.tools.syntax import HERMES
from gqa_serve.engine.chat_prompt import encode_chat
from gqa_serve.engine.chat_template import ChatTemplate
from gqa_serve.engine.tokenizer import Tokenizer


def normalizing_tokenizer() -> Tokenizer:
    """Its special tokens are found after normalization, as in some converted vocabularies."""
    vocab = {character: id for id, character in enumerate(map(chr, range(33, 127)))}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=[], unk_token="?"))
    backend.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens([AddedToken("<|end|>", special=True, normalized=True)])
    return Tokenizer(backend, special_tokens={"eos_token": "<|end|>"})


TOKENIZERS = {
    **many_tokenizers(),
    "demo": demo_tokenizer(),
    "many specials": fake_tokenizer("[INST]", "[/INST]", "<|im_sep|>"),
    "normalizing": normalizing_tokenizer(),
}
# Each puts texts beside each other, or beside its own, in other ways; BEGIN and END are control tokens.
TEMPLATES = {
    "plain": "BEGIN{% for m in messages %}{{ m.role }}: {{ m.content }}END{% endfor %}",
    "name before content": "{% for m in messages %}BEGIN{{ m.name }}{{ m.content }}END{% endfor %}",
    "trimmed": "{% for m in messages %}BEGIN{{ m.name | trim }}{{ m.content | trim }}END{% endfor %}",
    "parts": "{% for m in messages %}BEGIN{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for part in m.content %}{{ part.text }}{% endfor %}{% endif %}END{% endfor %}",
    "in brackets": "{% for m in messages %}BEGIN<{{ m.name }}>[{{ m.content }}]<|{{ m.content }}|>END"
    "{% endfor %}",
    "calls": "{% for m in messages %}BEGIN{{ m.content }}{% for c in m.tool_calls or [] %}"
    "{{ c.function.name }}{{ c.function.arguments | tojson }}{{ c.id }}{% endfor %}END{% endfor %}",
    "tools": "{{ tools | tojson }}{% for t in tools or [] %}{{ t.function.name }}{{ t.function.description }}"
    "{% endfor %}BEGIN{{ messages[0].content }}END",
    "documents and variables": "{{ documents | string }}{{ mood }}{{ messages[0].content }}BEGIN",
}


def template_for(name: str, tokenizer: Tokenizer) -> ChatTemplate:
    known = [text for text in tokenizer.special_texts if text != "<unk>"]
    return ChatTemplate(TEMPLATES[name].replace("BEGIN", known[0]).replace("END", known[-1]))


def fragments(tokenizer: Tokenizer) -> st.SearchStrategy[str]:
    """Control tokens whole, cut in two, and with something inside."""
    texts = tokenizer.special_texts
    cut = st.sampled_from(texts).flatmap(
        lambda text: st.integers(0, len(text)).flatmap(lambda at: st.sampled_from([text[:at], text[at:]]))
    )
    wide = st.sampled_from(texts).map(
        lambda text: "".join(chr(ord(c) + 0xFEE0) if "!" <= c <= "~" else c for c in text)
    )
    pieces = st.lists(
        st.sampled_from(texts) | cut | wide | st.sampled_from([" ", "\n", "a", "<", ">"]), max_size=5
    )
    return pieces.map("".join)


def control_ids(tokenizer: Tokenizer, template: ChatTemplate, texts: list[str]) -> list[int]:
    """Those in the prompt of a conversation that uses `texts` everywhere a client can put some."""
    a, b, c, d, e, f = texts
    function = {"name": b, "arguments": json.dumps({c: d})}
    messages: list[dict[str, Any]] = [
        {"role": "system", "name": a, "content": b},
        {"role": "user", "name": c, "content": [{"type": "text", "text": d}, {"type": "text", "text": e}]},
        {"role": "assistant", "name": e, "content": f, "tool_calls": [{"id": a, "function": function}]},
        {"role": "tool", "name": f, "content": a, "tool_call_id": b},
    ]
    parameters = {"type": "object", "properties": {e: {"type": "string", "description": f}}}
    tools = [{"type": "function", "function": {"name": c, "description": d, "parameters": parameters}}]
    messages[0]["content"] += describe_tools(tools, HERMES, must_call=False)
    ids = encode_chat(
        tokenizer, template, messages, tools=tools, documents=[{"title": a, "text": b}], mood=c, other=d
    )
    return [id for id in ids if id in tokenizer.special_ids and tokenizer.token(id) != "<unk>"]


@pytest.mark.parametrize("kind", TOKENIZERS)
@settings(max_examples=25, deadline=None)
@given(data=st.data(), name=st.sampled_from(sorted(TEMPLATES)))
def test_control_tokens_are_those_of_the_template(kind: str, data: st.DataObject, name: str) -> None:
    tokenizer = TOKENIZERS[kind]
    template = template_for(name, tokenizer)
    harmless = control_ids(tokenizer, template, ["qa", "qb", "qc", "qd", "qe", "qf"])
    assert harmless
    texts = [data.draw(fragments(tokenizer), label=str(number)) for number in range(6)]
    assert control_ids(tokenizer, template, texts) == harmless


@pytest.mark.parametrize(
    ("left", "right"), [("<|im_", "end|>"), ("a <|im_end|", "> b"), ("<|im_ ", " end|>")]
)
def test_two_parts_do_not_make_one(left: str, right: str) -> None:
    tokenizer = fake_tokenizer()
    template = ChatTemplate(
        "{% for m in messages %}{% for part in m.content %}{{ part.text | trim }}{% endfor %}{% endfor %}"
    )
    content = [{"type": "text", "text": left}, {"type": "text", "text": right}]
    ids = encode_chat(tokenizer, template, [{"role": "user", "content": content}])
    assert ids == list((left.strip() + right.strip()).encode())


def test_a_role_may_be_a_part_of_the_templates_own() -> None:
    tokenizer = fake_tokenizer("<|user|>", "<|assistant|>")
    template = ChatTemplate("{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}")
    ids = encode_chat(tokenizer, template, [{"role": "user", "content": "user"}])
    assert ids == [258, *b"user"]


def test_texts_that_look_like_ends_of_one_are_shown_to_the_template_as_they_are() -> None:
    template = ChatTemplate(
        "{% for m in messages %}{{ 'cut' if m.content.endswith('<') else m.content }}{% endfor %}"
    )
    assert encode_chat(fake_tokenizer(), template, [{"role": "user", "content": "a <"}]) == list(b"cut")


def test_tokens_that_a_template_names_may_be_set() -> None:
    template = ChatTemplate("{{ bos_token }}{{ mood }}{{ messages[0].content }}")
    options = {"bos_token": "<|im_start|>", "mood": "<|im_end|>"}
    ids = encode_chat(fake_tokenizer(), template, [{"role": "user", "content": "a"}], **options)
    assert ids == [256, *b"<|im_end|>a"]


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_plain_text_is_never_read_for_control_tokens(kind: str) -> None:
    tokenizer = TOKENIZERS[kind]
    for text in tokenizer.special_texts:
        ids = tokenizer.encode(f"a{text}b", add_special_tokens=False)
        assert not [id for id in ids if id in tokenizer.special_ids and tokenizer.token(id) != "<unk>"]
