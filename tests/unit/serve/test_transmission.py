"""One connection after its negotiation, by the compiled loop and in plain Python: the same answers, the same end."""

from __future__ import annotations

import socket
import struct
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import cowslice
from cowslice.nbd.wire import BASE_ALLOCATION, Command, CommandFlag, Mode, NbdError
from cowslice.serve.metrics import ExportMeter
from cowslice.serve.transmission import Limits
from cowslice.storage import FileStorage
from cowslice.testing.faults import Fault, FaultyStorage, HeldStorage
from tests.unit.serve.rawclient import WAYS, in_memory, model, wired

K = 1 << 16
CELLS = "NNZ.CNNNNNNNNNNN"
SIZE = len(CELLS) * K
IMAGE = model(CELLS)
CONTENT = IMAGE.over(b"")
MODES = tuple(Mode)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("served") / "disk.qcow2"
    made.write_bytes(IMAGE.file)
    return made


@pytest.fixture
def disk(path: Path) -> Iterator[cowslice.Image]:
    with cowslice.open(path) as opened:
        yield opened


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("offset, length", [
    (0, SIZE), (1, 1), (2 * K - 3, 7), (3 * K, 4096), (SIZE - 1, 1), (5, 3 * K)])
def test_every_byte_is_right(disk: cowslice.Image, way: str, mode: Mode, offset: int, length: int) -> None:
    with wired(disk, way=way) as wire:
        reply = wire.client(mode=mode).read(offset, length)
    assert (reply.error, reply.data) == (0, CONTENT[offset : offset + length])


@pytest.mark.parametrize("mode", [Mode.STRUCTURED, Mode.EXTENDED])
def test_holes_are_not_sent_unless_the_client_wants_one_piece(disk: cowslice.Image, way: str, mode: Mode) -> None:
    with wired(disk, way=way) as wire:
        client = wire.client(mode=mode)
        assert client.read(0, 6 * K).holes == 1
        whole = client.read(0, 6 * K, flags=CommandFlag.DF)
    assert (whole.holes, whole.chunks, whole.data) == (0, 1, CONTENT[: 6 * K])


@pytest.mark.parametrize("mode", MODES)
def test_requests_pipelined_in_one_packet_are_all_answered(disk: cowslice.Image, way: str, mode: Mode) -> None:
    offsets = [(n * 7919) % (SIZE - 4096) for n in range(200)]
    with wired(disk, way=way) as wire:
        client = wire.client(mode=mode)
        wire.socket.sendall(b"".join(client.request(Command.READ, offset, 4096) for offset in offsets))
        replies = client.answers(len(offsets))
    assert [replies[n + 1].data for n in range(200)] == [CONTENT[offset : offset + 4096] for offset in offsets]


@pytest.mark.parametrize("mode, flags", [*((mode, 0) for mode in MODES), (Mode.EXTENDED, CommandFlag.PAYLOAD_LEN)])
@pytest.mark.parametrize("piece", [1, 7, 29, 4093])
def test_requests_that_come_in_pieces_are_answered(
    tmp_path: Path, way: str, mode: Mode, flags: int, piece: int
) -> None:
    """Some end with a header, some in the middle of one, some in a payload."""
    cowslice.create(tmp_path / "a", size=SIZE)
    with cowslice.open(tmp_path / "a", "r+") as disk:
        disk.write(0, CONTENT)
    with cowslice.open(tmp_path / "a", "r+") as disk, wired(disk, way=way, writable=True) as wire:
        client = wire.client(mode=mode)
        said = b"".join((
            client.request(Command.READ, 2 * K + 100, 10),
            client.request(Command.WRITE, 7, 1000, flags=flags, payload=bytes(range(250)) * 4),
            client.request(Command.FLUSH),
            client.request(Command.WRITE, 3 * K, 333, flags=flags | CommandFlag.FUA, payload=b"y" * 333),
            client.request(Command.WRITE, SIZE, 1, flags=flags, payload=b"z"),
            client.request(Command.READ, 5 * K, 600),
        ))
        for start in range(0, len(said), piece):
            wire.socket.sendall(said[start : start + piece])
        replies = client.answers(6)
        assert [replies[n + 1].error for n in range(6)] == [0, 0, 0, 0, NbdError.ENOSPC, 0]
        assert (replies[1].data, replies[6].data) == (bytes(10), CONTENT[5 * K : 5 * K + 600])
        assert client.read(0, 2000).data == CONTENT[:7] + bytes(range(250)) * 4 + CONTENT[1007:2000]
        assert client.read(3 * K, 400).data == b"y" * 333 + CONTENT[3 * K + 333 : 3 * K + 400]


