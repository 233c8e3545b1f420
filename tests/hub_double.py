"""A test double of the Hugging Face Hub: its upload and download API over HTTP on 127.0.0.1, in memory.

It speaks what huggingface_hub's real client asks for with the xet protocol switched off (HF_HUB_DISABLE_XET): who am
I, creation of repositories and branches, the check of a card's metadata, preupload, the LFS batch and its uploads,
commits, listings, and downloads with commit hashes and etags. It keeps no more than the tests need, and it can be told
to drop connections.
"""

import base64
import hashlib
import json
import re
import threading
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

from hub_metadata_rules import metadata_errors

# What the Hub keeps in large file storage by .gitattributes, whatever its size.
LARGE_FILES = re.compile(r"\.(safetensors|bin|npz|pt|onnx)$|tfevents")
HASH = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class Account:
    user: str
    organisations: tuple[str, ...] = ()
    role: str = "write"

    def may_write(self, repository: str) -> bool:
        return self.role == "write" and repository.partition("/")[0] in (self.user, *self.organisations)


@dataclass(frozen=True)
class File:
    content: bytes
    large: bool

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @property
    def blob_id(self) -> str:
        """Git's name of the file; of a large file, that of the pointer which git holds in its place."""
        content = self.content
        if self.large:
            text = f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(content)}\n"
            content = text.encode()
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@dataclass
class Repository:
    private: bool = False
    branches: dict[str, str] = field(default_factory=dict)  # name -> commit
    commits: dict[str, dict[str, File]] = field(default_factory=dict)  # commit -> path -> file
    messages: list[str] = field(default_factory=list)

    def commit(self, branch: str, files: dict[str, File], message: str) -> str:
        name = hashlib.sha1(f"{len(self.commits)} {message} {sorted(files)}".encode()).hexdigest()
        self.commits[name] = files
        self.branches[branch] = name
        self.messages.append(message)
        return name

    def resolve(self, revision: str) -> str | None:
        return self.branches.get(revision, revision if revision in self.commits else None)

    def files(self, revision: str = "main") -> dict[str, File]:
        return self.commits[self.resolve(revision)]


class HubDouble:
    """Use as a context: `with HubDouble({"token": Account("user", ["org"])}) as hub: … hub.endpoint …`

    Args:
        accounts: token -> what it opens.
    """

    def __init__(self, accounts: "dict[str, Account]"):
        self.accounts = accounts
        self.repositories: dict[str, Repository] = {}
        self.storage: dict[str, bytes] = {}  # large files by sha256
        self.requests: list[str] = []  # "PUT /path" of each, as they came
        self.lock = threading.Lock()
        self._drops: list[list] = []

    def __enter__(self) -> "HubDouble":
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self._server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *error) -> None:
        self._server.shutdown()
        self._server.server_close()

    @contextmanager
    def dropping(self, method: str, path: str, times: int = 10**6):
        """In this context, connections whose path contains `path` end in the middle of the client's upload."""
        drop = [method, path, times]
        self._drops.append(drop)
        try:
            yield drop
        finally:
            self._drops.remove(drop)

    def takes_drop(self, method: str, path: str) -> bool:
        with self.lock:
            for drop in self._drops:
                if method == drop[0] and drop[1] in path and drop[2] > 0:
                    drop[2] -= 1
                    return True
        return False


