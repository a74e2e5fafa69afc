"""Records what a disk is asked, in a file: 16 bytes for each request, of any number of threads, until it is closed.

It does not know why requests come. A request is recorded whether or not it succeeds; none is lost without being
counted. All numbers in the file are little-endian:

    header, 64 bytes
    offset  size  field
         0     8  magic, 89 "COWTRC" 0a
         8     4  version, 1
        12     4  length of the header in bytes, 64; the first record follows it
        16     8  size of the disk in bytes
        24     8  when the capture began, in microseconds since 1970
        32    32  zero

    record, 16 bytes
         0     8  value << 3 | kind
         8     4  length
        12     4  time: microseconds since the capture began, the low 32 bits

    kind 0 to 4: a read, write, flush, discard, zero; `value` is its offset and `length` its bytes, less than 4 GiB
    kind 5: the next record is a request of `value` << 32 more bytes; `length` is 0
    kind 6: `value` is the time in full; it stands before a record that comes 2**31 microseconds or more after the last
    kind 7: `length` 0: `value` requests were lost here; `length` 1: the end, after `value` requests

Neighbouring records may stand a little out of order: each time is told from the one before as the nearest that fits.
A file without an end was not closed; what is there is sound, up to a last record that may be torn.
"""

from __future__ import annotations

import os
import struct
import time
from typing import TYPE_CHECKING

from cowslice.errors import BadOption, RequestError, StorageError
from cowslice.image.recorder import Recorder
from cowslice.units import TiB

if TYPE_CHECKING:
    from typing import Self

MAGIC = b"\x89COWTRC\n"
VERSION = 1
HEADER = struct.Struct("<8sIIQQ32x")
RECORD = struct.Struct("<QII")
KIND_BITS = 3
LONG, TIME, MARK = 5, 6, 7  # kinds that are no request
LOST, END = 0, 1  # lengths of a MARK
LARGEST_DISK = 1 << 64 - KIND_BITS  # 2 EiB, as much as qcow2 can describe


class Capture:
    """A capture that is under way; made by `Image.capture`. It ends with `close`, at the latest with its image.

    `path` is the file. Any thread may ask and close.
    """

    def __init__(self, path: str | os.PathLike[str], recorder: Recorder, *, size: int) -> None:
        """Begin to record in a new file, which replaces one of that name; `size` is that of the disk in bytes.

        Raises RequestError while another capture of the same disk goes on, BadOption for a disk too large to describe,
        StorageError.
        """
        self.path = os.fspath(path)
        self._recorder = recorder
        self._open = False
        if size > LARGEST_DISK:
            raise BadOption(f"the disk has {size} bytes, expected at most {LARGEST_DISK // TiB} TiB for a capture")
        if recorder.running:
            raise RequestError(f"cannot capture into '{self.path}': a capture of this disk is under way already")
        header = HEADER.pack(MAGIC, VERSION, HEADER.size, size, time.time_ns() // 1000)
        try:
            descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
            try:
                os.write(descriptor, header)
                recorder.start(descriptor)
            except BaseException:
                os.close(descriptor)
                raise
        except OSError as error:
            raise StorageError.of(error, "capture into", self.path) from error
        self._descriptor = descriptor
        self._open = True

    @property
    def recorded(self) -> int:
        """How many requests the file has, or will have when it is closed."""
        return self._recorder.recorded

    @property
    def lost(self) -> int:
        """How many came faster than the file could take them, and are only counted there."""
        return self._recorder.lost

    def close(self) -> None:
        """End the capture and the file. May be called twice. Raises StorageError where not all could be written."""
        if not self._open:
            return
        self._open = False
        try:
            fault = self._recorder.stop()
        finally:
            os.close(self._descriptor)
        if fault:
            doing = f"write all of a capture ({self.lost} requests are lost) to"
            raise StorageError.of(OSError(fault, ""), doing, self.path)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
