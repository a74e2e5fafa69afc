"""fio's iolog, versions 2 and 3: what `write_iolog` writes and `read_iolog` takes.

Version 3 has microseconds from the start before each line; version 2 has none, but may have lines `wait`, whose
microseconds add up. Offsets and lengths are bytes. A log may name several files: each is a disk.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from cowslice.tune.fields import ABSENT, words
from cowslice.tune.requests import Operation
from cowslice.tune.textlines import Columns, Fields, LineFormat, LineReader, Mask

_HEADER = re.compile(rb"fio version ([23]) iolog")
_ACTIONS = (b"read", b"write", b"sync", b"datasync", b"trim", b"add", b"open", b"close", b"wait")
_OPERATIONS = np.array(
    [Operation.READ, Operation.WRITE, Operation.FLUSH, Operation.FLUSH, Operation.DISCARD], np.uint8)
_SYNC, _FILES, _WAIT = (2, 3), (5, 6, 7), 8  # places in _ACTIONS


class FioFormat(LineFormat):
    """The log of one version."""

    def __init__(self, version: int) -> None:
        self.version = version
        self.name = f"fio{version}"
        self.title = f"fio iolog version {version}"
        self.example = "118 disk.img read 61440 4096" if version == 3 else "disk.img read 61440 4096"

    def claims(self, lines: Sequence[bytes]) -> bool:
        found = _HEADER.fullmatch(lines[0].strip()) if lines else None
        return found is not None and int(found[1]) == self.version

    def reader(self, lines: Sequence[bytes]) -> LineReader:
        waits = self.version == 2 and any(line.split()[1:2] == [b"wait"] for line in lines)
        return _FioReader(self.version, waits=waits)


class _FioReader(LineReader):
    ticks_per_second = 1_000_000
    origin = 0

    def __init__(self, version: int, *, waits: bool) -> None:
        self._first = 1 if version == 3 else 0  # the place of the file's name
        self._waits = waits
        self._now = 0
        self._begun = False

    def read(self, text: bytes) -> Columns:
        name, action = self._first, self._first + 1
        fields = Fields(text, "", name + 4)
        lines = ~fields.blank
        if not self._begun:
            lines[0] &= not text.startswith(b"fio version")
            self._begun = True
        actions = words(text, *fields.span(action), _ACTIONS)
        moves = lines & (actions < len(_OPERATIONS))
        syncs = moves & np.isin(actions, _SYNC)
        offset, placed = fields.numbers(name + 2)
        length, measured = fields.numbers(name + 3)
        columns = fields.columns(
            moves, operation=_OPERATIONS[np.minimum(actions, len(_OPERATIONS) - 1)],
            offset=np.where(syncs, np.uint64(0), offset), length=np.where(syncs, np.uint64(0), length),
            disk=fields.span(name))
        columns.expect(actions != ABSENT, f"an action in field {action + 1}: {_spelled()}", of=lines)
        bare = syncs & (fields.counts == name + 2)
        spans = (moves & ~bare) | (lines & (actions == _WAIT))
        columns.expect(fields.counts == name + 4, f"{name + 4} fields", of=spans)
        columns.expect(fields.counts == name + 2, f"{name + 2} fields", of=lines & np.isin(actions, _FILES))
        columns.expect(placed, f"an offset in field {name + 3}", of=spans)
        columns.expect(measured, f"a length in field {name + 4}", of=spans)
        self._set_time(fields, columns, lines, actions == _WAIT, offset)
        columns.expect_span()
        return columns

    def _set_time(
        self, fields: Fields, columns: Columns, lines: Mask, wait: Mask, offset: NDArray[np.uint64]
    ) -> None:
        if self._first:
            ticks, timed = fields.numbers(0)
            columns.ticks = ticks.view(np.int64)
            columns.expect(timed & (ticks < 1 << 63), "microseconds in field 1", of=lines)
            columns.expect(~wait, "no wait, which only version 2 has", of=lines)
        else:
            short = offset < 1 << 40
            columns.expect(short, "a wait of less than twelve days", of=lines & wait)
            passed = np.cumsum(np.where(lines & wait & short, offset, 0).astype(np.int64)) + self._now
            self._now = int(passed[-1]) if len(passed) else self._now
            columns.ticks = passed if self._waits else None


def _spelled() -> str:
    return ", ".join(action.decode() for action in _ACTIONS)


FIO2 = FioFormat(2)
FIO3 = FioFormat(3)