def test_requests_right_behind_the_negotiation_are_answered(disk: cowslice.Image, way: str) -> None:
    """A client may send its first requests before it has seen the end of the negotiation."""
    with wired(disk, way=way) as wire:
        go = struct.pack(">QIIIH", 0x49484156454F5054, 7, 6, 0, 0)
        read = struct.pack(">IHHQQI", 0x25609513, 0, 0, 77, 4, 8)
        wire.socket.sendall(struct.pack(">I", 3) + go + read)
        said = b""
        while not said.endswith(CONTENT[4:12]):
            said += wire.socket.recv(4096)
    assert said.endswith(struct.pack(">IIQ", 0x67446698, 0, 77) + CONTENT[4:12])


@pytest.mark.parametrize("mode", [Mode.STRUCTURED, Mode.EXTENDED])
def test_block_status_is_answered(disk: cowslice.Image, way: str, mode: Mode) -> None:
    with wired(disk, way=way) as wire:
        client = wire.client(mode=mode, contexts=(BASE_ALLOCATION,))
        assert client.status(0, 6 * K).extents == {0: [(2 * K, 0), (2 * K, 3), (2 * K, 0)]}
        assert client.status(0, 6 * K, flags=CommandFlag.REQ_ONE).extents == {0: [(2 * K, 0)]}
        assert client.status(3 * K, 1).extents == {0: [(1, 3)]}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("command, offset, length, flags, error", [
    (Command.FLUSH, 0, 0, 0, 0),
    (Command.CACHE, 0, SIZE, 0, 0),
    (Command.READ, 0, 100, CommandFlag.FUA, 0),
    (Command.READ, 0, 0, 0, 0),
    (Command.READ, SIZE - 1, 2, 0, NbdError.EINVAL),
    (Command.READ, (1 << 64) - 1, 2, 0, NbdError.EINVAL),
    (Command.TRIM, 0, 512, 0, NbdError.EPERM),
    (Command.WRITE_ZEROES, 0, 512, 0, NbdError.EPERM),
    (Command.FLUSH, 0, 0, CommandFlag.DF, NbdError.EINVAL),
    (Command.READ, 0, 1, 1 << 12, NbdError.EINVAL),
    (99, 0, 0, 0, NbdError.EINVAL),
])
def test_each_request_gets_the_error_it_deserves(
    disk: cowslice.Image, way: str, mode: Mode, command: int, offset: int, length: int, flags: int, error: int
) -> None:
    with wired(disk, way=way) as wire:
        client = wire.client(mode=mode)
        assert client.collect(client.ask(command, offset, length, flags=flags)).error == error
        assert client.read(3, 5).data == CONTENT[3:8], "the connection goes on"


@pytest.mark.parametrize("mode, flags", [*((mode, 0) for mode in MODES), (Mode.EXTENDED, CommandFlag.PAYLOAD_LEN)])
def test_a_write_is_refused_and_what_it_brings_is_skipped(
    disk: cowslice.Image, way: str, mode: Mode, flags: int
) -> None:
    with wired(disk, way=way) as wire:
        client = wire.client(mode=mode)
        sent = client.request(Command.WRITE, 0, 100_000, flags=flags, payload=b"x" * 100_000)
        wire.socket.sendall(sent + client.request(Command.READ, 9, 9))
        replies = client.answers(2)
    assert (replies[1].error, replies[2].data) == (NbdError.EPERM, CONTENT[9:18])


