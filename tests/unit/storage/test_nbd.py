"""The NBD storage beside an honest server: what it asks, of whom, and how answers find their askers."""

from __future__ import annotations

import random
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cowslice.errors import BadOption, Closed, NoSpace, ReadOnly, StorageError
from cowslice.nbd import BadRequest, BlockSizes, Export, Request, export_flags
from cowslice.nbd.wire import Command, ExportFlag, NbdError
from cowslice.storage import NbdStorage
from cowslice.storage.nbdpool import BUSY
from tests.unit.nbd.talk import Disk
from tests.unit.storage.scripted import Client, scripted

SIZE = 300_000
CONTENT = random.Random(4).randbytes(SIZE)
WRITABLE = export_flags(writable=True)

in_blocks = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
spans = st.tuples(st.integers(0, SIZE), st.one_of(st.integers(0, 3000), st.integers(0, SIZE)))


def new_disk() -> Disk:
    return Disk(bytearray(CONTENT))


def threads() -> int:
    return sum(thread.name == "cowslice-nbd-client" for thread in threading.enumerate())


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    before = threads()
    yield
    assert threads() == before


class Blocky:
    """A disk and its storage; no record, because it is not to be printed."""

    def __init__(self, disk: Disk, storage: NbdStorage) -> None:
        self.disk = disk
        self.storage = storage


