"""A small Hub on this machine: enough of its HTTP interface for the real huggingface_hub to push to and to pull from.

    with HubServer() as hub:
        run_client(hub, "from dq_hf import DQPipeline; DQPipeline.from_pretrained('model').push_to_hub('user/model')", cwd=place)
        hub.files("user/model")["README.md"].content

Two users, "user" and "other"; tokens in `TOKENS`. Every commit is a snapshot that stays; an object of LFS exists once its
bytes are whole and have the right hash. It knows what huggingface_hub 1.33 and 2.4, transformers, diffusers and datasets
ask to push and load models and to load data sets, without Xet; all else is answered by 501.
"""

import base64
import contextlib
import hashlib
import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

TOKENS = {"hf_write": ("user", "write"), "hf_read": ("user", "read"), "hf_other": ("other", "write")}
LFS_SUFFIXES = {".bin", ".parquet", ".png", ".safetensors"}


def run_client(hub, code, *, token="hf_write", check=True, cwd=None, stdin=None, **environment):
    """Run Python code, or a list of command line arguments, in a fresh process whose Hub is `hub`.

    `environment` adds variables. Cache and, by default, working folder are temporary. Gives the finished process, with
    text in `stdout` and `stderr`; with `check`, one that failed is an AssertionError that shows them.
    """
    with tempfile.TemporaryDirectory() as home:
        clean = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
        hub_variables = {"HF_ENDPOINT": hub.url, "HF_HOME": home, "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1"}
        hub_variables |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "OMP_NUM_THREADS": "1"}
        hub_variables |= {"HF_TOKEN": token} if token else {}
        done = subprocess.run(
            [sys.executable, "-c", code] if isinstance(code, str) else code,
            env=clean | hub_variables | environment,
            cwd=cwd or home,
            input=stdin,
            capture_output=True,
            text=True,
            timeout=900,
        )
    assert not check or done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done


class File(NamedTuple):
    content: bytes
    lfs: bool

    @property
    def oid(self):
        """SHA-256 of an object of LFS, else git's hash of a blob; also the ETag."""
        if self.lfs:
            return hashlib.sha256(self.content).hexdigest()
        return hashlib.sha1(b"blob %d\0" % len(self.content) + self.content).hexdigest()


class Repository:
    """Snapshots by commit id, branches, and uploaded objects of LFS by their SHA-256."""

    def __init__(self, kind, name, private=False):
        self.kind, self.name, self.private = kind, name, private
        self.owner = name.split("/")[0]
        self.snapshots, self.branches, self.objects, self.messages = {}, {}, {}, {}
        self.commit("main", {".gitattributes": File(b"*.safetensors filter=lfs\n", False)}, "initial commit")

    def commit(self, branch, files, message):
        oid = hashlib.sha1(f"{self.name} {len(self.snapshots)}".encode()).hexdigest()
        self.snapshots[oid], self.messages[oid], self.branches[branch] = files, message, oid
        return oid

    def snapshot(self, revision):
        """Commit id and files of a branch or commit."""
        oid = self.branches.get(revision, revision)
        if oid not in self.snapshots:
            raise Refusal(404, f"no revision {revision}", "RevisionNotFound")
        return oid, self.snapshots[oid]


class Request(NamedTuple):
    method: str
    path: str  # with the query, still quoted
    range: str | None
    status: int | None  # None: dropped before it was answered


class Refusal(Exception):
    """An answer that is an error."""

    def __init__(self, status, message, code=None, **headers):
        headers |= {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})
        super().__init__(status, {"error": message}, headers)