@pytest.mark.parametrize("mode", MODES)
def test_a_disk_open_for_writing_is_not_written_through_a_read_only_export(
    tmp_path: Path, way: str, mode: Mode
) -> None:
    (tmp_path / "a").write_bytes(IMAGE.file)
    with cowslice.open(tmp_path / "a", "r+") as writable, wired(writable, way=way) as wire:
        client = wire.client(mode=mode)
        for offset in (0, 3 * K):  # one that is there, one that is not
            assert client.collect(client.ask(Command.WRITE, offset, 512, payload=b"x" * 512)).error == NbdError.EPERM
        assert client.read(0, SIZE).data == CONTENT


@pytest.mark.parametrize("flags", [0, CommandFlag.PAYLOAD_LEN])
def test_a_write_with_extended_headers_may_say_that_it_has_a_payload(tmp_path: Path, way: str, flags: int) -> None:
    cowslice.create(tmp_path / "a", size=SIZE)
    with cowslice.open(tmp_path / "a", "r+") as writable, wired(writable, way=way, writable=True) as wire:
        client = wire.client(mode=Mode.EXTENDED)
        for filled in (b"x" * 3000, b"y" * 3000):  # the first makes a cluster, the second finds it
            assert client.collect(client.ask(Command.WRITE, 500, 3000, flags=flags, payload=filled)).error == 0
            assert client.read(0, 4096).data == bytes(500) + filled + bytes(596)


@pytest.mark.parametrize("compat, error, left", [("1.1", 0, 0), ("0.10", NbdError.ENOTSUP, 7)])
def test_zeroes_are_fast_or_refused_where_that_is_a_duty(
    tmp_path: Path, way: str, compat: str, error: int, left: int
) -> None:
    """Version 2 cannot say that a cluster over a backing file reads as zeros: it would have to write them."""
    cowslice.create(tmp_path / "base", size=SIZE)
    cowslice.create(tmp_path / "top", backing_file="base", backing_format="qcow2", compat=compat)
    with cowslice.open(tmp_path / "base", "r+") as base:
        base.write(0, b"\7" * K)
    with cowslice.open(tmp_path / "top", "r+") as top, wired(top, way=way, writable=True) as wire:
        client = wire.client()
        asked = client.ask(Command.WRITE_ZEROES, 0, K, flags=CommandFlag.FAST_ZERO)
        assert client.collect(asked).error == error
        assert client.read(0, 9).data == bytes([left]) * 9
        assert client.collect(client.ask(Command.WRITE_ZEROES, 0, K)).error == 0
        assert client.read(0, K).data == bytes(K)


@pytest.mark.parametrize("flags, kept", [(0, False), (CommandFlag.NO_HOLE, True)])
def test_zeroes_keep_their_space_where_the_client_wants_no_hole(
    tmp_path: Path, way: str, flags: int, kept: bool
) -> None:
    cowslice.create(tmp_path / "a", size=SIZE)
    with cowslice.open(tmp_path / "a", "r+") as writable, wired(writable, way=way, writable=True) as wire:
        client = wire.client()
        assert client.collect(client.ask(Command.WRITE, 0, K, payload=b"x" * K)).error == 0
        assert client.collect(client.ask(Command.WRITE_ZEROES, 0, K, flags=flags)).error == 0
        assert client.read(0, K).data == bytes(K)
        (extent,) = writable.extents(0, K)
        assert (extent.zero, extent.data, extent.offset is not None) == (True, False, kept)


