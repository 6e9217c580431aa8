"""`/openapi.json`: every route as OpenAPI 3.1, from the same msgspec types that decode and encode it.

Owns how types, errors and refused fields are described; `operations.py` says which routes there are. Knows
endpoints only by their types and field rules. Invariant: what the description promises holds: a field the
server refuses allows only the values that are not refused, a status that is not listed is not answered.
"""

from __future__ import annotations

import dataclasses
import http
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import msgspec

from gqa_serve import __version__
from gqa_serve.api.access import OPEN_PATHS
from gqa_serve.api.errors import ErrorBody
from gqa_serve.api.openapi.describable import Describer
from gqa_serve.api.params import FieldRules

_REF = "#/components/schemas/{name}"
_RETRY_AFTER = (429, 503)
_WHEN = {
    400: "A field is wrong (`param` names it), the body is no JSON object, or the prompt does not fit.",
    401: "No API key, or one that is not known.",
    403: "Only a program on the server's machine may ask, or one with an API key where keys are set.",
    404: "There is nothing of this name.",
    409: "It is being done for somebody else.",
    413: "The body is larger than `--max-body-bytes`.",
    429: "The queue is full, or the API key's limits are reached; `Retry-After` says when to try again.",
    500: "The engine failed to compute this request.",
    503: "The engine is loading, restarting or stopping; `Retry-After` says when to try again.",
    504: "What was asked for did not happen in time.",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Operation:
    """One method of one route."""

    method: str
    path: str  # as the route spells it, with `{id}` or `{id:path}`
    tag: str
    summary: str
    response: Any  # the type of the answer
    media_type: str = "application/json"
    request: Any = None  # the struct of the body
    rules: FieldRules | None = None  # what becomes of fields that `request` does not have
    stream: Any = None  # the type of each event's data, if the answer may be a stream
    done: bool = True  # whether the stream's last event is `data: [DONE]`
    errors: Sequence[int] = ()
    error: Any = ErrorBody
    query: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)  # name -> schema
    example: Mapping[str, Any] | None = None  # a body to try, but for `model`


def document(
    table: Sequence[Operation], *, root_path: str, secured: bool, model: str | None
) -> dict[str, Any]:
    """The whole description. `model` is the name that examples ask for, where one is known."""
    schemas = _Schemas(table)
    paths: dict[str, dict[str, Any]] = {}
    for operation in table:
        paths.setdefault(_template(operation.path), {})[operation.method] = _operation(
            operation, schemas, secured=secured, model=model
        )
    result: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {
            "title": "gqa-serve",
            "version": __version__,
            "description": "Language models for any client of OpenAI's API. Unknown fields are ignored.",
        },
        "servers": [{"url": root_path or "/"}],
        "tags": [{"name": tag} for tag in dict.fromkeys(operation.tag for operation in table)],
        "paths": paths,
        "components": {"schemas": schemas.components},
    }
    if secured:
        result["components"]["securitySchemes"] = {
            "bearer": {"type": "http", "scheme": "bearer"},
            "x-api-key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
        }
    return result


class _Schemas:
    """The schemas of all types at once, because the name of one depends on whether another has it too."""

    def __init__(self, table: Iterable[Operation]) -> None:
        found = [
            type
            for operation in table
            for type in (operation.request, operation.response, operation.stream, operation.error)
            if type is not None
        ]
        types = list(dict.fromkeys(found))
        describer = Describer(_REF)
        described = [describer.replace(type) for type in types]
        schemas, self.components = msgspec.json.schema_components(
            [*described, *describer.found], ref_template=_REF
        )
        for name in [name for name in self.components if "." in name]:
            schemas, self.components = _renamed(name, (schemas, self.components))
        self._schemas: dict[Any, dict[str, Any]] = dict(zip(types, schemas, strict=False))
        for operation in table:
            if operation.rules is not None:
                name = self.of(operation.request)["$ref"].rpartition("/")[2]
                _add_other_fields(self.components[name], operation.rules)

    def of(self, type: Any) -> dict[str, Any]:
        """The schema of a type, by reference if it is a struct."""
        return self._schemas[type]


