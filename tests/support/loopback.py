"""A web server on this machine that many clients reach at once."""

from __future__ import annotations

from http.server import ThreadingHTTPServer


class LoopbackServer(ThreadingHTTPServer):
    """The standard library's keeps five clients waiting at most, and turns others away."""

    request_queue_size = 256
    daemon_threads = True
