"""The NBD server: takes clients from its listeners, gives each a thread, and ends as cleanly as it began.

It knows no protocol. What must hold: after `close` every request that had come in is answered, and no thread,
descriptor or socket file of the server is left; no client can keep it from ending.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import select
import socket
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

from cowslice.errors import BadOption
from cowslice.image.image import Image
from cowslice.serve.connection import Connection, Service
from cowslice.serve.exports import Export
from cowslice.serve.listeners import DEFAULT_PORT, Listener, listen_tcp, listen_unix
from cowslice.serve.metrics import Metrics
from cowslice.serve.tls import Credentials, server_context
from cowslice.serve.transmission import Limits

if TYPE_CHECKING:
    from typing import Self

MAX_CLIENTS = 100  # as QEMU's storage daemon
GRACE = 5.0  # seconds that clients have to take their answers when the server closes
NOTICE = 0.1  # of these, in which clients are told that it closes: who asks for anything gets ESHUTDOWN
DEAF = 0.5  # seconds without a look for signals: the system may give one to a thread that does not wake who waits here
PAUSE = 0.2  # seconds before it tries again when the system has no descriptor for another client

_log = logging.getLogger("cowslice.serve")


class Server:
    """Serve exports to NBD clients from the listeners, which become ours, until `close`.

    `max_clients` may be connected at once, 0 for any number; more wait to be accepted. One that is not `persistent`
    finishes by itself when the last client that asked for an export has left. `metrics` gets a meter for each export.
    `report` hears a sentence for each fault, from any thread; by default a warning goes to the log "cowslice.serve".
    """

    def __init__(
        self, exports: Iterable[Export], listeners: Sequence[Listener], *, tls: Credentials | None = None,
        limits: Limits | None = None, max_clients: int = MAX_CLIENTS, persistent: bool = True,
        metrics: Metrics | None = None, report: Callable[[str], None] = _log.warning, compiled: bool = True,
    ) -> None:
        if max_clients < 0:
            raise BadOption(f"max_clients is {max_clients}, expected 0 or more")
        if not listeners:
            raise BadOption("the server listens nowhere, expected a Unix socket or an address")
        self.exports = _by_name(exports)
        self.metrics = metrics or Metrics()
        self._listeners = tuple(listeners)
        self._tls = tls is not None
        self._most = max_clients
        self._persistent = persistent
        self._service = Service(
            exports=self.exports, tls=None if tls is None else server_context(tls), limits=limits or Limits(),
            meters={name: self.metrics.add_export(name, one.disk.size, one.disk) for name, one in self.exports.items()},
            report=report, compiled=compiled)
        self._uris = tuple(
            listener.uri(name, tls=self._tls) for listener in self._listeners for name in self.exports)
        self._clients: dict[Connection, threading.Thread] = {}  # the accepting thread's, until that has ended
        self._left: SimpleQueue[Connection] = SimpleQueue()  # those whose thread is about to end
        self._numbers = itertools.count(1)
        self._served = False  # whether a client ever asked for an export
        self._closing = False
        self._ending = threading.Lock()
        self._ended = False
        self._finished = threading.Event()
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._thread = threading.Thread(target=self._accept_all, name="cowslice-nbd", daemon=True)
        self._thread.start()

    @property
    def uris(self) -> tuple[str, ...]:
        """Where clients find the exports: each one at each address."""
        return self._uris

    @property
    def uri(self) -> str:
        """The first of `uris`."""
        return self.uris[0]

    @property
    def connections(self) -> int:
        """How many clients are connected now."""
        return len(self._clients)

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until the server has finished or was closed, at most `timeout` seconds; return whether it has."""
        if timeout is not None:
            return self._finished.wait(timeout)
        while not self._finished.wait(DEAF):
            pass
        return True

    def close(self, grace: float = GRACE) -> None:
        """End: answer what has come in, cut off after `grace` seconds who does not take it, leave nothing behind.

        It may be called twice and by any thread. Images stay open.
        """
        with self._ending:
            if self._ended:
                return
            self._closing = True
            os.eventfd_write(self._wake, 1)
            self._thread.join()
            for client in self._clients:
                client.refuse()
            _join(self._clients.values(), time.monotonic() + min(NOTICE, grace))
            for client in self._clients:
                client.stop()
            _join(self._clients.values(), time.monotonic() + grace)
            for client in self._clients:
                client.abort()
            _join(self._clients.values(), None)
            self._clients.clear()
            os.close(self._wake)
            self._ended = True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "closed" if self._closing else f"{self.connections} clients"
        return f"<Server {self.uri} {state}>"

    def _accept_all(self) -> None:
        try:
            while not self._closing and not self._is_over():
                self._accept_ready()
                self._reap()
        finally:
            for listener in self._listeners:
                listener.close()
            self._finished.set()

    def _is_over(self) -> bool:
        return self._served and not self._persistent and not any(client.negotiated for client in self._clients)

    def _accept_ready(self) -> None:
        """Wait until somebody comes or leaves, and take in who fits."""
        waiting = select.poll()
        waiting.register(self._wake, select.POLLIN)
        by_number = {listener.socket.fileno(): listener for listener in self._listeners}
        if not self._most or len(self._clients) < self._most:
            for number in by_number:
                waiting.register(number, select.POLLIN)
        for number, _ in waiting.poll():
            if number == self._wake:
                os.eventfd_read(self._wake)
            elif not self._most or len(self._clients) < self._most:
                self._accept(by_number[number].socket)

    def _accept(self, listening: socket.socket) -> None:
        try:
            connected, _ = listening.accept()
        except (BlockingIOError, ConnectionError, InterruptedError):
            return
        except OSError as fault:
            self._service.tell(f"cannot accept a client: {fault.strerror}")
            time.sleep(PAUSE)
            return
        with contextlib.suppress(OSError):
            if connected.family != socket.AF_UNIX:
                connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                connected.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        client = Connection(connected, self._service, f"client {next(self._numbers)}")
        thread = threading.Thread(target=self._serve, args=(client,), name=f"cowslice-nbd {client.name}", daemon=True)
        try:
            thread.start()
        except RuntimeError:
            self._service.tell("cannot serve a client: the system has no more threads")
            connected.close()
            return
        self._clients[client] = thread

    def _serve(self, client: Connection) -> None:
        try:
            client.run()
        finally:  # its place is free whatever happened
            self._left.put(client)
            os.eventfd_write(self._wake, 1)

    def _reap(self) -> None:
        """Part with the clients that have left."""
        while not self._left.empty():
            client = self._left.get()
            self._clients.pop(client).join()
            self._served |= client.negotiated


