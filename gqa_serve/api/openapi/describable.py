"""Types as msgspec's JSON schemas can describe them, where they are more than msgspec could decode.

An answer's type may be a union of structs told apart by a plain `type` field: msgspec encodes it, but
describes only what it can decode. Owns the replacement of such unions by a choice of references. Knows
nothing of endpoints. Invariant: a type without such a union comes back as it is; structs that hold themselves
must be such types.
"""

from __future__ import annotations

import types
import typing
from typing import Annotated, Any

import msgspec


class Describer:
    """Replaces what cannot be described; `found` are the structs that the replacements refer to."""

    def __init__(self, ref_template: str) -> None:
        self._ref = ref_template
        self._known: dict[type, Any] = {}
        self.found: list[Any] = []

    def replace(self, hint: Any) -> Any:
        """`hint` itself, or a type with the same JSON that can be described."""
        if isinstance(hint, type) and issubclass(hint, msgspec.Struct):
            return self._struct(hint)
        origin, args = typing.get_origin(hint), typing.get_args(hint)
        if origin is Annotated or not args:
            return hint
        replaced = tuple(self.replace(arg) for arg in args)
        if origin in (typing.Union, types.UnionType):
            return self._union(hint, args, replaced)
        same = all(new is old for new, old in zip(replaced, args, strict=True))
        return hint if same or origin is typing.Literal else origin[replaced]

    def _struct(self, struct: type[msgspec.Struct]) -> Any:
        if struct in self._known:
            return self._known[struct]
        self._known[struct] = struct
        fields = msgspec.structs.fields(struct)
        replaced = [self.replace(field.type) for field in fields]
        if any(new is not field.type for new, field in zip(replaced, fields, strict=True)):
            self._known[struct] = msgspec.defstruct(
                struct.__name__,
                [
                    (field.encode_name, new, msgspec.field(**_default(field)))
                    for new, field in zip(replaced, fields, strict=True)
                ],
                namespace={"__doc__": struct.__doc__},
                module=struct.__module__,
                kw_only=True,
            )
        return self._known[struct]

    def _union(self, hint: Any, args: tuple[Any, ...], replaced: tuple[Any, ...]) -> Any:
        structs = [arg for arg in replaced if isinstance(arg, type) and issubclass(arg, msgspec.Struct)]
        if len(structs) < 2:
            same = all(new is old for new, old in zip(replaced, args, strict=True))
            return hint if same else typing.Union[replaced]  # noqa: UP007 (a tuple of any length)
        self.found += structs
        choices: list[dict[str, Any]] = [{"$ref": self._ref.format(name=one.__name__)} for one in structs]
        choices += [msgspec.json.schema(other) for other in replaced if other not in structs]
        return Annotated[Any, msgspec.Meta(extra_json_schema={"anyOf": choices})]


def _default(field: msgspec.structs.FieldInfo) -> dict[str, Any]:
    if field.default_factory is not msgspec.NODEFAULT:
        return {"default_factory": field.default_factory}
    return {} if field.required else {"default": field.default}
