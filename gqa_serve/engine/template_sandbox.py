"""The Jinja environment that chat templates run in: no way to Python, and an end to what a rendering costs.

A template comes with a model, from wherever that came from. Jinja's sandbox keeps it from attributes that
lead to code; this module adds a limit on time, looked at in each round of each loop and at each call, filter
and operator, and limits on what one operation may make ("a" * 10**10) and on all that is written, be it into
a variable. Knows no messages. Invariant: whatever a template does, it ends within about `MAX_RENDER_S`, or in
one native operation on at most `MAX_TEXT_CHARS` characters.
"""

from __future__ import annotations

import functools
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

MAX_RENDER_S = 10.0
MAX_TEXT_CHARS = 64 * 1024 * 1024
_MAX_NUMBER = 100_000  # of copies, columns, digits: as Jinja's own range() has it
_MAX_BITS = 4096  # of an integer
_TICK, _CONCAT = "gqa_tick", "gqa_concat"
_WIDTH = re.compile(r"\d{6}|\*|:[^{}]*\{")  # of a field, in either kind of format
_BINARY = frozenset({"+", "-", "*", "/", "//", "%", "**"})
_LENGTHENING = ("center", "ljust", "rjust", "zfill", "expandtabs", "join", "replace", "format", "translate")


class TemplateLimitError(jinja2.TemplateError):
    """The template wants too much time or too large a value."""


