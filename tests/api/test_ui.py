"""GET / and its files, and /ui/state: who gets what, with which headers; how often the engine is asked."""

from __future__ import annotations

import asyncio
import base64
import re
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx2
import pytest
from fake_engine import MODEL, FakeEngine, Server, fake_info, serving

import gqa_serve
from gqa_serve.api import ui
from gqa_serve.api.openapi.operations import operations
from gqa_serve.api.ui import MAX_REQUESTS, Pictures, picture_of
from gqa_serve.api.ui_files import FILES, PAGE, page_files
from gqa_serve.engine.metrics import BlockState, EngineSnapshot, RequestSnapshot
from gqa_serve.errors import EngineUnavailableError

WEB = Path(gqa_serve.__file__).parent / "api" / "web"


def get(server: Server, path: str, **headers: str) -> httpx2.Response:
    return httpx2.get(
        server.url + path, headers={name.replace("_", "-"): value for name, value in headers.items()}
    )


# --- files -------------------------------------------------------------------------------------------------


def test_the_table_names_every_file_of_the_folder() -> None:
    assert {path.name for path in WEB.iterdir()} == {PAGE, *FILES, "docs.html"}


@pytest.mark.parametrize("name", ["", *(f"ui/{name}" for name in FILES)])
def test_each_file_is_sent_once(server: Server, name: str) -> None:
    reply = get(server, f"/{name}")
    assert reply.status_code == 200
    assert reply.content == (WEB / (name.removeprefix("ui/") or PAGE)).read_bytes()
    kinds = {
        "": "text/html",
        "html": "text/html",
        "js": "text/javascript",
        "css": "text/css",
        "svg": "image/svg+xml",
    }
    assert reply.headers["content-type"].split(";")[0] == kinds[name.rpartition(".")[2]]
    assert reply.headers["cache-control"] == "no-cache"
    assert reply.headers["x-content-type-options"] == "nosniff"
    again = get(server, f"/{name}", if_none_match=reply.headers["etag"])
    assert (again.status_code, again.content) == (304, b"")
    assert again.headers["etag"] == reply.headers["etag"]
    assert get(server, f"/{name}", if_none_match='"other"').status_code == 200


def test_the_policy_allows_the_servers_own_files_only(server: Server) -> None:
    headers = get(server, "/").headers
    policy = dict(part.strip().split(" ", 1) for part in headers["content-security-policy"].split(";"))
    assert policy["default-src"] == "'none'"
    for kind in ("script", "style", "img", "connect"):
        assert policy[f"{kind}-src"] == "'self'"
    assert policy["frame-ancestors"] == policy["base-uri"] == policy["form-action"] == "'none'"
    assert policy["require-trusted-types-for"] == "'script'"
    assert policy["trusted-types"] == "'none'"
    assert "microphone=()" in headers["permissions-policy"]
    assert headers["referrer-policy"] == "no-referrer"


def test_nothing_comes_from_elsewhere_and_text_never_becomes_markup() -> None:
    for name in (PAGE, *FILES):
        text = (WEB / name).read_text()
        outside = set(re.findall(r"https?://[^\s\"'`)]+", text)) - {"http://www.w3.org/2000/svg"}
        assert outside == set(), name
        assert not re.search(
            r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function", text
        ), name
        assert not re.search(r"@import|url\(|@font-face", text), name
    html = (WEB / PAGE).read_text()
    assert not re.search(r"\son\w+=|style=|<script>|<style", html)
    for link in re.findall(r'(?:src|href)="([^"]*)"', html):
        assert not link.startswith("/"), f"{link} would leave the path prefix"


def test_every_import_and_id_is_there() -> None:
    html = (WEB / PAGE).read_text()
    ids = set(re.findall(r'\bid="([^"]+)"', html))
    for name in (name for name in FILES if name.endswith(".js")):
        text = (WEB / name).read_text()
        for names, target in re.findall(r'import (\{[^}]*\}|\* as \w+) from "\./([^"]+)"', text):
            exported = (WEB / target).read_text()
            for wanted in re.findall(r"\w+", names) if names.startswith("{") else []:
                assert re.search(rf"export (async )?(function\*?|const|class) {wanted}\b", exported), (
                    name,
                    wanted,
                )
        unknown = set(re.findall(r'byId\("([^"]+)"\)', text)) - ids
        assert unknown <= {"stop-strings"}, name  # which settings.js makes


@pytest.mark.parametrize("name", [name for name in FILES if name.endswith(".js")])
def test_each_script_parses(tmp_path: Path, name: str) -> None:
    node = shutil.which("node")
    if node is None:
        pytest.skip("node is not installed")
    file = tmp_path / (name if name == "theme.js" else name.replace(".js", ".mjs"))
    file.write_bytes((WEB / name).read_bytes())
    done = subprocess.run(
        [node, "--check", str(file)], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "path",
    ["/ui/docs.html", "/ui/index.html", "/ui/", "/ui/..%2Fdocs.html", "/ui/../ui.py", "/ui/%2e%2e/ui.py"],
)
def test_no_other_file_is_reached(server: Server, path: str) -> None:
    reply = get(server, path)
    assert reply.status_code == 404
    assert reply.json()["error"]["code"] == "unknown_url"


