"""An S3 server on loopback, and the few requests that tests make of it by themselves."""

from __future__ import annotations

import http.client
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import quote, unquote
from xml.etree import ElementTree

KEY, SECRET = "AKIDTESTTEST", "the-secret-of-the-tests"


class Bucket:
    """A bucket of an S3 server that checks no signatures.

    Attributes:
        endpoint: the server's URL.
        name: the bucket's.
    """

    def __init__(self, endpoint: str, name: str) -> None:
        self.endpoint, self.name = endpoint, name
        self._request("PUT", "")

    def _request(
        self, method: str, path: str, body: bytes = b"", query: str = ""
    ) -> tuple[int, bytes]:
        host = self.endpoint.removeprefix("http://")
        connection = http.client.HTTPConnection(host, timeout=60)
        # moto tells by this what is spoken to.
        scope = f"{KEY}/20260101/us-east-1/s3/aws4_request"
        headers = {"Authorization": f"AWS4-HMAC-SHA256 Credential={scope}, Signature=0"}
        try:
            connection.request(method, f"/{self.name}{quote(path)}{query}", body, headers)
            answer = connection.getresponse()
            return answer.status, answer.read()
        finally:
            connection.close()

    def put(self, key: str, content: bytes) -> None:
        """Stores an object."""
        status, said = self._request("PUT", f"/{key}", content)
        assert status == 200, said

    def get(self, key: str) -> bytes:
        """An object's content."""
        status, content = self._request("GET", f"/{key}")
        assert status == 200, (key, content)
        return content

    def delete(self, key: str) -> None:
        """Removes an object."""
        self._request("DELETE", f"/{key}")

    def keys(self, prefix: str = "") -> list[str]:
        """The names of all objects that begin so."""
        status, content = self._request("GET", "", query=f"?list-type=2&prefix={quote(prefix)}")
        assert status == 200, content
        found = ElementTree.fromstring(content).findall(".//{*}Key")
        return sorted(unquote(each.text or "") for each in found)

    def uploads(self) -> list[str]:
        """The names of objects of which parts lie there."""
        status, content = self._request("GET", "", query="?uploads")
        assert status == 200, content
        return sorted(
            each.text or "" for each in ElementTree.fromstring(content).findall(".//{*}Key")
        )

    def upload(self, folder: Path, prefix: str) -> str:
        """Stores a folder's files; returns the URL."""
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                self.put(f"{prefix}/{path.relative_to(folder)}", path.read_bytes())
        return f"s3://{self.name}/{prefix}"

    def download(self, prefix: str) -> dict[str, bytes]:
        """The files below a prefix, by their names from there."""
        return {key.removeprefix(f"{prefix}/"): self.get(key) for key in self.keys(f"{prefix}/")}

    def options(self, endpoint: str | None = None) -> dict[str, str]:
        """What lorafast is told of it; of a proxy before it, with that one's URL."""
        return {
            "aws_access_key_id": KEY,
            "aws_secret_access_key": SECRET,
            "aws_endpoint_url": endpoint or self.endpoint,
            "aws_region": "us-east-1",
        }


def free_port() -> int:
    """A port that nobody listens on at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextmanager
def moto() -> Iterator[str]:
    """moto as a server of its own process: its URL."""
    assert find_spec("moto") is not None, "moto[server] is in the test extra"
    port = free_port()
    command = [sys.executable, "-W", "ignore", "-m", "moto.server", "-p", str(port)]
    with _running(command, port):
        yield f"http://127.0.0.1:{port}"


def s3s_fs() -> str | None:
    """The program of the faster server, where it is installed (`make s3-server`)."""
    built = Path(__file__).parent.parent.parent / "target" / "s3s-fs" / "bin" / "s3s-fs"
    return str(built) if built.is_file() else shutil.which("s3s-fs")


@contextmanager
def serving_s3s(program: str, root: Path) -> Iterator[str]:
    """The faster server before a directory, whose folders are its buckets: its URL."""
    port = free_port()
    keys = ("--access-key", KEY, "--secret-key", SECRET)
    command = [program, *keys, "--host", "127.0.0.1", "--port", str(port), str(root)]
    with _running(command, port):
        yield f"http://127.0.0.1:{port}"


@contextmanager
def _running(command: list[str], port: int) -> Iterator[None]:
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=dict(os.environ)
    )
    try:
        deadline = time.monotonic() + 90
        while True:
            assert process.poll() is None, f"{command} ended"
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                break
            except OSError:
                assert time.monotonic() < deadline, f"{command} does not listen"
                time.sleep(0.1)
        yield
    finally:
        process.terminate()
        process.wait(timeout=20)
