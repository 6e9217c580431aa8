"""`/openapi.json` describes the routes there are, truthfully; `/docs` shows it and loads nothing else."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import httpx2
import jsonschema_rs
import pytest
from fake_engine import MODEL, FakeEngine, Server, fake_tokenizer, serving
from test_api_raw import CHAT, HI, TEXT, chat, complete, get, post, send

import gqa_serve
from gqa_serve.api.app import create_app, routes
from gqa_serve.api.metrics import Metrics
from gqa_serve.api.openapi import document as openapi
from gqa_serve.api.openapi.operations import operations
from gqa_serve.api.serving import ServingContext
from gqa_serve.config import ServerConfig
from gqa_serve.engine.chat_template import ChatTemplate


@pytest.fixture
def description(server: Server) -> dict[str, Any]:
    reply = send(server, get("/openapi.json"))
    assert reply.headers["content-type"] == "application/json"
    value: dict[str, Any] = json.loads(reply.body)
    return value


def test_it_says_under_which_prefix_the_server_is_found() -> None:
    app = create_app(FakeEngine(), fake_tokenizer(), ChatTemplate(""), ServerConfig())

    async def servers(root_path: str) -> list[dict[str, str]]:
        transport = httpx2.ASGITransport(app, root_path=root_path)  # as a server does that has one
        async with httpx2.AsyncClient(transport=transport, base_url="http://localhost") as client:
            found: list[dict[str, str]] = (await client.get(f"{root_path}/openapi.json")).json()["servers"]
            return found

    assert asyncio.run(servers("")) == [{"url": "/"}]
    assert asyncio.run(servers("/llm")) == [{"url": "/llm"}]
    with serving(FakeEngine(), root_path="/llm") as prefixed:
        reply = send(prefixed, get("/llm/openapi.json"))
        assert json.loads(reply.body)["servers"] == [{"url": "/llm"}]


def test_routes_and_operations_are_the_same(server: Server) -> None:
    context = ServingContext(  # type: ignore[arg-type]
        server.engine, fake_tokenizer(), ChatTemplate(""), ServerConfig(), Metrics(server.engine)
    )
    served = {
        (method.lower(), route.path)
        for route in routes(context)
        for method in (route.methods or set()) - {"HEAD"}  # which starlette adds to GET
    }
    described = {(operation.method, operation.path) for operation in operations()}
    assert described == served


def test_every_reference_resolves_and_every_schema_is_one(description: dict[str, Any]) -> None:
    schemas = description["components"]["schemas"]
    text = json.dumps(description)
    for name in re.findall(r'"#/components/schemas/([^"]+)"', text):
        assert name in schemas
    assert text.count('"$ref"') == text.count("#/components/schemas/")
    for name in schemas:
        jsonschema_rs.Draft202012Validator(
            {"$ref": f"#/components/schemas/{name}", **_components(description)}
        )
    ids = [one["operationId"] for methods in description["paths"].values() for one in methods.values()]
    assert len(ids) == len(set(ids))


def _components(description: dict[str, Any]) -> dict[str, Any]:
    return {"components": description["components"]}


def validator(description: dict[str, Any], name: str) -> jsonschema_rs.Draft202012Validator:
    return jsonschema_rs.Draft202012Validator(
        {"$ref": f"#/components/schemas/{name}", **_components(description)}
    )


@pytest.mark.parametrize(
    ("path", "request_name", "response_name"),
    [(CHAT, "ChatRequest", "ChatCompletion"), (TEXT, "CompletionRequest", "TextCompletion")],
)
def test_examples_are_answered_as_described(
    server: Server, description: dict[str, Any], path: str, request_name: str, response_name: str
) -> None:
    content = description["paths"][path]["post"]["requestBody"]["content"]["application/json"]
    example = content["example"]
    assert example["model"] == MODEL
    assert content["schema"] == {"$ref": f"#/components/schemas/{request_name}"}
    validator(description, request_name).validate(example)
    reply = send(server, post(path, json.dumps({**example, "max_tokens": 3}).encode()))
    assert reply.status == 200
    validator(description, response_name).validate(json.loads(reply.body))
    assert not validator(description, response_name).is_valid({})


def test_answers_with_everything_and_chunks_fit_their_schemas(
    server: Server, description: dict[str, Any]
) -> None:
    usage = {"include_usage": True}
    for fields in ({"logprobs": True, "top_logprobs": 2, "n": 2}, {}):
        whole = chat(server, **fields)
        validator(description, "ChatCompletion").validate(json.loads(whole.body))
        stream = chat(server, **fields, stream=True, stream_options=usage)
        events = re.findall(rb"data: (\{.*)\n\n", stream.body)
        assert len(events) > 3
        for event in events:
            validator(description, "ChatChunk").validate(json.loads(event))
    for stream_too in (False, True):
        reply = complete(server, logprobs=2, echo=True, stream=stream_too, stream_options=usage)
        for text in re.findall(rb"data: (\{.*)\n\n", reply.body) if stream_too else [reply.body]:
            validator(description, "TextCompletion").validate(json.loads(text))


@pytest.mark.parametrize("path", [CHAT, TEXT])
def test_refused_fields_allow_only_what_is_accepted(server: Server, path: str) -> None:
    (operation,) = [one for one in operations() if one.path == path]
    table = openapi.document([operation], root_path="", secured=False, model=None)
    properties = table["components"]["schemas"][operation.request.__name__]["properties"]
    refused = {name: field for name, field in properties.items() if field.get("deprecated")}
    assert refused
    needed = HI if path == CHAT else {"prompt": "p"}
    for name, field in refused.items():
        for value in field["enum"]:
            reply = send(server, post(path, json.dumps({**needed, name: value}).encode()))
            assert reply.status == 200, (name, value)
        reply = send(server, post(path, json.dumps({**needed, name: "no such value"}).encode()))
        assert (reply.status, reply.error["param"]) == (400, name)
    accepted = {
        name for name, field in properties.items() if "Accepted; there" in field.get("description", "")
    }
    assert {"user", "metadata"} <= accepted


def test_streams_are_described(description: dict[str, Any]) -> None:
    content = description["paths"][CHAT]["post"]["responses"]["200"]["content"]
    assert set(content) == {"application/json", "text/event-stream"}
    done, data = content["text/event-stream"]["schema"]["properties"]["data"]["anyOf"]
    assert done == {"const": "[DONE]"}
    assert {"$ref": "#/components/schemas/ChatChunk"} in data["contentSchema"]["anyOf"]


def test_keys_and_prefix_are_described(server: Server, description: dict[str, Any]) -> None:
    assert description["servers"] == [{"url": "/"}]
    assert "securitySchemes" not in description["components"]
    assert "401" not in description["paths"][CHAT]["post"]["responses"]
    with serving(FakeEngine(), api_key=("k",), root_path="/llm") as guarded:
        other = httpx2.get(f"{guarded.url}/llm/openapi.json").json()
    assert other["servers"] == [{"url": "/llm"}]
    assert set(other["components"]["securitySchemes"]) == {"bearer", "x-api-key"}
    assert other["paths"][CHAT]["post"]["security"] == [{"bearer": []}, {"x-api-key": []}]
    assert "401" in other["paths"][CHAT]["post"]["responses"]
    assert other["paths"]["/health"]["get"]["security"] == []
    assert "401" not in other["paths"]["/health"]["get"]["responses"]


# --- the page ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["", "/llm"])
def test_the_page_loads_nothing_but_the_description(prefix: str) -> None:
    with serving(FakeEngine(), root_path=prefix, api_key=("k",)) as server:
        page = httpx2.get(f"{server.url}{prefix}/docs")
    assert page.status_code == 200
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    assert re.findall(r"https?://|src=|@import|url\(", page.text) == []
    assert set(re.findall(r'(?:href=|fetch\()"([^"]*)"', page.text)) == {"openapi.json", "data:,"}
    assert (
        re.search(r"innerHTML|insertAdjacentHTML|\beval\b|document\.write|\son\w+=|style=", page.text) is None
    )


def test_the_policy_allows_the_pages_own_script_and_style_only(server: Server) -> None:
    page = httpx2.get(f"{server.url}/docs")
    policy = dict(part.strip().split(" ", 1) for part in page.headers["content-security-policy"].split(";"))
    assert policy["default-src"] == "'none'"
    for kind in ("script", "style"):
        (text,) = re.findall(rf"<{kind}>(.*?)</{kind}>", page.text, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert policy[f"{kind}-src"] == f"'sha256-{digest}'"
    assert policy["connect-src"] == "'self'"
    assert policy["frame-ancestors"] == "'none'"


def test_the_page_draws_every_route(tmp_path: Path, description: dict[str, Any]) -> None:
    node = shutil.which("node")
    if node is None:
        pytest.skip("node is not installed")
    page = Path(gqa_serve.__file__).parent / "api" / "web" / "docs.html"
    file = tmp_path / "openapi.json"
    file.write_text(json.dumps(description))
    command = [node, str(Path(__file__).with_name("stub_dom.js")), str(page), str(file)]
    result = json.loads(subprocess.run(command, check=True, capture_output=True, timeout=60).stdout)
    assert result["asked"] == ["openapi.json"]
    assert result["title"] == f"gqa-serve {gqa_serve.__version__}"
    operations = [one for methods in description["paths"].values() for one in methods.values()]
    assert set(result["texts"]) == {one["operationId"] for one in operations}
    chat_text = result["texts"]["post_v1_chat_completions"]
    assert f"curl http://host/llm{CHAT} " in chat_text
    assert f'-d \'{{"model":"{MODEL}"' in chat_text
    for name in ("top_logprobs", "finish_reason", "cached_tokens", "Too Many Requests", "text/event-stream"):
        assert name in chat_text
    assert "post_v1_chat_completions" in result["found"]
    assert "get_health" not in result["found"]