def _renamed(name: str, schemas: Any) -> Any:
    """`schemas` where one of two types of the same name is called by its API, not by its module."""
    module, _, plain = name.rpartition(".")
    module = module.rpartition(".")[2].removesuffix("protocol").removesuffix("answers")
    api = module.removesuffix("_").capitalize()
    text = msgspec.json.encode(schemas).decode()
    new = plain if api in ("", "Errors") else api + plain
    return msgspec.json.decode(text.replace(f'"{name}"', f'"{new}"').replace(f'/{name}"', f'/{new}"'))


def _template(path: str) -> str:
    return path.replace(":path}", "}")


def _add_other_fields(schema: dict[str, Any], rules: FieldRules) -> None:
    """Properties that the struct does not hold: refused ones with what they may be, and no-ops."""
    properties = schema["properties"]
    for name in sorted(rules.refused):
        properties[name] = {
            "enum": [None, *rules.refused[name]],
            "deprecated": True,
            "description": "Not supported: any other value is refused.",
        }
    for name in sorted(rules.no_ops - properties.keys()):
        properties[name] = {"description": "Accepted; there is nothing for it to do here."}


def _operation(
    operation: Operation, schemas: _Schemas, *, secured: bool, model: str | None
) -> dict[str, Any]:
    open_to_all = operation.path in OPEN_PATHS
    content: dict[str, Any] = {operation.media_type: {"schema": schemas.of(operation.response)}}
    if operation.stream is not None:
        content["text/event-stream"] = {"schema": _event(operation, schemas)}
    statuses = [*operation.errors, *([] if open_to_all or not secured else [401])]
    result: dict[str, Any] = {
        "operationId": _operation_id(operation),
        "tags": [operation.tag],
        "summary": operation.summary,
        "responses": {
            "200": {"description": "The answer.", "headers": _headers(200), "content": content},
            **{str(status): _error(operation, schemas, status) for status in sorted(statuses)},
        },
    }
    text = {"type": "string", "minLength": 1}
    parameters: list[dict[str, Any]] = [
        {"name": name, "in": "path", "required": True, "schema": text}
        for name in re.findall(r"{(\w+)", operation.path)
    ]
    parameters += [
        {"name": name, "in": "query", "schema": schema} for name, schema in operation.query.items()
    ]
    if parameters:
        result["parameters"] = parameters
    if operation.request is not None:
        body: dict[str, Any] = {"schema": schemas.of(operation.request)}
        if operation.example is not None:
            body["example"] = {**({"model": model} if model else {}), **operation.example}
        result["requestBody"] = {"required": True, "content": {"application/json": body}}
    if secured:
        result["security"] = [] if open_to_all else [{"bearer": []}, {"x-api-key": []}]
    return result


def _event(operation: Operation, schemas: _Schemas) -> dict[str, Any]:
    """One server-sent event; an error takes the place of what could not be computed any more."""
    schema: dict[str, Any] = {"anyOf": [schemas.of(operation.stream), schemas.of(operation.error)]}
    data: dict[str, Any] = {"type": "string", "contentMediaType": "application/json", "contentSchema": schema}
    if operation.done:
        data = {"anyOf": [{"const": "[DONE]"}, data]}
    properties = {"event": {"type": "string"}, "data": data}
    return {"type": "object", "required": ["data"], "properties": properties}


def _operation_id(operation: Operation) -> str:
    words = operation.path.replace("{", "").replace("}", "").replace(":path", "").strip("/").split("/")
    return "_".join([operation.method, *words])


def _error(operation: Operation, schemas: _Schemas, status: int) -> dict[str, Any]:
    return {
        "description": f"{http.HTTPStatus(status).phrase}. {_WHEN[status]}",
        "headers": _headers(status),
        "content": {"application/json": {"schema": schemas.of(operation.error)}},
    }


def _headers(status: int) -> dict[str, Any]:
    headers: dict[str, Any] = {
        "X-Request-Id": {
            "description": "The request's own id, or one made for it.",
            "required": True,
            "schema": {"type": "string", "minLength": 1, "maxLength": 128},
        }
    }
    if status in _RETRY_AFTER:
        seconds = {"type": "integer", "minimum": 1}
        headers["Retry-After"] = {"description": "Seconds.", "required": True, "schema": seconds}
    if status == 401:
        headers["WWW-Authenticate"] = {"required": True, "schema": {"const": "Bearer"}}
    return headers
