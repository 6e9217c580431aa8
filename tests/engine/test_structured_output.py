"""Structured output with the demo model's vocabulary and, at a high temperature, with the model itself.

Every keyword that the documentation calls enforced is tried: by random walks through what the grammar
allows, and by sampling at temperature 1.5. The judge is jsonschema_rs.
"""

from __future__ import annotations

import json
import random
import re
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path

import jsonschema_rs
import numpy as np
import pytest
from demo_model import demo_path
from schema_cases import ANNOTATIONS, BEYOND_LIMITS, ENFORCED, INT, REFUSED, Schema, obj

from gqa_serve import LLM, SamplingParams
from gqa_serve.engine.backends import native_is_built
from gqa_serve.engine.grammar_compiler import compiler_for
from gqa_serve.engine.grammars import (
    after,
    check_grammar,
    choice_grammar,
    json_object_grammar,
    json_schema_grammar,
    lark_grammar,
    regex_grammar,
)
from gqa_serve.engine.tokenizer import Tokenizer, load_tokenizer
from gqa_serve.errors import RequestError

PAGE = Path(__file__).parents[2] / "docs" / "structured_output.md"
WALKS = 12
SEEDS = 2


@cache
def tokenizer() -> Tokenizer:
    return load_tokenizer(demo_path())


@pytest.fixture(scope="module")
def llm() -> LLM:
    backend = "native" if native_is_built() else "reference"
    demo_path()
    return LLM("demo", backend=backend, kv_cache_memory="256MiB", max_num_seqs=128, progress=False)


def accepts(grammar: str, text: str) -> bool:
    """Whether `text` is a whole answer."""
    matcher = compiler_for(tokenizer()).compile(grammar)
    ids = tokenizer().encode(text, add_special_tokens=False)
    return matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting()


def judge(schema: Schema) -> jsonschema_rs.Draft202012Validator:
    return jsonschema_rs.Draft202012Validator(schema, validate_formats=True)


def parse(text: str) -> object:
    """JSON without white space but for a blank after commas and colons."""
    outside = re.sub(r'"[^"\\]*(?:\\.[^"\\]*)*"', '""', text)
    assert not re.search(r"[^,: ] | [ ]|[\n\r\t]|^ | $", outside), repr(text)
    return json.loads(text)


@cache
def closing_tokens() -> list[int]:
    """Tokens that end strings, lists and objects, so that a walk comes to an end."""
    pieces = [(token, tokenizer().token_bytes(token)) for token in range(tokenizer().vocab_size)]
    return [token for token, piece in pieces if piece[:1] in (b'"', b"}", b"]") and len(piece) <= 2]


@cache
def single_bytes() -> list[int]:
    return [t for t in range(tokenizer().vocab_size) if len(tokenizer().token_bytes(t)) == 1]


def walk(grammar: str, source: random.Random, most: int = 300) -> str | None:
    """An answer made of tokens at random; None if it has no end after `most`."""
    matcher = compiler_for(tokenizer()).compile(grammar)
    eos = tokenizer().eos_token_id
    ids: list[int] = []
    while not matcher.is_stopped() and len(ids) < most:
        bits = np.unpackbits(np.frombuffer(matcher.compute_bitmask(), np.uint8), bitorder="little")
        if matcher.is_accepting() and source.random() < 0.4:
            break
        pool = closing_tokens() if len(ids) > 20 else single_bytes() if source.random() < 0.5 else []
        allowed = [token for token in pool if bits[token]] or np.nonzero(bits)[0].tolist()
        token = source.choice(allowed)
        if token == eos:
            break
        assert matcher.consume_token(token), matcher.get_error()
        ids.append(token)
    if not matcher.is_accepting():
        return None
    return b"".join(map(tokenizer().token_bytes, ids)).decode()


