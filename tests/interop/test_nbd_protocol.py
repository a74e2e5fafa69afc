"""Both halves of the NBD protocol against programs that we did not write, over real sockets.

Our server half serves a disk in memory to libnbd's tools and to QEMU's; our client half reads from qemu-nbd and nbdkit.
The sockets here are as simple as sockets can be: the protocol is what is tested.
"""

from __future__ import annotations

import contextlib
import json
import random
import socket
import ssl
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cowslice.errors import ProtocolError
from cowslice.nbd import (
    NEED_DATA,
    ClientTransmission,
    Completed,
    Export,
    Opening,
    Ready,
    Refused,
    StartTls,
    TlsWish,
    Wish,
    export_flags,
)
from cowslice.nbd.wire import ALLOCATION_DEPTH, BASE_ALLOCATION, Answer, Mode, NbdError, Option
from cowslice.testing import peers
from cowslice.testing.peers import needs
from cowslice.units import KiB, MiB
from tests.unit.nbd.talk import Disk, Server
from tests.unit.serve.certificates import Authority

SIZE = 4 * MiB
BITMAP = "qemu:dirty-bitmap:monday"


def _disk() -> Disk:
    """Data, a hole, data up to an odd place."""
    content = bytearray(SIZE)
    content[: 256 * KiB] = random.Random(1).randbytes(256 * KiB)
    content[2 * MiB : 2 * MiB + 70000] = random.Random(2).randbytes(70000)
    return Disk(content, granule=64 * KiB)


# Our server half, their clients


@contextlib.contextmanager
def serving(disk: Disk, *, writable: bool = False) -> Iterator[str]:
    """Serve a disk until the block ends; the value is its URI."""
    contexts = (BASE_ALLOCATION, ALLOCATION_DEPTH, BITMAP)
    export = Export("disk", SIZE, export_flags(writable=writable, multi_conn=True), "in memory", contexts=contexts)
    with tempfile.TemporaryDirectory(prefix="cowslice-") as scratch, socket.socket(socket.AF_UNIX) as listener:
        place = Path(scratch, "s")
        listener.bind(str(place))
        listener.listen(16)
        thread = threading.Thread(target=_accept, args=(listener, export, disk), daemon=True)
        thread.start()
        yield f"nbd+unix:///disk?socket={place}"
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()


def _accept(listener: socket.socket, export: Export, disk: Disk) -> None:
    threads = []
    with contextlib.suppress(OSError):
        while True:
            connected, _ = listener.accept()
            threads.append(threading.Thread(target=_serve, args=(connected, export, disk), daemon=True))
            threads[-1].start()
    for thread in threads:
        thread.join()


def _serve(connected: socket.socket, export: Export, disk: Disk) -> None:
    server = Server([export], {"disk": disk}, default="disk")
    with connected, contextlib.suppress(ProtocolError, OSError):
        connected.sendall(server.handshake.data_to_send())
        while not server.closed and (data := connected.recv(1 << 18)):
            connected.sendall(server.feed(data))


@needs("nbdinfo")
def test_nbdinfo_sees_the_export_as_it_is() -> None:
    with serving(_disk()) as uri:
        told = peers.nbdinfo_json(uri)
    (export,) = told["exports"]
    assert told["structured"] is True
    assert (export["export-name"], export["description"], export["export-size"]) == ("disk", "in memory", SIZE)
    assert export["contexts"] == [BASE_ALLOCATION, ALLOCATION_DEPTH, BITMAP]
    assert (export["is_read_only"], export["can_multi_conn"], export["can_df"], export["can_cache"]) == (True,) * 4
    sizes = ("block_size_minimum", "block_size_preferred", "block_size_maximum")
    assert [export[size] for size in sizes] == [1, 4096, 32 * MiB]


@needs("nbdinfo")
def test_nbdinfo_lists_the_export() -> None:
    with serving(_disk()) as uri:
        (listed,) = peers.nbdinfo_json(uri, "--list")["exports"]
    assert (listed["export-name"], listed["export-size"]) == ("disk", SIZE)


