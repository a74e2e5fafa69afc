"""The tests that every storage must pass. Subclass a contract, give it the fixture `make`, and pytest runs them.

    class TestMine(WritableStorageContract):
        @pytest.fixture
        def make(self, tmp_path): return lambda content: MyStorage(...)

They know of a storage only what its contract says; `make(content)` is called several times in one test.
"""

from __future__ import annotations

import array
import itertools
import os
import random
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cowslice.errors import Closed, OutOfRange, ReadOnly, ShortRead
from cowslice.storage import Storage, aligned_buffer

Make = Callable[[bytes], Storage]

_LENGTH = 300_001  # ends inside a sector, a page and a cluster
_HOLE = slice(64 << 10, 192 << 10)
# Each example takes its own storages from `make`, and the tests of a contract run in several classes: both are meant.
_shared = settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.differing_executors, HealthCheck.too_slow]
)
_offsets = st.one_of(
    st.integers(0, _LENGTH + 9000),
    st.builds(lambda block, beside: max(block * 4096 + beside, 0), st.integers(0, 76), st.integers(-2, 2)),
)
_lengths = st.one_of(st.integers(0, 20_000), st.sampled_from([1, 511, 512, 4095, 4096, 4097, 65536, _LENGTH]))
_spans = st.tuples(_offsets, _lengths)


def sample_content() -> bytes:
    """Return the same 300,001 bytes each time: noise, with a run of zeros inside that may be a hole."""
    content = bytearray(random.Random(2).randbytes(_LENGTH))
    content[_HOLE] = bytes(_HOLE.stop - _HOLE.start)
    return bytes(content)


CONTENT = sample_content()


def expected(content: bytes, offset: int, length: int) -> bytes:
    """Return the span as every storage reads it: zeros past the end."""
    return content[offset : offset + length].ljust(length, b"\0")


