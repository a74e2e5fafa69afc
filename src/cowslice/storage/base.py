"""Where bytes live: the small contract that a driver fulfils, and the convenience that all drivers share.

It does not know what the bytes mean, nor who else reads them.
Every method but `close` may be called by many threads at once, and only cowslice.errors leave it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import TYPE_CHECKING

from cowslice.errors import Closed, OutOfRange, ReadOnly, ShortRead
from cowslice.storage.spans import MergedRead, Span, plan_merged_reads
from cowslice.units import MiB

if TYPE_CHECKING:
    from typing import Self

    from _typeshed import ReadableBuffer, WriteableBuffer

MAX_OFFSET = (1 << 63) - 1  # off_t is signed
MERGED_READ = 8 * MiB  # bounds the memory of one merged read, far above where a larger request is faster
_ZEROS = bytes(MiB)


class Storage(ABC):
    """Bytes at offsets. A driver gives `pread`, `length`, `close`; one that writes also `pwrite`, `truncate`, `sync`.

    `name` is for people and errors. `alignment` (bytes) is what offset, length and memory address must be a multiple of
    to be fastest: every method takes any value, but whoever uses `fileno()` himself must keep to it.
    """

    name: str = ""
    writable: bool = False
    alignment: int = 1
    read_gap: int = 4096  # bytes that `read_spans` rather reads than begins another request

    @abstractmethod
    def pread(self, offset: int, buffer: memoryview) -> int:
        """Fill the writable byte buffer from `offset`; return the bytes read, fewer only where the storage ends."""

    @abstractmethod
    def length(self) -> int:
        """Return the length in bytes, as it is now."""

    @abstractmethod
    def close(self) -> None:
        """Give back what the storage holds; it may be called twice. Does not sync."""

    def pwrite(self, offset: int, data: ReadableBuffer) -> None:
        """Write all of `data` at `offset`, growing the storage if needed; what lies between reads as zeros."""
        raise self._read_only("write to")

    def truncate(self, length: int) -> None:
        """Make the storage `length` bytes long; what is added reads as zeros."""
        raise self._read_only("resize")

    def sync(self) -> None:
        """Make stable, on return, every write that ended before the call."""
        return  # what only reads has nothing to make stable

    def zero(self, offset: int, length: int) -> None:
        """Make the span read as zeros, growing the storage if it ends beyond it."""
        check_span(offset, length)
        for at in range(offset, offset + length, len(_ZEROS)):
            self.pwrite(at, memoryview(_ZEROS)[: min(len(_ZEROS), offset + length - at)])

    def allocate(self, offset: int, length: int) -> None:
        """Take space for the span, so that writing there needs none later: content stays, what is added is zeros."""
        check_span(offset, length)
        has = self.length()
        if offset + length > has:
            Storage.zero(self, max(offset, has), offset + length - max(offset, has))

    def punch(self, offset: int, length: int) -> None:
        """Make every byte of the span zero, as `zero` does, and give its space back where possible."""
        self.zero(offset, length)

    def discard(self, offset: int, length: int) -> None:
        """Give the space of the span back where possible: its content is then unknown, the length stays."""
        if not self.writable:
            raise self._read_only("discard from")
        check_span(offset, length)
        self.length()  # only so that a closed one says so

    def extents(self, offset: int, length: int) -> Iterator[Span]:
        """Yield data and holes that cover exactly the span, ascending; all beyond the end is a hole."""
        check_span(offset, length)
        end = offset + length
        stored = min(max(self.length(), offset), end)
        if stored > offset:
            yield Span(offset, stored - offset, True)
        if end > stored:
            yield Span(stored, end - stored, False)

    def is_hole(self, offset: int, length: int) -> bool:
        """Whether the span is known, without reading it, to be stored nowhere and read as zeros."""
        return False

    def allocated(self) -> int | None:
        """Return the bytes that the storage really takes, or None where nobody knows."""
        return None

    def fileno(self) -> int:
        """Return a descriptor of the same bytes at the same offsets, valid until `close`, or -1 if there is none."""
        return -1

    def read_into(self, offset: int, buffer: WriteableBuffer) -> None:
        """Fill the whole of `buffer`; bytes past the end are zeros."""
        view = memoryview(buffer).cast("B")
        done = self.pread(offset, view)
        if done < len(view):
            view[done:] = bytes(len(view) - done)

    def read(self, offset: int, length: int) -> bytes:
        """Return exactly `length` bytes; those past the end are zeros. The caller has bounded `length`."""
        check_span(offset, length)
        buffer = bytearray(length)
        self.pread(offset, memoryview(buffer))
        return bytes(buffer)

    def read_exactly(self, offset: int, length: int) -> bytes:
        """Return exactly `length` bytes. Raises ShortRead where the storage ends before them."""
        check_span(offset, length)
        length_now = self.length()  # before the memory is taken: a hostile length must cost nothing
        if offset + length > length_now:
            raise self._short(offset, length, max(length_now - offset, 0))
        buffer = bytearray(length)
        done = self.pread(offset, memoryview(buffer))
        if done < length:
            raise self._short(offset, length, done)
        return bytes(buffer)

    def read_spans(self, spans: Sequence[tuple[int, int]], gap: int | None = None) -> list[bytes]:
        """Return the bytes of each (offset, length), in the given order; bytes past the end are zeros.

        Spans not more than `gap` bytes apart (default: `read_gap`) are fetched by one request.
        """
        for offset, length in spans:
            check_span(offset, length)
        reads = plan_merged_reads(spans, gap=self.read_gap if gap is None else gap, most=MERGED_READ)
        pieces = [b""] * len(spans)
        for merged, fetched in self._fetch(reads):
            for n in merged.members:
                at = spans[n][0] - merged.offset
                pieces[n] = fetched[at : at + spans[n][1]]
        return pieces

    def _fetch(self, reads: Sequence[MergedRead]) -> Iterator[tuple[MergedRead, bytes]]:
        """Yield each merged read with its bytes; a driver that can have several under way overrides it."""
        for merged in reads:
            yield merged, self.read(merged.offset, merged.length)

    def _read_only(self, doing: str) -> ReadOnly:
        return ReadOnly(f"cannot {doing} '{self.name}': it was opened for reading only")

    def _closed(self, doing: str) -> Closed:
        return Closed(f"cannot {doing} '{self.name}': it is closed")

    def _short(self, offset: int, length: int, done: int) -> ShortRead:
        return ShortRead(
            f"'{self.name}' ends inside a read: {length} bytes expected at offset {offset}, {done} are there",
            filename=self.name,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name!r} {'r+' if self.writable else 'r'}>"


def check_span(offset: int, length: int) -> None:
    """Raise OutOfRange unless 0 <= offset <= offset + length < 2**63."""
    if offset < 0 or length < 0 or offset + length > MAX_OFFSET:
        raise OutOfRange(f"{length} bytes at offset {offset} asked, expected a span between 0 and 2**63 - 1")
