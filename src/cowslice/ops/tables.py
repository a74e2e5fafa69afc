"""The tables of one image file, in memory, and the areas that they and everything else but guest data occupy.

They do not know how they are found. What is too large to hold (L1 and L2 tables, refcount blocks) is only named.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from cowslice.format.first_cluster import FirstCluster
from cowslice.format.geometry import Geometry
from cowslice.format.header import Header
from cowslice.format.snapshots import Snapshot
from cowslice.format.words import unpack_words
from cowslice.storage.base import Storage
from cowslice.units import div_ceil

_PIECE = 8192  # L1 entries read at once


@dataclass(frozen=True, slots=True)
class Area:
    """Host bytes that one structure occupies. `owner` is how a person calls it."""

    offset: int
    length: int
    owner: str


@dataclass(frozen=True, slots=True)
class L1Tree:
    """One L1 table, read when it is walked: a hostile image may have 65536 of 32 MiB each. `offset` is bytes."""

    storage: Storage
    owner: str
    active: bool
    offset: int
    entries: int

    def tables(self) -> Iterator[tuple[int, int]]:
        """Yield (index, entry) of every entry that is not all zero. Raises StorageError where it comes to it."""
        stored = min(self.entries, max(0, div_ceil(self.storage.length() - self.offset, 8)))
        for first in range(0, stored, _PIECE):
            words = unpack_words(self.storage.read(self.offset + first * 8, min(_PIECE, stored - first) * 8))
            yield from ((first + index, word) for index, word in enumerate(words) if word)


@dataclass(slots=True)
class Tables:
    """The tables of one image file that are small enough to hold: everything but L2 tables and refcount blocks."""

    storage: Storage
    first: FirstCluster
    file_length: int
    trees: list[L1Tree]
    areas: list[Area]
    reftable: array[int]
    snapshots: Sequence[Snapshot]
    faults: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    @property
    def header(self) -> Header:
        return self.first.header

    @property
    def geometry(self) -> Geometry:
        return self.first.header.geometry

    @property
    def clusters(self) -> int:
        """Host clusters of the file, the last one perhaps cut short."""
        return self.geometry.clusters(self.file_length)


def most_tables(tables: Tables) -> int:
    """L2 tables of one tree that are looked at: a sound one has fewer than the file has clusters."""
    return 2 * tables.clusters + 64
