"""Where a server can be reached: Unix sockets, TCP over IPv4 and IPv6, sockets that systemd hands over.

It accepts nobody. What must hold: the file of a Unix socket is removed by whoever made it, and never somebody else's.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import stat
from collections.abc import MutableMapping, Sequence
from urllib.parse import quote

from cowslice.errors import BadOption, StorageError

DEFAULT_PORT = 10809
BACKLOG = 128
LONGEST_PATH = 107  # bytes of a Unix socket's name in Linux
FIRST_ACTIVATED = 3  # SD_LISTEN_FDS_START
MOST_ACTIVATED = 64


class Listener:
    """A listening socket that never blocks. `close` also removes the file of one made by `listen_unix`."""

    def __init__(self, bound: socket.socket, *, path: str = "") -> None:
        bound.setblocking(False)
        self.socket = bound
        self._path = path
        self._identity = _identity(path) if path else None

    def uri(self, export: str = "", *, tls: bool = False) -> str:
        """The NBD URI of an export at this address."""
        name = quote(export, safe="")
        scheme = "nbds" if tls else "nbd"
        address = self.socket.getsockname()
        if self.socket.family == socket.AF_UNIX:
            # A slash more, so that a client cannot take the name for a part of the path.
            return f"{scheme}+unix:///{name}?socket={quote(os.fsdecode(address), safe='/')}"
        host, port = address[:2]
        shown = f"[{host}]" if self.socket.family == socket.AF_INET6 else host
        return f"{scheme}://{shown}:{port}/{name}"

    def close(self) -> None:
        """Listen no more. It may be called twice."""
        if self._path and self._identity == _identity(self._path):
            with contextlib.suppress(OSError):
                os.unlink(self._path)
        self._path = ""
        self.socket.close()


def listen_unix(path: str | os.PathLike[str]) -> Listener:
    """Make a Unix socket. One that nobody listens on any more is replaced. Raises BadOption, StorageError."""
    if not os.fspath(path):
        raise BadOption("the socket has no name, expected a path")
    name = os.path.abspath(os.fspath(path))
    if len(os.fsencode(name)) > LONGEST_PATH:
        raise BadOption(f"the socket '{name}' has a path of {len(os.fsencode(name))} bytes, expected up to "
                        f"{LONGEST_PATH}")
    _remove_stale(name)
    bound = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        bound.bind(name)
        bound.listen(BACKLOG)
    except OSError as fault:
        bound.close()
        raise StorageError.of(fault, "listen on", name) from fault
    return Listener(bound, path=name)


def listen_tcp(host: str, port: int = DEFAULT_PORT) -> list[Listener]:
    """Listen on every address that the name stands for; "::" takes IPv4 too. Port 0 lets the system choose one.

    Raises BadOption for an address that is none, StorageError where it cannot be had.
    """
    if not 0 <= port <= 65535:
        raise BadOption(f"port is {port}, expected 0 to 65535")
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as fault:
        raise BadOption(f"'{host}' is no address to listen on: {fault}") from None
    listeners: list[Listener] = []
    try:
        for family, _, _, _, address in dict.fromkeys(found):
            chosen = port or (listeners[0].socket.getsockname()[1] if listeners else 0)
            bound = _bind_tcp(family, (address[0], chosen, *address[2:]), both=host == "::")
            if bound is not None:
                listeners.append(Listener(bound))
    except OSError as fault:
        for listener in listeners:
            listener.close()
        raise StorageError.of(fault, "listen on", f"{host}:{port}") from fault
    if not listeners:
        raise BadOption(f"'{host}' has no address on this machine")
    return listeners


def activated(environment: MutableMapping[str, str] | None = None) -> list[Listener]:
    """The sockets that systemd hands to this process; none where it was not started that way.

    Their announcement is removed from the environment, so that no child takes them for its own. Raises BadOption.
    """
    found = os.environ if environment is None else environment
    pid, count = found.pop("LISTEN_PID", ""), found.pop("LISTEN_FDS", "")
    found.pop("LISTEN_FDNAMES", None)
    if pid != str(os.getpid()) or not count:
        return []
    if not count.isascii() or not count.isdigit() or not 1 <= int(count) <= MOST_ACTIVATED:
        raise BadOption(f"LISTEN_FDS is '{count}', expected 1 to {MOST_ACTIVATED}")
    return [adopted(descriptor) for descriptor in range(FIRST_ACTIVATED, FIRST_ACTIVATED + int(count))]


def adopted(descriptor: int) -> Listener:
    """A listening stream socket that somebody else made, by its descriptor, which becomes ours. Raises BadOption."""
    try:
        os.set_inheritable(descriptor, False)
        taken = socket.socket(fileno=descriptor)
        listens = taken.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    except OSError as fault:
        raise BadOption(f"descriptor {descriptor} is no socket: {os.strerror(fault.errno or 0)}") from None
    if not listens or taken.family not in (socket.AF_UNIX, socket.AF_INET, socket.AF_INET6):
        taken.detach()
        raise BadOption(f"descriptor {descriptor} is not a listening Unix or TCP socket")
    return Listener(taken)


def _bind_tcp(family: int, address: Sequence[object], *, both: bool) -> socket.socket | None:
    """A listening socket, or None where the machine does not have this kind of address."""
    try:
        bound = socket.socket(family, socket.SOCK_STREAM)
    except OSError as fault:
        if fault.errno == errno.EAFNOSUPPORT:
            return None
        raise
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            bound.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0 if both else 1)
        bound.bind(tuple(address))
        bound.listen(BACKLOG)
    except OSError as fault:
        bound.close()
        if fault.errno == errno.EADDRNOTAVAIL:
            return None
        raise
    return bound


def _remove_stale(name: str) -> None:
    """Remove a socket file that a dead server left. Whatever else is there stays."""
    try:
        if not stat.S_ISSOCK(os.lstat(name).st_mode):
            return  # bind says it better
    except OSError:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1)
        try:
            probe.connect(name)
        except ConnectionRefusedError:
            with contextlib.suppress(OSError):
                os.unlink(name)
        except OSError:
            pass


def _identity(path: str) -> tuple[int, int] | None:
    try:
        found = os.lstat(path)
    except OSError:
        return None
    return found.st_dev, found.st_ino