class HubServer:
    """A Hub at `url` while the `with` block lasts; `requests` is the log of what clients asked, oldest first."""

    def __init__(self):
        self.repositories, self.requests, self.drops, self.lock = {}, [], [], threading.RLock()
        self.answers = []  # (method, pattern, status, content, headers) instead of what it would answer
        self.intruders = {}  # name: commits of somebody else, {path: bytes}, one before each commit of a client
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.hub = self
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error):
        self.server.shutdown()
        self.server.server_close()

    def add(self, name, files, kind="models", private=False):
        """A repository with these files, {path: bytes}, or those of a folder, besides what it has; gives it."""
        if isinstance(files, str | Path):
            paths = [path for path in Path(files).rglob("*") if path.is_file()]
            files = {path.relative_to(files).as_posix(): path.read_bytes() for path in paths}
        repository = self.repositories.setdefault((kind, name), Repository(kind, name, private))
        added = {path: File(content, Path(path).suffix in LFS_SUFFIXES) for path, content in files.items()}
        repository.commit("main", repository.snapshot("main")[1] | added, "add files")
        return repository

    def files(self, name, revision="main", kind="models"):
        """What a repository holds, {path: File}."""
        return self.repositories[kind, name].snapshot(revision)[1]

    def drop_next(self, method, pattern="", after_bytes=0):
        """Close the connection in the middle of the next request of this method whose path has this pattern.

        An upload is cut after so many bytes of its body, a download after so many of the answer's.
        """
        self.drops.append((method, pattern, after_bytes))

    def take_drop(self, method, path):
        """Bytes after which to drop this request, or None."""
        with self.lock:
            for drop in self.drops:
                if drop[0] == method and re.search(drop[1], path):
                    self.drops.remove(drop)
                    return drop[2]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments):
        pass

    def do_any(self):
        self.hub = self.server.hub
        drop, status = self.hub.take_drop(self.command, self.path), None
        body = self.read_body(drop)
        if body is not None:
            status, content, headers = self.answer(urlsplit(self.path).path, body)
        self.hub.requests.append(Request(self.command, self.path, self.headers.get("Range"), status))
        with contextlib.suppress(ConnectionError):  # clients may go away
            if body is not None:
                self.send(status, content, headers, drop)
            if body is None or drop is not None:
                self.close_connection = True
                self.connection.shutdown(socket.SHUT_RDWR)

    def send(self, status, content, headers, drop):
        self.send_response(status)
        for name, value in ({"Content-Length": len(content)} | headers).items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content[:drop])

    do_GET = do_HEAD = do_POST = do_PUT = do_any

    def read_body(self, drop):
        """The whole body; None if it is cut, on purpose after `drop` bytes or by the client."""
        size = int(self.headers.get("Content-Length", 0))
        body = self.rfile.read(size if drop is None else min(size, drop))
        return body if len(body) == size else None

    def answer(self, path, body):
        """Status, content and headers that `answers` or `ROUTES` give for a request."""
        for method, pattern, status, content, headers in self.hub.answers:
            if re.fullmatch(method, self.command) and re.search(pattern, path):
                return status, content.encode(), headers
        for method, pattern, function in ROUTES:
            match = re.fullmatch(pattern, path)
            if match and method == self.command.replace("HEAD", "GET"):
                parts = {name: unquote(part or "") for name, part in match.groupdict().items()}
                try:
                    with self.hub.lock:
                        status, result, headers = function(self, body, **parts)
                except Refusal as refusal:
                    status, result, headers = refusal.args
                content = result if isinstance(result, bytes) else json.dumps(result).encode()
                return status, content, headers
        return 501, b"this Hub does not know that", {}

    def user(self):
        """Name and role of who asks, (None, None) without a token."""
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token and token not in TOKENS:
            raise Refusal(401, "Invalid credentials in Authorization header")
        return TOKENS.get(token, (None, None))

    def repository(self, kind, name, write=False):
        user, role = self.user()
        repository = self.hub.repositories.get((kind or "models", name))
        if repository is None or (repository.private and repository.owner != user):
            raise Refusal(404 if user else 401, "Repository not found", "RepoNotFound")
        if write and (repository.owner, "write") != (user, role):
            raise Refusal(403 if user else 401, "You do not have the right to write to this repository")
        return repository

    def drop(self, body):
        """For clients that meet broken connections and wrong answers; {} forgets all.

        {method, pattern, after_bytes, times} or {method, pattern, status, content, headers}.
        """
        wanted = json.loads(body)
        drops, left = self.hub.drops, len(self.hub.drops)
        if not wanted:
            drops.clear()
            self.hub.answers.clear()
        if "status" in wanted:
            self.hub.answers.append([wanted[key] for key in ("method", "pattern", "status", "content", "headers")])
            return 200, {"left": left}, {}
        for _ in range(wanted.pop("times", 1) if wanted else 0):
            self.hub.drop_next(**wanted)
        return 200, {"left": left}, {}

    # One method for each route, given the body and the named parts of the path: status, content or JSON, headers.

    def whoami(self, body):
        user, role = self.user()
        if user is None:
            raise Refusal(401, "Invalid username or password.")
        return 200, {"type": "user", "name": user, "orgs": [], "auth": {"accessToken": {"role": role}}}, {}

    def validate_yaml(self, body):
        errors = card_errors(json.loads(body)["content"])
        return (400 if errors else 200), {"errors": [{"message": error} for error in errors], "warnings": []}, {}

    def create(self, body):
        user, role = self.user()
        wanted = json.loads(body)
        owner = wanted.get("organization") or user
        if (owner, "write") != (user, role):
            raise Refusal(403, f"You don't have the rights to create a model under the namespace {owner}")
        kind, name = wanted.get("type", "model") + "s", f"{owner}/{wanted['name']}"
        answer = {"url": f"{self.hub.url}/{'' if kind == 'models' else kind + '/'}{name}", "id": name}
        if (kind, name) in self.hub.repositories:
            return 409, answer, {}
        private = wanted.get("private") or wanted.get("visibility") == "private"
        self.hub.repositories[kind, name] = Repository(kind, name, bool(private))
        return 200, answer, {}

    def auth_check(self, body, kind, name, write):
        self.repository(kind, name, write=bool(write))
        return 200, {}, {}

    def info(self, body, kind, name, revision="main"):
        repository = self.repository(kind, name)
        oid, files = repository.snapshot(revision)
        siblings = [{"rfilename": path, "size": len(file.content)} for path, file in files.items()]
        return 200, {"id": name, "sha": oid, "private": repository.private, "siblings": siblings, "tags": []}, {}

    def branch(self, body, kind, name, revision):
        repository = self.repository(kind, name, write=True)
        if revision in repository.branches:
            raise Refusal(409, f"branch {revision} exists")
        start = json.loads(body or b"{}").get("startingPoint", "main")
        repository.branches[revision] = repository.snapshot(start)[0]
        return 200, {}, {}

    def tree(self, body, kind, name, revision, folder):
        files = self.repository(kind, name).snapshot(revision)[1]
        prefix = f"{folder}/" if folder else ""
        entries = {}
        for path in files:
            parts = path.split("/")
            parents = ["/".join(parts[:i]) for i in range(1, len(parts))]
            entries |= {p: {"type": "directory", "path": p, "oid": "0" * 40, "size": 0} for p in parents}
            entries[path] = describe(path, files[path])
        inside = {path: entry for path, entry in entries.items() if path.startswith(prefix)}
        if not inside:
            raise Refusal(404, f"no folder {folder}", "EntryNotFound")
        recursive = parse_qs(urlsplit(self.path).query).get("recursive") == ["true"]
        return 200, [inside[path] for path in inside if recursive or "/" not in path.removeprefix(prefix)], {}

    def preupload(self, body, kind, name, revision):
        files = self.repository(kind, name, write=True).snapshot(revision)[1]
        answers = []
        for path in (file["path"] for file in json.loads(body)["files"]):
            mode = "lfs" if Path(path).suffix in LFS_SUFFIXES else "regular"
            oid = files[path].oid if path in files else None
            answers.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return 200, {"files": answers}, {}

    def lfs_batch(self, body, kind, name):
        repository = self.repository(kind, name, write=True)
        objects = json.loads(body)["objects"]
        for wanted in objects:
            if wanted["oid"] not in repository.objects:  # else it need not be uploaded again
                place = f"{self.hub.url}/lfs/{repository.kind}/{name}/{wanted['oid']}"
                wanted["actions"] = {"upload": {"href": place}, "verify": {"href": f"{place}/verify"}}
        return 200, {"transfer": "basic", "objects": objects}, {}

    def lfs_put(self, body, kind, name, oid):  # without a token, as in a signed address
        if hashlib.sha256(body).hexdigest() != oid:
            raise Refusal(400, "the bytes do not have this hash")
        self.hub.repositories[kind, name].objects[oid] = body
        return 200, {}, {}

    def lfs_verify(self, body, kind, name, oid):
        if len(self.repository(kind, name, write=True).objects.get(oid, b"")) != json.loads(body)["size"]:
            raise Refusal(404, "there is no such object")
        return 200, {}, {}

    def commit(self, body, kind, name, revision):
        repository = self.repository(kind, name, write=True)
        if self.hub.intruders.get(name):
            self.hub.add(name, self.hub.intruders[name].pop(0))
        (oid, files), message = repository.snapshot(revision), ""
        files = dict(files)
        for line in body.splitlines():
            key, value = json.loads(line).values()
            if key == "header":
                message = value["summary"]
                if value.get("parentCommit") not in (None, oid):
                    raise Refusal(412, "A commit has happened since. Please refresh and try again.")
            elif key == "file":
                files[value["path"]] = File(base64.b64decode(value["content"]), False)
            elif key == "lfsFile" and value["oid"] in repository.objects:
                files[value["path"]] = File(repository.objects[value["oid"]], True)
            elif key == "deletedFile" and value["path"] in files:
                del files[value["path"]]
            else:
                raise Refusal(400, f"cannot do {key} for {value['path']}")
        oid = repository.commit(revision, files, message)
        return 200, {"success": True, "commitOid": oid, "commitUrl": f"{self.hub.url}/{name}/commit/{oid}"}, {}

    def resolve(self, body, kind, name, revision, path):
        oid, files = self.repository(kind, name).snapshot(revision)
        if path not in files:
            raise Refusal(404, f"no file {path}", "EntryNotFound", **{"X-Repo-Commit": oid})
        content, etag = files[path].content, f'"{files[path].oid}"'
        headers = {"ETag": etag, "X-Repo-Commit": oid, "Accept-Ranges": "bytes"}
        if files[path].lfs:
            headers |= {"X-Linked-Etag": etag, "X-Linked-Size": len(content)}
        if not (asked := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))):
            return 200, content, headers
        start, end = int(asked[1]), min(int(asked[2] or len(content)) + 1, len(content))
        if start >= len(content):
            raise Refusal(416, "the file ends before", **{"Content-Range": f"bytes */{len(content)}"})
        return 206, content[start:end], headers | {"Content-Range": f"bytes {start}-{end - 1}/{len(content)}"}


