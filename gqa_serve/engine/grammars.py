"""Grammars as text: what a JSON schema, a regular expression, a list of choices or a grammar file becomes.

Owns the form in which a constraint travels (`SamplingParams.grammar`: llguidance's JSON, a list of grammars
of which the first is the top) and the limits on what a client may send. Knows no model and no engine; only
`check_grammar` takes a tokenizer. Invariant: what is built here is enforced exactly or refused; white space
in JSON is at most one blank after each comma and colon, so that no model can fill its answer with it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from gqa_serve.engine.json_schemas import enforceable
from gqa_serve.engine.request import MAX_GRAMMAR_CHARS
from gqa_serve.errors import RequestError

if TYPE_CHECKING:
    from gqa_serve.engine.tokenizer import Tokenizer

MAX_CHOICES = 4096
MAX_MESSAGE_CHARS = 300
MAX_GBNF_RULES = 512  # the conversion takes time quadratic in these

_RULE_OPTIONS = re.compile(r"^[ \t]*[?!]?\w[\w-]*\[([^\]\n]*)\][ \t]*:", re.MULTILINE)
_REFUSED_OPTION = re.compile(r"\b(temperature|max_tokens|stop|stop_capture)\b")


@contextmanager
def blaming(param: str) -> Iterator[None]:
    """A RequestError inside that names no parameter names `param`."""
    try:
        yield
    except RequestError as error:
        if error.param is None:
            error.param = param
        raise


def json_schema_grammar(schema: Any) -> str:
    """JSON that a schema (an object or a boolean) describes. Raises RequestError."""
    return _dump([{"name": "json", "json_schema": enforceable(schema)}])


def json_object_grammar() -> str:
    """Any JSON object."""
    return json_schema_grammar({"type": "object"})


def json_rule(schema: Any) -> str:
    """`%json {...}` for a schema inside a Lark grammar, with the same rules on white space and keywords."""
    return "%json " + json.dumps(enforceable(schema), ensure_ascii=False)


def regex_grammar(pattern: str) -> str:
    """Text that the whole of a regular expression (Rust's syntax, without look-around) matches."""
    if not pattern:
        raise RequestError("The regular expression is empty.")
    return _dump([{"name": "regex", "lark_grammar": f"start: {regex_literal(pattern)}"}])


def choice_grammar(choices: Sequence[str]) -> str:
    """One of the strings. Raises RequestError for none, too many, or an empty one."""
    if not 0 < len(choices) <= MAX_CHOICES or not all(choices):
        raise RequestError(f"Choices are 1 to {MAX_CHOICES} strings, none of them empty.")
    literals = " | ".join(map(text_literal, dict.fromkeys(choices)))
    return _dump([{"name": "choice", "lark_grammar": f"start: CHOICE\nCHOICE: {literals}"}])


def lark_grammar(text: str) -> str:
    """A context-free grammar: Lark with a rule `start`, or GBNF (EBNF with `::=`) with a rule `root`.

    Raises RequestError; whether Lark text is right, `check_grammar` finds.
    """
    _check_size(text)
    if not text.strip():
        raise RequestError("The grammar is empty.")
    if "::=" in text:
        text = _from_gbnf(text)
    for match in _RULE_OPTIONS.finditer(text):
        if option := _REFUSED_OPTION.search(match[1]):
            line = text.count("\n", 0, match.start()) + 1
            raise RequestError(f"Line {line}: the rule option {option[1]} is not supported.")
    return _dump([{"name": "lark", "lark_grammar": text}])


def after(prefix_regex: str, grammar: str, *, token: str | None = None) -> str:
    """Text that `prefix_regex` matches, taken as short as possible, and then what `grammar` says.

    The prefix is open-ended unless something closes it: the end of the expression (`(?s:.*)</think>`), or
    `token`, a control token spelled as in the vocabulary ("<|end|>"), which an expression cannot match.
    """
    top, *others = json.loads(grammar)["grammars"]
    body = {**top, "name": f"after-{top['name']}"}
    prefix = regex_literal(prefix_regex)
    rules = f"start: prefix {token or ''} @{body['name']}\nprefix{'' if token else '[lazy]'}: {prefix}"
    return _dump([{"name": body["name"] + "-prefix", "lark_grammar": rules}, body, *others])


def text_literal(text: str) -> str:
    """`text` as a Lark string."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\x7f")


def regex_literal(pattern: str) -> str:
    """`pattern` between the slashes of a Lark regular expression."""
    _check_size(pattern)
    escaped = re.sub(r"\\.|/|\n", _escape_in_regex, pattern, flags=re.DOTALL)
    return f"/{escaped}/"


def check_grammar(grammar: str, tokenizer: Tokenizer, *, param: str) -> None:
    """Raises RequestError, naming `param` and the keyword or line, for a grammar that cannot be enforced.

    Takes up to seconds for a large or hostile one; nothing for one that was checked before.
    """
    from gqa_serve.engine.grammar_compiler import GrammarError, compiler_for

    try:
        compiler_for(tokenizer).compile(grammar)
    except GrammarError as error:
        raise RequestError(str(error), param=param) from error


def warm_up(tokenizer: Tokenizer) -> None:
    """Do now what the first `check_grammar` would do beside others' requests, holding the interpreter."""
    from gqa_serve.engine.grammar_compiler import compiler_for

    compiler_for(tokenizer).warm_up()


def _escape_in_regex(match: re.Match[str]) -> str:
    return {"/": r"\/", "\n": r"\n", "\\\n": r"\n"}.get(match[0], match[0])


def _from_gbnf(text: str) -> str:
    from llguidance.gbnf_to_lark import GbnfToLarkError, gbnf_to_lark

    if text.count("::=") > MAX_GBNF_RULES:
        raise RequestError(f"A GBNF grammar may have {MAX_GBNF_RULES} rules; write it as Lark.")
    try:
        return gbnf_to_lark(text)
    except (GbnfToLarkError, IndexError) as error:
        raise RequestError(f"The GBNF grammar is wrong: {one_line(error)}.") from error
    except RecursionError as error:
        raise RequestError("The GBNF grammar is nested too deeply.") from error
    except Exception as error:  # the converter's own way to say that a rule is missing or named twice
        if type(error) is not Exception:
            raise
        raise RequestError(f"The GBNF grammar is wrong: {one_line(error)}.") from error


def one_line(message: object) -> str:
    """A message of llguidance, which may quote all of the grammar, as a piece of a short sentence."""
    text = re.sub(r"\s+", " ", str(message).replace("<non-verbose/>", "")).strip().rstrip(".")
    return text if len(text) <= MAX_MESSAGE_CHARS else text[:MAX_MESSAGE_CHARS] + "..."


def _check_size(text: str) -> None:
    if len(text) > MAX_GRAMMAR_CHARS:
        raise RequestError(f"A schema or grammar may have {MAX_GRAMMAR_CHARS} characters.")


def _dump(grammars: list[dict[str, Any]]) -> str:
    try:
        text = json.dumps({"grammars": grammars}, ensure_ascii=False, allow_nan=False)
        text.encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise RequestError(f"The schema or grammar cannot be written as JSON: {error}.") from error
    _check_size(text)
    return text
