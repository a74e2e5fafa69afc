"""What an open image does with a write: one contract for qcow2 and raw, behind Image.

It does not know threads' requests in flight (Image counts them) nor the compiled path, which has taken what it could.
Spans lie inside the disk; buffers are views of bytes, used until the call returns.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack

from cowslice.errors import BadOption, OutOfRange, UnsupportedImage
from cowslice.format.snapshots import Snapshot
from cowslice.image.compressing import Compressing
from cowslice.image.emptying import vacate
from cowslice.image.filling import provide_space
from cowslice.image.growth import Growth, check_resize
from cowslice.image.layer import Layer
from cowslice.image.passage import Passage
from cowslice.image.snapshotting import Snapshotting
from cowslice.image.tracking import Tracking
from cowslice.image.writing import Writer
from cowslice.image.zeroing import Zeroing
from cowslice.storage.base import Storage


class Writes(ABC):
    """The changing half of an image. Each request but `flush` and `finish` is made inside `with request():`."""

    tracking: Tracking | None = None  # the bitmaps of a qcow2 image

    @abstractmethod
    def request(self) -> AbstractContextManager[object]:
        """Count one request as in flight for the block."""

    @abstractmethod
    def write(self, offset: int, view: memoryview) -> None:
        """Write all of `view` at guest byte `offset`."""

    @abstractmethod
    def write_compressed(self, offset: int, view: memoryview) -> None:
        """Write whole clusters compressed. Raises UnsupportedImage where the format cannot."""

    @abstractmethod
    def zero(self, offset: int, length: int, *, keep: bool) -> None:
        """Make the span read as zeros; with `keep` its space stays allocated."""

    @abstractmethod
    def discard(self, offset: int, length: int) -> None:
        """Forget the span where that gives space back."""

    @abstractmethod
    def vacate(self) -> None:
        """Forget everything the layer holds. Raises UnsupportedImage where the format cannot."""

    @abstractmethod
    def flush(self) -> None:
        """Make all earlier writes stable."""

    def create_snapshot(self, name: str) -> Snapshot:
        """Take an internal snapshot. Outside of any request, as the next two."""
        raise self._no_snapshots()

    def apply_snapshot(self, id_or_name: str) -> None:
        """Go back to an internal snapshot."""
        raise self._no_snapshots()

    def delete_snapshot(self, id_or_name: str) -> None:
        """Delete an internal snapshot."""
        raise self._no_snapshots()

    @abstractmethod
    def resize(self, size: int, *, shrink: bool, preallocation: str) -> None:
        """Give the disk another size. Outside of any request."""

    @staticmethod
    def is_zero(view: memoryview, zeros: bytes = bytes(65536)) -> bool:
        """Whether all bytes are zero."""
        return all(view[at : at + len(zeros)] == zeros[: min(len(zeros), len(view) - at)]
                   for at in range(0, len(view), len(zeros)))

    def _no_snapshots(self) -> UnsupportedImage:
        return UnsupportedImage("a raw file has no snapshots, expected a qcow2 image",
                                features=("snapshot in a raw file",))

    def finish(self) -> None:
        """Flush, and leave the file as a clean one. The last call; another one does nothing."""
        self.flush()


class Qcow2Writes(Writes):
    """Writes to a qcow2 image."""

    def __init__(self, writer: Writer, tracking: Tracking, *, keep_reference: bool) -> None:
        self.writer = writer
        self.tracking = self._bitmaps = tracking
        self.zeroing = Zeroing(writer, keep_reference=keep_reference)
        self.compressing = Compressing(writer)
        self.snapshotting = Snapshotting(writer)
        self.growth = Growth(writer, self.zeroing)
        self._finished = False

    def request(self) -> AbstractContextManager[object]:
        return self.writer.tables.passage

    def write(self, offset: int, view: memoryview) -> None:
        self._check_end(offset + len(view))
        self.writer.write(offset, view)

    def write_compressed(self, offset: int, view: memoryview) -> None:
        self._check_end(offset + len(view))
        self.compressing.write(offset, view)

    def zero(self, offset: int, length: int, *, keep: bool) -> None:
        self._check_end(offset + length)
        self.zeroing.zero(offset, length, keep=keep)

    def discard(self, offset: int, length: int) -> None:
        self._check_end(offset + length)
        self.zeroing.discard(offset, length)

    def vacate(self) -> None:
        vacate(self.writer)

    def _check_end(self, end: int) -> None:
        """Inside the request: the disk may have become smaller since it was asked for."""
        if end > self.writer.layer.size:
            raise OutOfRange(f"a change up to byte {end} was asked, expected a span inside the disk of "
                             f"{self.writer.layer.size} bytes")

    def flush(self) -> None:
        self.writer.commits.flush()

    def create_snapshot(self, name: str) -> Snapshot:
        return self.snapshotting.create(name)

    def apply_snapshot(self, id_or_name: str) -> None:
        self.snapshotting.apply(id_or_name)

    def delete_snapshot(self, id_or_name: str) -> None:
        self.snapshotting.delete(id_or_name)

    def resize(self, size: int, *, shrink: bool, preallocation: str) -> None:
        self.growth.resize(size, shrink=shrink, preallocation=preallocation)

    def finish(self) -> None:
        if not self._finished:
            self._finished = True
            with ExitStack() as steps:  # each, whatever happens to the others
                steps.callback(self.writer.commits.finish)
                steps.callback(self._bitmaps.store)
                steps.callback(self.snapshotting.finish)


class RawWrites(Writes):
    """Writes to a raw file. `resized` is told another size while nobody is inside."""

    def __init__(self, layer: Layer, passage: Passage, resized: Callable[[int], object]) -> None:
        self._layer = layer
        self._resized = resized
        self.storage: Storage = layer.storage
        self._name = layer.name
        self._passage = passage

    def request(self) -> AbstractContextManager[object]:
        return self._passage

    def write(self, offset: int, view: memoryview) -> None:
        self.storage.pwrite(offset, view)

    def write_compressed(self, offset: int, view: memoryview) -> None:
        raise UnsupportedImage(f"'{self._name}' is raw, expected a qcow2 image for compressed writes",
                               features=("compressed cluster in a raw file",))

    def zero(self, offset: int, length: int, *, keep: bool) -> None:
        self.storage.zero(offset, length)

    def discard(self, offset: int, length: int) -> None:
        self.storage.discard(offset, length)

    def vacate(self) -> None:
        raise UnsupportedImage(f"'{self._name}' is raw, expected a qcow2 image: a raw file has nothing below it",
                               features=("empty layer in a raw file",))

    def resize(self, size: int, *, shrink: bool, preallocation: str) -> None:
        with self._passage.exclusive():
            before = self._layer.size
            check_resize(before, size, shrink=shrink, preallocation=preallocation)
            if preallocation == "metadata":
                raise BadOption("preallocation is 'metadata', expected off, falloc or full: a raw file has none")
            self.storage.truncate(size)
            if size > before:
                provide_space(self.storage, preallocation, before, size - before)
            self.storage.sync()
            self._layer.size = size
            self._resized(size)

    def flush(self) -> None:
        self.storage.sync()
