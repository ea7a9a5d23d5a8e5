"""The page while a run goes on, served to this machine alone."""

from __future__ import annotations

import threading
from functools import partial
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from b2ray.config import Config
from b2ray.errors import ConfigError
from b2ray.report.page import page, stamp

HOST = "127.0.0.1"  # never another: a run's page has no password


class Source:
    """The page of a run, made anew when its folder has changed and somebody asks."""

    def __init__(self, path: Path, config: Config) -> None:
        self.path, self.config = path, config
        self._lock = threading.Lock()
        self._made: tuple[str, str] | None = None  # stamp, page

    def stamp(self) -> str:
        """What changes with the page."""
        return stamp(self.path)

    def page(self) -> str:
        """The page as it is now."""
        with self._lock:
            now = self.stamp()
            if self._made is None or self._made[0] != now:
                self._made = now, page(self.path, self.config, live=True)
            return self._made[1]


class Handler(BaseHTTPRequestHandler):
    """`/` is the page and `/stamp` what changes with it."""

    def __init__(self, source: Source, *args: object) -> None:
        self.source = source
        super().__init__(*args)  # type: ignore[arg-type]

    def do_GET(self) -> None:
        """Answer one request."""
        # A page elsewhere that is made to lead here has another name.
        name = (self.headers.get("Host") or "").partition(":")[0]
        if name not in (HOST, "localhost"):
            self._answer(HTTPStatus.FORBIDDEN, "this page is for this machine only")
        elif self.path == "/":
            try:
                self._answer(HTTPStatus.OK, self.source.page(), "text/html")
            except Exception as error:  # the next try may find what was just being written
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
        """Nothing: a line for every look would hide what matters."""


def server(path: Path, config: Config, port: int) -> ThreadingHTTPServer:
    """A server for a run's page, on loopback; `serve_forever` starts it.

    Args:
        port: 0 takes one that is free.

    Raises:
        ConfigError: the port cannot be used.
    """
    try:
        made = ThreadingHTTPServer((HOST, port), partial(Handler, Source(path, config)))
    except (OSError, OverflowError) as error:
        raise ConfigError(
            f"--port {port} cannot be used: {error}; give another, or 0 for one that is free"
        ) from error
    made.daemon_threads = True
    return made
