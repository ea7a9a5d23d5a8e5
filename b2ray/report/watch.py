"""Serves the page of a run while the run goes on, to this machine only."""

from __future__ import annotations

import threading
from functools import partial
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from b2ray.config import Config
from b2ray.errors import ConfigError
from b2ray.report.page import page, stamp

HOST = "127.0.0.1"  # never another one, because the page has no password


class Source:
    """Makes the page of a run when it is requested, if the folder has changed since the last time.

    Args:
        path: the run's folder.
        config: the run's configuration.
    """

    def __init__(self, path: Path, config: Config) -> None:
        self.path, self.config = path, config
        self._lock = threading.Lock()
        self._cached: tuple[str, str] | None = None  # stamp, page

    def stamp(self) -> str:
        """Return a text that changes when the page does."""
        return stamp(self.path)

    def page(self) -> str:
        """Return the page as it is now, as HTML."""
        with self._lock:
            now = self.stamp()
            if self._cached is None or self._cached[0] != now:
                self._cached = now, page(self.path, self.config, live=True)
            return self._cached[1]


class Handler(BaseHTTPRequestHandler):
    """Answers `/` with the page, and `/stamp` with a text that changes when the page does.

    Args:
        source: makes the page.
        *args: what the server passes to the handler of a request.
    """

    def __init__(self, source: Source, *args: object) -> None:
        self.source = source
        super().__init__(*args)  # type: ignore[arg-type]

    def do_GET(self) -> None:
        """Answer one request."""
        # Under any other name, a page of another site may have been made to lead here (DNS
        # rebinding), which could then read the answer.
        name = (self.headers.get("Host") or "").partition(":")[0]
        if name not in (HOST, "localhost"):
            self._answer(HTTPStatus.FORBIDDEN, "this page is for this machine only")
        elif self.path == "/":
            try:
                self._answer(HTTPStatus.OK, self.source.page(), "text/html")
            except Exception as error:  # a file is being written, perhaps; the browser asks again
                reason = f"no page now: {type(error).__name__}: {error}"
                self._answer(HTTPStatus.INTERNAL_SERVER_ERROR, reason)
        elif self.path == "/stamp":
            self._answer(HTTPStatus.OK, self.source.stamp())
        else:
            self._answer(HTTPStatus.NOT_FOUND, "there is only /")

    def _answer(self, status: HTTPStatus, text: str, kind: str = "text/plain") -> None:
        content = text.encode()
        self.send_response(status)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        """Log nothing, because the page asks for its stamp every few seconds."""


def server(path: Path, config: Config, port: int) -> ThreadingHTTPServer:
    """Return a server of a run's page on 127.0.0.1; its `serve_forever` starts it.

    Args:
        path: the run's folder.
        config: the run's configuration.
        port: the port; 0 takes a free one.

    Raises:
        ConfigError: the port cannot be used.
    """
    try:
        http_server = ThreadingHTTPServer((HOST, port), partial(Handler, Source(path, config)))
    except (OSError, OverflowError) as error:
        raise ConfigError(
            f"--port {port} cannot be used: {error}; give another, or 0 for one that is free"
        ) from error
    http_server.daemon_threads = True
    return http_server
