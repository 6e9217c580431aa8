"""A small model hub on 127.0.0.1: the endpoints huggingface_hub calls to list and download a model.

Faults are switched on per repository: gated, missing, dropped connections, 5xx. Every request is recorded.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

_API = re.compile(r"/api/models/(?P<repo>[^/]+/[^/]+)(?:/(?P<kind>revision|tree)/(?P<revision>[^/]+))?/?")
_RESOLVE = re.compile(r"/(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)")


@dataclass
class Repo:
    """One repository with a single branch, `main`, unless `revisions` names more."""

    files: dict[str, bytes]
    revisions: tuple[str, ...] = ("main",)
    token: str | None = None  # required on file downloads (401 GatedRepo without, 403 with another)
    refuse_with: int | None = None  # ... or this status, whatever the token
    fail_with: int | None = None  # answer every request with this status
    drop_after: dict[str, int] = field(default_factory=dict)  # path -> bytes after which to drop, once
    fail_times: dict[str, int] = field(default_factory=dict)  # path -> number of 503 answers first

    @property
    def commit(self) -> str:
        digest = hashlib.sha1()
        for name in sorted(self.files):
            digest.update(name.encode() + self.files[name])
        return digest.hexdigest()


@dataclass(frozen=True)
class Seen:
    """One request as it arrived."""

    method: str
    path: str
    range: str | None
    authorization: str | None


class HubServer:
    """Use as a context manager; `url` is what HF_ENDPOINT should say."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.seen: list[Seen] = []
        hub = self

        class Handler(_Handler):
            server_hub = hub

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> HubServer:
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def downloads(self) -> list[str]:
        """Paths of the files whose content was asked for, in order."""
        found = (_RESOLVE.fullmatch(urlsplit(seen.path).path) for seen in self.seen if seen.method == "GET")
        return [match["path"] for match in found if match]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_hub: HubServer

    def log_message(self, *args: object) -> None:
        """Keep test output clean."""

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        hub = self.server_hub
        headers = self.headers
        hub.seen.append(Seen(self.command, self.path, headers.get("Range"), headers.get("Authorization")))
        path = unquote(urlsplit(self.path).path)
        match = _API.fullmatch(path) or _RESOLVE.fullmatch(path)
        repo = hub.repos.get(match["repo"]) if match else None
        if match is None or repo is None:
            return self._error(404, "RepoNotFound")
        if repo.fail_with is not None:
            return self._error(repo.fail_with)
        revision = match["revision"] or "main"
        if revision not in (*repo.revisions, repo.commit):
            return self._error(404, "RevisionNotFound")
        if match.re is _RESOLVE:
            return self._file(repo, match["path"])
        if match["kind"] == "tree":
            return self._json([_entry(name, data) for name, data in repo.files.items()])
        return self._json({"id": match["repo"], "sha": repo.commit, "siblings": _siblings(repo)})

    def _file(self, repo: Repo, path: str) -> None:
        if repo.token is not None:
            authorization = self.headers.get("Authorization")
            if authorization != f"Bearer {repo.token}":
                status = 401 if authorization is None else 403
                return self._error(repo.refuse_with or status, "GatedRepo")
        if path not in repo.files:
            return self._error(404, "EntryNotFound")
        if repo.fail_times.get(path, 0) > 0 and self.command == "GET":
            repo.fail_times[path] -= 1
            return self._error(503)
        return self._content(repo, path)

    def _content(self, repo: Repo, path: str) -> None:
        data, start = repo.files[path], 0
        if requested := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or ""):
            start = int(requested[1])
        self.send_response(206 if start else 200)
        self.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
        self.send_header("X-Repo-Commit", repo.commit)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(data) - start))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.end_headers()
        if self.command == "GET":
            limit = repo.drop_after.pop(path, None)
            self.wfile.write(data[start:limit])
            if limit is not None:
                self.wfile.flush()
                self.close_connection = True  # fewer bytes than promised: the client sees a broken transfer

    def _json(self, value: object) -> None:
        body = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def _error(self, status: int, code: str | None = None) -> None:
        self.send_response(status)
        if code is not None:
            self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()


def _siblings(repo: Repo) -> list[dict[str, object]]:
    return [{"rfilename": name, "size": len(data)} for name, data in repo.files.items()]


def _entry(name: str, data: bytes) -> dict[str, object]:
    return {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
