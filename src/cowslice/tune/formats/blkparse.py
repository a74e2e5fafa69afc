"""What `blkparse` prints of a trace of the Linux block layer, in its default output.

A request shows up many times, as it is queued, merged, issued and completed. One kind of event is taken: issued to
the driver (D), for that is what a virtual disk is asked; queued (Q) where the first lines
have no D, as with stacked devices.
Sectors are 512 bytes. Trace inside the guest: on the host, offsets have been translated already.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from cowslice.tune.fields import ABSENT, seconds, spellings, words
from cowslice.tune.requests import Operation
from cowslice.tune.textlines import Columns, Fields, LineFormat, LineReader, Mask, scaled
from cowslice.units import SECTOR

_EVENT = re.compile(rb"\s*\d+,\d+\s+\d+\s+\d+\s+\d+\.\d+\s+\d+\s+[A-Za-z]{1,2}\s.*", re.S)
_DEVICE = re.compile(rb"\d+,\d+")
_COUNTS = (b"CPU", b"Total (")  # how the counts begin that follow the events
_PREAMBLE = (b"Input", b"Using")  # blkparse names its input files first
_ACTIONS = tuple(b"D Q C G I M F P U UT T X A S R B m d n f".split())
_DEV, _TIME, _ACTION, _RWBS, _SECTOR, _PLUS, _COUNT = 0, 3, 5, 6, 7, 8, 9  # places of fields
_FIELDS = 10
_LETTERS = frozenset(b"RWDFASMBENZVPC")  # that the kernel writes
_NOT_OURS = 254


class BlkparseFormat(LineFormat):
    """The only one of its family."""

    name = "blkparse"
    title = "blkparse text"
    example = "8,0 3 1 0.000000000 697 D W 223490 + 8 [kworker]"

    def claims(self, lines: Sequence[bytes]) -> bool:
        return any(_EVENT.fullmatch(line) for line in lines)

    def reader(self, lines: Sequence[bytes]) -> LineReader:
        issued = any(line.split()[_ACTION : _ACTION + 1] == [b"D"] for line in lines)
        return _BlkparseReader(b"D" if issued else b"Q")


class _BlkparseReader(LineReader):
    ticks_per_second = 1_000_000_000
    origin = 0

    def __init__(self, action: bytes) -> None:
        self._action = _ACTIONS.index(action)
        self._ended = False

    def read(self, text: bytes) -> Columns:
        fields = Fields(text, "", _FIELDS)
        lines = ~fields.blank & (fields.starts[:, 0] < self._end_of_events(text))
        lines &= words(text, *fields.span(_DEV), _PREAMBLE) == ABSENT
        actions = words(text, *fields.span(_ACTION), _ACTIONS)
        chosen = lines & (actions == self._action)
        operation, flushing = _operations(text, fields, chosen)
        ticks, timed = seconds(text, *fields.span(_TIME))
        columns = fields.columns(
            chosen & (operation < _NOT_OURS), operation=operation, ticks=ticks, disk=fields.span(_DEV))
        columns.expect(_devices(text, fields, lines), "a device MAJOR,MINOR in field 1", of=lines)
        columns.expect(timed, "seconds in field 4", of=lines)
        columns.expect(actions != ABSENT, "an action such as D or Q in field 6", of=lines)
        columns.expect(operation != ABSENT, "what is done, such as R, WS or D, in field 7", of=chosen)
        _set_spans(text, fields, columns, flushing)
        columns.expect_span()
        return columns

    def _end_of_events(self, text: bytes) -> int:
        """Where the counts begin: from there on nothing is an event."""
        if self._ended or text.startswith(_COUNTS):
            self._ended = True
            return 0
        found = [at for at in (text.find(b"\n" + begin) for begin in _COUNTS) if at >= 0]
        self._ended = bool(found)
        return min(found, default=len(text))


def _set_spans(text: bytes, fields: Fields, columns: Columns, flushing: Mask) -> None:
    """SECTOR + COUNT. A flush has none or carries none; one that does carry data is a write."""
    sector, placed = fields.numbers(_SECTOR)
    count, counted = fields.numbers(_COUNT)
    there = (words(text, *fields.span(_PLUS), (b"+",)) == 0) & placed & counted
    empty = columns.request & flushing & ((fields.lengths[:, _PLUS] == 0) | ~there | (count == 0))
    columns.operation[empty] = Operation.FLUSH
    columns.expect(there, "SECTOR + COUNT in fields 8 to 10", of=columns.request & ~empty)
    offset, near = scaled(sector, SECTOR)
    length, short = scaled(count, SECTOR)
    columns.expect(near & short, "a sector below 8 EiB", of=columns.request & there & ~empty)
    columns.offset = np.where(there & ~empty, offset, np.uint64(0))
    columns.length = np.where(there & ~empty, length, np.uint64(0))


def _devices(text: bytes, fields: Fields, lines: Mask) -> Mask:
    """Where the first field is MAJOR,MINOR."""
    codes, spelled = spellings(text, *fields.span(_DEV), lines)
    sound = np.array([_DEVICE.fullmatch(token) is not None for token in spelled] + [False], np.bool_)
    return sound[codes]


def _operations(text: bytes, fields: Fields, chosen: Mask) -> tuple[NDArray[np.uint8], Mask]:
    """What each chosen line does (an Operation, _NOT_OURS, or ABSENT for senseless letters), and if it flushes."""
    codes, spelled = spellings(text, *fields.span(_RWBS), chosen)
    meanings = np.array([_meaning(letters) for letters in spelled] + [ABSENT], np.uint8)
    flushes = np.array([letters.startswith(b"F") for letters in spelled] + [False], np.bool_)
    return meanings[codes], flushes[codes]


def _meaning(letters: bytes) -> int:
    """R read, W write, D discard, F flush, N none of these; the other letters only qualify."""
    if not letters or not _LETTERS.issuperset(letters):
        return ABSENT
    if letters[:1] in (b"N", b"Z"):  # a command to the device itself, or to its zones
        return _NOT_OURS
    for letter, operation in ((b"D", Operation.DISCARD), (b"W", Operation.WRITE), (b"R", Operation.READ)):
        if letter in letters:
            return operation
    return Operation.FLUSH if letters.startswith(b"F") else ABSENT
