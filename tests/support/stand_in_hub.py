"""A hub on this machine: as much of its HTTP interface as the real client needs to publish and to fetch a model.

`with StandInHub() as hub:` serves `hub.url`. Repositories live in memory; a commit keeps all files of the one before it
that it does not replace or delete. Whoever has no token may read public repositories only, as on the hub, which hides
private ones behind the answer for unknown ones. The responses follow the client's own source, `huggingface_hub` 1.33.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN, READ_ONLY = "hf_standin", "hf_readonly"
GATED = "ada/gated"


@dataclass
class Repository:
    """Commits, newest last, each with all its files."""

    private: bool = False
    commits: list[tuple[str, str, dict[str, bytes]]] = field(default_factory=list)  # hash, message, files

    @property
    def files(self) -> dict[str, bytes]:
        return self.at("main")[1]

    def at(self, revision: str) -> tuple[str, dict[str, bytes]] | None:
        """The hash and the files of a revision, None when there is none."""
        for sha, _, files in reversed(self.commits):
            if revision in ("main", sha):
                return sha, files
        return None

    def commit(self, message: str, files: dict[str, bytes]) -> str:
        sha = hashlib.sha1(f"{len(self.commits)}{message}{sorted(files)}".encode()).hexdigest()
        self.commits.append((sha, message, files))
        return sha


class StandInHub:
    """The server, with its repositories and a list of the requests it got."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.requests: list[str] = []

    def __enter__(self) -> StandInHub:
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": self}))
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    hub: StandInHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self.answer()

    def do_HEAD(self) -> None:
        self.answer()

    def do_POST(self) -> None:
        self.answer()

    def answer(self) -> None:
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(f"{self.command} {path}")
        if path == "/api/validate-yaml":
            self.send({"errors": [], "warnings": []})
        elif path == "/api/repos/create":
            self.create()
        elif found := re.fullmatch(r"/api/(?:models|datasets)/([^/]+/[^/]+)(?:/(\w+)/(.+))?", path):
            self.model(*found.groups())
        elif found := re.fullmatch(r"(?:/datasets)?/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self.resolve(*found.groups())
        else:
            self.refuse(404, "EntryNotFound")

    # ---- who may do what ------------------------------------------------------------------------------------------

    @property
    def token(self) -> str | None:
        return self.headers.get("Authorization", "").removeprefix("Bearer ") or None

    def may_write(self) -> bool:
        if self.token == TOKEN:
            return True
        self.refuse(403 if self.token == READ_ONLY else 401)
        return False

    def readable(self, name: str) -> Repository | None:
        """The repository, or None when the refusal was sent already."""
        found = self.hub.repositories.get(name)
        if name == GATED:
            self.refuse(403, "GatedRepo")
        elif found is None or (found.private and self.token not in (TOKEN, READ_ONLY)):
            self.refuse(404 if self.token else 401, "RepoNotFound")
        else:
            return found
        return None

    # ---- the endpoints --------------------------------------------------------------------------------------------

    def create(self) -> None:
        if not self.may_write():
            return
        asked = json.loads(self.body)
        name = f"{asked['organization']}/{asked['name']}"
        if name.split("/")[0] != "ada":
            self.refuse(403)
        else:
            exists = name in self.hub.repositories
            made = self.hub.repositories.setdefault(name, Repository(asked.get("visibility") == "private"))
            if not exists:
                made.commit("initial commit", {".gitattributes": b""})
            self.send({"url": f"{self.hub.url}/{name}", "name": name}, 409 if exists else 200)

    def model(self, name: str, what: str | None, rest: str | None) -> None:
        repository = self.readable(name)
        if repository is None:
            return
        if what in ("preupload", "commit"):
            if self.may_write():
                (self.preupload if what == "preupload" else self.commit)(name, repository)
            return
        found = repository.at(rest or "main")
        if found is None:
            self.refuse(404, "RevisionNotFound")
        elif what == "tree":
            entries = [{"type": "file", "path": p, "size": len(c), "oid": git_hash(c)} for p, c in found[1].items()]
            self.send(entries)
        else:
            files = [{"rfilename": path} for path in found[1]]
            self.send({"id": name, "sha": found[0], "private": repository.private, "siblings": files, "tags": []})

    def preupload(self, name: str, repository: Repository) -> None:
        there = {path: git_hash(content) for path, content in repository.files.items()}
        paths = [file["path"] for file in json.loads(self.body)["files"]]
        modes = [{"path": p, "uploadMode": "regular", "shouldIgnore": False, "oid": there.get(p)} for p in paths]
        self.send({"files": modes})

    def commit(self, name: str, repository: Repository) -> None:
        files, message = dict(repository.files), ""
        for line in self.body.splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "header":
                message = value["summary"]
            elif item["key"] == "deletedFile":
                del files[value["path"]]
            else:
                files[value["path"]] = base64.b64decode(value["content"])
        sha = repository.commit(message, files)
        self.send({"success": True, "commitOid": sha, "commitUrl": f"{self.hub.url}/{name}/commit/{sha}"})

    def resolve(self, name: str, revision: str, path: str) -> None:
        repository = self.readable(name)
        if repository is None:
            return
        found = repository.at(revision)
        if found is None or path not in found[1]:
            self.refuse(404, "RevisionNotFound" if found is None else "EntryNotFound")
        else:
            content = found[1][path]
            self.write(200, content, {"ETag": f'"{git_hash(content)}"', "X-Repo-Commit": found[0]})

    # ---- responses ------------------------------------------------------------------------------------------------

    def send(self, value: Any, status: int = 200) -> None:
        self.write(status, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def refuse(self, status: int, code: str | None = None) -> None:
        self.write(status, b'{"error": "refused"}', {"X-Error-Code": code} if code else {})

    def write(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        # A connection that is kept would be served on after the server is gone.
        for key, value in ({"Content-Length": str(len(content)), "Connection": "close"} | headers).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


def git_hash(content: bytes) -> str:
    """The name that git gives a file's content."""
    return hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()
