"""The NBD storage beside servers that lie, break off or fall silent: all who wait end, with one of our errors."""

from __future__ import annotations

import errno
import os
import random
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cowslice.errors import CowsliceError, RemoteProtocolError, StorageError
from cowslice.nbd import BlockSizes, Export, export_flags
from cowslice.nbd.wire import GREETING, NBD_MAGIC, OPTION_MAGIC, SIMPLE_REPLY, ExportFlag
from cowslice.storage import NbdStorage
from tests.unit.nbd.talk import Disk
from tests.unit.storage.scripted import Client, Script, scripted

SIZE = 1 << 20
CONTENT = random.Random(4).randbytes(SIZE)
QUIET = 1.25  # seconds that these tests let a server be silent: more than a busy machine needs for an honest one

quick = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def new_disk() -> Disk:
    return Disk(bytearray(CONTENT))


def our_threads() -> int:
    return sum(thread.name == "cowslice-nbd-client" for thread in threading.enumerate())


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    """No thread and no descriptor of ours, whatever the server did."""
    before = our_threads(), len(os.listdir("/proc/self/fd"))
    yield
    assert (our_threads(), len(os.listdir("/proc/self/fd"))) == before


# Before transmission


def say(*parts: bytes) -> Script:
    def script(client: Client) -> None:
        for part in parts:
            client.socket.sendall(part)
        client.wait_for_end()

    return script


def hang_up(client: Client) -> None:
    client.socket.sendall(GREETING.pack(NBD_MAGIC, OPTION_MAGIC, 3))


@pytest.mark.parametrize("script", [say(b"HTTP/1.1 400 Bad Request\r\n\r\n"), say(bytes(4096))])
def test_who_does_not_speak_nbd_is_told_so(script: Script) -> None:
    with scripted(new_disk(), script) as uri, pytest.raises(RemoteProtocolError, match="broke the NBD protocol"):
        NbdStorage(uri)


def test_a_server_that_hangs_up_is_a_plain_error() -> None:
    with scripted(new_disk(), hang_up) as uri, pytest.raises((RemoteProtocolError, StorageError)):
        NbdStorage(uri)


@pytest.mark.parametrize("script", [say(), say(b"NBDMAGIC")])
def test_a_negotiation_has_a_deadline(script: Script) -> None:
    with scripted(new_disk(), script) as uri, pytest.raises(StorageError, match=r"did not answer for 1\.25") as late:
        NbdStorage(uri, timeout=QUIET)
    assert late.value.errno == errno.ETIMEDOUT


def test_a_negotiation_that_trickles_has_the_same_deadline() -> None:
    done = threading.Event()

    def trickle(client: Client) -> None:
        for byte in GREETING.pack(NBD_MAGIC, OPTION_MAGIC, 3):
            client.socket.sendall(bytes([byte]))
            done.wait(QUIET / 4)

    with scripted(new_disk(), trickle) as uri, pytest.raises(StorageError, match="did not answer"):
        NbdStorage(uri, timeout=QUIET)
    done.set()


def test_an_export_that_is_not_there_is_named() -> None:
    with scripted(new_disk(), export=Export("there", SIZE)) as uri:
        elsewhere = uri.replace("there", "els%20where")
        with pytest.raises(StorageError, match="refuses export 'els where'") as refused:
            NbdStorage(elsewhere)
    assert refused.value.errno == errno.ENOENT
    assert refused.value.hint


def test_nobody_listening_is_a_plain_error() -> None:
    with pytest.raises(StorageError, match="Connection refused") as refused:
        NbdStorage("nbd://127.0.0.1:1/")
    assert refused.value.errno == errno.ECONNREFUSED


def test_a_host_without_an_address_is_a_plain_error() -> None:
    with pytest.raises(StorageError, match=r"cannot open 'nbd://host\.invalid'"):
        NbdStorage("nbd://host.invalid")


@pytest.mark.parametrize("place", ["/" + "x" * 200, "/a%00b"])
def test_an_impossible_socket_is_one_of_our_errors(place: str) -> None:
    with pytest.raises(CowsliceError, match="cannot open"):
        NbdStorage(f"nbd+unix:///?socket={place}")


# In transmission


def spoiling(spoil: Script) -> Script:
    def script(client: Client) -> None:
        client.negotiate()
        spoil(client)

    return script


@pytest.mark.parametrize("garbage", [bytes(16), b"\xff" * 400, SIMPLE_REPLY.pack(0x67446698, 0, 77)])
def test_garbage_fails_all_who_wait_and_all_who_come(garbage: bytes) -> None:
    def answer(client: Client) -> None:
        for _ in range(4):
            client.socket.recv(28)
        client.socket.sendall(garbage)
        client.wait_for_end()

    with scripted(new_disk(), spoiling(answer)) as uri, NbdStorage(uri, connections=1) as storage:
        with ThreadPoolExecutor(4) as pool:
            waiting = [pool.submit(storage.read, n * 4096, 4096) for n in range(4)]
            for one in waiting:
                with pytest.raises(RemoteProtocolError, match="broke the NBD protocol"):
                    one.result()
        with pytest.raises(RemoteProtocolError):
            storage.read(0, 1)