API = r"/api/(?P<kind>models|datasets)/(?P<name>[^/]+/[^/]+)"
PAGE = r"/(?:(?P<kind>datasets)/)?(?P<name>[^/]+/[^/]+)"
OBJECT = r"/lfs/(?P<kind>\w+)/(?P<name>[^/]+/[^/]+)/(?P<oid>\w+)"
ROUTES = [
    ("POST", r"/drop", Handler.drop),
    ("GET", r"/api/whoami-v2", Handler.whoami),
    ("POST", r"/api/validate-yaml", Handler.validate_yaml),
    ("POST", r"/api/repos/create", Handler.create),
    ("GET", API, Handler.info),
    ("GET", API + r"/revision/(?P<revision>[^/]+)", Handler.info),
    ("GET", API + r"/auth-check(?P<write>/write)?", Handler.auth_check),
    ("GET", API + r"/tree/(?P<revision>[^/]+)(?:/(?P<folder>.+))?", Handler.tree),
    ("POST", API + r"/branch/(?P<revision>[^/]+)", Handler.branch),
    ("POST", API + r"/preupload/(?P<revision>[^/]+)", Handler.preupload),
    ("POST", API + r"/commit/(?P<revision>[^/]+)", Handler.commit),
    ("POST", PAGE + r"\.git/info/lfs/objects/batch", Handler.lfs_batch),
    ("PUT", OBJECT, Handler.lfs_put),
    ("POST", OBJECT + "/verify", Handler.lfs_verify),
    ("GET", PAGE + r"/resolve/(?P<revision>[^/]+)/(?P<path>.+)", Handler.resolve),
]


