"""A Hugging Face hub on this machine, with the part of its protocol that downloads a model.

Status codes and headers are those of the real hub. The list of a gated model's files is public. An
unknown token is rejected everywhere. Weights are served from another host (here another name of the
same host), to which the token must not be sent.
"""

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

_API = re.compile(r"/api/models/(?P<repo>[^/]+/[^/]+)(?:/(?P<kind>revision|tree)/(?P<rev>[^/]+))?")
_RESOLVE = re.compile(r"/(?P<repo>[^/]+/[^/]+)/resolve/(?P<rev>[^/]+)/(?P<file>.+)")
_STORED = re.compile(r"/storage/(?P<repo>[^/]+/[^/]+)/(?P<file>.+)")
_LARGE_SUFFIXES = (".safetensors", ".gguf", ".bin")


@dataclass
class Repo:
    """One repository.

    Attributes:
        files: Contents by path.
        gated: Whether the files need a token that was granted access.
        private: Whether it looks missing without such a token.
        branches: Names of branches and tags, beside ``main``.
    """

    files: dict[str, bytes]
    gated: bool = False
    private: bool = False
    branches: tuple[str, ...] = ()

    @property
    def sha(self) -> str:
        """The commit, which changes with the files."""
        digest = hashlib.sha1(usedforsecurity=False)
        for path, content in sorted(self.files.items()):
            digest.update(path.encode() + b"\0" + content)
        return digest.hexdigest()


@dataclass(frozen=True)
class Request:
    """A request that the hub received."""

    method: str
    path: str
    host: str
    authorization: str | None
    range: str | None
    user_agent: str


@dataclass
class Faults:
    """Faults of the hub.

    Attributes:
        status: Status of every answer.
        unreachable: Whether connections are closed without an answer.
        silent: Whether connections stay open without an answer until the hub is closed.
        cut_after: Bytes after which the next answers with a large file break off, one per answer.
        refuse_range: Status of the answer to a request with a Range.
        body: Body of every answer, with status 200.
    """

    status: int | None = None
    unreachable: bool = False
    silent: bool = False
    cut_after: list[int] = field(default_factory=list)
    refuse_range: int | None = None
    body: bytes | None = None


