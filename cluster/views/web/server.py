"""The server of the pages: this machine alone, reading alone."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

from cluster.faults import ConfigError
from cluster.views.selection import Selection
from cluster.views.web.answer import Answer
from cluster.views.web.pages import Pages
from cluster.views.web.query import Query

DEFAULT_PORT = 8440
ADDRESS = "127.0.0.1"
_OWN_NAMES = {ADDRESS, "localhost"}
_HEADERS = {
    "Cache-Control": "no-store",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}


class Server(ThreadingHTTPServer):
    """Serves the pages of one run on 127.0.0.1.

    Args:
        run: The run folder.
        port: Its port, 0 for any free one; None for the usual one or, where that is taken, any free one.

    Raises:
        ConfigError: If the folder holds no run, or the port is taken.
    """

    daemon_threads = True

    def __init__(self, run: Path, port: int | None = None) -> None:
        self.pages = Pages(run)
        try:
            super().__init__((ADDRESS, DEFAULT_PORT if port is None else port), _Request)
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
            if port is not None:
                raise ConfigError(f"port {port} is taken", "leave --port out, and a free one is found") from None
            super().__init__((ADDRESS, 0), _Request)

    @property
    def url(self) -> str:
        """Address of the first page, without the slash."""
        return f"http://{ADDRESS}:{self.server_address[1]}"


class _Request(BaseHTTPRequestHandler):
    """One connection. A page of another site may send a browser here under its own name: that name is refused."""

    server: Server
    timeout = 20  # seconds that a silent connection is kept
    protocol_version = "HTTP/1.1"
    server_version = "align"
    sys_version = ""

    def do_GET(self) -> None:
        host = _name_in(self.headers.get("Host", ""))
        if host not in _OWN_NAMES:
            names = " or ".join(sorted(_OWN_NAMES))
            self._send(Answer.text(HTTPStatus.FORBIDDEN, f"expected the host {names} in the address, got {host!r}"))
        else:
            self._send(self.server.pages.answer(self.path))

    do_HEAD = do_GET  # noqa: N815

    def _refuse(self) -> None:
        self.close_connection = True  # its body stays unread
        self._send(Answer.text(HTTPStatus.METHOD_NOT_ALLOWED, f"{self.command} is refused: these pages are only read"))

    do_POST = do_PUT = do_PATCH = do_DELETE = do_OPTIONS = _refuse  # noqa: N815

    def _send(self, answer: Answer) -> None:
        with contextlib.suppress(ConnectionError):  # the reader went on to another page
            self._write(answer)

    def _write(self, answer: Answer) -> None:
        self.send_response(answer.status)
        for name, value in (_HEADERS | answer.headers).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(answer.body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(answer.body)

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: the terminal shows the address alone."""


def _name_in(host: str) -> str | None:
    """The name without the port."""
    try:
        return urlsplit(f"//{host}").hostname
    except ValueError:
        return None


def serve(
    run: Path,
    port: int | None,
    selection: Selection,
    ticket: int | None,
    repeat: int | None,
    order: str | None,
    say: Callable[[str], None],
) -> None:
    """Serve the pages until Ctrl-C.

    Args:
        run: The run folder.
        port: As `Server` takes it.
        selection: Together with the next three what the page is about whose address is printed.
        ticket: As `align inspect` takes it.
        repeat: So too.
        order: So too.
        say: Prints.

    Raises:
        ConfigError: As `Server` does, or if there is no page about that.
    """
    path = address(selection, ticket, repeat, order)
    with Server(run, port) as server:
        say(f"{run} is at {server.url}{path}\nOnly this machine can reach it. Ctrl-C ends it.")
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            say("no longer served")


def address(selection: Selection, ticket: int | None, repeat: int | None, order: str | None) -> str:
    """Path of the page about what `align inspect` names.

    Raises:
        ConfigError: If there is none.
    """
    step = selection.first_step
    if ticket is not None or repeat is not None:
        if step is None or ticket is None:
            raise ConfigError("a trajectory is named by its step, its ticket and its repeat", "add what is missing")
        return f"/step/{step}/ticket/{ticket}" + ("" if repeat is None else f"/repeat/{repeat}")
    if step is not None and order in (None, "pull") and selection == Selection(step, step):
        return f"/step/{step}"
    return "/" if selection == Selection() and order is None else Query(selection, order or "").address()
