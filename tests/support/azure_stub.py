"""The requests of Azure's blob storage that lorafast makes, answered from memory.

Azure's own emulator is a package of npm, which the tests do without. This proves addresses,
headers, conditions and the rules of names, not Azure's store; signatures are not computed anew.
"""

from __future__ import annotations

import hashlib
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

from support.loopback import LoopbackServer

DATE = "Thu, 01 Jan 2026 00:00:00 GMT"
#: What Azure takes for the name of an entry of a blob's metadata: an identifier of C#.
IDENTIFIER = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


class AzureStub:
    """The blobs of one account.

    Attributes:
        url: where it listens.
        blobs: content by `container/name`.
        blocks: what was sent of blobs that are not finished, by name and block id.
        told: the beginning of each authorization that came.
        refused: the end of the name of what may not be written.
    """

    def __init__(self) -> None:
        self.url = ""
        self.blobs: dict[str, bytes] = {}
        self.metadata: dict[str, dict[str, str]] = {}
        self.blocks: dict[str, dict[str, bytes]] = {}
        self.told: set[str] = set()
        self.refused: str | None = None
        self.lock = threading.Lock()


def _handler(stub: AzureStub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *arguments: object) -> None:
            pass

        def _take(self) -> tuple[str, dict[str, str], bytes]:
            stub.told.add(self.headers.get("Authorization", "").partition(":")[0])
            parts = urlsplit(self.path)
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            query = {key: each[0] for key, each in parse_qs(parts.query).items()}
            return unquote(parts.path).strip("/"), query, body

        def _etag(self, name: str) -> str:
            return f'"0x{hashlib.sha256(stub.blobs[name]).hexdigest()[:15].upper()}"'

        def do_GET(self) -> None:
            name, query, _ = self._take()
            if query.get("comp") == "list":
                self._list(f"{name}/", query.get("prefix", ""))
                return
            with stub.lock:
                content = stub.blobs.get(name)
            if content is None:
                self._end(404, headers={"x-ms-error-code": "BlobNotFound"})
                return
            headers = {"ETag": self._etag(name), "Last-Modified": DATE, "Accept-Ranges": "bytes"}
            headers |= stub.metadata.get(name, {})
            if self.headers.get("If-Match") not in (None, "*", headers["ETag"]):
                self._end(412, headers={"x-ms-error-code": "ConditionNotMet"})
                return
            wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
            if wanted is None or self.command == "HEAD":
                self._end(200, content, headers)
                return
            start, end = int(wanted[1]), min(int(wanted[2]) + 1, len(content))
            headers["Content-Range"] = f"bytes {start}-{end - 1}/{len(content)}"
            self._end(206, content[start:end], headers)

        do_HEAD = do_GET  # noqa: N815 (what the server calls)

        def _list(self, container: str, prefix: str) -> None:
            found = sorted(each for each in stub.blobs if each.startswith(container + prefix))
            entries = "".join(
                f"<Blob><Name>{escape(each.removeprefix(container))}</Name><Properties>"
                f"<Last-Modified>{DATE}</Last-Modified><Etag>{self._etag(each).strip(chr(34))}</Etag>"
                f"<Content-Length>{len(stub.blobs[each])}</Content-Length>"
                "<Content-Type>application/octet-stream</Content-Type>"
                "</Properties></Blob>"
                for each in found
            )
            said = f"<EnumerationResults><Blobs>{entries}</Blobs><NextMarker/></EnumerationResults>"
            self._end(200, said.encode())

        def do_PUT(self) -> None:
            name, query, body = self._take()
            if stub.refused is not None and name.endswith(stub.refused):
                self._end(403, headers={"x-ms-error-code": "AuthorizationPermissionMismatch"})
                return
            metadata = {
                key: value
                for key, value in self.headers.items()
                if key.lower().startswith("x-ms-meta-")
            }
            if any(not IDENTIFIER.fullmatch(key[len("x-ms-meta-") :]) for key in metadata):
                self._end(400, headers={"x-ms-error-code": "InvalidMetadata"})
                return
            with stub.lock:
                if query.get("comp") == "block":
                    stub.blocks.setdefault(name, {})[query["blockid"]] = body
                    self._end(201)
                    return
                if self.headers.get("If-None-Match") == "*" and name in stub.blobs:
                    self._end(409, headers={"x-ms-error-code": "BlobAlreadyExists"})
                    return
                if query.get("comp") == "blocklist":
                    blocks = stub.blocks.pop(name, {})
                    named = re.findall(r"<(?:Uncommitted|Latest)>([^<]+)<", body.decode())
                    if any(each not in blocks for each in named):
                        self._end(400, headers={"x-ms-error-code": "InvalidBlockList"})
                        return
                    body = b"".join(blocks[each] for each in named)
                else:
                    assert self.headers.get("x-ms-blob-type") == "BlockBlob"
                stub.blobs[name], stub.metadata[name] = body, metadata
            self._end(201, headers={"ETag": self._etag(name), "Last-Modified": DATE})

        def do_POST(self) -> None:
            _, query, body = self._take()
            assert query.get("comp") == "batch", self.path
            asked = re.findall(rb"Content-ID: (\d+)\r\n.*?DELETE /(\S+) ", body, re.DOTALL)
            boundary, answers = "batchresponse_1", []
            for number, path in asked:
                name = unquote(path.decode()).partition("?")[0]
                with stub.lock:
                    status = (
                        "404 Not Found" if stub.blobs.pop(name, None) is None else "202 Accepted"
                    )
                answers.append(
                    f"--{boundary}\r\nContent-Type: application/http\r\n"
                    f"Content-ID: {number.decode()}\r\n\r\nHTTP/1.1 {status}\r\n\r\n"
                )
            said = "".join(answers) + f"--{boundary}--\r\n"
            self._end(202, said.encode(), {"Content-Type": f"multipart/mixed; boundary={boundary}"})

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
def azure() -> Iterator[AzureStub]:
    """A stub on loopback, stopped at the end."""
    stub = AzureStub()
    server = LoopbackServer(("127.0.0.1", 0), _handler(stub))
    stub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield stub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
