"""Serve a minimal Hub on 127.0.0.1, for tests that push models and load them back.

The server speaks the part of the Hub's HTTP API that the stock ``huggingface_hub`` client uses for model
repositories: creation, commits, branches, tags, LFS uploads and downloads. The client needs no patch, only
its own environment variables, which it reads when it is imported::

    with HubServer() as hub:
        subprocess.run([sys.executable, "push.py"], env=hub.environment(), check=True)
        assert "config.json" in hub.files("tester/name")

Not spoken: Xet (which `HubServer.environment` turns off in the client), multipart LFS transfers, pull
requests, gated repositories, paging, datasets and Spaces.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import secrets
import socket
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple, final
from urllib.parse import parse_qs, unquote, urlsplit

USER = "tester"
OWNER_TOKEN = "hf_owner"
# The client treats every date alike, so one fixed date keeps the answers reproducible.
DATE = "2026-01-01T00:00:00.000Z"
LFS_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".onnx", ".h5", ".model", ".msgpack")
LFS_SIZE = 10 * 1024 * 1024
CHUNK = 1024 * 1024
CLIENT_VARIABLES = ("HF_", "HUGGINGFACE_", "HUGGING_FACE_", "TRANSFORMERS_")


class LoggedRequest(NamedTuple):
    """Describe one answered request; `status` is None where the connection was cut instead."""

    method: str
    path: str
    route: str
    status: int | None
    token: str | None


@dataclass(frozen=True)
class StoredFile:
    """Point to one file's content; `pointer_size` is set for LFS files only."""

    blob: str
    git_oid: str
    size: int
    pointer_size: int | None = None

    def describe(self, path: str) -> dict[str, Any]:
        """Return the file's entry as the tree route lists it."""
        entry: dict[str, Any] = {"type": "file", "path": path, "oid": self.git_oid, "size": self.size}
        if self.pointer_size is not None:
            entry["lfs"] = {"oid": self.blob, "size": self.size, "pointerSize": self.pointer_size}
        return entry


@dataclass(frozen=True)
class Commit:
    """Hold one immutable state of a repository."""

    oid: str
    title: str
    parent: str | None
    files: Mapping[str, StoredFile]


@dataclass
class Repository:
    """Hold one model repository: its commits and the branches and tags that name them."""

    repo_id: str
    private: bool
    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)

    def find(self, revision: str) -> Commit:
        """Return the commit that a branch, a tag or a full commit hash names."""
        oid = self.branches.get(revision) or self.tags.get(revision) or revision
        if oid not in self.commits:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return self.commits[oid]

    def append(self, branch: str, title: str, files: Mapping[str, StoredFile]) -> Commit:
        """Move a branch to a new commit, in one step."""
        commit = Commit(secrets.token_hex(20), title, self.branches.get(branch), files)
        self.commits[commit.oid] = commit
        self.branches[branch] = commit.oid
        return commit


class HubError(Exception):
    """Answer the request with an error; the client picks its exception by `code`."""

    def __init__(self, status: int, message: str, code: str = "", **headers: str) -> None:
        """Keep what the answer needs; an underscore in a header's name stands for a hyphen."""
        super().__init__(message)
        self.status = status
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}
        # HTTP headers are Latin-1, while the message may quote a path in any script.
        self.headers["X-Error-Message"] = message.encode("ascii", "replace").decode()
        if code:
            self.headers["X-Error-Code"] = code


class CutConnectionError(Exception):
    """Close the connection without an answer."""