class TemplateEnvironment(ImmutableSandboxedEnvironment):
    """A sandbox whose templates end; `limited` sets the clock for a rendering in this thread."""

    intercepted_binops = _BINARY

    def __init__(self, **options: Any) -> None:
        # An optimizer would compute constants while compiling.
        super().__init__(**options, optimized=False, finalize=self._written)
        self._clock = threading.local()
        self.globals.pop("lipsum")  # as much text as its argument says
        self.globals |= {_TICK: self.tick, _CONCAT: _concat}
        self.filters = {name: self._bounded(filter) for name, filter in self.filters.items()}

    def add_filter(self, name: str, filter: Callable[..., Any]) -> None:
        """A filter of our own, as bounded as Jinja's."""
        self.filters[name] = self._bounded(filter)

    @contextmanager
    def limited(self, seconds: float | None = None) -> Iterator[None]:
        """Renderings inside raise TemplateLimitError after so many seconds (default: MAX_RENDER_S)."""
        self._clock.end = time.monotonic() + (MAX_RENDER_S if seconds is None else seconds)
        self._clock.written = 0
        try:
            yield
        finally:
            self._clock.end = None

    def tick(self) -> str:
        """Nothing; raises TemplateLimitError when the time is over."""
        end = getattr(self._clock, "end", None)
        if end is not None and time.monotonic() > end:
            raise TemplateLimitError(f"it did not finish within {MAX_RENDER_S:g} seconds")
        return ""

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        """As parsed, with a look at the clock in each round of each loop, and `~` as an operator to check."""
        tree: nodes.Template = _CheckedConcat().visit(super()._parse(source, name, filename))
        for loop in tree.find_all(nodes.For):
            tick = nodes.Call(nodes.Name(_TICK, "load"), [], [], None, None)
            loop.body.insert(0, nodes.ExprStmt(tick).set_lineno(loop.lineno))
        tree.set_environment(self)
        return tree

    def _written(self, value: Any) -> Any:
        """`value`, which is written somewhere; what is written twice counts twice."""
        self._clock.written = getattr(self._clock, "written", 0) + _text_size(value)
        _check_size(self._clock.written)
        return value

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """The operation, unless its result is too large."""
        self.tick()
        if operator == "*":
            for one, other in ((left, right), (right, left)):
                if isinstance(one, int) and hasattr(other, "__len__"):
                    _check_size(one * len(other))
                    if not isinstance(other, str):
                        _check_number(one * len(other))
        if operator in ("*", "**") and isinstance(left, int) and isinstance(right, int):
            bits = left.bit_length() * right if operator == "**" else left.bit_length() + right.bit_length()
            if bits > _MAX_BITS:
                raise TemplateLimitError("it computes a number that is too large")
        if operator == "%" and isinstance(left, str | bytes):
            _check_format(left)
        if operator == "+" and isinstance(left, str) and isinstance(right, str):
            _check_size(len(left) + len(right))
        return super().call_binop(context, operator, left, right)

    def call(self, context: Context, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        """The call, in time and with arguments that are not too large."""
        self.tick()
        if getattr(function, "__name__", None) in _LENGTHENING and isinstance(
            getattr(function, "__self__", None), str | bytes
        ):
            _check_lengthening(function.__name__, function.__self__, args)
        result = super().call(context, function, *args, **kwargs)
        if isinstance(result, str):
            _check_size(len(result))
        return result

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """What Jinja calls for the methods `format` and `format_map` of texts."""
        if isinstance(text := getattr(value, "__self__", None), str) and value.__name__.startswith("format"):
            _check_format(text)
        return super().wrap_str_format(value)

    def _bounded(self, filter: Callable[..., Any]) -> Callable[..., Any]:
        """`filter`, in time and with arguments that are not too large."""

        @functools.wraps(filter)  # Jinja's marks on it, too
        def bounded(*args: Any, **kwargs: Any) -> Any:
            self.tick()
            for value in (*args, *kwargs.values()):
                if isinstance(value, int) and filter.__name__ not in _ARITHMETIC:
                    _check_number(value)
            if filter.__name__ in _PRINTING:
                _check_size(sum(map(_text_size, args)))
            if filter.__name__ == "do_format":
                _check_format(str(args[0]))
            if filter.__name__ == "do_replace" and len(args) > 3:
                _check_lengthening("replace", str(args[1]), tuple(map(str, args[2:4])))
            return filter(*args, **kwargs)

        return bounded


class _CheckedConcat(NodeTransformer):
    """Makes `a ~ b` a call, which can be checked."""

    def visit_Concat(self, node: nodes.Concat) -> nodes.Call:
        self.generic_visit(node)
        call = nodes.Call(nodes.Name(_CONCAT, "load"), node.nodes, [], None, None)
        call.set_lineno(node.lineno)
        return call


def _concat(*values: Any) -> str:
    _check_size(sum(map(_text_size, values)))
    return "".join(map(str, values))


def _text_size(value: Any) -> int:
    """About how many characters `value` has as text; at most a little more than the limit."""
    if isinstance(value, str):
        return len(value)
    size, inside = 0, [value]
    while inside and size <= MAX_TEXT_CHARS:
        item = inside.pop()
        if isinstance(item, dict):
            inside += [*item, *item.values()]
        elif isinstance(item, list | tuple):
            inside += item
        else:
            size += len(item) if isinstance(item, str) else 1
    return size


_PRINTING = frozenset(
    {"_tojson", "do_tojson", "do_pprint", "soft_str", "do_join", "do_xmlattr", "do_urlencode"}
)
_ARITHMETIC = frozenset({"abs", "do_int", "do_float", "do_round", "str", "soft_str", "do_filesizeformat"})


def _check_lengthening(name: str, text: Any, args: tuple[Any, ...]) -> None:
    """Raises TemplateLimitError if the method `name` of `text` would make too much of it."""
    for value in args:
        if isinstance(value, int):
            _check_number(value)
    if name == "replace" and len(args) >= 2 and isinstance(args[0], str) and isinstance(args[1], str):
        _check_size((text.count(args[0]) if args[0] else len(text) + 1) * len(args[1]))
    if name == "join" and args and isinstance(args[0], list | tuple):
        _check_size(_text_size(args[0]) + len(text) * len(args[0]))
    if name == "format":
        _check_format(text)


def _check_format(text: str | bytes) -> None:
    if _WIDTH.search(text.decode("latin-1") if isinstance(text, bytes) else text):
        raise TemplateLimitError("it formats with a field that is too wide")


def _check_size(size: int) -> None:
    if size > MAX_TEXT_CHARS:
        raise TemplateLimitError(f"it makes a text of more than {MAX_TEXT_CHARS} characters")


def _check_number(number: int) -> None:
    if number > _MAX_NUMBER:
        raise TemplateLimitError(f"it repeats, counts or pads to more than {_MAX_NUMBER}")