def test_a_read_beyond_the_agreed_size_is_refused(disk: cowslice.Image, way: str) -> None:
    with wired(disk, way=way, limits=Limits(max_request=K)) as wire:
        client = wire.client()
        assert client.session.block_sizes.maximum == K
        assert client.read(0, K + 1).error == NbdError.EOVERFLOW
        assert client.read(0, K).data == CONTENT[:K]


def test_replies_leave_as_they_are_ready(path: Path, way: str) -> None:
    held = HeldStorage(FileStorage(path))
    held.release()
    with cowslice.open(held, warmup="full") as disk:
        disk.wait_warm()
        with wired(disk, way=way) as wire:
            client = wire.client()
            held.hold()
            slow = client.ask(Command.READ, 0, 4096)
            held.wait_for(1)
            quick = client.ask(Command.READ, 3 * K, 4096)  # a hole: no read
            assert client.answer()[0] == quick
            held.release()
            assert client.collect(slow).data == CONTENT[:4096]


def test_a_client_with_too_much_under_way_waits_and_gets_everything(path: Path, way: str) -> None:
    held = HeldStorage(FileStorage(path))
    held.release()
    with cowslice.open(held, warmup="full") as disk:
        disk.wait_warm()
        with wired(disk, way=way, limits=Limits(most_requests=2, workers=8)) as wire:
            client = wire.client()
            held.hold()
            for n in range(6):
                client.ask(Command.READ, n * 4096, 4096)
            held.wait_for(2)
            time.sleep(0.1)  # for a third one to come, if it could
            assert len(held.held) == 2
            held.release()
            replies = client.answers(6)
    assert [replies[n + 1].data for n in range(6)] == [CONTENT[n * 4096 : n * 4096 + 4096] for n in range(6)]


def test_what_a_storage_says_stays_on_this_side(path: Path, way: str) -> None:
    faulty = FaultyStorage(FileStorage(path))
    with cowslice.open(faulty, warmup="off") as disk, wired(disk, way=way) as wire:
        client = wire.client()
        assert client.read(0, 512).error == 0
        faulty.add(Fault("pread"))
        wire.socket.sendall(client.request(Command.READ, 7 * K, 512))
        header = client._exactly(20)
        said = client._exactly(int.from_bytes(header[-4:], "big"))
        faulty.heal()
        assert client.read(8 * K, 512).data == CONTENT[8 * K : 8 * K + 512], "the connection goes on"
        assert int.from_bytes(said[:4], "big") == NbdError.EIO
        assert b"disk.qcow2" not in said
        assert any("disk.qcow2" in report for report in wire.reports)


def test_a_disk_that_is_closed_says_that_the_server_ends(path: Path) -> None:
    with cowslice.open(path) as disk, wired(disk, way="python") as wire:
        client = wire.client()
        disk.close()
        assert client.read(0, 512).error == NbdError.ESHUTDOWN


def test_a_client_may_say_goodbye(disk: cowslice.Image, way: str) -> None:
    with wired(disk, way=way) as wire:
        client = wire.client()
        wire.socket.sendall(client.request(Command.READ, 0, 9) + client.request(Command.DISC))
        assert client.collect(1).data == CONTENT[:9], "what was asked before is answered"
        assert client.ended()
        assert wire.reports == []


def test_garbage_ends_the_connection_and_is_told(disk: cowslice.Image, way: str) -> None:
    with wired(disk, way=way) as wire:
        client = wire.client()
        wire.socket.sendall(b"G" * 100)
        assert client.ended()
    assert len(wire.reports) == 1
    assert "protocol" in wire.reports[0]


def test_a_client_that_takes_no_answers_is_cut_off_by_an_abort(disk: cowslice.Image, way: str) -> None:
    with wired(disk, way=way) as wire:
        client = wire.client()
        wire.socket.sendall(b"".join(client.request(Command.READ, 0, SIZE, flags=CommandFlag.DF) for _ in range(40)))
        time.sleep(0.2)  # so that the server stands waiting to send
        wire.connection.abort()
        wire.thread.join(20)
        assert not wire.thread.is_alive()


