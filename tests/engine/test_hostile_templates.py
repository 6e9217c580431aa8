"""Chat templates that mean harm or are broken: every one ends, in a text or in a clear error, and soon."""

from __future__ import annotations

import contextlib
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gqa_serve.engine import template_sandbox
from gqa_serve.engine.chat_template import ChatTemplate
from gqa_serve.errors import ModelError, RequestError

MESSAGES = [{"role": "user", "content": "Hi"}]
LOOP = "{% for i in range(99999) %}{% for j in range(99999) %}{% for k in range(99999) %}"
END = "{% endfor %}{% endfor %}{% endfor %}"


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_sandbox, "MAX_RENDER_S", 0.2)


ENDLESS = {
    "loops": LOOP + END,
    "loops that compute": LOOP + "{% set x = i * j %}" + END,
    "loops in a macro": "{% macro m() %}" + LOOP + END + "{% endmacro %}{{ m() }}",
    "loops into a variable": "{% set x %}" + LOOP + END + "{% endset %}",
    "recursion in every direction": "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}"
    "{% endmacro %}{{ m(60) }}",
    "a recursive loop": "{% for x in [60] recursive %}{% if x %}{{ loop([x - 1, x - 1]) }}{% endif %}"
    "{% endfor %}",
    "loops under a name of ours": "{% set gqa_tick = 1 %}" + LOOP + END,
}


@pytest.mark.parametrize("name", ENDLESS)
@pytest.mark.usefixtures("short")
def test_what_never_ends_is_ended(name: str) -> None:
    with pytest.raises(RequestError, match="chat template rejected"):
        ChatTemplate(ENDLESS[name]).render(MESSAGES)


NAMED = "{% set n = namespace(x='ab') %}"
LARGE = {
    "copies": "{{ 'a' * 10 ** 10 }}",
    "copies of copies": "{{ 'a' * 90000 * 90000 }}",
    "a list": "{{ ([1] * 10 ** 9) | length }}",
    "a list of texts": "{% set x = 'a' * 90000 %}{{ [x] * 90000 }}",
    "a list of texts, as JSON": "{% set x = 'a' * 90000 %}{{ ([x] * 90000) | tojson | length }}",
    "a list of texts, joined": "{% set x = 'a' * 90000 %}{{ ([x] * 90000) | join | length }}",
    "a list of texts, joined by a method": "{% set x = 'a' * 90000 %}{{ '-'.join([x] * 90000) | length }}",
    "doubling": NAMED + "{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
    "adding": NAMED + "{% for i in range(60) %}{% set n.x = n.x + n.x %}{% endfor %}",
    "writing": NAMED + "{% for i in range(60) %}{% set y %}{{ n.x }}{{ n.x }}{% endset %}"
    "{% set n.x = y %}{% endfor %}",
    "replacing": "{% set x = 'a' * 90000 %}{{ x.replace('a', x) | length }}",
    "replacing by a filter": "{% set x = 'a' * 90000 %}{{ x | replace('a', x) | length }}",
    "a power": "{{ 9 ** (9 ** 9) }}",
    "a product": "{% set n = namespace(x=10 ** 900) %}{% for i in range(60) %}"
    "{% set n.x = n.x * n.x %}{% endfor %}",
    "a wide field": "{{ '%999999999d' % 1 }}",
    "a wide field, as an argument": "{{ '%*d' % (999999999, 1) }}",
    "a wide field, new style": "{{ '{:>999999999}'.format('a') }}",
    "a wide field, newest style": "{{ '{:>{}}'.format('a', 999999999) }}",
    "a wide field, by a filter": "{{ '%999999999d' | format(1) }}",
    "columns": "{{ 'a'.center(10 ** 9) }}",
    "columns by a filter": "{{ 'a' | center(10 ** 9) }}",
    "columns by a named argument": "{{ 'a' | indent(width=10 ** 9, first=true) }}",
    "zeros": "{{ 'a'.zfill(10 ** 9) }}",
    "a range": "{{ range(10 ** 9) | list | length }}",
}


