"""The bitmaps of an open image, as its user sees them: listed, read, changed.

It does not know how they note changes (tracking.py) nor how they lie in the file. Those of an image that is open for
writing are asked of its tracking, others of the file.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from cowslice.errors import BadOption, OutOfRange, ReadOnly, UnsupportedImage
from cowslice.format.findings import escaped
from cowslice.format.first_cluster import FirstCluster
from cowslice.image.layer import Layer
from cowslice.image.lease import Lease

if TYPE_CHECKING:
    from cowslice.format.bitmaps import Bitmap
    from cowslice.image.tracking import Tracking
    from cowslice.image.writes import Writes


class DiskBitmaps:
    """The part of an Image that is about its persistent bitmaps. Names are str, as file names are."""

    layers: tuple[Layer, ...]
    size: int
    _lease: Lease
    _writes: Writes | None
    _listed: tuple[Bitmap, ...] | None = None

    if TYPE_CHECKING:
        @property
        def path(self) -> str: ...

        @property
        def first_cluster(self) -> FirstCluster | None: ...

    @property
    def bitmaps(self) -> tuple[Bitmap, ...]:
        """Persistent bitmaps of the top file, unusable ones with their `fault`, those left unfinished `in_use`.

        Of an image opened for writing as they are now, else as they were when first asked for.
        """
        with self._lease:
            if self._writes is not None and self._writes.tracking is not None:
                return self._writes.tracking.bitmaps
            if self._listed is None:
                from cowslice.image.bitmaps import load_bitmaps

                first = self.first_cluster
                self._listed = load_bitmaps(self.layers[0].storage, first) if first else ()
            return self._listed

    def dirty_extents(self, name: str, offset: int = 0, length: int | None = None) -> Iterator[tuple[int, int]]:
        """Yield the (offset, length) in bytes that a bitmap marks inside the span, ascending and merged.

        Raises BadOption where there is none of that name, OutOfRange, CorruptImage for one that cannot be used,
        StorageError. What is written meanwhile may be there or not.
        """
        length = self.size - offset if length is None else length
        if offset < 0 or length < 0 or offset + length > self.size:
            raise OutOfRange(f"{length} bytes at offset {offset} asked, expected a span inside the disk of "
                             f"{self.size} bytes")
        with self._lease:
            found = self._dirty(name, offset, length)
        return self._step_by_step(found)

    def add_bitmap(self, name: str, *, granularity: int | None = None, enabled: bool = True) -> None:
        """Add a bitmap that marks nothing yet; an enabled one notes every change from now on.

        `granularity` is the bytes that one bit covers, a power of two from 512 to 2 GiB; by default the cluster size,
        at least 4 KiB and at most 64 KiB. As all changes of bitmaps it is in the file when the image is closed.
        Raises BadOption, ReadOnly, UnsupportedImage.
        """
        with self._lease:
            self._tracking().add(name, granularity=granularity, enabled=enabled)

    def remove_bitmap(self, name: str) -> None:
        """Forget a bitmap, one that cannot be used as well. Raises BadOption, ReadOnly, UnsupportedImage."""
        with self._lease:
            self._tracking().remove(name)

    def clear_bitmap(self, name: str) -> None:
        """Let a bitmap mark nothing. Raises as remove_bitmap, CorruptImage for one that cannot be used."""
        with self._lease:
            self._tracking().clear(name)

    def enable_bitmap(self, name: str) -> None:
        """Let a bitmap note every change from now on. Raises as clear_bitmap, StorageError."""
        with self._lease:
            self._tracking().enable(name, enabled=True)

    def disable_bitmap(self, name: str) -> None:
        """Let a bitmap stay as it is from now on. Raises as clear_bitmap."""
        with self._lease:
            self._tracking().enable(name, enabled=False)

    def merge_bitmap(self, name: str, source: str, source_disk: DiskBitmaps | None = None) -> None:
        """Let a bitmap mark as well what the bitmap `source` marks, of this disk or another one of the same size.

        Granularities may differ. Raises as clear_bitmap, BadOption for another size.
        """
        disk: DiskBitmaps = self if source_disk is None else source_disk
        if disk.size != self.size:
            raise BadOption(f"bitmap '{source}' is of a disk of {disk.size} bytes, expected {self.size}")
        ranges = disk.dirty_extents(source)
        with self._lease:
            self._tracking().merge(name, list(ranges) if disk is self else ranges)

    def _dirty(self, name: str, offset: int, length: int) -> Iterator[tuple[int, int]]:
        if self._writes is not None and self._writes.tracking is not None:
            return self._writes.tracking.ranges(name, offset, length)
        first = self.first_cluster
        if first is None:
            raise BadOption(f"bitmap is '{escaped(name.encode())}', expected none: '{self.path}' is raw")
        from cowslice.image.bitmaps import dirty_extents, find_bitmap

        return dirty_extents(self.layers[0].storage, first, find_bitmap(self.bitmaps, name), offset=offset,
                             length=length)

    def _step_by_step(self, found: Iterator[tuple[int, int]]) -> Iterator[tuple[int, int]]:
        """Each step is a request of its own, so that an unfinished walk does not keep the image open."""
        while True:
            with self._lease:
                extent = next(found, None)
            if extent is None:
                return
            yield extent

    def _tracking(self) -> Tracking:
        if self._writes is None:
            raise ReadOnly(f"cannot change bitmaps of '{self.path}': it was opened for reading only")
        if self._writes.tracking is None:
            raise UnsupportedImage(f"'{self.path}' is raw, expected a qcow2 image: a raw file has no bitmaps",
                                   features=("bitmaps in a raw file",))
        return self._writes.tracking