def describe(path, file):
    """A file as an entry of a tree."""
    size = len(file.content)
    entry = {"type": "file", "path": path, "oid": File(file.content, False).oid, "size": size}
    return entry | ({"lfs": {"oid": file.oid, "size": size, "pointerSize": 134}} if file.lfs else {})


def card_errors(content):
    """What the Hub would refuse in the header of a model card, by its published template."""
    match = re.match(r"---\n(.*?)\n---\n", content, re.DOTALL)
    header = yaml.safe_load(match[1]) if match else None
    if not isinstance(header, dict):
        return ["the card has no header"]
    values = [(name, header.get(name, "")) for name in ("license", "library_name", "pipeline_tag")]
    values += [(name, value) for name in ("tags", "datasets") for value in header.get(name, [])]
    for result in (result for model in header.get("model-index", []) for result in model["results"]):
        values += [(f"{part}.{key}", result[part].get(key)) for part, key in (("task", "type"), ("dataset", "type"))]
        values += [("dataset.name", result["dataset"].get("name"))]
        values += [("metrics.type", metric.get("type")) for metric in result["metrics"]]
        values += [("metrics.value", str(metric["value"])) for metric in result["metrics"]]
    return [f"{name} must be text, got {value!r}" for name, value in values if not isinstance(value, str)]
