"""The requests of Google Cloud Storage's XML interface that lorafast makes, answered from memory.

It proves addresses, headers and conditions, not Google's store.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from urllib.parse import parse_qs, unquote, urlsplit

from support.loopback import LoopbackServer

DATE = "Thu, 01 Jan 2026 00:00:00 GMT"


class GcsStub:
    """A store.

    Attributes:
        url: where it listens.
        objects: content by `bucket/name`.
        bearers: what was sent as a token.
    """

    def __init__(self) -> None:
        self.url = ""
        self.objects: dict[str, bytes] = {}
        self.uploads: dict[str, dict[int, bytes]] = {}
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
                stub.uploads[upload] = {}
                said = f"<InitiateMultipartUploadResult><UploadId>{upload}</UploadId>"
                self._end(200, f"{said}</InitiateMultipartUploadResult>".encode())
                return
            parts = stub.uploads.pop(query["uploadId"][0])
            named = [int(each) for each in re.findall(rb"<PartNumber>(\d+)<", body)]
            stub.objects[name] = b"".join(parts[number] for number in named)
            said = f"<CompleteMultipartUploadResult><ETag>{self._etag(name)}</ETag>"
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
            import hashlib

            return f'"{hashlib.sha256(stub.objects[name]).hexdigest()[:16]}"'

        def _end(
            self, status: int, body: bytes = b"", headers: dict[str, str] | None = None
        ) -> None:
            self.send_response(status)
            for key, value in (headers or {}).items():
                self.send_header(key, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

    return Handler


@contextmanager
def gcs() -> Iterator[GcsStub]:
    """A stub on loopback, stopped at the end."""
    stub = GcsStub()
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