@pytest.fixture(scope="module", params=[1, 512, 65536])
def blocky(request: pytest.FixtureRequest) -> Iterator[Blocky]:
    """A disk whose server wants whole blocks, none too many at once; the log shows what it was asked."""
    size = -(-SIZE // request.param) * request.param
    disk = Disk(bytearray(CONTENT.ljust(size, b"\0")))
    export = Export("d", size, WRITABLE, block_sizes=BlockSizes(request.param, 65536, 65536))
    with scripted(disk, export=export) as uri, NbdStorage(uri, "r+") as storage:
        yield Blocky(disk, storage)


@in_blocks
@given(span=spans)
def test_reads_keep_the_block_sizes(blocky: Blocky, span: tuple[int, int]) -> None:
    disk, storage = blocky.disk, blocky.storage
    disk.log.clear()
    content = bytes(disk.content)
    assert storage.read(*span) == content[span[0] : sum(span)].ljust(span[1], b"\0")
    assert all(isinstance(one, Request) and one.length <= 65536 for one in disk.log)


@in_blocks
@given(span=spans, change=st.sampled_from(["write", "zero", "discard"]))
def test_changes_keep_the_block_sizes(
    blocky: Blocky, span: tuple[int, int], change: str
) -> None:
    disk, storage = blocky.disk, blocky.storage
    disk.log.clear()
    offset, length = span[0], min(span[1], storage.length() - span[0])
    model = bytearray(disk.content)
    if change == "write":
        model[offset : offset + length] = CONTENT[:length]
        storage.pwrite(offset, CONTENT[:length])
    elif change == "zero":
        model[offset : offset + length] = bytes(length)
        storage.zero(offset, length)
    else:
        storage.discard(offset, length)
        assert disk.content[:offset] == model[:offset]
        assert disk.content[offset + length :] == model[offset + length :]
        model = disk.content
    assert disk.content == model
    assert not [one for one in disk.log if isinstance(one, BadRequest)]


def test_nothing_is_asked_for_nothing(blocky: Blocky) -> None:
    blocky.disk.log.clear()
    blocky.storage.pwrite(700, b"")
    blocky.storage.zero(700, 0)
    blocky.storage.discard(700, 0)
    assert blocky.storage.read(700, 0) == b""
    assert blocky.storage.read(1 << 40, 5) == bytes(5)
    assert blocky.storage.read_spans([(700, 0), (1 << 40, 3)]) == [b"", bytes(3)]
    assert blocky.disk.log == []


def test_answers_in_any_order_find_their_askers() -> None:
    asked = 8

    def backwards(client: Client) -> None:
        client.negotiate_plainly(SIZE)
        requests = [client.request() for _ in range(asked)]
        for _, cookie, offset, length in reversed(requests):
            client.reply(cookie, CONTENT[offset : offset + length])
        client.wait_for_end()

    with scripted(new_disk(), backwards) as uri, NbdStorage(uri) as storage, ThreadPoolExecutor(asked) as pool:
        found = list(pool.map(lambda n: storage.read(n * 1000, 500), range(asked)))
    assert found == [CONTENT[n * 1000 : n * 1000 + 500] for n in range(asked)]


def test_one_read_has_many_requests_under_way() -> None:
    size = 12 << 20
    content = random.Random(1).randbytes(size)
    seen = []

    def wait_for_all(client: Client) -> None:
        client.negotiate_plainly(size)
        seen.extend(client.request() for _ in range(size >> 20))
        for _, cookie, offset, length in seen:
            client.reply(cookie, content[offset : offset + length])
        client.wait_for_end()

    with scripted(Disk(bytearray(content)), wait_for_all) as uri, NbdStorage(uri) as storage:
        assert storage.read(0, size) == content
    assert len(seen) == 12


@pytest.mark.parametrize(
    "error, kind, code",
    [(NbdError.EIO, StorageError, 5), (NbdError.ENOSPC, NoSpace, 28), (NbdError.EPERM, StorageError, 1)],
)
def test_a_servers_error_comes_out_with_its_number_and_words(
    error: NbdError, kind: type[StorageError], code: int
) -> None:
    disk = new_disk()
    disk.verdict = lambda request: (error, "the disk\x1b is tired", None) if request.offset == 512 else None
    with scripted(disk) as uri, NbdStorage(uri) as storage:
        with pytest.raises(kind, match=r"cannot read 'nbd.*the disk. is tired") as failed:
            storage.read(512, 10)
        assert str(failed.value).isprintable()
        assert (failed.value.errno, failed.value.filename) == (code, uri)
        assert storage.read(0, 10) == CONTENT[:10]


def test_an_error_of_one_piece_fails_the_read_after_all_have_ended() -> None:
    disk = Disk(bytearray(6 << 20))
    disk.verdict = lambda request: (NbdError.EIO, "", None) if request.offset == 1 << 20 else None
    with scripted(disk) as uri, NbdStorage(uri, connections=1) as storage:
        with pytest.raises(StorageError, match="Input/output error"):
            storage.read(0, 6 << 20)
        assert storage._pool.pick().in_flight == 0


def test_what_the_server_does_not_offer_is_done_without() -> None:
    disk = new_disk()
    flags = int(ExportFlag.HAS_FLAGS)
    with scripted(disk, export=Export("", SIZE, flags, contexts=())) as uri, NbdStorage(uri, "r+") as storage:
        storage.zero(1000, 70_000)
        storage.discard(0, 5000)
        storage.sync()
        assert [(one.offset, one.length, one.data) for one in storage.extents(0, SIZE)] == [(0, SIZE, True)]
    assert disk.content == CONTENT[:1000] + bytes(70_000) + CONTENT[71_000:]
    assert {one.command for one in disk.log if isinstance(one, Request)} <= {Command.WRITE}


def test_a_sync_flushes() -> None:
    disk = new_disk()
    with scripted(disk, export=Export("", SIZE, WRITABLE)) as uri, NbdStorage(uri, "r+") as storage:
        storage.sync()
    assert [one.command for one in disk.log if isinstance(one, Request)] == [Command.FLUSH]


def test_an_export_keeps_its_length() -> None:
    with scripted(new_disk(), export=Export("", SIZE, WRITABLE)) as uri, NbdStorage(uri, "r+") as storage:
        storage.truncate(SIZE)
        with pytest.raises(StorageError, match=f"to 5 bytes: it is an export of {SIZE} bytes"):
            storage.truncate(5)
        for change in (lambda: storage.pwrite(SIZE - 1, b"ab"), lambda: storage.zero(SIZE, 1)):
            with pytest.raises(NoSpace, match=f"beyond the export of {SIZE} bytes"):
                change()
    assert storage.name == uri


def test_a_read_only_export_is_not_opened_for_writing() -> None:
    with scripted(new_disk()) as uri, pytest.raises(ReadOnly, match="the export is read-only"):
        NbdStorage(uri, "r+")


def test_a_writable_export_opened_for_reading_is_not_changed() -> None:
    disk = new_disk()
    with scripted(disk, export=Export("", SIZE, WRITABLE)) as uri, NbdStorage(uri) as storage:
        for change in (lambda: storage.pwrite(0, b"x"), lambda: storage.zero(0, 1), lambda: storage.discard(0, 1)):
            with pytest.raises(ReadOnly):
                change()
    assert disk.log == []


def test_holes_are_what_reads_as_zeros() -> None:
    disk = new_disk()
    disk.content[8192:16384] = bytes(8192)
    with scripted(disk) as uri, NbdStorage(uri) as storage:
        found = [(one.offset, one.length, one.data) for one in storage.extents(8000, 10_000)]
        assert found[0] == (8000, 192, True)
        assert sum(length for _, length, data in found if not data) == 8192
        assert not any(data for offset, _, data in found if 8192 <= offset < 16384)


def test_who_walks_from_hole_to_hole_asks_once() -> None:
    disk = new_disk()
    with scripted(disk) as uri, NbdStorage(uri) as storage:
        walked = [next(storage.extents(at, SIZE - at)).offset for at in range(0, SIZE, 4096)]
        assert walked == list(range(0, SIZE, 4096))
        asked = [one for one in disk.log if isinstance(one, Request) and one.command == Command.BLOCK_STATUS]
        assert len(asked) < 3  # more than one only where the walk took longer than an answer counts


def test_holes_that_we_make_are_seen_at_once() -> None:
    with scripted(new_disk(), export=Export("", SIZE, WRITABLE)) as uri, NbdStorage(uri, "r+") as storage:
        assert all(one.data for one in storage.extents(0, SIZE))
        storage.zero(0, 8192)
        assert not next(storage.extents(0, SIZE)).data


@pytest.mark.parametrize("multi_conn", [True, False])
def test_more_connections_are_made_under_load_if_the_server_allows_them(multi_conn: bool) -> None:
    held = threading.Event()
    clients: list[Client] = []

    def hold(client: Client) -> None:
        clients.append(client)
        client.negotiate()
        held.wait(30)
        client.answer()

    export = Export("", SIZE, export_flags(writable=False, multi_conn=multi_conn))
    with scripted(new_disk(), hold, export=export) as uri, NbdStorage(uri, connections=2) as storage:
        with ThreadPoolExecutor(3 * BUSY) as pool:
            reads = [pool.submit(storage.read, n * 100, 100) for n in range(3 * BUSY)]
            deadline = time.monotonic() + 30
            while sum(link.in_flight for link in storage._pool._links) < 3 * BUSY and time.monotonic() < deadline:
                time.sleep(0.001)
            held.set()
            assert [one.result() for one in reads] == [CONTENT[n * 100 : n * 100 + 100] for n in range(3 * BUSY)]
        assert storage._pool.connections == len(clients) == (2 if multi_conn else 1)


def test_a_connection_that_sees_another_disk_is_not_used() -> None:
    disks = iter([Export("", SIZE, export_flags(writable=False, multi_conn=True)), Export("", SIZE - 512)])
    with scripted(new_disk(), lambda client: _as_export(client, next(disks))) as uri, NbdStorage(uri) as storage:
        another = storage._pool._grow(storage._pool.pick())
        assert another is storage._pool.pick()
        assert storage._pool.connections == 1
        assert storage.read(0, 9) == CONTENT[:9]


def _as_export(client: Client, export: Export) -> None:
    client.server.__init__([export], client.server.disks)  # type: ignore[misc]
    client.negotiate()
    client.answer()


def test_a_storage_says_goodbye() -> None:
    ends = []

    def listen(client: Client) -> None:
        client.negotiate()
        ends.append(client.request()[0])

    with scripted(new_disk(), listen) as uri:
        NbdStorage(uri).close()
    assert ends == [Command.DISC]


def test_closing_ends_what_still_waits() -> None:
    begun = threading.Event()

    def begin(client: Client) -> None:
        client.negotiate_plainly(SIZE)
        client.request()
        begun.set()
        client.wait_for_end()

    with scripted(new_disk(), begin) as uri, ThreadPoolExecutor(1) as pool:
        storage = NbdStorage(uri)
        waiting = pool.submit(storage.read, 0, 10)
        assert begun.wait(30)
        storage.close()
        with pytest.raises(Closed, match="it is closed"):
            waiting.result()


def test_an_interrupted_read_ends_before_it_is_given_up() -> None:
    """So its buffer is not touched afterwards, and the storage stays good."""

    class Interrupted(BaseException):
        pass

    def interrupt(*_: object) -> None:
        raise Interrupted

    def late(client: Client) -> None:
        client.negotiate_plainly(SIZE)
        _, cookie, offset, length = client.request()
        time.sleep(0.05)  # so that it waits for the answer by now
        signal.raise_signal(signal.SIGALRM)
        time.sleep(0.05)
        client.reply(cookie, CONTENT[offset : offset + length])
        _, cookie, offset, length = client.request()
        client.reply(cookie, CONTENT[offset : offset + length])

    old = signal.signal(signal.SIGALRM, interrupt)
    try:
        with scripted(new_disk(), late) as uri, NbdStorage(uri) as storage:
            buffer = bytearray(100)
            with pytest.raises(Interrupted):
                storage.pread(0, memoryview(buffer))
            assert buffer == CONTENT[:100]
            assert storage.read(7, 9) == CONTENT[7:16]
    finally:
        signal.signal(signal.SIGALRM, old)


def test_options_that_mean_nothing_are_refused() -> None:
    for options in ({"timeout": 0}, {"connections": 0}, {"connections": 99}, {"ca": "/x"}):
        with pytest.raises(BadOption):
            NbdStorage("nbd://localhost", **options)  # type: ignore[arg-type]
