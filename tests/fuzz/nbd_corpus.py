"""What other people's NBD programs said to ours, kept byte for byte as it went over the wire: seeds for fuzzing.

`python -m tests.fuzz.nbd_corpus` adds what the programs say that are first on PATH. A file is named by who speaks:
`asked-PROGRAM-VERSION-WHAT`, or for a server `answered-WISH-PROGRAM-VERSION`, with the place of the wish in
PLAIN_WISHES.
"""

from __future__ import annotations

import contextlib
import random
import re
import socket
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

from cowslice.errors import LocalProtocolError
from cowslice.nbd import ClientTransmission, Export, Opening, Ready, TlsPolicy, Wish, export_flags
from cowslice.nbd.wire import BASE_ALLOCATION, Mode
from cowslice.testing import peers
from tests.unit.nbd.talk import Disk, Server, drain

FOLDER = Path(__file__).parent / "corpus" / "nbd"
SIZE = 1 << 14
CONTEXTS = (BASE_ALLOCATION, "qemu:allocation-depth")
PLAIN_WISHES = (
    Wish("disk", contexts=CONTEXTS),
    Wish("disk", extended=False, contexts=CONTEXTS),
    Wish("disk", extended=False, structured=False),
)


def kept(kind: str) -> dict[str, bytes]:
    """The streams of one kind, "asked" or "answered", by name."""
    return {path.stem: path.read_bytes() for path in sorted(FOLDER.glob(f"{kind}-*.bin"))}


def new_server() -> Server:
    """The server that is asked: a disk with data and holes, and another one."""
    content = bytearray(SIZE)
    content[1000:5000] = random.Random(1).randbytes(4000)
    exports = [Export("disk", SIZE, export_flags(writable=True), "a disk", contexts=CONTEXTS), Export("", 512)]
    return Server(exports, {"disk": Disk(content), "": Disk(bytearray(512))}, tls=TlsPolicy.OFFERED)


def ask_everything(client: ClientTransmission) -> None:
    """One request of every kind."""
    client.read(0, memoryview(bytearray(6000)))
    client.write(100, b"written", fua=True)
    client.write_zeroes(4096, 4096, no_hole=True)
    client.trim(0, 512)
    client.cache(0, SIZE)
    client.flush()
    if client.session.contexts:
        client.block_status(0, SIZE)
        client.block_status(0, SIZE, one=True)
    if client.session.mode is Mode.EXTENDED and client.session.contexts:
        client.block_status(0, SIZE, contexts=[client.session.contexts[0].id])
    client.read(4000, memoryview(bytearray(2000)))


def ask_what_is_allowed(client: ClientTransmission) -> None:
    """The same up to the first request that the session does not allow: what it says of itself may be a lie."""
    with contextlib.suppress(LocalProtocolError):
        ask_everything(client)


# -- recording ---------------------------------------------------------------------------------------------------------


def record() -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        _record_clients(Path(scratch))
        _record_servers(Path(scratch))


def _record_clients(scratch: Path) -> None:
    copy = scratch / "copy"
    changes = ("write 0 512", "write -z 4k 4k", "discard 8k 4k", "flush")
    for what, tool, *words in (
        ("look", "nbdinfo", "URI"), ("map", "nbdinfo", "--map", "URI"), ("list", "nbdinfo", "--list", "URI"),
        ("read", "nbdcopy", "--connections=1", "URI", copy),
        ("write", "nbdcopy", "--connections=1", "--flush", copy, "URI"),
        ("map", "qemu-img", "map", "-f", "raw", "URI"),
        ("compare", "qemu-img", "compare", "-f", "raw", "-F", "raw", copy, "URI"),
        ("change", "qemu-io", "-f", "raw", *(word for change in changes for word in ("-c", change)), "URI"),
    ):
        with _listening(scratch / "s") as (uri, streams):
            peers.run(str(tool), *(uri if word == "URI" else word for word in words))
        for number, stream in enumerate(streams):
            _keep(f"asked-{tool}-{_version(str(tool))}-{what}" + f"-{number}" * (number > 0), stream)


@contextlib.contextmanager
def _listening(place: Path) -> Iterator[tuple[str, list[bytearray]]]:
    """Our half behind a socket; the value is its URI and what each connection says."""
    streams: list[bytearray] = []
    threads: list[threading.Thread] = []

    def serve(connected: socket.socket, stream: bytearray) -> None:
        ours = new_server()
        with connected, contextlib.suppress(OSError):
            connected.sendall(ours.handshake.data_to_send())
            while not ours.closed and (data := connected.recv(1 << 18)):
                stream += data
                connected.sendall(ours.feed(data))

    def accept(listener: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                connected, _ = listener.accept()
                streams.append(bytearray())
                threads.append(threading.Thread(target=serve, args=(connected, streams[-1])))
                threads[-1].start()

    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(place))
        listener.listen(16)
        taking = threading.Thread(target=accept, args=(listener,))
        taking.start()
        yield f"nbd+unix:///disk?socket={place}", streams
        listener.shutdown(socket.SHUT_RDWR)
        for thread in (taking, *threads):
            thread.join()
    place.unlink()


def _record_servers(scratch: Path) -> None:
    image = scratch / "image"
    for index, wish in enumerate(PLAIN_WISHES):
        image.write_bytes(bytes(1000) + random.Random(1).randbytes(4000) + bytes(SIZE - 5000))
        with peers.qemu_nbd(image, "-x", "disk", "-A", image_format="raw") as uri:
            _keep(f"answered-{index}-qemu-nbd-{_version('qemu-nbd')}", _answers(uri, wish))
        with peers.nbdkit("memory", str(SIZE)) as uri:
            _keep(f"answered-{index}-nbdkit-{_version('nbdkit')}", _answers(uri, wish))


def _answers(uri: str, wish: Wish) -> bytes:
    """What a server says to our half, which asks it for everything."""
    heard = bytearray()
    with socket.socket(socket.AF_UNIX) as connected:
        connected.connect(uri.split("socket=")[1])
        opening = Opening(wish)
        while not isinstance(event := opening.next_event(), Ready):
            connected.sendall(opening.data_to_send())
            heard += (data := connected.recv(4096))
            opening.receive(data)
        connected.sendall(opening.data_to_send())
        client = ClientTransmission(event.session, opening.take_leftover())
        ask_what_is_allowed(client)
        connected.sendall(b"".join(bytes(part) for part in client.data_to_send()))
        while drain(client) is not None and client.in_flight:
            heard += (data := connected.recv(1 << 16))
            client.receive(data)
    return bytes(heard)


def _version(tool: str) -> str:
    found = re.search(r"\d+(?:\.\d+)+", peers.run(tool, "--version").stdout.decode())
    return found[0] if found else "unknown"


def _keep(name: str, stream: bytes | bytearray) -> None:
    (FOLDER / f"{name}.bin").write_bytes(stream)


if __name__ == "__main__":
    record()
