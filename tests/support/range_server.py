"""A web server that answers ranges of a directory's files, and counts what it was asked."""

from __future__ import annotations

import base64
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote

from support.loopback import LoopbackServer


class Asked(NamedTuple):
    """One request: its method, its path, and the range of a GET."""

    method: str
    path: str
    range: tuple[int, int] | None


class RangeServer:
    """Serves a directory.

    Attributes:
        url: where.
        asked: every request so far.
        latency: seconds before each answer.
        wait_for: called with the bytes of each body before it is sent.
        user: what `user:password` has to be sent, if anything.
        allows: whether a method may be used on a path, which has its query; 403 if not.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.asked: list[Asked] = []
        self.user: str | None = None
        self.allows: Callable[[str, str], bool] = lambda method, path: True
        self.latency = 0.0
        self.wait_for: Callable[[int], object] = lambda _: None
        self.url = ""

    def bytes_of(self, name: str) -> list[int]:
        """How often each byte of a file was sent."""
        counts = [0] * (self.root / name).stat().st_size
        for each in self.asked:
            if each.method == "GET" and each.path == f"/{name}" and each.range is not None:
                for position in range(*each.range):
                    counts[position] += 1
        return counts


def _handler(server: RangeServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *arguments: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self._answer(with_body=False)

        def do_GET(self) -> None:
            self._answer(with_body=True)

        def _answer(self, *, with_body: bool) -> None:
            path = unquote(self.path.partition("?")[0])
            time.sleep(server.latency)
            if not server.allows(self.command, self.path):
                self._end(403, b"")
                return
            if server.user is not None:
                expected = "Basic " + base64.b64encode(server.user.encode()).decode()
                if self.headers.get("Authorization") != expected:
                    self._end(401, b"")
                    return
            file = server.root / path.lstrip("/")
            if not file.is_file():
                server.asked.append(Asked(self.command, path, None))
                self._end(404, b"")
                return
            found = file.stat()
            headers = {
                "ETag": f'"{found.st_mtime_ns:x}-{found.st_size:x}"',
                "Last-Modified": formatdate(found.st_mtime, usegmt=True),
                "Accept-Ranges": "bytes",
            }
            wanted = self.headers.get("If-Match")
            if wanted not in (None, "*", headers["ETag"]):
                self._end(412, b"")
                return
            span = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
            if span is None or not with_body:
                server.asked.append(Asked(self.command, path, None))
                content = file.read_bytes() if with_body else b""
                self._end(200, content, headers, length=found.st_size)
                return
            start, end = int(span[1]), min(int(span[2]) + 1, found.st_size)
            server.asked.append(Asked("GET", path, (start, end)))
            headers["Content-Range"] = f"bytes {start}-{end - 1}/{found.st_size}"
            with file.open("rb") as opened:
                opened.seek(start)
                self._end(206, opened.read(end - start), headers)

        def _end(
            self,
            status: int,
            body: bytes,
            headers: dict[str, str] | None = None,
            *,
            length: int | None = None,
        ) -> None:
            self.send_response(status)
            for name, value in (headers or {}).items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body) if length is None else length))
            self.end_headers()
            # In pieces, as a line brings them.
            for start in range(0, len(body), 1 << 18):
                piece = body[start : start + (1 << 18)]
                server.wait_for(len(piece))
                self.wfile.write(piece)

    return Handler


@contextmanager
def serving(root: Path) -> Iterator[RangeServer]:
    """A server of a directory on loopback, stopped at the end."""
    server = RangeServer(root)
    http = LoopbackServer(("127.0.0.1", 0), _handler(server))
    http.daemon_threads = True
    server.url = f"http://127.0.0.1:{http.server_address[1]}"
    thread = threading.Thread(target=http.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        http.shutdown()
        http.server_close()
        thread.join()
