"""Public block traces as comma-separated values: MSR Cambridge, Alibaba 2020, Tencent CBS 2018.

Each line is one request to one of many disks. Units differ: MSR has bytes and 100 ns, Alibaba bytes and microseconds,
Tencent sectors and seconds.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cowslice.tune.fields import ABSENT, words
from cowslice.tune.requests import Operation
from cowslice.tune.textlines import Columns, Fields, LineFormat, LineReader, scaled
from cowslice.units import SECTOR


@dataclass(frozen=True)
class VolumeFormat(LineFormat):
    """A format of `fields` values. `disk`, `operation`, `offset`, `length` and `ticks` are their places, from zero.

    `operations` are the words of a read and of a write; `disk` two places where the name is made of two fields; `unit`
    is bytes of one step of offset and length.
    """

    name: str
    title: str
    example: str
    header: bytes
    pattern: re.Pattern[bytes]
    fields: int
    disk: tuple[int, int]
    operation: int
    operations: tuple[bytes, ...]
    offset: int
    length: int
    ticks: int
    ticks_per_second: int
    unit: int = 1

    def claims(self, lines: Sequence[bytes]) -> bool:
        return any(self.pattern.fullmatch(line.strip()) for line in lines)

    def reader(self, lines: Sequence[bytes]) -> LineReader:
        return _VolumeReader(self)

    def disk_name(self, token: bytes) -> str:
        return super().disk_name(token.replace(b",", b"_"))

    def disk_token(self, name: str) -> bytes:
        host, mark, number = name.rpartition("_")
        return super().disk_token(f"{host},{number}" if mark and self.disk[0] != self.disk[1] else name)


class _VolumeReader(LineReader):
    def __init__(self, volumes: VolumeFormat) -> None:
        self._format = volumes
        self.ticks_per_second = volumes.ticks_per_second
        self._begun = False

    def read(self, text: bytes) -> Columns:
        told = self._format
        fields = Fields(text, ",", told.fields)
        lines = ~fields.blank
        if not self._begun:
            lines[0] &= text[: len(told.header)].lower() != told.header
            self._begun = True
        ticks, timed = fields.numbers(told.ticks)
        offset, placed = fields.numbers(told.offset)
        length, measured = fields.numbers(told.length)
        words_found = words(text, *fields.span(told.operation), told.operations)
        columns = fields.columns(
            lines, operation=words_found % 2, ticks=ticks.view(np.int64), disk=fields.joint_span(*told.disk))
        columns.offset, far = scaled(offset, told.unit)
        columns.length, long = scaled(length, told.unit)
        spelled = " or ".join(word.decode() for word in told.operations[:2])
        columns.expect(fields.counts == told.fields, f"{told.fields} fields with commas between them", of=lines)
        columns.expect(timed & (ticks < 1 << 63), f"a time in field {told.ticks + 1}", of=lines)
        columns.expect(words_found != ABSENT, f"{spelled} in field {told.operation + 1}", of=lines)
        columns.expect(placed & far, f"an offset in field {told.offset + 1}", of=lines)
        columns.expect(measured & long, f"a length in field {told.length + 1}", of=lines)
        columns.expect_span()
        return columns


# Words stand in pairs: read, write; so a word's place tells the operation.
assert (Operation.READ, Operation.WRITE) == (0, 1)

MSR = VolumeFormat(
    "msr", "MSR Cambridge CSV", "128166372003061629,hm,0,Read,383496192,32768,1331",
    b"timestamp,hostname", re.compile(rb"\d+,[^,]+,\d+,(Read|Write),\d+,\d+,\d+"),
    fields=7, disk=(1, 2), operation=3, operations=(b"Read", b"Write", b"read", b"write"), offset=4, length=5, ticks=0,
    ticks_per_second=10_000_000)

ALIBABA = VolumeFormat(
    "alibaba", "Alibaba block trace 2020", "419,W,8792731648,16384,1577808000000046",
    b"device_id,opcode", re.compile(rb"[^,]+,[RW],\d+,\d+,\d+"),
    fields=5, disk=(0, 0), operation=1, operations=(b"R", b"W", b"r", b"w"), offset=2, length=3, ticks=4,
    ticks_per_second=1_000_000)

TENCENT = VolumeFormat(
    "tencent", "Tencent CBS 2018", "1538323200,12910952,128,0,1063",
    b"timestamp,offset", re.compile(rb"\d+,\d+,\d+,[01],[^,]+"),
    fields=5, disk=(4, 4), operation=3, operations=(b"0", b"1"), offset=1, length=2, ticks=0, ticks_per_second=1,
    unit=SECTOR)