def test_a_client_that_asks_nothing_is_put_out(disk: cowslice.Image, way: str) -> None:
    with wired(disk, way=way, limits=Limits(idle_timeout=0.2)) as wire:
        client = wire.client()
        assert client.read(0, 1).data == CONTENT[:1]
        assert client.ended()
    assert wire.reports == ["client 1: nothing came or went for too long"]


def test_a_client_that_takes_nothing_is_put_out(disk: cowslice.Image, way: str) -> None:
    with wired(disk, way=way, limits=Limits(idle_timeout=0.2)) as wire:
        client = wire.client()
        wire.socket.sendall(b"".join(client.request(Command.READ, 0, SIZE, flags=CommandFlag.DF) for _ in range(40)))
        wire.thread.join(20)
        assert not wire.thread.is_alive()


def test_stopping_answers_what_has_come(path: Path, way: str) -> None:
    held = HeldStorage(FileStorage(path))
    held.release()
    with cowslice.open(held, warmup="full") as disk:
        disk.wait_warm()
        with wired(disk, way=way) as wire:
            client = wire.client()
            held.hold()
            client.ask(Command.READ, 0, 512)
            held.wait_for(1)
            wire.connection.stop()
            held.release()
            assert client.collect(1).data == CONTENT[:512]
            assert client.ended()
            assert wire.reports == []


def test_a_client_that_vanishes_leaves_nothing(path: Path, way: str) -> None:
    held = HeldStorage(FileStorage(path))
    held.release()
    with cowslice.open(held, warmup="full") as disk:
        disk.wait_warm()
        with wired(disk, way=way) as wire:
            client = wire.client()
            held.hold()
            for n in range(8):
                client.ask(Command.READ, n * K // 2, 512)
            held.wait_for(1)
            wire.socket.close()
            held.release()
            wire.thread.join(20)
            assert not wire.thread.is_alive()


def test_a_compressed_disk_in_memory_is_served(way: str) -> None:
    image = model("CCNC.ZCC")
    with cowslice.open(in_memory(image)) as disk, wired(disk, way=way) as wire:
        assert wire.client().read(0, disk.size).data == image.over(b"")


def test_what_was_answered_is_counted(disk: cowslice.Image, way: str) -> None:
    meter = ExportMeter("", disk.size, disk)
    with wired(disk, way=way) as wire:
        wire.connection._service.meters[""] = meter  # type: ignore[index]
        client = wire.client()
        client.read(0, 1000)
        client.status(0, SIZE)
        client.read(SIZE, 1)
        assert meter.reading().connections == 1
    counts = meter.reading().counts
    assert meter.reading().connections == 0
    assert (counts["requests"]["read"], counts["requests"]["status"], counts["bytes"]["read"]) == (2, 1, 1000)
    assert (counts["errors"], sum(counts["latency"])) == (1, 3)


def test_a_client_that_never_gets_ready_is_put_out(disk: cowslice.Image) -> None:
    with wired(disk, limits=Limits(handshake_timeout=0.2)) as wire:
        end = time.monotonic() + 20

        def drip() -> None:
            try:
                while time.monotonic() < end:
                    wire.socket.sendall(b"\0")  # each byte in time, all of them never
                    time.sleep(0.02)
            except OSError:
                pass

        dripping = threading.Thread(target=drip)
        dripping.start()
        wire.thread.join(20)
        assert not wire.thread.is_alive()
        dripping.join()


@pytest.mark.parametrize("said", [b"", b"\0\0\0\3", b"\xff" * 64, b"GET / HTTP/1.1\r\n\r\n" * 9, bytes(4096)])
def test_whatever_a_stranger_says_the_connection_ends(disk: cowslice.Image, said: bytes) -> None:
    with wired(disk) as wire:
        wire.socket.sendall(said)
        wire.socket.shutdown(socket.SHUT_WR)
        wire.thread.join(20)
        assert not wire.thread.is_alive()