class StorageContract:
    """What reading means. `make(content)` opens a storage of exactly these bytes, for reading or for both."""

    @pytest.fixture
    def make(self) -> Make:
        raise LookupError("the subclass gives a fixture `make` that opens a storage with the content it is called with")

    @pytest.fixture
    def storage(self, make: Make) -> Iterator[Storage]:
        with make(CONTENT) as opened:
            yield opened

    def test_it_is_as_long_as_its_content(self, storage: Storage) -> None:
        assert storage.length() == _LENGTH

    def test_an_empty_one_has_no_bytes(self, make: Make) -> None:
        with make(b"") as empty:
            assert (empty.length(), empty.pread(0, memoryview(bytearray(9)))) == (0, 0)

    def test_it_says_what_it_is(self, storage: Storage) -> None:
        assert storage.name
        assert storage.name in repr(storage)
        assert storage.alignment & (storage.alignment - 1) == 0 < storage.alignment

    def test_pread_fills_the_whole_buffer_inside(self, storage: Storage) -> None:
        buffer = bytearray(200_000)
        assert storage.pread(777, memoryview(buffer)) == len(buffer)
        assert buffer == CONTENT[777:200_777]

    def test_pread_is_short_only_where_the_storage_ends(self, storage: Storage) -> None:
        buffer = bytearray(b"\xaa" * 5000)
        assert storage.pread(_LENGTH - 1001, memoryview(buffer)) == 1001
        assert bytes(buffer) == CONTENT[-1001:] + b"\xaa" * 3999

    def test_pread_past_the_end_reads_nothing(self, storage: Storage) -> None:
        buffer = bytearray(b"\xaa" * 4096)
        assert [storage.pread(at, memoryview(buffer)) for at in (_LENGTH, _LENGTH + 1, 1 << 40)] == [0, 0, 0]
        assert bytes(buffer) == b"\xaa" * 4096

    @_shared
    @given(span=_spans)
    def test_any_span_reads_as_written(self, storage: Storage, span: tuple[int, int]) -> None:
        assert storage.read(*span) == expected(CONTENT, *span)

    @settings(parent=_shared, max_examples=25)
    @given(spans=st.lists(_spans, max_size=9), gap=st.sampled_from([None, 0, 1, 100, 1 << 20]))
    def test_many_spans_read_together_are_what_each_reads_alone(
        self, storage: Storage, spans: list[tuple[int, int]], gap: int | None
    ) -> None:
        assert storage.read_spans(spans, gap=gap) == [expected(CONTENT, *span) for span in spans]

    def test_read_into_fills_any_buffer_with_zeros_past_the_end(self, storage: Storage) -> None:
        words = array.array("Q", [~0 & (1 << 64) - 1] * 200)
        storage.read_into(_LENGTH - 100, words)
        assert words.tobytes() == expected(CONTENT, _LENGTH - 100, 1600)

    def test_read_into_touches_only_the_piece_it_was_given(self, storage: Storage) -> None:
        buffer = bytearray(b"\xaa" * 3000)
        storage.read_into(5, memoryview(buffer)[1000:2000])
        assert bytes(buffer) == b"\xaa" * 1000 + CONTENT[5:1005] + b"\xaa" * 1000

    def test_read_into_takes_an_aligned_buffer(self, storage: Storage) -> None:
        buffer = aligned_buffer(8192)
        storage.read_into(4096, buffer)
        assert bytes(buffer) == CONTENT[4096:12288]

    def test_read_exactly_returns_what_is_there(self, storage: Storage) -> None:
        assert storage.read_exactly(_LENGTH - 7, 7) == CONTENT[-7:]

    @pytest.mark.parametrize("offset, length", [(_LENGTH - 7, 8), (_LENGTH, 1), (0, 1 << 60), (1 << 60, 1 << 60)])
    def test_read_exactly_refuses_what_is_not_there(self, storage: Storage, offset: int, length: int) -> None:
        with pytest.raises(ShortRead, match=f"{length} bytes expected at offset {offset}"):
            storage.read_exactly(offset, length)

    @pytest.mark.parametrize("offset, length", [(-1, 10), (0, -1), ((1 << 63) - 1, 1), (1 << 63, 0), (1 << 70, 1)])
    def test_impossible_spans_are_the_callers_fault(self, storage: Storage, offset: int, length: int) -> None:
        for ask in (storage.read, storage.read_exactly):
            with pytest.raises(OutOfRange, match=str(offset)):
                ask(offset, length)
        with pytest.raises(OutOfRange):
            storage.read_spans([(0, 1), (offset, length)])
        with pytest.raises(OutOfRange):
            list(storage.extents(offset, length))

    @_shared
    @given(span=_spans)
    def test_extents_cover_the_span_and_holes_read_as_zeros(self, storage: Storage, span: tuple[int, int]) -> None:
        at = span[0]
        for found in storage.extents(*span):
            assert found.offset == at
            assert found.length > 0
            assert found.data or not any(expected(CONTENT, found.offset, found.length))
            at = found.end
        assert at == sum(span)

    def test_all_beyond_the_end_is_one_hole(self, storage: Storage) -> None:
        beyond = list(storage.extents(_LENGTH + 10, 1 << 40))
        assert [(one.offset, one.length, one.data) for one in beyond] == [(_LENGTH + 10, 1 << 40, False)]

    def test_allocated_is_known_or_said_to_be_unknown(self, storage: Storage) -> None:
        allocated = storage.allocated()
        assert allocated is None or allocated >= 0

    def test_its_descriptor_reads_the_same_bytes(self, storage: Storage) -> None:
        descriptor = storage.fileno()
        if descriptor < 0:
            return
        buffer = aligned_buffer(8192)
        assert os.preadv(descriptor, [buffer], 8192) == 8192
        assert bytes(buffer) == CONTENT[8192:16384]

    def test_threads_read_side_by_side(self, storage: Storage) -> None:
        rng = random.Random(5)
        spans = [(rng.randrange(_LENGTH), rng.randrange(20_000)) for _ in range(40)]
        start = threading.Barrier(4)

        def read_all(turn: int) -> bool:
            start.wait(60)
            mine = spans[turn:] + spans[:turn]
            return all(storage.read(*span) == expected(CONTENT, *span) for span in mine)

        with ThreadPoolExecutor(4) as threads:
            assert all(threads.map(read_all, range(0, 40, 10)))

    def test_once_closed_it_says_so(self, make: Make) -> None:
        closed = make(CONTENT)
        closed.close()
        closed.close()
        for ask in (lambda: closed.read(0, 1), closed.length, lambda: closed.read_spans([(0, 1)])):
            with pytest.raises(Closed, match="closed"):
                ask()

    def test_leaving_the_block_closes_it(self, make: Make) -> None:
        with make(CONTENT) as opened:
            assert opened.read(0, 3) == CONTENT[:3]
        with pytest.raises(Closed):
            opened.read(0, 3)


