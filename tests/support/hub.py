"""A stand-in for the Hugging Face hub on the loopback: reading, and commits with LFS.

It knows the routes that huggingface_hub asks for models, and proves URLs, headers and conditions;
what the hub itself makes of them it does not. What is committed is what it serves.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from support.loopback import LoopbackServer

Files = dict[str, bytes]
#: What a repository has once it is made.
FRESH: Files = {".gitattributes": b"*.safetensors filter=lfs\n"}


class Repository:
    """A repository: its commits, and which of them each branch is at."""

    def __init__(self, files: Files, *, token: str | None = None, gated: bool = False) -> None:
        self.commits: dict[str, Files] = {}
        self.branches: dict[str, str] = {}
        self.token = token
        self.gated = gated
        self.private = token is not None
        self.commit("main", files)

    def commit(self, branch: str, files: Files) -> str:
        """Puts a branch at a new commit with these files."""
        parent = self.branches.get(branch, "")
        text = json.dumps(
            [parent, branch, {n: hashlib.sha1(f).hexdigest() for n, f in files.items()}]
        )
        sha = hashlib.sha1(text.encode()).hexdigest()
        self.commits[sha], self.branches[branch] = dict(files), sha
        return sha

    def at(self, revision: str) -> tuple[str, Files] | None:
        sha = self.branches.get(revision, revision)
        return (sha, self.commits[sha]) if sha in self.commits else None


class Hub:
    """The server.

    Attributes:
        repositories: by id.
        requests: the method and the path of everything that was asked for.
        before_commit: called before a commit is taken.
    """

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.requests: list[str] = []
        self.uploads: dict[str, bytes] = {}
        self.pull_requests = 0
        self.before_commit: Any = lambda: None
        handler = type("Handler", (_Handler,), {"hub": self})
        self.server = LoopbackServer(("127.0.0.1", 0), handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def add(self, name: str, directory: Path, **settings: Any) -> Repository:
        """A repository with the files of a directory."""
        files = {
            path.relative_to(directory).as_posix(): path.read_bytes()
            for path in directory.rglob("*")
            if path.is_file()
        }
        self.repositories[name] = Repository(files, **settings)
        return self.repositories[name]

    def environment(self, home: Path, **more: str) -> dict[str, str]:
        """What a process needs to take this for the hub; an empty value takes a variable away."""
        own = {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_OFFLINE": "",
            "HF_TOKEN": "",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            **more,
        }
        given = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **own}
        return {key: value for key, value in given.items() if value}

    def run(
        self, home: Path, *words: str, cwd: Path | None = None, **more: str
    ) -> subprocess.CompletedProcess[str]:
        """Runs the command against this hub."""
        return subprocess.run(
            [sys.executable, "-m", "lorafast", *words],
            env=self.environment(home, **more),
            cwd=cwd or home,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )


@contextmanager
def running_hub() -> Iterator[Hub]:
    """A hub for the length of a block."""
    hub = Hub()
    thread = threading.Thread(target=hub.server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.server.shutdown()
        hub.server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"
    #: Method, what a path looks like, and which function answers.
    ROUTES = (
        ("GET", r"/api/models/([^/]+/[^/]+)(?:/revision/([^/]+))?", "info"),
        ("GET", r"/api/models/([^/]+/[^/]+)/tree/([^/]+)(?:/.*)?", "tree"),
        ("GET", r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", "resolve"),
        ("HEAD", r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", "resolve"),
        ("POST", r"/api/repos/create", "create"),
        ("POST", r"/api/validate-yaml", "validate"),
        ("POST", r"/api/models/([^/]+/[^/]+)/branch/([^/]+)", "branch"),
        ("POST", r"/api/models/([^/]+/[^/]+)/preupload/([^/]+)", "preupload"),
        ("POST", r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", "batch"),
        ("PUT", r"/lfs/([0-9a-f]+)", "upload"),
        ("POST", r"/api/models/([^/]+/[^/]+)/commit/([^/]+)", "commit"),
    )

    def log_message(self, *_: Any) -> None:
        """Says nothing."""

    def do_GET(self) -> None:
        path = urlsplit(self.path).path
        self.hub.requests.append(f"{self.command} {path}")
        length = int(self.headers.get("Content-Length") or 0)
        self.body = self.rfile.read(length) if length else self._chunks()
        for method, pattern, name in self.ROUTES:
            found = re.fullmatch(pattern, path)
            if found is not None and method == self.command:
                getattr(self, name)(*(unquote(part) if part else None for part in found.groups()))
                return
        self.answer(404, {"error": f"no route {self.command} {path}"})

    do_HEAD = do_POST = do_PUT = do_GET  # noqa: N815 (the names that http.server calls)

    def _chunks(self) -> bytes:
        parts = []
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
        return b"".join(parts)

    def answer(self, status: int, value: Any = None, **headers: str) -> None:
        body = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        for key, text in headers.items():
            self.send_header(key.replace("_", "-"), text)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def refuse(self, status: int, code: str, message: str) -> None:
        self.answer(status, {"error": message}, X_Error_Code=code, X_Error_Message=message)

    def found(self, name: str, *, content: bool = True) -> Repository | None:
        """The repository, once who asks may see it; else it is answered."""
        repository = self.hub.repositories.get(name)
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if token == "bad":
            # As the hub says it of a token that is none.
            message = "Invalid credentials in Authorization header"
            self.answer(401, {"error": message}, X_Error_Message=message)
        elif repository is None or (repository.token is not None and repository.token != token):
            # It does not tell the two apart.
            self.refuse(404 if token else 401, "RepoNotFound", "Repository not found")
        elif repository.gated and content:
            self.refuse(403, "GatedRepo", f"Access to model {name} is restricted")
        else:
            return repository
        return None

    def commit_of(self, name: str, revision: str | None) -> tuple[str, Files] | None:
        repository = self.found(name)
        if repository is None:
            return None
        found = repository.at(revision or "main")
        if found is None:
            self.refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return found

    def info(self, name: str, revision: str | None) -> None:
        found = self.commit_of(name, revision)
        if found is not None:
            sha, files = found
            siblings = [{"rfilename": each} for each in files]
            private = self.hub.repositories[name].private
            self.answer(
                200, {"id": name, "sha": sha, "private": private, "siblings": siblings, "tags": []}
            )

    def tree(self, name: str, revision: str) -> None:
        found = self.commit_of(name, revision)
        if found is not None:
            self.answer(200, [self.entry(path, data) for path, data in found[1].items()])

    @staticmethod
    def entry(path: str, data: bytes) -> dict[str, Any]:
        sha = hashlib.sha256(data).hexdigest()
        entry: dict[str, Any] = {"type": "file", "path": path, "size": len(data)}
        entry["oid"] = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
        if path.endswith(".safetensors"):
            entry["lfs"] = {"oid": sha, "size": len(data), "pointerSize": 134}
        return entry

    def resolve(self, name: str, revision: str, path: str) -> None:
        found = self.commit_of(name, revision)
        if found is None:
            return
        sha, files = found
        if path not in files:
            self.refuse(404, "EntryNotFound", "Entry not found")
            return
        data = files[path]
        entry = self.entry(path, data)
        etag = entry["lfs"]["oid"] if "lfs" in entry else entry["oid"]
        headers = {"ETag": f'"{etag}"', "X_Repo_Commit": sha, "Accept_Ranges": "bytes"}
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if asked is None:
            self.answer(200, data, **headers)
            return
        start = int(asked[1])
        part = data[start : int(asked[2]) + 1 if asked[2] else None]
        end = start + len(part) - 1
        self.answer(206, part, Content_Range=f"bytes {start}-{end}/{len(data)}", **headers)

    def create(self) -> None:
        asked = json.loads(self.body)
        name = f"{asked['organization']}/{asked['name']}"
        if name in self.hub.repositories:
            self.answer(409, {"error": "You already created this model repo"})
            return
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        private = asked.get("visibility") == "private" or asked.get("private") is True
        self.hub.repositories[name] = Repository(FRESH, token=token if private else None)
        self.answer(200, {"url": f"{self.hub.url}/{name}"})

    def validate(self) -> None:
        self.answer(200, {"errors": [], "warnings": []})

    def branch(self, name: str, branch: str) -> None:
        repository = self.found(name)
        if repository is not None:
            start = json.loads(self.body or b"{}").get("startingPoint") or "main"
            found = repository.at(start)
            assert found is not None
            repository.branches[branch] = found[0]
            self.answer(200, {})

    def preupload(self, name: str, revision: str) -> None:
        if self.commit_of(name, revision) is not None:
            asked = [each["path"] for each in json.loads(self.body)["files"]]
            modes = {path: "lfs" if path.endswith(".safetensors") else "regular" for path in asked}
            files = [
                {"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": None}
                for path, mode in modes.items()
            ]
            self.answer(200, {"files": files})

    def batch(self, name: str) -> None:
        if self.found(name) is not None:
            objects = [
                {**each, "actions": {"upload": {"href": f"{self.hub.url}/lfs/{each['oid']}"}}}
                for each in json.loads(self.body)["objects"]
            ]
            self.answer(200, {"transfer": "basic", "objects": objects})

    def upload(self, oid: str) -> None:
        assert hashlib.sha256(self.body).hexdigest() == oid
        self.hub.uploads[oid] = self.body
        self.answer(200, {})

    def commit(self, name: str, revision: str) -> None:
        self.hub.before_commit()
        found = self.commit_of(name, revision)
        if found is None:
            return
        repository, (head, files) = self.hub.repositories[name], found
        lines = [json.loads(line) for line in self.body.splitlines()]
        if lines[0]["value"].get("parentCommit") not in (None, head):
            self.answer(412, {"error": "A commit has happened since. Please refresh."})
            return
        files = dict(files)
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.uploads[value["oid"]]
            else:
                del files[value["path"]]
        answer: dict[str, Any] = {}
        if parse_qs(urlsplit(self.path).query).get("create_pr"):
            self.hub.pull_requests += 1
            revision = f"refs/pr/{self.hub.pull_requests}"
            answer["pullRequestUrl"] = f"{self.hub.url}/{name}/discussions/{self.hub.pull_requests}"
        sha = repository.commit(revision, files)
        self.answer(
            200, {"commitUrl": f"{self.hub.url}/{name}/commit/{sha}", "commitOid": sha, **answer}
        )