@pytest.mark.parametrize("name", LARGE)
def test_what_is_too_large_is_not_made(name: str) -> None:
    with pytest.raises(RequestError, match=r"chat template rejected|exceeds"):
        ChatTemplate(LARGE[name]).render(MESSAGES)


ESCAPES = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ messages.__class__ }}",
    "{{ messages.append(1) }}",
    "{{ messages[0].update({'role': 'x'}) }}",
    "{{ raise_exception.__globals__ }}",
    "{{ strftime_now.__code__ }}",
    "{{ self._TemplateReference__context.environment }}",
    "{{ cycler.__init__.__globals__ }}",
    "{{ namespace.__init__.__globals__['__builtins__'] }}",
    "{{ '{0.__class__.__mro__}'.format('') }}",
    "{{ ('{0.__class__}' | format('')).x.y }}",
    "{{ (messages | map(attribute='__class__') | list)[0].x }}",
    "{{ messages | attr('__class__') | attr('__mro__') }}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}{{ os.system('id') }}",
    "{% extends '/etc/passwd' %}",
    "{{ gqa_tick.__self__.globals }}",
]


@pytest.mark.parametrize("source", ESCAPES)
def test_no_way_out(source: str) -> None:
    try:
        text = ChatTemplate(source).render(MESSAGES)
    except (RequestError, ModelError):
        return
    assert "class" not in text
    assert "root:" not in text


BROKEN = [
    "{% for %}",
    "{{",
    "{% if x %}",
    "{{ x | nothing }}",
    "{% block a %}{% block a %}",
    "{{ '\\x' }}",
    "{% nothing %}",
]


@pytest.mark.parametrize("source", [*BROKEN, "{{ " + "(" * 500 + ")" * 500 + " }}", "{% if 1 %}" * 300])
def test_what_does_not_compile_is_the_models_fault(source: str) -> None:
    with pytest.raises(ModelError, match="does not compile"):
        ChatTemplate(source)


@pytest.mark.parametrize("variable", ["x", "messages", "tools", "gqa_tick", "gqa_concat", "loop"])
@settings(max_examples=50, deadline=None)
@given(data=st.data())
def test_any_template_ends(variable: str, data: st.DataObject) -> None:
    pieces = [
        "{{",
        "}}",
        "{%",
        "%}",
        " for i in ",
        " endfor ",
        " if ",
        " endif ",
        "x",
        "messages",
        "|",
        "~",
        "*",
        "99",
        "'a'",
        "(",
        ")",
        "[",
        "]",
        ".",
        "set ",
        "=",
        "macro ",
        "endmacro",
        "range",
        "tojson",
        "join",
        " ",
        "__class__",
    ]
    source = data.draw(st.lists(st.sampled_from(pieces), max_size=25).map("".join))
    with contextlib.suppress(RequestError, ModelError):
        ChatTemplate(source).render(MESSAGES, **({variable: "a"} if variable in ("x", "loop") else {}))


def test_the_clock_is_that_of_one_rendering(monkeypatch: pytest.MonkeyPatch) -> None:
    """An endless one in another thread ends by its own time, and leaves others theirs."""
    monkeypatch.setattr(template_sandbox, "MAX_RENDER_S", 0.3)
    template = ChatTemplate(
        "{% if messages[0].content == 'Hi' %}a ~ b{% else %}" + LOOP + END + "{% endif %}"
    )
    failures: list[str] = []

    def endless() -> None:
        with pytest.raises(RequestError) as caught:
            template.render([{"role": "user", "content": "x"}])
        failures.append(caught.value.message)

    thread = threading.Thread(target=endless)
    thread.start()
    while thread.is_alive():
        assert template.render(MESSAGES) == "a ~ b"
    assert len(failures) == 1
    assert template.slowest_s >= 0.3


def test_concatenation_is_as_before() -> None:
    template = ChatTemplate(
        "{{ 1 ~ 'a' ~ none ~ [1, 'b'] ~ nothing }}"
        "{% for i in [1, 2] %}{{ loop.index ~ loop.last }}{% endfor %}"
    )
    assert template.render(MESSAGES) == "1aNone[1, 'b']1False2True"
