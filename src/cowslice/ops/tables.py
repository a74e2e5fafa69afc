"""The tables of one image file, in memory, and the areas that they and everything else but guest data occupy.

Records only: they do not know how they are read. What is too large to hold (L2 tables, refcount blocks) is not here.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from cowslice.format.first_cluster import FirstCluster
from cowslice.format.geometry import Geometry
from cowslice.format.header import Header
from cowslice.format.snapshots import Snapshot
from cowslice.storage.base import Storage


@dataclass(frozen=True, slots=True)
class Area:
    """Host bytes that one structure occupies. `owner` is how a person calls it."""

    offset: int
    length: int
    owner: str


@dataclass(frozen=True, slots=True)
class L1Tree:
    """One L1 table in memory: of the active disk or of a snapshot. `offset` is its place in bytes."""

    owner: str
    active: bool
    offset: int
    words: array[int]

    def tables(self) -> Iterator[tuple[int, int]]:
        """(index, entry) of every entry that is not all zero."""
        return ((index, word) for index, word in enumerate(self.words) if word)


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