@final
class HubServer:
    """Run the server for the length of a ``with`` block."""

    def __init__(self, *, reject_unknown_tokens: bool = False) -> None:
        """Bind a free port; `reject_unknown_tokens` refuses a wrong token on public repositories too."""
        self.reject_unknown_tokens = reject_unknown_tokens
        self.log: list[LoggedRequest] = []
        self.repositories: dict[str, Repository] = {}
        self.lock = threading.RLock()
        self._failures: dict[str, list[int | None]] = {}
        self._directory = tempfile.TemporaryDirectory(prefix="hub-server-", ignore_cleanup_errors=True)
        self.root = Path(self._directory.name)
        (self.root / "blobs").mkdir()
        handler = type("BoundHandler", (HubHandler,), {"hub": self})
        self._server = HubSocket(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        # The short poll is how long leaving the block may take.
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)

    def __enter__(self) -> HubServer:
        """Start serving."""
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        """Stop serving and delete everything that was uploaded."""
        self._server.shutdown()
        self._server.server_close()
        self._directory.cleanup()

    def environment(self, token: str | None = OWNER_TOKEN, home: Path | None = None) -> dict[str, str]:
        """Return a whole environment for a client process, with a new empty cache unless `home` names one."""
        # The caller's own client settings (offline mode, cache folders, tokens) must not leak into the test.
        kept = (name for name in os.environ if not name.upper().startswith(CLIENT_VARIABLES))
        environment = {name: os.environ[name] for name in kept}
        environment |= {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home or tempfile.mkdtemp(prefix="home-", dir=self.root)),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_UPDATE_CHECK": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        }
        for name in ("NO_PROXY", "no_proxy"):
            environment[name] = ",".join(filter(None, (environment.get(name), "127.0.0.1")))
        if token is not None:
            environment["HF_TOKEN"] = token
        return environment

    def fail_next(self, route: str, *, status: int | None = 507, times: int = 1) -> None:
        """Make the next requests of one route fail with `status`, or cut them midway where it is None.

        A 507 ends an upload at once. An LFS upload that is cut or gets a 500 is repeated by the client, five
        times within 23 seconds for each file: `times=6` defeats that for one file. A commit is not repeated.
        """
        if route not in ROUTE_NAMES:
            raise ValueError(f"unknown route {route!r}; known: {', '.join(sorted(ROUTE_NAMES))}")
        with self.lock:
            self._failures.setdefault(route, []).extend([status] * times)

    def raise_planned_failure(self, route: str) -> None:
        """Raise what `fail_next` planned for this request, if anything."""
        with self.lock:
            if not self._failures.get(route):
                return
            status = self._failures[route].pop(0)
        if status is None:
            raise CutConnectionError
        raise HubError(status, f"planned failure of {route}")

    def history(self, repo_id: str, revision: str = "main") -> list[Commit]:
        """Return the commits that lead to a revision, newest first."""
        repository = self.repositories[repo_id]
        commits = [repository.find(revision)]
        while commits[-1].parent is not None:
            commits.append(repository.commits[commits[-1].parent])
        return commits

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes | int]:
        """Return each file of a revision: the content of a regular file, the size of an LFS file."""
        files = self.repositories[repo_id].find(revision).files
        return {
            path: self.read(repo_id, path, revision) if entry.pointer_size is None else entry.size
            for path, entry in sorted(files.items())
        }

    def read(self, repo_id: str, path: str, revision: str = "main") -> bytes:
        """Return the content of one file, regular or LFS."""
        return self.blob(self.repositories[repo_id].find(revision).files[path].blob).read_bytes()

    def blob(self, name: str) -> Path:
        """Return where a content is stored, whether it is there yet or not."""
        return self.root / "blobs" / name


class HubSocket(ThreadingHTTPServer):
    """Accept connections, one thread each."""

    # A client downloads with eight threads at once; the default backlog of five would delay some by a second.
    request_queue_size = 64

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Report an error of the server's own, not that a client was killed while it was connected."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


Route = tuple[str, re.Pattern[str], Callable[..., None]]
ROUTES: list[Route] = []
MODEL = r"/api/models/(?P<repo_id>[^/]+/[^/]+)"
# A slash inside a branch name arrives quoted, so a revision never spans two segments.
REVISION = r"/(?P<revision>[^/]+)"