class ReadOnlyStorageContract(StorageContract):
    """What a storage means that only reads."""

    def test_it_is_not_writable(self, storage: Storage) -> None:
        assert not storage.writable

    def test_every_change_is_refused(self, storage: Storage) -> None:
        changes: list[Callable[[], None]] = [
            lambda: storage.pwrite(0, b"x"),
            lambda: storage.truncate(5),
            lambda: storage.zero(0, 5),
            lambda: storage.allocate(_LENGTH, 5),
            lambda: storage.discard(0, 5),
        ]
        for change in changes:
            with pytest.raises(ReadOnly, match="reading"):
                change()
        assert storage.read(0, 5) == CONTENT[:5]

    def test_sync_has_nothing_to_do(self, storage: Storage) -> None:
        storage.sync()


_noise = random.Random(3).randbytes(70_000)
_changes = st.one_of(
    st.tuples(st.just("pwrite"), _offsets, st.sampled_from([0, 1, 300, 512, 4096, 5000, 8192, 70_000])),
    st.tuples(st.just("zero"), _offsets, _lengths),
    st.tuples(st.just("allocate"), _offsets, _lengths),
    st.tuples(st.just("truncate"), _offsets, st.just(0)),
    st.tuples(st.just("sync"), st.just(0), st.just(0)),
)


