"""A proxy that breaks answers of a server behind it, as a test says, and counts what it broke."""

from __future__ import annotations

import http.client
import re
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from typing import Literal, NamedTuple

from support.loopback import LoopbackServer

#: How an answer is broken: by a status; by a connection that is reset, before the request was
#: passed on (`reset`) or after (`reset_after`); a body that ends at its half, that never comes, or
#: of which a byte is another; another ETag; or all of an object in the place of a range.
Kind = Literal[
    "503", "429", "403", "reset", "reset_after", "truncate", "stall", "corrupt", "etag",
    "ignore_range",
]  # fmt: skip


class Fault(NamedTuple):
    """Which requests are broken, and how.

    Attributes:
        kind: how.
        method: of which method.
        match: what the path and the query have, as a regular expression.
        every: each how many-th of them.
        most: how many at the most.
        skip: how many of them pass first.
    """

    kind: Kind
    method: str = "GET"
    match: str = ""
    every: int = 1
    most: int = 1 << 30
    skip: int = 0


class FaultProxy:
    """A proxy before one server.

    Attributes:
        url: where it listens.
        fault: what it breaks; `None` passes everything.
        broken: how many answers it has broken since that was set.
        dropped: headers of requests that are not passed on, in small letters.
        before: what is done before each PUT to paths that have the pattern.
        code: what answers with an error status say.
        requests: method and path of every request.
        latency: seconds before each answer.
        bandwidth: bytes a second of all answers' bodies together; no bound if 0.
    """

    def __init__(self, host: str, port: int) -> None:
        self.host, self.port = host, port
        self.url = ""
        self.fault: Fault | None = None
        self.broken = 0
        self.code = "SlowDown"
        self.dropped: set[str] = set()
        self.before: tuple[str, Callable[[], object]] = ("", lambda: None)
        self.latency = 0.0
        self.bandwidth = 0
        self.requests: list[tuple[str, str]] = []
        self._seen = 0
        self._free_at = 0.0
        self._lock = threading.Lock()

    def set(self, fault: Fault | None) -> None:
        """Breaks something else from now on, and counts anew."""
        with self._lock:
            self.fault, self.broken, self._seen = fault, 0, 0
            self.requests.clear()

    def error_body(self) -> bytes:
        """What an answer with an error status says."""
        return f"<Error><Code>{self.code}</Code><Message>broken</Message></Error>".encode()

    def kind_for(self, method: str, path: str) -> Kind | None:
        """How the answer to this request is to be broken, if it is."""
        with self._lock:
            self.requests.append((method, path))
            fault = self.fault
            if fault is None or fault.method != method or not re.search(fault.match, path):
                return None
            self._seen += 1
            place = self._seen - fault.skip
            if place <= 0 or place % fault.every or self.broken >= fault.most:
                return None
            self.broken += 1
            return fault.kind

    def wait_for(self, bytes_sent: int) -> None:
        """Waits as a line of that latency and bandwidth would."""
        time.sleep(self.latency)
        if self.bandwidth:
            with self._lock:
                self._free_at = max(self._free_at, time.monotonic()) + bytes_sent / self.bandwidth
                rest = self._free_at - time.monotonic()
            time.sleep(max(rest, 0.0))


def _handler(proxy: FaultProxy) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *arguments: object) -> None:
            pass

        def _pass_on(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            kind = proxy.kind_for(self.command, self.path)
            if kind == "reset":
                self._reset()
                return
            if kind in ("503", "429", "403"):
                self._end(int(kind), [], proxy.error_body())
                return
            # Host stays, or the signature would be another.
            headers = [
                (name, value) for name, value in self.headers.items() if name != "Connection"
            ]
            headers = [each for each in headers if each[0].lower() not in proxy.dropped]
            if kind == "ignore_range":
                headers = [(name, value) for name, value in headers if name.lower() != "range"]
            match, act = proxy.before
            if match and self.command == "PUT" and re.search(match, self.path):
                act()
            connection = http.client.HTTPConnection(proxy.host, proxy.port, timeout=60)
            try:
                connection.putrequest(
                    self.command, self.path, skip_host=True, skip_accept_encoding=True
                )
                for name, value in headers:
                    connection.putheader(name, value)
                connection.endheaders(body or None)
                answer = connection.getresponse()
                content = answer.read()
            finally:
                connection.close()
            if kind == "reset_after":
                self._reset()
                return
            if kind == "stall":
                # Longer than any test's patience; the client ends it.
                time.sleep(60)
                self._reset()
                return
            if kind == "corrupt" and content:
                middle = len(content) // 2
                content = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
            given = answer.getheaders()
            if kind == "etag":
                given = [
                    (name, '"another"' if name.lower() == "etag" else value)
                    for name, value in given
                ]
            proxy.wait_for(len(content))
            self._end(answer.status, given, content, cut=kind == "truncate")

        def _end(
            self, status: int, headers: list[tuple[str, str]], body: bytes, *, cut: bool = False
        ) -> None:
            self.send_response_only(status)
            own = {"content-length", "transfer-encoding", "connection"}
            length = str(len(body))
            for name, value in headers:
                if name.lower() == "content-length" and self.command == "HEAD":
                    length = value
                if name.lower() not in own:
                    self.send_header(name, value)
            self.send_header("Content-Length", length)
            self.end_headers()
            if cut:
                self.wfile.write(body[: len(body) // 2])
                self._reset()
            elif self.command != "HEAD":
                self.wfile.write(body)

        def _reset(self) -> None:
            self.wfile.flush()
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.close_connection = True

    for method in ("GET", "HEAD", "PUT", "POST", "DELETE"):
        setattr(Handler, f"do_{method}", Handler._pass_on)
    return Handler


class _Server(LoopbackServer):
    def handle_error(self, request: object, client_address: object) -> None:
        """Nothing: clients that go away are what this is about."""


@contextmanager
def before(url: str) -> Iterator[FaultProxy]:
    """A proxy before the server at a URL, stopped at the end."""
    host, _, port = url.removeprefix("http://").partition(":")
    proxy = FaultProxy(host, int(port))
    server = _Server(("127.0.0.1", 0), _handler(proxy))
    proxy.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield proxy
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