def table_keywords() -> set[str]:
    rows = re.findall(r"^\| (`[^|]*`) \|[^|]*\|$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    return {name for row in rows for name in re.findall(r"`([^`]+)`", row)}


def paragraph_keywords(beginning: str) -> set[str]:
    (paragraph,) = re.findall(rf"^{beginning}[^\n]*:(.*?)\n\n", PAGE.read_text(encoding="utf-8"), re.M | re.S)
    return set(re.findall(r"`([^`]+)`", paragraph))


def test_the_page_lists_what_is_tried_here() -> None:
    assert table_keywords() == set(ENFORCED)
    assert paragraph_keywords("These are refused") == set(REFUSED)
    page = PAGE.read_text(encoding="utf-8")
    assert all(f"`{name}`" in page for name in ANNOTATIONS)


@pytest.mark.parametrize("keyword", [*ENFORCED, *ANNOTATIONS])
def test_whatever_a_schema_allows_satisfies_it(keyword: str) -> None:
    for schema in ENFORCED.get(keyword) or [ANNOTATIONS[keyword]]:
        # alone, and inside of others
        for whole in (schema, obj({"x": schema}, required=["x"])):
            if whole is not schema and "$defs" in schema:
                continue  # its references are from the top
            grammar = json_schema_grammar(whole)
            source = random.Random(7)
            texts = [walk(grammar, source) for _ in range(WALKS)]
            assert sum(text is None for text in texts) <= WALKS // 4, schema
            for text in texts:
                if text is not None:
                    assert judge(whole).is_valid(parse(text)), (schema, text)


@pytest.mark.parametrize("keyword", REFUSED)
def test_keywords_that_cannot_be_enforced_are_named(keyword: str) -> None:
    for schema in (REFUSED[keyword], obj({"x": {"anyOf": [REFUSED[keyword], INT]}})):
        with pytest.raises(RequestError, match=re.escape(keyword)) as caught:
            check_grammar(json_schema_grammar(schema), tokenizer(), param="here")
        assert caught.value.param == "here"


@pytest.mark.parametrize(("schema", "words"), BEYOND_LIMITS)
def test_limits_of_keywords_are_named(schema: Schema, words: str) -> None:
    with pytest.raises(RequestError, match=re.escape(words)):
        check_grammar(json_schema_grammar(schema), tokenizer(), param="here")


def test_sampling_at_a_high_temperature_gives_nothing_but_valid_json(llm: LLM) -> None:
    cases = [(schema, seed) for schemas in ENFORCED.values() for schema in schemas for seed in range(SEEDS)]
    params = [
        SamplingParams(temperature=1.5, seed=seed, max_tokens=150, grammar=json_schema_grammar(schema))
        for schema, seed in cases
    ]
    outputs = llm.generate(["JSON: "] * len(cases), params)
    ended = 0
    for (schema, _), output in zip(cases, outputs, strict=True):
        text = output.outputs[0].text
        if output.outputs[0].finish_reason == "stop":
            ended += 1
            assert judge(schema).is_valid(parse(text)), (schema, text)
    assert ended > 0.95 * len(cases)


def test_a_cut_answer_is_the_beginning_of_a_whole_one(llm: LLM) -> None:
    grammar = json_schema_grammar(
        obj({"name": {"type": "string", "maxLength": 30}, "n": INT}, required=["name", "n"])
    )
    lengths = [1, 2, 5, 9, 60]
    outputs = llm.generate(
        ["A person: "] * len(lengths),
        [SamplingParams(temperature=1.5, seed=3, max_tokens=n, grammar=grammar) for n in lengths],
    )
    *cut, whole = [output.outputs[0] for output in outputs]
    assert whole.finish_reason == "stop"
    for part, length in zip(cut, lengths[:-1], strict=True):
        assert (part.finish_reason, len(part.token_ids)) == ("length", length)
        assert part.token_ids == whole.token_ids[:length]


def test_the_other_kinds_with_the_model(llm: LLM) -> None:
    choices = ["yes", "no", "perhaps", 'no\n"way"']
    numbers = lark_grammar('start: "{" NUMBER ("," NUMBER)? "}"\nNUMBER: /[1-9][0-9]?/')
    kinds: list[tuple[str, Callable[[str], object]]] = [
        (regex_grammar("[0-9]{3}-[a-z]{2,5}"), re.compile("[0-9]{3}-[a-z]{2,5}").fullmatch),
        (choice_grammar(choices), choices.__contains__),
        (lark_grammar('root ::= "<" (root | [a-z]{1,3}) ">"'), re.compile("<+[a-z]{1,3}>+").fullmatch),
        (numbers, re.compile(r"\{\d+(,\d+)?\}").fullmatch),
    ]
    jobs = [(grammar, right, seed) for grammar, right in kinds for seed in range(4)]
    outputs = llm.generate(
        ["Answer: "] * len(jobs),
        [SamplingParams(temperature=1.5, seed=seed, max_tokens=80, grammar=g) for g, _, seed in jobs],
    )
    for (grammar, right, _), output in zip(jobs, outputs, strict=True):
        choice = output.outputs[0]
        assert choice.finish_reason == "length" or right(choice.text), (grammar, choice.text)
    assert sum(output.outputs[0].finish_reason == "stop" for output in outputs) >= len(jobs) - 3


def test_a_schema_takes_fewer_steps_than_tokens_and_the_same_tokens_as_with_logprobs(llm: LLM) -> None:
    properties = {f"a_rather_long_name_{n}": {"type": "boolean"} for n in range(4)}
    grammar = json_schema_grammar(obj(properties, required=list(properties)))
    plain = SamplingParams(temperature=1.0, seed=1, max_tokens=150, grammar=grammar)
    step, count = llm.engine.step, 0

    def counting() -> object:
        nonlocal count
        count += 1
        return step()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(llm.engine, "step", counting)
        (fast,) = llm.generate("x", plain)
    scored = SamplingParams(temperature=1.0, seed=1, max_tokens=150, grammar=grammar, logprobs=0)
    (slow,) = llm.generate("x", scored)
    assert fast.outputs[0].token_ids == slow.outputs[0].token_ids
    assert len(slow.outputs[0].logprobs or []) == len(slow.outputs[0].token_ids)
    assert count < 0.7 * len(fast.outputs[0].token_ids)


def test_a_wrong_grammar_is_refused_before_anything_is_computed(llm: LLM) -> None:
    with pytest.raises(RequestError, match="unknown name") as caught:
        llm.generate(["a", "b"], SamplingParams(grammar='{"grammars": [{"lark_grammar": "start: a"}]}'))
    assert caught.value.param == "grammar"
    with pytest.raises(RequestError, match="grammar"):
        llm.generate("a", SamplingParams(grammar=""))
    assert not llm.engine.has_work


# --- grammars as text ---


@pytest.mark.parametrize(
    ("pattern", "yes", "no"),
    [
        ("a/b", "a/b", "a\\/b"),
        (r"a\/b", "a/b", "a"),
        ("a\nb", "a\nb", "ab"),
        ("[/]+", "//", ""),
        ("a.b", "axb", "a\nb"),
        ("(?s:a.b)", "a\nb", "ab"),
        ("(?i)ab", "AB", "x"),
        ("^a$", "a", "aa"),
        (r"\\", "\\", "\\\\"),
        ("é+", "éé", "e"),
        (r"\{\"", '{"', "{"),
    ],
)
def test_expressions_match_as_a_whole(pattern: str, yes: str, no: str) -> None:
    assert accepts(regex_grammar(pattern), yes)
    assert not accepts(regex_grammar(pattern), no)


@pytest.mark.parametrize(
    "choice",
    [
        "a",
        'say "x"',
        "a\\b",
        "line\nbreak",
        "\t\r\b\f",
        "\x00\x1b\x7f",
        "é😀\u2028",
        "</s>",
        "<|im_end|>",
        "/x/",
        "%",
    ],
)
def test_a_choice_may_be_any_text(choice: str) -> None:
    assert accepts(choice_grammar(["other", choice]), choice)
    assert not accepts(choice_grammar(["other", choice]), choice + "x")


def test_json_has_no_more_white_space_than_blanks() -> None:
    grammar = json_schema_grammar(obj({"a": INT, "b": INT}))
    for text in ('{"a":1,"b":2}', '{"a": 1, "b": 2}', '{"a": 1,"b":2}'):
        assert accepts(grammar, text)
    for text in ('{"a":  1}', '{ "a":1}', '{"a" :1}', '{"a":1 }', '{"a":\n1}', ' {"a":1}', '{"a":1} '):
        assert not accepts(grammar, text)
    assert not accepts(json_object_grammar(), '{"a":\t1}')


def test_a_grammar_after_free_text() -> None:
    grammar = after("(?s:.*)</think>", json_schema_grammar(obj({"a": INT})))
    assert accepts(grammar, 'So, {"a": 2} or\n3?</think>{"a": 1}')
    assert accepts(grammar, "</think>{}")
    for text in ('{"a": 1}', "x</think>", 'x</think>{"a": 1}</think>', "x</think>y{}"):
        assert not accepts(grammar, text)
    assert accepts(after("x*Y", after("z*Z", choice_grammar(["a"]))), "xxYzZa")


def test_a_control_token_closes_free_text() -> None:
    grammar = after("(?s:.*)", choice_grammar(["a"]), token="<|im_start|>")
    matcher = compiler_for(tokenizer()).compile(grammar)
    ids = [*tokenizer().encode("x<y"), tokenizer().token_id("<|im_start|>"), *tokenizer().encode("a")]
    assert matcher.try_consume_tokens(ids) == len(ids)
    assert matcher.is_accepting()


# --- hostile ones ---


def _references(count: int) -> str:
    definitions = {f"a{n}": {"$ref": f"#/$defs/a{n + 1}"} for n in range(count)}
    return json_schema_grammar({"$ref": "#/$defs/a0", "$defs": {**definitions, f"a{count}": {}}})


def _branches(count: int) -> str:
    one = [{"anyOf": [{"required": [f"a{n}"]}, {"required": [f"b{n}"]}]} for n in range(count)]
    return json_schema_grammar({"type": "object", "allOf": one})


def _rules(sign: str, count: int) -> str:
    return "".join(f"a{n} {sign} a{n + 1}\n" for n in range(count))


HOSTILE: dict[str, Callable[[], str]] = {
    "nesting": lambda: json_schema_grammar(json.loads('{"items":' * 500 + "{}" + "}" * 500)),
    "references": lambda: _references(5000),
    "branches": lambda: _branches(20),
    "long": lambda: json_schema_grammar({"type": "string", "maxLength": 10**9}),
    "many items": lambda: json_schema_grammar({"type": "array", "minItems": 10**9, "items": INT}),
    "many names": lambda: json_schema_grammar(obj({f"p{n}": {"type": "string"} for n in range(4000)})),
    "patterns": lambda: json_schema_grammar({"type": "string", "pattern": "^(a|b)*a(a|b){200}$"}),
    "not JSON": lambda: json_schema_grammar({"enum": [float("nan")]}),
    "surrogate": lambda: json_schema_grammar({"const": "\ud800"}),
    "huge": lambda: regex_grammar("a" * 300_000),
    "repeats": lambda: regex_grammar("((a{1000}){1000}){1000}"),
    "states": lambda: regex_grammar("(.{0,1000}a){0,1000}"),
    "brackets": lambda: regex_grammar("(" * 50_000 + ")" * 50_000),
    "alternatives": lambda: regex_grammar("|".join(f"word{n}.*x" for n in range(5000))),
    "lark brackets": lambda: lark_grammar("start: " + "(" * 50_000),
    "lark chain": lambda: lark_grammar("start: a0\n" + _rules(":", 15_000) + 'a15000: "x"'),
    "lark loop": lambda: lark_grammar("start: start"),
    "lark ambiguous": lambda: lark_grammar('start: a\na: a a a | "x" | '),
    "gbnf brackets": lambda: lark_grammar("root ::= " + "(" * 50_000),
    "gbnf rules": lambda: lark_grammar("root ::= a0\n" + _rules("::=", 5000)),
    "choices": lambda: choice_grammar([f"choice {n}" for n in range(4096)]),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_grammars_are_refused_or_harmless(name: str) -> None:
    begin = time.process_time()
    error = None
    try:
        grammar = HOSTILE[name]()
        check_grammar(grammar, tokenizer(), param="here")
    except RequestError as refusal:
        error = refusal
    if error is not None:
        assert len(error.message) < 500
    else:
        matcher = compiler_for(tokenizer()).compile(grammar)
        for _ in range(5):
            bits = np.unpackbits(np.frombuffer(matcher.compute_bitmask(), np.uint8), bitorder="little")
            if not bits.any() or not matcher.consume_token(int(np.nonzero(bits)[0][-1])):
                break  # too complex: the engine ends such a request
    assert time.process_time() - begin < 10
