"""Our own binary capture, read: `image.capture` writes it, and says what stands in it.

It takes the bytes as they come, in blocks of any size, and keeps no more than a record between them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cowslice.errors import MalformedTrace
from cowslice.image.capture import END, HEADER, KIND_BITS, LONG, LOST, MAGIC, MARK, RECORD, TIME, VERSION
from cowslice.tune.requests import Operation, Requests

_RECORDS = np.dtype([("place", "<u8"), ("length", "<u4"), ("time", "<u4")])
_KIND = np.uint64((1 << KIND_BITS) - 1)
_MOST_HEADER = 4096  # bytes; a later version may need more than this one
_MAX_END = np.uint64((1 << 63) - 1)

Records = NDArray[Any]


class CaptureFormat:
    """What `Image.capture` and `cowslice serve --capture` write."""

    name = "capture"
    title = "capture of cowslice"

    def claims(self, head: bytes) -> bool:
        """Whether a file that begins so is one."""
        return head.startswith(MAGIC)


class CaptureReader:
    """One pass over a capture called `name`. `skipped` counts records that make no sense, `notes` says what is odd.

    Raises MalformedTrace for a header that is not ours, and unless `skip_bad` for such records.
    """

    def __init__(self, name: str, *, skip_bad: bool) -> None:
        self.skipped = 0
        self._name = name
        self._skip_bad = skip_bad
        self._rest = b""
        self._begun = self._ended = False
        self._read = 0  # records
        self._requests = 0
        self._lost = 0
        self._now = 0  # microseconds of the last record

    @property
    def notes(self) -> tuple[str, ...]:
        """What is odd about the whole, one sentence each."""
        found = []
        if self._lost:
            found.append(f"'{self._name}' misses {self._lost} requests that came faster than the file could take them")
        if self._begun and not self._ended:
            found.append(f"'{self._name}' was not closed, so the last requests may be missing")
        return tuple(found)

    def read(self, block: bytes) -> Iterator[Requests]:
        """Yield the requests that these bytes complete."""
        data = self._rest + block
        if not self._begun:
            header = self._header(data)
            if header is None:
                self._rest = data
                return
            self._begun = True
            data = data[header:]
        count = len(data) // RECORD.size
        records: Records = np.frombuffer(data, _RECORDS, count)
        if count and records["place"][-1] & _KIND == LONG:  # it belongs to the record that is still to come
            count -= 1
            records = records[:count]
        self._rest = data[count * RECORD.size :]
        if count:
            yield self._requests_of(records)

    def end(self) -> None:
        """No more bytes come. Raises MalformedTrace where there was not even a header."""
        if not self._begun:
            raise self._malformed(0, f"it ends after {len(self._rest)} bytes, expected a header of {HEADER.size}")

    def _header(self, data: bytes) -> int | None:
        """The header's length, None while more bytes are needed."""
        if len(data) < HEADER.size:
            return None
        magic, version, length, _, _ = HEADER.unpack_from(data)
        if magic != MAGIC:
            raise self._malformed(0, f"it begins with {magic.hex()}, expected {MAGIC.hex()}")
        if version != VERSION:
            raise self._malformed(0, f"its version is {version}, expected {VERSION}")
        if not HEADER.size <= length <= _MOST_HEADER:
            raise self._malformed(0, f"its header has {length} bytes, expected {HEADER.size} to {_MOST_HEADER}")
        return int(length) if len(data) >= length else None

    def _requests_of(self, records: Records) -> Requests:
        kind = (records["place"] & _KIND).astype(np.uint8)
        value = records["place"] >> np.uint64(KIND_BITS)
        time = self._times(records["time"], kind, value)
        length = self._lengths(records["length"], kind, value)
        request = kind < LONG
        self._take_marks(records["length"], kind, value, request)
        self._judge(~request | (length <= _MAX_END - value), "an end of the request below 8 EiB")
        request &= ~self._wrong & ((length > 0) | (kind == Operation.FLUSH))
        self._read += len(records)
        moved = kind != Operation.FLUSH
        zero = np.uint64(0)
        return Requests(time, kind, np.where(moved, value, zero), np.where(moved, length, zero)).select(request)

    def _times(
        self, low: NDArray[np.uint32], kind: NDArray[np.uint8], value: NDArray[np.uint64]
    ) -> NDArray[np.float64]:
        """Seconds of each record: the nearest time to that of the one before which has these low bits."""
        self._wrong = np.zeros(len(low), np.bool_)
        before = np.concatenate([np.array([self._now & 0xFFFFFFFF], np.int64), low[:-1].astype(np.int64)])
        steps = low.astype(np.int64) - before
        steps = ((steps + (1 << 31)) & 0xFFFFFFFF) - (1 << 31)
        full = np.cumsum(steps) + self._now
        marks = np.flatnonzero(kind == TIME)
        self._judge_some(marks, (value[marks] & np.uint64(0xFFFFFFFF)) == low[marks], "a time that fits its low bits")
        marks = marks[~self._wrong[marks]]
        jumps = np.diff(value[marks].view(np.int64) - full[marks], prepend=0)
        correction = np.zeros(len(low), np.int64)
        correction[marks] = jumps
        full = full + np.cumsum(correction)
        self._now = int(full[-1])
        return np.asarray(full / 1e6)

    def _lengths(
        self, low: NDArray[np.uint32], kind: NDArray[np.uint8], value: NDArray[np.uint64]
    ) -> NDArray[np.uint64]:
        """Bytes of each record, with what a LONG one before it adds."""
        length = low.astype(np.uint64)
        longs = np.flatnonzero(kind == LONG)
        followed = (longs + 1 < len(kind)) & (kind[np.minimum(longs + 1, len(kind) - 1)] < LONG)
        small = value[longs] < 1 << 31
        self._judge_some(longs, followed & small & (low[longs] == 0), "a request after the upper half of its length")
        longs = longs[followed & small]
        length[longs + 1] += value[longs] << np.uint64(32)
        return length

    def _take_marks(
        self, low: NDArray[np.uint32], kind: NDArray[np.uint8], value: NDArray[np.uint64], request: NDArray[np.bool_]
    ) -> None:
        """Count what was lost, and hold the end against what came before it."""
        marks = np.flatnonzero(kind == MARK)
        self._judge_some(marks, low[marks] <= END, "a mark of lost requests or of the end")
        lost = marks[low[marks] == LOST]
        self._lost += sum(value[lost].tolist())
        ends = marks[low[marks] == END]
        if self._ended:
            self._judge(np.zeros(len(kind), np.bool_), "nothing after the end")
        elif len(ends):
            self._ended = True
            first = int(ends[0])
            self._judge(np.arange(len(kind)) <= first, "nothing after the end")
            before = self._requests + int(request[:first].sum())
            self._judge_some(ends[:1], value[ends[:1]] == before, f"an end after {before} requests")
        self._requests += int(request.sum())

    def _judge_some(self, rows: NDArray[np.intp], sound: NDArray[np.bool_], expected: str) -> None:
        everywhere = np.ones(len(self._wrong), np.bool_)
        everywhere[rows] = sound
        self._judge(everywhere, expected)

    def _judge(self, sound: NDArray[np.bool_], expected: str) -> None:
        """Demand that the records be sound: else raise, or count those that were not counted yet."""
        new = ~sound & ~self._wrong
        if not new.any():
            return
        if not self._skip_bad:
            row = self._read + int(new.argmax()) + 1
            raise self._malformed(row, f"record {row} makes no sense, expected {expected}")
        self._wrong |= new
        self.skipped += int(new.sum())

    def _malformed(self, record: int, why: str) -> MalformedTrace:
        return MalformedTrace(f"'{self._name}' is no sound capture: {why}", where=self._name, line=record)
