"""QEMU's trace events as its log has them: what `-trace blk_co_preadv -trace blk_co_pwritev -D FILE` writes.

Two families of events tell requests of a guest: those of a block backend (`blk_co_preadv`, `blk_co_pwritev`, in bytes)
and those of a virtio-blk device (`virtio_blk_handle_read`, `virtio_blk_handle_write`, in sectors). Other lines are
passed over. With `-msg timestamp=on` each event begins with PID@SECONDS.MICROSECONDS and a colon.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from cowslice.tune.fields import ABSENT, cut, numbers, seconds, words
from cowslice.tune.requests import Operation
from cowslice.tune.textlines import Columns, Fields, LineFormat, LineReader, Mask, Spans, scaled
from cowslice.units import SECTOR

_EVENTS = (b"blk_co_preadv", b"blk_co_pwritev", b"virtio_blk_handle_read", b"virtio_blk_handle_write")
_LINE = re.compile(rb"(?:.*[\s:])?(?:%s)\s.*" % b"|".join(_EVENTS), re.S)
_STAMP = re.compile(rb"(?:.*\s)?\d+@\d+\.\d+:(?:%s)\s.*" % b"|".join(_EVENTS), re.S)
_VIRTIO = 2  # events from here on are virtio's, in sectors
_LATEST = 3  # the event is one of so many first fields: other programs put their own words before a line
_FIELDS = _LATEST + 10
_SHAPES = (  # words at the odd places after the event's name
    (b"blk", b"bs", b"offset", b"bytes", b"flags"),
    (b"vdev", b"req", b"sector", b"nsectors"),
)
_ZERO_WRITE = np.uint64(2)  # the flag that makes a write one of zeros


class QemuFormat(LineFormat):
    """The only one of its family."""

    name = "qemu"
    title = "QEMU trace log"
    example = "blk_co_preadv blk 0x55d0c0de bs 0x55d0beef offset 4096 bytes 65536 flags 0x0"

    def claims(self, lines: Sequence[bytes]) -> bool:
        return any(_LINE.match(line) for line in lines)

    def reader(self, lines: Sequence[bytes]) -> LineReader:
        first = next((line for line in lines if _LINE.match(line)), b"")
        return _QemuReader(timed=_STAMP.match(first) is not None)


class _QemuReader(LineReader):
    ticks_per_second = 1_000_000_000

    def __init__(self, *, timed: bool) -> None:
        self._timed = timed

    def read(self, text: bytes) -> Columns:
        fields = Fields(text, "", _FIELDS)
        event, place, start = _events(text, fields)
        there = event != ABSENT
        columns = fields.columns(there, operation=event % 2)
        virtio = there & (event >= _VIRTIO)
        words_here = _Arguments(text, fields, place)
        for shape, of in ((_SHAPES[0], there & ~virtio), (_SHAPES[1], virtio)):
            for number, word in enumerate(shape):
                sound = words(text, *words_here.span(2 * number), (word,)) == 0
                columns.expect(sound, f"'{word.decode()}' in its place after the event", of=of)
        self._set_spans(columns, words_here, virtio)
        columns.disk = words_here.joint_span(0, 1)
        if self._timed:
            columns.ticks, timed = _stamps(text, fields, place, start)
            columns.expect(timed, "PID@SECONDS.MICROSECONDS: before the event, as the first one has it", of=there)
        return columns

    @staticmethod
    def _set_spans(columns: Columns, arguments: _Arguments, virtio: Mask) -> None:
        offset, placed = arguments.numbers(5)
        length, measured = arguments.numbers(7)
        flags, flagged = arguments.numbers(9, hexadecimals=True)
        block = columns.request & ~virtio
        columns.expect(placed, "a number after 'offset' or 'sector'", of=columns.request)
        columns.expect(measured, "a number after 'bytes' or 'nsectors'", of=columns.request)
        columns.expect(flagged, "a number such as 0x0 after 'flags'", of=block)
        in_bytes, near = scaled(offset, SECTOR)
        long_bytes, short = scaled(length, SECTOR)
        columns.expect(near & short, "a sector below 8 EiB", of=virtio)
        columns.offset = np.where(virtio, in_bytes, offset)
        columns.length = np.where(virtio, long_bytes, length)
        zeros = block & (columns.operation == Operation.WRITE) & (flags & _ZERO_WRITE != 0)
        columns.operation[zeros] = Operation.ZERO
        columns.expect_span()


class _Arguments:
    """The fields after the event, wherever that stands in its line."""

    def __init__(self, text: bytes, fields: Fields, place: NDArray[np.intp]) -> None:
        self._text = text
        self._fields = fields
        self._place = place + 1
        self._rows = np.arange(len(fields))

    def span(self, number: int) -> Spans:
        place = self._place + number
        return self._fields.starts[self._rows, place], self._fields.lengths[self._rows, place]

    def joint_span(self, first: int, last: int) -> Spans:
        starts, (end, length) = self.span(first)[0], self.span(last)
        return starts, end + length - starts

    def numbers(self, number: int, *, hexadecimals: bool = False) -> tuple[NDArray[np.uint64], Mask]:
        return numbers(self._text, *self.span(number), hexadecimals)


def _events(text: bytes, fields: Fields) -> tuple[NDArray[np.uint8], NDArray[np.intp], NDArray[np.uint32]]:
    """For each line: the event or ABSENT, its field's place, and how many bytes of that field are a stamp before it."""
    event = np.full(len(fields), ABSENT, np.uint8)
    place = np.zeros(len(fields), np.intp)
    stamp = np.zeros(len(fields), np.uint32)
    for column in range(_LATEST):
        starts, lengths = fields.span(column)
        mark = cut(text, starts, lengths, "@")
        before = np.where(mark < lengths, cut(text, starts, lengths, ":") + np.uint32(1), np.uint32(0))
        before = np.where(before <= lengths, before, np.uint32(0)).astype(np.uint32)
        found = words(text, starts + before, lengths - before, _EVENTS)
        new = (event == ABSENT) & (found != ABSENT)
        event[new], place[new], stamp[new] = found[new], column, before[new]
    return event, place, stamp


def _stamps(
    text: bytes, fields: Fields, place: NDArray[np.intp], stamp: NDArray[np.uint32]
) -> tuple[NDArray[np.int64], Mask]:
    """PID@SECONDS.MICROSECONDS: as nanoseconds, and where that is there."""
    starts = fields.starts[np.arange(len(fields)), place]
    lengths = np.maximum(stamp, 1) - np.uint32(1)
    process = cut(text, starts, lengths, "@")
    skipped = np.minimum(process + np.uint32(1), lengths)
    ticks, timed = seconds(text, starts + skipped, lengths - skipped)
    return ticks, timed & numbers(text, starts, process)[1]