class FakeHub(ThreadingHTTPServer):
    """The server; use it through :func:`running_hub`.

    Attributes:
        repos: Repositories by ``owner/name``.
        tokens: Known tokens, and the repositories each may read.
        requests: Requests in the order of their arrival.
        faults: Faults of the hub; a new value replaces all of them.
        closing: Set when the hub is about to close.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repos: dict[str, Repo] = {}
        self.tokens: dict[str, set[str]] = {}
        self.requests: list[Request] = []
        self.faults = Faults()
        self.closing = threading.Event()

    @property
    def url(self) -> str:
        """The value for HF_ENDPOINT."""
        return f"http://127.0.0.1:{self.server_address[1]}"

    @property
    def storage_url(self) -> str:
        """The address that large files are redirected to."""
        return f"http://localhost:{self.server_address[1]}/storage"

    def add(self, name: str, files: dict[str, bytes] | Path, **properties: bool) -> Repo:
        """Publish a repository from a folder, or from contents by path."""
        if isinstance(files, Path):
            files = {path.name: path.read_bytes() for path in files.iterdir()}
        repo = self.repos[name] = Repo(dict(files), **properties)  # type: ignore[arg-type]
        return repo

    def downloads(self, name: str) -> list[str]:
        """Files of a repository whose contents were requested, in order."""
        found = (_RESOLVE.fullmatch(r.path) for r in self.requests if r.method == "GET")
        stored = (_STORED.fullmatch(r.path) for r in self.requests if r.method == "GET")
        return [m["file"] for m in (*found, *stored) if m and m["repo"] == name]

    def ranges(self, file: str) -> list[str | None]:
        """The Range of each request for the contents of a large file."""
        return [
            r.range
            for r in self.requests
            if r.method == "GET" and r.path.startswith("/storage/") and r.path.endswith(file)
        ]


@contextmanager
def running_hub() -> Iterator[FakeHub]:
    """Run a hub until the block ends."""
    hub = FakeHub()
    thread = threading.Thread(target=hub.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.closing.set()
        hub.shutdown()
        hub.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    server: FakeHub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        """Answer with the body."""
        self._answer()

    def do_HEAD(self) -> None:
        """Answer with the headers alone."""
        self._answer()

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        raw_path = urlsplit(self.path).path
        self.server.requests.append(
            Request(
                self.command,
                path,
                self.headers["Host"].rpartition(":")[0],
                self.headers["Authorization"],
                self.headers["Range"],
                self.headers["User-Agent"],
            )
        )
        if self._is_faulty():
            return
        if stored := _STORED.fullmatch(path):
            self._contents(self.server.repos[stored["repo"]].files[stored["file"]])
        elif not self._knows_token():
            message = "Invalid credentials in Authorization header"
            self._error(401, None, message)
        elif found := _API.fullmatch(raw_path):
            self._api(found["repo"], found["kind"], found["rev"])
        elif found := _RESOLVE.fullmatch(raw_path):
            self._resolve(found["repo"], found["rev"], unquote(found["file"]))
        else:
            self._error(404, None, "Not Found")

    def _is_faulty(self) -> bool:
        faults = self.server.faults
        if faults.silent:
            self.server.closing.wait()
        if faults.silent or faults.unreachable:
            self.close_connection = True
            return True
        if faults.status:
            self._error(faults.status, None, "Out of order")
            return True
        if faults.body is not None:
            self._send(200, faults.body, {"Content-Type": "text/html"})
            return True
        return False

    def _token(self) -> str | None:
        header = self.headers["Authorization"]
        return header.removeprefix("Bearer ") if header else None

    def _knows_token(self) -> bool:
        token = self._token()
        return token is None or token in self.server.tokens

    def _may_read(self, name: str) -> bool:
        token = self._token()
        return token is not None and name in self.server.tokens[token]

    def _find(self, name: str, revision: str | None) -> Repo | None:
        """The repository; ``None`` after the error for a caller who may not see it."""
        repo = self.server.repos.get(name)
        if repo is None or (repo.private and not self._may_read(name)):
            self._error(404 if self._token() else 401, "RepoNotFound", "Repository not found")
            return None
        revision = unquote(revision or "main")
        if revision not in ("main", repo.sha, *repo.branches):
            self._error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            return None
        return repo

    def _api(self, name: str, kind: str | None, revision: str | None) -> None:
        repo = self._find(name, revision)
        if repo is None:
            return
        answer: object = {
            "id": name,
            "modelId": name,
            "sha": repo.sha,
            "private": repo.private,
            "gated": "manual" if repo.gated else False,
            "siblings": [{"rfilename": path} for path in repo.files],
        }
        if kind == "tree":
            answer = [_tree_entry(path, content) for path, content in repo.files.items()]
        self._send(200, json.dumps(answer).encode(), {"Content-Type": "application/json"})

    def _resolve(self, name: str, revision: str, file: str) -> None:
        repo = self._find(name, revision)
        if repo is None:
            return
        if repo.gated and not self._may_read(name):
            status = 403 if self._token() else 401
            self._error(status, "GatedRepo", f"Access to model {name} is restricted.")
            return
        content = repo.files.get(file)
        if content is None:
            self._error(404, "EntryNotFound", "Entry not found")
            return
        headers = {"X-Repo-Commit": repo.sha, "ETag": f'"{_git_oid(content)}"'}
        if file.endswith(_LARGE_SUFFIXES):
            headers["X-Linked-Size"] = str(len(content))
            headers["X-Linked-ETag"] = f'"{hashlib.sha256(content).hexdigest()}"'
            headers["Location"] = f"{self.server.storage_url}/{name}/{file}"
            self._send(302, b"", headers)
            return
        self._contents(content, headers)

    def _contents(self, content: bytes, headers: dict[str, str] | None = None) -> None:
        faults = self.server.faults
        headers = {"Accept-Ranges": "bytes", **(headers or {})}
        status, body = 200, content
        if asked := re.fullmatch(r"bytes=(\d+)-", self.headers["Range"] or ""):
            if faults.refuse_range:
                self._error(faults.refuse_range, None, "Out of order")
                return
            start = int(asked[1])
            status, body = 206, content[start:]
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        keep = len(body)
        if self.path.startswith("/storage/") and self.command == "GET" and faults.cut_after:
            keep = faults.cut_after.pop(0)
        self._send(status, body, headers, keep=keep)

    def _error(self, status: int, code: str | None, message: str) -> None:
        headers = {"X-Error-Message": message, "Content-Type": "application/json"}
        if code:
            headers["X-Error-Code"] = code
        self._send(status, json.dumps({"error": message}).encode(), headers)

    def _send(
        self, status: int, body: bytes, headers: dict[str, str], *, keep: int | None = None
    ) -> None:
        """Send an answer; the connection breaks after ``keep`` bytes of the body."""
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        self.wfile.write(body[:keep])
        if keep is not None and keep < len(body):
            self.close_connection = True

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base class's name
        """Keep the test's output clean."""


def _git_oid(content: bytes) -> str:
    header = f"blob {len(content)}\0".encode()
    return hashlib.sha1(header + content, usedforsecurity=False).hexdigest()


def _tree_entry(path: str, content: bytes) -> dict[str, object]:
    entry: dict[str, object] = {
        "type": "file",
        "path": path,
        "size": len(content),
        "oid": _git_oid(content),
    }
    if path.endswith(_LARGE_SUFFIXES):
        digest = hashlib.sha256(content).hexdigest()
        entry["lfs"] = {"oid": digest, "size": len(content), "pointerSize": 134}
    return entry
