"""A small Hub on the loopback address: the endpoints that `huggingface_hub` calls to fetch and to publish models."""

import base64
import hashlib
import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Lock
from typing import Any
from urllib.parse import unquote, urlsplit

LFS_SUFFIXES = (".safetensors", ".png")
CUT = 100
"""Bytes of an upload that are read before the server hangs up."""

Files = dict[str, bytes]


@dataclass
class Repo:
    branches: dict[str, Files] = field(default_factory=lambda: {"main": {}})
    private: bool = False
    gated: bool = False

    def commit(self, branch: str) -> str:
        listing = sorted((path, hashlib.sha1(data).hexdigest()) for path, data in self.branches[branch].items())
        return hashlib.sha1(json.dumps([branch, listing]).encode()).hexdigest()

    def find(self, revision: str) -> str | None:
        named = [b for b in self.branches if revision in (b, self.commit(b))]
        return named[0] if named else None


@dataclass
class Hub:
    """The contents of the server.

    After `refuse_after` objects it takes no more. After `drop_after` objects it hangs up in the middle of each upload,
    `drops` times or, where that is None, every time.
    """

    repos: dict[str, Repo] = field(default_factory=dict)
    roles: dict[str, str] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    received: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)
    refuse_after: int | None = None
    drop_after: int | None = None
    drops: int | None = None
    dropped: list[str] = field(default_factory=list)
    endpoint: str = ""
    _let_in: set[str] = field(default_factory=set)
    _lock: Lock = field(default_factory=Lock)

    def hangs_up(self, oid: str) -> bool:
        """Whether the upload of an object that begins now is to be broken off; uploads run side by side."""
        with self._lock:
            spent = self.drops is not None and len(self.dropped) >= self.drops
            if self.drop_after is None or spent or oid in self._let_in or len(self._let_in) < self.drop_after:
                self._let_in.add(oid)
                return False
            self.dropped.append(oid)
            return True


class Refusal(Exception):  # noqa: N818
    def __init__(self, status: int, code: str, message: str = "") -> None:
        super().__init__(message or code)
        self.status, self.code = status, code


@contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    """Serve `hub` from a thread until the block ends."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._answer("GET")

    def do_HEAD(self) -> None:
        self._answer("HEAD")

    def do_POST(self) -> None:
        self._answer("POST")

    def do_PUT(self) -> None:
        self._answer("PUT")

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def _answer(self, method: str) -> None:
        path = unquote(urlsplit(self.path).path).strip("/")
        if path.startswith("objects/") and self.hub.hangs_up(path.rpartition("/")[2]):
            self.rfile.read(CUT)
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True
            return
        body = self._body()
        self.hub.requests.append(f"{method} {path}")
        try:
            self._route(method, path, body)
        except Refusal as e:
            self._send(e.status, json.dumps({"error": str(e)}).encode(), {"X-Error-Code": e.code})

    def _body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _route(self, method: str, path: str, body: bytes) -> None:
        parts = path.split("/")
        if path == "api/whoami-v2":
            role = self._role()
            self._json({"name": "user", "type": "user", "auth": {"accessToken": {"role": role}}})
        elif path == "api/repos/create":
            self._create(json.loads(body))
        elif path == "api/validate-yaml":
            self._json({"errors": [], "warnings": []})
        elif parts[0] == "api":
            self._api(method, "/".join(parts[2:4]), parts[4:], body)
        elif path.endswith("info/lfs/objects/batch"):
            self._batch(json.loads(body))
        elif parts[0] == "objects":
            self._store(parts[1], body)
        else:
            self._resolve(method, "/".join(parts[:2]), parts[3], "/".join(parts[4:]))

    def _role(self) -> str:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token not in self.hub.roles:
            raise Refusal(401, "", "Invalid credentials")
        return self.hub.roles[token]

    def _may_write(self) -> None:
        if self._role() != "write":
            raise Refusal(403, "", "this token cannot write")

    def _repo(self, name: str) -> Repo:
        repo = self.hub.repos.get(name)
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if repo is None or (repo.private and token not in self.hub.roles):
            raise Refusal(401 if not token else 404, "RepoNotFound")
        if repo.gated and token not in self.hub.roles:
            raise Refusal(403, "GatedRepo")
        return repo

    def _files(self, repo: Repo, revision: str) -> tuple[str, Files]:
        branch = repo.find(revision)
        if branch is None:
            raise Refusal(404, "RevisionNotFound")
        return repo.commit(branch), repo.branches[branch]

    def _create(self, asked: dict[str, Any]) -> None:
        self._may_write()
        name = f"{asked.get('organization') or 'user'}/{asked['name']}"
        if name in self.hub.repos:
            self._send(409, json.dumps({"error": "exists", "url": f"{self.hub.endpoint}/{name}"}).encode())
            return
        self.hub.repos[name] = Repo(private=asked.get("visibility") == "private")
        self._json({"url": f"{self.hub.endpoint}/{name}"})

    def _api(self, method: str, name: str, rest: list[str], body: bytes) -> None:
        repo = self._repo(name)
        kind = rest[0] if rest else "revision"
        if kind == "revision":
            sha, files = self._files(repo, "/".join(rest[1:]) or "main")
            self._json({"id": name, "sha": sha, "siblings": [{"rfilename": path} for path in files]})
        elif kind == "tree":
            _, files = self._files(repo, rest[1])
            self._json([_entry(path, data) for path, data in files.items()])
        elif kind == "refs":
            names = [{"name": b, "ref": f"refs/heads/{b}", "targetCommit": repo.commit(b)} for b in repo.branches]
            self._json({"branches": names, "converts": [], "tags": []})
        elif kind == "branch":
            self._may_write()
            if "/".join(rest[1:]) in repo.branches:
                raise Refusal(409, "", "Reference already exists")
            repo.branches["/".join(rest[1:])] = dict(repo.branches["main"])
            self._json({})
        elif kind == "preupload":
            asked = [f["path"] for f in json.loads(body)["files"]]
            modes = ["lfs" if path.endswith(LFS_SUFFIXES) else "regular" for path in asked]
            pairs = zip(asked, modes, strict=True)
            self._json({"files": [{"path": p, "uploadMode": m, "shouldIgnore": False} for p, m in pairs]})
        elif kind == "commit":
            self._commit(name, repo, rest[1], body)
        else:
            raise Refusal(404, "EntryNotFound", f"{method} {kind}: not of this server")

    def _commit(self, name: str, repo: Repo, branch: str, body: bytes) -> None:
        self._may_write()
        files = repo.branches[branch]
        for line in body.splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif item["key"] == "lfsFile":
                files[value["path"]] = self.hub.objects[value["oid"]]
        sha = repo.commit(branch)
        self._json({"commitUrl": f"{self.hub.endpoint}/{name}/commit/{sha}", "commitOid": sha})

    def _batch(self, asked: dict[str, Any]) -> None:
        self._may_write()
        found = []
        for each in asked["objects"]:
            upload = {"upload": {"href": f"{self.hub.endpoint}/objects/{each['oid']}", "header": {}}}
            known = each["oid"] in self.hub.objects
            found.append({"oid": each["oid"], "size": each["size"], **({} if known else {"actions": upload})})
        self._json({"objects": found, "transfer": "basic"})

    def _store(self, oid: str, body: bytes) -> None:
        if self.hub.refuse_after is not None and len(self.hub.received) >= self.hub.refuse_after:
            raise Refusal(400, "", "the storage is closed")
        assert hashlib.sha256(body).hexdigest() == oid
        self.hub.received.append(oid)
        self.hub.objects[oid] = body
        self._send(200, b"")

    def _resolve(self, method: str, name: str, revision: str, path: str) -> None:
        sha, files = self._files(self._repo(name), revision)
        if path not in files:
            raise Refusal(404, "EntryNotFound")
        data = files[path]
        etag = hashlib.sha256(data).hexdigest() if path.endswith(LFS_SUFFIXES) else _blob_id(data)
        headers = {"X-Repo-Commit": sha, "ETag": f'"{etag}"', "Accept-Ranges": "bytes"}
        begin = self.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")[0]
        part = data[int(begin or 0) :]
        self._send(206 if int(begin or 0) else 200, part, headers, head=method == "HEAD")

    def _json(self, value: Any) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _send(self, status: int, body: bytes, headers: dict[str, str] | None = None, *, head: bool = False) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if not head and self.command != "HEAD":
            self.wfile.write(body)


def _entry(path: str, data: bytes) -> dict[str, Any]:
    entry = {"type": "file", "path": path, "size": len(data), "oid": _blob_id(data)}
    if path.endswith(LFS_SUFFIXES):
        entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
    return entry


def _blob_id(data: bytes) -> str:
    """Git's name of a file."""
    return hashlib.sha1(f"blob {len(data)}\0".encode() + data).hexdigest()
