"""Keys, origins, path prefixes and request ids: what happens to a request before any endpoint sees it."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path

import anthropic
import httpx2
import openai
import pytest
from fake_engine import MODEL, FakeEngine, Script, Server, fake_tokenizer, serving, wait_until
from test_api_raw import CHAT, HI, Reply, chat, get, post, send

from gqa_serve.api import access
from gqa_serve.api.access import load_keys
from gqa_serve.api.app import create_app, routes
from gqa_serve.api.metrics import Metrics
from gqa_serve.api.serving import ServingContext
from gqa_serve.config import ServerConfig
from gqa_serve.engine.chat_template import ChatTemplate
from gqa_serve.errors import ConfigError
from gqa_serve.settings import from_settings

KEYS = ("sk-one", "sk-two")
PAGE = "https://chat.example.org"


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    file = tmp_path_factory.mktemp("keys") / "keys.txt"
    file.write_text("# for the agents\n\n  sk-from-file  \r\nsk-#2\n")
    settings = {"api_key": KEYS, "api_key_file": str(file), "cors_origins": (PAGE,)}
    with serving(FakeEngine(), **settings) as server:
        yield server


# --- keys --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", [*KEYS, "sk-from-file", "sk-#2"])
def test_each_key_opens(guarded: Server, key: str) -> None:
    with openai.OpenAI(base_url=f"{guarded.url}/v1", api_key=key, max_retries=0) as client:
        answer = client.chat.completions.create(**HI)
        assert answer.choices[0].message.content == "Hello world"
        assert client.models.list().data
    for header in (f"x-api-key: {key}", f"authorization: bearer   {key} "):
        assert send(guarded, post(CHAT, json.dumps(HI).encode(), header)).status == 200


@pytest.mark.parametrize(
    "key", ["sk-", "sk-one ", "sk-one,sk-two", "sk-oneX", "for the agents", "# for the agents"]
)
def test_no_other_key_opens(guarded: Server, key: str) -> None:
    known = key.strip() in KEYS
    with openai.OpenAI(base_url=f"{guarded.url}/v1", api_key="x", max_retries=0) as client:
        with pytest.raises(openai.AuthenticationError) as caught:
            client.chat.completions.create(**HI)
        assert caught.value.code == "invalid_api_key"
    for header in (f"Authorization: Bearer {key}", f"x-api-key: {key}"):
        assert send(guarded, post(CHAT, json.dumps(HI).encode(), header)).status == (200 if known else 401)


@pytest.mark.parametrize(
    "headers",
    [
        (),
        ("Authorization: sk-one",),
        ("Authorization: Basic sk-one",),
        ("Authorization: Bearer",),
        ("Authorization: Bearer \xff\xfe",),
        ("x-api-key:",),
        ("x-api-key: 1", "x-api-key: 2", "x-api-key: 3", "x-api-key: 4", "x-api-key: sk-one"),
    ],
)
def test_what_is_no_key(guarded: Server, headers: tuple[str, ...]) -> None:
    reply = send(guarded, post(CHAT, json.dumps(HI).encode(), *headers))
    assert reply.status == 401
    assert reply.error["code"] == "invalid_api_key"
    assert reply.error["type"] == "invalid_request_error"
    assert reply.headers["www-authenticate"] == "Bearer"
    assert reply.headers["x-request-id"]


def test_a_connection_lives_on_after_a_refused_key(guarded: Server) -> None:
    with guarded.connect() as connection, connection.makefile("rb") as stream:
        for _ in range(2):
            connection.sendall(post(CHAT, b"x" * 200_000))  # which nobody reads
            assert Reply(stream).status == 401
            connection.sendall(post(CHAT, json.dumps(HI).encode(), "x-api-key: sk-one"))
            assert Reply(stream).status == 200


def test_anthropics_clients_read_the_error_in_their_shape(guarded: Server) -> None:
    client = anthropic.Anthropic(base_url=guarded.url, api_key="wrong", max_retries=0)
    with client, pytest.raises(anthropic.AuthenticationError) as caught:
        client.messages.create(model=MODEL, max_tokens=5, messages=HI["messages"])  # type: ignore[arg-type]
    body = caught.value.body
    assert isinstance(body, dict)
    assert set(body) == {"type", "error"}
    assert body["type"] == "error"
    assert body["error"]["type"] == "authentication_error"


def test_every_path_is_guarded_but_those_named(guarded: Server) -> None:
    context = ServingContext(  # type: ignore[arg-type]
        guarded.engine, fake_tokenizer(), ChatTemplate(""), ServerConfig(), Metrics(guarded.engine)
    )
    open_paths = set()
    for route in routes(context):
        assert route.methods is not None
        assert "OPTIONS" not in route.methods  # which is let through
        method = min(route.methods)
        status = send(
            guarded, get(route.path.replace("{id:path}", MODEL).replace("{id}", "x"), method)
        ).status
        if status != 401:
            open_paths.add(route.path)
    assert open_paths <= access.OPEN_PATHS
    assert {"/health", "/ready", "/version"} <= open_paths
    for path in (
        "/nowhere",
        "/ui/",
        "/ui/state",
        "/ui/x.js",
        "//health",
        "/health/",
        "/v1/../health",
        "/HEALTH",
        "/openapi.json/x",
    ):
        assert send(guarded, get(path)).status == 401


def test_keys_are_compared_as_digests_and_all_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    compared = []

    def compare(known: bytes, given: bytes) -> bool:
        compared.append((known, given))
        return known == given

    monkeypatch.setattr(access.hmac, "compare_digest", compare)
    with serving(FakeEngine(), api_key=KEYS) as server:
        assert send(server, post(CHAT, json.dumps(HI).encode(), "x-api-key: sk-one")).status == 200
    assert len(compared) == 2
    assert all(len(known) == len(given) == 32 for known, given in compared)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "holds no keys"),
        (b"# only a comment\n", "holds no keys"),
        (b"good\nsecret word\n", "line 2 must be printable ASCII"),
        ("good\nsecr\u00e9t\n".encode(), "line 2 must be printable ASCII"),
        (b"\xff\xfesecret", "is not a text file in UTF-8"),
        (b"secret\n" * 200_000, "is larger than"),
        (None, "No such file"),
    ],
)
def test_a_key_file_with_mistakes(tmp_path: Path, content: bytes | None, says: str) -> None:
    file = tmp_path / "keys"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        create_app(
            FakeEngine(),  # type: ignore[arg-type]
            fake_tokenizer(),
            ChatTemplate(""),
            ServerConfig(api_key_file=str(file)),
        )
    message = str(caught.value)
    assert message.startswith(f"--api-key-file {file}")
    assert says in message
    assert "secr" not in message
    assert caught.value.__cause__ is None or "secr" not in repr(caught.value.__cause__)


def test_settings_never_show_a_key() -> None:
    assert "secret" not in repr(ServerConfig(api_key=("secret",)))
    with pytest.raises(ConfigError) as caught:
        from_settings(ServerConfig, {"api_key": "secret,,secret"})
    assert str(caught.value) == "api_key must be text or a list."
    with pytest.raises(ConfigError) as caught:
        load_keys(ServerConfig(api_key=("ok", "secret key")))
    assert "secret" not in str(caught.value)
    assert "key 2" in str(caught.value)


def test_logs_show_no_key(guarded: Server, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG):
        for key in ("sk-one", "sk-wrong"):
            send(guarded, post(CHAT, json.dumps(HI).encode(), f"x-api-key: {key}"))
    assert "sk-" not in caplog.text


# --- origins -----------------------------------------------------------------------------------------------

PREFLIGHT = (
    "Access-Control-Request-Method: POST",
    "Access-Control-Request-Headers: authorization,content-type",
)


def preflight(server: Server, origin: str, *headers: str) -> httpx2.Response:
    fields = dict(line.split(": ") for line in (*PREFLIGHT, *headers))
    return httpx2.request("OPTIONS", server.url + CHAT, headers={"Origin": origin, **fields})


def test_no_page_may_call_by_default(server: Server) -> None:
    assert preflight(server, PAGE).status_code == 405
    response = httpx2.get(f"{server.url}/v1/models", headers={"Origin": PAGE})
    assert not [name for name in response.headers if name.startswith("access-control")]


def test_a_page_that_may_call(guarded: Server) -> None:
    response = preflight(guarded, PAGE)
    assert response.status_code == 200
    assert response.headers["access-control-allow-origin"] == PAGE
    assert response.headers["access-control-allow-headers"] == "authorization,content-type"
    assert "POST" in response.headers["access-control-allow-methods"]
    assert response.headers["x-request-id"]
    fields = {"Origin": PAGE, "x-api-key": "sk-one"}
    for body, status in ((HI, 200), ({**HI, "stream": True}, 200), ({}, 400)):
        response = httpx2.post(guarded.url + CHAT, json=body, headers=fields)
        assert response.status_code == status
        assert response.headers["access-control-allow-origin"] == PAGE
        assert response.headers["access-control-allow-credentials"] == "true"
        assert "X-Request-Id" in response.headers["access-control-expose-headers"]
    response = httpx2.post(guarded.url + CHAT, json=HI, headers={"Origin": PAGE})
    assert (response.status_code, response.headers["access-control-allow-origin"]) == (401, PAGE)


def test_a_public_page_may_call_a_server_at_home(guarded: Server) -> None:
    """Browsers ask for more in the preflight then, and give up where it is refused."""
    response = preflight(guarded, PAGE, "Access-Control-Request-Private-Network: true")
    assert response.status_code == 200
    assert response.headers["access-control-allow-private-network"] == "true"


def test_an_answer_to_a_bug_can_be_read_by_the_page(guarded: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: ServingContext) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(ServingContext, "model_names", property(broken))
    headers = {"Origin": PAGE, "x-api-key": "sk-one", "X-Request-Id": "mine"}
    response = httpx2.get(f"{guarded.url}/v1/models", headers=headers)
    assert (response.status_code, response.headers["access-control-allow-origin"]) == (500, PAGE)
    assert response.headers["x-request-id"] == "mine"
    assert response.json()["error"]["code"] == "internal_error"


@pytest.mark.parametrize(
    "origin", ["https://evil.example", PAGE + ".evil.example", "null", "http://chat.example.org"]
)
def test_another_page(guarded: Server, origin: str) -> None:
    response = preflight(guarded, origin)
    assert response.status_code == 400
    assert response.json()["error"]["code"] == "cors_refused"
    assert "access-control-allow-origin" not in response.headers
    response = httpx2.get(f"{guarded.url}/health", headers={"Origin": origin})
    assert "access-control-allow-origin" not in response.headers


def test_every_page_but_without_cookies() -> None:
    with serving(FakeEngine(), cors_origins=("*",)) as server:
        for response in (
            preflight(server, "https://any.example"),
            httpx2.get(f"{server.url}/v1/models", headers={"Origin": "https://any.example"}),
        ):
            assert response.headers["access-control-allow-origin"] == "*"
            assert "access-control-allow-credentials" not in response.headers


# --- path prefix -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["/llm", "/a/b-c"])
@pytest.mark.parametrize("strips", [True, False])
def test_behind_a_proxy_with_a_prefix(prefix: str, strips: bool) -> None:
    with serving(FakeEngine(), root_path=prefix, api_key=KEYS) as server:
        base = server.url if strips else server.url + prefix
        with openai.OpenAI(base_url=f"{base}/v1", api_key="sk-two", max_retries=0) as client:
            assert client.chat.completions.create(**HI).choices[0].message.content == "Hello world"
            assert client.models.retrieve(MODEL).id == MODEL
        assert httpx2.get(f"{base}/health").status_code == 200
        assert httpx2.get(f"{base}/v1/models").status_code == 401
        unknown = httpx2.get(f"{base}/nowhere", headers={"x-api-key": "sk-one"})
        assert unknown.status_code == 404
        assert f"{prefix}/nowhere" in unknown.json()["error"]["message"]


def test_a_prefix_is_a_whole_part_of_the_path() -> None:
    with serving(FakeEngine(), root_path="/llm") as server:
        for path in ("/llmhealth", "/llm/llm", "/llm/llm/health", "/x/llm/health"):
            assert httpx2.get(server.url + path).status_code == 404


# --- request ids -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
def test_the_clients_id_is_in_the_answer_and_the_log(
    server: Server, caplog: pytest.LogCaptureFixture, stream: bool
) -> None:
    body = json.dumps({**HI, "stream": stream}).encode()
    with caplog.at_level(logging.INFO, "gqa_serve.api.account"):
        reply = send(server, post(CHAT, body, "X-Request-Id: trace-7/a"))
        wait_until(lambda: "finish=" in caplog.text)
    assert reply.headers["x-request-id"] == "trace-7/a"
    (message,) = [record.getMessage() for record in caplog.records]
    assert message.split()[0].startswith("chatcmpl-")
    assert message.split()[1] == "(trace-7/a)"


@pytest.mark.parametrize("given", ["", "x" * 129, "a b", "caf\u00e9", "a\tb"])
def test_an_id_that_cannot_be_used_is_replaced(server: Server, given: str) -> None:
    reply = send(server, post(CHAT, json.dumps(HI).encode(), f"X-Request-Id: {given}"))
    assert reply.status == 200
    assert reply.headers["x-request-id"] == json.loads(reply.body)["id"]


@pytest.mark.parametrize("path", ["/health", "/nowhere", CHAT])
def test_every_response_has_an_id(server: Server, path: str) -> None:
    first, second = (send(server, get(path)).headers["x-request-id"] for _ in range(2))
    assert first.startswith("req-")
    assert first != second
    assert send(server, post(CHAT, b"{", "X-Request-Id: " + "x" * 128)).headers["x-request-id"] == "x" * 128
    assert send(server, b"nonsense\r\n\r\n").headers["x-request-id"].startswith("req-")


# --- names -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [MODEL, "alias"])
def test_answers_carry_the_name_that_was_asked_for(server: Server, engine: FakeEngine, name: str) -> None:
    engine.script = lambda request: Script(["a", "b"])
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="x", max_retries=0) as client:
        messages = [{"role": "user", "content": "Hi"}]
        usage = {"include_usage": True}
        answers = [
            client.chat.completions.create(model=name, messages=messages),  # type: ignore[arg-type]
            client.completions.create(model=name, prompt="p"),
            *client.chat.completions.create(model=name, messages=messages, stream=True, stream_options=usage),  # type: ignore
            *client.completions.create(model=name, prompt="p", stream=True, stream_options=usage),  # type: ignore
        ]
        assert {answer.model for answer in answers} == {name}
        assert client.models.retrieve(name).id == name
    assert json.loads(chat(server, model=name).body)["model"] == name