class WritableStorageContract(StorageContract):
    """What writing means. `make(content)` opens a storage that grows."""

    def test_it_is_writable(self, storage: Storage) -> None:
        assert storage.writable

    @settings(parent=_shared, max_examples=25)
    @given(changes=st.lists(_changes, min_size=1, max_size=8), start=st.sampled_from([0, 5000, _LENGTH]))
    def test_after_any_changes_it_holds_what_an_array_would(
        self, make: Make, changes: list[tuple[str, int, int]], start: int
    ) -> None:
        model = bytearray(CONTENT[:start])
        with make(CONTENT[:start]) as storage:
            for kind, offset, length in changes:
                _change(storage, model, kind, offset, length)
                assert storage.length() == len(model)
            assert storage.read(0, len(model) + 10) == bytes(model) + bytes(10)

    def test_a_write_takes_any_buffer(self, storage: Storage) -> None:
        storage.pwrite(10, array.array("Q", [1, 2]))
        storage.pwrite(26, memoryview(b"0123456789")[::1][3:5])
        assert storage.read(10, 18) == array.array("Q", [1, 2]).tobytes() + b"34"

    def test_an_aligned_write_from_an_aligned_buffer_lands(self, storage: Storage) -> None:
        buffer = aligned_buffer(8192)
        buffer[:] = _noise[:8192]
        storage.pwrite(4096, buffer)
        assert storage.read(0, 20_000) == CONTENT[:4096] + _noise[:8192] + CONTENT[12288:20_000]

    def test_a_write_far_beyond_the_end_leaves_zeros_between(self, storage: Storage) -> None:
        storage.pwrite(_LENGTH + 100_000, b"end")
        assert storage.length() == _LENGTH + 100_003
        assert storage.read(_LENGTH, 100_003) == bytes(100_000) + b"end"

    def test_nothing_written_changes_nothing(self, storage: Storage) -> None:
        storage.pwrite(_LENGTH + 50, b"")
        storage.zero(_LENGTH + 50, 0)
        assert storage.length() == _LENGTH

    def test_what_was_cut_off_does_not_come_back(self, storage: Storage) -> None:
        storage.truncate(1000)
        storage.truncate(3000)
        assert storage.read(0, 3000) == CONTENT[:1000] + bytes(2000)

    def test_a_large_span_can_be_zeroed(self, storage: Storage) -> None:
        storage.zero(100, 3 << 20)
        assert storage.length() == 100 + (3 << 20)
        assert storage.read(0, 3 << 20) == CONTENT[:100] + bytes((3 << 20) - 100)

    def test_a_punched_span_reads_as_zeros(self, storage: Storage) -> None:
        storage.punch(5000, 100_000)
        storage.punch(_LENGTH - 10, 5000)
        assert storage.length() == _LENGTH + 4990
        assert storage.read(0, 110_000) == CONTENT[:5000] + bytes(100_000) + CONTENT[105_000:110_000]
        assert storage.read(_LENGTH - 10, 5000) == bytes(5000)

    def test_a_discard_leaves_length_and_neighbours_alone(self, storage: Storage) -> None:
        storage.discard(5000, 100_000)
        storage.discard(250_000, 1 << 40)
        assert storage.length() == _LENGTH
        assert storage.read(0, 5000) == CONTENT[:5000]
        assert storage.read(105_000, 145_000) == CONTENT[105_000:250_000]

    def test_what_was_discarded_can_be_written_again(self, storage: Storage) -> None:
        storage.discard(0, _LENGTH)
        storage.pwrite(0, CONTENT)
        storage.sync()
        assert storage.read(0, _LENGTH) == CONTENT

    def test_negative_offsets_are_refused(self, storage: Storage) -> None:
        refused: list[Callable[[], None]] = [
            lambda: storage.pwrite(-1, b"x"),
            lambda: storage.truncate(-1),
            lambda: storage.zero(-1, 5),
            lambda: storage.discard(-1, 5),
        ]
        for change in refused:
            with pytest.raises(OutOfRange):
                change()

    def test_threads_write_side_by_side(self, make: Make) -> None:
        size, pieces = 3000, 80
        with make(b"") as storage, ThreadPoolExecutor(4) as threads:
            written = [bytes([n + 1]) * size for n in range(pieces)]
            order = random.Random(7).sample(range(pieces), pieces)
            list(threads.map(lambda n: storage.pwrite(n * size, written[n]), order))
            assert storage.read(0, size * pieces) == b"".join(written)

    def test_once_closed_it_takes_no_writes(self, make: Make) -> None:
        closed = make(CONTENT)
        closed.close()
        changes: list[Callable[[], Any]] = [
            lambda: closed.pwrite(0, b"x"),
            lambda: closed.truncate(5),
            lambda: closed.zero(0, 5),
            lambda: closed.discard(0, 5),
            closed.sync,
        ]
        for change in changes:
            with pytest.raises(Closed, match="closed"):
                change()


def _change(storage: Storage, model: bytearray, kind: str, offset: int, length: int) -> None:
    """Do one change to the storage and to the array that says what must come of it."""
    if kind == "sync":
        storage.sync()
    elif kind == "truncate":
        storage.truncate(offset)
        model[:] = expected(bytes(model[:offset]), 0, offset)
    else:
        data = _noise[:length] if kind == "pwrite" else bytes(length)
        if length and offset + length > len(model):
            model.extend(bytes(offset + length - len(model)))
        if kind == "allocate":
            storage.allocate(offset, length)
            return
        model[offset : offset + length] = data
        if kind == "pwrite":
            storage.pwrite(offset, data)
        else:
            storage.zero(offset, length)


def numbered_paths(folder: os.PathLike[str]) -> Iterator[str]:
    """Yield paths in `folder` that no other call yields: for a `make` that needs a new file each time."""
    return (os.path.join(folder, f"storage-{n}") for n in itertools.count())
