"""All L1 tables of a file as the set of L2 tables that they name: each stretch of the file is read once.

A snapshot's L1 table may be shared, or overlap others: it counts as often as it is named, yet costs nothing more. So
the work is bounded by the bytes of data in the file, however many entries or snapshots there are.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from cowslice.errors import StorageError
from cowslice.format.limits import MAX_FINDINGS
from cowslice.ops.dataruns import DataRuns
from cowslice.ops.sweep import Segment, sweep
from cowslice.ops.tables import L1Tree, Tables
from cowslice.ops.tableset import TableSet
from cowslice.units import KiB

PIECE = 64 * KiB  # bytes of L1 tables read at once
MOST_TABLES = 1 << 19  # distinct L2 tables held at once, 40 to 160 bytes each
OF_SNAPSHOT = 1 << 63
# Trees looked through for one entry of an L1 table that several share.
_MOST_SHARERS = 1024


@dataclass(frozen=True, slots=True)
class L1Piece:
    """Big-endian entries read from host offset `start`, which `times` L1 tables share."""

    start: int
    data: bytes
    times: int
    tree: L1Tree

    def word(self, index: int) -> int:
        """An entry of it."""
        return int.from_bytes(self.data[index * 8 : index * 8 + 8], "big")


# Told of each L1 entry with reserved bits, or of an unaligned table: the piece, and the index in it.
OddEntry = Callable[[L1Piece, int], None]
Failed = Callable[[StorageError], None]


class Roots:
    """The L1 tables of a file."""

    def __init__(self, tables: Tables, most: int = MOST_TABLES) -> None:
        self.tables = tables
        self.most = most
        self._active = [tree for tree in tables.trees if tree.active]
        self._snapshots = [tree for tree in tables.trees if not tree.active]
        self._segments = [*self._swept(self._active)], [*self._swept(self._snapshots)]

    def collect(self, low: int, odd: OddEntry | None = None, failed: Failed | None = None) -> TableSet:
        """The L2 tables from host offset `low` on, as many as may be held. `odd` and `failed` hear what is wrong.

        Of odd entries the first are heard of; the faults of the rest are in the set's `faults`.
        """
        found = TableSet(low, self.most, MAX_FINDINGS)
        bits = self.tables.geometry.cluster_bits
        for piece in self.pieces(failed):
            told = found.add(piece.data, place=piece.start // 8, times=piece.times, cluster_bits=bits,
                             active=piece.times if piece.tree.active else 0)
            if odd:
                for index in told:
                    odd(piece, index)
        found.finish()
        return found

    def pieces(self, failed: Failed | None = None) -> Iterator[L1Piece]:
        """Read every stretch of the L1 tables once, those of the active disk apart; holes are passed over."""
        for trees, segments in zip((self._active, self._snapshots), self._segments, strict=True):
            runs = DataRuns(self.tables.storage)
            for segment in segments:
                try:
                    yield from self._read(runs, segment, trees)
                except StorageError as error:
                    if failed:
                        failed(error)

    def sets(self, first: TableSet | None = None) -> Iterator[TableSet]:
        """All L2 tables in sets that may be held, beginning with one that is there already."""
        found = first or self.collect(0)
        yield found
        while found.high < 1 << 56:
            found = self.collect(found.high)
            yield found

    def owner(self, place: int) -> tuple[L1Tree, int]:
        """The first L1 table that holds an entry at a place (as in TableSet), and the entry's index there."""
        snapshot, word = bool(place & OF_SNAPSHOT), place & ~OF_SNAPSHOT
        trees, segments = (self._active, self._snapshots)[snapshot], self._segments[snapshot]
        tree = trees[segments[bisect_right(segments, word * 8, key=lambda segment: segment.start) - 1].member]
        return tree, word - tree.offset // 8

    def sharers(self, piece: L1Piece, index: int) -> Iterator[tuple[L1Tree, int]]:
        """Those L1 tables, of the first many, that an entry of a piece is part of, and its index in each."""
        at = piece.start + index * 8
        yield piece.tree, (at - piece.tree.offset) // 8
        if piece.times > 1:
            for tree in self._snapshots[:_MOST_SHARERS]:
                if tree is not piece.tree and tree.offset <= at < tree.offset + tree.entries * 8:
                    yield tree, (at - tree.offset) // 8

    def _swept(self, trees: Sequence[L1Tree]) -> Iterator[Segment]:
        return sweep([(tree.offset, tree.offset + tree.entries * 8, 1) for tree in trees])

    def _read(self, runs: DataRuns, segment: Segment, trees: Sequence[L1Tree]) -> Iterator[L1Piece]:
        for start, end in runs.within(segment.start, segment.end):
            for at in range(start, end, PIECE):
                data = self.tables.storage.read(at, min(PIECE, end - at))
                yield L1Piece(at, data, segment.times, trees[segment.member])
