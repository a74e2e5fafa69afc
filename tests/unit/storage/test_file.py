"""Files and block devices, beyond the contract: opening, holes, space, faults of the system."""

from __future__ import annotations

import errno
import itertools
import os
import random
import resource
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cowslice.errors import BadOption, Closed, Locked, NoSpace, StorageError
from cowslice.storage import FileStorage, Span, aligned_buffer, posix
from cowslice.testing import peers
from cowslice.testing.peers import needs

KiB = 1 << 10
BOTH_WAYS = pytest.mark.parametrize("direct", [False, True], ids=["buffered", "direct"])


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "image"


def noise(length: int) -> bytes:
    return random.Random(length).randbytes(length)


class TestOpening:
    def test_r_plus_needs_a_file(self, path: Path) -> None:
        with pytest.raises(StorageError, match="No such file") as missing:
            FileStorage(path, "r+")
        assert (missing.value.errno, missing.value.filename) == (errno.ENOENT, str(path))

    def test_x_makes_a_file_and_refuses_one_that_is_there(self, path: Path) -> None:
        FileStorage(path, "x").close()
        with pytest.raises(StorageError, match="File exists"):
            FileStorage(path, "x")

    def test_w_makes_or_empties(self, path: Path) -> None:
        for _ in range(2):
            with FileStorage(path, "w") as storage:
                assert storage.length() == 0
                storage.pwrite(0, b"content")

    def test_w_empties_nothing_that_is_locked(self, path: Path) -> None:
        path.write_bytes(b"content")
        with FileStorage(path), pytest.raises(Locked):
            FileStorage(path, "w")
        assert path.read_bytes() == b"content"

    def test_a_directory_is_no_image(self, tmp_path: Path) -> None:
        with pytest.raises(StorageError, match="Is a directory"):
            FileStorage(tmp_path)

    def test_a_pipe_is_refused_without_waiting_for_its_writer(self, path: Path) -> None:
        os.mkfifo(path)
        with pytest.raises(StorageError, match="expected a regular file or a block device"):
            FileStorage(path)

    def test_a_character_device_is_refused(self) -> None:
        with pytest.raises(StorageError, match=r"'/dev/zero'.*expected a regular file"):
            FileStorage("/dev/zero")

    @pytest.mark.parametrize("name", ["with\0zero", "lone\udfffsurrogate\udfff"])
    def test_an_impossible_name_is_refused(self, name: str) -> None:
        with pytest.raises((BadOption, StorageError)):
            FileStorage(name)

    def test_an_unknown_mode_is_refused(self, path: Path) -> None:
        with pytest.raises(BadOption, match="mode is 'a'"):
            FileStorage(path, "a")  # type: ignore[arg-type]

    def test_where_direct_io_is_impossible_the_hint_says_so(self) -> None:
        with pytest.raises(StorageError, match="Invalid argument") as refused:
            FileStorage("/proc/self/status", direct=True)
        assert "O_DIRECT" in refused.value.hint

    @BOTH_WAYS
    def test_a_failed_opening_leaks_no_descriptor(self, path: Path, direct: bool) -> None:
        path.write_bytes(b"content")
        with FileStorage(path):
            before = os.listdir("/proc/self/fd")
            with pytest.raises(Locked):
                FileStorage(path, "r+", direct=direct)
            assert os.listdir("/proc/self/fd") == before

    @BOTH_WAYS
    def test_closing_gives_every_descriptor_back(self, path: Path, direct: bool) -> None:
        before = os.listdir("/proc/self/fd")
        FileStorage(path, "w", direct=direct).close()
        assert os.listdir("/proc/self/fd") == before

    def test_descriptors_are_not_inherited(self, path: Path) -> None:
        with FileStorage(path, "w", direct=True):
            inherited = [fd for fd in os.listdir("/proc/self/fd") if _is_inherited_to(int(fd), path)]
        assert inherited == []

    def test_once_closed_there_is_no_descriptor(self, path: Path) -> None:
        storage = FileStorage(path, "w")
        storage.close()
        for ask in (storage.fileno, storage.allocated, lambda: list(storage.extents(0, 5))):
            with pytest.raises(Closed):
                ask()