class _Refusal(Exception):
    """An answer with an error's status, and the code by which the client knows it."""

    def __init__(self, status: int, message: str, code: str | None = None, **headers: str):
        self.status, self.message = status, message
        self.headers = {"X-Error-Message": message, **headers} | ({"X-Error-Code": code} if code else {})


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: HubDouble

    ROUTES = (
        ("GET", r"/api/whoami-v2", "who_am_i"),
        ("POST", r"/api/repos/create", "create"),
        ("POST", r"/api/validate-yaml", "validate"),
        ("POST", r"/api/models/(?P<repo>[^/]+/[^/]+)/preupload/(?P<revision>[^/]+)", "preupload"),
        ("POST", r"/api/models/(?P<repo>[^/]+/[^/]+)/commit/(?P<revision>[^/]+)", "commit"),
        ("POST", r"/api/models/(?P<repo>[^/]+/[^/]+)/branch/(?P<branch>[^/]+)", "branch"),
        ("GET", r"/api/models/(?P<repo>[^/]+/[^/]+)/tree/(?P<revision>[^/]+)(?:/(?P<folder>.+))?", "tree"),
        ("GET", r"/api/models/(?P<repo>[^/]+/[^/]+)/revision/(?P<revision>[^/]+)", "info"),
        ("GET", r"/api/models/(?P<repo>[^/]+/[^/]+)", "info"),
        ("POST", r"/(?P<repo>[^/]+/[^/]+)\.git/info/lfs/objects/batch", "large_file_batch"),
        ("PUT", r"/storage/(?P<oid>[0-9a-f]{64})", "large_file_upload"),
        ("GET", r"/storage/(?P<oid>[0-9a-f]{64})", "large_file"),
        ("GET", r"/(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)", "resolve"),
    )

    def do_GET(self):
        self.answer("GET")

    def do_HEAD(self):
        self.answer("GET")

    def do_POST(self):
        self.answer("POST")

    def do_PUT(self):
        self.answer("PUT")

    def log_message(self, *args):
        """Tests read `hub.requests` instead of the screen."""

    # What every request passes through

    def answer(self, method: str) -> None:
        url = urlsplit(self.path)
        self.query, self.sent_headers = parse_qs(url.query), {}
        self.hub.requests.append(f"{self.command} {url.path}")
        if self.hub.takes_drop(self.command, url.path):
            self.rfile.read(min(1, int(self.headers.get("Content-Length", 0))))
            self.close_connection = True
            return
        self.body = self.read_body()
        try:
            for wanted, pattern, name in self.ROUTES:
                match = re.fullmatch(pattern, url.path) if wanted == method else None
                if match:
                    parts = {key: value and unquote(value) for key, value in match.groupdict().items()}
                    with self.hub.lock:
                        status, content = getattr(self, name)(**parts)
                    break
            else:
                raise _Refusal(404, f"the double does not know {method} {url.path}")
        except _Refusal as refusal:
            self.sent_headers.update(refusal.headers)
            status, content = refusal.status, {"error": refusal.message}
        if not isinstance(content, bytes):
            content = json.dumps(content).encode()
            self.sent_headers["Content-Type"] = "application/json"
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **self.sent_headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def account(self, required: bool = True) -> Account | None:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token in self.hub.accounts:
            return self.hub.accounts[token]
        if token:
            raise _Refusal(401, "Invalid credentials in Authorization header")
        if required:
            raise _Refusal(401, "Invalid username or password.")
        return None

    def repository(self, name: str, write: bool = False) -> Repository:
        account = self.account(required=write)
        may_write = account is not None and account.may_write(name)
        repository = self.hub.repositories.get(name)
        if repository is None or (repository.private and account is None):
            raise _Refusal(404 if account else 401, "Repository not found", "RepoNotFound")
        if write and not may_write:
            raise _Refusal(403, f"You don't have the rights to write to {name}")
        return repository

    def commit_of(self, repository: Repository, revision: str) -> str:
        commit = repository.resolve(revision)
        if commit is None:
            raise _Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return commit

    # Accounts and repositories

    def who_am_i(self):
        account = self.account()
        token = {"displayName": "test", "role": account.role}
        organisations = [{"name": name} for name in account.organisations]
        auth = {"type": "access_token", "accessToken": token}
        return 200, {"type": "user", "name": account.user, "orgs": organisations, "auth": auth}

    def create(self):
        account = self.account()
        wanted = json.loads(self.body)
        owner = wanted.get("organization") or account.user
        name = f"{owner}/{wanted['name']}"
        if not account.may_write(name):
            raise _Refusal(403, f"You don't have the rights to create a model under the namespace {owner!r}")
        status = 409 if name in self.hub.repositories else 200
        if status == 200:
            private = wanted.get("visibility") == "private"
            repository = self.hub.repositories[name] = Repository(private)
            repository.commit("main", {".gitattributes": File(b"", large=False)}, "initial commit")
        return status, {"url": f"{self.hub.endpoint}/{name}", "name": name}

    def branch(self, repo: str, branch: str):
        repository = self.repository(repo, write=True)
        if branch in repository.branches:
            raise _Refusal(409, f"Reference already exists: {branch}")
        start = (json.loads(self.body) if self.body else {}).get("startingPoint", "main")
        repository.branches[branch] = self.commit_of(repository, start)
        return 200, {}

    def validate(self):
        errors = metadata_errors(json.loads(self.body)["content"])
        return (400 if errors else 200), {"errors": [{"message": error} for error in errors], "warnings": []}

    # Uploads

    def preupload(self, repo: str, revision: str):
        repository = self.repository(repo, write=True)
        present = repository.commits[self.commit_of(repository, revision)]
        files = []
        for entry in json.loads(self.body)["files"]:
            path = entry["path"]
            mode = "lfs" if LARGE_FILES.search(path) or entry["size"] > 10 * 2**20 else "regular"
            oid = None
            if path in present:
                oid = present[path].sha256 if present[path].large else present[path].blob_id
            files.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return 200, {"files": files}

    def large_file_batch(self, repo: str):
        self.repository(repo, write=True)
        objects = []
        for wanted in json.loads(self.body)["objects"]:
            actions = {"upload": {"href": f"{self.hub.endpoint}/storage/{wanted['oid']}"}}
            objects.append(wanted if wanted["oid"] in self.hub.storage else {**wanted, "actions": actions})
        return 200, {"transfer": "basic", "objects": objects}

    def large_file_upload(self, oid: str):
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise _Refusal(400, "The content is not what was announced")
        self.hub.storage[oid] = self.body
        return 200, b""

    def commit(self, repo: str, revision: str):
        repository = self.repository(repo, write=True)
        if revision not in repository.branches:
            raise _Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        files = dict(repository.files(revision))
        for line in self.body.splitlines():
            key, value = json.loads(line)["key"], json.loads(line)["value"]
            if key == "header":
                message = value["summary"]
            elif key == "file":
                files[value["path"]] = File(base64.b64decode(value["content"]), large=False)
            elif key == "lfsFile":
                if value["oid"] not in self.hub.storage:
                    raise _Refusal(400, f"{value['path']} was not uploaded")
                files[value["path"]] = File(self.hub.storage[value["oid"]], large=True)
            elif key == "deletedFile":
                del files[value["path"]]
        commit = repository.commit(revision, files, message)
        return 200, {"commitUrl": f"{self.hub.endpoint}/{repo}/commit/{commit}", "commitOid": commit}

    # Listings and downloads

    def info(self, repo: str, revision: str = "main"):
        repository = self.repository(repo)
        commit = self.commit_of(repository, revision)
        siblings = [{"rfilename": path} for path in sorted(repository.commits[commit])]
        return 200, {"id": repo, "sha": commit, "private": repository.private, "siblings": siblings, "tags": []}

    def tree(self, repo: str, revision: str, folder: str | None):
        repository = self.repository(repo)
        files = repository.commits[self.commit_of(repository, revision)]
        prefix = f"{folder}/" if folder else ""
        inside = {path: file for path, file in files.items() if path.startswith(prefix)}
        if folder and not inside:
            raise _Refusal(404, f"{folder} does not exist", "EntryNotFound")
        entries, folders = [], set()
        recursive = self.query.get("recursive", ["false"])[0].lower() in ("true", "1")
        for path, file in sorted(inside.items()):
            first, *deeper = path[len(prefix) :].split("/")
            if deeper and not recursive:
                folders.add(prefix + first)
                continue
            entry = {"type": "file", "path": path, "size": len(file.content), "oid": file.blob_id}
            if file.large:
                entry["lfs"] = {"oid": file.sha256, "size": len(file.content), "pointerSize": 130}
            entries.append(entry)
        return 200, entries + [{"type": "directory", "path": path, "oid": "0" * 40} for path in sorted(folders)]

    def resolve(self, repo: str, revision: str, path: str):
        repository = self.repository(repo)
        commit = self.commit_of(repository, revision)
        self.sent_headers["X-Repo-Commit"] = commit
        file = repository.commits[commit].get(path)
        if file is None:
            raise _Refusal(404, "Entry not found", "EntryNotFound")
        if not file.large:
            self.sent_headers["ETag"] = f'"{file.blob_id}"'
            return 200, file.content
        self.sent_headers["X-Linked-Etag"] = f'"{file.sha256}"'
        self.sent_headers["X-Linked-Size"] = str(len(file.content))
        # Another host, as the Hub's storage is: the client must take its token along no further.
        self.sent_headers["Location"] = f"http://localhost:{self.server.server_port}/storage/{file.sha256}"
        return 302, b""

    def large_file(self, oid: str):
        if "Authorization" in self.headers:
            raise _Refusal(400, "The token was sent to the storage")
        self.sent_headers["ETag"] = f'"{oid}"'
        return 200, self.hub.storage[oid]
