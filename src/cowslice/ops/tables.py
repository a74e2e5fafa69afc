"""The tables of one image file, in memory, and the areas that they and everything else but guest data occupy.

They do not know how they are found. What is too large to hold (L1 and L2 tables, refcount blocks) is only named.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field

from cowslice.format.first_cluster import FirstCluster
from cowslice.format.geometry import Geometry
from cowslice.format.header import Header
from cowslice.format.snapshots import Snapshot
from cowslice.storage.base import Storage

_MOST_FAULTS = 1024  # more than are ever told; a hostile image has millions


@dataclass(frozen=True, slots=True)
class Area:
    """Host bytes that one structure occupies, named `times` times. `owner` is how a person calls it."""

    offset: int
    length: int
    owner: str
    times: int = 1


@dataclass(frozen=True, slots=True)
class L1Tree:
    """The place of one L1 table: a hostile image may have 65536 of 32 MiB each. `offset` is bytes."""

    owner: str
    active: bool
    offset: int
    entries: int


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
    faults: list[tuple[str, int]] = field(default_factory=list)
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

    def fault(self, message: str, times: int = 1) -> None:
        """Keep something that is wrong, and how often; of too many only the number."""
        if len(self.faults) < _MOST_FAULTS:
            self.faults.append((message, times))
        else:
            last, counted = self.faults[-1]
            self.faults[-1] = (last, counted + times)