@quick
@given(cut=st.integers(0, 5000))
def test_an_answer_that_breaks_off_is_a_lost_connection(cut: int) -> None:
    def answer(client: Client) -> None:
        client.negotiate_plainly(SIZE)
        _, cookie, offset, length = client.request()
        whole = SIMPLE_REPLY.pack(0x67446698, 0, cookie) + CONTENT[offset : offset + length]
        client.socket.sendall(whole[:cut])

    with scripted(new_disk(), answer) as uri, NbdStorage(uri) as storage:
        with pytest.raises(StorageError, match="the server closed the connection") as lost:
            storage.read(0, 5000)
        assert (lost.value.errno, lost.value.filename) == (errno.ECONNRESET, uri)


def test_a_server_that_leaves_while_nobody_asks_is_noticed_by_the_next() -> None:
    with scripted(new_disk(), spoiling(lambda client: None)) as uri, NbdStorage(uri) as storage:
        for _ in range(2):
            with pytest.raises(StorageError, match="is lost"):
                storage.read(0, 1)


@pytest.mark.parametrize("size", [100, 8 << 20])
def test_silence_ends_all_who_wait(size: int) -> None:
    mute = scripted(Disk(bytearray(size)), spoiling(Client.wait_for_end))
    with mute as uri, NbdStorage(uri, timeout=QUIET) as storage, ThreadPoolExecutor(3) as pool:
        for one in [pool.submit(storage.read, 0, size) for _ in range(3)]:
            with pytest.raises(StorageError, match=r"did not answer for 1\.25 seconds") as late:
                one.result()
            assert late.value.errno == errno.ETIMEDOUT


def test_silence_while_nobody_asks_is_no_fault() -> None:
    with scripted(new_disk()) as uri, NbdStorage(uri, timeout=QUIET) as storage:
        assert storage.read(0, 9) == CONTENT[:9]
        assert not threading.Event().wait(1.5 * QUIET)
        assert storage.read(5, 9) == CONTENT[5:14]


def test_a_server_that_takes_nothing_is_given_up() -> None:
    held = threading.Event()
    size = 32 << 20
    export = Export("", size, export_flags(writable=True))
    disk = Disk(bytearray(size))
    with scripted(disk, spoiling(lambda client: held.wait(30) and None), export=export) as uri:
        with NbdStorage(uri, "r+", timeout=QUIET) as storage, pytest.raises(StorageError) as late:
            storage.pwrite(0, bytes(size))
        held.set()
    assert late.value.errno == errno.ETIMEDOUT


def test_a_late_answer_does_not_touch_the_buffer() -> None:
    released = threading.Event()

    def late(client: Client) -> None:
        client.negotiate_plainly(SIZE)
        _, cookie, _, length = client.request()
        released.wait(30)
        client.reply(cookie, b"\xee" * length)

    buffer = bytearray(1000)
    with scripted(new_disk(), late) as uri, NbdStorage(uri, timeout=QUIET) as storage:
        with pytest.raises(StorageError):
            storage.pread(0, memoryview(buffer))
        released.set()
    assert buffer == bytes(1000)


def test_extents_that_end_inside_a_block_are_a_breach() -> None:
    class Crooked(Disk):
        def spans(self, offset: int, length: int) -> Iterator[tuple[int, int, bool]]:
            yield offset, 100, False

    export = Export("", SIZE, int(ExportFlag.HAS_FLAGS), block_sizes=BlockSizes(512, 4096, SIZE))
    crooked = scripted(Crooked(bytearray(CONTENT)), export=export)
    with crooked as uri, NbdStorage(uri) as storage, pytest.raises(RemoteProtocolError, match="extents end at 100"):
        list(storage.extents(0, SIZE))


@quick
@given(seed=st.integers(0, 1 << 32), early=st.booleans())
def test_whatever_a_server_says_only_our_errors_come_out(seed: int, early: bool) -> None:
    """A few bytes of what an honest server says are changed, dropped or doubled; then it leaves."""
    rng = random.Random(seed)

    def spoil(said: bytes) -> bytes:
        if rng.random() < 0.5:
            return said
        at = rng.randrange(len(said) + 1)
        return rng.choice([
            said[:at] + rng.randbytes(rng.randrange(9)) + said[at + rng.randrange(9) :],
            said[:at] + said[at // 2 :],
            said[:at],
        ])

    def answer(client: Client) -> None:
        if early:
            client.socket.sendall(spoil(client.server.feed(b"")))
        else:
            client.negotiate()
        client.socket.settimeout(0.3)
        try:
            client.answer(spoil)
        except TimeoutError:
            pass
        except CowsliceError:  # the server's own half refuses what we say when it was spoiled itself
            pass

    with scripted(new_disk(), answer) as uri:
        try:
            with NbdStorage(uri, timeout=0.1) as storage:
                list(storage.extents(0, SIZE))
                storage.read(0, 70_000)
                storage.read_spans([(n * 9000, 5000) for n in range(9)])
        except CowsliceError as fault:
            assert str(fault).isprintable()