def route(method: str, pattern: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Register a handler method for a path; its name is the route's name."""

    def register(handler: Callable[..., None]) -> Callable[..., None]:
        ROUTES.append((method, re.compile(pattern), handler))
        return handler

    return register


class HubHandler(BaseHTTPRequestHandler):
    """Answer the requests of one connection."""

    hub: HubServer
    protocol_version = "HTTP/1.1"
    # Headers and body leave in two writes; with Nagle's algorithm the second would wait for a delayed ACK.
    disable_nagle_algorithm = True

    def handle_request(self) -> None:
        """Answer one request."""
        url = urlsplit(self.path)
        self.query = {name: values[-1] for name, values in parse_qs(url.query).items()}
        self.incoming = self.read_body()
        self.route_name = ""
        scheme, _, token = self.headers.get("Authorization", "").partition(" ")
        self.token = token if scheme == "Bearer" else None
        try:
            self.answer(url.path)
        except CutConnectionError:
            # The first chunk is at most half of the body, so the client is cut off while it still sends.
            next(self.incoming, None)
            self.record(None)
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
        except ConnectionError:
            # The client went away.
            self.close_connection = True

    # The base class looks the methods up by these names.
    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = handle_request  # noqa: N815

    def answer(self, path: str) -> None:
        """Find the route, then answer, fail as planned or report the error."""
        try:
            handler, parameters = self.find_route(path)
            self.route_name = handler.__name__
            self.hub.raise_planned_failure(self.route_name)
            if self.hub.reject_unknown_tokens and self.token not in (None, OWNER_TOKEN):
                raise HubError(401, "Invalid credentials in Authorization header")
            handler(self, **parameters)
        except HubError as error:
            # What is left of the body would be taken for the next request of this connection.
            for _ in self.incoming:
                pass
            self.reply({"error": str(error)}, error.status, error.headers)

    def find_route(self, path: str) -> tuple[Callable[..., None], dict[str, str]]:
        """Return the handler of a path and the parameters the path holds."""
        method = "GET" if self.command == "HEAD" else self.command
        for route_method, pattern, handler in ROUTES:
            match = pattern.fullmatch(path)
            if match and method == route_method:
                found = {name: value for name, value in match.groupdict().items() if value is not None}
                return handler, {name: unquote(value) for name, value in found.items()}
        raise HubError(404, f"no route for {self.command} {path}")

    def read_body(self) -> Iterator[bytes]:
        """Yield the request's body in chunks."""
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            while length := int(self.rfile.readline().split(b";")[0], 16):
                yield self.rfile.read(length)
                self.rfile.readline()
            self.rfile.readline()
            return
        left = int(self.headers.get("Content-Length") or 0)
        size = min(CHUNK, (left + 1) // 2)
        while left > 0:
            chunk = self.rfile.read(min(size, left))
            if not chunk:
                raise ConnectionError("the client went away in the middle of its body")
            left -= len(chunk)
            yield chunk

    def read_json(self) -> Any:
        """Return the request's JSON body."""
        return json.loads(b"".join(self.incoming) or b"{}")

    def log_message(self, format: str, *args: Any) -> None:
        """Keep the standard handler from writing to stderr; `HubServer.log` has it all."""

    def record(self, status: int | None) -> None:
        """Add the request to the log, before the client can see its answer."""
        self.hub.log.append(LoggedRequest(self.command, self.path, self.route_name, status, self.token))

    def reply(self, answer: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> None:
        """Send a JSON answer."""
        body = json.dumps(answer).encode()
        self.start_reply(status, {"Content-Type": "application/json", **(headers or {})}, len(body))
        if self.command != "HEAD":
            self.wfile.write(body)

    def start_reply(self, status: int, headers: Mapping[str, str], length: int) -> None:
        """Log the request and send everything of the answer but its body."""
        self.record(status)
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(length))
        self.end_headers()

    def require_owner(self) -> None:
        """Refuse a request that does not carry the owner's token."""
        if self.token != OWNER_TOKEN:
            raise HubError(401, "Invalid username or password.")

    def repository(self, repo_id: str, *, write: bool = False) -> Repository:
        """Return a repository that the request may read, or write."""
        repository = self.hub.repositories.get(repo_id)
        owner = self.token == OWNER_TOKEN
        if repository is None or (repository.private and not owner):
            # Who may not see a private repository gets the answer for a missing one.
            raise HubError(404 if owner else 401, "Repository not found", "RepoNotFound")
        if write:
            self.require_owner()
        return repository

    # ---- account and repositories

    @route("GET", "/api/whoami-v2")
    def whoami(self) -> None:
        """Name the token's owner."""
        self.require_owner()
        access = {"type": "access_token", "accessToken": {"displayName": "tests", "role": "write"}}
        self.reply({"type": "user", "id": "1", "name": USER, "orgs": [], "auth": access})

    @route("POST", "/api/repos/create")
    def create(self) -> None:
        """Create an empty repository."""
        wanted = self.read_json()
        self.require_owner()
        if wanted.get("type", "model") != "model" or wanted.get("organization") not in (None, USER):
            raise HubError(403, f"only models of {USER} can be created here")
        repo_id = f"{USER}/{wanted['name']}"
        answer = {"url": f"{self.hub.url}/{repo_id}", "name": repo_id}
        with self.hub.lock:
            exists = repo_id in self.hub.repositories
            if not exists:
                private = wanted.get("visibility") == "private" or bool(wanted.get("private"))
                repository = self.hub.repositories[repo_id] = Repository(repo_id, private)
                repository.append("main", "initial commit", {})
        if exists:
            # The client reads the URL from this answer too when the repository may exist.
            self.reply({"error": "You already created this model repo", **answer}, 409)
        else:
            self.reply(answer)

    @route("DELETE", "/api/repos/delete")
    def delete(self) -> None:
        """Delete a repository."""
        wanted = self.read_json()
        repo_id = f"{wanted.get('organization') or USER}/{wanted['name']}"
        del self.hub.repositories[self.repository(repo_id, write=True).repo_id]
        self.reply({})

    @route("POST", MODEL + "/(?P<kind>branch|tag)/(?P<name>[^/]+)")
    def create_reference(self, repo_id: str, kind: str, name: str) -> None:
        """Create a branch, which the path names, or a tag, for which the path names the revision."""
        wanted = self.read_json()
        repository = self.repository(repo_id, write=True)
        start = wanted.get("startingPoint") or "main" if kind == "branch" else name
        created = name if kind == "branch" else wanted["tag"]
        table = repository.branches if kind == "branch" else repository.tags
        with self.hub.lock:
            if created in table:
                raise HubError(409, f"{kind} {created} already exists")
            table[created] = repository.find(start).oid
        self.reply({}, 201)

    # ---- upload: preupload; lfs_batch and lfs_put for LFS files; commit

    @route("POST", "/api/validate-yaml")
    def validate_yaml(self) -> None:
        """Accept the metadata of any model card."""
        self.read_json()
        self.reply({"errors": [], "warnings": []})

    @route("POST", MODEL + "/preupload" + REVISION)
    def preupload(self, repo_id: str, revision: str) -> None:
        """Tell for each file whether it goes through LFS, and what the branch holds now."""
        wanted = self.read_json()["files"]
        commit = self.repository(repo_id, write=True).find(revision)
        answers = []
        for file in wanted:
            known = commit.files.get(file["path"])
            lfs = file["path"].endswith(LFS_SUFFIXES) or file["size"] > LFS_SIZE
            answers.append({"path": file["path"], "uploadMode": "lfs" if lfs else "regular"})
            # By its oid the client finds out that a file did not change.
            answers[-1] |= {"shouldIgnore": False, "oid": known.blob if known else None}
        self.reply({"files": answers, "commitOid": commit.oid})

    @route("POST", r"/(?P<repo_id>[^/]+/[^/]+)\.git/info/lfs/objects/batch")
    def lfs_batch(self, repo_id: str) -> None:
        """Tell where to send each LFS content that is not stored yet."""
        wanted = self.read_json()["objects"]
        self.repository(repo_id, write=True)
        answers = []
        for content in wanted:
            answer: dict[str, Any] = {"oid": content["oid"], "size": content["size"]}
            if not self.hub.blob(content["oid"]).exists():
                answer["actions"] = {"upload": {"href": f"{self.hub.url}/_lfs/{content['oid']}"}}
            answers.append(answer)
        self.reply({"transfer": "basic", "objects": answers})

    @route("PUT", "/_lfs/(?P<oid>[0-9a-f]{64})")
    def lfs_put(self, oid: str) -> None:
        """Store one LFS content; like a signed link, the address needs no token."""
        digest = hashlib.sha256()
        descriptor, name = tempfile.mkstemp(dir=self.hub.root)
        with open(descriptor, "wb") as stream:
            for chunk in self.incoming:
                digest.update(chunk)
                stream.write(chunk)
        if digest.hexdigest() != oid:
            raise HubError(422, "the content does not have the announced sha256")
        os.replace(name, self.hub.blob(oid))
        self.reply({})

    @route("POST", MODEL + "/commit" + REVISION)
    def commit(self, repo_id: str, revision: str) -> None:
        """Apply all operations of a commit to a branch, or none."""
        operations = [json.loads(line) for line in b"".join(self.incoming).splitlines() if line.strip()]
        if self.query.get("create_pr"):
            raise HubError(501, "pull requests are not supported")
        repository = self.repository(repo_id, write=True)
        with self.hub.lock:
            if revision not in repository.branches:
                raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
            parent = repository.find(revision)
            files = dict(parent.files)
            title = ""
            for operation in operations:
                value = operation["value"]
                if operation["key"] == "header":
                    title = value["summary"]
                    if value.get("parentCommit") not in (None, parent.oid):
                        raise HubError(412, "A commit has happened since. Please refresh and try again.")
                else:
                    self.apply(operation["key"], value, files)
            commit = repository.append(revision, title, files)
        url = f"{self.hub.url}/{repo_id}/commit/{commit.oid}"
        self.reply({"success": True, "commitOid": commit.oid, "commitUrl": url, "hookOutput": ""})

    def apply(self, key: str, value: dict[str, str], files: dict[str, StoredFile]) -> None:
        """Apply one operation of a commit to the files it starts from."""
        path = value["path"]
        if key == "file":
            content = base64.b64decode(value["content"])
            oid = git_oid(content)
            if not self.hub.blob(oid).exists():
                self.hub.blob(oid).write_bytes(content)
            files[path] = StoredFile(oid, oid, len(content))
        elif key == "lfsFile":
            blob = self.hub.blob(value["oid"])
            if not blob.exists():
                raise HubError(400, f"LFS pointer pointed to a file that does not exist: {path}")
            size = blob.stat().st_size
            pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{blob.name}\nsize {size}\n"
            files[path] = StoredFile(blob.name, git_oid(pointer.encode()), size, len(pointer))
        elif key == "deletedFile" and path in files:
            del files[path]
        elif key == "deletedFolder":
            for inside in [name for name in files if name.startswith(path.rstrip("/") + "/")]:
                del files[inside]
        else:
            raise HubError(400, f"cannot apply {key} to {path}")

    # ---- reading

    @route("GET", MODEL + f"(?:/revision{REVISION})?")
    def info(self, repo_id: str, revision: str = "main") -> None:
        """Describe a repository at a revision."""
        repository = self.repository(repo_id)
        commit = repository.find(revision)
        siblings: list[dict[str, Any]] = []
        for path, file in sorted(commit.files.items()):
            siblings.append({"rfilename": path})
            if self.query.get("blobs"):
                siblings[-1] |= {"size": file.size, "blobId": file.git_oid}
                if file.pointer_size is not None:
                    lfs = {"sha256": file.blob, "size": file.size, "pointerSize": file.pointer_size}
                    siblings[-1]["lfs"] = lfs
        names = {"_id": "1", "id": repo_id, "modelId": repo_id, "author": USER, "sha": commit.oid}
        state = {"private": repository.private, "gated": False, "disabled": False, "downloads": 0, "likes": 0}
        dates = {"lastModified": DATE, "createdAt": DATE}
        self.reply({**names, **state, **dates, "tags": [], "siblings": siblings})

    @route("GET", MODEL + "/tree" + REVISION + "(?:/(?P<folder>.+))?")
    def tree(self, repo_id: str, revision: str, folder: str = "") -> None:
        """List a folder, with everything below it where the query says so."""
        commit = self.repository(repo_id).find(revision)
        recursive = self.query.get("recursive", "").lower() in ("true", "1")
        prefix = f"{folder.strip('/')}/" if folder else ""
        entries = {}
        for path, file in sorted(commit.files.items()):
            if not path.startswith(prefix):
                continue
            parts = path[len(prefix) :].split("/")
            for depth in range(1, len(parts) if recursive else min(len(parts), 2)):
                parent = prefix + "/".join(parts[:depth])
                entries[parent] = describe_folder(parent)
            if recursive or len(parts) == 1:
                entries[path] = file.describe(path)
        if prefix and not entries:
            message = f"{folder} does not exist on {revision}"
            raise HubError(404, message, "EntryNotFound", X_Repo_Commit=commit.oid)
        self.reply(list(entries.values()))

    @route("GET", "/(?P<repo_id>[^/]+/[^/]+)/resolve" + REVISION + "/(?P<path>.+)")
    def resolve(self, repo_id: str, revision: str, path: str) -> None:
        """Send one file, or the range of it that an interrupted download still lacks."""
        commit = self.repository(repo_id).find(revision)
        if path not in commit.files:
            raise HubError(404, "Entry not found", "EntryNotFound", X_Repo_Commit=commit.oid)
        file = commit.files[path]
        headers = {"X-Repo-Commit": commit.oid, "ETag": f'"{file.blob}"', "Accept-Ranges": "bytes"}
        if file.pointer_size is not None:
            headers |= {"X-Linked-Etag": f'"{file.blob}"', "X-Linked-Size": str(file.size)}
        start, end, status = 0, file.size, 200
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if wanted:
            start, status = int(wanted[1]), 206
            end = min(int(wanted[2]) + 1, end) if wanted[2] else end
            if start >= end:
                raise HubError(416, "Range not satisfiable", Content_Range=f"bytes */{file.size}")
            headers["Content-Range"] = f"bytes {start}-{end - 1}/{file.size}"
        self.start_reply(status, headers, end - start)
        if self.command == "HEAD":
            return
        with self.hub.blob(file.blob).open("rb") as stream:
            stream.seek(start)
            for position in range(start, end, CHUNK):
                self.wfile.write(stream.read(min(CHUNK, end - position)))


def git_oid(content: bytes) -> str:
    """Return the name git gives to a content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def describe_folder(path: str) -> dict[str, Any]:
    """Return a folder's entry as the tree route lists it."""
    return {"type": "directory", "path": path, "oid": git_oid(path.encode()), "size": 0}


ROUTE_NAMES = frozenset(handler.__name__ for _, _, handler in ROUTES)
