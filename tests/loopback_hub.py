"""A Hub on a port of loopback: the routes that huggingface_hub calls to make, read and change repositories.

It keeps what it is given in memory, and large files at another address, as the Hub does. It can be told to fail, and
remembers every request.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

OWNER = "hf_owner"
"""The token that may do everything."""

READER = "hf_reader"
"""A token that may read what is public."""


@dataclass(frozen=True)
class File:
    data: bytes
    is_lfs: bool

    @property
    def oid(self) -> str:
        if self.is_lfs:
            return hashlib.sha256(self.data).hexdigest()
        return hashlib.sha1(b"blob %d\0" % len(self.data) + self.data).hexdigest()


@dataclass
class Repo:
    private: bool = False
    gated: bool = False
    branches: dict[str, str] = field(default_factory=dict)
    commits: dict[str, dict[str, File]] = field(default_factory=dict)

    @property
    def files(self) -> dict[str, File]:
        """Of the main branch."""
        return self.commits[self.branches["main"]]


@dataclass
class Request:
    """A request that was answered. `sent` and `received` count the bytes of bodies."""

    method: str
    path: str
    token: str | None
    range: tuple[int, int] | None
    host: str
    received: int = 0
    status: int = 0
    sent: int = 0


@dataclass
class Fault:
    """What goes wrong, at requests whose method and path match, so many times after the first few."""

    match: str
    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    cut: int | None = None  # bytes of the body after which the connection is closed
    flip: int | None = None  # a byte of the body that is changed
    times: int = 1
    after: int = 0
    call: Any = None

    def is_due(self, request: Request) -> bool:
        if not re.search(self.match, f"{request.method} {request.path}") or self.times <= 0:
            return False
        self.after -= 1
        if self.after >= 0:
            return False
        self.times -= 1
        return True


class Refused(Exception):
    def __init__(self, status: int, code: str = "", message: str = "", **headers: str) -> None:
        super().__init__(message)
        self.status = status
        self.headers = {"X-Error-Code": code} if code else {}
        self.headers |= {"X-Error-Message": message} if message else {}
        self.headers |= headers


class LoopbackHub:
    """The server. Use as a context."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.objects: dict[str, bytes] = {}
        self.parts: dict[tuple[str, int], bytes] = {}
        self.requests: list[Request] = []
        self.faults: list[Fault] = []
        self.waits: list[float] = []
        self.part_bytes: int | None = None  # uploads come in parts of this size
        self.has_ranges = True
        self.lock = threading.RLock()
        self._commits = 0
        hub = self

        class Bound(Handler):
            server_hub = hub

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Bound)
        self.server.daemon_threads = True
        self.port = self.server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> LoopbackHub:
        # A short poll, as closing waits for it.
        self._thread = threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()
        self._thread.join()

    # For tests

    def commit(self, repo_id: str, branch: str, files: dict[str, File]) -> str:
        """Makes a commit of all these files."""
        with self.lock:
            self._commits += 1
            oid = hashlib.sha1(f"{repo_id} {self._commits}".encode()).hexdigest()
            self.repos[repo_id].commits[oid] = files
            self.repos[repo_id].branches[branch] = oid
            return oid

    def add_folder(self, repo_id: str, folder: Path) -> None:
        """Makes a repository of a folder's files."""
        self.repos[repo_id] = Repo()
        self.commit(
            repo_id, "main", {p.name: File(p.read_bytes(), p.suffix == ".safetensors") for p in folder.iterdir()}
        )

    def edit(self, repo_id: str, path: str, data: bytes | None) -> None:
        """Replaces a file in a new commit; None takes it away."""
        files = dict(self.repos[repo_id].files)
        is_lfs = files[path].is_lfs if path in files else False
        files.pop(path, None)
        if data is not None:
            files[path] = File(data, is_lfs)
        self.commit(repo_id, "main", files)

    def fail(self, match: str, **what: Any) -> Fault:
        self.faults.append(Fault(match, **what))
        return self.faults[-1]

    def calm(self) -> None:
        """Forgets faults and requests."""
        self.faults.clear()
        self.requests.clear()
        self.waits.clear()

    def ranges(self) -> list[tuple[str, int, int]]:
        """Object, first byte and byte after the last of all that was asked for by ranges, behind redirections."""
        found = [
            (r.path.split("/")[2].split("?")[0], *r.range)
            for r in self.requests
            if r.range and r.path.startswith("/cdn/")
        ]
        return sorted(found)

    def sent(self, match: str = "") -> int:
        """Bytes of answers' bodies."""
        return sum(r.sent for r in self.requests if re.search(match, f"{r.method} {r.path}"))

    def uploads(self) -> list[str]:
        """Objects that were uploaded."""
        return [r.path.split("/")[2].split("?")[0] for r in self.requests if r.method == "PUT" and r.status == 200]

    def environment(self, home: Path, token: str | None = OWNER) -> dict[str, str]:
        """What another process needs to talk to it."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_OFFLINE": "0",
            "TRANSFORMERS_OFFLINE": "0",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            **({"HF_TOKEN": token} if token else {}),
        }

    @contextmanager
    def here(self, monkeypatch: Any, home: Path, token: str | None = OWNER) -> Iterator[None]:
        """This process talks to it: huggingface_hub read its environment when it was imported."""
        from huggingface_hub import constants, file_download
        from huggingface_hub.utils import _http

        clock = SimpleNamespace(sleep=self.waits.append)
        with monkeypatch.context() as patch:
            patch.setattr(constants, "ENDPOINT", self.url)
            patch.setattr(
                constants, "HUGGINGFACE_CO_URL_TEMPLATE", self.url + "/{repo_id}/resolve/{revision}/{filename}"
            )
            patch.setattr(constants, "HF_HUB_OFFLINE", False)
            patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
            patch.setattr(constants, "HF_HUB_DISABLE_PROGRESS_BARS", True)
            patch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
            patch.setattr(constants, "HF_ASSETS_CACHE", str(home / "assets"))
            patch.setattr(constants, "HF_TOKEN_PATH", str(home / "token"))
            # It waits for seconds before it asks again.
            patch.setattr(_http, "time", clock)
            patch.setattr(file_download, "time", clock)
            if token:
                patch.setenv("HF_TOKEN", token)
            else:
                patch.delenv("HF_TOKEN", raising=False)
            yield


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_hub: LoopbackHub

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self._answer()

    do_HEAD = do_POST = do_PUT = do_GET

    def _answer(self) -> None:
        hub = self.server_hub
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        range_ = (int(asked[1]), int(asked[2]) + 1 if asked[2] else 1 << 62) if asked and hub.has_ranges else None
        self.request_ = Request(self.command, unquote(self.path), token, range_, self.headers.get("Host") or "")
        with hub.lock:
            hub.requests.append(self.request_)
            fault = next((fault for fault in hub.faults if fault.is_due(self.request_)), None)
        if fault is not None and fault.call is not None:
            fault.call()
            fault = None
        try:
            body = self._body(fault if self.command == "PUT" else None)
            if body is None:
                self.close_connection = True
                return
            if fault is not None and fault.status:
                raise Refused(fault.status, message="injected", **fault.headers)
            with hub.lock:
                status, headers, data = self._route(body)
        except Refused as refused:
            error = json.dumps({"error": str(refused)}).encode() if str(refused) else b""
            status, headers, data = refused.status, refused.headers, error
        self._send(status, headers, data, fault if self.command != "PUT" else None)

    def _body(self, fault: Fault | None) -> bytes | None:
        nbytes = int(self.headers.get("Content-Length") or 0)
        if fault is not None and fault.cut is not None:
            self.rfile.read(min(fault.cut, nbytes))
            return None
        if "chunked" in (self.headers.get("Transfer-Encoding") or ""):
            data = b""
            while size := int(self.rfile.readline(), 16):
                data += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        else:
            data = self.rfile.read(nbytes)
        self.request_.received = len(data)
        return data

    def _send(self, status: int, headers: dict[str, str], data: bytes, fault: Fault | None) -> None:
        self.request_.status = status
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        if "Content-Length" not in headers:
            self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command == "HEAD":
            return
        if fault is not None and fault.flip is not None:
            data = data[: fault.flip] + bytes([data[fault.flip] ^ 1]) + data[fault.flip + 1 :]
        if fault is not None and fault.cut is not None:
            data = data[: fault.cut]
            self.close_connection = True
        self.request_.sent = len(data)
        self.wfile.write(data)

    # Routes

    def _route(self, body: bytes) -> tuple[int, dict[str, str], bytes]:
        url = urlsplit(self.path)
        path, query = url.path, parse_qs(url.query)
        if path.startswith("/cdn/"):
            assert self.request_.token is None, "a token was sent to another host"
            return self._bytes(self.server_hub.objects[path.split("/")[2]], {})
        if path.startswith("/lfs/"):
            return self._upload(path.split("/")[2], query, body)
        if self.request_.token not in (None, OWNER, READER):
            raise Refused(401, message="Invalid credentials in Authorization header")
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if path == "/api/validate-yaml":
            return self._json({"errors": [], "warnings": []})
        if found := re.fullmatch(r"/([\w.-]+/[\w.-]+)\.git/info/lfs/objects/batch", path):
            return self._batch(self._repo(found[1], write=True), json.loads(body))
        if found := re.fullmatch(r"/([\w.-]+/[\w.-]+)/resolve/([^/]+)/(.+)", path):
            return self._resolve(found[1], unquote(found[2]), unquote(found[3]))
        if found := re.fullmatch(r"/api/models/([\w.-]+/[\w.-]+)(?:/([a-z-]+)(?:/([^/]+))?)?", path):
            repo_id, action, revision = found[1], found[2] or "revision", unquote(found[3] or "main")
            if action in ("preupload", "commit", "branch"):
                return getattr(self, f"_{action}")(repo_id, revision, body, query)
            if action in ("revision", "tree"):
                return getattr(self, f"_{action}")(repo_id, revision)
        raise Refused(404, message=f"no route {self.command} {path}")

    def _json(self, value: object, status: int = 200) -> tuple[int, dict[str, str], bytes]:
        return status, {"Content-Type": "application/json"}, json.dumps(value).encode()

    def _repo(self, repo_id: str, *, write: bool = False) -> Repo:
        repo = self.server_hub.repos.get(repo_id)
        token = self.request_.token
        if repo is None or (repo.private and token != OWNER):
            raise Refused(404 if token else 401, "RepoNotFound", "Repository not found")
        if write and token != OWNER:
            raise Refused(403 if token else 401, message="You may not write here")
        return repo

    def _commit_of(self, repo: Repo, revision: str) -> str:
        oid = repo.branches.get(revision, revision)
        if oid not in repo.commits:
            raise Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return oid

    def _create(self, asked: dict[str, Any]) -> tuple[int, dict[str, str], bytes]:
        repo_id = f"{asked['organization']}/{asked['name']}"
        if self.request_.token != OWNER:
            raise Refused(403 if self.request_.token else 401, message="You may not create repositories")
        if repo_id in self.server_hub.repos:
            raise Refused(409, message="You already created this model repo")
        self.server_hub.repos[repo_id] = Repo(
            private=asked.get("visibility") == "private" or bool(asked.get("private"))
        )
        self.server_hub.commit(repo_id, "main", {".gitattributes": File(b"*.safetensors filter=lfs\n", False)})
        return self._json({"url": f"{self.server_hub.url}/{repo_id}", "name": repo_id})

    def _revision(self, repo_id: str, revision: str) -> tuple[int, dict[str, str], bytes]:
        repo = self._repo(repo_id)
        oid = self._commit_of(repo, revision)
        siblings = [{"rfilename": name} for name in repo.commits[oid]]
        gated = "manual" if repo.gated else False
        return self._json({"id": repo_id, "sha": oid, "private": repo.private, "gated": gated, "siblings": siblings})

    def _tree(self, repo_id: str, revision: str) -> tuple[int, dict[str, str], bytes]:
        repo = self._repo(repo_id)
        return self._json(
            [
                {
                    "type": "file",
                    "path": name,
                    "size": len(file.data),
                    "oid": hashlib.sha1(file.data).hexdigest(),
                    **({"lfs": {"oid": file.oid, "size": len(file.data), "pointerSize": 134}} if file.is_lfs else {}),
                }
                for name, file in repo.commits[self._commit_of(repo, revision)].items()
            ]
        )

    def _branch(self, repo_id: str, name: str, body: bytes, query: Any) -> tuple[int, dict[str, str], bytes]:
        repo = self._repo(repo_id, write=True)
        if name in repo.branches:
            raise Refused(409, message="Reference already exists")
        repo.branches[name] = self._commit_of(repo, json.loads(body).get("startingPoint") or "main")
        return self._json({})

    def _preupload(self, repo_id: str, revision: str, body: bytes, query: Any) -> tuple[int, dict[str, str], bytes]:
        repo = self._repo(repo_id, write=True)
        there = repo.commits[self._commit_of(repo, revision)]
        return self._json(
            {
                "files": [
                    {
                        "path": file["path"],
                        "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                        "shouldIgnore": False,
                        **({"oid": there[file["path"]].oid} if file["path"] in there else {}),
                    }
                    for file in json.loads(body)["files"]
                ]
            }
        )

    def _batch(self, repo: Repo, asked: dict[str, Any]) -> tuple[int, dict[str, str], bytes]:
        hub, objects = self.server_hub, []
        for item in asked["objects"]:
            oid, size = item["oid"], item["size"]
            if oid not in hub.objects:
                upload: dict[str, Any] = {"href": f"{hub.url}/lfs/{oid}"}
                if hub.part_bytes and size > hub.part_bytes:
                    count = -(-size // hub.part_bytes)
                    parts = {str(part): f"{hub.url}/lfs/{oid}?part={part}" for part in range(1, count + 1)}
                    upload["header"] = {"chunk_size": str(hub.part_bytes), **parts}
                item = {**item, "actions": {"upload": upload, "verify": {"href": f"{hub.url}/lfs/{oid}?verify=1"}}}
            objects.append(item)
        return self._json({"transfer": "basic", "objects": objects})

    def _upload(self, oid: str, query: Any, body: bytes) -> tuple[int, dict[str, str], bytes]:
        hub = self.server_hub
        if "verify" in query:
            if oid not in hub.objects:
                raise Refused(404, message="the object did not arrive")
            return self._json({})
        if "part" in query:
            hub.parts[oid, int(query["part"][0])] = body
            return 200, {"ETag": hashlib.md5(body).hexdigest()}, b""
        if self.command == "POST":  # all parts are there
            body = b"".join(hub.parts[oid, part["partNumber"]] for part in json.loads(body)["parts"])
        if hashlib.sha256(body).hexdigest() != oid:
            raise Refused(400, message="the object's hash does not match")
        hub.objects[oid] = body
        return self._json({})

    def _commit(self, repo_id: str, revision: str, body: bytes, query: Any) -> tuple[int, dict[str, str], bytes]:
        hub, repo = self.server_hub, self._repo(repo_id, write=True)
        head = self._commit_of(repo, revision)
        files = dict(repo.commits[head])
        for line in body.splitlines():
            key, value = json.loads(line)["key"], json.loads(line)["value"]
            if key == "header":
                if value.get("parentCommit") not in (None, head):
                    raise Refused(412, message="A commit has happened since. Please refresh and try again.")
            elif key == "file":
                files[value["path"]] = File(base64.b64decode(value["content"]), False)
            elif key == "lfsFile":
                if value["oid"] not in hub.objects:
                    raise Refused(400, message=f"LFS pointer pointed to a file that does not exist: {value['path']}")
                files[value["path"]] = File(hub.objects[value["oid"]], True)
            else:
                assert key == "deletedFile" and value["path"] in files, (key, value)
                del files[value["path"]]
        is_pr = "create_pr" in query
        oid = hub.commit(repo_id, "refs/pr/1" if is_pr else revision, files)
        url = f"{hub.url}/{repo_id}/commit/{oid}"
        request = f"{hub.url}/{repo_id}/discussions/1" if is_pr else None
        return self._json({"success": True, "commitOid": oid, "commitUrl": url, "pullRequestUrl": request})

    def _resolve(self, repo_id: str, revision: str, path: str) -> tuple[int, dict[str, str], bytes]:
        repo = self._repo(repo_id)
        if repo.gated and self.request_.token != OWNER:
            raise Refused(403 if self.request_.token else 401, "GatedRepo", "Access to this model is restricted")
        oid = self._commit_of(repo, revision)
        headers = {"X-Repo-Commit": oid}
        if path not in repo.commits[oid]:
            raise Refused(404, "EntryNotFound", "Entry not found", **headers)
        file = repo.commits[oid][path]
        headers |= {"ETag": f'"{file.oid}"', "Accept-Ranges": "bytes"}
        if not file.is_lfs:
            return self._bytes(file.data, headers)
        self.server_hub.objects[file.oid] = file.data
        headers |= {"X-Linked-Etag": f'"{file.oid}"', "X-Linked-Size": str(len(file.data))}
        # Another host, to which no token may go.
        return 302, {**headers, "Location": f"http://localhost:{self.server_hub.port}/cdn/{file.oid}"}, b""

    def _bytes(self, data: bytes, headers: dict[str, str]) -> tuple[int, dict[str, str], bytes]:
        if self.request_.range is None:
            return 200, {**headers, "Content-Length": str(len(data))}, data
        begin, end = self.request_.range
        end = min(end, len(data))
        if begin >= len(data):
            raise Refused(416, message="Requested range not satisfiable", **{"Content-Range": f"bytes */{len(data)}"})
        return 206, {**headers, "Content-Range": f"bytes {begin}-{end - 1}/{len(data)}"}, data[begin:end]