@needs("nbdinfo")
@pytest.mark.parametrize("context, data, hole", [(BASE_ALLOCATION, 0, 3), (ALLOCATION_DEPTH, 1, 0), (BITMAP, 1, 0)])
def test_nbdinfo_maps_every_context(context: str, data: int, hole: int) -> None:
    with serving(_disk()) as uri:
        found = peers.nbdinfo_json(uri, f"--map={context}")
    assert [(extent["offset"], extent["length"], extent["type"]) for extent in found] == [
        (0, 256 * KiB, data), (256 * KiB, 2 * MiB - 256 * KiB, hole), (2 * MiB, 128 * KiB, data),
        (2 * MiB + 128 * KiB, 2 * MiB - 128 * KiB, hole),
    ]  # fmt: skip


@needs("nbdcopy")
@pytest.mark.parametrize("options", [(), ("--synchronous",), ("--connections=4",), ("--request-size=65536",)], ids=str)
def test_nbdcopy_copies_every_byte(tmp_path: Path, options: tuple[str, ...]) -> None:
    disk = _disk()
    with serving(disk) as uri:
        peers.nbdcopy(*options, uri, tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == disk.content


@needs("nbdcopy")
def test_nbdcopy_writes_every_byte(tmp_path: Path) -> None:
    source, disk = _disk(), Disk(bytearray(b"x" * SIZE))
    (tmp_path / "source").write_bytes(source.content)
    with serving(disk, writable=True) as uri:
        peers.nbdcopy("--flush", tmp_path / "source", uri)
    assert disk.content == source.content


@needs("qemu-img")
def test_qemu_img_converts_compares_and_maps(tmp_path: Path) -> None:
    disk = _disk()
    with serving(disk) as uri:
        peers.qemu_img("convert", "-f", "raw", "-O", "qcow2", uri, tmp_path / "copy.qcow2")
        assert "identical" in peers.qemu_img("compare", "-f", "raw", "-F", "qcow2", uri, tmp_path / "copy.qcow2")
        extents = json.loads(peers.qemu_img("map", "--output=json", uri))
    assert [(extent["start"], extent["length"], extent["data"]) for extent in extents] == [
        (0, 256 * KiB, True), (256 * KiB, 2 * MiB - 256 * KiB, False), (2 * MiB, 128 * KiB, True),
        (2 * MiB + 128 * KiB, 2 * MiB - 128 * KiB, False),
    ]  # fmt: skip


@needs("qemu-io")
def test_qemu_io_writes_zeroes_discards_and_flushes() -> None:
    disk = _disk()
    with serving(disk, writable=True) as uri:
        peers.qemu_io(
            uri, "write -P 5 4096 8192", "write -f -P 6 20000 1", "write -z 65536 512", "write -zu 70000 100",
            "discard 131072 65536", "flush", "read -P 5 4096 8192", "read -P 0 131072 65536", image_format="raw",
        )  # fmt: skip
    assert disk.content[4096 : 4096 + 8192] == b"\5" * 8192
    assert disk.content[20000:20001] == b"\6"
    assert not any(disk.content[131072 : 131072 + 65536])


@needs("qemu-io")
def test_qemu_io_cannot_write_to_a_read_only_export() -> None:
    disk = _disk()
    before = bytes(disk.content)
    with serving(disk) as uri:
        peers.qemu_io(uri, "write -P 5 4096 8192", image_format="raw", expect=1)
    assert disk.content == before


@needs("qemu-io")
def test_an_error_of_ours_arrives_as_what_it_is() -> None:
    disk = _disk()
    disk.verdict = lambda request: (NbdError.ENOSPC, "the world is full", None) if request.command == 1 else None
    with serving(disk, writable=True) as uri:
        printed = peers.run("qemu-io", "-f", "raw", "-c", "write 0 512", uri, expect=1).stdout
    assert b"No space left on device" in printed


# Their servers, our client half


class Client:
    """A session with a server, one request at a time."""

    def __init__(self, uri: str, wish: Wish, tls: ssl.SSLContext | None = None) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.connect(uri.split("socket=")[1])
        opening = Opening(wish)
        while (event := opening.next_event()) is NEED_DATA or isinstance(event, StartTls):
            self._socket.sendall(opening.data_to_send())
            if isinstance(event, StartTls):
                assert tls is not None
                self._socket = tls.wrap_socket(self._socket, server_hostname="localhost")
                opening.tls_started()
            else:
                opening.receive(self._socket.recv(4096))
        self._socket.sendall(opening.data_to_send())
        self.refused = event if isinstance(event, Refused) else None
        if isinstance(event, Ready):
            self.nbd = ClientTransmission(event.session, opening.take_leftover())

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        if self.refused is None:
            self.nbd.disconnect()
            self._send()
            while data := self._socket.recv(4096):
                self.nbd.receive(data)
            self.nbd.receive_eof()
        self._socket.close()

    def _send(self) -> None:
        for part in self.nbd.data_to_send():
            self._socket.sendall(part)

    def finish(self, cookie: int) -> Completed:
        self._send()
        while (event := self.nbd.next_event()) is NEED_DATA:
            target = self.nbd.payload_target()
            if target is None:
                self.nbd.receive(self._socket.recv(4096))
            else:
                self.nbd.payload_received(self._socket.recv_into(target))
        assert isinstance(event, Completed)
        assert event.cookie == cookie
        return event

    def read(self, offset: int, length: int) -> bytes:
        buffer = bytearray(length)
        assert self.finish(self.nbd.read(offset, memoryview(buffer))).error is None
        return bytes(buffer)


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A qcow2 overlay with data, zeroes, holes and a bitmap."""
    peers.require("qemu-img", "qemu-io")
    folder = tmp_path_factory.mktemp("nbd")
    base, top = folder / "base.qcow2", folder / "top.qcow2"
    peers.qemu_img("create", "-q", "-f", "qcow2", base, SIZE)
    peers.qemu_io(base, "write -P 7 0 128k", "write -P 8 1M 64k")
    peers.qemu_img("create", "-q", "-f", "qcow2", "-b", base, "-F", "qcow2", top)
    peers.qemu_img("bitmap", "--add", top, "monday")
    peers.qemu_io(top, "write -P 9 64k 64k", "write -z 2M 64k")
    return top


PLAIN = Wish("disk", structured=False, extended=False)
RICH = Wish("disk", contexts=(BASE_ALLOCATION, ALLOCATION_DEPTH, BITMAP))


@needs("qemu-nbd", "qemu-img", "qemu-io")
@pytest.mark.parametrize("wish, mode", [(PLAIN, Mode.SIMPLE), (RICH, Mode.STRUCTURED)], ids=["simple", "richest"])
def test_we_read_what_qemu_nbd_serves(image: Path, wish: Wish, mode: Mode) -> None:
    with peers.qemu_nbd(image, "-r", "-x", "disk", "-A", "-B", "monday") as uri, Client(uri, wish) as client:
        assert client.nbd.session.size == SIZE
        assert client.nbd.session.mode >= mode
        assert client.read(0, SIZE) == _expected()
        assert client.read(65535, 3) == b"\7\x09\x09"


def _expected() -> bytes:
    content = bytearray(SIZE)
    content[: 64 * KiB] = b"\7" * 64 * KiB
    content[64 * KiB : 128 * KiB] = b"\x09" * 64 * KiB
    content[MiB : MiB + 64 * KiB] = b"\x08" * 64 * KiB
    return bytes(content)


@needs("qemu-nbd", "qemu-img", "qemu-io")
def test_we_see_every_context_of_qemu_nbd(image: Path) -> None:
    with peers.qemu_nbd(image, "-r", "-x", "disk", "-A", "-B", "monday") as uri, Client(uri, RICH) as client:
        extents = client.finish(client.nbd.block_status(0, SIZE)).extents
        named = {context.name: extents[context.id] for context in client.nbd.session.contexts}
    assert named[ALLOCATION_DEPTH][:3] == ((64 * KiB, 2), (64 * KiB, 1), (MiB - 128 * KiB, 0))
    assert named[BITMAP][:3] == ((64 * KiB, 0), (64 * KiB, 1), (2 * MiB - 128 * KiB, 0))
    assert named[BASE_ALLOCATION][:2] == ((128 * KiB, 0), (MiB - 128 * KiB, 3))


@needs("qemu-nbd", "qemu-img", "qemu-io")
def test_qemu_nbd_refuses_an_export_that_it_does_not_have(image: Path) -> None:
    with peers.qemu_nbd(image, "-r", "-x", "disk") as uri, Client(uri, Wish("other")) as client:
        assert client.refused is not None
        assert client.refused.option == Option.GO
        assert "other" in client.refused.reason


@needs("nbdkit")
@pytest.mark.parametrize("wish", [PLAIN, Wish("disk")], ids=["simple", "richest"])
def test_we_write_to_nbdkit_and_read_it_back(wish: Wish) -> None:
    with peers.nbdkit("memory", str(SIZE)) as uri, Client(uri, wish) as client:
        steps: tuple[Callable[[], int], ...] = (
            lambda: client.nbd.write(1000, b"hello" * 1000, fua=True),
            lambda: client.nbd.write_zeroes(1005, 5),
            lambda: client.nbd.write_zeroes(1015, 5, no_hole=True),
            lambda: client.nbd.trim(1025, 5),
            lambda: client.nbd.flush(),
        )
        for step in steps:
            assert client.finish(step()).error is None
        assert client.read(1000, 35) == b"hello" + (bytes(5) + b"hello") * 3
        assert client.read(999, 1) == b"\0"


@needs("nbdkit")
def test_an_error_of_nbdkit_arrives_as_what_it_is() -> None:
    filters = ("--filter=error", "memory", str(SIZE), "error=ENOSPC", "error-pread-rate=100%")
    with peers.nbdkit(*filters) as uri, Client(uri, Wish("disk")) as client:
        assert client.finish(client.nbd.read(0, memoryview(bytearray(512)))).error is NbdError.ENOSPC
        assert client.finish(client.nbd.flush()).error is None


@needs("nbdkit")
@pytest.mark.parametrize("policy", ["on", "require"])
def test_we_upgrade_to_tls_with_nbdkit(tmp_path: Path, policy: str) -> None:
    Authority.new("authority").put(tmp_path, side="server")
    tls = ssl.create_default_context(cafile=str(tmp_path / "ca-cert.pem"))
    options = (f"--tls={policy}", f"--tls-certificates={tmp_path}", "memory", str(SIZE))
    wish = Wish("disk", tls=TlsWish.ALWAYS)
    with peers.nbdkit(*options) as uri, Client(uri, wish, tls) as client:
        assert client.nbd.session.tls
        assert client.read(0, 512) == bytes(512)


@needs("nbdkit")
def test_nbdkit_refuses_us_in_clear_where_tls_is_a_duty(tmp_path: Path) -> None:
    Authority.new("authority").put(tmp_path, side="server")
    options = ("--tls=require", f"--tls-certificates={tmp_path}", "memory", str(SIZE))
    with peers.nbdkit(*options) as uri, Client(uri, Wish("disk")) as client:
        assert client.refused is not None
        assert client.refused.answer == Answer.ERR_TLS_REQD


@needs("nbdkit")
def test_the_block_sizes_of_nbdkit_are_kept() -> None:
    policy = ("--filter=blocksize-policy", "memory", str(SIZE), "blocksize-error-policy=error")
    sizes = ("blocksize-minimum=512", "blocksize-preferred=4096", "blocksize-maximum=65536")
    with peers.nbdkit(*policy, *sizes) as uri, Client(uri, Wish("disk")) as client:
        told = client.nbd.session.block_sizes
        assert (told.minimum, told.preferred, told.maximum) == (512, 4096, 65536)
        with pytest.raises(ProtocolError, match="aligned"):
            client.nbd.trim(1, 512)
        assert client.read(512, 65536) == bytes(65536)
