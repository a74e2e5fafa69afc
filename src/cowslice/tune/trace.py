"""Opens a trace, whatever its format, and yields what one disk was asked in chunks of columns.

It does not know formats, only that each claims its own. Memory is bounded by blocks and chunks; a malformed line
raises, or is counted where the caller said so, and is never guessed.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from typing import Protocol

import numpy as np

from cowslice.errors import BadOption, MalformedTrace
from cowslice.format.findings import escaped
from cowslice.tune.bytestream import blocks, name_of
from cowslice.tune.fields import spellings, words
from cowslice.tune.formats.blkparse import BlkparseFormat
from cowslice.tune.formats.capture import CaptureFormat, CaptureReader
from cowslice.tune.formats.fio import FIO2, FIO3
from cowslice.tune.formats.qemulog import QemuFormat
from cowslice.tune.formats.volumes import ALIBABA, MSR, TENCENT
from cowslice.tune.requests import MOST_IN_CHUNK, Operation, Requests, even_chunks
from cowslice.tune.textlines import Columns, LineFormat, LineReader, Mask, whole_lines

LINE_FORMATS: tuple[LineFormat, ...] = (FIO2, FIO3, MSR, ALIBABA, TENCENT, BlkparseFormat(), QemuFormat())
CAPTURE = CaptureFormat()
FORMATS: dict[str, LineFormat | CaptureFormat] = {CAPTURE.name: CAPTURE, **{form.name: form for form in LINE_FORMATS}}
BLOCKS_FOR_NAMES = 64  # that are read to name the disks of a trace in which one must be picked
MOST_NAMES = 20

__all__ = ["FORMATS", "MOST_IN_CHUNK", "Operation", "Requests", "RequestSource", "Trace", "open_trace"]


class RequestSource(Protocol):
    """What a trace and a synthetic workload have in common: each pass yields the same chunks, none of them empty."""

    @property
    def name(self) -> str: ...

    @property
    def format(self) -> str: ...

    @property
    def skipped(self) -> int: ...

    @property
    def notes(self) -> tuple[str, ...]: ...

    def __iter__(self) -> Iterator[Requests]: ...


def open_trace(
    source: str | os.PathLike[str], *, format: str | None = None, skip_bad: bool = False, disk: str | None = None
) -> Trace:
    """Return the trace in a file or at a URL, plain or compressed with gzip or zstd.

    `format` is one of FORMATS; by default the first lines tell. `skip_bad` counts malformed lines instead of raising.
    `disk` picks one disk of a trace of several, by the name that the trace gives it.
    Raises StorageError, MalformedTrace where no format fits, BadOption.
    """
    name = name_of(source)
    head = next(iter(blocks(source)), b"")
    if format is not None and format not in FORMATS:
        raise BadOption(f"format is '{format}', expected one of {', '.join(FORMATS)}")
    form = FORMATS[format] if format is not None else _recognised(head, name)
    if disk is not None and isinstance(form, CaptureFormat):
        raise BadOption(f"disk is '{disk}', expected none: '{name}' is a capture, which is of one disk")
    return Trace(source, form, head, skip_bad=skip_bad, disk=disk)


def _recognised(head: bytes, name: str) -> LineFormat | CaptureFormat:
    if CAPTURE.claims(head):
        return CAPTURE
    lines = head.splitlines()
    for form in LINE_FORMATS:
        if form.claims(lines):
            return form
    known = "; ".join(f"{form.title} ('{form.example}')" for form in LINE_FORMATS)
    found = f"its first line is '{escaped(lines[0])}'" if lines else "it is empty"
    raise MalformedTrace(f"'{name}' has no format that is known: {found}, expected a capture of cowslice or lines of "
                         f"{known}", where=name, line=1)


class Trace:
    """One disk's requests in a trace file. It can be read any number of times, one pass after the other.

    After a pass `skipped` is how many malformed lines were passed over, `notes` what else was odd, one sentence each.
    """

    def __init__(
        self, source: str | os.PathLike[str], form: LineFormat | CaptureFormat, head: bytes, *, skip_bad: bool,
        disk: str | None,
    ) -> None:
        self.name = name_of(source)
        self.format = form.name
        self.skipped = 0
        self.notes: tuple[str, ...] = ()
        self._source = source
        self._form = form
        self._head = head.splitlines() if isinstance(form, LineFormat) else []
        self._skip_bad = skip_bad
        self._disk = disk

    def __iter__(self) -> Iterator[Requests]:
        """Yield chunks of up to MOST_IN_CHUNK requests, none empty.

        Raises MalformedTrace, StorageError; BadOption where a disk must be picked, or the one that was is not there.
        """
        self.skipped = 0
        self.notes = ()
        return even_chunks(self._of_capture() if isinstance(self._form, CaptureFormat) else self._of_lines(self._form))

    def disks(self, most_blocks: int | None = None) -> dict[str, int]:
        """Return how many requests each disk has, in the order in which they first came; reads the whole trace.

        A capture does not name its disk: it is ''. With `most_blocks` only so many blocks are read.
        """
        form = self._form
        if isinstance(form, CaptureFormat):
            return {"": sum(len(chunk) for chunk in self)}
        counted: Counter[bytes] = Counter()
        for number, (text, columns, kept) in enumerate(self._columns(form)):
            if number == most_blocks:
                break
            assert columns.disk is not None
            codes, spelled = spellings(text, *columns.disk, kept)
            for token, times in zip(spelled, np.bincount(codes[kept], minlength=len(spelled)), strict=True):
                counted[token] += int(times)
        return {form.disk_name(token): times for token, times in counted.items()}

    def _of_capture(self) -> Iterator[Requests]:
        reader = CaptureReader(self.name, skip_bad=self._skip_bad)
        for block in blocks(self._source):
            yield from reader.read(block)
        reader.end()
        self.skipped = reader.skipped
        self.notes = reader.notes

    def _of_lines(self, form: LineFormat) -> Iterator[Requests]:
        picked = None if self._disk is None else form.disk_token(self._disk)
        clock = _Clock()
        only: bytes | None = None
        seen = False
        for text, columns, kept in self._columns(form):
            assert columns.disk is not None
            clock.begin(columns, kept, self._reader)
            if picked is not None:
                kept &= words(text, *columns.disk, (picked,)) == 0
            else:
                _, spelled = spellings(text, *columns.disk, kept)
                only = only if only is not None or not spelled else spelled[0]
                if any(token != only for token in spelled):
                    raise self._one_wanted("several disks are in it, expected one to be picked")
            seen = seen or bool(kept.any())
            yield clock.requests(columns, kept, self._reader)
        if picked is not None and not seen:
            raise self._one_wanted(f"disk is '{escaped(picked)}', expected one that is in it")

    def _columns(self, form: LineFormat) -> Iterator[tuple[bytes, Columns, Mask]]:
        """Yield each block of lines with its columns and which of them are sound requests."""
        self._reader = form.reader(self._head)
        line = 1
        for text in whole_lines(blocks(self._source)):
            columns = self._reader.read(text)
            kept = columns.request & ((columns.length > 0) | (columns.operation == Operation.FLUSH))
            bad = self._bad(text, columns, line)
            yield text, columns, kept if bad is None else kept & ~bad
            line += len(columns.request)

    def _bad(self, text: bytes, columns: Columns, first: int) -> Mask | None:
        """The malformed lines of a block, counted; or raises what is wrong with the first of them."""
        if not columns.problems:
            return None
        bad: Mask = np.logical_or.reduce([lines for lines, _ in columns.problems])
        if self._skip_bad:
            self.skipped += int(bad.sum())
            return bad
        row = int(bad.argmax())
        found = escaped(text.split(b"\n", row + 1)[row])
        expected = next(what for lines, what in columns.problems if lines[row])
        assert isinstance(self._form, LineFormat)
        raise MalformedTrace(
            f"'{self.name}', line {first + row}: '{found}', expected {expected}, as in '{self._form.example}'",
            where=self.name, line=first + row, hint="Pass over malformed lines by skip_bad, or --skip-bad.")

    def _one_wanted(self, what: str) -> BadOption:
        names = self.disks(BLOCKS_FOR_NAMES)
        shown = ", ".join(f"'{escaped(name.encode('utf-8', 'surrogateescape'))}'" for name in list(names)[:MOST_NAMES])
        more = f" and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else ""
        shown = shown or "it has no requests"
        return BadOption(f"'{self.name}': {what}: {shown}{more}", hint="Pick one by disk, or --disk.")


class _Clock:
    """From a format's ticks to seconds since the trace's start."""

    def __init__(self) -> None:
        self._origin: int | None = None

    def begin(self, columns: Columns, kept: Mask, reader: LineReader) -> None:
        """Take the first request as the start, unless the format says where that is."""
        if self._origin is None and columns.ticks is not None:
            first = int(kept.argmax()) if kept.any() else -1
            first_tick = int(columns.ticks[first]) if first >= 0 else None
            self._origin = reader.origin if reader.origin is not None else first_tick

    def requests(self, columns: Columns, kept: Mask, reader: LineReader) -> Requests:
        """Return the rows that are kept, their ticks as seconds."""
        rows = np.flatnonzero(kept)
        if columns.ticks is None or self._origin is None:
            time = np.full(len(rows), np.nan)
        else:
            time = (columns.ticks[rows] - self._origin) / reader.ticks_per_second
        return Requests(time, columns.operation[rows], columns.offset[rows], columns.length[rows])
