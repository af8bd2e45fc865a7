"""The requests of Google Cloud Storage's XML interface that lorafast makes, answered from memory.

It proves addresses, headers and conditions, not Google's store. One that is hollow keeps of what
was uploaded in parts how long it was, so that a model larger than this machine has room for can be
written to it.
"""

from __future__ import annotations

import hashlib
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from typing import NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

from support.loopback import LoopbackServer

DATE = "Thu, 01 Jan 2026 00:00:00 GMT"


class Hollow(NamedTuple):
    """Bytes of which only the number is known, and a digest."""

    count: int
    digest: str


class GcsStub:
    """A store.

    Attributes:
        url: where it listens.
        objects: content by `bucket/name`.
        hollows: the same of what was uploaded in parts, if it is hollow.
        bearers: what was sent as a token.
    """

    def __init__(self, *, is_hollow: bool = False) -> None:
        self.url = ""
        self.is_hollow = is_hollow
        self.objects: dict[str, bytes] = {}
        self.hollows: dict[str, Hollow] = {}
        self.uploads: dict[str, dict[int, bytes]] = {}
        self.parts: dict[str, dict[int, Hollow]] = {}
        self.bearers: set[str | None] = set()
        self.lock = threading.Lock()


def _handler(stub: GcsStub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *arguments: object) -> None:
            pass

        def _take(self) -> tuple[str, dict[str, list[str]], bytes]:
            stub.bearers.add(self.headers.get("Authorization"))
            parts = urlsplit(self.path)
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            query = parse_qs(parts.query, keep_blank_values=True)
            return unquote(parts.path).lstrip("/"), query, body

        def do_GET(self) -> None:
            name, query, _ = self._take()
            if name in stub.hollows:
                hollow = stub.hollows[name]
                headers = {"ETag": f'"{hollow.digest}"', "Last-Modified": DATE}
                self._end(
                    200 if self.command == "HEAD" else 403, headers=headers, length=hollow.count
                )
                return
            if "list-type" in query:
                prefix = f"{name}/{query.get('prefix', [''])[0]}"
                found = sorted(each for each in stub.objects if each.startswith(prefix))
                entries = "".join(
                    f"<Contents><Key>{each.partition('/')[2]}</Key>"
                    f"<Size>{len(stub.objects[each])}</Size>"
                    "<LastModified>2026-01-01T00:00:00.000Z</LastModified>"
                    f"<ETag>{self._etag(each)}</ETag></Contents>"
                    for each in found
                )
                self._end(200, f"<ListBucketResult>{entries}</ListBucketResult>".encode())
                return
            content = stub.objects.get(name)
            if content is None:
                self._end(404)
                return
            headers = {"ETag": self._etag(name), "Last-Modified": DATE}
            headers["x-goog-generation"] = "1"
            wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
            if wanted is None or self.command == "HEAD":
                self._end(200, content, headers)
                return
            start, end = int(wanted[1]), min(int(wanted[2]) + 1, len(content))
            headers["Content-Range"] = f"bytes {start}-{end - 1}/{len(content)}"
            self._end(206, content[start:end], headers)

        do_HEAD = do_GET  # noqa: N815 (what the server calls)

        def do_PUT(self) -> None:
            name, query, body = self._take()
            if "uploadId" in query:
                number = int(query["partNumber"][0])
                if stub.is_hollow:
                    digest = hashlib.sha256(body).hexdigest()
                    stub.parts[query["uploadId"][0]][number] = Hollow(len(body), digest)
                else:
                    stub.uploads[query["uploadId"][0]][number] = body
                self._end(200, headers={"ETag": f'"part-{number}"'})
                return
            with stub.lock:
                if self.headers.get("x-goog-if-generation-match") == "0" and name in stub.objects:
                    self._end(412)
                    return
                stub.objects[name] = body
            self._end(200, headers={"ETag": self._etag(name), "x-goog-generation": "1"})

        def do_POST(self) -> None:
            name, query, body = self._take()
            if "uploads" in query:
                upload = f"upload-{len(stub.uploads)}"
                stub.uploads[upload], stub.parts[upload] = {}, {}
                said = f"<InitiateMultipartUploadResult><UploadId>{upload}</UploadId>"
                self._end(200, f"{said}</InitiateMultipartUploadResult>".encode())
                return
            parts = stub.uploads.pop(query["uploadId"][0])
            hollows = stub.parts.pop(query["uploadId"][0])
            named = [int(each) for each in re.findall(rb"<PartNumber>(\d+)<", body)]
            if stub.is_hollow:
                digest = hashlib.sha256("".join(hollows[each].digest for each in named).encode())
                count = sum(hollows[each].count for each in named)
                stub.hollows[name] = Hollow(count, digest.hexdigest())
                etag = f'"{digest.hexdigest()}"'
            else:
                stub.objects[name] = b"".join(parts[number] for number in named)
                etag = self._etag(name)
            said = f"<CompleteMultipartUploadResult><ETag>{etag}</ETag>"
            self._end(
                200,
                f"{said}</CompleteMultipartUploadResult>".encode(),
                {"x-goog-generation": "1"},
            )

        def do_DELETE(self) -> None:
            name, query, _ = self._take()
            if "uploadId" in query:
                stub.uploads.pop(query["uploadId"][0], None)
            self._end(204 if stub.objects.pop(name, None) is not None or query else 404)

        def _etag(self, name: str) -> str:
            return f'"{hashlib.sha256(stub.objects[name]).hexdigest()[:16]}"'

        def _end(
            self,
            status: int,
            body: bytes = b"",
            headers: dict[str, str] | None = None,
            length: int | None = None,
        ) -> None:
            self.send_response(status)
            for key, value in (headers or {}).items():
                self.send_header(key, value)
            self.send_header("Content-Length", str(len(body) if length is None else length))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

    return Handler


@contextmanager
def gcs(*, is_hollow: bool = False) -> Iterator[GcsStub]:
    """A stub on loopback, stopped at the end."""
    stub = GcsStub(is_hollow=is_hollow)
    server = LoopbackServer(("127.0.0.1", 0), _handler(stub))
    server.daemon_threads = True
    stub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield stub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
