"""The metrics address: Prometheus' text at /metrics, a page for people at /, and what that page asks for.

It knows HTTP as far as one GET goes and nothing of what is counted. What must hold: a visitor that stalls, floods or
sends garbage holds one of a few threads for some seconds, and never the disk's clients; `close` leaves nothing behind.
"""

from __future__ import annotations

import contextlib
import json
import re
import socket
import socketserver
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cowslice.errors import BadOption, StorageError
from cowslice.serve.metrics import CONTENT_TYPE, Metrics, Reading, exposition

if TYPE_CHECKING:
    from typing import Self

DEFAULT_HOST = "127.0.0.1"
MOST_VISITORS = 32  # at once; a browser needs one or two, a scraper one
PATIENCE = 5.0  # seconds for a visitor to ask, and again to take the answer
MOST_HEAD = 8192  # bytes of a request; browsers send about 700
_POLL = 0.2  # seconds until a server that is told to end notices
_PAGE = Path(__file__).with_name("page.html")
_REQUEST = re.compile(rb"([A-Z]{1,20}) (/[!-~]*) HTTP/1\.[01]\r?\n")
# The page brings all it needs; nothing it could be made to show can load or send anything elsewhere.
_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_STATUS = {200: "OK", 400: "Bad Request", 404: "Not Found", 405: "Method Not Allowed", 500: "Internal Server Error"}

Answer = tuple[int, str, bytes]  # status, content type, body


def parse_address(text: str) -> tuple[str, int]:
    """(host, port) of "HOST:PORT", "[IPv6]:PORT" or "PORT"; port 0 is any free one. Raises BadOption."""
    match = re.fullmatch(r"(?:(?:\[([^\]]+)\]|([^:]*)):)?(\d{1,5})", text)
    if not match or int(match[3]) > 65535:
        raise BadOption(f"the address for metrics is '{text}', expected HOST:PORT or PORT")
    return match[1] or match[2] or DEFAULT_HOST, int(match[3])


class MetricsServer:
    """Answer HTTP about `metrics` at "HOST:PORT" or "PORT", in threads of its own, until `close`.

    Raises BadOption for an address that is none, StorageError where it cannot listen.
    """

    def __init__(self, address: str, metrics: Metrics) -> None:
        host, port = parse_address(address)
        try:
            family, _, _, _, place = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
            self._listening = _Listening(family, place, metrics)
        except OSError as error:
            raise StorageError(f"cannot show metrics at '{address}': {error.strerror or error}") from error
        self._thread = threading.Thread(
            target=self._listening.serve_forever, args=(_POLL,), name="cowslice-metrics", daemon=True
        )
        self._thread.start()

    @property
    def url(self) -> str:
        """Where the page is."""
        host, port = self._listening.server_address[:2]
        shown = f"[{host!s}]" if ":" in str(host) else str(host)
        return f"http://{shown}:{port}/"

    def close(self) -> None:
        """Send visitors away and return when all threads have ended. It may be called twice."""
        self._listening.shutdown()
        self._thread.join()
        self._listening.end()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


class _Listening(socketserver.ThreadingMixIn, socketserver.TCPServer):
    """The listening socket and its visitors."""

    allow_reuse_address = True
    request_queue_size = MOST_VISITORS
    daemon_threads = False  # so that `server_close` waits for them

    def __init__(self, family: socket.AddressFamily, place: Any, metrics: Metrics) -> None:
        self.address_family = family
        self.metrics = metrics
        self._visitors: set[socket.socket] = set()
        self._lock = threading.Lock()
        super().__init__(place, _Visitor)

    def verify_request(self, request: Any, client_address: Any) -> bool:
        with self._lock:
            return len(self._visitors) < MOST_VISITORS

    def process_request(self, request: Any, client_address: Any) -> None:
        with self._lock:
            self._visitors.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        with self._lock:
            self._visitors.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A visitor that vanished is not worth a word."""

    def end(self) -> None:
        """Wake whoever waits for a visitor, and wait for all."""
        with self._lock:
            for visitor in self._visitors:
                with contextlib.suppress(OSError):
                    visitor.shutdown(socket.SHUT_RDWR)
        self.server_close()


class _Visitor(socketserver.BaseRequestHandler):
    """One connection: one request, one answer."""

    server: _Listening

    def handle(self) -> None:
        head = _read_head(self.request)
        if not head:
            return
        status, kind, body = answer(self.server.metrics, head)
        lines = [
            f"HTTP/1.1 {status} {_STATUS[status]}", f"Content-Type: {kind}", f"Content-Length: {len(body)}",
            "Connection: close", "Cache-Control: no-store", "X-Content-Type-Options: nosniff",
            f"Content-Security-Policy: {_POLICY}", *(["Allow: GET"] if status == 405 else []),
        ]  # fmt: skip
        self.request.settimeout(PATIENCE)
        self.request.sendall("\r\n".join([*lines, "", ""]).encode() + body)


def _read_head(visitor: socket.socket) -> bytes:
    """The bytes of a request up to its empty line, or as much as came; b"" where it took too long."""
    end = time.monotonic() + PATIENCE
    head = b""
    while len(head) < MOST_HEAD and b"\r\n\r\n" not in head and b"\n\n" not in head:
        visitor.settimeout(max(end - time.monotonic(), 0.001))
        try:
            got = visitor.recv(MOST_HEAD - len(head))
        except TimeoutError:
            return b""
        if not got:
            break
        head += got
    return head


def answer(metrics: Metrics, head: bytes) -> Answer:
    """What a request gets, by its first line alone."""
    match = _REQUEST.match(head)
    if not match:
        return 400, "text/plain; charset=utf-8", b"expected a GET of HTTP/1.1\n"
    if match[1] != b"GET":
        return 405, "text/plain; charset=utf-8", b"expected GET: here is only something to see\n"
    path = match[2].partition(b"?")[0]
    if path == b"/metrics":
        return 200, CONTENT_TYPE, exposition(metrics)
    if path == b"/state.json":
        return 200, "application/json", json.dumps(state(metrics), separators=(",", ":")).encode()
    if path == b"/":
        return 200, "text/html; charset=utf-8", _PAGE.read_bytes()
    return 404, "text/plain; charset=utf-8", b"here are / for people and /metrics for Prometheus\n"


def state(metrics: Metrics) -> dict[str, Any]:
    """All that the page shows, since the start; times in seconds since 1970."""
    readings = [_shown(reading) for reading in metrics.readings()]
    return {"now": time.time(), "started": metrics.started, "exports": readings}


def _shown(reading: Reading) -> dict[str, Any]:
    return {
        "name": reading.name, "size": reading.size, "connections": reading.connections,
        "connectionsTotal": reading.connections_total, **reading.counts, "map": dict(reading.map),
        "resident": list(reading.resident),
    }  # fmt: skip