def test_without_the_page() -> None:
    with serving(FakeEngine(), ui=False) as server:
        for path in ("/", "/ui/main.js", "/ui/state"):
            reply = get(server, path)
            assert reply.status_code == 404
            assert reply.json()["error"]["message"].startswith(f"Unknown route: GET {path}")
        assert get(server, "/v1/models").status_code == 200
        assert not [
            path
            for path in get(server, "/openapi.json").json()["paths"]
            if path.startswith("/ui") or path == "/"
        ]
    assert [one.path for one in operations(ui=True) if one.path.startswith("/ui")] == [
        "/ui/state",
        "/ui/{file}",
    ]


def test_the_page_opens_without_a_key_and_shows_nothing() -> None:
    with serving(FakeEngine(), api_key=("k",)) as server:
        assert get(server, "/").status_code == 200
        assert get(server, "/ui/main.js").status_code == 200
        assert get(server, "/ui/state").status_code == 401
        assert get(server, "/ui/state", authorization="Bearer k").status_code == 200
        html = "".join(file.data.decode() for file in page_files().values())
        assert MODEL not in html


def test_a_prefix_is_completed_so_that_the_pages_addresses_hold() -> None:
    with serving(FakeEngine(), root_path="/llm") as server:
        reply = get(server, "/llm")
        assert (reply.status_code, reply.headers["location"]) == (307, "/llm/")
        assert get(server, "/llm/").status_code == 200
        assert httpx2.post(server.url + "/llm").status_code == 404


# --- /ui/state ---------------------------------------------------------------------------------------------


def test_the_state_of_the_engine(server: Server) -> None:
    engine = server.engine
    engine.picture = EngineSnapshot(
        bytes([0, 1, 2, 3, 3, 2]), [RequestSnapshot("chatcmpl-1", "running", 1.5, 10, 3, 12, 0, 1)]
    )
    reply = get(server, "/ui/state")
    assert reply.headers["cache-control"] == "no-store"
    state = reply.json()
    assert state["engine"] == "ready"
    assert state["model"]["name"] == MODEL
    assert state["model"]["num_heads"] == 8
    assert state["model"]["kv_bytes_per_token"] == 64
    picture = state["picture"]
    packed = base64.b64decode(picture["blocks"].pop("states"))
    assert picture["blocks"] == {"num_free": 1, "num_cached": 1, "num_active": 2, "num_shared": 2}
    assert [packed[block >> 2] >> block % 4 * 2 & 3 for block in range(6)] == [0, 1, 2, 3, 3, 2]
    assert (picture["num_running"], picture["num_waiting"], picture["num_preparing"]) == (1, 0, 0)
    assert picture["requests"][0]["request_id"] == "chatcmpl-1"
    assert picture["requests"][0]["num_output_tokens"] == 3
    for gone in ("loading", "restarting", "failed"):
        engine.state = gone
        state = get(server, "/ui/state").json()
        assert (state["engine"], state["picture"], state["picture_age_s"]) == (gone, None, None)


def test_a_picture_is_bounded() -> None:
    states = bytes([BlockState.SHARED, BlockState.FREE] * 50_000)
    requests = [RequestSnapshot(f"r{number}", "waiting", 1.0, 1, 0, 0, 0, 0) for number in range(5000)]
    picture = picture_of(EngineSnapshot(states, requests))
    assert len(picture.blocks.states) < 34_000
    assert len(picture.requests) == MAX_REQUESTS
    assert picture.num_waiting == 5000
    assert picture_of(EngineSnapshot(b"", [])).blocks.states == ""


class SlowEngine:
    """Answers a snapshot when told to, and counts how often it was asked."""

    def __init__(self) -> None:
        self.state, self.model_info = "ready", fake_info()
        self.asked = 0
        self.answer = asyncio.Event()
        self.fault: Exception | None = None

    async def snapshot(self) -> EngineSnapshot:
        self.asked += 1
        await self.answer.wait()
        if self.fault is not None:
            raise self.fault
        return EngineSnapshot(bytes([self.asked]), [])


def pictures_of(engine: Any) -> Pictures:
    return Pictures(SimpleNamespace(engine=engine))  # type: ignore[arg-type]


def test_all_who_look_share_a_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    async def look() -> None:
        engine = SlowEngine()
        pictures = pictures_of(engine)
        assert engine.asked == 0, "nobody looks"
        lookers = [asyncio.create_task(pictures.latest()) for _ in range(50)]
        await asyncio.sleep(0)
        lookers[0].cancel()  # the one who asked first leaves
        await asyncio.sleep(0)
        engine.answer.set()
        taken = [await looker for looker in lookers[1:]]
        assert engine.asked == 1
        assert all(one is taken[0] is not None for one in taken)
        assert await pictures.latest() is taken[0], "still new enough"
        monkeypatch.setattr(ui, "INTERVAL_S", 0.0)
        assert (await pictures.latest()) is not taken[0]
        assert engine.asked == 2

    asyncio.run(look())


def test_a_busy_engine_shows_its_last_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    async def look() -> None:
        monkeypatch.setattr(ui, "INTERVAL_S", 0.0)
        monkeypatch.setattr(ui, "PATIENCE_S", 0.01)
        engine = SlowEngine()
        pictures = pictures_of(engine)
        assert await pictures.latest() is None, "there was none yet"
        engine.answer.set()
        first = await pictures.latest()
        assert first is not None
        engine.answer.clear()
        assert await pictures.latest() is first
        assert await pictures.latest() is first
        assert engine.asked == 2, "one question at a time, however long the answer takes"
        engine.state = "restarting"
        assert await pictures.latest() is None
        engine.fault = EngineUnavailableError("gone")
        engine.answer.set()
        await asyncio.sleep(0.02)
        assert await pictures.latest() is None

    asyncio.run(look())