def _is_inherited_to(descriptor: int, path: Path) -> bool:
    try:
        return os.readlink(f"/proc/self/fd/{descriptor}") == str(path) and os.get_inheritable(descriptor)
    except OSError:
        return False


class TestLength:
    def test_it_follows_a_file_that_another_program_grows(self, path: Path) -> None:
        path.write_bytes(b"content")
        with FileStorage(path, locking="force-share") as storage:
            with path.open("ab") as file:
                file.write(b" more")
            assert (storage.length(), storage.read(0, 12)) == (12, b"content more")

    def test_a_file_that_shrinks_reads_as_zeros(self, path: Path) -> None:
        path.write_bytes(b"content")
        with FileStorage(path) as storage:
            os.truncate(path, 3)
            assert storage.read(0, 7) == b"con" + bytes(4)


class TestHoles:
    @settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=20)
    @given(pieces=st.sets(st.integers(0, 63), max_size=20), tail=st.integers(0, 9000))
    @needs("qemu-img")
    def test_data_and_holes_are_those_that_qemu_sees(self, tmp_path: Path, pieces: set[int], tail: int) -> None:
        path = tmp_path / f"{len(os.listdir(tmp_path))}"
        with path.open("wb") as file:
            for piece in pieces:
                file.seek(piece * 16 * KiB)
                file.write(b"x" * 16 * KiB)
            file.truncate(max(file.seek(0, os.SEEK_END), (max(pieces, default=0) + 1) * 16 * KiB) + tail // 512 * 512)
        length = path.stat().st_size
        theirs = peers.qemu_img_json("map", "-f", "raw", path)
        with FileStorage(path) as storage:
            ours = [(span.offset, span.length, span.data) for span in storage.extents(0, length)]
        assert ours == [(one["start"], one["length"], one["data"]) for one in theirs]

    def test_a_file_that_shrinks_meanwhile_ends_in_a_hole(self, path: Path) -> None:
        path.write_bytes(bytes(64 * KiB))
        with FileStorage(path, "r+") as storage:
            found = storage.extents(0, 1 << 20)
            assert next(found) == Span(0, 64 * KiB, True)
            storage.truncate(0)
            assert list(found) == [Span(64 * KiB, (1 << 20) - 64 * KiB, False)]
            assert list(storage.extents(0, 100)) == [Span(0, 100, False)]

    @pytest.mark.parametrize("offset", [0, 500, 1000, 2000])
    def test_a_file_system_without_holes_has_data_to_the_end(
        self, path: Path, offset: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path.write_bytes(bytes(1000))
        with FileStorage(path) as storage:
            monkeypatch.setattr(os, "lseek", _failing(errno.EINVAL))
            data, hole = max(1000 - offset, 0), min(2000, offset + 1000)
            spans = [Span(offset, data, True)] * (data > 0) + [Span(offset + data, hole, False)]
            assert list(storage.extents(offset, data + hole)) == spans

    def test_an_error_while_seeking_is_told(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        path.write_bytes(bytes(1000))
        with FileStorage(path) as storage:
            monkeypatch.setattr(os, "lseek", _failing(errno.EIO))
            with pytest.raises(StorageError, match=r"cannot read the holes of .*Input/output error"):
                list(storage.extents(0, 1000))


class TestSpace:
    @pytest.fixture(params=["/dev/shm", None], ids=["tmpfs", "disk"])
    def storage(self, request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[FileStorage]:
        path = Path(request.param or tmp_path, f"cowslice-space-{os.getpid()}")
        try:
            with FileStorage(path, "w") as opened:
                opened.pwrite(0, noise(256 * KiB))
                yield opened
        finally:
            path.unlink(missing_ok=True)

    def test_a_discard_gives_space_back(self, storage: FileStorage) -> None:
        storage.discard(64 * KiB, 128 * KiB)
        assert (storage.allocated() or 0) <= 128 * KiB + 16 * KiB
        assert storage.read(64 * KiB, 128 * KiB) == bytes(128 * KiB)

    def test_a_punched_span_takes_no_space_and_is_zeros_where_it_cannot_be_given_back(
        self, storage: FileStorage, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        storage.punch(64 * KiB, 128 * KiB)
        assert (storage.allocated() or 0) <= 128 * KiB + 16 * KiB
        monkeypatch.setattr(posix, "_fallocate_call", lambda: lambda *_: errno.EOPNOTSUPP)
        storage.punch(0, 64 * KiB)
        assert storage.read(0, 192 * KiB) == bytes(192 * KiB)

    def test_zeroing_writes_no_zeros(self, storage: FileStorage, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(os, "pwrite", _failing(errno.EIO))
        storage.zero(1, 255 * KiB)
        assert storage.read(0, 256 * KiB) == noise(256 * KiB)[:1] + bytes(255 * KiB) + noise(256 * KiB)[255 * KiB + 1 :]

    @pytest.mark.parametrize("works", [posix.ZERO_RANGE, posix.PUNCH_HOLE | posix.KEEP_SIZE, None])
    def test_whatever_the_file_system_can_zeroing_zeroes(
        self, storage: FileStorage, works: int | None, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        real = posix._fallocate_call()

        def call(descriptor: int, mode: int, offset: int, length: int) -> int:
            return real(descriptor, mode, offset, length) if mode == works else errno.EOPNOTSUPP

        monkeypatch.setattr(posix, "_fallocate_call", lambda: call)
        storage.zero(100 * KiB + 1, 2 << 20)
        assert storage.length() == 100 * KiB + 1 + (2 << 20)
        assert storage.read(100 * KiB, 2 << 20) == noise(256 * KiB)[100 * KiB : 100 * KiB + 1] + bytes((2 << 20) - 1)

    def test_where_nothing_can_be_discarded_nothing_happens(
        self, storage: FileStorage, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(posix, "_fallocate_call", lambda: lambda *_: errno.EOPNOTSUPP)
        storage.discard(0, 256 * KiB)
        assert storage.read(0, 256 * KiB) == noise(256 * KiB)

    def test_a_failing_discard_is_told(self, storage: FileStorage, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(posix, "_fallocate_call", lambda: lambda *_: errno.EIO)
        with pytest.raises(StorageError, match="cannot discard from"):
            storage.discard(0, 4096)

    def test_an_interrupted_allocation_goes_on(self, storage: FileStorage, monkeypatch: pytest.MonkeyPatch) -> None:
        real, calls = posix._fallocate_call(), itertools.count()
        monkeypatch.setattr(
            posix, "_fallocate_call", lambda: lambda *span: errno.EINTR if next(calls) < 3 else real(*span)
        )
        storage.discard(0, 256 * KiB)
        assert storage.read(0, 256 * KiB) == bytes(256 * KiB)


class TestFaults:
    def test_a_full_disk_is_no_space(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        with FileStorage(path, "w") as storage:
            monkeypatch.setattr(os, "pwrite", _failing(errno.ENOSPC))
            with pytest.raises(NoSpace, match=f"cannot write to '{path}': No space left"):
                storage.pwrite(0, b"x")

    def test_a_file_too_large_for_the_limit_is_told(self, path: Path) -> None:
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        with FileStorage(path, "w") as storage:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
            try:
                with pytest.raises(StorageError, match="File too large"):
                    storage.pwrite((1 << 20) - 10, bytes(100))
                with pytest.raises(StorageError, match="cannot resize"):
                    storage.truncate(2 << 20)
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    def test_offsets_beyond_the_file_system_are_told(self, path: Path) -> None:
        with FileStorage(path, "w") as storage, pytest.raises(StorageError):
            storage.pwrite((1 << 63) - 10, b"x")

    def test_an_unreadable_block_is_told(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        path.write_bytes(b"content")
        with FileStorage(path) as storage:
            monkeypatch.setattr(os, "preadv", _failing(errno.EIO))
            with pytest.raises(StorageError, match=f"cannot read '{path}': Input/output error") as told:
                storage.read(0, 4)
            assert told.value.errno == errno.EIO

    def test_a_failed_sync_is_told(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        with FileStorage(path, "w") as storage:
            monkeypatch.setattr(os, "fdatasync", _failing(errno.EIO))
            with pytest.raises(StorageError, match="cannot sync"):
                storage.sync()

    @BOTH_WAYS
    def test_a_failed_direct_or_buffered_transfer_is_told_the_same(
        self, path: Path, direct: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with FileStorage(path, "w", direct=direct) as storage:
            storage.pwrite(0, noise(8192))
            for name in ("preadv", "pwrite"):
                monkeypatch.setattr(os, name, _failing(errno.EIO))
            for transfer in (lambda: storage.read(0, 4096), lambda: storage.pwrite(0, aligned_buffer(4096))):
                with pytest.raises(StorageError, match="Input/output error"):
                    transfer()

    def test_a_failed_close_is_told_and_closes(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        storage, close = FileStorage(path, "w"), os.close
        monkeypatch.setattr(os, "close", lambda fd: (close(fd), _failing(errno.EIO)()))
        with pytest.raises(StorageError, match="cannot close"):
            storage.close()
        storage.close()

    @BOTH_WAYS
    def test_transfers_that_stop_half_way_go_on(
        self, path: Path, direct: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        read, write = os.preadv, os.pwrite
        piece = 4096 if direct else 1000
        monkeypatch.setattr(os, "preadv", lambda fd, buffers, at: read(fd, (buffers[0][:piece],), at))
        monkeypatch.setattr(os, "pwrite", lambda fd, data, at: write(fd, data[:piece], at))
        with FileStorage(path, "w", direct=direct) as storage:
            storage.pwrite(77, noise(30_000))
            buffer = aligned_buffer(32 * KiB)
            assert storage.pread(0, buffer) == 30_077
            assert bytes(buffer) == bytes(77) + noise(30_000) + bytes(32 * KiB - 30_077)

    @BOTH_WAYS
    def test_signals_interrupt_nothing(self, path: Path, direct: bool) -> None:
        fired = itertools.count()
        before = signal.signal(signal.SIGALRM, lambda *_: next(fired))
        signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
        try:
            with FileStorage(path, "w", direct=direct) as storage:
                while next(fired) < 40:
                    storage.pwrite(1, noise(1 << 20))
                    storage.sync()
                    assert storage.read(1, 1 << 20) == noise(1 << 20)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)


class TestDirect:
    def test_aligned_reads_and_writes_need_no_bounce(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        with FileStorage(path, "w", direct=True) as storage:
            monkeypatch.setattr(storage._direct, "_bounce", None)
            buffer = aligned_buffer(64 * KiB)
            buffer[:] = noise(64 * KiB)
            storage.pwrite(4096, buffer)
            buffer[:] = bytes(64 * KiB)
            storage.read_into(4096, buffer)
            assert bytes(buffer) == noise(64 * KiB)

    def test_spans_larger_than_the_bounce_come_in_pieces(self, path: Path) -> None:
        with FileStorage(path, "w", direct=True) as storage:
            storage.pwrite(3, noise(2_000_000))
            assert storage.read(1, 2_000_010) == bytes(2) + noise(2_000_000) + bytes(8)

    def test_both_views_of_one_file_agree(self, path: Path) -> None:
        with FileStorage(path, "w", direct=True) as direct, FileStorage(path, "r+", locking=False) as buffered:
            for n, (writer, reader) in enumerate([(direct, buffered), (buffered, direct)] * 8):
                writer.pwrite(n * 5000, noise(9000 + n))
                assert reader.read(n * 5000, 9000 + n) == noise(9000 + n)

    def test_buffers_begin_on_a_page(self) -> None:
        ctypes = pytest.importorskip("ctypes")
        for length in (1, 512, 100_000):
            buffer = aligned_buffer(length)
            assert len(buffer) == length
            assert ctypes.addressof(ctypes.c_char.from_buffer(buffer)) % 4096 == 0
        assert len(aligned_buffer(0)) == 0


@pytest.fixture
def device(tmp_path: Path) -> Iterator[Path]:
    """A block device of 1 MiB, filled with noise."""
    backing = tmp_path / "backing"
    backing.write_bytes(noise(1 << 20))
    try:
        made = subprocess.run(
            ["losetup", "--find", "--show", str(backing)], capture_output=True, text=True, check=False, timeout=60
        )
    except FileNotFoundError:
        pytest.skip("no losetup here to make a block device with")
    if made.returncode:
        pytest.skip(f"no block device could be made here: {made.stderr.strip()}")
    yield Path(made.stdout.strip())
    subprocess.run(["losetup", "--detach", made.stdout.strip()], check=True, timeout=60)


@BOTH_WAYS
class TestBlockDevice:
    def test_it_has_its_length_and_content(self, device: Path, direct: bool) -> None:
        with FileStorage(device, direct=direct) as storage:
            assert storage.length() == 1 << 20
            assert storage.read(1, 1 << 20) == noise(1 << 20)[1:] + b"\0"
            assert list(storage.extents(0, 2 << 20)) == [Span(0, 1 << 20, True), Span(1 << 20, 1 << 20, False)]
            assert storage.allocated() is None

    def test_any_span_can_be_written(self, device: Path, direct: bool) -> None:
        with FileStorage(device, "r+", direct=direct) as storage:
            storage.pwrite(5000, noise(10_000))
            storage.sync()
        with FileStorage(device, direct=direct) as storage:
            assert storage.read(5000, 10_000) == noise(10_000)
            assert storage.read(0, 5000) == noise(1 << 20)[:5000]

    def test_spans_can_be_zeroed_and_discarded(self, device: Path, direct: bool) -> None:
        with FileStorage(device, "r+", direct=direct) as storage:
            storage.zero(4096, 8192)
            storage.zero(100_001, 10_000)
            storage.discard(200_000, 100_000)
            assert storage.read(4096, 8192) == bytes(8192)
            assert storage.read(100_000, 10_002) == (
                noise(1 << 20)[100_000:100_001] + bytes(10_000) + noise(1 << 20)[110_001:110_002]
            )
            assert storage.read(300_000, 1000) == noise(1 << 20)[300_000:301_000]

    def test_it_is_full_where_it_ends(self, device: Path, direct: bool) -> None:
        with FileStorage(device, "r+", direct=direct) as storage, pytest.raises(NoSpace):
            storage.pwrite((1 << 20) - 10, bytes(100))

    def test_it_keeps_its_length(self, device: Path, direct: bool) -> None:
        with FileStorage(device, "r+", direct=direct) as storage:
            storage.truncate(1 << 20)
            with pytest.raises(StorageError, match="to 5 bytes: it is a block device of 1048576 bytes"):
                storage.truncate(5)
        FileStorage(device, "w", direct=direct).close()
        assert FileStorage(device).read(0, 10) == noise(1 << 20)[:10]

    def test_two_writers_exclude_each_other(self, device: Path, direct: bool) -> None:
        with FileStorage(device, "r+", direct=direct), pytest.raises(Locked):
            FileStorage(device, "r+", direct=direct)


def _failing(code: int) -> Callable[..., int]:
    def fail(*_: object) -> int:
        raise OSError(code, os.strerror(code))

    return fail