def serve(
    disk: Image | Mapping[str, Image] | Export | Iterable[Export], *, unix: str | os.PathLike[str] | None = None,
    host: str | None = None, port: int | None = None, name: str = "", description: str = "",
    writable: bool = False, allocation_depth: bool = False, bitmaps: Sequence[str] = (),
    tls: Credentials | None = None,
    max_clients: int = MAX_CLIENTS, persistent: bool = True, limits: Limits | None = None,
    metrics: Metrics | None = None, report: Callable[[str], None] = _log.warning,
) -> Server:
    """Serve open images over NBD from threads of this process; `with` closes the server.

    disk: an image, served as `name` with `description`; or images by name; or exports made by hand.
    unix: path of a socket; host and port: TCP, by default port 10809 of 127.0.0.1; both may be given, one must be.
    writable: let clients write to images that were opened with mode "r+"; by default they only read.
    allocation_depth, bitmaps: offer these metadata contexts as well. tls: Certificates or PresharedKeys.
    The rest is as `Server` and `Limits` say.

    The images stay the caller's: close them after the server. Raises BadOption, StorageError, CryptoError.
    """
    limits = limits or Limits()
    if unix is None and host is None and port is None:
        raise BadOption("the server listens nowhere, expected unix=PATH, host=ADDRESS or port=NUMBER")
    exports = _exports(disk, name=name, description=description, allocation_depth=allocation_depth, bitmaps=bitmaps,
                       writable=writable, multi_conn=max_clients != 1, max_request=limits.max_request)
    listeners = [] if unix is None else [listen_unix(unix)]
    try:
        if host is not None or port is not None:
            listeners += listen_tcp("127.0.0.1" if host is None else host, DEFAULT_PORT if port is None else port)
        return Server(exports, listeners, tls=tls, limits=limits, max_clients=max_clients, persistent=persistent,
                      metrics=metrics, report=report)
    except BaseException:
        for listener in listeners:
            listener.close()
        raise


def _exports(
    disk: Image | Mapping[str, Image] | Export | Iterable[Export], *, name: str, **options: Any
) -> list[Export]:
    from_images = {name: disk} if isinstance(disk, Image) else disk
    if isinstance(from_images, Mapping):
        return [Export(image, called, **options) for called, image in from_images.items()]
    return [from_images] if isinstance(from_images, Export) else list(from_images)


def _by_name(exports: Iterable[Export]) -> dict[str, Export]:
    named: dict[str, Export] = {}
    for export in exports:
        if export.name in named:
            raise BadOption(f"two exports have the name '{export.name}', expected different ones")
        named[export.name] = export
    if not named:
        raise BadOption("the server has nothing to serve, expected at least one image")
    return named


def _join(threads: Iterable[threading.Thread], deadline: float | None) -> None:
    for thread in threads:
        thread.join(None if deadline is None else max(deadline - time.monotonic(), 0))
