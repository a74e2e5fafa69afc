"""Who refers to given host clusters: every structure and every L2 entry that does, in words.

It does not count; it runs only after a check found clusters worth asking about. Each table is read once, however many
L1 entries name it.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from contextlib import suppress

from cowslice.errors import StorageError
from cowslice.format.entries import L1_OFFSET_MASK
from cowslice.format.refcounts import REFTABLE_OFFSET_MASK
from cowslice.ops.claimscan import claims
from cowslice.ops.dataruns import DataRuns
from cowslice.ops.roots import Roots
from cowslice.ops.tables import L1Tree
from cowslice.ops.tableset import TableSet
from cowslice.units import SECTOR

MAX_OWNERS = 16  # told for one cluster; a hostile image may have billions

Hits = dict[int, list[tuple[int, int]]]  # table -> (entry or -1 for the table itself, wanted cluster)


def claims_of(roots: Roots, wanted: Sequence[int], first: TableSet) -> dict[int, list[str]]:
    """Owners of each wanted host cluster (ascending numbers), at most MAX_OWNERS each; `first` as in Roots.sets."""
    tables = roots.tables
    found: dict[int, list[str]] = {cluster: [] for cluster in wanted}
    for area in tables.areas:
        _claim(roots, found, wanted, (area.offset, area.length, area.owner))
    for index, word in enumerate(tables.reftable):
        if offset := word & REFTABLE_OFFSET_MASK:
            _claim(roots, found, wanted, (offset, 1, f"refcount block {index}"))
    hits: Hits = {}
    for tableset in roots.sets(first):
        _find_tables(roots, tableset, wanted, hits)
        _find_entries(roots, tableset, wanted, hits)
    if hits:
        _name_hits(roots, hits, found)
    return found


def _claim(roots: Roots, found: dict[int, list[str]], wanted: Sequence[int], area: tuple[int, int, str]) -> None:
    offset, length, owner = area
    bits = roots.tables.geometry.cluster_bits
    first, last = offset >> bits, (offset + max(length, 1) - 1) >> bits
    for cluster in wanted[bisect_left(wanted, first) : bisect_right(wanted, last)]:
        if len(found[cluster]) < MAX_OWNERS:
            found[cluster].append(owner)


def _find_tables(roots: Roots, tableset: TableSet, wanted: Sequence[int], hits: Hits) -> None:
    """Find the L2 tables that begin in a wanted cluster."""
    bits = roots.tables.geometry.cluster_bits
    for cluster in wanted:
        low, high = tableset.find(cluster << bits), tableset.find((cluster + 1) << bits)
        for n in range(low, min(high, low + MAX_OWNERS)):
            hits.setdefault(tableset[n][0], []).append((-1, cluster))


def _find_entries(roots: Roots, tableset: TableSet, wanted: Sequence[int], hits: Hits) -> None:
    """Find the entries that refer to a wanted cluster. Of tables that overlap, the lowest is named."""
    tables, geometry = roots.tables, roots.tables.geometry
    keys, runs = array("Q", wanted), DataRuns(tables.storage)
    buffer = memoryview(bytearray(geometry.cluster_size))
    owners = dict.fromkeys(wanted, 0)
    at = 0
    for n in range(tableset.find(tables.file_length)):
        offset = tableset[n][0]
        at, end = max(at, offset), offset + geometry.cluster_size
        with suppress(StorageError):
            for start, stop in runs.within(at, end):
                piece = buffer[: stop - start]
                tables.storage.read_into(start, piece)
                for entry, cluster in claims(piece, keys, cluster_bits=geometry.cluster_bits,
                                             extended=geometry.extended_l2):
                    if owners[cluster] < MAX_OWNERS:
                        owners[cluster] += 1
                        here = (start - offset) // geometry.l2_entry_size + entry
                        hits.setdefault(offset, []).append((here, cluster))
        at = end


def _name_hits(roots: Roots, hits: Hits, found: dict[int, list[str]]) -> None:
    """Say for each hit which disk and guest offset it is, of each disk that shares the table."""
    keys = array("Q", sorted(offset // SECTOR for offset in hits))
    named = dict.fromkeys(hits, 0)
    for piece in roots.pieces():
        for index, sector in claims(piece.data, keys, cluster_bits=9, extended=False):
            offset = sector * SECTOR
            if piece.word(index) & L1_OFFSET_MASK != offset or named[offset] >= MAX_OWNERS:
                continue
            for tree, l1_index in roots.sharers(piece, index):
                named[offset] += 1
                _name(roots, found, hits[offset], (tree, l1_index))
                if named[offset] >= MAX_OWNERS:
                    break


def _name(roots: Roots, found: dict[int, list[str]], hits: list[tuple[int, int]], owner: tuple[L1Tree, int]) -> None:
    tree, index = owner
    geometry = roots.tables.geometry
    for entry, cluster in hits:
        if len(found[cluster]) >= MAX_OWNERS:
            continue
        guest = (index << geometry.l2_bits | entry) << geometry.cluster_bits
        found[cluster].append(f"the L2 table {index} of {tree.owner}" if entry < 0
                              else f"guest offset {guest:#x} of {tree.owner}")
