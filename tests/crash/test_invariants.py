"""Each invariant of writing, by its number: it holds at every crash, and does not once what keeps it is taken away."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path

import pytest

import cowslice
from cowslice.image.plan import Planner
from cowslice.image.punching import Cause
from cowslice.image.tables import Tables
from cowslice.ops.check import check
from cowslice.storage import MemoryStorage, Storage
from cowslice.testing import peers
from cowslice.testing.crash import CrashRecord, CrashState, FailingSync, LyingStorage, crash_states
from cowslice.testing.crashfile import CrashFiles
from cowslice.testing.faults import Fault, FaultyStorage
from cowslice.testing.modeldisk import ModelDisk
from cowslice.testing.twin import Files, Shape, Twin, make_files
from tests.crash.test_any_moment import fault_of, opened, recorded, recorded_beside_lies

pytestmark = peers.needs("qemu-img")

SMALL = Shape(512)
AUTOCLEAR_BYTE, UNKNOWN_BIT = 95, 0x20
NO_LIE: tuple[int, ...] = ()


def faults(files: Files, work: Callable[[Twin, LyingStorage], object], *, limit: int = 200) -> list[str]:
    """What is wrong in any state that a crash can leave of this work."""
    model, liars = ModelDisk(files.content), []

    def wrap(storage: Storage) -> Storage:
        liars.append(LyingStorage(storage))
        return liars[0]

    record = recorded(files, model, lambda twin: work(twin, liars[0]), wrap=wrap)
    return faults_after(files, model, record, limit=limit)


def faults_after(files: Files, model: ModelDisk, record: CrashRecord, *, limit: int = 200) -> list[str]:
    return [fault for state in crash_states(record, limit=limit) if (fault := fault_of(files, model, state))]


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return make_files(SMALL, tmp_path)


@pytest.mark.parametrize("lie", [NO_LIE, (0,)])
def test_i1_an_entry_reaches_the_disk_after_the_count_of_its_cluster(files: Files, lie: tuple[int, ...]) -> None:
    def work(twin: Twin, liar: LyingStorage) -> None:
        twin.write(0, b"a" * 512)
        twin.flush()
        twin.write(1024, b"b" * 512)
        liar.lie(*lie)
        twin.flush()

    assert bool(faults(files, work)) is bool(lie)


@pytest.mark.parametrize("lie", [NO_LIE, (0,)])
def test_i1_and_i2_hold_for_compiled_writers_too(tmp_path: Path, lie: tuple[int, ...]) -> None:
    """The second write takes from the supply, after the first had it stocked."""

    def work(twin: Twin, crash: CrashFiles) -> None:
        twin.write(0, b"a" * 512)
        crash.lie(*lie)
        twin.write(8192 + 1024, b"b" * 512)
        twin.flush()

    files = make_files(Shape(4096, backing="raw"), tmp_path)
    model = ModelDisk(files.content)
    assert bool(faults_after(files, model, recorded_beside_lies(files, model, work))) is bool(lie)


@pytest.mark.parametrize("lie", [NO_LIE, (0,)])
def test_i2_an_entry_exposes_only_bytes_that_are_stable(tmp_path: Path, lie: tuple[int, ...]) -> None:
    def work(twin: Twin, liar: LyingStorage) -> None:
        twin.write(1024, b"a" * 512)
        liar.lie(*lie)
        twin.flush()

    found = faults(make_files(Shape(4096, backing="raw"), tmp_path), work)
    assert bool([fault for fault in found if "neither what was flushed" in fault]) is bool(lie)


@pytest.mark.parametrize("early", [False, True])
def test_i3_a_count_falls_after_the_last_reference_is_gone(
    files: Files, early: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def drop(self: Tables, host: int, *, cause: Cause = Cause.OTHER, count: int = 1) -> None:
        self.allocator.lower([(host // SMALL.cluster_size, count)])

    if early:
        monkeypatch.setattr(Tables, "drop", drop)

    def work(twin: Twin, liar: LyingStorage) -> None:
        twin.write(0, b"a" * 2048)
        twin.flush()
        twin.discard(512, 1024)
        twin.flush()

    assert bool(faults(files, work)) is early


@pytest.mark.parametrize("lie", [NO_LIE, (0,)])
def test_i4_a_table_is_stable_before_anything_points_at_it(files: Files, lie: tuple[int, ...]) -> None:
    """The new table lies where a discarded cluster was, so that a table which is not there is not zeros."""
    span = 64 * 512

    def work(twin: Twin, liar: LyingStorage) -> None:
        twin.write(0, b"\xff" * 8192)
        twin.flush()
        twin.discard(512, 7680)
        twin.flush()
        twin.flush()
        twin.write(span, b"b" * 512)
        liar.lie(*lie)
        twin.flush()

    assert bool(faults(files, work)) is bool(lie)


@pytest.mark.parametrize("lie", [NO_LIE, (0,)])
def test_i5_the_header_changes_last(tmp_path: Path, lie: tuple[int, ...]) -> None:
    """A second refcount table, for the first counts no more than 2 MiB of the file."""
    files = make_files(Shape(512, refcount_bits=64, guest_bytes=3 << 20), tmp_path)

    def work(twin: Twin, liar: LyingStorage) -> None:
        twin.write(0, b"a" * (19 << 16))
        twin.flush()
        twin.write(19 << 16, b"b" * (1 << 20))
        liar.lie(*lie)
        twin.flush()

    assert bool(faults(files, work, limit=30)) is bool(lie)


@pytest.mark.parametrize("blind", [False, True])
def test_i6_what_is_shared_is_not_changed_in_place(
    files: Files, blind: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    peers.qemu_io(files.image, "write -P 1 0 2k")
    peers.qemu_img("snapshot", "-c", "kept", files.image)
    if blind:
        monkeypatch.setattr(Planner, "_ours", lambda self, entry: entry.host_offset >= 0)
    model = ModelDisk(b"\1" * 2048 + bytes(SMALL.size - 2048))
    record = recorded(files, model, lambda twin: twin.write(512, b"b" * 1024))
    states = list(crash_states(record, limit=200))
    spoiled = [state.name for state in states if snapshot_of(state) != b"\1" * 2048]
    assert bool(spoiled) is blind
    assert blind or not [fault for state in states if (fault := fault_of(files, model, state))]


def snapshot_of(state: CrashState) -> bytes:
    with cowslice.open(state.storage(), snapshot="kept", warmup="off") as disk:
        return disk.read(0, 2048)


@pytest.mark.parametrize("lie", [NO_LIE, (0,)])
def test_i7_a_bit_that_is_not_kept_true_is_off_before_the_first_change(files: Files, lie: tuple[int, ...]) -> None:
    content = bytearray(files.image.read_bytes())
    content[AUTOCLEAR_BYTE] |= UNKNOWN_BIT
    record = CrashRecord()
    liar = LyingStorage(record.storage(content), *lie)
    with opened(files, liar, None) as disk:
        disk.write(0, b"a" * 512)
    broken = [state.name for state in crash_states(record, limit=200)
              if state.contents["image"][AUTOCLEAR_BYTE] & UNKNOWN_BIT and state.contents["image"] != content]
    assert bool(broken) is bool(lie)


@pytest.mark.parametrize("lie", [NO_LIE, (0, 1)])
def test_i8_the_dirty_bit_is_stable_before_lazy_writes(tmp_path: Path, lie: tuple[int, ...]) -> None:
    def work(twin: Twin, liar: LyingStorage) -> None:
        twin.write(0, b"a" * 512)
        liar.lie(*lie)
        twin.flush()

    found = faults(make_files(Shape(512, lazy=True), tmp_path), work)
    assert bool([fault for fault in found if "corruptions" in fault]) is bool(lie)


@pytest.mark.parametrize("lie", [NO_LIE, (0, 1, 2)])
def test_i8_the_dirty_bit_is_off_after_the_counts_are_stable(tmp_path: Path, lie: tuple[int, ...]) -> None:
    def work(twin: Twin, liar: LyingStorage) -> None:
        twin.write(0, b"a" * 512)
        twin.flush()
        liar.lie(*lie)

    found = faults(make_files(Shape(512, lazy=True), tmp_path), work)
    assert bool([fault for fault in found if "corruptions" in fault]) is bool(lie)


def failing(files: Files) -> tuple[FailingSync, cowslice.Image, CrashRecord]:
    record = CrashRecord()
    disk = FailingSync(record.storage(files.image.read_bytes()))
    return disk, opened(files, disk, None), record


def test_i9_after_a_failed_sync_nothing_is_written_any_more(files: Files) -> None:
    storage, disk, record = failing(files)
    disk.write(0, b"a" * 512)
    storage.fail()
    with pytest.raises(cowslice.StorageError):
        disk.flush()
    before = len(record.events)
    for act in (lambda: disk.write(4096, b"b" * 512), lambda: disk.write(0, b"b" * 512), disk.flush,
                lambda: disk.discard(0, 512), lambda: disk.zero(0, 512)):
        with pytest.raises(cowslice.StorageError, match="opened again"):
            act()
    assert len(record.events) == before


def test_i9_trusting_a_later_sync_would_lose_what_was_flushed(files: Files) -> None:
    storage, disk, record = failing(files)
    disk.write(0, b"a" * 512)
    storage.fail()
    with pytest.raises(cowslice.StorageError):
        disk.flush()
    commits = disk._writes.writer.commits  # type: ignore[union-attr]
    commits.fault = None
    disk.flush()
    record.mark("1")
    model = ModelDisk(files.content)
    model.write(0, b"a" * 512)
    assert [fault for state in crash_states(record, limit=200) if (fault := fault_of(files, model, state))]


@pytest.mark.parametrize("skip", range(6))
def test_i3_a_discard_that_fails_half_way_drops_nothing_that_is_still_referred_to(files: Files, skip: int) -> None:
    """The L2 table is shared, so a copy of it is made and read again: a read that fails comes after the plan."""
    peers.qemu_io(files.image, "write -P 1 0 8k")
    peers.qemu_img("snapshot", "-c", "kept", files.image)
    storage = FaultyStorage(MemoryStorage(files.image.read_bytes(), name="image"))
    with opened(files, storage, None) as disk:
        storage.add(Fault("pread", skip=skip, times=2))  # twice: what was read ahead is tried again
        for act in (lambda: disk.discard(0, 8192), disk.flush, disk.flush):
            with contextlib.suppress(cowslice.StorageError):
                act()
        storage.heal()
    found = check(storage.inner)
    assert found.corruptions == 0, [str(one) for one in found.findings]
