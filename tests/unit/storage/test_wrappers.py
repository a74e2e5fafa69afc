"""Wrappers change one thing and pass on the rest."""

from __future__ import annotations

from pathlib import Path

import pytest

from cowslice.errors import BadOption, Closed, NoSpace, OutOfRange, StorageError
from cowslice.storage import (
    CountingStorage,
    Counts,
    FileStorage,
    LimitedStorage,
    MemoryStorage,
    Span,
    WindowStorage,
    WrappedStorage,
)

TEXT = b"0123456789"


def test_a_window_sees_only_its_bytes() -> None:
    window = WindowStorage(MemoryStorage(TEXT), offset=3, size=4)
    assert (window.length(), window.read(0, 9)) == (4, b"3456" + bytes(5))


def test_a_window_without_a_size_grows_with_what_is_below() -> None:
    below = MemoryStorage(TEXT)
    window = WindowStorage(below, offset=8)
    window.pwrite(2, b"ab")
    assert (below.read(0, 12), window.length()) == (TEXT + b"ab", 4)
    window.truncate(1)
    assert below.length() == 9


def test_a_window_with_a_size_does_not_grow() -> None:
    window = WindowStorage(MemoryStorage(TEXT), offset=3, size=4)
    for change in (lambda: window.pwrite(3, b"xy"), lambda: window.zero(0, 5)):
        with pytest.raises(NoSpace, match="up to byte 5: it has 4 bytes"):
            change()
    window.truncate(4)
    with pytest.raises(StorageError, match="to 3 bytes: it is a window of 4 bytes"):
        window.truncate(3)
    assert window.inner.read(0, 10) == TEXT


def test_a_write_through_a_window_touches_nothing_beside_it() -> None:
    window = WindowStorage(MemoryStorage(TEXT), offset=3, size=4)
    window.pwrite(0, b"abcd")
    window.zero(1, 2)
    window.discard(0, 1 << 40)
    assert window.inner.read(0, 3) + window.inner.read(7, 3) == b"012789"
    assert window.read(0, 4) == b"a\0\0d"


@pytest.mark.parametrize("offset, size", [(11, None), (0, 11), (5, 6), (-1, None), (-1, 3), (0, -1)])
def test_a_window_outside_is_refused(offset: int, size: int | None) -> None:
    with pytest.raises(BadOption, match="inside the 10 bytes of 'memory'"):
        WindowStorage(MemoryStorage(TEXT), offset=offset, size=size)


def test_a_window_shifts_extents(tmp_path: Path) -> None:
    path = tmp_path / "sparse"
    with path.open("wb") as file:
        file.seek(1 << 20)
        file.write(bytes(4096))
    with WindowStorage(FileStorage(path), offset=512 << 10) as window:
        assert list(window.extents(0, 1 << 20)) == [
            Span(0, 512 << 10, False),
            Span(512 << 10, 4096, True),
            Span((512 << 10) + 4096, (512 << 10) - 4096, False),
        ]


def test_a_window_of_everything_keeps_the_descriptor(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(TEXT)
    with FileStorage(path) as file:
        assert WindowStorage(file).fileno() == file.fileno()
        assert WindowStorage(file, offset=1).fileno() == -1
        assert WindowStorage(file, size=5).fileno() == -1


def test_no_wrapper_is_passed_by_through_the_descriptor(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(TEXT)
    with FileStorage(path) as file:
        assert [wrap.fileno() for wrap in (CountingStorage(file), LimitedStorage(file, 5))] == [-1, -1]


def test_a_limit_stops_growth_and_nothing_else() -> None:
    limited = LimitedStorage(MemoryStorage(TEXT), 12)
    limited.pwrite(10, b"ab")
    for change in (lambda: limited.pwrite(11, b"xy"), lambda: limited.zero(0, 13), lambda: limited.truncate(13)):
        with pytest.raises(NoSpace, match="up to byte 13: it has 12 bytes"):
            change()
    limited.truncate(2)
    assert limited.read(0, 3) == b"01\0"


def test_counting_counts_requests_and_bytes() -> None:
    counting = CountingStorage(MemoryStorage(TEXT))
    counting.read(0, 3)
    counting.read_spans([(0, 2), (4, 2)], gap=9)
    counting.pwrite(0, b"abc")
    counting.zero(0, 1)
    counting.discard(0, 1)
    counting.sync()
    assert counting.counts() == Counts(
        reads=2, read_bytes=9, writes=1, written_bytes=3, zeros=1, discards=1, syncs=1
    )


def test_a_failed_request_is_counted_too() -> None:
    counting = CountingStorage(MemoryStorage(TEXT))
    with pytest.raises(OutOfRange):
        counting.pread(-1, memoryview(bytearray(4)))
    assert counting.counts().reads == 1


def test_closing_a_wrapper_closes_what_it_wraps() -> None:
    below = MemoryStorage(TEXT)
    with WrappedStorage(below):
        pass
    with pytest.raises(Closed):
        below.read(0, 1)
