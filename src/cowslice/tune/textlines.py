"""What every text format is made of: blocks of whole lines in, columns out, and what is wrong with which line.

It does not know a format. A line is never longer than a block: the rest of a longer one is passed over.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cowslice.tune.bytestream import BLOCK
from cowslice.tune.fields import numbers, split_lines

LONGEST_LINE = BLOCK
KEPT_OF_LONG_LINE = 80  # bytes, for the message; nothing of it is understood
MAX_END = np.uint64((1 << 63) - 1)  # no disk is longer

Mask = NDArray[np.bool_]
Spans = tuple[NDArray[np.uint32], NDArray[np.uint32]]  # where fields start in the text, and how long they are


@dataclass(slots=True)
class Columns:
    """One row for each line of a block, `request` where it is a request to a disk.

    `ticks` is the format's own time (int64), or None where it has none; `disk` is where each line names its disk.
    `problems` are (lines, what was expected of them), the first one named first.
    """

    request: Mask
    operation: NDArray[np.uint8]
    offset: NDArray[np.uint64]
    length: NDArray[np.uint64]
    ticks: NDArray[np.int64] | None = None
    disk: Spans | None = None
    problems: list[tuple[Mask, str]] = field(default_factory=list)

    def expect(self, sound: Mask, what: str, *, of: Mask) -> None:
        """Demand of the lines `of` that they be `sound`."""
        wrong = of & ~sound
        if wrong.any():
            self.problems.append((wrong, what))

    def expect_span(self) -> None:
        """Demand that no request ends beyond the longest disk."""
        fits = (self.offset <= MAX_END) & (self.length <= MAX_END - np.minimum(self.offset, MAX_END))
        self.expect(fits, "an end of the request below 8 EiB", of=self.request)


class LineReader(ABC):
    """Reads one trace from its first line on. Made anew for each pass.

    `ticks_per_second` is the unit of `Columns.ticks`; `origin` the tick at which the trace starts, None: its first.
    """

    ticks_per_second: int = 1
    origin: int | None = None

    @abstractmethod
    def read(self, text: bytes) -> Columns:
        """Read a block of whole lines, the last perhaps without its newline. What is wrong is told, not raised."""


class LineFormat(ABC):
    """A text format. `name` is what people write, `title` what it is called, `example` one line of it."""

    name: str
    title: str
    example: str

    @abstractmethod
    def claims(self, lines: Sequence[bytes]) -> bool:
        """Whether these first lines look like it."""

    @abstractmethod
    def reader(self, lines: Sequence[bytes]) -> LineReader:
        """Return a reader of the trace that begins with these lines."""

    def disk_name(self, token: bytes) -> str:
        """Return how people name the disk that a line names so."""
        return token.decode("utf-8", "surrogateescape")

    def disk_token(self, name: str) -> bytes:
        """Return how a line names the disk that people name so."""
        return name.encode("utf-8", "surrogateescape")


class Fields:
    """The fields of a block's lines, by their place; a missing field is empty."""

    def __init__(self, text: bytes, separator: str, most: int) -> None:
        self.text = text
        self.starts, self.lengths, self.counts = split_lines(text, separator, most)

    def __len__(self) -> int:
        return len(self.counts)

    @property
    def blank(self) -> Mask:
        return np.asarray(self.counts == 0)

    def span(self, place: int) -> Spans:
        """Where the field of that place stands in each line."""
        return self.starts[:, place], self.lengths[:, place]

    def joint_span(self, first: int, last: int) -> Spans:
        """Where the fields from `first` to `last` stand, with what is between them."""
        starts = self.starts[:, first]
        return starts, self.starts[:, last] + self.lengths[:, last] - starts

    def numbers(self, place: int) -> tuple[NDArray[np.uint64], Mask]:
        return numbers(self.text, *self.span(place))

    def columns(self, request: Mask, **known: Any) -> Columns:
        """Return columns with one row for each line, zero where nothing is known."""
        empty = {"operation": np.zeros(len(self), np.uint8), "offset": np.zeros(len(self), np.uint64),
                 "length": np.zeros(len(self), np.uint64)}
        return Columns(request, **{**empty, **known})


def scaled(values: NDArray[np.uint64], unit: int) -> tuple[NDArray[np.uint64], Mask]:
    """Return (values * unit, where that is below 8 EiB), 0 where it is not."""
    fits = values <= MAX_END // np.uint64(unit)
    return np.where(fits, values, np.uint64(0)) * np.uint64(unit), fits


def whole_lines(blocks: Iterable[bytes]) -> Iterator[bytes]:
    """Cut the same bytes into blocks that end where a line does; only the last may lack its newline."""
    rest = b""
    too_long = False  # inside a line whose beginning was given out already
    for block in blocks:
        if too_long:
            newline = block.find(b"\n")
            if newline < 0:
                continue
            block, too_long = block[newline + 1 :], False
        text = rest + block
        end = text.rfind(b"\n") + 1
        if end:
            yield text[:end]
        rest = text[end:]
        if len(rest) > LONGEST_LINE:
            yield b"?" + rest[:KEPT_OF_LONG_LINE] + b"\n"
            rest, too_long = b"", True
    if rest:
        yield rest
